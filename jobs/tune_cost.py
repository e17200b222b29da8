"""What a sweep cost, and what it would on machines that need not exist: pure functions of the ledger."""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.placement import ClusterView, NodeView, Pool, pack, plan
from jobs.tune_ledger import TrialRecord
from jobs.tune_settings import PricedClusterConfig

HOUR = 3600.0


@dataclass(frozen=True)
class Cost:
    """What was reserved."""

    cpu_hours: float
    """Logical CPUs, times hours."""
    gpu_hours: float
    """GPUs, times hours."""
    trial_hours: float
    """Wall hours of all trials, one after the other."""


@dataclass(frozen=True)
class Estimate:
    """What the sweep would cost on a given cluster."""

    slots: int
    """Trials at once; 0 where not even one fits, and then all else is 0 too."""
    wall_hours: float
    """From the first trial's start to the last one's end."""
    machine_hours: float
    """Machines, times wall hours."""
    price: float
    """In the currency of the cluster's price."""


@dataclass(frozen=True)
class Saving:
    """Training steps of the trials that ended by themselves or were stopped early, over all seeds."""

    taken: int
    """Steps that they took."""
    to_the_end: int
    """Steps that they would have taken without being stopped."""

    @property
    def share(self) -> float:
        """The part that was saved; below 0 where repeated steps outweigh it."""
        return 1.0 - self.taken / self.to_the_end


def cost(records: Sequence[TrialRecord]) -> Cost:
    """Return what all trials reserved, failed and stopped ones included."""
    return Cost(
        math.fsum(record.cpu_hours for record in records),
        math.fsum(record.gpu_hours for record in records),
        math.fsum(record.seconds for record in records) / HOUR,
    )


def saving(records: Sequence[TrialRecord], lengths: Mapping[int, int]) -> Saving | None:
    """Return the steps taken against those of running every trial to its end; None if that is not known.

    Trials that failed or still run are left out on both sides. Steps that a later life repeated were taken,
    and running to the end would not have asked for them.

    Args:
        records: the trials.
        lengths: by trial, the training steps of all its runs if nothing stops them.
    """
    counted = [record for record in records if record.state in ("done", "stopped")]
    to_the_end = sum(lengths.get(record.index, 0) for record in counted)
    if not to_the_end or any(lengths.get(record.index, 0) <= 0 for record in counted):
        return None
    return Saving(sum(record.steps for record in counted), to_the_end)


def view_of(cluster: PricedClusterConfig) -> ClusterView:
    """Return the described machines, empty."""
    total = {"CPU": cluster.cpus, "GPU": cluster.gpus}
    return ClusterView(tuple(NodeView(f"machine-{i}", total, total) for i in range(cluster.nodes)))


def slots(pools: Sequence[Pool], view: ClusterView, most: int) -> int:
    """Return how many trials, each with all of `pools`, fit into `view` at once; at most `most`.

    Pools that ask for memory need nodes that have it in `view`.
    """
    low, high = 0, max(0, most)
    while low < high:
        middle = (low + high + 1) // 2
        bundles = plan([replace(pool, count=pool.count * middle) for pool in pools]).bundles()
        if len(pack(bundles, view)) == len(bundles):
            low = middle
        else:
            high = middle - 1
    return low


def makespan(durations: Sequence[float], slots: int) -> float:
    """Return when the last job ends if each, in order, starts in the first of `slots` slots that is free.

    Raises ValueError when there is no slot.
    """
    if slots < 1:
        raise ValueError(f"slots={slots}; pass 1 or more")
    free = [0.0] * min(slots, max(1, len(durations)))
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def estimate(records: Sequence[TrialRecord], pools: Sequence[Pool], cluster: PricedClusterConfig) -> Estimate:
    """Return what the trials of the ledger would cost on `cluster`, as long as here over its speed.

    Args:
        records: the trials, in the order in which they would start.
        pools: all actors of one trial.
        cluster: the machines.
    """
    room = slots(pools, view_of(cluster), len(records))
    if not room:
        return Estimate(0, 0.0, 0.0, 0.0)
    wall = makespan([record.seconds / cluster.speed for record in records], room) / HOUR
    return Estimate(room, wall, cluster.nodes * wall, cluster.nodes * wall * cluster.price)
