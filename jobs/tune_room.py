"""How many trials of a sweep fit on a cluster at once, from the actors of the job's own configuration."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.training import ROOM_POLL_S
from cluster.placement import ClusterView, Pool, pack, plan
from cluster.reserve import PlacementError, PlacementTimeout, reserve
from counterpoint.section import Section
from jobs.crew import crew_pools
from jobs.stage import cast_pools

logger = logging.getLogger(__name__)

TRIAL_CPUS = 0.01
"""Logical CPUs of the process that watches a trial, and computes nothing."""
MOST = 4096


@dataclass(frozen=True)
class Room:
    """How many trials fit at once, and why."""

    trials: int
    why: str


def run_pools(job: str, config: Section) -> list[Pool]:
    """Return the actors that one run of a job has at its busiest, by kind, without empty pools.

    A run that does without Ray's workers computes in the process that starts it, which then counts as one.
    """
    settings: Any = config
    if job == "rollout":
        # Policies that are still to be trained are trained before the first trial.
        pools = crew_pools(settings.workers, settings.samplers)
    else:
        adversarial = getattr(settings, "adversarial", None)
        critics = settings.critics if adversarial is not None and adversarial.uses_panel else None
        evaluators = getattr(settings, "evaluation", None)
        pools = cast_pools(settings.trainer, critics, evaluators)
        if not settings.trainer.workers:
            own = settings.trainer.cpus_per_worker, settings.trainer.gpus_per_worker
            pools.append(Pool("process", 1, *own, setting="trainer.workers"))
    return [pool for pool in pools if pool.count]


def process_options(pools: Sequence[Pool]) -> dict[str, float]:
    """Return, as an actor's options, what the process that starts a run computes with itself."""
    own = [pool for pool in pools if pool.name == "process"]
    return {"num_cpus": sum(pool.cpus for pool in own), "num_gpus": sum(pool.gpus for pool in own)}


def room_for(pools: Sequence[Pool], seeds: int, view: ClusterView) -> Room:
    """Return how many trials of `seeds` runs at a time fit into what is free in `view`, with the reason."""
    each = [Pool("trial", 1, TRIAL_CPUS)] + [replace(p, count=p.count * seeds) for p in pools]
    wanted = f"a trial's {_in_words(each[1:])} take {_sum(each)}"
    free = ", ".join(_amount(node.available) for node in view.nodes[:4])
    more = f" and {len(view.nodes) - 4} more" if len(view.nodes) > 4 else ""
    where = f"free on {len(view.nodes)} node{'s' if len(view.nodes) != 1 else ''}: {free}{more}"
    fits = 0
    while fits < MOST and _fit(each, fits + 1, view):
        fits += 1
    return Room(fits, f"{wanted}; {where}")


def check_fits(room: Room, pools: Sequence[Pool]) -> None:
    """Raise PlacementError, in one line that names what to lower, if not even one trial fits."""
    if room.trials == 0:
        settings = ", ".join(sorted({pool.setting for pool in pools if pool.setting}))
        raise PlacementError(
            f"no trial of the sweep fits on the cluster: {room.why}; lower {settings} of `base`, or the CPUs "
            "and GPUs of each, or objective.seeds"
        )


def await_room(pools: Sequence[Pool], patience: float) -> None:
    """Return once a run's actors could be placed; those of a trial that has just been stopped are leaving.

    Raises PlacementError at once if they never could, and after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            with reserve(plan([pool for pool in pools if pool.name != "process"]), timeout=ROOM_POLL_S):
                return
        except PlacementTimeout:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _fit(each: Sequence[Pool], trials: int, view: ClusterView) -> bool:
    pools = [replace(pool, count=pool.count * trials) for pool in each]
    bundles = plan(pools).bundles()
    return len(pack(bundles, view)) == len(bundles)


def _in_words(pools: Sequence[Pool]) -> str:
    return ", ".join(f"{pool.count} {pool.name}" for pool in pools)


def _sum(pools: Sequence[Pool]) -> str:
    total = {"CPU": 0.0, "GPU": 0.0}
    for pool in pools:
        total["CPU"] += pool.cpus * pool.count
        total["GPU"] += pool.gpus * pool.count
    return _amount(total)


def _amount(resources: Any) -> str:
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    return f"{cpus:.4g} CPUs" + (f" and {gpus:.4g} GPUs" if gpus else "")
