"""The picture of a training step: what every actor computes, sends and waits for, on one clock."""

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from actors.timeline import Part, Span, Timeline
from jobs.report_svg import LINE, MUTED, SERIES, Chart, drawing

COLOURS: dict[Part, str] = {"compute": SERIES[0], "wire": SERIES[1], "waiting": LINE}
LANE, ROW_INCHES = 0.66, 0.3
"""Height of a bar, of 1 a lane; and of a lane in the picture, in inches."""


def timeline_charts(timeline: Timeline | None) -> list[Chart]:
    """Return the picture of the recorded steps; none where there is no timeline."""
    if timeline is None or not timeline.spans:
        return []
    lanes = lanes_of(timeline.spans)
    with drawing(size=(10.8, 1.1 + ROW_INCHES * len(lanes))) as it:
        for row, spans in enumerate(lanes.values()):
            for part, colour in COLOURS.items():
                bars = [(1e3 * s.begin, 1e3 * (s.end - s.begin)) for s in spans if s.part == part]
                it.ax.broken_barh(bars, (row - LANE / 2, LANE), color=colour, linewidth=0)
        _mark_steps(it.ax, timeline.spans)
        _finish(it.ax, list(lanes))
        title = "Timeline of a training step"
        return [it.chart(title, _caption(timeline), _alt(timeline.spans), wide=True)]


def lanes_of(spans: Sequence[Span]) -> dict[str, list[Span]]:
    """Return the spans by actor: trainers first, then critic groups, each by number."""
    names = sorted({span.actor for span in spans}, key=_order)
    return {name: [span for span in spans if span.actor == name] for name in names}


def seconds_by_part(spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Return the seconds of each actor by part, over all spans; time that no span covers is idle."""
    first, last = min(s.begin for s in spans), max(s.end for s in spans)
    table = {}
    for name, own in lanes_of(spans).items():
        parts = {part: sum(s.end - s.begin for s in own if s.part == part) for part in COLOURS}
        table[name] = parts | {"idle": max(0.0, last - first - sum(parts.values()))}
    return table


def _mark_steps(ax: Axes, spans: Sequence[Span]) -> None:
    """Draw a line where rank 0 begins a step, with the step's number above."""
    first = next(iter(lanes_of(spans)))
    begins: dict[int, float] = {}
    for span in spans:
        if span.actor == first:
            begins[span.step] = min(span.begin, begins.get(span.step, span.begin))
    for step, begin in begins.items():
        ax.axvline(1e3 * begin, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        ax.text(
            1e3 * begin, 1.02, f" step {step:,}", transform=ax.get_xaxis_transform(), color=MUTED,
            fontsize=7.5, va="bottom",
        )  # fmt: skip


def _finish(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("milliseconds")
    ax.grid(False, axis="y")
    ax.tick_params(which="both", length=0)
    ax.margins(x=0.01)
    keys = [Patch(color=colour, label=part) for part, colour in COLOURS.items()]
    ax.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.0, -0.28), ncols=len(keys), handlelength=1.2)


def _caption(timeline: Timeline) -> str:
    said = (
        "The newest recorded steps; a trainer's wire is packing and unpacking, and its waiting holds the "
        "transport and the judging that is drawn in the groups' own rows."
    )
    bounded = [error for error in timeline.clock_error.values() if error != float("inf")]
    if bounded:
        said += f" Clocks of other actors were brought to trainer-0's within {1e3 * max(bounded):.1f} ms."
    alone = [name for name, error in timeline.clock_error.items() if error == float("inf")]
    return said + (f" By their own clocks: {', '.join(alone)}." if alone else "")


def _alt(spans: Sequence[Span]) -> str:
    told = [
        f"{name} computes for {1e3 * parts['compute']:.0f} ms, is busy with the wire for "
        f"{1e3 * parts['wire']:.0f} ms and waits for {1e3 * (parts['waiting'] + parts['idle']):.0f} ms"
        for name, parts in seconds_by_part(spans).items()
    ]
    steps = {span.step for span in spans if span.step >= 0}
    return f"Bars over time for {len(steps)} steps: {'; '.join(told)}."


def _order(name: str) -> tuple[bool, list[int], str]:
    return (not name.startswith("trainer"), [int(digits) for digits in re.findall(r"\d+", name)], name)
