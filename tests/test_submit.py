"""A job submitted to a cluster that wants a token gets the directory, ends well and tells its figures."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_jobs import train_config

from jobs import train
from jobs.config import dump_config

ROOT = Path(train.__file__).parent.parent
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(token):
    """A user's environment with the virtual environment active, and a token that Ray asks for."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    path = os.pathsep.join([str(BIN), kept["PATH"]])
    told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | told | {"PATH": path, "OMP_NUM_THREADS": "1"}


@contextmanager
def head(token):
    """`ray start --head` on ports of its own; yields the dashboard's address."""
    port = free_port()
    files = tempfile.mkdtemp(prefix="ray-")
    options = {
        "port": free_port(), "dashboard-host": "127.0.0.1", "dashboard-port": port, "num-cpus": 2,
        "dashboard-agent-listen-port": free_port(), "node-ip-address": "127.0.0.1", "temp-dir": files,
        "include-dashboard": "true", "disable-usage-stats": None,
    }  # fmt: skip
    flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [str(BIN / "ray"), "start", "--head", "--block", *flags],
        env=environment(token),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await_dashboard(process, f"http://127.0.0.1:{port}", token)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            shutil.rmtree(files, ignore_errors=True)


def await_dashboard(process, address, token):
    deadline = time.monotonic() + 150
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    while True:
        try:
            urllib.request.urlopen(request, timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "no dashboard"
            time.sleep(0.3)


@pytest.mark.timeout(400)
def test_submitted_job_trains_from_the_directory_it_came_with(tmp_path):
    config = tmp_path / "teacher.yaml"
    config.write_text(dump_config(train_config(tmp_path / "run", steps=[1])))
    token = secrets.token_hex(16)
    with head(token) as address:
        submitted = subprocess.run(
            [
                str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".",
                "--runtime-env-json", json.dumps({"py_executable": sys.executable}),
                "--", "python", "-m", "jobs.train", str(config),
            ],
            cwd=ROOT, env=environment(token), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout
    (line,) = (line for line in submitted.stdout.splitlines() if line.startswith("{"))
    told = json.loads(line)
    assert told["run"] == str(tmp_path / "run")
    assert told["teacher_1_fd"] > 0
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert stored["headline"]["teacher_1_fd"] == told["teacher_1_fd"]
    assert not str(json.loads((tmp_path / "run" / "environment.json").read_text())["command"][0]).startswith(
        str(ROOT)
    )
