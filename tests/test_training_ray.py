"""Training in Ray Train workers is training in one process, whoever is killed, stopped or wrong."""

import os
import time

import pytest
import ray
import torch
from tiny_jobs import CRITICS, distill_config, train_config
from training_parts import MortalStudent, MortalTeacher, SlowTeacher, WrongTeacher

from actors.training import StopSignal, TrainerConfig, train_here, train_on_ray
from actors.worker import LoopSpec
from cluster.checkpoints import latest_checkpoint
from cluster.failures import classify
from cluster.metrics_log import MetricsLog
from cluster.reserve import PlacementError
from cluster.storage import RunStore
from counterpoint.strategies.config import StrategyConfig
from jobs import distill, stage
from jobs.runs import read_results

TWO = TrainerConfig(workers=2, threads=1, checkpoint_every=5)
STEPS = 24


def recipe(kind, run):
    c = train_config(run, teacher={"steps": STEPS, "batch_size": 16})
    return kind(c.data, c.unet, c.noise, c.teacher, c.seed)


def tensors(uri):
    newest = latest_checkpoint(RunStore(uri))
    return {f"{f}/{key}": value for f in newest.files for key, value in newest.tensors(f).items()}


def largest_difference(uri, expected):
    found, wanted = tensors(uri), tensors(expected)
    assert found.keys() == wanted.keys()
    return max(
        float((found[n].double() - wanted[n].double()).abs().max()) for n in wanted if wanted[n].numel()
    )


def logged_steps(uri):
    return [row["step"] for row in MetricsLog(RunStore(uri), tensorboard=False).read()]


@pytest.mark.slow  # the last test here stops two workers too, and what goes on is one process's training
def test_two_workers_stopped_and_resumed_train_what_one_process_does(ray_cluster, tmp_path):
    run, alone = str(tmp_path / "run"), str(tmp_path / "alone")
    spec = LoopSpec(run, recipe(SlowTeacher, run), checkpoint_every=5)
    wish = StopSignal()

    def watch(figures):
        wish.asked = wish.asked or figures.get("step", 0) >= 2

    stopped = train_on_ray(spec, TWO, watch, wish)
    assert (stopped.finished, stopped.started_at) == (False, 0)
    assert 2 <= stopped.steps < STEPS
    assert latest_checkpoint(RunStore(run)).step == stopped.steps
    ended = train_on_ray(spec, TWO, lambda figures: None, StopSignal())
    assert (ended.finished, ended.started_at, ended.steps) == (True, stopped.steps, STEPS)
    train_here(
        LoopSpec(alone, recipe(SlowTeacher, alone), checkpoint_every=5),
        TrainerConfig(workers=0, threads=1), lambda figures: None, StopSignal(),
    )  # fmt: skip
    assert largest_difference(run, alone) < 1e-5
    assert logged_steps(run) == list(range(1, STEPS + 1))


def test_a_mistake_in_the_code_is_raised_at_once(ray_cluster, tmp_path):
    run = str(tmp_path)
    with pytest.raises(Exception, match="step 3 cannot be taken") as caught:
        train_on_ray(LoopSpec(run, recipe(WrongTeacher, run)), TWO, lambda figures: None, StopSignal())
    assert classify(caught.value) == "code"
    assert len(list(tmp_path.glob("life-0-*"))) == 1
    assert latest_checkpoint(RunStore(run)).step == 0


def shared(run, teacher):
    """A student of two workers against two hosts of critics, watched by one evaluation worker."""
    return distill_config(
        run, teacher, critics=CRITICS | {"actors": 2, "snapshot_every": 4},
        trainer={"workers": 2, "threads": 1, "checkpoint_every": 10},
        evaluation={"workers": 1, "samples": 80, "every": 6},
    )  # fmt: skip


@pytest.mark.slow  # the last test here loses a trainer, test_panel_actors critics
def test_a_killed_trainer_goes_on_with_the_panel_of_its_checkpoint(
    ray_cluster, tiny_teacher, tiny_run, tmp_path, monkeypatch
):
    """Rank 1 dies when only the checkpoint before step 0 is there, then after one that has a taught panel."""
    undisturbed, run = str(tmp_path / "undisturbed"), str(tmp_path / "run")
    expected = distill.main(shared(undisturbed, tiny_teacher))
    assert largest_difference(undisturbed, tiny_run) < 1e-4
    monkeypatch.setattr(distill, "StudentRecipe", MortalStudent)
    told = distill.main(shared(run, tiny_teacher))
    assert sorted(path.name for path in tmp_path.glob("run/killed-at-*")) == ["killed-at-13", "killed-at-8"]
    assert largest_difference(run, undisturbed) == 0
    assert logged_steps(run) == logged_steps(undisturbed) == list(range(1, 18))
    figures = read_results(RunStore(undisturbed))["headline"]
    assert {name: told[name] for name in figures} == pytest.approx(figures, rel=1e-9)
    assert expected["student_1_fd"] == told["student_1_fd"]
    assert placed() == 0


def placed():
    """Placement groups that hold or want something."""
    groups = ray.util.placement_group_table().values()
    return sum(group["state"] != "REMOVED" for group in groups)


def test_a_panel_without_room_is_refused_with_what_it_asked_for(ray_cluster, tiny_teacher, tmp_path):
    config = distill_config(
        tmp_path / "run", tiny_teacher, critics=CRITICS | {"actors": 3, "cpus_per_actor": 100.0},
        trainer={"workers": 1, "threads": 1},
    )  # fmt: skip
    with pytest.raises(PlacementError) as caught:
        distill.main(config)
    told = str(caught.value)
    assert "critics.actors" in told
    assert "100" in told
    assert "4" in told
    assert placed() == 0


def test_a_panel_whose_room_others_hold_is_refused_once(ray_cluster, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "PLACEMENT_TIMEOUT", 2.0)
    others = ray.util.placement_group([{"CPU": 3.0}])
    try:
        assert others.wait(240)
        config = distill_config(
            tmp_path / "run", tiny_teacher, critics=CRITICS | {"actors": 4, "cpus_per_actor": 0.5},
            trainer={"workers": 1, "threads": 1},
        )  # fmt: skip
        with pytest.raises(PlacementError, match=r"critics\.actors"):
            distill.main(config)
    finally:
        ray.util.remove_placement_group(others)
    deadline = time.monotonic() + 240
    while placed():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_workers_use_the_threads_that_they_were_given(ray_cluster):
    assert TrainerConfig(workers=2, threads=3).torch_threads() == 3
    assert TrainerConfig(workers=10_000).torch_threads() == 1
    assert TrainerConfig(workers=0).torch_threads() == os.cpu_count()
    assert torch.get_num_threads() == 1


ZERO_3 = {"name": "deepspeed", "zero_stage": 3}


# test_strategies trains with ZeRO-3 in the quick tests, too
@pytest.mark.parametrize("sharded", [{"name": "fsdp"}, pytest.param(ZERO_3, marks=pytest.mark.slow)])
def test_what_two_workers_with_shards_began_one_of_ddp_ends_though_it_is_killed(
    ray_cluster, tmp_path, sharded
):
    run, alone = str(tmp_path / "run"), str(tmp_path / "alone")
    spec = LoopSpec(run, recipe(MortalTeacher, run), checkpoint_every=5)
    wish = StopSignal()

    def watch(figures):
        wish.asked = wish.asked or figures.get("step", 0) >= 2

    strategy = StrategyConfig(**sharded)
    stopped = train_on_ray(spec, TWO.model_copy(update={"strategy": strategy}), watch, wish)
    assert (stopped.finished, stopped.started_at) == (False, 0)
    begun = latest_checkpoint(RunStore(run))
    assert len(begun.files["optimizer"]) == 2
    assert begun.meta == {
        "samples": 16 * stopped.steps, "workers": 2, "strategy": strategy.in_words,
    }  # fmt: skip
    one = TrainerConfig(workers=1, threads=1, checkpoint_every=5)
    ended = train_on_ray(spec, one, lambda figures: None, StopSignal())
    assert (tmp_path / "run/killed").read_text() == str(stopped.steps)
    assert (ended.finished, ended.started_at, ended.steps) == (True, 20, STEPS)
    train_here(
        LoopSpec(alone, recipe(SlowTeacher, alone), checkpoint_every=5),
        TrainerConfig(workers=0, threads=1), lambda figures: None, StopSignal(),
    )  # fmt: skip
    assert largest_difference(run, alone) < 1e-4
    assert logged_steps(run) == list(range(1, STEPS + 1))
