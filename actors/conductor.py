"""The conductor: tells the driver how far the workers are, and the workers that the driver wants to stop."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.identity import actor_name
from cluster.waiting import done, get

logger = logging.getLogger(__name__)


class Conductor:
    """Holds the newest figures and the wish to stop; losing it loses neither for long."""

    def __init__(self) -> None:
        self._newest: dict[str, Any] = {}
        self._stop = False
        self._rows: dict[str, dict[str, Any]] = {}
        self._pace = Pace()

    def report(self, figures: dict[str, Any]) -> bool:
        """Take the newest figures from rank 0 and say whether to stop."""
        self._newest = figures
        self._pace.see(figures)
        return self._stop

    def enrol(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take rows of the placement table (see `cluster.roster`); they replace those of the same place."""
        self._rows |= {f"{row['role']}-{row['rank']}": row for row in rows}

    def table(self) -> dict[str, Any]:
        """Return the rows, the newest figures, and the seconds that are left (None where unknown)."""
        rows = list(self._rows.values())
        return {"rows": rows, "figures": self._newest, "seconds_left": self._pace.left(self._newest)}

    def poll(self, stop: bool) -> dict[str, Any]:
        """Take the driver's wish and return the newest figures."""
        self._stop = stop
        return self._newest


@dataclass
class Pace:
    """How fast a loop goes, from the first figures of its stage and life to the newest."""

    total: int = -1
    stage: str = ""
    step: int = 0
    begun: float = 0.0

    def see(self, figures: dict[str, Any]) -> None:
        """Begin to count anew where another stage, or an earlier step, has come."""
        step, total, stage = figures.get("step", 0), figures.get("total", -1), str(figures.get("stage", ""))
        if (total, stage) != (self.total, self.stage) or step < self.step:
            self.total, self.stage, self.step, self.begun = total, stage, step, time.monotonic()

    def left(self, figures: dict[str, Any]) -> float | None:
        """Return the seconds until `total` at the pace so far; None where nothing can be said."""
        steps = figures.get("step", 0) - self.step
        if steps < 1 or self.total < 1:
            return None
        return (time.monotonic() - self.begun) / steps * (self.total - figures["step"])


def start_conductor() -> Any:
    """Start a conductor that Ray restarts whenever it dies; it takes no CPU, and has a name of its run's."""
    name = actor_name("conductor-0")
    return ray.remote(Conductor).options(name=name, num_cpus=0, max_restarts=-1).remote()


@dataclass
class Baton:
    """Rank 0's end of the conductor: never waits, and takes silence for "go on"."""

    actor: Any
    _asked: list[Any] = field(default_factory=list)

    def __call__(self, figures: dict[str, Any]) -> bool:
        """Send the newest figures; return whether an earlier answer asked to stop."""
        finished, self._asked = done(self._asked)
        stop = any(self._answer(ref) for ref in finished)
        if len(self._asked) < 4:
            self._asked.append(self.actor.report.remote(figures))
        return stop

    def _answer(self, ref: Any) -> bool:
        try:
            return bool(get(ref, timeout=1.0, what="the conductor"))
        except Exception as error:
            logger.warning("the conductor did not answer and is being restarted: %s", error)
            return False
