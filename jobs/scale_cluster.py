"""SIMULATED: an SDXL-shaped distillation on 1 to 1,024 GPUs, by stated figures; see `ClusterFigures`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import simpy

from jobs.scale_engine import Cores, Port, hierarchical_seconds
from jobs.scale_figures import GIGA, MICRO, MILLI, ClusterFigures, Workload, step_costs
from jobs.scale_flops import StepFlops
from jobs.scale_step import Costs, Seat, Setup, Stage, play

BANDS = 4
"""Noise bands, all of which judge in every step."""
SHARES = (0, 8, 4, 2)
"""GPUs of the cluster per GPU that is given to critics alone; 0 gives them none, but a share of every GPU."""
LEVERS = ("student and teacher", "critics", "gradient averaging", "messages", "stragglers")
"""What could be twice as fast."""


@dataclass(frozen=True)
class Options:
    """The settings whose worth is asked."""

    replicas: bool = True
    """Whether a noise band may have more actors than one."""
    staleness: int = 0
    wire_bytes: int = 4
    """Bytes of a number in a message: float32 or bfloat16."""
    direct: bool = False
    """Whether samples travel from GPU to GPU, past the object store."""
    beside: bool = True
    """Whether critics may share the trainers' GPUs, where memory allows; a single GPU has no choice."""


@dataclass(frozen=True)
class Case:
    """A cluster of one size with its settings, and what of it is twice as fast as stated."""

    gpus: int
    critics: int
    """GPUs that only host critics; 0 puts a host beside the trainers."""
    options: Options = Options()
    faster: str | None = None
    """One of LEVERS."""


@dataclass(frozen=True)
class World:
    """What all cases share."""

    flops: StepFlops
    figures: ClusterFigures
    work: Workload
    steps: int = 4
    seed: int = 0


def simulate(case: Case, world: World) -> dict[str, Any]:
    """Play a case and return images a second, how GPUs were split, and the parts of a step in seconds."""
    setup, costs = _setup(case, world), _costs(case, world)
    outcome = play(setup, costs, _stage(case, world, setup, costs), world.steps)
    return {
        "gpus": case.gpus,
        "trainers": setup.trainers,
        "critic_gpus": case.critics,
        "critic_actors": setup.hosts * setup.replicas,
        "replicas": setup.replicas,
        "images_per_second": float(setup.samples / outcome.step),
        "step_s": float(outcome.step),
        "parts_s": {part: float(seconds) for part, seconds in outcome.parts.items()},
        "judging_s": outcome.judging,
        "busy": {kind: float(share) for kind, share in outcome.busy.items()},
    }


def best_split(gpus: int, options: Options, world: World) -> tuple[Case, dict[str, Any]]:
    """Return the split of GPUs with the most images a second, the first of equals, and its simulation.

    Tried are hosts of critics beside the trainers on every GPU, and an eighth, a quarter and a half of the
    GPUs for critics alone; without replicas at most one GPU a noise band.
    """
    counts = dict.fromkeys(critic_gpus(gpus, share, options.replicas) for share in SHARES)
    if not options.beside and gpus > 1:
        counts.pop(0)
    cases = [Case(gpus, count, options) for count in counts]
    return max(
        ((case, simulate(case, world)) for case in cases), key=lambda made: made[1]["images_per_second"]
    )


def critic_gpus(gpus: int, share: int, replicas: bool) -> int:
    """Return how many GPUs host critics alone if one in `share` does: whole sets of hosts, not all GPUs."""
    if share == 0:
        return 0
    count = gpus // share if replicas else min(BANDS, gpus // share)
    return count - count % BANDS if count > BANDS else count


def bottleneck(case: Case, base: float, world: World) -> dict[str, float]:
    """Return by how much images a second grow if one lever is twice as fast, for each, largest first."""
    gains = {
        lever: simulate(replace(case, faster=lever), world)["images_per_second"] / base - 1.0
        for lever in LEVERS
    }
    return dict(sorted(gains.items(), key=lambda gain: -gain[1]))


def sweep(sizes: Sequence[int], world: World, options: Options = Options()) -> list[dict[str, Any]]:
    """Return a row for each size: the best split's simulation, its efficiency, and its bottleneck.

    Efficiency is images a second per GPU over those of one GPU.
    """
    alone = best_split(1, options, world)[1]["images_per_second"]
    rows = []
    for gpus in sizes:
        case, row = best_split(gpus, options, world)
        gains = bottleneck(case, row["images_per_second"], world)
        lever = next(iter(gains))
        overheads = [name for name in gains if name not in LEVERS[:2]]
        row |= {"efficiency": row["images_per_second"] / gpus / alone, "bottleneck": lever}
        rows.append(
            row | {"first_overhead": overheads[0], "gain_if_twice_as_fast": gains, "label": "SIMULATED"}
        )
    return rows


ABLATIONS: dict[str, tuple[Options, str | None]] = {
    "as stated": (Options(), None),
    "no replicas": (Options(replicas=False), "as stated"),
    "staleness 1": (Options(staleness=1), "as stated"),
    "bfloat16 on the wire": (Options(wire_bytes=2), "as stated"),
    "direct transport": (Options(direct=True), "as stated"),
    "critics on own GPUs": (Options(beside=False), "as stated"),
    "own GPUs, staleness 1": (Options(beside=False, staleness=1), "critics on own GPUs"),
    "own GPUs, no replicas": (Options(beside=False, replicas=False), "critics on own GPUs"),
    "own GPUs, bfloat16": (Options(beside=False, wire_bytes=2), "critics on own GPUs"),
}
"""Settings, and which of them each is compared with."""


def ablate(sizes: Sequence[int], world: World) -> list[dict[str, Any]]:
    """Return a row for each size and setting, each at its own best split, with its gain over another."""
    rows = []
    for gpus in sizes:
        found: dict[str, float] = {}
        for name, (options, against) in ABLATIONS.items():
            _, row = best_split(gpus, options, world)
            found[name] = row["images_per_second"]
            gain = found[name] / found[against or name] - 1.0
            kept = {
                key: row[key] for key in ("gpus", "critic_gpus", "replicas", "images_per_second", "step_s")
            }
            rows.append({"setting": name, **kept, "against": against, "gain": gain, "label": "SIMULATED"})
    return rows


def _setup(case: Case, world: World) -> Setup:
    trainers = case.gpus - case.critics
    room = case.critics or case.gpus
    hosts = min(BANDS, room)
    replicas = max(1, room // hosts) if case.options.replicas else 1
    jitter = world.figures.jitter.value * (0.5 if case.faster == "stragglers" else 1.0)
    return Setup(
        trainers, float(world.work.batch_per_gpu * case.gpus), BANDS, hosts, min(replicas, trainers),
        case.options.staleness, True, jitter, world.seed,
    )  # fmt: skip


def _costs(case: Case, world: World) -> Costs:
    options = case.options
    costs = step_costs(world.flops, world.figures, world.work, options.wire_bytes, options.direct)
    if case.faster == "student and teacher":
        half = {name: getattr(costs, name).scaled(0.5) for name in ("sampling", "forward", "backward")}
        return replace(costs, **half, optimizer=costs.optimizer / 2)
    if case.faster == "critics":
        return replace(costs, learn=costs.learn.scaled(0.5), judge=costs.judge.scaled(0.5))
    if case.faster == "messages":
        return replace(costs, call=costs.call / 2, copy_rate=costs.copy_rate * 2)
    return costs


def _stage(case: Case, world: World, setup: Setup, costs: Costs) -> Stage:
    """Return the machines: trainers spread evenly over the nodes, critics on the GPUs between them."""
    env, figures = simpy.Environment(), world.figures
    devices = [Cores(env, 1.0) for _ in range(case.gpus)]
    ports = [(Port(env), Port(env)) for _ in range(case.gpus)]

    def seat(gpu: int) -> Seat:
        return Seat(devices[gpu], *ports[gpu], Port(env), gpu // figures.gpus_per_node)

    homes = [rank * case.gpus // setup.trainers for rank in range(setup.trainers)]
    rest = sorted(set(range(case.gpus)) - set(homes)) or list(range(case.gpus))
    hosts = [[seat(rest[k * setup.hosts + h]) for k in range(setup.replicas)] for h in range(setup.hosts)]
    inner = (figures.inner.value * figures.reached.value * GIGA, figures.inner_latency.value * MICRO)
    outer = (figures.outer.value * figures.reached.value * GIGA, figures.outer_latency.value * MICRO)
    half_trip = figures.round_trip.value * MILLI / 2 * (0.5 if case.faster == "messages" else 1.0)

    def link(source: Seat, target: Seat) -> tuple[float, float]:
        rate, latency = inner if source.node == target.node else outer
        return rate, latency + half_trip

    def averaging(parties: int, size: float) -> float:
        nodes = min(parties, -(-case.gpus // figures.gpus_per_node))
        seconds = hierarchical_seconds(nodes, max(1, parties // nodes), size, inner, outer)
        return seconds * (0.5 if case.faster == "gradient averaging" else 1.0)

    gradients = averaging(setup.trainers, world.flops.parameters * world.work.gradient_bytes)
    return Stage(
        env, [seat(gpu) for gpu in homes], hosts, link,
        lambda backward: max(0.0, gradients - figures.overlap.value * backward),
        averaging(setup.replicas, 4.0 * world.flops.head_parameters),
    )  # fmt: skip
