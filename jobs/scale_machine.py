"""The simulation calibrated by this machine's measurements, and its predictions of what it was not shown.

What a part costs alone is measured alone. Two numbers are fitted to two arrangements with one trainer: how
much work the machine's cores do together (two hyperthreads are not two cores), and how much of that the
threads of one process can use (Python's lock). All other arrangements are predicted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import simpy

from jobs.scale_engine import Cores, Port
from jobs.scale_measure import Arm
from jobs.scale_step import Cost, Costs, Outcome, Seat, Setup, Stage, play

BISECTIONS = 30


@dataclass(frozen=True)
class Machine:
    """A calibrated machine."""

    costs: Costs
    latency: float
    """Seconds of a message's way, without what its size costs."""
    averaging: float
    """Seconds of averaging gradients over two trainers."""
    cores: float
    """Cores' worth of work that all processes together get done."""
    threads: float
    """Cores' worth of work that the threads of one process get done."""


def predict(machine: Machine, arm: Arm, bands: int) -> Outcome:
    """Return what the simulation says of an arrangement; one step is like another here."""
    setup = Setup(arm.trainers, arm.batch, bands, min(arm.actors, bands))
    env = simpy.Environment()
    cores = Cores(env, machine.cores)

    def seat(name: str) -> Seat:
        limit = min(machine.threads, machine.cores)
        return Seat(cores, Port(env), Port(env), Port(env), process=name, limit=limit)

    stage = Stage(
        env,
        [seat(f"trainer-{rank}") for rank in range(setup.trainers)],
        [[seat(f"host-{host}")] for host in range(setup.hosts)],
        lambda source, target: (math.inf, machine.latency),
        lambda backward: machine.averaging if setup.trainers > 1 else 0.0,
        0.0,
    )
    return play(setup, machine.costs, stage, 4)


def calibrate(
    components: Mapping[str, Any], measured: Mapping[Arm, Mapping[str, Any]], cores: int, bands: int
) -> Machine:
    """Return the machine whose components are these, fitted to two arrangements: many actors, and one.

    Raises ValueError unless `measured` holds two arrangements of one batch size with one trainer each.
    """
    apart, single = _two(measured)
    parts = measured[apart]["parts_s"]
    forward, backward = (line(components[f"{name}_s"]) for name in ("forward", "backward"))
    # What stands around the passes (drawing the batch, the optimizer) is the rest of the step's own parts.
    forward = replace(forward, fixed=forward.fixed + max(0.0, parts["forward"] - forward(apart.batch)))
    optimizer = max(0.0, parts["backward"] - backward(apart.batch))
    costs = Costs(
        sampling=Cost(), forward=forward, backward=backward, optimizer=optimizer,
        learn=line(components["judge_s"]), judge=Cost(), pack=Cost(0.0, parts["wire"] / 2 / apart.batch),
        call=0.0, copy_rate=math.inf, sample_bytes=0.0, answer_bytes=0.0,
    )  # fmt: skip
    latency = components["message_s"] / 2
    machine = Machine(costs, latency, components.get("averaging_s", 0.0), float(cores), float(cores))

    def fit(change: Callable[[float], Machine], arm: Arm, low: float, high: float) -> Machine:
        off = bisect(
            lambda value: predict(change(value), arm, bands).step - measured[arm]["step_s"], low, high
        )
        return change(off)

    machine = fit(lambda value: replace(machine, cores=value), apart, 0.25, float(cores))
    together = machine
    return fit(lambda value: replace(together, threads=value), single, 0.25, together.cores)


def line(points: Mapping[int, float]) -> Cost:
    """Return the straight line through the seconds at two numbers of samples, not below what is possible."""
    (few, short), (many, long) = sorted(points.items())
    each = max(0.0, (long - short) / (many - few))
    return Cost(max(0.0, short - each * few), each)


def bisect(off: Callable[[float], float], low: float, high: float) -> float:
    """Return where the falling function `off` is zero between `low` and `high`, or the nearer end."""
    if off(high) > 0.0:
        return high
    if off(low) < 0.0:
        return low
    for _ in range(BISECTIONS):
        between = (low + high) / 2
        low, high = (between, high) if off(between) > 0.0 else (low, between)
    return (low + high) / 2


def compare(
    machine: Machine, measured: Mapping[Arm, Mapping[str, Any]], shown: Sequence[Arm], bands: int
) -> list[dict[str, Any]]:
    """Return predicted and measured seconds of a step for each arrangement, those it was not shown last."""
    rows = []
    for arm in sorted(measured, key=lambda arm: (arm not in shown, arm.trainers, arm.actors, arm.batch)):
        outcome, real = predict(machine, arm, bands), measured[arm]["step_s"]
        rows.append(
            {
                "arrangement": arm.name,
                "calibrated_on": arm in shown,
                "predicted_s": outcome.step,
                "measured_s": real,
                "spread_s": list(measured[arm]["spread_s"]),
                "error": outcome.step / real - 1.0,
                "predicted_parts_s": {
                    name: outcome.parts[name] for name in ("forward", "waiting", "backward")
                },
                "labels": {"predicted_s": "SIMULATED", "measured_s": "MEASURED"},
            }
        )
    return rows


def _two(measured: Mapping[Arm, Any]) -> tuple[Arm, Arm]:
    """Return the arrangements with the most actors and with the fewest."""
    arms = sorted(measured, key=lambda arm: arm.actors)
    few, many = arms[0], arms[-1]
    if (
        len(arms) != 2
        or few.actors == many.actors
        or few.batch != many.batch
        or {a.trainers for a in arms} != {1}
    ):
        raise ValueError(
            f"calibrate={[arm.name for arm in arms]} must be two arrangements with one trainer and one batch "
            "size that differ in actors"
        )
    return many, few
