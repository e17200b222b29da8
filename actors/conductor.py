"""The conductor: tells the driver how far the workers are, and the workers that the driver wants to stop."""

import logging
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.waiting import done, get

logger = logging.getLogger(__name__)


class Conductor:
    """Holds the newest figures and the wish to stop; losing it loses neither for long."""

    def __init__(self) -> None:
        self._newest: dict[str, Any] = {}
        self._stop = False

    def report(self, figures: dict[str, Any]) -> bool:
        """Take the newest figures from rank 0 and say whether to stop."""
        self._newest = figures
        return self._stop

    def poll(self, stop: bool) -> dict[str, Any]:
        """Take the driver's wish and return the newest figures."""
        self._stop = stop
        return self._newest


def start_conductor() -> Any:
    """Start a conductor that Ray restarts whenever it dies; it takes no CPU."""
    return ray.remote(Conductor).options(num_cpus=0, max_restarts=-1).remote()


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
