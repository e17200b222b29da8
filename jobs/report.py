"""The report of a run: one page, complete in itself, that shows what was made, how well, and from what.

    python -m jobs.report runs/demo/student

It reads what the run has left in its store and writes `report.html` there; what is not there is left out.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from cluster.storage import RunStore
from counterpoint.section import Section
from jobs.config import run_job
from jobs.report_charts import training_charts
from jobs.report_page import data_uri, facts, render_page, versions
from jobs.report_panel_charts import panel_charts
from jobs.report_record import RunRecord, read_record
from jobs.report_timeline import timeline_charts
from jobs.report_words import (
    STAGE_WORDS,
    aims,
    alarms,
    count,
    duration,
    in_steps,
    number,
    pool_words,
    share,
    summary,
)
from jobs.rollout_cells import CELLS
from jobs.rollout_report import write_rollout_report
from jobs.tune_ledger import TRIALS

REPORT = "report.html"
TEMPLATE = "report.html.jinja"
MAX_FRAMES, MAX_ALARMS = 14, 50


class ReportConfig(Section):
    """Which run is reported on."""

    run: str = Field(min_length=1)
    """URI of the run's store."""


def write_report(store: RunStore) -> str:
    """Write `report.html` into the run's store and return where a person finds it.

    Parts of the run that are not there yet are left out. Raises ValueError when the store holds no run.
    """
    store.write_text(REPORT, render(read_record(store)))
    return store.location(REPORT)


def render(record: RunRecord) -> str:
    """Return the page for `record`: no scripts, no addresses, every picture inside."""
    return render_page(TEMPLATE, _content(record))


def _content(record: RunRecord) -> dict[str, Any]:
    raised = alarms(record)
    return {
        "record": record,
        "title": _title(record),
        "summary": summary(record),
        "aims": aims(record),
        "tiles": _tiles(record),
        "samples": _samples(record),
        "table": _table(record),
        "training": training_charts(record) + timeline_charts(record.timeline),
        "panel": panel_charts(record),
        "pool": pool_words(record),
        "warning": _sentence(record.pool.get("warning")),
        "frames": _frames(record),
        "alarms": raised[:MAX_ALARMS],
        "more_alarms": max(0, len(raised) - MAX_ALARMS),
        "seconds": _seconds(record),
        "facts": facts(record.uri, record.environment),
        "versions": versions(record.environment),
    }


def _title(record: RunRecord) -> str:
    if record.is_policy:
        return "A vision-language-action policy"
    if record.is_linear:
        return f"A linear diffusion transformer{f' of {record.source}' if record.source else ''}"
    what = "A one-step student" if record.is_student else "A diffusion teacher"
    return f"{what} of {record.source}" if record.source else what


def _sentence(text: Any) -> str:
    return f"{str(text)[0].upper()}{str(text)[1:]}." if text else ""


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return (name, figure, remark) of the figures that are shown large."""
    if record.is_policy:
        return _policy_tiles(record)
    one_step = record.is_student and not record.is_linear
    who, steps = ("student", 1) if one_step else max(record.scores, default=("teacher", 0))
    row = record.scores.get((who, steps), {})
    figures = {"Frechet distance": number(row.get("fd"))}
    figures |= {name: share(row.get(name)) for name in ("recall", "precision", "accuracy")}
    tiles = [(name, text, f"{who}, {in_steps(steps)}") for name, text in figures.items() if row]
    seconds = _seconds(record)
    return tiles + ([("time", duration(sum(seconds.values())), ", ".join(seconds))] if seconds else [])


def _policy_tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    headline = record.results.get("headline") or {}
    errors = [row["perception_error"] for row in record.metrics if row.get("perception_error") is not None]
    tiles = [("token accuracy", share(headline.get("token_accuracy")), "last batch of the training data")]
    if errors:
        tiles.append(("perception error", f"{number(errors[-1])} px", "median of perception's last batch"))
    tiles += [(name, count(headline.get(name)), "") for name in ("episodes", "frames", "parameters")]
    seconds = _seconds(record)
    return tiles + ([("time", duration(sum(seconds.values())), ", ".join(seconds))] if seconds else [])


def _samples(record: RunRecord) -> list[dict[str, str]]:
    """Return the final grids: the student's by number of steps, the teacher's, real images, whatever else."""
    found = {}
    for name, png in record.grids.items():
        stem = name.removeprefix("grids/").removesuffix(".png")
        made = re.fullmatch(r"(student|teacher)-(\d+)-steps?", stem)
        if made:
            who, steps = made.group(1), int(made.group(2))
            found[who == "teacher", steps, ""] = (f"{who.capitalize()}, {in_steps(steps)}", png)
        elif not re.fullmatch(r"step-\d+-\d+", stem):
            title = "Real images" if stem == "real" else stem.replace("-", " ").capitalize()
            found[2 + (stem != "real"), 0, stem] = (title, png)
    return [{"title": title, "image": data_uri(png)} for _, (title, png) in sorted(found.items())]


def _frames(record: RunRecord) -> list[dict[str, str]]:
    """Return the grids in the fewest steps over training; of many, an even choice with both ends."""
    shots = record.snapshots(min(record.steps_scored(), default=1))
    if len(shots) > MAX_FRAMES:
        shots = [shots[round(i * (len(shots) - 1) / (MAX_FRAMES - 1))] for i in range(MAX_FRAMES)]
    return [
        {"step": f"{step:,}", "stage": _stage_at(record, step), "image": data_uri(record.grids[name])}
        for step, name in shots
    ]


def _stage_at(record: RunRecord, step: int) -> str:
    name = next((stage.name for stage in record.stages if step <= stage.last), "")
    return STAGE_WORDS.get(name, name)


def _table(record: RunRecord) -> list[dict[str, Any]]:
    """Return the rows of results with the width of each one's bar, in percent of the largest distance."""
    largest = max((row["fd"] for row in record.rows if row.get("fd") is not None), default=0.0) or 1.0
    return [{**row, "bar": 100.0 * max(0.0, row.get("fd") or 0.0) / largest} for row in record.rows]


def _seconds(record: RunRecord) -> dict[str, float]:
    seconds = record.results.get("seconds")
    if not isinstance(seconds, dict):
        return {}
    return {str(stage): float(value) for stage, value in seconds.items() if isinstance(value, int | float)}


def main(config: ReportConfig) -> dict[str, str]:
    """Write the report of `config.run`, a training, a comparison or a sweep, and return where it is."""
    store = RunStore(config.run)
    if store.exists(TRIALS):
        # Jobs write their own reports with this module, and a sweep's knows all jobs.
        from jobs.tune_report import write_tune_report

        return {"report": write_tune_report(store)}
    write = write_rollout_report if store.exists(CELLS) else write_report
    return {"report": write(store)}


def with_run(argv: Sequence[str]) -> list[str]:
    """Return `argv` with a bare first argument, unless it is a YAML file, given to the field `run`."""
    first, *rest = argv or [""]
    bare = first and not first.startswith("-") and not re.match(r"[A-Za-z_][\w.-]*=", first)
    if bare and not first.endswith((".yaml", ".yml")):
        return [f"run={first}", *rest]
    return list(argv)


if __name__ == "__main__":
    run_job(main, ReportConfig, with_run(sys.argv[1:]))
