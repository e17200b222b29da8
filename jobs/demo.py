"""Teacher, student, evaluation and report in one go: `make demo`."""

import logging
import sys
import time
from typing import Any

from pydantic import Field

from cluster.connect import connected
from cluster.storage import RunStore
from counterpoint.section import Section
from jobs import distill, train
from jobs.config import run_job
from jobs.runs import CONFIG, RESULTS, read_results
from jobs.settings import DistillConfig, TrainConfig
from jobs.table import text_table

logger = logging.getLogger(__name__)


class DemoConfig(Section):
    """A teacher and its student, one after the other, on one Ray cluster."""

    teacher: TrainConfig = TrainConfig(run="runs/demo/teacher")
    """The teacher's run."""
    student: DistillConfig = DistillConfig(run="runs/demo/student", teacher="runs/demo/teacher")
    """The student's run."""
    fresh: bool = True
    """Delete what an earlier demo left in these places first; off goes on where it stopped."""
    seed: int | None = Field(default=None)
    """Seed of both runs, if theirs are not to be used."""


def main(config: DemoConfig) -> dict[str, Any]:
    """Run both jobs, print the table, and return the headline figures."""
    begun = time.monotonic()
    teacher, student = config.teacher, config.student
    if config.seed is not None:
        teacher = teacher.model_copy(update={"seed": config.seed})
        student = student.model_copy(update={"seed": config.seed})
    if config.fresh:
        for uri in (teacher.run, student.run):
            clear(RunStore(uri))
    teacher = teacher.model_copy(update={"resume": not config.fresh})
    student = student.model_copy(update={"resume": not config.fresh})
    with connected():
        if not RunStore(teacher.run).exists(RESULTS):
            trained = train.main(teacher)
            if "stopped_at_step" in trained:
                return trained
        distilled = distill.main(student)
    if "stopped_at_step" in distilled:
        return distilled
    sys.stderr.write("\n" + text_table(read_results(RunStore(student.run))["rows"]) + "\n")
    sys.stderr.write(f"report: {distilled['report']}\n")
    seconds = round(time.monotonic() - begun, 1)
    return {key: value for key, value in distilled.items() if key != "run"} | {"seconds": seconds}


def clear(store: RunStore) -> None:
    """Delete what an earlier run left, if it is one; its configuration goes last, as it makes it one."""
    if store.exists(CONFIG):
        for name in sorted(store.list(unfinished=True), key=lambda name: name == CONFIG):
            store.delete(name)


if __name__ == "__main__":
    run_job(main, DemoConfig)
