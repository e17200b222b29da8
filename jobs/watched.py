"""What the verbs share that look at a run from another process: its state, and who runs where."""

import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from pydantic import Field

from actors.roll import full_table
from cluster import identity
from cluster.observe import Unreachable, node_names, observing
from cluster.roster import Row
from cluster.storage import RunStore
from cluster.waiting import get
from counterpoint.section import Section
from jobs.run_names import RunUri
from jobs.run_state import kept_failure, kept_rows, stage_of

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0


class WatchedConfig(Section):
    """Which run, and whom of it."""

    run: RunUri
    """URI of the run's storage."""
    role: str = Field(default="")
    """Only this role (driver, trainer, critics, evaluators, workers, samplers, conductor) or critics-0."""


@dataclass(frozen=True)
class Watched:
    """A run as another process finds it.

    Attributes:
        store: its storage.
        facts: its `run.json`.
        rows: who runs where, the driver first; as written down last, where the cluster is not to be had.
        progress: what its conductor says: `figures` and `seconds_left`; empty without one.
        why_not: why the cluster is not to be had; empty where it is.
        nodes: Ray's ids of the nodes by the rows' labels; empty without the cluster.
    """

    store: RunStore
    facts: dict[str, Any]
    rows: tuple[Row, ...]
    progress: dict[str, Any]
    why_not: str
    nodes: dict[str, str]

    @property
    def alive(self) -> bool | None:
        """Whether the driver lives; None if only its own machine could tell."""
        return identity.driver_alive(self.facts)

    @property
    def stage(self) -> str:
        """In a word how the run stands."""
        return stage_of(self.store, self.facts, self.alive)

    def chosen(self, role: str) -> list[Row]:
        """Return the rows of a role, or of one label; ValueError, in one line, if there are none."""
        rows = [row for row in self.rows if role in ("", row.role, row.label)]
        if not rows:
            there = ", ".join(dict.fromkeys(row.role for row in self.rows))
            raise ValueError(f"role={role}: the run has nobody of that role; it has {there}")
        return rows


@contextlib.contextmanager
def watching(uri: str) -> Iterator[Watched]:
    """Be connected to a run's cluster, if it is to be had, and yield what is known; nothing is changed.

    Raises ValueError, in one line, if there is no run at `uri`.
    """
    store = RunStore(uri)
    facts = identity.known_facts(store)
    driver, kept = _driver_row(store, facts), kept_rows(store)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(observing(facts))
        except Unreachable as error:
            told = kept_failure(store)
            gone = [
                replace(row, state=_last_state(row, driver, (told.get("role"), told.get("rank"))))
                for row in kept
            ]
            yield Watched(store, facts, (driver, *gone), {}, str(error), {})
            return
        answer = _conductor_says(facts["id"])
        devices = {row.label: row.device for row in kept}
        rows = full_table(answer.get("rows", []), answer.get("figures", {}), facts["id"], devices)
        ids = {name: node for node, name in node_names().items()}
        nodes = {row.label: ids[row.node] for row in rows if row.node in ids}
        home = [node["NodeID"] for node in ray.nodes() if node["NodeManagerHostname"] == facts["host"]]
        yield Watched(
            store, facts, (driver, *rows), answer, "", dict(zip(["driver-0"], home, strict=False)) | nodes
        )


def _driver_row(store: RunStore, facts: dict[str, Any]) -> Row:
    stage = stage_of(store, facts, identity.driver_alive(facts))
    state = {"crashed": "failed", "stopped": "done", "interrupted": "done", "refused": "failed"}.get(
        stage, stage
    )
    since = facts.get("ended") or facts["started"]
    return Row("driver", 0, facts["host"], "cpu", facts["pid"], None, state, since)


def _last_state(row: Row, driver: Row, failed: tuple[Any, Any]) -> str:
    """How a row stands whose cluster does not answer: as it was, but nothing runs on without its driver.

    `failed` is the role and rank of the first cause that ended the run, if any did.
    """
    if (row.role, row.rank) == failed:
        return "failed"
    running = row.state in ("starting", "running", "restarting")
    return "gone" if running and driver.state != "running" else row.state


def _conductor_says(run: str) -> dict[str, Any]:
    for name in sorted(ray.util.list_named_actors(), reverse=True):
        if not name.startswith(f"{run}/conductor-"):
            continue
        try:
            asked: Any = ray.get_actor(name).table.remote()
            answer: dict[str, Any] = get(asked, timeout=ANSWER_SECONDS, what="the run's conductor")
        except Exception as error:
            logger.warning("%s", error)
        else:
            return answer
    return {}


def is_here(row: Row) -> bool:
    """Whether a row's process runs on this machine, as far as names tell."""
    return row.node.partition("/")[0] == socket.gethostname()


def bare(argv: Sequence[str], *fields: str) -> list[str]:
    """Return arguments in which bare words stand for `fields`, in this order, as in `RUN critics`."""
    free = list(fields)
    return [f"{free.pop(0)}={one}" if free and _is_bare(one) else one for one in argv]


def _is_bare(argument: str) -> bool:
    return "=" not in argument and not argument.startswith("-")
