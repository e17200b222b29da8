"""Whole distillations against replicated critics, in Ray Train workers: the student of one process."""

import os
import signal

import pytest
from test_jobs import checkpoint, logged_steps
from tiny_jobs import CRITICS, distill_config
from training_parts import CriticsStudent

from cluster.storage import RunStore
from jobs import distill, launch

STEPS = 17
TWO = {"workers": 2, "threads": 1, "checkpoint_every": 5}


def largest_difference(uri, expected):
    (found, step), (wanted, last) = checkpoint(uri), checkpoint(expected)
    assert (step, found.keys()) == (last, wanted.keys())
    return max(float((found[n].double() - w.double()).abs().max()) for n, w in wanted.items() if w.numel())


def interrupt_at(monkeypatch, step):
    """Send this process the terminal's Ctrl-C once the loop has shown a step."""
    watch = launch.Shown.watch

    def watched(self, figures):
        watch(self, figures)
        if figures.get("step") == step and figures.get("stage") != "pairs":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(launch.Shown, "watch", watched)


@pytest.mark.slow  # test_panel_actors asks ahead, test_panel_replicas loses a replica
def test_what_one_process_began_a_step_ahead_two_workers_end_with_replicas(
    ray_cluster, tiny_teacher, tmp_path, monkeypatch
):
    """Stopped with a verdict under way; then every share's critics are two actors, one of which is killed."""
    alone, run = str(tmp_path / "alone"), str(tmp_path / "run")
    ahead = {"heads_alone": 3, "steps": 8, "batch_size": 16, "staleness": 1}
    distill.main(distill_config(alone, tiny_teacher, adversarial=ahead))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 11)
        stopped = distill.main(distill_config(run, tiny_teacher, adversarial=ahead))
    assert stopped["stopped_at_step"] == 11
    assert "ahead/loss.00000000" in checkpoint(run)[0]
    monkeypatch.setattr(distill, "StudentRecipe", CriticsStudent)
    critics = CRITICS | {"actors": 2, "replicas": 2, "snapshot_every": 2}
    distill.main(
        distill_config(run, tiny_teacher, resume=True, adversarial=ahead, critics=critics, trainer=TWO)
    )
    assert largest_difference(run, alone) < 1e-4
    assert logged_steps(run) == list(range(1, STEPS + 1))
    named = [f"critics-{index}-replica-{replica}" for replica in (0, 1) for index in (0, 1)]
    assert RunStore(run).read_text("critics.txt").split() == named
    assert RunStore(run).exists("killed-at-13")


@pytest.mark.slow
def test_a_killed_replica_of_a_collective_group_costs_the_steps_since_the_checkpoint(
    ray_cluster, tiny_teacher, tmp_path, monkeypatch
):
    alone, run = str(tmp_path / "alone"), str(tmp_path / "run")
    one_level = CRITICS | {"noise_levels": [250], "levels_per_step": 1}
    distill.main(distill_config(alone, tiny_teacher, critics=one_level | {"actors": 0}))
    monkeypatch.setattr(distill, "StudentRecipe", CriticsStudent)
    critics = one_level | {"actors": 1, "replicas": 2, "transport": "gloo"}
    distill.main(distill_config(run, tiny_teacher, critics=critics, trainer=TWO))
    assert RunStore(run).exists("killed-at-13")
    assert largest_difference(run, alone) < 1e-4
    assert logged_steps(run) == list(range(1, STEPS + 1))
