"""What the tests' workers are forked from: a fork is like a worker that has started by itself."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

FORKS = os.environ.get("COUNTERPOINT_FORKS", "")
pytestmark = pytest.mark.skipif(not FORKS, reason="workers start by themselves")


@ray.remote(num_cpus=0.1)
class Worker:
    def told(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(), "parent": psutil.Process(os.getppid()).cmdline(),
            "drawn": (random.random(), float(np.random.random())),  # noqa: NPY002 - what a user's code may do
            "mark": os.environ.get("MARK"), "loaded": "torch" in sys.modules,
        }  # fmt: skip


def test_workers_are_forks_with_surroundings_and_chance_of_their_own(ray_cluster: Any) -> None:
    workers = [Worker.remote(), Worker.options(runtime_env={"env_vars": {"MARK": "mine"}}).remote()]
    one, other = ray.get([worker.told.remote() for worker in workers], timeout=240)
    assert one["parent"][-1] == other["parent"][-1] == FORKS
    assert one["loaded"]
    assert (one["mark"], other["mark"]) == (None, "mine")
    assert one["drawn"][0] != other["drawn"][0]
    assert one["drawn"][1] != other["drawn"][1]
    os.kill(one["pid"], signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(workers[0].told.remote(), timeout=240)


def program(folder: Path, text: str) -> list[str]:
    """A command that is a fork, as its script is called like that of Ray's workers."""
    script = folder / "default_worker.py"
    script.write_text(text)
    return [sys.executable, str(script), "argument"]


def test_a_program_ends_as_its_fork_does(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1], os.getcwd(), 'torch' in sys.modules); sys.exit(7)"
    done = subprocess.run(program(tmp_path, code), capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert (done.returncode, done.stdout) == (7, f"argument {tmp_path} True\n")
    killed = subprocess.run(program(tmp_path, "import os; os.kill(os.getpid(), 9)"), timeout=240)
    assert killed.returncode == -signal.SIGKILL


def test_a_fork_dies_with_the_program_that_it_is(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    process = subprocess.Popen(program(tmp_path, code), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    fork = psutil.Process(int(process.stdout.readline()))
    assert fork.pid != process.pid
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while fork.is_running() and fork.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
