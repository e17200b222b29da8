"""The graph of one distillation step, played on simulated devices and links.

A trainer makes real samples (or has them), runs the student forward, sends each noise band's share to a host
of that band, waits for the gradients, runs backward, averages gradients with the other trainers and steps.
A host waits for the samples of all trainers it serves, lets the heads learn, averages their gradients with
its replicas, judges, and answers. Times are in seconds, sizes in bytes; every process is deterministic given
the seed of the jitter.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import simpy

from jobs.scale_engine import Cores, Meeting, Port, Process, at, send

PARTS = ("sampling", "forward", "wire", "waiting", "backward", "averaging", "optimizer")
"""What a trainer's step consists of, in its order."""


@dataclass(frozen=True)
class Cost:
    """Work that grows with the number of samples, in seconds of a device that does nothing else."""

    fixed: float = 0.0
    each: float = 0.0

    def __call__(self, samples: float) -> float:
        """Return the seconds for `samples`."""
        return self.fixed + self.each * samples

    def scaled(self, factor: float) -> "Cost":
        """Return this work on a device so many times slower."""
        return Cost(self.fixed * factor, self.each * factor)


@dataclass(frozen=True)
class Costs:
    """What the parts of a step cost."""

    sampling: Cost
    """The teacher's samples; nothing where they are images or stored pairs."""
    forward: Cost
    """The student, with what its backward needs."""
    backward: Cost
    optimizer: float
    learn: Cost
    """A band: the encoder's passes over fake and real samples, the heads' gradients and their step."""
    judge: Cost
    """A band: the student's gradient, through heads and encoder."""
    pack: Cost
    """In the trainer, before samples leave it; the same again where they arrive back."""
    call: float
    """A message, at each of its ends, whatever its size."""
    copy_rate: float
    """Bytes a second at which each end of a message is copied."""
    sample_bytes: float
    """One sample's way to a host: fake, real and condition."""
    answer_bytes: float
    """One sample's way back: its gradient."""


@dataclass(frozen=True)
class Setup:
    """How a step is shared out."""

    trainers: int
    samples: float
    """Samples of a step, over all trainers."""
    bands: int
    """Noise bands that judge in a step; samples are dealt evenly among them."""
    hosts: int
    """Actors that the bands are shared out among; each may have replicas."""
    replicas: int = 1
    """Actors per host's share; each serves an equal part of the trainers."""
    staleness: int = 0
    """1: while critics judge, the next samples are made; the student's graph is then made again later."""
    critics_first: bool = True
    """Whether heads learn before they judge, so that averaging over replicas is waited for."""
    jitter: float = 0.0
    """Standard deviation of the logarithm of every computation's duration."""
    seed: int = 0


@dataclass(eq=False)
class Seat:
    """Where an actor sits."""

    cores: Cores
    outward: Port
    inward: Port
    calls: Port
    """The process that takes messages in hand, one at a time."""
    node: int = 0
    process: Hashable = None
    limit: float = float("inf")
    """Cores that the threads of its process can use together."""


@dataclass
class Stage:
    """The simulated machines, with the actors' seats."""

    env: simpy.Environment
    trainers: Sequence[Seat]
    hosts: Sequence[Sequence[Seat]]
    """By host and replica."""
    link: Callable[[Seat, Seat], tuple[float, float]]
    """Bytes a second and latency in seconds between two seats."""
    average: Callable[[float], float]
    """Seconds of averaging the student's gradients, given those of the backward pass it hides behind."""
    exchange: float
    """Seconds of averaging head gradients among a host's replicas."""


@dataclass(frozen=True)
class Outcome:
    """What a simulation measured, per step, after its first."""

    step: float
    """Seconds of a step."""
    parts: Mapping[str, float]
    """Seconds of each of PARTS, averaged over trainers."""
    judging: float
    """Seconds from a band's having all samples to its answer, averaged over bands, replicas and steps."""
    busy: Mapping[str, float]
    """Share of time that trainers' and hosts' devices, network ports and message handling were in use."""


@dataclass
class _Play:
    """A simulation under way."""

    setup: Setup
    costs: Costs
    stage: Stage
    steps: int
    parts: list[dict[str, float]] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    boxes: dict[tuple[int, int, int], simpy.Store] = field(default_factory=dict)
    """Messages on their way to (band, replica), by step."""

    def __post_init__(self) -> None:
        self.together = Meeting(self.stage.env, self.setup.trainers)
        self.exchanges = [Meeting(self.stage.env, self.setup.replicas) for _ in range(self.setup.bands)]
        self.answers = {
            (trainer, step): [self.stage.env.event() for _ in range(self.setup.bands)]
            for trainer in range(self.setup.trainers)
            for step in range(self.steps)
        }
        self.share = self.setup.samples / self.setup.trainers

    def noise(self, *name: int) -> np.ndarray:
        """Return the factors of an actor's computations, [steps, 4], with mean 1."""
        sigma = self.setup.jitter
        if sigma == 0.0:
            return np.ones((self.steps, 4))
        stream = np.random.default_rng((self.setup.seed, *name))
        return stream.lognormal(-sigma * sigma / 2, sigma, (self.steps, 4))

    def trainer(self, rank: int) -> Process:
        """Play a trainer."""
        env, costs, seat, share = self.stage.env, self.costs, self.stage.trainers[rank], self.share
        noise = self.noise(0, rank)
        if self.setup.staleness:
            yield from self._make(rank, 0, noise, {})
        for step in range(self.steps):
            parts = dict.fromkeys(PARTS, 0.0)
            ahead = step + self.setup.staleness
            if ahead < self.steps:
                yield from self._make(rank, ahead, noise, parts)
            yield from self._timed(parts, "waiting", env.all_of(self.answers[rank, step]))
            yield from self._compute(parts, "wire", seat, costs.pack(share))
            if self.setup.staleness:
                yield from self._compute(parts, "forward", seat, costs.forward(share) * noise[step, 3])
            backward = costs.backward(share) * noise[step, 1]
            yield from self._compute(parts, "backward", seat, backward)
            averaging = self.together.join(self.stage.average(costs.backward(share)))
            yield from self._timed(parts, "averaging", averaging)
            yield from self._compute(parts, "optimizer", seat, costs.optimizer)
            if step and ahead < self.steps:
                self.parts.append(parts)
            if rank == 0:
                self.ends.append(env.now)

    def _make(self, rank: int, step: int, noise: np.ndarray, parts: dict[str, float]) -> Process:
        """Make the samples of `step` and send them off."""
        costs, seat, share = self.costs, self.stage.trainers[rank], self.share
        yield from self._compute(parts, "sampling", seat, costs.sampling(share) * noise[step, 2])
        yield from self._compute(parts, "forward", seat, costs.forward(share) * noise[step, 0])
        yield from self._compute(parts, "wire", seat, costs.pack(share))
        for band in range(self.setup.bands):
            replica = rank * self.setup.replicas // self.setup.trainers
            self.stage.env.process(self._deliver(rank, step, band, replica))

    def _deliver(self, rank: int, step: int, band: int, replica: int) -> Process:
        """Carry one rank's share to a band's host."""
        seat, host = self.stage.trainers[rank], self._host(band, replica)
        yield self._message(seat, host, self.costs.sample_bytes)
        yield at(self.stage.env, self._handle(host, self.costs.sample_bytes)[1])
        yield self._box(band, replica, step).put(rank)

    def critics(self, band: int, replica: int) -> Process:
        """Play a band in one replica of its host."""
        env, costs, seat = self.stage.env, self.costs, self._host(band, replica)
        count = self.setup.trainers
        ranks = [r for r in range(count) if r * self.setup.replicas // count == replica]
        samples = len(ranks) * self.share / self.setup.bands
        noise = self.noise(1, band, replica)
        for step in range(self.steps):
            box = self._box(band, replica, step)
            for _ in ranks:
                yield box.get()
            begun = env.now
            yield self._work(seat, costs.learn(samples) * noise[step, 0])
            if self.setup.critics_first:
                yield self.exchanges[band].join(self.stage.exchange)
            yield self._work(seat, costs.judge(samples) * noise[step, 1])
            self.judged.append(env.now - begun)
            for rank in ranks:
                env.process(self._answer(rank, step, band, seat))
            if not self.setup.critics_first:
                yield self.exchanges[band].join(self.stage.exchange)

    def _answer(self, rank: int, step: int, band: int, host: Seat) -> Process:
        """Carry a verdict back to its trainer."""
        answer = self.answers[rank, step][band]
        seat = self.stage.trainers[rank]
        yield self._message(host, seat, self.costs.answer_bytes)
        yield at(self.stage.env, self._handle(seat, self.costs.answer_bytes)[1])
        answer.succeed()

    def _message(self, source: Seat, target: Seat, each: float) -> simpy.Event:
        """Return the event of a message's having arrived, once its source has handled and sent it."""
        rate, latency = self.stage.link(source, target)
        _, handled = self._handle(source, each)
        size = each * self.share / self.setup.bands
        return at(
            self.stage.env,
            send(self.stage.env, source.outward, target.inward, size / rate, latency, after=handled),
        )

    def _handle(self, seat: Seat, each: float) -> tuple[float, float]:
        return seat.calls.reserve(
            self.costs.call + each * self.share / self.setup.bands / self.costs.copy_rate
        )

    def _host(self, band: int, replica: int) -> Seat:
        return self.stage.hosts[band * self.setup.hosts // self.setup.bands][replica]

    def _box(self, band: int, replica: int, step: int) -> simpy.Store:
        return self.boxes.setdefault((band, replica, step), simpy.Store(self.stage.env))

    def _work(self, seat: Seat, seconds: float) -> simpy.Event:
        return seat.cores.work(seconds, seat.process, seat.limit)

    def _compute(self, parts: dict[str, float], part: str, seat: Seat, seconds: float) -> Process:
        yield from self._timed(parts, part, self._work(seat, seconds))

    def _timed(self, parts: dict[str, float], part: str, event: simpy.Event) -> Process:
        begun = self.stage.env.now
        yield event
        parts[part] = parts.get(part, 0.0) + self.stage.env.now - begun


def play(setup: Setup, costs: Costs, stage: Stage, steps: int = 5) -> Outcome:
    """Play `steps` steps, at least three, and return what the steady ones took: not the first."""
    if steps < 3:
        raise ValueError(f"steps={steps}: a simulation needs at least 3, of which the first does not count")
    it = _Play(setup, costs, stage, steps)
    for rank in range(setup.trainers):
        stage.env.process(it.trainer(rank))
    for band in range(setup.bands):
        for replica in range(setup.replicas):
            stage.env.process(it.critics(band, replica))
    stage.env.run()
    last = steps - 1 - setup.staleness
    count = len(it.parts)
    return Outcome(
        (it.ends[last] - it.ends[0]) / last,
        {part: sum(parts[part] for parts in it.parts) / count for part in PARTS},
        float(np.mean(it.judged)),
        _busy(stage),
    )


def _busy(stage: Stage) -> dict[str, float]:
    """Return the busiest seat's share of time by kind of resource."""
    hosts = [seat for replicas in stage.hosts for seat in replicas]
    seats = [*stage.trainers, *hosts]
    total = stage.env.now
    return {
        "trainers": max(s.cores.busy / s.cores.capacity for s in stage.trainers) / total,
        "critics": max(s.cores.busy / s.cores.capacity for s in hosts) / total,
        "network": max(max(s.outward.busy, s.inward.busy) for s in seats) / total,
        "messages": max(s.calls.busy for s in seats) / total,
    }
