"""A distillation across nodes goes on by itself, to the same weights, when a node with part of it is lost."""

import threading
from pathlib import Path

import pytest
from node_parts import HOST, TRAINER, WaitingStudent, actors_by_node, until
from test_training_ray import largest_difference, logged_steps, placed
from tiny_jobs import CRITICS, distill_config

from cluster.checkpoints import latest_checkpoint
from cluster.reserve import PlacementError
from cluster.storage import RunStore
from jobs import distill

NODES = ({"num_cpus": 2, "num_gpus": 1},) * 3
"""Each has room for a trainer, a critic host, or one of each; two of the nodes hold the whole cast."""


def spread(run, teacher, **trainer):
    """Two trainers on two nodes and two critic hosts on two: at least one node holds one of each."""
    return distill_config(
        run, teacher, critics=CRITICS | {"actors": 2, "gpus_per_actor": 0.6, "snapshot_every": 4},
        trainer={
            "workers": 2, "cpus_per_worker": 1.5, "gpus_per_worker": 0.4, "threads": 1, "checkpoint_every": 5,
            **trainer,
        },
    )  # fmt: skip


class Job:
    """A distillation in a thread of this driver, whose student waits before step 12 for `release`."""

    def __init__(self, config):
        self.run, self.told, self.error = Path(config.run), {}, None
        self.thread = threading.Thread(target=self._work, args=(config,))
        self.thread.start()
        until(lambda: (self.run / "at-0").exists() or not self.thread.is_alive(), 400, "step 12")

    def _work(self, config):
        try:
            self.told = distill.main(config)
        except Exception as error:
            self.error = error

    def release(self, seconds):
        (self.run / "go").touch()
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the run hangs"


def lose_a_node(fake_cluster):
    """Remove a node that hosts critics and a trainer, as a crash does."""
    nodes = {node.node_id: node for node in fake_cluster.nodes if node in fake_cluster.cluster.worker_nodes}
    both = [id for id, classes in actors_by_node().items() if {HOST, TRAINER} <= set(classes)]
    fake_cluster.cluster.remove_node(nodes[both[0]], allow_graceful=False)


@pytest.mark.slow  # test_training_ray loses a trainer, test_panel_actors critics
def test_a_lost_node_with_critics_and_a_trainer_changes_no_weight(
    fake_cluster, tiny_teacher, tmp_path, monkeypatch
):
    undisturbed, run = str(tmp_path / "undisturbed"), str(tmp_path / "run")
    expected = distill.main(spread(undisturbed, tiny_teacher))
    monkeypatch.setattr(distill, "StudentRecipe", WaitingStudent)
    job = Job(spread(run, tiny_teacher))
    lose_a_node(fake_cluster)
    job.release(400)
    assert job.error is None
    assert largest_difference(run, undisturbed) == 0
    assert logged_steps(run) == logged_steps(undisturbed) == list(range(1, 18))
    assert job.told["student_1_fd"] == expected["student_1_fd"]
    assert placed() == 0


@pytest.mark.slow
def test_a_run_whose_room_is_lost_for_good_ends_and_says_so(
    fake_cluster, tiny_teacher, tmp_path, monkeypatch
):
    """Runs after the test above, on the two nodes that it leaves."""
    monkeypatch.setattr(distill, "StudentRecipe", WaitingStudent)
    job = Job(spread(str(tmp_path / "run"), tiny_teacher, room_wait_s=1.0))
    lose_a_node(fake_cluster)
    job.release(400)
    assert isinstance(job.error, PlacementError)
    assert (
        "trainer.workers=2: pool trainer asks 2 times for 1.5 CPU, 0.4 GPU, and 1 fit"
        in job.error.in_one_line
    )
    assert latest_checkpoint(RunStore(str(job.run))).step == 10
    assert placed() == 0
