"""Episodes a second with one rollout worker and with several, on the same seeds and policy, in one run."""

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from actors.batching import BatchStatistics
from actors.rollouts import RolloutJob, WorkersConfig
from actors.sampler import POLICY, Sampler, SamplersConfig
from cluster.connect import connected
from counterpoint.actions.config import TokenizerConfig, build_tokenizer
from counterpoint.environments.config import EnvironmentConfig, build_environment
from counterpoint.policies.bundle import PolicyBundle, new_bundle
from counterpoint.policies.compact import CompactConfig
from counterpoint.section import Section
from counterpoint.selection.config import SelectionConfig
from jobs.crew import Stage, crew_on_stage
from jobs.rollout_play import batches_of, difference
from jobs.run_names import RunUri

CHUNKS, MOST_WORDS = 64, 8


class RolloutBenchConfig(Section):
    """What is played, and by how many workers."""

    workers: tuple[int, ...] = Field(default=(1, 2), min_length=2)
    """Numbers of rollout workers; ratios are over the first."""
    episodes: int = Field(default=48, ge=1)
    """Episodes of each turn; all turns of a round have the same seeds."""
    rounds: int = Field(default=3, ge=1)
    """Rounds, in each of which all take turns; ratios are medians over rounds."""
    policy: RunUri | None = None
    """URI of a policy's run; none takes a compact policy with random weights."""
    network: CompactConfig = CompactConfig()
    """Network of the policy with random weights."""
    selection: SelectionConfig = SelectionConfig(rule="masked_condition", mask="text")
    """How actions are chosen."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """The environment."""
    environments: int = Field(default=8, ge=1)
    """Environments of each worker."""
    cpus_per_worker: float = Field(default=0.25, gt=0.0)
    """Logical CPUs reserved for each worker."""
    samplers: SamplersConfig = SamplersConfig(cpus_per_actor=0.25)
    """Where the policy runs; each number of workers has samplers of its own, at rest out of its turn."""


@dataclass(frozen=True)
class _Contender:
    stage: Stage
    sampler: Sampler

    def turn(self, config: RolloutBenchConfig, first_seed: int) -> tuple[float, BatchStatistics]:
        """Play a round's episodes; return how many a second, and what the samplers did for it."""
        job = RolloutJob(self.sampler, config.selection)
        before, begun = batches_of(self.sampler), time.perf_counter()
        haul = self.stage.crew.run(job, range(first_seed, first_seed + config.episodes), lambda _: None)
        speed = len(haul.results) / (time.perf_counter() - begun)
        return speed, difference(before, batches_of(self.sampler))


def main(config: RolloutBenchConfig) -> dict[str, Any]:
    """Return `ratio`: episodes a second with the last number of workers over the first; mean batch sizes."""
    speeds: dict[int, list[float]] = {count: [] for count in config.workers}
    work = dict.fromkeys(config.workers, BatchStatistics())
    with _contenders(config) as contenders:
        for contender in contenders.values():
            contender.turn(config.model_copy(update={"episodes": 2}), 0)
        for turn in range(config.rounds):
            for count, contender in contenders.items():
                speed, done = contender.turn(config, (turn + 1) * config.episodes)
                speeds[count].append(speed)
                work[count] += done
    first, last = config.workers[0], config.workers[-1]
    ratios = [b / a for a, b in zip(speeds[first], speeds[last], strict=True)]
    return {
        "episodes": config.episodes * config.rounds,
        **{f"episodes_per_second_{n}": round(statistics.median(each), 2) for n, each in speeds.items()},
        **{
            f"mean_batch_size_{n}": round(done.mean_batch_size, 2) if done.batches else None
            for n, done in work.items()
        },
        "ratio": round(statistics.median(ratios), 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def untrained_policy(environment: EnvironmentConfig, network: CompactConfig) -> PolicyBundle:
    """Return a compact policy with random weights for `environment`."""
    space = environment.action_space()
    shape = (CHUNKS, space.horizon, space.dimensions)
    chunks = np.random.default_rng(0).uniform(space.low, space.high, shape).astype(np.float32)
    tokenizer = build_tokenizer(TokenizerConfig(bins=32), chunks, "uniform noise")
    bundle = new_bundle(
        network,
        environment.observation_space(),
        space,
        tokenizer,
        environment.instructions,
        MOST_WORDS,
        chunks,
    )
    bundle.policy.eval()
    return bundle


@contextlib.contextmanager
def _contenders(config: RolloutBenchConfig) -> Iterator[dict[int, _Contender]]:
    """Have every number of workers up, with samplers."""
    build = functools.partial(build_environment, config.environment)
    with contextlib.ExitStack() as stack:
        uri = config.policy or stack.enter_context(tempfile.TemporaryDirectory())
        if config.policy is None:
            untrained_policy(config.environment, config.network).save(Path(uri) / POLICY)
        stack.enter_context(connected())
        found = {}
        for count in config.workers:
            workers = WorkersConfig(
                count=count, cpus_per_worker=config.cpus_per_worker, environments=config.environments
            )
            stage = stack.enter_context(crew_on_stage(build, workers, config.samplers))
            found[count] = _Contender(stage, stack.enter_context(stage.policy(uri)))
        yield found
