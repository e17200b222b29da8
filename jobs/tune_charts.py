"""The charts of what was tried: parallel coordinates, each key against the objective, importance."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from jobs.report_axes import finish
from jobs.report_svg import BAD, INK, LINE, MUTED, PAPER, SERIES, Chart, drawing
from jobs.report_words import number
from jobs.tune_axes import Dimension, dimension, figure_axis, jitter, padded, wrapped
from jobs.tune_ledger import TrialRecord
from jobs.tune_record import SweepRecord, is_log
from jobs.tune_table import best_first, current, said, standard_error

BEST_WIDTH, WIDTH = 2.4, 1.2
INCHES_PER_AXIS, LEAST_INCHES = 1.35, 10.8
RUG = 0.035


def dimensions(sweep: SweepRecord) -> list[Dimension]:
    """Return the axis of each swept key, in the order of the space."""
    space, found = sweep.section("space"), [current(record) for record in sweep.trials]
    return [dimension(key, space.get(key), found) for key in sweep.names]


def parallel_coordinates(sweep: SweepRecord) -> Chart | None:
    """Draw a line through the values of every trial, on to its objective; None for no trial."""
    swept = dimensions(sweep)
    if not sweep.trials or not swept:
        return None
    values = [record.value for record in sweep.ranked if record.value is not None]
    last = figure_axis(sweep.metric, values, is_log(values)) if values else None
    axes = [*swept, *([last] if last else [])]
    with drawing(size=(max(LEAST_INCHES, INCHES_PER_AXIS * len(axes)), 3.9)) as it:
        for at, axis in enumerate(axes):
            name = sweep.metric if axis is last else sweep.names[axis.key]
            _upright(it.ax, at, axis, name, axis is last, turned=axis is last and sweep.mode == "min")
        for record in reversed(best_first(sweep.trials, sweep.mode)):
            _thread(it.ax, sweep, record, axes, last)
        it.ax.set_xlim(-0.45, len(axes) - 0.75)
        it.ax.set_ylim(-0.04, 1.04)
        it.ax.axis("off")
        best = sweep.best
        told = f"Best: {_listed(sweep, best)}; {sweep.metric} {number(best.value)}." if best else ""
        caption = "A line is a trial, coloured by rank from the best (orange, thick) to the worst (blue)"
        caption += f", with the best {sweep.metric} at the top." if last else "."
        if any(record.state != "done" for record in sweep.trials):
            caption += " Faint: stopped, failed or still running."
        if any(axis.key not in current(record) for axis in swept for record in sweep.trials):
            caption += " A line is broken where its trial lacks the key."
        logs = [sweep.names[axis.key] for axis in swept if axis.log]
        if logs:
            caption += f" Logarithmic: {', '.join(logs)}."
        return it.chart("What was tried", caption, f"{len(sweep.trials)} trials. {told}", wide=True)


def marginals(sweep: SweepRecord) -> list[Chart]:
    """Draw the objective of the finished trials against each key, one chart a key."""
    if not sweep.ranked:
        return []
    return [_marginal(sweep, axis) for axis in dimensions(sweep)]


def importance_chart(sweep: SweepRecord, shares: Mapping[str, float]) -> Chart | None:
    """Draw each key's share of the objective's variance; None where there is none."""
    if not shares:
        return None
    ordered = sorted(shares.items(), key=lambda pair: pair[1])
    most = 1.08 * max(0.05, *shares.values())
    with drawing(size=(5.2, max(2.7, 0.75 + 0.27 * len(ordered)))) as it:
        it.ax.barh(range(len(ordered)), [share for _, share in ordered], 0.62, color=SERIES[0], alpha=0.75)
        for at, (_, share) in enumerate(ordered):
            it.ax.text(share + 0.006 * most, at, f"{share:.2f}", va="center", color=INK, fontsize=8)
        it.ax.set_yticks(range(len(ordered)), [said(sweep.names.get(key, key), 30) for key, _ in ordered])
        it.ax.set_xlim(0.0, most)
        it.ax.set_xlabel("share of the variance")
        it.ax.grid(False, axis="y")
        it.ax.tick_params(which="both", length=0)
        it.ax.tick_params(axis="y", labelcolor=INK, labelsize=8.5)
        told = "; ".join(f"{key} {share:.2f}" for key, share in reversed(ordered))
        return it.chart(
            "What mattered",
            "Functional ANOVA over a forest fitted to the trials: a guide where trials are few, and about "
            "the ranges that were searched.",
            f"Bars: {told}.",
        )


def _upright(ax: Axes, at: int, axis: Dimension, name: str, last: bool, turned: bool) -> None:
    """Draw one axis of the parallel coordinates with its ticks on the left."""
    ax.plot([at, at], [0.0, 1.0], color=LINE, linewidth=1.0, zorder=1)
    ax.text(at, 1.06, wrapped(said(name, 51)), ha="center", va="bottom", color=INK, fontsize=8)
    best = axis.low if turned else axis.high
    for value, text in axis.ticks_with(best) if last else axis.ticks():
        y = 1.0 - axis.place(value) if turned else axis.place(value)
        ax.plot([at - 0.02, at], [y, y], color=MUTED, linewidth=0.8, zorder=1)
        ax.text(
            at - 0.04, y, text, ha="right", va="center", color=MUTED, fontsize=7.5, zorder=6,
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.92, "pad": 0.6},
        )  # fmt: skip


def _thread(
    ax: Axes, sweep: SweepRecord, record: TrialRecord, axes: Sequence[Dimension], last: Dimension | None
) -> None:
    """Draw a trial's line, in pieces where it lacks a key."""
    heights: list[float | None] = []
    done = last is not None and record in sweep.ranked
    for axis in axes:
        if axis is last:
            height = axis.place(record.value) if done and record.value is not None else None
            heights.append(1.0 - height if height is not None and sweep.mode == "min" else height)
        else:
            value = axis.value(current(record))
            heights.append(None if value is None else axis.place(value))
    best = record is sweep.best
    look: dict[str, Any] = {
        "color": sweep.colours[record.index],
        "alpha": 1.0 if best else 0.8 if done else 0.3,
    }
    for at, (one, other) in enumerate(pairwise(heights)):
        if one is not None and other is not None:
            ax.plot(
                [at, at + 1], [one, other], linewidth=BEST_WIDTH if best else WIDTH, zorder=5 if best else 3,
                **look,
            )  # fmt: skip
    there = [(at, height) for at, height in enumerate(heights) if height is not None]
    x, y = [at for at, _ in there], [height for _, height in there]
    ax.plot(x, y, "o", markersize=4.5 if best else 2.6, zorder=5 if best else 3, **look)


def _marginal(sweep: SweepRecord, axis: Dimension) -> Chart:
    name = sweep.names[axis.key]
    with drawing(size=(5.2, 2.7)) as it:
        ax = it.ax
        values = [record.value for record in sweep.ranked if record.value is not None]
        for record in reversed(sweep.ranked):
            x = _shifted(axis, record)
            if x is not None and record.value is not None:
                error, best = standard_error(record.values), record is sweep.best
                ax.errorbar(
                    x, record.value, error or 0.0, fmt="o", color=sweep.colours[record.index], linewidth=1.0,
                    markersize=7 if best else 5, markeredgecolor=INK if best else PAPER, markeredgewidth=0.8,
                    zorder=5 if best else 3,
                )  # fmt: skip
        for record in sweep.trials:
            x = _shifted(axis, record)
            if record.state in ("stopped", "failed") and x is not None:
                colour = BAD if record.state == "failed" else MUTED
                ax.plot(
                    [x, x], [0.0, RUG], transform=ax.get_xaxis_transform(), color=colour, linewidth=1.2,
                    alpha=0.8,
                )  # fmt: skip
        ax.set_yscale("log" if is_log(values) else "linear")
        if axis.log:
            ax.set_xscale("log")
        finish(ax, said(sweep.metric, 40), "")
        ax.margins(y=0.14)
        ax.set_xlim(*padded(axis))
        ticks = axis.ticks(6)
        ax.set_xticks([value for value, _ in ticks], [text for _, text in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        drawn = sum(axis.key in current(record) for record in sweep.ranked)
        return it.chart(
            name, _marginal_caption(sweep, axis, drawn), f"{drawn} finished trials against {axis.key}."
        )


def _shifted(axis: Dimension, record: TrialRecord) -> float | None:
    """Return where a trial stands on a key's axis; among those of a category a bit aside."""
    value = axis.value(current(record))
    return value if value is None or not axis.categories else value + 0.5 * jitter(record.index)


def _marginal_caption(sweep: SweepRecord, axis: Dimension, drawn: int) -> str:
    words = [f"{drawn} finished trials{', logarithmic scale' if axis.log else ''}"]
    if any(standard_error(record.values) is not None for record in sweep.ranked):
        words.append("bars: standard error over seeds")
    states = {record.state for record in sweep.trials if axis.key in current(record)}
    marks = [text for state, text in (("stopped", "stopped"), ("failed", "failed (red)")) if state in states]
    if marks:
        words.append(f"ticks below: {' and '.join(marks)} trials")
    return f"{'; '.join(words)}."


def _listed(sweep: SweepRecord, record: TrialRecord) -> str:
    return ", ".join(f"{sweep.names[key]} {said(value)}" for key, value in current(record).items())
