"""A training run that takes its time, as a process of its own for tests that look at it or kill it."""

import sys
import time
from dataclasses import dataclass
from typing import Any

from training_parts import before_each_step

from actors.trainers import TeacherRecipe
from actors.worker import Report
from cluster.storage import RunStore
from counterpoint.place import Place
from jobs import train
from jobs.config import run_job
from jobs.settings import TrainConfig

STUCK_AT = 3


@dataclass(frozen=True)
class StuckTeacher(TeacherRecipe):
    """Stops for ever before step 3, in a function that can be told by its name."""

    def __call__(self, place: Place, store: RunStore, report: Report) -> Any:
        return before_each_step(super().__call__(place, store, report), stop_in_the_middle)


def stop_in_the_middle(now: int) -> None:
    """Hang before step 3."""
    if now == STUCK_AT:
        sys.stderr.write("ERROR this rank hangs\n")
        sys.stderr.flush()
        time.sleep(10_000)


if __name__ == "__main__":
    train.TeacherRecipe = StuckTeacher  # type: ignore[misc]
    run_job(train.main, TrainConfig, sys.argv[1:])
