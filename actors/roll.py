"""The placement table of a run that trains: ranks enrol with the conductor, the driver keeps and shows it."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import ray

from cluster.dumpable import dumpable
from cluster.failures import located
from cluster.identity import PLACEMENT_FILE, current
from cluster.observe import actor_table, node_names, this_node
from cluster.roster import Row, actor_rows, row_of, table, with_deaths
from cluster.waiting import done, get

logger = logging.getLogger(__name__)

EVERY_S = 2.0
"""Seconds between the driver's looks at the table."""


@contextlib.contextmanager
def enrolled(conductor: Any, rank: int, device: str) -> Iterator[None]:
    """Be in the placement table as rank `rank` of the trainer, for the length of a block.

    What the block raises leaves with the place of the failure on it. Nothing is waited for.
    """
    dumpable()
    row = Row("trainer", rank, this_node(), device, os.getpid(), None, "running", time.time())
    _tell(conductor, row)
    try:
        yield
    except Exception as error:
        _tell(conductor, replace(row, state="failed", since=time.time()))
        located(error, "trainer", rank, row.node)
        raise
    _tell(conductor, replace(row, state="done", since=time.time()))


def _tell(conductor: Any, row: Row) -> None:
    try:
        if conductor is not None:
            conductor.enrol.remote([row.plain()])
    except Exception as error:
        logger.warning("rank %d could not enrol: %s", row.rank, error)


def full_table(
    reported: Iterable[Mapping[str, Any]], figures: Mapping[str, Any], run: str, devices: Mapping[str, str]
) -> list[Row]:
    """Return the rows of a run's ranks and named actors, with the checkpoint and snapshot that figures name.

    Args:
        reported: the rows that ranks have enrolled with.
        figures: the newest of the loop.
        run: the run's id.
        devices: the GPUs of actors by label.
    """
    actors = actor_table()
    ranks = [row_of(row) for row in reported]
    ranks = [replace(row, version=figures.get("checkpoint", row.version)) for row in ranks]
    ranks.sort(key=lambda row: (row.role, row.rank))
    cast = actor_rows(actors, run, node_names(), devices)
    cast = [replace(row, version=figures.get("snapshot")) if row.role == "critics" else row for row in cast]
    return [*with_deaths(ranks, actors), *cast]


class Roll:
    """The driver's copy of the placement table; it never waits, and what goes wrong is only logged."""

    def __init__(self, conductor: Any, ranks: int) -> None:
        self.conductor, self.ranks = conductor, ranks
        self._asked: Any = None
        self._due = 0.0
        self._reported: dict[str, dict[str, Any]] = {}
        self._seen: list[tuple[Any, ...]] = []
        self._shown = False

    def call(self) -> None:
        """Look at the table if it is time, and write it down where it has changed."""
        try:
            if self._asked is None and time.monotonic() >= self._due:
                self._asked = self.conductor.table.remote()
            elif self._asked is not None and done([self._asked])[0]:
                asked, self._asked = self._asked, None
                self._due = time.monotonic() + EVERY_S
                self._take(get(asked, timeout=1.0, what="the placement table"))
        except Exception as error:
            self._due = time.monotonic() + EVERY_S
            logger.debug("the placement table is not to be had now: %s", error)

    def _take(self, answer: dict[str, Any]) -> None:
        rows = {f"{row['role']}-{row['rank']}": row for row in answer["rows"]}
        if self._reported.keys() - rows.keys():
            # The conductor was restarted and has forgotten.
            self.conductor.enrol.remote([row for name, row in self._reported.items() if name not in rows])
        self._reported |= rows
        run = current()
        self._keep(full_table(self._reported.values(), answer["figures"], run.id, run.devices))

    def _keep(self, rows: list[Row]) -> None:
        seen = [(row.label, row.node, row.pid, row.state) for row in rows]
        if seen == self._seen:
            return
        self._seen = seen
        run = current()
        run.rows = [row.plain() for row in rows]
        if not self._shown and sum(row.role == "trainer" for row in rows) >= self.ranks:
            self._shown = True
            logger.info("what runs where:\n%s", table(rows))
        if run.store is not None:
            run.store.write_text(PLACEMENT_FILE, json.dumps(run.rows, indent=1))


def show_cast() -> None:
    """Log the table of the named actors, and write it down; for work that no conductor watches."""
    try:
        run = current()
        rows = full_table([], {}, run.id, run.devices)
        run.rows = [row.plain() for row in rows]
        if rows:
            logger.info("what runs where:\n%s", table(rows))
        if run.store is not None and ray.is_initialized():
            run.store.write_text(PLACEMENT_FILE, json.dumps(run.rows, indent=1))
    except Exception as error:
        logger.warning("what runs where is not known: %s", error)
