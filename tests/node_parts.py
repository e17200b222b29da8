"""What the tests of lost nodes share: which node holds what, and a student that waits to be disturbed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from training_parts import before_each_step

from actors.trainers import StudentRecipe
from actors.worker import Report
from cluster.storage import RunStore
from counterpoint.place import Place

HOST, TRAINER = "CriticHost", "RayTrainWorker"
WAITS_AT = 12


@dataclass(frozen=True)
class WaitingStudent(StudentRecipe):
    """Marks that it came to a step (`at-<rank>`), and waits there until the file `go` is in the storage."""

    def __call__(self, place: Place, store: RunStore, report: Report) -> Any:
        def act(now: int) -> None:
            if now != WAITS_AT:
                return
            Path(store.path(f"at-{place.rank}")).touch()
            until(lambda: Path(store.path("go")).exists(), 400.0, "the go-ahead")

        return before_each_step(super().__call__(place, store, report), act)


def until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for a condition and return what it gave; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return found


def actors_by_node() -> dict[str, list[str]]:
    """The classes of the living actors on each node, by the node's id."""
    found: dict[str, list[str]] = {}
    for actor in ray._private.state.actors().values():
        if actor["State"] == "ALIVE":
            found.setdefault(actor["Address"]["NodeID"], []).append(actor["ActorClassName"])
    return found
