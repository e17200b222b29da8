"""A teacher's learning curve: scored while it trains, the same after a stop, and what is read off it."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from tiny_jobs import train_config

from actors.feature_space import stored_feature_network
from cluster.checkpoints import latest_checkpoint
from cluster.metrics_log import read_metrics
from cluster.storage import RunStore
from counterpoint.data import load_data
from counterpoint.learning_curve import steps_to_reach
from jobs import launch, train
from jobs.runs import read_results
from jobs.scoring import references, score

EVERY = 6
CURVE: dict[str, Any] = {"evaluation": {"workers": 0, "samples": 80, "every": EVERY}, "steps": [1, 2]}
COUNTED = {"kind": "nearest", "candidates": 3}
PACED = {"clusters": 3, "max_stage_steps": 4}
TEACHER = {"steps": 12, "batch_size": 16, "pairing": COUNTED, "curriculum": PACED}


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A finished run with a curve of two points, and its headline."""
    run = tmp_path_factory.mktemp("curve")
    return str(run), train.main(train_config(run, target_fd=1e-3, teacher=TEACHER, **CURVE))


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Send this process the terminal's Ctrl-C once the loop has shown a step."""
    watch = launch.Shown.watch

    def arrange(step: int | None) -> None:
        def watched(self: Any, figures: dict[str, Any]) -> None:
            watch(self, figures)
            if figures.get("step") == step:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(launch.Shown, "watch", watched)

    return arrange


def table(run: str) -> list[dict[str, Any]]:
    return read_metrics(RunStore(run), "evaluations.jsonl")


def test_snapshots_are_scored_while_a_teacher_trains(curve: tuple[str, dict[str, Any]]) -> None:
    run, told = curve
    rows = table(run)
    assert [row["step"] for row in rows] == [EVERY, 12]
    assert rows[0]["steps_2"]["fd"] != rows[1]["steps_2"]["fd"]
    assert told["fd_halfway"] == rows[0]["steps_2"]["fd"]
    # The last snapshot is what the run ends with.
    assert rows[1]["steps_2"]["fd"] == pytest.approx(told["teacher_2_fd"], rel=1e-5)
    assert RunStore(run).exists(f"grids/step-{EVERY:08d}-1.png")


def test_a_target_out_of_reach_has_a_lower_bound(curve: tuple[str, dict[str, Any]]) -> None:
    assert curve[1]["steps_to_target"] == 12 + EVERY


def test_results_tell_what_pairing_and_curriculum_did(curve: tuple[str, dict[str, Any]]) -> None:
    results = read_results(RunStore(curve[0]))
    assert results["curriculum"]["stage_starts"] == {"0": 1, "1": 5, "2": 9}
    assert 0.9 < results["pairing"]["noise_norm"] < 1.0
    assert 0.0 < results["pairing"]["distance_drop"] < 0.2
    assert 0.0 < results["pairing"]["share_of_step"] < 1.0


def test_a_stopped_training_has_the_curve_of_the_unbroken_one(
    curve: tuple[str, dict[str, Any]], tmp_path: Path, interrupt_at: Any
) -> None:
    """Scoring draws nothing that training does, and a stage is gone on with where it stood."""
    config = {"target_fd": 1e-3, "teacher": TEACHER, **CURVE}
    interrupt_at(7)
    assert train.main(train_config(tmp_path, **config))["stopped_at_step"] == 7
    interrupt_at(None)
    train.main(train_config(tmp_path, resume=True, **config))
    assert table(str(tmp_path)) == table(curve[0])
    assert read_results(RunStore(str(tmp_path)))["headline"] == read_results(RunStore(curve[0]))["headline"]


def test_a_snapshot_is_scored_elsewhere_without_a_saved_network(curve: tuple[str, dict[str, Any]]) -> None:
    run, _ = curve
    config = train_config(Path(run), teacher=TEACHER, **CURVE)
    recipe = train.evaluation_recipe(config, train.teacher_recipe(config))
    network = stored_feature_network(RunStore(run), config.features)
    real = references(load_data(config.data), network)
    weights = latest_checkpoint(RunStore(run)).tensors("weights")
    found = score(cloudpickle.loads(cloudpickle.dumps(recipe)), weights, real)["test"]
    assert found["steps_2"]["fd"] == pytest.approx(table(run)[-1]["steps_2"]["fd"], rel=1e-6)


@pytest.mark.slow
def test_workers_beside_the_trainer_score_its_snapshots(ray_cluster: Any, tmp_path: Path) -> None:
    """They lag: how many rows there are is theirs to say."""
    evaluation = {"workers": 1, "samples": 80, "every": 4}
    trainer = {"workers": 1, "checkpoint_every": 6}
    config = train_config(tmp_path, steps=[1, 2], evaluation=evaluation, trainer=trainer)
    train.main(config)
    steps = [row["step"] for row in table(str(tmp_path))]
    assert set(steps) <= {4, 8, 12}
    assert steps


def test_a_curve_without_a_point_below_gives_what_it_is_told() -> None:
    assert steps_to_reach([(100, 4.0), (200, 2.0)], 1.0, 300) == 300
    assert steps_to_reach([], 1.0, 100) == 100


def test_between_points_the_logarithm_is_linear() -> None:
    curve = [(100, 8.0), (200, 2.0), (300, 5.0), (400, 0.5)]
    assert steps_to_reach(curve, 4.0, 999) == pytest.approx(150.0)
    assert steps_to_reach(curve, 2.0, 999) == 200
    assert steps_to_reach(curve, 1.0, 999) == pytest.approx(300 + 100 * math.log(5) / math.log(10))
    assert steps_to_reach(curve, 9.0, 999) == 100


def test_a_target_without_snapshots_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set evaluation\.every to the steps"):
        train_config(tmp_path, target_fd=2.0, evaluation={"every": 0})
