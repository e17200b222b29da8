"""The charts of training: losses, what snapshots scored, gradient norm and speed."""

from collections.abc import Callable, Iterable

import numpy as np
from matplotlib.axes import Axes

from jobs.report_axes import Points, as_points, colours, draw_line, finish, last_quarter, logged, shade_stages
from jobs.report_record import RunRecord
from jobs.report_schedules import schedule_charts
from jobs.report_svg import INK, MUTED, Chart, drawing
from jobs.report_words import in_steps, number


def training_charts(record: RunRecord) -> list[Chart]:
    """Return the charts of losses, scores of snapshots, gradient norm and speed, as far as there is data."""
    makers: list[Callable[[RunRecord], Chart | None]] = [
        lambda r: _curves(r, "Training loss", {"loss": "loss"}, log=True),
        lambda r: _curves(r, "Regression on the teacher's pairs", {"regression_loss": "loss"}, log=True),
        lambda r: _curves(r, "Against the panel", {"critic_loss": "critics", "adversarial_loss": "student"}),
        lambda r: _curves(r, "Token accuracy", {"token_accuracy": "share"}),
        lambda r: _curves(r, "Perception error", {"perception_error": "pixels"}, log=True),
        lambda r: _scores(r, "fd", "Frechet distance over training", log=True),
        lambda r: _scores(r, "recall", "Recall over training"),
        lambda r: None if r.is_student else _curves(r, "Learning rate", {"learning_rate": "rate"}),
        lambda r: _curves(r, "Gradient norm", {"gradient_norm": "norm"}, log=True),
        lambda r: _curves(r, "Samples per second", {"samples_per_second": "samples / s"}),
    ]
    charts = [chart for maker in makers if (chart := maker(record)) is not None]
    return charts + schedule_charts(record)


def _curves(record: RunRecord, title: str, keys: dict[str, str], log: bool = False) -> Chart | None:
    lines = {label: points for key, label in keys.items() if len((points := logged(record, key))[0])}
    if not lines:
        return None
    with drawing() as it:
        for colour, (label, points) in zip(colours(lines), lines.items(), strict=True):
            draw_line(it.ax, record, points, colour, label)
        log = log and all((y > 0).all() for _, y in lines.values())
        it.ax.set_yscale("log" if log else "linear")
        shade_stages(it.ax, record, min(points[0][0] for points in lines.values()))
        finish(it.ax, next(iter(lines)) if len(lines) == 1 else "loss")
        ends = "; ".join(
            f"{label} from {number(y[0])} to {number(last_quarter(y))}" for label, (_, y) in lines.items()
        )
        scale = ", logarithmic" if log else ""
        caption = f"Mean of neighbouring steps{scale}; the shade spans their extremes."
        return it.chart(title, caption, f"Line chart over {_span(lines.values())}: {ends}.")


def _scores(record: RunRecord, figure: str, title: str, log: bool = False) -> Chart | None:
    lines = {steps: _evaluated(record, steps, figure) for steps in record.steps_scored()}
    lines = {steps: points for steps, points in lines.items() if len(points[0])}
    if not lines:
        return None
    with drawing() as it:
        for colour, (steps, (x, y)) in zip(colours(lines), lines.items(), strict=True):
            it.ax.plot(x, y, "o-", color=colour, markersize=3.5, label=in_steps(steps))
        it.ax.set_yscale("log" if log and all((y > 0).all() for _, y in lines.values()) else "linear")
        shade_stages(it.ax, record, 0)
        _reference(it.ax, record.scores.get(("teacher", 25), {}).get(figure), "teacher, 25 steps")
        if record.warmup_end is not None:
            it.ax.axvline(record.warmup_end, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        finish(it.ax, figure.upper() if figure == "fd" else figure)
        counts = {
            row[f"steps_{s}"].get("samples")
            for row in record.evaluations
            for s in lines
            if f"steps_{s}" in row
        }
        size = f"{counts.pop()} images each" if len(counts) == 1 else "snapshots"
        ends = "; ".join(
            f"{in_steps(steps)} from {number(y[0])} to {number(y[-1])}" for steps, (_, y) in lines.items()
        )
        return it.chart(
            title,
            f"Snapshots scored while training went on, {size}"
            + ("; the dotted line marks the end of the warm-up." if record.warmup_end is not None else "."),
            f"Line chart over {_span(lines.values())}: {ends}.",
        )


def _evaluated(record: RunRecord, steps: int, figure: str) -> Points:
    rows = ((row["step"], (row.get(f"steps_{steps}") or {}).get(figure)) for row in record.evaluations)
    return as_points([(step, value) for step, value in rows if value is not None])


def _reference(ax: Axes, value: float | None, label: str) -> None:
    if value is not None:
        ax.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=label)


def _span(lines: Iterable[Points]) -> str:
    steps = np.concatenate([x for x, _ in lines])
    return f"steps {int(steps.min())} to {int(steps.max())}"
