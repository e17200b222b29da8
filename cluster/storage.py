"""The files of one run under a storage URI: a local path, `s3://`, `memory://`, whatever fsspec knows.

Every file is written aside and then put in its place, so that a reader sees the old bytes or the new
ones and never a half. Names are relative to the run and use forward slashes.
"""

import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import has_magic
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

# An upload to these appears whole or not at all, and a rename there would be a copy: no need to write aside.
ATOMIC_UPLOAD = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf"})
ASIDE = ".tmp-"


class RunStore:
    """The one place where a run reads and writes its files; cheap to make, and it can be pickled."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        """Open the store at `uri`; nothing is created before the first write.

        Raises ValueError when the protocol is unknown or its driver is not installed.
        """
        self.uri = os.fspath(uri)
        try:
            self.fs, root = url_to_fs(self.uri)
        except (ValueError, ImportError) as error:
            raise ValueError(f"storage uri {self.uri!r} cannot be opened: {error}") from error
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if not self.is_local and has_magic(
            self.root
        ):  # fsspec would take the name for a pattern and match others
            raise ValueError(f"storage uri {self.uri!r} must not contain '*', '?' or '['")
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.uploads_atomically = bool(protocols & ATOMIC_UPLOAD)

    def path(self, name: str) -> str:
        """Return where `name` lies in the file system; ValueError when it would leave the run's directory."""
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/"):
            raise ValueError(f"file name {name!r} must be relative to the run and stay inside it")
        return "/".join((self.root, *parts))

    def location(self, name: str) -> str:
        """Return what a person can open: a plain path for a local store, a full URI for any other."""
        return self.path(name) if self.is_local else str(self.fs.unstrip_protocol(self.path(name)))

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """Yield a local path to fill; on a clean exit its bytes become `name`, otherwise they vanish."""
        target = self.path(name)
        if self.is_local:
            aside = Path(_aside(target))
            aside.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield aside
                _sync(aside)
                aside.replace(target)
                _sync(aside.parent)
            finally:
                aside.unlink(missing_ok=True)
        else:
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / PurePosixPath(target).name
                yield local
                self._upload(local, target)

    def _upload(self, local: Path, target: str) -> None:
        if self.uploads_atomically:
            self.fs.put_file(str(local), target)
            return
        aside = _aside(target)
        try:
            self.fs.put_file(str(local), aside)
            self.fs.mv(aside, target)
        except BaseException:
            with suppress(OSError):
                self.fs.rm_file(aside)
            raise

    def write_bytes(self, name: str, data: bytes) -> None:
        """Make `data` the whole content of `name`."""
        with self.staged(name) as local:
            local.write_bytes(data)

    def write_text(self, name: str, text: str) -> None:
        """Make `text`, as UTF-8, the whole content of `name`."""
        self.write_bytes(name, text.encode())

    def append(self, name: str, data: bytes) -> None:
        """Add `data` to the end of `name`: the one write that a reader, or a crash, may see half done."""
        path = self.path(name)
        if not self.uploads_atomically:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            file = self.fs.open(path, "ab")
        except (NotImplementedError, ValueError):  # a store that cannot append: write the whole file again
            self.write_bytes(name, (self.read_bytes(name) if self.exists(name) else b"") + data)
            return
        with file:
            file.write(data)

    def read_bytes(self, name: str) -> bytes:
        """Return the content of `name`; FileNotFoundError when there is none."""
        content: bytes = self.fs.cat_file(self.path(name))
        return content

    def read_text(self, name: str) -> str:
        """Return the content of `name` decoded as UTF-8."""
        return self.read_bytes(name).decode()

    def exists(self, name: str) -> bool:
        """Say whether `name` is a file or a directory of this run."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def list(self, prefix: str = "", *, unfinished: bool = False) -> Sequence[str]:
        """Return the names of all files below the directory `prefix`, sorted.

        Files that are still being written, or that a killed writer left, are only named with `unfinished`.
        """
        self.fs.invalidate_cache()
        start = self.path(prefix) if prefix else self.root
        names = (str(path)[len(self.root) + 1 :] for path in self.fs.find(start))
        return sorted(name for name in names if unfinished or ASIDE not in PurePosixPath(name).name)

    def children(self, name: str) -> Sequence[str]:
        """Return the last names of the files and folders, even empty ones, directly in the folder `name`."""
        self.fs.invalidate_cache()
        try:
            return sorted(PurePosixPath(path).name for path in self.fs.ls(self.path(name), detail=False))
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        """Remove the file or the whole directory `name`; not an error when it is gone already."""
        with suppress(FileNotFoundError):
            self.fs.rm(self.path(name), recursive=True)

    def write_folder(self, name: str, source: Path) -> None:
        """Store every file below the local directory `source` under `name`.

        JSON files go last: a model folder that has its `config.json` has its weights too.
        """
        files = (path for path in source.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: (path.suffix == ".json", path)):
            with self.staged(f"{name}/{path.relative_to(source).as_posix()}") as local:
                shutil.copyfile(path, local)

    @contextmanager
    def local_folder(self, name: str) -> Iterator[Path]:
        """Yield a local directory with the files of `name`, to be read only: itself where it is local."""
        if self.is_local:
            yield Path(self.path(name))
            return
        with tempfile.TemporaryDirectory() as folder:
            for file in self.list(name):
                local = Path(folder) / PurePosixPath(file).relative_to(name)
                local.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(self.path(file), str(local))
            yield Path(folder)


def save_image(store: RunStore, name: str, image: Image.Image) -> None:
    """Write `image` as a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    store.write_bytes(name, buffer.getvalue())


def _aside(target: str) -> str:
    folder, _, name = target.rpartition("/")
    return f"{folder}/.{name}{ASIDE}{uuid.uuid4().hex}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
