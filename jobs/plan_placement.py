"""Where the actors of a planned job go on machines that need not exist, and what crosses between these."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cluster.explain import Explanation, explain
from cluster.placement import Bundle, ClusterView, NodeView, Pool, pack, plan
from jobs.plan_cast import CastPlan, Role
from jobs.plan_settings import MachinesConfig, parse_bytes
from jobs.stage import shares

SHARES = 20
"""A part of a GPU is suggested in twentieths."""
TRAINER, CRITICS, EVALUATOR = "trainer", "critics", "evaluator"


@dataclass(frozen=True)
class Placement:
    """A suggested placement."""

    pools: dict[str, Pool]
    explanation: Explanation
    nodes: dict[str, dict[str, int]]
    """How many of each role on each node; empty where not all fit."""
    crossing: int
    """Bytes that leave a machine in one step, over all machines, on average over steps."""

    @property
    def fits(self) -> bool:
        """Whether every actor has a place."""
        return self.explanation.fits


def place(config: Any, cast: CastPlan) -> Placement:
    """Place a cast on the planned machines: one GPU to a trainer, parts of GPUs to others where they fit.

    A trainer that is alone has a part too, where all fit only so; several cannot: NCCL takes one rank a GPU.
    """
    found = _placed(config, cast, whole=True)
    if found.fits or config.trainer.workers > 1 or not config.gpus:
        return found
    shared = _placed(config, cast, whole=False)
    return shared if shared.fits else found


def _placed(config: Any, cast: CastPlan, whole: bool) -> Placement:
    gpu = config.gpus > 0
    memory = parse_bytes(config.gpu_memory)
    cpus = {TRAINER: config.trainer.cpus_per_worker}
    if hasattr(config, "critics"):
        cpus[CRITICS] = config.critics.cpus_per_actor
    if hasattr(config, "evaluation"):
        cpus[EVALUATOR] = config.evaluation.cpus_per_worker
    pools = {}
    for role in cast.roles:
        if role.count:
            alone = whole and role.name == TRAINER
            gpus = 0.0 if not gpu else 1.0 if alone else share_of(role, memory)
            pools[role.name] = Pool(
                role.name, role.count, cpus[role.name], gpus,
                role.holding.host if config.host_memory else 0, setting=role.setting,
                reserved_by="train" if role.name == TRAINER else "us",
            )  # fmt: skip
    # Processors are no part of the plan: every machine has enough of them.
    view = machines(config, sum(math.ceil(pool.cpus * pool.count) for pool in pools.values()))
    wanted = plan(pools.values())
    explanation = explain(wanted, view)
    if not explanation.fits:
        return Placement(pools, explanation, {}, 0)
    places = {bundle: node.name for bundle, node in pack(wanted.bundles(), view).items()}
    nodes = {
        node.name: dict(Counter(b.pool.name for b, where in places.items() if where == node.name))
        for node in view.nodes
    }
    return Placement(pools, explanation, nodes, crossing(config, cast, places))


def share_of(role: Role, memory: int) -> float:
    """Return the part of a GPU of `memory` bytes that one actor of a role needs, at most one whole GPU."""
    return min(1.0, max(1, math.ceil(SHARES * role.holding.device / memory)) / SHARES)


def machines(config: MachinesConfig, cpus: int) -> ClusterView:
    """Return the planned machines, empty, each with `cpus` processors."""
    count = max(1, math.ceil(config.gpus / config.gpus_per_node))
    nodes = []
    for index in range(count):
        gpus = min(config.gpus_per_node, config.gpus - index * config.gpus_per_node)
        total = {"CPU": float(cpus), "GPU": float(max(0, gpus))}
        total["memory"] = float(parse_bytes(config.host_memory)) if config.host_memory else 0.0
        nodes.append(NodeView(f"machine-{index}", total, total))
    return ClusterView(tuple(nodes))


def crossing(config: Any, cast: CastPlan, places: dict[Bundle, str]) -> int:
    """Return the bytes that cross between machines in a step: gradients and weights, samples, snapshots.

    Trainers on one machine are neighbours in the ring, so that one rank of each machine sends to another. In
    a step each critic group is asked with the same chance.
    """
    trainers = sorted((b.index, where) for b, where in places.items() if b.pool.name == TRAINER)
    homes = {where for _, where in trainers}
    total = float(cast.exchange * len(homes)) if len(homes) > 1 else 0.0
    hosts = {b.index: where for b, where in places.items() if b.pool.name == CRITICS}
    if hosts:
        critics, replicas = config.critics, config.critics.replicas
        hosted = shares(len(critics.noise_levels), critics.actors)
        asked = cast.panel.to_critics + cast.panel.to_trainers
        each = asked / (len(trainers) * len(critics.noise_levels))
        for rank, where in trainers:
            replica = rank * replicas // len(trainers)
            away = [a for a in range(critics.actors) if hosts[a * replicas + replica] != where]
            total += each * sum(len(hosted[a]) for a in away)
        if replicas > 1:
            between = cast.panel.between_replicas / (replicas * (replicas - 1) * critics.actors)
            for a in range(critics.actors):
                mine = [hosts[a * replicas + r] for r in range(replicas)]
                total += between * sum(x != y for x in mine for y in mine)
    every = config.evaluation.every if hasattr(config, "evaluation") else 0
    scorers = {where for b, where in places.items() if b.pool.name == EVALUATOR}
    if every:
        total += cast.snapshot * len(scorers - {trainers[0][1]}) / every
    return round(total)
