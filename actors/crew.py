"""The driver's end of rollout workers: seeds out, episodes in, and a second chance for what went wrong."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError

from actors.rollouts import Job, Outcome, RolloutWorker, WorkersConfig
from cluster.failures import retrying
from cluster.waiting import WaitTimeout, first_of, get
from counterpoint.actions.space import ActionSpace
from counterpoint.environments.running import Unfinished
from counterpoint.policies.observation import ObservationSpace

logger = logging.getLogger(__name__)

Done = TypeVar("Done")
UNKNOWN_END = "its process ended"


@dataclass(frozen=True)
class Haul(Generic[Done]):
    """What came of all seeds."""

    results: tuple[Done, ...]
    """Episodes or recordings, ordered by seed."""
    set_aside: dict[int, str]
    """Why, by seed, of those that failed twice."""
    restarts: int = 0
    """Times a worker died or was ended."""


Watch = Callable[[Any], None]
"""Is told each result as it arrives."""


class Crew(Protocol):
    """Does jobs for seeds, wherever its workers are."""

    def run(self, job: Job, seeds: Iterable[int], watch: Watch = ...) -> Haul[Any]:
        """Do the job for all seeds; one that fails twice is set aside with its reason."""
        ...

    def spaces(self) -> tuple[ObservationSpace, ActionSpace]:
        """Return the environments' spaces."""
        ...


def unwatched(result: Any) -> None:
    """Tell nobody."""


class Ledger:
    """Which seeds wait, which have failed once, and what has come of the others.

    Raises ValueError if a seed is given twice.
    """

    def __init__(self, seeds: Iterable[int], watch: Watch) -> None:
        self.fresh: deque[int] = deque(seeds)
        if len(set(self.fresh)) < len(self.fresh):
            raise ValueError("a seed is given twice: give each once")
        self.alone: deque[int] = deque()
        """Seeds in flight when something failed; each is tried once more, by itself."""
        self.results: dict[int, Outcome] = {}
        self.set_aside: dict[int, str] = {}
        self.watch = watch

    def take(self, most: int) -> list[int]:
        """Return the seeds of the next flight; empty if none wait."""
        if self.alone:
            return [self.alone.popleft()]
        return [self.fresh.popleft() for _ in range(min(most, len(self.fresh)))]

    def land(self, seeds: Sequence[int], outcomes: Sequence[Outcome], second: bool) -> None:
        """Enter what came of a flight; `second` if its seed had its second chance."""
        for outcome in outcomes:
            if isinstance(outcome, Unfinished):
                self.fail([outcome.seed], outcome.reason, second)
            else:
                self.results[outcome.seed] = outcome
                self.watch(outcome)

    def fail(self, seeds: Sequence[int], reason: str, second: bool) -> None:
        """Enter that a flight failed as a whole."""
        if not second:
            self.alone.extend(seeds)
            return
        for seed in seeds:
            logger.warning("seed %d is set aside: %s", seed, reason)
            self.set_aside[seed] = reason

    def haul(self, restarts: int = 0) -> Haul[Any]:
        """Return all results, ordered by seed."""
        results = tuple(self.results[seed] for seed in sorted(self.results))
        return Haul(results, dict(sorted(self.set_aside.items())), restarts)


class LocalCrew:
    """One worker in this process; a simulator that hangs or crashes takes the process with it."""

    def __init__(self, worker: RolloutWorker, episodes_at_once: int = 1) -> None:
        self.worker, self.episodes_at_once = worker, episodes_at_once

    def run(self, job: Job, seeds: Iterable[int], watch: Watch = unwatched) -> Haul[Any]:
        """Do the job for all seeds; one that fails twice is set aside with its reason."""
        ledger = Ledger(seeds, watch)
        while True:
            second = bool(ledger.alone)
            if not (flight := ledger.take(self.episodes_at_once)):
                return ledger.haul()
            ledger.land(flight, self.worker.run(job, flight), second)

    def spaces(self) -> tuple[ObservationSpace, ActionSpace]:
        """Return the environments' spaces."""
        return self.worker.spaces()

    def close(self) -> None:
        """Close the environments."""
        self.worker.close()


@dataclass(frozen=True)
class _Flight:
    worker: int
    seeds: list[int]
    second: bool
    due: float
    """When it must have landed, by the monotonic clock."""
    ended: bool = False
    """Whether its worker was ended because it was overdue."""


class RolloutCrew:
    """Rollout workers as actors.

    When a worker dies, or is ended because it is overdue, the seeds it had in hand are tried again one by
    one; a seed with which a worker dies again is set aside, and the others go on.

    Args:
        workers: the actors, by name.
        config: how many seeds are handed out at a time, and how long to wait.
    """

    def __init__(self, workers: dict[str, Any], config: WorkersConfig) -> None:
        self.names, self.actors = list(workers), list(workers.values())
        self.environments, self.episodes_at_once = config.environments, config.episodes_at_once
        self.job_deadline, self.patience = config.job_deadline, config.patience
        self._spaces: tuple[ObservationSpace, ActionSpace] | None = None

    def run(self, job: Job, seeds: Iterable[int], watch: Watch = unwatched) -> Haul[Any]:
        """Do the job for all seeds; one that fails twice is set aside with its reason.

        Raises what a job raises for reasons of its own, such as a sampler that does not answer.
        """
        ledger = Ledger(seeds, watch)
        shared = ray.put(job)
        flights: dict[Any, _Flight] = {}
        idle = deque(range(len(self.actors)))
        restarts = 0
        while True:
            while idle:
                second = bool(ledger.alone)
                if not (taken := ledger.take(self._share(len(ledger.fresh)))):
                    break
                worker = idle.popleft()
                ref = self.actors[worker].run.remote(shared, taken)
                flights[ref] = _Flight(worker, taken, second, time.monotonic() + self.job_deadline)
            if not flights:
                return ledger.haul(restarts)
            for ref in self._landed(flights):
                flight = flights.pop(ref)
                restarts += self._land(ref, flight, ledger)
                idle.append(flight.worker)

    def spaces(self) -> tuple[ObservationSpace, ActionSpace]:
        """Return the environments' spaces, as the first worker has them; raises what building one raises."""
        if self._spaces is None:
            asked = self.actors[0].spaces.remote()
            self._spaces = get(asked, timeout=self.patience, what="spaces of the environment")
        return self._spaces

    def close(self) -> None:
        """Let the workers close their environments."""
        refs = {name: actor.close.remote() for name, actor in zip(self.names, self.actors, strict=True)}
        try:
            get(refs, timeout=10.0, what="end of the rollout workers")
        except Exception as error:
            logger.warning("%s", error)

    def _share(self, waiting: int) -> int:
        """Return how many seeds to hand out: fewer towards the end, so that all workers end together."""
        workers = len(self.actors)
        if waiting <= workers * self.environments:
            return -(-waiting // workers)
        return max(1, min(self.episodes_at_once, max(self.environments, waiting // (2 * workers))))

    def _landed(self, flights: dict[Any, _Flight]) -> list[Any]:
        """Wait for a flight to end, and return all that have; one that is overdue is ended."""
        while True:
            left = min(flight.due for flight in flights.values()) - time.monotonic()
            try:
                return first_of(list(flights), timeout=max(0.0, left), what="episodes")[0]
            except WaitTimeout:
                for ref, flight in list(flights.items()):
                    if flight.due <= time.monotonic():
                        logger.warning("%s is overdue and is started again", self.names[flight.worker])
                        ray.kill(self.actors[flight.worker], no_restart=False)
                        due = time.monotonic() + self.patience
                        flights[ref] = replace(flight, due=due, ended=True)

    def _land(self, ref: Any, flight: _Flight, ledger: Ledger) -> int:
        """Enter what came of a flight; return how often a worker died of it."""
        name = self.names[flight.worker]
        try:
            outcomes = get(ref, timeout=self.patience, what=f"episodes of {name}")
        except RayActorError as error:
            if error.actor_init_failed:
                raise
            reason = self._last_words(flight.worker)
            if flight.ended:
                reason = f"not done within {self.job_deadline:g} s"
            logger.warning("%s died with the episodes of seeds %s: %s", name, flight.seeds, reason)
            ledger.fail(flight.seeds, reason, flight.second)
            return 1
        ledger.land(flight.seeds, outcomes, flight.second)
        return 0

    def _last_words(self, worker: int) -> str:
        """Wait until a worker is back, and return what its predecessor died of."""
        name = self.names[worker]

        def ask() -> str | None:
            what = f"return of {name}"
            return get(self.actors[worker].last_words.remote(), timeout=self.patience, what=what)

        return retrying(ask, what=name, attempts=12, backoff=0.25, budget=self.patience) or UNKNOWN_END
