"""The charts of the panel: how far heads tell real from generated, how often they are renewed, their ages."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from counterpoint.schedules import Scheduled, is_constant, read_scheduled, value_at
from jobs.progress import part_of, progress_of
from jobs.report_axes import (
    BINS,
    Points,
    as_points,
    colours,
    draw_line,
    finish,
    last_quarter,
    logged,
    shade_stages,
)
from jobs.report_record import HeadAges, RunRecord
from jobs.report_svg import INK, MUTED, SERIES, Chart, drawing
from jobs.report_words import number

KIND_WORDS = {
    "global_conditional": "global, conditional",
    "local_conditional": "local, conditional",
    "local_unconditional": "local, unconditional",
}


def panel_charts(record: RunRecord) -> list[Chart]:
    """Return the charts of logit gaps, refreshes and ages of the heads, as far as there is data."""
    charts = (gap_curves(record), updates(record), gap_map(record), refreshes(record), ages(record))
    return [chart for chart in charts if chart is not None]


def gap_curves(record: RunRecord) -> Chart | None:
    """Draw the mean logit gap of each critic group over the steps in which it judged."""
    labels = record.group_labels()
    lines = {key: points for key in labels if len((points := _gap_points(record, key))[0])}
    if not lines:
        return None
    with drawing() as it:
        for colour, (key, points) in zip(colours(lines), lines.items(), strict=True):
            draw_line(it.ax, record, points, colour, labels[key], bins=BINS // 3, shade=False)
        it.ax.axhline(0.0, color=MUTED, linewidth=0.8)
        first = min(points[0][0] for points in lines.values())
        shade_stages(it.ax, record, first)
        finish(it.ax, "logit on real minus on generated")
        last = ", ".join(f"{labels[key]}: {number(last_quarter(y))}" for key, (_, y) in lines.items())
        return it.chart(
            "Logit gap by noise level",
            "How far heads tell real from generated, averaged over kinds and feature levels; 0 is chance.",
            f"Lines, one per noise level. Averages of the last quarter: {last}.",
        )


def gap_map(record: RunRecord) -> Chart | None:
    """Draw the mean logit gap by kind and feature level, one map per critic group, over the last quarter."""
    maps = {key: grid for key in record.group_labels() if (grid := _gap_grid(record, key)) is not None}
    if not maps:
        return None
    kinds = [kind for kind in KIND_WORDS if any(kind in grid for grid in maps.values())]
    levels = max(len(values) for grid in maps.values() for values in grid.values())
    peak = max(np.nanmax(np.abs(values)) for grid in maps.values() for values in grid.values()) or 1.0
    with drawing(len(maps), size=(10.8, 0.62 + 0.34 * len(kinds)), share=True) as it:
        for ax, (key, grid) in zip(it.axes, maps.items(), strict=True):
            _cells(ax, [grid.get(kind, np.full(levels, np.nan)) for kind in kinds], peak)
            ax.set_title(record.group_labels()[key], color=INK, fontsize=8.5)
            ax.set_xticks(range(levels))
            ax.set_yticks(range(len(kinds)), [KIND_WORDS[kind] for kind in kinds])
            ax.set_xlabel("feature level")
            ax.grid(False)
            ax.spines["bottom"].set_visible(False)
        strongest = max(
            ((np.nanmax(values), key, kind) for key, grid in maps.items() for kind, values in grid.items()),
        )
        return it.chart(
            "Logit gap by noise level, kind and feature level",
            "Mean over the last quarter of the steps with a panel; level 0 is the finest. "
            "An empty cell had no judge.",
            f"Maps, one per noise level. The largest gap is {number(strongest[0])}, "
            f"at {record.group_labels()[strongest[1]]}, {KIND_WORDS[strongest[2]]}.",
            wide=True,
        )


def refreshes(record: RunRecord) -> Chart | None:
    """Draw how many heads have been renewed in all, beside what the configured rate leads one to expect."""
    steps, renewed = logged(record, "refreshed")
    if not len(steps):
        return None
    total = np.cumsum(renewed)
    heads, rate = record.pool.get("heads"), _refresh_rate(record)
    with drawing() as it:
        it.ax.step(steps, total, where="post", color=SERIES[0], label="renewed")
        if heads and rate is not None and _critics(record).get("refresh_clock") != "micro_step":
            expected = heads * expected_refreshes(record, rate, steps)
            it.ax.plot(
                steps,
                expected,
                color=MUTED,
                linewidth=1,
                linestyle=(0, (4, 3)),
                label="at the configured rate",
            )
        finish(it.ax, "heads renewed so far")
        return it.chart(
            "Refreshes",
            "Heads replaced by new ones so far; a group counts its own when it is next asked to judge.",
            f"A line that reaches {int(total[-1])} heads at step {int(steps[-1])}.",
        )


def ages(record: RunRecord) -> Chart | None:
    """Draw the ages of the heads at the last checkpoint beside the geometric law of their refresh rate."""
    rate = _refresh_rate(record)
    ticks = max((group.ticks for group in record.heads), default=0)
    if not ticks or not isinstance(rate, float) or not rate:  # the law is that of one rate throughout
        return None
    edges = np.unique(np.linspace(0, ticks, min(12, ticks) + 1).round())
    found, law = counted_ages(record.heads, edges), expected_ages(record.heads, rate, edges)
    names = [f"{int(edge)}" for edge in edges[:-1]] + ["first"]
    with drawing() as it:
        it.ax.bar(range(len(names)), found, width=0.86, color=SERIES[0], alpha=0.75, label="heads")
        style: dict[str, Any] = {
            "color": SERIES[1],
            "markersize": 3.5,
            "linewidth": 1,
            "label": "geometric law",
        }
        it.ax.plot(range(len(names)), law, "o-", **style)
        it.ax.set_xticks(range(len(names)), names)
        finish(it.ax, "heads", x="age in ticks, from ... on; first: never renewed")
        it.ax.set_xlim(-0.6, len(names) - 0.4)
        mean = number(float(np.mean([age for group in record.heads for age in group.ages])))
        return it.chart(
            "Ages of the heads",
            f"At the last checkpoint, after {ticks} ticks with {rate:.2g} of all heads renewed in each.",
            f"Bars beside a curve. The mean age is {mean} ticks; {found[-1]:.0f} heads were never renewed, "
            f"where {number(law[-1])} are expected.",
        )


def counted_ages(groups: Sequence[HeadAges], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the number of heads with ages between `edges` [n + 1], and of those never renewed: [n + 1]."""
    renewed = [age for group in groups for age in group.ages if age < group.ticks]
    first = sum(age >= group.ticks for group in groups for age in group.ages)
    return np.append(np.histogram(renewed, edges)[0], first).astype(float)


def expected_ages(groups: Sequence[HeadAges], rate: float, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what `counted_ages` is on average when each tick renews a head with probability `rate`.

    A head has age a < T after T ticks with probability rate (1 - rate)^a, and was never renewed with
    probability (1 - rate)^T; each group has its own T.
    """
    expected = np.zeros(len(edges))
    for group in groups:
        older = (1.0 - rate) ** np.minimum(edges, group.ticks)
        expected[:-1] += len(group.ages) * (older[:-1] - older[1:])
        expected[-1] += len(group.ages) * (1.0 - rate) ** group.ticks
    return expected


def updates(record: RunRecord) -> Chart | None:
    """Draw how many optimizer updates the heads of the last checkpoint have had since they were made."""
    counts = np.array([count for group in record.heads for count in group.updates])
    if not len(counts) or not counts.any():
        return None
    mean = number(float(counts.mean()))
    width = max(1, -(-int(counts.max() + 1) // 24))
    edges = np.arange(0, counts.max() + width + 1, width)
    with drawing() as it:
        centres = edges[:-1] + (width - 1) / 2
        it.ax.bar(centres, np.histogram(counts, edges)[0], 0.86 * width, color=SERIES[0], alpha=0.75)
        it.ax.axvline(counts.mean(), color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        finish(it.ax, "heads", x="optimizer updates")
        it.ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return it.chart(
            "What the heads have learned from",
            f"Updates of each head since it was made, at the last checkpoint; dotted the mean, {mean}.",
            f"Bars. Updates run from {counts.min()} to {counts.max()}, with a mean of {mean}.",
        )


def _gap_points(record: RunRecord, group: str) -> Points:
    pairs = []
    for row in record.metrics:
        values = [
            gap for kind in (row.get("gap") or {}).get(group, {}).values() for gap in kind if gap is not None
        ]
        if values:
            pairs.append((row["step"], float(np.mean(values))))
    return as_points(pairs)


def _gap_grid(record: RunRecord, group: str) -> dict[str, NDArray[np.float64]] | None:
    """Return the gaps [levels] of each kind, averaged over the last quarter of the group's own steps."""
    rows = [row["gap"][group] for row in record.metrics if group in (row.get("gap") or {})]
    rows = rows[-max(1, len(rows) // 4) :]
    grid = {}
    for kind in KIND_WORDS:
        table = np.array([row[kind] for row in rows if kind in row], dtype=float)
        judged = np.isfinite(table).sum(0) if len(table) else np.zeros(0)
        if judged.any():
            sums = np.nansum(table, axis=0)
            grid[kind] = np.divide(sums, judged, out=np.full(len(sums), np.nan), where=judged > 0)
    return grid or None


def _cells(ax: Axes, rows: Sequence[NDArray[np.float64]], peak: float) -> None:
    """Shade a table of values: one colour above zero, another below, stronger the farther from it."""
    for y, values in enumerate(rows):
        for x, value in enumerate(values):
            if np.isnan(value):
                continue
            colour = SERIES[0] if value >= 0 else SERIES[1]
            shade = 0.08 + 0.56 * abs(value) / peak
            ax.barh(y, 0.94, left=x - 0.47, height=0.9, color=colour, alpha=shade)
            ax.text(x, y, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", fontsize=7.5)
    ax.set_xlim(-0.5, max(len(row) for row in rows) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)


def _critics(record: RunRecord) -> dict[str, Any]:
    critics = record.config.get("critics")
    return critics if isinstance(critics, dict) else {}


def expected_refreshes(record: RunRecord, rate: Scheduled, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return which multiple of all heads is due after each of `steps` [n], counted from the first of them."""
    if isinstance(rate, float):
        return rate * (steps - steps[0] + 1)
    every = range(int(steps[0]), int(steps[-1]) + 1)
    rates = [value_at(rate, progress_of(record.config, "critics.refresh_rate", step)) for step in every]
    return np.cumsum(rates)[(steps - steps[0]).astype(int)]


def _refresh_rate(record: RunRecord) -> Scheduled | None:
    """Return the configured rate, as a number if it never changes; None where there is none."""
    given = _critics(record).get("refresh_rate")
    if given is None:
        return None
    try:
        rate = read_scheduled(given)
        changes = not is_constant(rate) and bool(part_of(record.config, "critics.refresh_rate"))
    except ValueError:  # a configuration that no job would take
        return None
    return rate if changes else value_at(rate, 0.0)
