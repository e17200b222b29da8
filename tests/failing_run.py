"""Jobs that fail for good on a cluster of their own, as processes for tests that read what they say last."""

import sys
from dataclasses import dataclass
from typing import Any

from training_parts import before_each_step

from actors.trainers import StudentRecipe, TeacherRecipe
from actors.worker import Report
from cluster.storage import RunStore
from counterpoint.place import Place
from jobs import distill, train
from jobs.config import run_job
from jobs.settings import DistillConfig, TrainConfig

FAILS_AT = 3


@dataclass(frozen=True)
class WrongRankTeacher(TeacherRecipe):
    """Has a mistake that only rank 1 comes upon, in step 3."""

    def __call__(self, place: Place, store: RunStore, report: Report) -> Any:
        def act(now: int) -> None:
            if (place.rank, now) == (1, FAILS_AT):
                stumble({})

        return before_each_step(super().__call__(place, store, report), act)


def stumble(weights: dict[str, Any]) -> None:
    """Raise KeyError, from a function that can be told by its name."""
    weights["no such weight"]


@dataclass(frozen=True)
class WrongMessages(StudentRecipe):
    """Sends its critics, from step 3 on, labels that are too few: judging them fails in the hosts."""

    def __call__(self, place: Place, store: RunStore, report: Report) -> Any:
        from actors import panel

        pack = panel.pack
        now = [0]

        def cut(*arguments: Any, **options: Any) -> Any:
            message = pack(*arguments, **options)
            return message | {"labels": message["labels"][:-1]} if now[0] >= FAILS_AT else message

        def act(step: int) -> None:
            now[0] = step

        panel.pack = cut  # type: ignore[assignment]
        return before_each_step(super().__call__(place, store, report), act)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        train.TeacherRecipe = WrongRankTeacher  # type: ignore[misc]
        run_job(train.main, TrainConfig, sys.argv[2:])
    distill.StudentRecipe = WrongMessages  # type: ignore[misc]
    run_job(distill.main, DistillConfig, sys.argv[2:])
