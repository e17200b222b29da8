"""The cast of a distillation on a cluster: critic hosts and evaluation workers, placed and checked."""

import contextlib
import importlib.util
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch

from actors.critics import HostSettings, critic_actor
from actors.evaluation import EvaluationRecipe, Evaluator
from actors.panel import HostHandle, introduce
from actors.recipe import PanelRecipe, build_layout
from actors.training import TrainerConfig
from cluster.connect import thread_env
from cluster.placement import Pool, Strategy, plan
from cluster.reserve import Reservation, reserve
from cluster.waiting import get, ready
from counterpoint.critics.bank import build_banks, digest
from counterpoint.critics.panel import group_name
from jobs.settings import EvaluatorsConfig, HostedCriticsConfig

logger = logging.getLogger(__name__)

START_TIMEOUT = 120.0
PLACEMENT_TIMEOUT = 25.0


@dataclass(frozen=True)
class Cast:
    """The actors of a run."""

    hosts: tuple[HostHandle, ...]
    evaluators: tuple[Any, ...]


def shares(groups: int, actors: int) -> list[tuple[int, ...]]:
    """Return which critic groups each actor hosts, as evenly as possible and in order."""
    return [tuple(range(groups * i // actors, groups * (i + 1) // actors)) for i in range(actors)]


@contextlib.contextmanager
def cast(
    panel: PanelRecipe | None, critics: HostedCriticsConfig, evaluation: EvaluationRecipe | None,
    evaluators: EvaluatorsConfig, trainer: TrainerConfig, uri: str,
) -> Iterator[Cast]:  # fmt: skip
    """Reserve, start and check the actors of a run beside Ray Train's workers; leaving ends them.

    Raises PlacementError (or PlacementTimeout) within 30 seconds, naming what was asked, what the cluster has
    and which setting to lower.
    """
    actors = critics.actors if panel is not None else 0
    if actors and critics.transport == "nixl" and importlib.util.find_spec("nixl") is None:
        raise ValueError(
            "critics.transport=nixl needs the package nixl on every node: pip install nixl, or set "
            "critics.transport=object_store"
        )
    pools = cast_pools(
        trainer, critics if panel is not None else None, evaluators if evaluation is not None else None
    )
    strategy: Strategy = "SPREAD" if critics.replicas > 1 else "PACK"
    with reserve(plan(pools, strategy), timeout=PLACEMENT_TIMEOUT) as places:
        hosts = _hosts(places, panel, critics, actors, trainer, uri)
        workers = _evaluators(places, evaluation, evaluators.workers)
        named = {host.name: host.actor for host in hosts} | {
            f"evaluator-{i}": a for i, a in enumerate(workers)
        }
        ready(named, timeout=START_TIMEOUT, what="start of the cast")
        introduce(hosts, hosts, timeout=START_TIMEOUT)
        yield Cast(hosts, workers)


@contextlib.contextmanager
def evaluators_on_stage(
    evaluation: EvaluationRecipe, evaluators: EvaluatorsConfig, trainer: TrainerConfig
) -> Iterator[tuple[Any, ...]]:
    """Start evaluation workers alone; none where the run does without Ray."""
    if trainer.workers == 0 or evaluators.workers == 0:
        yield ()
        return
    with reserve(
        plan([_evaluator_pool(evaluators, evaluators.workers)]), timeout=PLACEMENT_TIMEOUT
    ) as places:
        yield _evaluators(places, evaluation, evaluators.workers)


def cast_pools(
    trainer: TrainerConfig,
    critics: HostedCriticsConfig | None = None,
    evaluators: EvaluatorsConfig | None = None,
) -> list[Pool]:
    """Return a training run's critic hosts, evaluation workers and trainers as pools, those it has none of
    empty."""
    found = [] if critics is None else [_critic_pool(critics, critics.actors)]
    found += [] if evaluators is None else [_evaluator_pool(evaluators, evaluators.workers)]
    return [*found, _trainer_pool(trainer)]


def check_room(trainer: TrainerConfig) -> None:
    """Raise PlacementError if Ray Train's workers could never be placed; Ray Train itself would wait."""
    with reserve(plan([_trainer_pool(trainer)]), timeout=PLACEMENT_TIMEOUT):
        pass


def _trainer_pool(trainer: TrainerConfig) -> Pool:
    return Pool(
        "trainer",
        trainer.workers,
        trainer.cpus_per_worker,
        trainer.gpus_per_worker,
        setting="trainer.workers",
        reserved_by="train",
    )


def _critic_pool(critics: HostedCriticsConfig, actors: int) -> Pool:
    return Pool(
        "critics",
        actors * critics.replicas,
        critics.cpus_per_actor,
        critics.gpus_per_actor,
        setting="critics.actors" if critics.replicas == 1 else "critics.actors x critics.replicas",
    )


def _evaluator_pool(evaluators: EvaluatorsConfig, count: int) -> Pool:
    return Pool(
        "evaluators",
        count,
        evaluators.cpus_per_worker,
        evaluators.gpus_per_worker,
        setting="evaluation.workers",
    )


def _evaluators(places: Reservation, evaluation: EvaluationRecipe | None, count: int) -> tuple[Any, ...]:
    if evaluation is None:
        return ()
    options = {"max_restarts": -1, "max_task_retries": 2, "runtime_env": {"env_vars": thread_env(1)}}
    return tuple(
        ray.remote(Evaluator).options(**options, **places.options("evaluators", i)).remote(evaluation)
        for i in range(count)
    )


def _hosts(
    places: Reservation,
    panel: PanelRecipe | None,
    critics: HostedCriticsConfig,
    actors: int,
    trainer: TrainerConfig,
    uri: str,
) -> tuple[HostHandle, ...]:
    if panel is None or actors == 0:
        return ()
    hosts = []
    replicas, ranks = critics.replicas, max(1, trainer.workers)
    # Places are in the order of nodes: all shares once, then all again, so that a share's replicas lie apart.
    seats = itertools.product(range(replicas), enumerate(shares(len(critics.noise_levels), actors)))
    for place, (replica, (index, groups)) in enumerate(seats):
        name = f"critics-{index}" if replicas == 1 else f"critics-{index}-replica-{replica}"
        snapshots = f"{uri.rstrip('/')}/snapshots" + (f"/replica-{replica}" if replica else "")
        settings = HostSettings(
            name, groups, snapshots, critics.snapshot_every, critics.patience, replica, replicas,
            critics.transport, uri, place,
        )  # fmt: skip
        actor = (
            critic_actor(len(groups), ranks // replicas, replicas, 2 * trainer.accumulate, critics.transport)
            .options(
                runtime_env={"env_vars": thread_env(critics.threads)}, **places.options("critics", place)
            )
            .remote(panel, settings)
        )
        hosts.append(
            HostHandle(name, groups, actor, replica, replicas, critics.wire_dtype, critics.transport)
        )
    return tuple(hosts)


def check_digests(hosts: tuple[HostHandle, ...], panel: PanelRecipe) -> dict[str, str]:
    """Return the digests of the heads in new hosts, after comparing them with what the seeds say.

    Raises RuntimeError if an actor holds other heads than any process would build: versions differ.
    """
    answers = get(
        {h.name: h.actor.digests.remote() for h in hosts}, timeout=START_TIMEOUT, what="digests of heads"
    )
    found = {name: digest for answer in answers.values() for name, digest in answer.items()}
    # Heads alone: the frozen encoder of a large teacher has no place in the driver.
    pool, cpu = build_layout(panel), torch.device("cpu")
    expected = {group_name(i): digest(build_banks(pool, i, cpu)) for i in range(len(pool.timesteps))}
    # By answer: replicas answer under one name.
    wrong = sorted({name for answer in answers.values() for name in answer if answer[name] != expected[name]})
    if wrong:
        raise RuntimeError(
            f"{', '.join(wrong)} started with other heads than seed {panel.seed} gives: compare the versions "
            "of torch on the nodes"
        )
    return found
