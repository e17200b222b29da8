"""The jobs as scripts see them: one line of JSON at the end, one line of complaint, and Ctrl-C saves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_jobs import train_config

from cluster.checkpoints import latest_checkpoint
from cluster.storage import RunStore
from jobs import train
from jobs.config import dump_config

ROOT = Path(train.__file__).parent.parent


def start(module, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def config(tmp_path):
    """A YAML file of the tiny teacher, long enough to be interrupted."""
    tiny = train_config(tmp_path / "run", steps=[1], teacher={"steps": 80, "batch_size": 16})
    path = tmp_path / "teacher.yaml"
    path.write_text(dump_config(tiny))
    return path


@pytest.mark.slow  # test_mistakes has such lines without a process of their own
def test_unknown_key_ends_with_one_line_and_exit_code_2(config):
    job = start("jobs.train", config, "teacher.stepz=3")
    out, err = job.communicate(timeout=400)
    assert (job.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "teacher.stepz" in line
    assert "teacher.steps" in line


@pytest.mark.slow  # test_jobs stops and resumes jobs in the tests' own process
def test_interrupted_job_saves_and_goes_on(config, tmp_path):
    store = RunStore(str(tmp_path / "run"))
    job = start("jobs.train", config)
    deadline = time.monotonic() + 400
    while latest_checkpoint(store) is None or latest_checkpoint(store).step < 5:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=400)
    assert job.returncode == 0, err
    told = json.loads(out)
    at = told["stopped_at_step"]
    assert told == {"run": store.uri, "stopped_at_step": at, "go_on_with": "resume=true"}
    assert 5 <= at < 80
    assert latest_checkpoint(store).step == at
    assert "asked to stop: saving a checkpoint first" in err

    job = start("jobs.train", config, "--resume")
    out, err = job.communicate(timeout=400)
    assert job.returncode == 0, err
    (line,) = out.splitlines()
    told = json.loads(line)
    assert set(told) >= {"floor_fd", "teacher_1_fd", "report", "run", "seconds"}
    assert told["teacher_1_fd"] > 0
    assert f"resumed from step {at} (" in err

    whole = train_config(tmp_path / "whole", steps=[1], teacher={"steps": 80, "batch_size": 16})
    train.main(whole)
    expected = latest_checkpoint(RunStore(whole.run)).tensors("weights")
    found = latest_checkpoint(store).tensors("weights")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
