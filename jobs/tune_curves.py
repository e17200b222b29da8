"""The charts of a sweep's course: what trials reached step by step, and what a population bred."""

import json
from collections.abc import Sequence
from typing import Any

from jobs.report_axes import finish
from jobs.report_svg import BAD, MUTED, PAPER, Chart, drawing
from jobs.report_words import number
from jobs.tune_axes import Dimension
from jobs.tune_charts import BEST_WIDTH, WIDTH, dimensions
from jobs.tune_ledger import Segment, TrialRecord
from jobs.tune_record import SweepRecord, finite, is_log
from jobs.tune_table import best_first, said

SIZE = (10.8, 3.9)


def learning_curves(sweep: SweepRecord) -> Chart | None:
    """Draw what every trial reported over its steps, with rungs, stops and failures; None for no report."""
    drawn = {record.index: _reported(record) for record in sweep.trials}
    values = [value for points in drawn.values() for _, value in points]
    if not values:
        return None
    with drawing(size=SIZE) as it:
        for record in reversed(best_first(sweep.trials, sweep.mode)):
            points = drawn[record.index]
            if not points:
                continue
            best, done = record is sweep.best, record in sweep.ranked
            colour, alpha = sweep.colours[record.index], 1.0 if best else 0.8 if done else 0.55
            x, y = zip(*points, strict=True)
            it.ax.plot(
                x, y, color=colour, alpha=alpha, linewidth=BEST_WIDTH if best else WIDTH,
                marker="o" if len(x) == 1 else None, markersize=3, zorder=5 if best else 3,
            )  # fmt: skip
            if record.state in ("stopped", "failed"):
                mark, shade = ("x", BAD) if record.state == "failed" else ("o", MUTED)
                it.ax.plot(
                    x[-1], y[-1], mark, color=shade, markersize=5, markeredgewidth=1.3, zorder=6,
                    markerfacecolor=PAPER,
                )  # fmt: skip
        steps = [step for points in drawn.values() for step, _ in points]
        rungs = [rung for rung in _rungs(sweep, max(steps)) if rung >= min(steps)]
        for rung in rungs:
            it.ax.axvline(rung, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            it.ax.text(
                rung, 1.01, f"rung {rung:g}", transform=it.ax.get_xaxis_transform(), ha="center",
                va="bottom", color=MUTED, fontsize=7.5,
            )  # fmt: skip
        it.ax.set_yscale("log" if is_log(values) else "linear")
        finish(it.ax, said(sweep.progress, 40))
        return it.chart(
            "Learning curves", _curves_caption(sweep, bool(rungs)), _curves_told(sweep, drawn), wide=True
        )


def lineage_charts(sweep: SweepRecord) -> list[Chart]:
    """Draw for each swept number what the weights of every member were trained with, step by step."""
    if not any(record.segments for record in sweep.trials):
        return []
    found = [_lineage(sweep, axis) for axis in dimensions(sweep) if not axis.categories]
    return [chart for chart in found if chart is not None]


def takeovers(trials: Sequence[TrialRecord]) -> int:
    """Return how many of the segments that live on in some trial's weights began with a take-over."""
    found = {
        (segment.step, segment.source, json.dumps(dict(segment.params), sort_keys=True, default=str))
        for record in trials
        for segment in record.segments
        if segment.step > 0
    }
    return len(found)


def _lineage(sweep: SweepRecord, axis: Dimension) -> Chart | None:
    members = [r for r in reversed(best_first(sweep.trials, sweep.mode)) if r.segments]
    with drawing(size=SIZE) as it:
        lines = 0
        for record in members:
            parts = [s for s in record.segments if finite(s.params.get(axis.key))]
            if not parts:
                continue
            lines += 1
            best = record is sweep.best
            x, y = _stairs(parts, axis.key, _end(record))
            look: dict[str, Any] = {"color": sweep.colours[record.index], "zorder": 5 if best else 3}
            it.ax.plot(x, y, linewidth=BEST_WIDTH if best else WIDTH, alpha=1.0 if best else 0.75, **look)
            taken = [s for s in parts if s.step > 0]
            at, to = [s.step for s in taken], [s.params[axis.key] for s in taken]
            it.ax.plot(at, to, "D", markersize=5 if best else 3.5, **look)
        if not lines:
            return None
        values = [s.params[axis.key] for r in members for s in r.segments if finite(s.params.get(axis.key))]
        it.ax.set_yscale("log" if axis.log and min(values) > 0.0 else "linear")
        finish(it.ax, said(sweep.names[axis.key], 40))
        best_one = sweep.best
        told = ""
        if best_one and best_one.segments:
            steps = [(s.step, s.params.get(axis.key)) for s in best_one.segments]
            told = "Best: " + ", ".join(f"{said(value)} from step {step}" for step, value in steps)
        return it.chart(
            sweep.names[axis.key],
            "A line is what the weights that a member ends with were trained with; thick, orange: the best's,"
            " its learned schedule. Diamonds: another member's weights taken over, values perturbed.",
            f"{lines} members. {told}.",
            wide=True,
        )


def _stairs(parts: Sequence[Segment], key: str, end: int) -> tuple[list[int], list[float]]:
    """Return the corners of a line that keeps each segment's value up to the next one's step."""
    x, y = [], []
    for part, stop in zip(parts, [*(p.step for p in parts[1:]), end], strict=True):
        x += [part.step, max(part.step, stop)]
        y += [float(part.params[key])] * 2
    return x, y


def _end(record: TrialRecord) -> int:
    return max(record.last.step if record.last else 0, record.segments[-1].step)


def _reported(record: TrialRecord) -> list[tuple[int, float]]:
    return sorted((report.step, report.value) for report in record.reports if finite(report.value))


def _rungs(sweep: SweepRecord, last: int) -> list[float]:
    """Return the steps at which ASHA compares, as far as any trial came."""
    scheduler = sweep.section("scheduler")
    rung, factor = scheduler.get("grace_steps", 50), scheduler.get("reduction_factor", 3.0)
    if sweep.scheduler != "asha" or not finite(rung) or not finite(factor) or rung < 1 or factor <= 1:
        return []
    rungs = []
    while rung < last:
        rungs.append(float(rung))
        rung *= factor
    return rungs


def _curves_caption(sweep: SweepRecord, rungs: bool) -> str:
    states = {record.state for record in sweep.trials}
    words = ["Coloured as above: orange, thick is the best"]
    words += ["circles end stopped trials"] if "stopped" in states else []
    words += ["crosses end failed ones"] if "failed" in states else []
    words += ["dotted: the rungs at which ASHA compares"] if rungs else []
    return f"{'; '.join(words)}."


def _curves_told(sweep: SweepRecord, drawn: dict[int, list[tuple[int, float]]]) -> str:
    points = drawn.get(sweep.best.index) if sweep.best else None
    lines = sum(bool(line) for line in drawn.values())
    if not points:
        return f"{lines} lines."
    (first, start), (last, end) = points[0], points[-1]
    best = f"The best goes from {number(start)} at step {first} to {number(end)} at step {last}."
    return f"{lines} lines. {best}"
