"""Evaluation workers lag behind training and never stall it; what they find is what one process finds."""

import os
import signal
import time

import pytest
import ray
import torch
from tiny_jobs import train_config

from actors.evaluation import EvaluationPool, EvaluationRecipe, Evaluator
from actors.feature_space import stored_feature_network
from cluster.checkpoints import latest_checkpoint
from cluster.storage import RunStore
from cluster.waiting import get, ready
from counterpoint.data import load_data
from counterpoint.diffusion import build_noise_scheduler
from counterpoint.evaluation import EvaluationConfig
from counterpoint.sampling import build_sampler
from jobs.scoring import references, score


class SlowEvaluator(Evaluator):
    """Waits until a file is there, and can be found by its process."""

    def __init__(self, recipe, go):
        super().__init__(recipe)
        self.go = go

    def score(self, weights, shard, shards):
        while not self.go.exists():
            time.sleep(0.05)
        return super().score(weights, shard, shards)

    def pid(self):
        return os.getpid()


@pytest.fixture(scope="module")
def measured(tiny_teacher):
    """What is scored, the real images to compare with, and other weights than the run's own."""
    config = train_config(tiny_teacher)
    sampler = build_sampler(config.sampler, build_noise_scheduler(config.noise))
    scored = EvaluationConfig(samples=70)
    recipe = EvaluationRecipe(tiny_teacher, config.features, sampler, (1, 2), scored)
    network = stored_feature_network(RunStore(tiny_teacher), config.features)
    weights = latest_checkpoint(RunStore(tiny_teacher)).tensors("weights")
    other = {name: tensor * 1.05 for name, tensor in weights.items()}
    return recipe, references(load_data(config.data), network), other


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """The file that evaluators wait for."""
    return tmp_path_factory.mktemp("evaluators") / "go"


@pytest.fixture(scope="module")
def workers(ray_cluster, measured, go):
    actors = [ray.remote(SlowEvaluator).options(num_cpus=0.1).remote(measured[0], go) for _ in range(2)]
    ready({f"evaluator-{i}": a for i, a in enumerate(actors)}, timeout=400.0, what="evaluators")
    yield actors
    for actor in actors:
        ray.kill(actor)


def test_two_lagging_workers_find_what_one_process_finds(measured, workers, go):
    """Nothing here waits for them: what they wait for comes only afterwards."""
    recipe, real, weights = measured
    pool = EvaluationPool(workers, real["test"])
    pool.offer(5, weights)
    assert pool.poll() is None
    pool.offer(10, weights)
    assert pool.poll() is None
    assert pool.skipped == 1
    go.touch()
    row = pool.finish()
    assert row["step"] == 5
    assert row["preview"].shape == (50, 1, 8, 8)
    assert row["preview"].dtype.name == "uint8"
    expected = score(recipe, weights, real)["test"]
    for steps in ("steps_1", "steps_2"):
        assert row[steps].keys() == expected[steps].keys()
        for name, value in expected[steps].items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
            assert row[steps][name] == same, (steps, name)
    own = score(recipe, None, real)["test"]
    assert own["steps_1"]["fd"] != pytest.approx(expected["steps_1"]["fd"], rel=1e-3)
    assert pool.poll() is None
    assert pool.finish() is None


def test_a_killed_worker_costs_only_a_row(measured, workers, go):
    """Runs last: the workers are not restarted."""
    _, real, weights = measured
    go.unlink()
    pool = EvaluationPool(workers, real["test"])
    pid = get(workers[0].pid.remote(), timeout=240.0, what="pid")
    pool.offer(15, weights)
    os.kill(pid, signal.SIGKILL)
    go.touch()
    assert pool.finish() is None
    pool.offer(20, weights)
    assert pool.finish() is None


def test_without_workers_nothing_is_scored(measured):
    pool = EvaluationPool([], measured[1]["test"])
    pool.offer(1, {"weight": torch.zeros(1)})
    assert (pool.poll(), pool.finish(), pool.skipped) == (None, None, 0)
