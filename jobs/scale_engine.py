"""What a simulated cluster is made of, on simpy's clock: cores that jobs share, ports, and meeting points.

Everything is deterministic: who asks first is served first, and random durations are drawn by the callers.
"""

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import simpy

Process = Generator[simpy.Event, Any, Any]
TINY = 1e-12
"""Seconds of work that count as none."""


def fair_shares(caps: Sequence[float], capacity: float) -> list[float]:
    """Return how `capacity` is shared out max-min fairly among jobs that cannot use more than `caps`."""
    shares = [0.0] * len(caps)
    left, waiting = capacity, len(caps)
    for job in sorted(range(len(caps)), key=lambda i: caps[i]):
        shares[job] = min(caps[job], left / waiting)
        left -= shares[job]
        waiting -= 1
    return shares


@dataclass
class _Job:
    process: Hashable
    limit: float
    left: float
    done: simpy.Event


class Cores:
    """Processor sharing: `capacity` cores' worth of work a second, of which a job can use one core's at most.

    Jobs of one process are threads of it, and together get `limit` at most (an interpreter's lock). A GPU is
    a capacity of 1.
    """

    def __init__(self, env: simpy.Environment, capacity: float) -> None:
        self.env, self.capacity = env, capacity
        self.busy = 0.0
        """Core-seconds of work done."""
        self._jobs: list[_Job] = []
        self._rates: list[float] = []
        self._since = env.now
        self._turn = 0

    def work(self, seconds: float, process: Hashable = None, limit: float = float("inf")) -> simpy.Event:
        """Return an event that happens when `seconds` of one core's work are done."""
        done = self.env.event()
        if seconds <= TINY:
            done.succeed()
            return done
        self._advance()
        self._jobs.append(_Job(process, limit, seconds, done))
        self._plan()
        return done

    def _advance(self) -> None:
        """Let the jobs progress up to now."""
        passed, self._since = self.env.now - self._since, self.env.now
        for job, rate in zip(self._jobs, self._rates, strict=True):
            job.left -= passed * rate
            self.busy += passed * rate

    def _plan(self) -> None:
        """Share the cores out anew and wait for whoever ends first."""
        threads: dict[Hashable, int] = {}
        for job in self._jobs:
            threads[job.process] = threads.get(job.process, 0) + 1
        caps = [min(1.0, job.limit / threads[job.process]) for job in self._jobs]
        self._rates = fair_shares(caps, self.capacity)
        self._turn += 1
        if self._jobs:
            ends = min(job.left / rate for job, rate in zip(self._jobs, self._rates, strict=True))
            wait = self.env.timeout(max(0.0, ends), self._turn)
            wait.callbacks.append(self._on_end)

    def _on_end(self, event: simpy.Event) -> None:
        if event.value != self._turn:
            return
        self._advance()
        # What is left after a job's own end is rounding; its scale is that of the clock's last digits.
        over = TINY * max(1.0, self.env.now)
        ended = [job for job in self._jobs if job.left <= over]
        self._jobs = [job for job in self._jobs if job.left > over]
        self._plan()
        for job in ended:
            job.done.succeed()


class Port:
    """A serial server, such as one direction of a network card: requests are served in their order."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.busy = 0.0
        """Seconds of service given."""
        self._free = 0.0

    def reserve(self, seconds: float, earliest: float = 0.0) -> tuple[float, float]:
        """Take the next free `seconds`, not before now or `earliest`; return when they begin and end."""
        begin = max(self.env.now, earliest, self._free)
        self._free = begin + seconds
        self.busy += seconds
        return begin, self._free


def send(
    env: simpy.Environment, outward: Port, inward: Port, seconds: float, latency: float, after: float = 0.0
) -> float:
    """Return when a message has arrived that keeps both ports busy for `seconds` each.

    The message streams: its head reaches the inward port `latency` seconds after it leaves, which is `after`
    that time at the earliest.
    """
    begin, _ = outward.reserve(seconds, after)
    _, arrived = inward.reserve(seconds, begin + latency)
    return arrived


def at(env: simpy.Environment, moment: float) -> simpy.Event:
    """Return an event that happens at `moment`, or now if that has passed."""
    return env.timeout(max(0.0, moment - env.now))


class Meeting:
    """A barrier, met again and again: `seconds` after the last of `parties` has come, all go on."""

    def __init__(self, env: simpy.Environment, parties: int, seconds: float = 0.0) -> None:
        self.env, self.parties, self.seconds = env, parties, seconds
        self._come = 0
        self._gone = env.event()

    def join(self, seconds: float | None = None) -> simpy.Event:
        """Come, and return the event of going on; what the last to come says of `seconds` counts."""
        self._come += 1
        gone = self._gone
        if self._come == self.parties:
            self._come, self._gone = 0, self.env.event()
            wait = self.env.timeout(self.seconds if seconds is None else seconds)
            wait.callbacks.append(lambda _: _happen(gone))
        return gone


def _happen(event: simpy.Event) -> None:
    event.succeed()


def ring_seconds(parties: int, size: float, rate: float, latency: float) -> float:
    """Return the seconds of a ring all-reduce of `size` bytes at `rate` bytes a second (Patarasuk 2009)."""
    if parties < 2:
        return 0.0
    return 2 * (parties - 1) * (size / parties / rate + latency)


def hierarchical_seconds(
    nodes: int, local: int, size: float, inner: tuple[float, float], outer: tuple[float, float]
) -> float:
    """Return the seconds of an all-reduce within `nodes` of `local` parties each and between them.

    A reduce-scatter within each node, rings between nodes on a shard each, a gather within: as NCCL does.
    `inner` and `outer` are (bytes a second of one party, latency in seconds).
    """
    within = ring_seconds(local, size, *inner)
    return within + ring_seconds(nodes, size / local, *outer)
