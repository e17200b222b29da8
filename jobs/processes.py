"""Servers and loads as processes of their own, beside a job that compares or disturbs them."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from counterpoint.section import Section
from jobs.config import dump_config
from jobs.load import PATH, LoadConfig
from jobs.load_answers import Asked, decoded
from jobs.load_figures import read_zero

TAIL = 600
STOP_S, BEGIN_S, SLACK_S = 60.0, 120.0, 180.0
"""Seconds: to end in, to begin in, and beyond its length that a load may take to drain."""


def free_port() -> int:
    """Return a port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(threads: int, ray_address: str | None = None) -> dict[str, str]:
    """Return the environment of a process with so many threads of maths, at a Ray cluster or none."""
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return kept | counts | ({"RAY_ADDRESS": ray_address} if ray_address else {})


def module(name: str, config: Section, folder: Path) -> list[str]:
    """Return the command that runs job `name` on `config`, which is written to a file of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name.rpartition('.')[2]}-{time.monotonic_ns()}.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    return [sys.executable, "-m", name, str(file)]


@contextlib.contextmanager
def server(
    command: Sequence[str], url: str, log: Path, limit_s: float = 240.0, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a server for the length of a block, which begins when `url`/readyz answers with 200.

    Raises RuntimeError with the end of its log if it ends by itself or is not ready within `limit_s`.
    """
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=file, text=True, env=env) as process,
    ):
        try:
            _await_ready(process, url, log, limit_s)
            yield process
        finally:
            _stop(process)


def is_ready(url: str) -> bool:
    """Return whether `url`/readyz answers with 200 within five seconds."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, http.client.HTTPException):
        return False


def pictures(url: str, asked: Asked) -> np.ndarray:
    """Return the pictures uint8 [n,H,W] or [n,H,W,3] that the server makes for one request."""
    data = json.dumps(asked.body()).encode()
    request = urllib.request.Request(url + PATH, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60.0) as answer:
        body = json.load(answer)
    return np.stack([decoded(item["b64_json"]) for item in body["data"]])


def result_from(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Any:
    """Run a job and return the result in its last line.

    Raises RuntimeError with the end of its standard error if it fails, subprocess.TimeoutExpired after
    `limit_s`.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=env)
    return _result(command, done.returncode, done.stdout, done.stderr)


class Load:
    """A load under way in a process of its own; leaving the block ends it.

    Attributes:
        zero: when its measured part begins, in seconds of `time.monotonic()`.
    """

    def __init__(self, config: LoadConfig, out: Path, folder: Path) -> None:
        """Begin it, with every request's fate in `out`; RuntimeError if it does not."""
        out.unlink(missing_ok=True)
        self.limit = SLACK_S + config.warmup_s + config.seconds
        self.command = module("jobs.load", config.model_copy(update={"out": str(out)}), folder)
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(1)
        )
        until = time.monotonic() + BEGIN_S
        while (zero := read_zero(out)) is None:
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                raise RuntimeError(f"the load did not begin: {self.process.communicate()[1][-TAIL:]}")
            time.sleep(0.02)
        self.zero = zero

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def result(self) -> dict[str, Any]:
        """Wait for the load's end and return its figures; RuntimeError if it failed."""
        output, errors = self.process.communicate(timeout=self.limit)
        return _result(self.command, self.process.returncode, output, errors)


def run_load(config: LoadConfig, folder: Path) -> dict[str, Any]:
    """Put a load on from a process of its own and return its figures."""
    limit = SLACK_S + config.warmup_s + config.seconds
    told: dict[str, Any] = result_from(module("jobs.load", config, folder), limit, environment(1))
    return told


def _result(command: Sequence[str], code: int, output: str, errors: str) -> dict[str, Any]:
    """Return the result in the last line of a finished job's output; RuntimeError if it failed."""
    if code != 0 or not output.strip():
        raise RuntimeError(f"{' '.join(command[1:])} ended with code {code}: {errors[-TAIL:]}")
    return dict(json.loads(output.strip().splitlines()[-1]))


def _await_ready(process: subprocess.Popen[str], url: str, log: Path, limit_s: float) -> None:
    until = time.monotonic() + limit_s
    while not is_ready(url):
        if process.poll() is not None:
            end = log.read_text(encoding="utf-8")[-TAIL:]
            raise RuntimeError(f"the server ended with code {process.returncode} before it was ready: {end}")
        if time.monotonic() > until:
            end = log.read_text(encoding="utf-8")[-TAIL:]
            raise RuntimeError(f"the server at {url} was not ready within {limit_s:.0f} s: {end}")
        time.sleep(0.2)


def _stop(process: subprocess.Popen[str]) -> None:
    """End a server as Ctrl-C does; what is still there after a minute is killed, its children too."""
    if process.poll() is not None:
        return
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        for child in below:
            with contextlib.suppress(psutil.Error):
                child.kill()
