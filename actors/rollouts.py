"""Rollout workers: each steps several environments, with deadlines that end the process of a hung one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import ray
from pydantic import Field

from actors.watchdog import Watchdog
from cluster.dumpable import dumpable
from cluster.failures import reporting
from counterpoint.actions.space import ActionSpace
from counterpoint.environments.episode import Episode
from counterpoint.environments.running import (
    Build,
    Guard,
    Runner,
    Scripted,
    Unfinished,
    play_scripted,
    unguarded,
)
from counterpoint.policies.observation import Observation, ObservationSpace
from counterpoint.section import Section
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Decision, Stream

if TYPE_CHECKING:
    # A worker that steps simulators loads neither torch nor transformers until it is sent a policy.
    from actors.sampler import Sampler
    from counterpoint.environments.demonstrating import Recording


class WorkersConfig(Section):
    """Who steps environments, and how long they may take."""

    count: int = Field(default=2, ge=0)
    """Rollout workers; 0 steps environments in this process, without deadlines."""
    cpus_per_worker: float = Field(default=0.5, gt=0.0)
    """Logical CPUs reserved for each."""
    environments: int = Field(default=8, ge=1)
    """Environments of each worker, whose decisions are asked for at once."""
    episodes_at_once: int = Field(default=24, ge=1)
    """Episodes handed to a worker at a time; if it dies, they are played again."""
    step_deadline: float = Field(default=30.0, gt=0.0)
    """Seconds in which one control step must be done, its image included."""
    reset_deadline: float = Field(default=120.0, gt=0.0)
    """Seconds in which an environment must be built, and in which an episode must start."""
    patience: float = Field(default=120.0, gt=0.0)
    """Seconds to wait for actions, and for an actor that is being restarted."""
    job_deadline: float = Field(default=1800.0, gt=0.0)
    """Seconds after which a worker that has not returned its episodes is ended and started again."""


@dataclass(frozen=True)
class RolloutJob:
    """What to play: a policy under a rule, or something scripted."""

    sampler: "Sampler | None" = None
    selection: SelectionConfig | None = None
    scripted: Scripted | None = None
    """Acts instead of a policy."""
    traced: frozenset[int] = frozenset()
    """Seeds whose decisions are kept."""
    filmed: frozenset[int] = frozenset()
    """Seeds whose images are kept."""

    def __post_init__(self) -> None:
        policy = self.sampler is not None and self.selection is not None
        if policy == (self.scripted is not None):
            raise ValueError("a rollout needs either a sampler with a selection, or something scripted")


@dataclass(frozen=True)
class CollectJob:
    """What to record: the expert's episodes, or scenes."""

    kind: Literal["demonstration", "scene"]
    noise: float = 0.12
    """Standard deviation of the noise on executed actions, in units of half an action's range."""


Job = RolloutJob | CollectJob
Outcome: TypeAlias = "Episode | Recording | Unfinished"


@dataclass(frozen=True)
class WorkerSettings:
    """What a rollout worker needs to know beside its recipe."""

    name: str = "worker-0"
    index: int = 0
    """By which workers are spread over samplers."""
    environments: int = 8
    deadlines: dict[Any, float] | None = field(default=None)
    """Seconds by deed; None sets no deadlines, and a hang is never ended."""


class RolloutWorker:
    """Steps environments; an ordinary class, to which `ray.remote` adds nothing but transport.

    It has one thread, as a renderer's context belongs to the thread that made it.
    """

    def __init__(self, build: Build, settings: WorkerSettings) -> None:
        dumpable()
        self.settings = settings
        self.watchdog = Watchdog(settings.name, settings.deadlines) if settings.deadlines else None
        guard: Guard = self.watchdog.guard if self.watchdog else unguarded
        self.runner = Runner(build, settings.environments, guard)

    @reporting(lambda self: self.settings.name)
    def run(self, job: Job, seeds: Sequence[int]) -> list[Outcome]:
        """Do the job for each of `seeds`, and return what came of it, in no particular order.

        What an environment raises becomes an `Unfinished`; what a sampler raises, other than a ValueError
        about one observation, is raised as `Failure`.
        """
        if isinstance(job, CollectJob):
            return [self._record(job, seed) for seed in seeds]
        if job.scripted is not None:
            return [self._play(job, job.scripted, seed) for seed in seeds]
        sampler, selection = job.sampler, job.selection
        assert sampler is not None
        assert selection is not None

        def choose(observations: list[Observation], streams: list[Stream]) -> list[Decision]:
            return sampler.act(observations, streams, selection, self.settings.index)

        execute, oracle = sampler.action_space.execute, selection.rule == "oracle"
        return list(self.runner.run(seeds, choose, execute, oracle, job.traced, job.filmed))

    def spaces(self) -> tuple[ObservationSpace, ActionSpace]:
        """Return the environment's spaces, after building one; raises what that raises."""
        environment = self.runner.environment()
        return environment.observation_space, environment.action_space

    def last_words(self) -> str | None:
        """Return how this worker's process ended before it was restarted; None if nobody knows."""
        return self.watchdog.last_words if self.watchdog else None

    def close(self) -> None:
        """Close the environments and leave nothing behind."""
        self.runner.close()
        if self.watchdog:
            self.watchdog.close()

    def _record(self, job: CollectJob, seed: int) -> "Recording | Unfinished":
        # Slow to import, and a worker that only rolls out must come back fast.
        from counterpoint.environments.demonstrating import demonstrate, scene

        if job.kind == "scene":
            return self.runner.use(seed, lambda environment, guard: scene(environment, seed, guard))
        return self.runner.use(
            seed, lambda environment, guard: demonstrate(environment, seed, job.noise, guard)
        )

    def _play(self, job: RolloutJob, actor: Scripted, seed: int) -> Episode | Unfinished:
        return self.runner.use(
            seed,
            lambda environment, guard: play_scripted(environment, seed, actor, guard, seed in job.filmed),
        )


def worker_actor() -> Any:
    """Return the actor class of a rollout worker; its methods are called one at a time."""
    return ray.remote(max_restarts=-1, max_task_retries=0)(RolloutWorker)
