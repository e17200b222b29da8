"""Separate machines, in network namespaces: one that holds critics and a trainer is killed or cut off."""

import json
import subprocess
import sys
import time

import pytest
from network_parts import machines, why_not
from node_parts import HOST, TRAINER, until
from test_nodes import spread
from test_training_ray import largest_difference, logged_steps

from jobs import distill
from jobs.config import dump_config

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason := why_not()), reason=reason)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("loss", ["kill", "unplug"])
def test_a_machine_lost_mid_run_changes_no_weight(loss, ray_cluster, tiny_teacher, tmp_path):
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    distill.main(alike(undisturbed, tiny_teacher))
    config = tmp_path / "student.yaml"
    config.write_text(dump_config(spread(run, tiny_teacher)))
    with machines(workers=3) as (head, *others), (tmp_path / "log").open("w") as log:
        job = head.start(
            sys.executable,
            "-m",
            "waiting_distill",
            str(config),
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=tmp_path,
        )
        until(lambda: (run / "at-0").exists() or job.poll() is not None, 240, "step 12")
        assert job.poll() is None, (tmp_path / "log").read_text()
        victim = next(machine for machine in others if {HOST, TRAINER} <= machine.actors())
        getattr(victim, loss)()
        lost = time.monotonic()
        (run / "go").touch()
        told = json.loads(job.communicate(timeout=400)[0].decode().strip().splitlines()[-1])
        sys.stderr.write(f"{loss}: ended {time.monotonic() - lost:.1f} s after the loss\n")
    assert job.returncode == 0
    assert told["run"] == str(run)
    assert largest_difference(str(run), str(undisturbed)) == 0
    assert logged_steps(str(run)) == list(range(1, 18))


def alike(run, teacher):
    """The same distillation by the same numbers of workers and hosts, on one machine without GPUs."""
    whole = spread(run, teacher)
    trainer = whole.trainer.model_copy(update={"gpus_per_worker": 0.0, "cpus_per_worker": 1.0})
    critics = whole.critics.model_copy(update={"gpus_per_actor": 0.0})
    return whole.model_copy(update={"trainer": trainer, "critics": critics})
