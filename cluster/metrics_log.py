"""The metrics of a run: one JSON line per logged step in `metrics.jsonl`, and TensorBoard events."""

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cluster.storage import RunStore

if TYPE_CHECKING:
    # Those that only read rows need not load torch.
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


def read_metrics(store: RunStore, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """Return the rows of a metrics file as they were logged; an unfinished last line is left out."""
    if not store.exists(name):
        return []
    rows = []
    whole, _, _ = store.read_bytes(name).rpartition(b"\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line:
            logger.warning("%s line %d is not a JSON object and is skipped", name, number)
    return rows


class MetricsLog:
    """Appends rows of metrics to a store; one writer at a time, to be closed (or used in a `with`)."""

    def __init__(
        self,
        store: RunStore,
        name: str = METRICS_FILE,
        *,
        flush_s: float = 2.0,
        flush_rows: int = 100,
        tensorboard: bool = True,
        upload_s: float = 60.0,
    ) -> None:
        """Continue the file `name`, after cutting off a line that an earlier writer did not finish.

        Rows are flushed every `flush_s` seconds or `flush_rows` rows; where the store is not local the
        TensorBoard events are uploaded every `upload_s` seconds and on close.
        """
        self.store, self.name = store, name
        self.flush_s, self.flush_rows, self.upload_s = flush_s, flush_rows, upload_s
        self._pending: list[str] = []
        self._flushed_at = self._uploaded_at = time.monotonic()
        self._board = _Board(store) if tensorboard else None
        self._cut_torn_line()

    def log(self, step: int, **metrics: Any) -> None:
        """Add one row; values are numbers, tensors or anything JSON knows; non-finite numbers become null."""
        row = {"step": int(step)} | {key: _plain(value) for key, value in metrics.items()}
        self._pending.append(json.dumps(row, allow_nan=False) + "\n")
        if self._board:
            self._board.add(row)
        late = time.monotonic() - self._flushed_at > self.flush_s
        if late or len(self._pending) >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Put every row logged so far into the store."""
        if self._pending:
            self.store.append(self.name, "".join(self._pending).encode())
            self._pending.clear()
        self._flushed_at = time.monotonic()
        if self._board:
            upload = self._flushed_at - self._uploaded_at > self.upload_s
            self._board.flush(upload)
            self._uploaded_at = self._flushed_at if upload else self._uploaded_at

    def read(self) -> list[dict[str, Any]]:
        """Return every row logged so far, those of earlier writers included."""
        self.flush()
        return read_metrics(self.store, self.name)

    def truncate(self, after_step: int) -> None:
        """Drop the rows of steps later than `after_step`: what a run resumed from there will log again."""
        kept = [row for row in self.read() if row.get("step", 0) <= after_step]
        self.store.write_text(self.name, "".join(json.dumps(row) + "\n" for row in kept))
        if self._board:
            self._board.restart(after_step + 1)

    def close(self) -> None:
        """Flush everything; the log takes no more rows."""
        self.flush()
        if self._board:
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        if not self.store.exists(self.name):
            return
        content = self.store.read_bytes(self.name)
        whole, newline, torn = content.rpartition(b"\n")
        if torn:
            logger.warning("%s ended in the middle of a line; the half line is dropped", self.name)
            self.store.write_bytes(self.name, whole + newline)


class _Board:
    """TensorBoard events: straight into a local store, through a temporary directory into any other."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self._temporary = None if store.is_local else tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name if self._temporary else store.path(TENSORBOARD_DIR))
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=self._purge_step)
        for key, value in _scalars(row):
            self._writer.add_scalar(key, value, row["step"])

    def restart(self, step: int) -> None:
        if self._writer:
            self._writer.close()
        self._writer, self._purge_step = None, step

    def flush(self, upload: bool) -> None:
        if self._writer:
            self._writer.flush()
        if upload and self._temporary:
            self.store.write_folder(TENSORBOARD_DIR, self.folder)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        self.flush(upload=True)
        if self._temporary:
            self._temporary.cleanup()


def _scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and prefix + key != "step":
            yield prefix + key, value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or a numpy value of any shape
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
