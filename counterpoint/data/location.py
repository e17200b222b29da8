"""A place that holds data files: a local folder or file, or any URL that fsspec understands."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from counterpoint.data.config import DataConfig

CONCURRENT_READS = 512  # enough to hide a remote store's latency, few enough to hold in memory


@dataclass(frozen=True)
class Location:
    """The file or folder `root` of the file system `fs`; paths below are those of `fs`, without protocol."""

    fs: AbstractFileSystem
    root: str

    def files(self) -> list[str]:
        """Paths of all files in the folder and below, sorted; hidden files are left out."""
        return sorted(path for path in self.fs.find(self.root) if not _is_hidden(self.parts(path)))

    def parts(self, path: str) -> list[str]:
        """The folders between `root` and the file `path`, then its name."""
        below = path.removeprefix(self.root).strip("/")
        return below.split("/") if below else [path.rsplit("/", 1)[-1]]

    def url(self, path: str | None = None) -> str:
        """The name of `path` (or of the place itself) with its protocol, for messages."""
        return self.fs.unstrip_protocol(self.root if path is None else path)

    def read(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield URL and content of each file; raises ValueError naming the first that cannot be read."""
        for start in range(0, len(paths), CONCURRENT_READS):
            batch = list(paths[start : start + CONCURRENT_READS])
            # Not fs.cat(): that takes names with brackets for patterns.
            contents = self.fs.cat_ranges(batch, None, None, on_error="return")
            for path, content in zip(batch, contents, strict=True):
                if isinstance(content, Exception):
                    raise ValueError(
                        f"{self.url(path)}: cannot be read ({content!r}); check the file"
                    ) from content
                yield self.url(path), content


def locate(config: DataConfig) -> Location:
    """The place that `config.uri` names; raises ValueError where it is unset or holds nothing."""
    if config.uri is None:
        raise ValueError(
            f"data.uri is unset, but data.source={config.source} reads files; set it to their path or URL"
        )
    try:
        fs, root = url_to_fs(config.uri)
        exists = fs.exists(root)
    except Exception as error:  # each store's library raises types of its own, for credentials and the like
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data.uri={config.uri} cannot be opened ({reason}); check URL and credentials"
        ) from error
    if not exists:
        raise ValueError(f"data.uri={config.uri} does not exist; check the path or URL")
    return Location(fs, root.rstrip("/"))


def _is_hidden(parts: list[str]) -> bool:
    return any(part.startswith(".") for part in parts)
