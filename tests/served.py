"""A service as a user starts it: `python -m jobs.serve CONFIG` in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
START_S = 480


@dataclass
class Service:
    """A running service."""

    url: str
    dashboard: str
    folder: Path
    """Its root."""
    process: subprocess.Popen[str]
    log: Path

    def replicas(self, deployment: str) -> dict[int, psutil.Process]:
        """Return the replicas of a deployment by process id."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        titled = [(process, _title(process)) for process in found]
        return {process.pid: process for process, title in titled if f":{deployment}" in title}

    def end(self) -> dict[str, Any]:
        """Stop it as Ctrl-C does and return its last line."""
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, self.log.read_text()[-2000:]
        told: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return told


@contextmanager
def serving(config: dict[str, Any], folder: Path) -> Iterator[Service]:
    """Serve `config` below `folder` on a free port; whatever is left of it at the end is killed."""
    port = free_port()
    path, log = folder / "serve.yaml", folder / "serve.log"
    path.write_text(yaml.safe_dump(config | {"port": port, "root": str(folder)}))
    # A cluster of its own, whose name for the token file is this test's: none is left in the home directory.
    own = {
        "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0",
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | own
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", str(path)],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    tree = [process.pid]
    try:
        said = _await(process, log)
        tree += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        with patch.dict(os.environ, RAY_AUTH_TOKEN_PATH=str(folder / ".ray" / "auth_token")):
            yield Service(f"http://127.0.0.1:{port}", said["dashboard"], folder, process, log)
    finally:
        for pid in tree:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    """Return a port that nobody listens on, outside of those that Ray's workers take."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(process: subprocess.Popen[str], log: Path) -> dict[str, str]:
    pause = threading.Event()
    for _ in range(4 * START_S):
        lines = [line.split(": ", 1) for line in log.read_text().splitlines() if ": " in line]
        said = dict(lines)
        if "ready" in said:
            return said
        assert process.poll() is None, log.read_text()[-3000:]
        pause.wait(0.25)
    raise AssertionError(log.read_text()[-3000:])


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""
