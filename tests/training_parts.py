"""Trainers' recipes with something in their way: slowed down, wrong, or killed once at given steps."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.trainers import StudentRecipe, TeacherRecipe
from actors.worker import Report
from cluster.storage import RunStore
from cluster.waiting import get
from counterpoint.place import Place


def before_each_step(trainer: Any, act: Callable[[int], None]) -> Any:
    """Let `act` see the number of each step before it is taken."""
    step = trainer.step

    def acting(now: int) -> dict[str, Any]:
        act(now)
        return step(now)

    trainer.step = acting
    return trainer


@dataclass(frozen=True)
class SlowTeacher(TeacherRecipe):
    """Takes its time in its first life."""

    def __call__(self, place: Place, store: RunStore, report: Report) -> Any:
        slow = not store.exists("checkpoints")
        trainer = super().__call__(place, store, report)
        return before_each_step(trainer, lambda now: time.sleep(0.2 if slow else 0.0))


@dataclass(frozen=True)
class MortalTeacher(SlowTeacher):
    """Is killed before step 20, once, where it trains without others; leaves the step that it began with."""

    def __call__(self, place: Place, store: RunStore, report: Report) -> Any:
        taken: list[int] = []

        def act(now: int) -> None:
            taken.append(now)
            mark = Path(store.path("killed"))
            if place.ranks == 1 and now == 20 and not mark.exists():
                mark.write_text(str(taken[0]))
                os.kill(os.getpid(), signal.SIGKILL)

        return before_each_step(super().__call__(place, store, report), act)


@dataclass(frozen=True)
class WrongTeacher(TeacherRecipe):
    """Has a mistake in step 3, and leaves a file for each of its lives."""

    def __call__(self, place: Place, store: RunStore, report: Report) -> Any:
        Path(store.path(f"life-{place.rank}-{os.getpid()}")).touch()

        def act(now: int) -> None:
            if now == 3:
                raise ValueError("step 3 cannot be taken")

        return before_each_step(super().__call__(place, store, report), act)


@dataclass(frozen=True)
class MortalStudent(StudentRecipe):
    """Rank 1 is killed before steps 8 and 13, each once."""

    def __call__(self, place: Place, store: RunStore, report: Report) -> Any:
        def act(now: int) -> None:
            mark = Path(store.path(f"killed-at-{now}"))
            if place.rank == 1 and now in (8, 13) and not mark.exists():
                mark.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)

        return before_each_step(super().__call__(place, store, report), act)


@dataclass(frozen=True)
class CriticsStudent(StudentRecipe):
    """Rank 0 writes down who its critics are, and kills the last of them before step 13, once."""

    def __call__(self, place: Place, store: RunStore, report: Report) -> Any:
        if place.rank == 0:
            store.write_text("critics.txt", " ".join(host.name for host in self.hosts))

        def act(now: int) -> None:
            mark = Path(store.path(f"killed-at-{now}"))
            if place.rank == 0 and now == 13 and not mark.exists():
                pid = get(self.hosts[-1].actor.pid.remote(), timeout=60.0, what="a critic's process")
                mark.write_text(str(pid))
                os.kill(pid, signal.SIGKILL)

        return before_each_step(super().__call__(place, store, report), act)
