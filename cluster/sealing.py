"""Sealed folders: finished models of a run whose every file can be checked before it is believed.

A sealed folder is an ordinary one, which diffusers and transformers load as it is, with a `manifest.json`
that names each file's size and SHA-256. The manifest is put in place last: without it a
folder is not sealed. Hidden files, whose names begin with a dot, are left out: no library loads them.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.manifest import (
    MANIFEST,
    damaged,
    fields_digest,
    file_entry,
    local_entry,
    read_manifest,
    verify_file,
    write_manifest,
)
from cluster.storage import RunStore

UNSEALED = "the run has not finished, or is older than seals: seal it with `python -m jobs.serve seal RUN`"
STRANGER = "is no part of what was sealed: remove it"
CHANGED = "was replaced while the folder was read: try again"


@dataclass(frozen=True)
class Seal:
    """What is known of a sealed folder."""

    digest: str
    """SHA-256, in hex, of all names, sizes and checksums: the same for the same content."""
    created: int
    """When it was sealed, seconds since 1970."""
    files: Mapping[str, Mapping[str, Any]]
    """From each file's name in the folder to its `bytes` and `sha256`."""


def save_sealed(store: RunStore, folder: str, source: Path) -> str:
    """Make the files below the local directory `source` the whole content of `folder`; return its digest.

    Meanwhile the folder has no seal. What is sealed is what `source` holds, so that a fault on the way to the
    store is found later. Raises ValueError if `source` is empty or has a file of the seal's own name.
    """
    names = _shown(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    if MANIFEST in names:
        raise ValueError(f"{MANIFEST} is the seal's own name: save that file under another")
    store.delete(f"{folder}/{MANIFEST}")
    store.write_folder(folder, source)
    for left in set(_names(store, folder)) - set(names):
        store.delete(f"{folder}/{left}")
    return _write_seal(store, folder, {name: local_entry(source / name) for name in names})


def seal(store: RunStore, folder: str) -> str:
    """Seal `folder` as it is, and return its digest; raises ValueError if there is nothing in it.

    Sealing anew what is sealed gives the same digest if nothing has changed.
    """
    names = [name for name in _names(store, folder) if name != MANIFEST]
    return _write_seal(store, folder, {name: file_entry(store, f"{folder}/{name}") for name in names})


def verify(store: RunStore, folder: str) -> Seal:
    """Return the seal of `folder` after checking the size and checksum of its every file.

    Raises DamagedCheckpointError, which names the file, if the seal or a file is missing or not whole, or if
    there is a file of which the seal does not know, as a loader might take it for a part of the model.
    """
    seal = _read_seal(store, folder)
    for name in _names(store, folder):
        if name != MANIFEST and name not in seal.files:
            raise damaged(store, folder, name, STRANGER)
    for name, entry in seal.files.items():
        verify_file(store, folder, name, entry)
    return seal


@contextmanager
def opened(store: RunStore, folder: str) -> Iterator[tuple[Path, Seal]]:
    """Yield a local directory with the checked files of the sealed `folder`, to be read only, and its seal.

    Files of a remote store are fetched once, and it is the copies that are checked. Local files are checked
    where they are, and on leaving once more that the seal is still the same.
    Raises DamagedCheckpointError as `verify` does, or if the folder was replaced meanwhile.
    """
    with store.local_folder(folder) as local:
        copy = RunStore(local.parent)
        seal = verify(copy, local.name)
        yield local, seal
        if _read_seal(copy, local.name) != seal:
            raise damaged(store, folder, MANIFEST, CHANGED)


def _names(store: RunStore, folder: str) -> list[str]:
    return _shown(name.removeprefix(f"{folder}/") for name in store.list(folder))


def _shown(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


def _write_seal(store: RunStore, folder: str, files: dict[str, dict[str, Any]]) -> str:
    if not files:
        raise ValueError(f"{store.location(folder)} holds no files: give the folder of a finished run")
    write_manifest(store, folder, {"created": int(time.time()), "files": files})
    return fields_digest(files)


def _read_seal(store: RunStore, folder: str) -> Seal:
    fields = read_manifest(store, folder, UNSEALED)
    created, files = fields.get("created"), fields.get("files")
    if not isinstance(created, int) or not isinstance(files, dict) or not files:
        raise damaged(store, folder, MANIFEST, "is not a seal: it names no files")
    for name, entry in files.items():
        inside = not name.startswith("/") and not {"", "..", "."} & set(name.split("/"))
        if not inside or not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise damaged(store, folder, MANIFEST, f"is not a seal: its entry {name[:80]!r} is none")
    return Seal(fields_digest(files), created, files)
