"""Estimate a model's statistics for DPM-Solver-v3: `python -m jobs.statistics model=runs/digits/teacher`.

A sampler then takes the file: `sampler: {scheduler: DPMSolverV3Scheduler, options: {statistics: URI}}`.
"""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

import ray
from pydantic import Field

from actors.recipe import load_unet
from actors.statistics import EstimationRecipe, Estimator
from cluster.connect import connected, thread_env
from cluster.failures import retrying
from cluster.placement import Pool, plan
from cluster.reserve import reserve
from cluster.storage import RunStore
from cluster.waiting import get
from counterpoint.diffusion import build_noise_scheduler
from counterpoint.section import Section
from counterpoint.solvers.empirical_statistics import FILE, ModelStatistics, load_statistics, save_statistics
from counterpoint.solvers.model_statistics import EstimationConfig, Sums, coefficients, describe
from jobs.config import run_job
from jobs.run_names import RunUri
from jobs.runs import open_run, read_config, write_results
from jobs.settings import TrainConfig

PLACEMENT_TIMEOUT = 25.0
PATIENCE = 24 * 3600.0
FREE = {"run", "resume", "workers"}


class EstimatorsConfig(Section):
    """The workers that estimate."""

    count: int = Field(default=1, ge=0)
    """Estimating workers, each with a shard of the samples; 0 estimates in this process, without Ray."""
    cpus_per_worker: float = Field(default=0.25, gt=0.0)
    """Logical CPUs reserved for each."""
    gpus_per_worker: float = Field(default=0.0, ge=0.0)
    """GPUs reserved for each."""


class StatisticsConfig(Section):
    """Estimate the statistics l, s, b of a model for DPM-Solver-v3."""

    run: RunUri = "runs/digits/statistics"
    """URI of this run's storage: a local path, s3://, gs:// or whatever fsspec knows."""
    model: RunUri = "runs/digits/teacher"
    """URI of a finished run of jobs.train."""
    resume: bool = False
    """Estimate anew for weights that have changed; without it a `run` that holds others is refused."""
    seed: int = 0
    """Seed of images, noise and probes."""
    estimation: EstimationConfig = EstimationConfig()
    """How."""
    workers: EstimatorsConfig = EstimatorsConfig()
    """By how many."""


def main(config: StatisticsConfig) -> dict[str, Any]:
    """Estimate, unless the run holds the statistics of these weights and settings; return their file."""
    model: TrainConfig = read_config(RunStore(config.model), TrainConfig)
    if model.noise.process != "diffusion":
        raise ValueError(
            f"model={config.model} was trained with noise.process={model.noise.process}, which DPM-Solver-v3 "
            "does not take: give a run with noise.process=diffusion"
        )
    made_for = describe(
        load_unet(config.model), build_noise_scheduler(model.noise), config.estimation, config.seed
    )
    name, store = file_name(made_for), RunStore(config.run)
    if store.exists(name):
        found = load_statistics(store.location(name))
        return headline(config, store, found, cached=True, seconds=0.0)
    store = open_run(config.run, config, config.resume, config.workers.count == 0, FREE)
    begun = time.monotonic()
    recipe = EstimationRecipe(config.model, model.data, model.noise, config.estimation, config.seed)
    statistics = coefficients(
        estimated(recipe, config.workers), build_noise_scheduler(model.noise), config.estimation, made_for
    )
    for target in (FILE, name):  # the name last: with it the statistics count as made
        with store.staged(target) as local:
            save_statistics(local, statistics)
    result = headline(config, store, statistics, cached=False, seconds=round(time.monotonic() - begun, 1))
    write_results(store, {"headline": result, "rows": [], "seconds": {"estimate": result["seconds"]}})
    return result


def file_name(made_for: dict[str, str]) -> str:
    """Return the name of the file of some weights and settings."""
    settings = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()[:12]
    return f"statistics-{made_for['weights']}-{settings}.safetensors"


def headline(
    config: StatisticsConfig, store: RunStore, statistics: ModelStatistics, cached: bool, seconds: float
) -> dict[str, Any]:
    """Return the figures of the result line; l should fall from about 1 in noise to about 0 in data."""
    return {
        "run": config.run, "statistics": store.location(FILE), "cached": cached, "seconds": seconds,
        "l_in_noise": float(statistics.l[0].mean()), "l_in_data": float(statistics.l[-1].mean()),
        "s_clipped": float((statistics.s.abs() >= config.estimation.clip).double().mean()),
    }  # fmt: skip


def estimated(recipe: EstimationRecipe, workers: EstimatorsConfig) -> Sums:
    """Return the sums over all samples, by workers or in this process; again, if a worker is lost."""
    if workers.count == 0:
        return Estimator(recipe).estimate(0, 1)

    def attempt() -> list[Sums]:
        with estimators(recipe, workers) as actors:
            refs = [actor.estimate.remote(i, len(actors)) for i, actor in enumerate(actors)]
            return get(refs, timeout=PATIENCE, what="statistics")

    with connected():
        return functools.reduce(Sums.merge, retrying(attempt, what="estimating statistics"))


@contextlib.contextmanager
def estimators(recipe: EstimationRecipe, workers: EstimatorsConfig) -> Iterator[list[Any]]:
    """Reserve and start the workers; leaving ends them."""
    pool = Pool(
        "estimators", workers.count, workers.cpus_per_worker, workers.gpus_per_worker, setting="workers.count"
    )
    options = {"max_restarts": -1, "max_task_retries": 2, "runtime_env": {"env_vars": thread_env(1)}}
    with reserve(plan([pool]), timeout=PLACEMENT_TIMEOUT) as places:
        yield [
            ray.remote(Estimator).options(**options, **places.options("estimators", i)).remote(recipe)
            for i in range(workers.count)
        ]


if __name__ == "__main__":
    run_job(main, StatisticsConfig)
