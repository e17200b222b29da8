"""The charts of numbers that changed over training, each against the step of the run."""

import numpy as np

from counterpoint.schedules import Scheduled, extremes, value_at
from jobs.progress import part_of, progress_of, schedules_in
from jobs.report_axes import Points, finish, shade_stages
from jobs.report_record import RunRecord
from jobs.report_svg import SERIES, Chart, drawing
from jobs.report_words import number

MOST_POINTS = 600


def schedule_charts(record: RunRecord) -> list[Chart]:
    """Return a chart of each schedule in the run's configuration, as training read it."""
    return [_chart(record, key, scheduled) for key, scheduled in schedules_in(record.config)]


def scheduled_points(record: RunRecord, key: str, scheduled: Scheduled) -> Points:
    """Return the steps of its part of the run, at most 600 of them, and the number in each."""
    first, count = part_of(record.config, key)
    steps = np.unique(np.linspace(first, first + max(1, count) - 1, min(max(1, count), MOST_POINTS)).round())
    values = [value_at(scheduled, progress_of(record.config, key, int(step))) for step in steps]
    return steps, np.array(values, dtype=float)


def _chart(record: RunRecord, key: str, scheduled: Scheduled) -> Chart:
    steps, values = scheduled_points(record, key, scheduled)
    low, high = extremes(scheduled)
    with drawing() as it:
        it.ax.step(steps, values, where="post", color=SERIES[0])
        log = low > 0 and high / low > 30
        it.ax.set_yscale("log" if log else "linear")
        shade_stages(it.ax, record, float(steps[0]))
        finish(it.ax, key.rpartition(".")[2] if not key.rpartition(".")[2].isdecimal() else "weight")
        scale = ", logarithmic" if log else ""
        return it.chart(
            key,
            f"The schedule of this number as the run read it{scale}.",
            f"Line over steps {int(steps[0])} to {int(steps[-1])}: from {number(float(values[0]))} to "
            f"{number(float(values[-1]))}, between {number(low)} and {number(high)}.",
        )
