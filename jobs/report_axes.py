"""What the charts of a report have in common: lines of many steps, bands of stages, quiet axes."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from jobs.report_record import RunRecord
from jobs.report_svg import BAND, LINE, MUTED, SERIES
from jobs.report_words import STAGE_WORDS

BINS = 120
Points = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values, each [n]."""


def logged(record: RunRecord, key: str) -> Points:
    """Return the logged values of `key` with their steps; rows without a number are left out.

    So is the loss of a student that no head has judged: it stands as 0 in the log.
    """
    rows = record.metrics
    if key == "adversarial_loss":
        rows = [row for row in rows if row.get("voting")]
    return as_points([(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)])


def as_points(pairs: Sequence[tuple[float, float]]) -> Points:
    """Return (step, value) pairs as two arrays."""
    table = np.array(pairs, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def draw_line(
    ax: Axes,
    record: RunRecord,
    points: Points,
    colour: str,
    label: str,
    *,
    bins: int = BINS,
    shade: bool = True,
) -> None:
    """Draw means of neighbouring points, shaded from lowest to highest; stages are not joined."""
    ends = [stage.last for stage in record.stages]
    cuts = np.unique(np.searchsorted(points[0], ends, side="right"))
    pieces = [
        piece for piece in zip(*(np.split(values, cuts) for values in points), strict=True) if len(piece[0])
    ]
    for x, y in pieces:
        count = max(1, min(len(x), round(bins * len(x) / len(points[0]))))
        at, mean = (np.array([part.mean() for part in np.array_split(values, count)]) for values in (x, y))
        low, high = (np.array([pick(part) for part in np.array_split(y, count)]) for pick in (np.min, np.max))
        ax.plot(at, mean, color=colour, label=label, marker="o" if count == 1 else None, markersize=3)
        if shade:
            ax.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
        label = ""


def shade_stages(ax: Axes, record: RunRecord, start: float) -> None:
    """Shade every other stage from step `start` on and name those that are wide enough."""
    stages = [stage for stage in record.stages if stage.last >= start]
    if not stages:
        return
    left = max(start, stages[0].first)
    span = max(1.0, stages[-1].last - left)
    for position, stage in enumerate(stages):
        first = max(left, stage.first - 0.5)
        if position % 2:
            ax.axvspan(first, stage.last + 0.5, color=BAND, linewidth=0, zorder=0)
        if (stage.last - first) / span > 0.08:
            ax.text(
                (first + stage.last) / 2, 1.02, STAGE_WORDS.get(stage.name, stage.name),
                transform=ax.get_xaxis_transform(), ha="center", va="bottom", color=MUTED, fontsize=7.5,
            )  # fmt: skip


def finish(ax: Axes, y: str, x: str = "step") -> None:
    """Name the axes, thin out ticks and lines, and add a legend where there is more than one line."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(True, axis="y")
    ax.grid(False, axis="x")
    ax.margins(x=0.01)
    if ax.get_yscale() == "log":
        _log_ticks(ax)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if x == "step":
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.tick_params(which="both", length=0)
    ax.spines["bottom"].set_color(LINE)
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend(loc="best", handlelength=1.4, borderpad=0.2, labelspacing=0.3)


def _log_ticks(ax: Axes) -> None:
    """Write plain numbers at powers of ten, and between them where an axis spans little."""
    low, high = ax.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def colours(lines: Iterable[object]) -> Iterator[str]:
    """Yield a colour for each line, in the order of the palette."""
    return (SERIES[i % len(SERIES)] for i, _ in enumerate(lines))


def last_quarter(values: NDArray[np.float64]) -> float:
    """Return the mean of the last quarter of `values`, at least one of them."""
    return float(values[-max(1, len(values) // 4) :].mean())
