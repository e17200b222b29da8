"""One line of live progress on a terminal; a start line and an end line where there is none."""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self, TextIO

REFRESH_SECONDS = 0.2
BAR = 16
Value = str | int | float


class ProgressLine:
    """A line that is rewritten in place as a job goes on.

    Args:
        total: steps in all, at least 1.
        label: what runs, at the start of the line.
        stream: where to write; None means standard error.
        start: steps that were done before, by the run that this one resumes.
        unit: what `rate` counts.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        total: int,
        label: str,
        stream: TextIO | None = None,
        start: int = 0,
        unit: str = "samples",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total < 1:
            raise ValueError(f"{label}: total={total}; pass at least 1 step")
        self.total, self.label, self.start, self.unit = total, label, start, unit
        self.step, self.units = start, 0.0
        self._stream = stream if stream is not None else sys.stderr
        self._clock, self._began, self._drawn = clock, clock(), -math.inf
        self._fields: dict[str, Value] = {}
        self._width = 0
        self._open = True
        self.live = self._stream.isatty()
        if not self.live:
            self._write_line(f"{label}: {total - start} of {total} steps to go")

    def update(self, step: int, units: float = 0.0, **fields: Value) -> None:
        """Show that `step` steps are done.

        Args:
            step: steps done of the total.
            units: samples (or other units) done since the last update, for the rate.
            **fields: what else to show, such as loss or live_heads; a field stays until it is replaced.
        """
        self.step = step
        self.units += units
        self._fields.update(fields)
        now = self._clock()
        if self.live and (now - self._drawn >= REFRESH_SECONDS or step >= self.total):
            self._drawn = now
            self._rewrite(self.text())

    def text(self) -> str:
        """The line as it stands."""
        seconds = self._clock() - self._began
        fields = dict(self._fields)
        if self.units and seconds > 0:
            fields[f"{self.unit}/s"] = self.units / seconds
        return format_line(self.label, self.step, self.total, seconds, fields, self.start)

    def close(self, outcome: str = "done") -> None:
        """Leave the last line standing with its outcome; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        if self.live:
            self._rewrite(f"{self.text()}  {outcome}")
            self._stream.write("\n")
            self._stream.flush()
        else:
            self._write_line(f"{self.text()}  {outcome}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("done" if kind is None else f"stopped by {kind.__name__}")

    def _rewrite(self, line: str) -> None:
        columns = _columns(self._stream)
        line = line if len(line) < columns else line[: columns - 1]
        self._stream.write("\r" + line.ljust(min(self._width, columns - 1)))
        self._stream.flush()
        self._width = len(line)

    def _write_line(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def format_line(
    label: str, step: int, total: int, seconds: float, fields: Mapping[str, Value], start: int = 0
) -> str:
    """Progress in one line: bar, step, fields in their order, time spent and time left.

    Args:
        label: what runs.
        step: steps done of `total`.
        total: steps in all.
        seconds: time spent on the steps since `start`.
        fields: what else to show; underscores in names become spaces.
        start: steps done before this time began to count.
    """
    done = min(max(step / total, 0.0), 1.0)
    bar = "#" * int(BAR * done)
    parts = [f"{label} [{bar:<{BAR}}] {step}/{total}"]
    parts += [f"{name.replace('_', ' ')} {_shown(value)}" for name, value in fields.items()]
    left = seconds / (step - start) * (total - step) if step > start else math.nan
    return "  ".join([*parts, f"{duration(seconds)} spent", f"{duration(left)} left"])


def duration(seconds: float) -> str:
    """Seconds as "m:ss" or "h:mm:ss"; "-:--" where they are not known."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _shown(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(stream: TextIO) -> int:
    try:
        return max(os.get_terminal_size(stream.fileno()).columns, 20)
    except (OSError, ValueError):
        return 120
