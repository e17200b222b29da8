"""Action samplers: each hosts a policy and chooses actions for the environments of many callers."""

import functools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import ray
import torch
from pydantic import Field

from actors.batching import Batcher, BatchStatistics
from actors.telemetry import Telemetry, run_tag
from cluster.dumpable import dumpable
from cluster.failures import classify, failure
from cluster.roster import split_label
from cluster.storage import RunStore
from cluster.waiting import get
from counterpoint.actions.space import ActionSpace
from counterpoint.policies.observation import Observation, ObservationSpace
from counterpoint.section import Section
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Decision, Stream

if TYPE_CHECKING:
    from counterpoint.policies.bundle import PolicyBundle

POLICY = "policy"
"""Folder of a run that holds its policy."""
RETRY_S = 0.5
"""Seconds between attempts to reach a sampler that is being restarted."""


class SamplersConfig(Section):
    """Where policies are asked for actions."""

    count: int = Field(default=1, ge=0)
    """Action samplers; 0 gives every rollout worker a policy of its own."""
    cpus_per_actor: float = Field(default=0.5, gt=0.0)
    """Logical CPUs reserved for each."""
    gpus_per_actor: float = Field(default=0.0, ge=0.0)
    """GPUs reserved for each; several may share one, such as 0.25."""
    threads: int = Field(default=1, ge=1)
    """Threads of each actor's maths."""
    max_batch: int = Field(default=32, ge=1)
    """Observations that are chosen for at once."""
    max_wait: float = Field(default=0.005, ge=0.0)
    """Seconds for which a request may wait for others to join its batch."""


class Sampler(Protocol):
    """Chooses actions, in this process or elsewhere; picklable."""

    @property
    def action_space(self) -> ActionSpace:
        """The policy's, whose `execute` says how much of a chunk is executed."""
        ...

    def act(
        self, observations: Sequence[Observation], streams: Sequence[Stream], selection: SelectionConfig,
        caller: int = 0,
    ) -> list[Decision]:  # fmt: skip
        """Return a decision per observation; `caller` is an index by which callers are spread."""
        ...

    def check(self, observation_space: ObservationSpace, action_space: ActionSpace) -> None:
        """Raise ValueError, in one line, unless an environment of these spaces suits the policy."""
        ...


def load_policy(uri: str) -> "PolicyBundle":
    """Load the policy of a run, onto the GPU if this process has one.

    Raises ValueError, in one line, if the run has no policy or it is damaged.
    """
    from counterpoint.policies.bundle import PolicyBundle  # slow to import, and workers must come back fast

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = RunStore(uri)
    if not store.exists(POLICY):
        raise ValueError(f"{uri} has no policy: give the URI of a finished run that trained one")
    with store.local_folder(POLICY) as folder:
        return PolicyBundle.load(folder, device)


@functools.lru_cache(maxsize=1)
def _kept_policy(uri: str, visit: str) -> "PolicyBundle":
    return load_policy(uri)


@dataclass(frozen=True)
class LocalSampler:
    """Chooses in the process that asks; the policy is loaded there when it is first asked."""

    policy: str
    """URI of the policy's run."""
    seed: int = 0
    """Seed of the candidates."""
    visit: str = ""
    """Names the use that is made of it: another use loads the policy again, which may have been replaced."""

    @property
    def action_space(self) -> ActionSpace:
        """The policy's."""
        return _kept_policy(self.policy, self.visit).action_space

    def act(
        self, observations: Sequence[Observation], streams: Sequence[Stream], selection: SelectionConfig,
        caller: int = 0,
    ) -> list[Decision]:  # fmt: skip
        """Return a decision per observation; raises ValueError, in one line, for one that does not fit."""
        from counterpoint.selection.choice import decide

        return decide(_kept_policy(self.policy, self.visit), observations, streams, selection, self.seed)

    def check(self, observation_space: ObservationSpace, action_space: ActionSpace) -> None:
        """Raise ValueError, in one line, unless an environment of these spaces suits the policy."""
        check_environment(_kept_policy(self.policy, self.visit), observation_space, action_space)


@dataclass(frozen=True)
class SamplerSettings:
    """What an action sampler needs to know beside its policy."""

    name: str = "sampler-0"
    seed: int = 0
    """Seed of the candidates."""
    max_batch: int = 32
    max_wait: float = 0.005
    patience: float = 120.0
    """Seconds after which a request is given up."""


class ActionSampler:
    """Hosts a policy; an ordinary class, to which `ray.remote` adds nothing but transport.

    Observations and decisions travel as the plain numpy arrays that they hold. What is chosen depends on the
    observation, its stream and the seed, and not on the batch, so a request may be repeated after a restart.
    """

    def __init__(self, policy: str, settings: SamplerSettings) -> None:
        dumpable()
        self.settings = settings
        self.bundle = load_policy(policy)
        self.telemetry = Telemetry(run_tag(policy), "sampler", split_label(settings.name)[1])
        self.batcher: Batcher[tuple[Observation, Stream], Decision] = Batcher(
            self._decide, settings.max_batch, settings.max_wait
        )

    @ray.method(concurrency_group="acting")
    def act(
        self, observations: Sequence[Observation], streams: Sequence[Stream], selection: SelectionConfig
    ) -> list[Decision]:
        """Return a decision per observation.

        Raises ValueError, in one line, for an observation that does not fit the policy, and Undecodable for
        one to which it has no action to offer; what else goes wrong is raised as `Failure`.
        """
        if len(observations) != len(streams):
            raise ValueError(
                f"{len(observations)} observations have {len(streams)} streams: give one stream each"
            )
        if not observations:
            return []
        self.bundle.prepare(observations)  # refuses a bad one before it meets others in a batch
        pairs = list(zip(observations, streams, strict=True))
        try:
            return self.batcher.submit(pairs, selection, self.settings.patience)
        except ValueError:  # about these observations, Undecodable included: the caller's to deal with
            raise
        except Exception as error:
            raise failure(error, self.settings.name) from error

    def statistics(self) -> BatchStatistics:
        """Return what has been asked since the last start."""
        return self.batcher.statistics()

    def pid(self) -> int:
        """Return the process id, by which a fault drill finds this sampler."""
        return os.getpid()

    def describe(self) -> dict[str, Any]:
        """Return the policy's spaces (as JSON-able dicts), its conditions, and what it was trained on."""
        return {
            "observation_space": self.bundle.observation_space.model_dump(mode="json"),
            "action_space": self.bundle.action_space.model_dump(mode="json"),
            "conditions": sorted(self.bundle.policy.conditions),
            "source": self.bundle.source,
            "fingerprint": self.bundle.tokenizer.statistics.fingerprint,
            "device": str(self.bundle.device),
        }

    def check(self, observation_space: ObservationSpace, action_space: ActionSpace) -> None:
        """Raise ValueError, in one line, unless an environment of these spaces suits the policy."""
        check_environment(self.bundle, observation_space, action_space)

    def _decide(
        self, selection: SelectionConfig, asked: list[tuple[Observation, Stream]]
    ) -> Sequence[Decision]:
        from counterpoint.selection.choice import decide

        begun = time.perf_counter()
        observations, streams = [pair[0] for pair in asked], [pair[1] for pair in asked]
        decisions = decide(self.bundle, observations, streams, selection, self.settings.seed)
        self.telemetry.count("counterpoint_decisions_total", len(decisions))
        self.telemetry.count("counterpoint_decision_batches_total")
        self.telemetry.count("counterpoint_decision_seconds_total", time.perf_counter() - begun)
        return decisions


def check_environment(
    bundle: "PolicyBundle", observation_space: ObservationSpace, action_space: ActionSpace
) -> None:
    """Raise ValueError, in one line, unless an environment of these spaces suits the policy."""
    bundle.action_space.check_same(action_space, "the policy", "the environment")
    for camera, size in bundle.observation_space.cameras.items():
        theirs = observation_space.cameras.get(camera)
        if theirs is None:
            raise ValueError(
                f"the policy sees camera {camera!r}, the environment has only "
                f"{sorted(observation_space.cameras)}: use a policy that was trained for this environment"
            )
        if tuple(theirs) != tuple(size):
            raise ValueError(
                f"camera {camera!r}: the policy expects images of {list(size)}, the environment gives "
                f"{list(theirs)}: set the environment's image size as in training"
            )
    if bundle.observation_space.state and bundle.observation_space.state != observation_space.state:
        raise ValueError(
            f"the policy is told the state {bundle.observation_space.state}, the environment gives "
            f"{observation_space.state}: use a policy that was trained for this environment"
        )


def sampler_actor(callers: int) -> Any:
    """Return the actor class of a sampler that `callers` ask at once.

    Acting has threads of its own, one for every caller, so that their requests can meet in one batch;
    statistics answer on others.
    """
    threads: dict[str, Any] = {"concurrency_groups": {"acting": max(1, callers)}, "max_concurrency": 2}
    return ray.remote(max_restarts=-1, max_task_retries=0, **threads)(ActionSampler)


@dataclass(frozen=True)
class RemoteSamplers:
    """Chooses in sampler actors, and waits for one that is being restarted."""

    actors: tuple[Any, ...]
    action_space: ActionSpace
    """The policy's."""
    patience: float = 120.0
    """Seconds to wait for an answer, restarts included."""

    def act(
        self, observations: Sequence[Observation], streams: Sequence[Stream], selection: SelectionConfig,
        caller: int = 0,
    ) -> list[Decision]:  # fmt: skip
        """Return a decision per observation, from the sampler that serves this caller.

        Raises ValueError for an observation that the policy refuses; other errors, and a sampler that does
        not come back within `patience` seconds, are raised as they are.
        """
        actor = self.actors[caller % len(self.actors)]
        deadline = time.monotonic() + self.patience
        while True:
            left = max(1.0, deadline - time.monotonic())
            try:
                asked = actor.act.remote(list(observations), list(streams), selection)
                decisions: list[Decision] = get(asked, timeout=left, what="decisions of an action sampler")
                return decisions
            except Exception as error:
                if classify(error) != "infrastructure" or time.monotonic() + RETRY_S > deadline:
                    raise
            time.sleep(RETRY_S)

    def check(self, observation_space: ObservationSpace, action_space: ActionSpace) -> None:
        """Raise ValueError, in one line, unless an environment of these spaces suits the policy."""
        asked = self.actors[0].check.remote(observation_space, action_space)
        get(asked, timeout=self.patience, what="check of the policy")

    def statistics(self) -> BatchStatistics:
        """Return what all samplers have done since their last starts."""
        refs = {f"sampler-{i}": actor.statistics.remote() for i, actor in enumerate(self.actors)}
        answers = get(refs, timeout=self.patience, what="statistics of the samplers")
        return sum(answers.values(), BatchStatistics())
