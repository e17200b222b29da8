"""Rollout workers and action samplers on a cluster or in this process, as the configuration says."""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from actors.crew import Crew, LocalCrew, RolloutCrew
from actors.roll import show_cast
from actors.rollouts import RolloutWorker, WorkersConfig, WorkerSettings, worker_actor
from actors.sampler import (
    LocalSampler,
    RemoteSamplers,
    Sampler,
    SamplersConfig,
    SamplerSettings,
    sampler_actor,
)
from cluster.connect import connected, thread_env
from cluster.placement import Pool, plan
from cluster.reserve import Reservation, reserve
from cluster.waiting import NotReady, get, ready
from counterpoint.actions.space import ActionSpace
from counterpoint.environments.running import Build
from jobs.stage import PLACEMENT_TIMEOUT, START_TIMEOUT

NOBODY = SamplersConfig(count=0)


@dataclass(frozen=True)
class Stage:
    """Rollout workers that are up, and room for samplers of one policy after the other."""

    crew: Crew
    workers: WorkersConfig
    samplers: SamplersConfig
    places: Reservation | None

    @contextlib.contextmanager
    def policy(self, uri: str, seed: int = 0) -> Iterator[Sampler]:
        """Have the policy of a run ready to choose with candidates of `seed`, for the length of a block.

        Raises ValueError, in one line, if the run has no policy or a damaged one, or if it does not suit
        the environment.
        """
        with contextlib.ExitStack() as stack:
            here = self.places is None or self.samplers.count == 0
            sampler: Sampler
            if here:
                sampler = LocalSampler(uri, seed, uuid.uuid4().hex)
            else:
                sampler = stack.enter_context(self._hosted(uri, seed))
            sampler.check(*self.crew.spaces())
            yield sampler

    @contextlib.contextmanager
    def _hosted(self, uri: str, seed: int) -> Iterator[Sampler]:
        assert self.places is not None
        config, callers = self.samplers, max(1, self.workers.count)
        # A batch of all that a sampler's callers can ask is full: there is nothing more to wait for.
        most = -(-callers // config.count) * self.workers.environments
        actors = {}
        for index in range(config.count):
            name = f"sampler-{index}"
            settings = SamplerSettings(
                name, seed, min(config.max_batch, most), config.max_wait, self.workers.patience
            )
            options: dict[str, Any] = {"runtime_env": {"env_vars": thread_env(config.threads)}}
            actor = sampler_actor(callers).options(**options, **self.places.options("samplers", index))
            actors[name] = actor.remote(uri, settings)
        try:
            _await(actors, "start of the samplers")
            described = get(actors["sampler-0"].describe.remote(), START_TIMEOUT, "description of the policy")
            action_space = ActionSpace.model_validate(described["action_space"])
            yield RemoteSamplers(tuple(actors.values()), action_space, self.workers.patience)
        finally:
            for actor in actors.values():
                ray.kill(actor)


@contextlib.contextmanager
def crew_on_stage(build: Build, workers: WorkersConfig, samplers: SamplersConfig = NOBODY) -> Iterator[Stage]:
    """Start rollout workers whose environments `build` makes, and keep room for samplers; leaving ends them.

    Ray is only used where a count is above 0. Raises PlacementError (or PlacementTimeout) within 30 seconds
    if there is no room, and whatever an environment says that cannot be built.
    """
    with contextlib.ExitStack() as stack:
        places = None
        if workers.count or samplers.count:
            stack.enter_context(connected())
            places = stack.enter_context(reserve(plan(crew_pools(workers, samplers)), PLACEMENT_TIMEOUT))
        crew = _workers(build, workers, places)
        stack.callback(crew.close)
        crew.spaces()
        yield Stage(crew, workers, samplers, places)


def crew_pools(workers: WorkersConfig, samplers: SamplersConfig) -> list[Pool]:
    """Return the rollout workers and the action samplers as pools."""
    return [
        Pool("workers", workers.count, workers.cpus_per_worker, setting="workers.count"),
        Pool(
            "samplers", samplers.count, samplers.cpus_per_actor, samplers.gpus_per_actor,
            setting="samplers.count",
        ),
    ]  # fmt: skip


def _workers(build: Build, config: WorkersConfig, places: Reservation | None) -> LocalCrew | RolloutCrew:
    if config.count == 0 or places is None:
        settings = WorkerSettings(environments=config.environments)
        return LocalCrew(RolloutWorker(build, settings), config.episodes_at_once)
    deadlines = {"build": config.reset_deadline, "start": config.reset_deadline, "act": config.step_deadline}
    crew = uuid.uuid4().hex[:12]
    options: dict[str, Any] = {"runtime_env": {"env_vars": thread_env(1)}}
    actors = {}
    for index in range(config.count):
        settings = WorkerSettings(f"worker-{crew}-{index}", index, config.environments, deadlines)
        actor = worker_actor().options(**options, **places.options("workers", index))
        actors[f"worker-{index}"] = actor.remote(build, settings)
    _await(actors, "start of the rollout workers")
    show_cast()
    return RolloutCrew(actors, config)


def _await(actors: dict[str, Any], what: str) -> None:
    """Wait until actors are up; what a constructor refuses with a ValueError is raised as that."""
    try:
        ready(actors, timeout=START_TIMEOUT, what=what)
    except NotReady as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from error
        raise
