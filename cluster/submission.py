"""Ray Jobs by their REST interface: send a packed folder, follow the logs, learn how the job ended."""

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

logger = logging.getLogger(__name__)

DASHBOARD = "http://127.0.0.1:8265"
KNOCK_S, POLL_S, LOST_S = 5.0, 0.5, 60.0
NO_AGENT = "No available agent"
LOST_LOGS = (RuntimeError, aiohttp.ClientError, OSError)
"""What following the logs may end with while the job itself goes on."""

C = TypeVar("C")


class SubmissionError(ValueError):
    """A job could not be sent or followed: the user's to mend, in one line."""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    code: int | None
    """The entrypoint's own exit code; None if it was stopped or never began."""
    message: str
    """Ray's words on it."""


def authenticated(make: Callable[..., C], address: str) -> C:
    """Return a client of a dashboard; one that wants its token gets it, whatever RAY_AUTH_MODE says.

    Clusters that `ray.init` starts ask for it by default, but Ray gives it by itself only to those.

    Raises:
        AuthenticationError: if the token is missing or wrong.
    """
    try:
        return make(address)
    except AuthenticationError:
        token = cluster_token()
        if token is None:
            raise
        return make(address, headers={"Authorization": f"Bearer {token}"})


def cluster_token() -> str | None:
    """Return the cluster's token from where Ray itself looks for it; None if there is none."""
    given = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if given:
        return given
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`."""

    def __init__(self, address: str = "") -> None:
        """Connect; RAY_API_SERVER_ADDRESS or this machine's dashboard unless `address` is given.

        Raises SubmissionError, in one line, if nothing answers there or the token is missing or wrong.
        """
        self.address = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD).rstrip("/")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SubmissionError(
                f"address={self.address}: give the dashboard's, such as {DASHBOARD}; host:port without "
                "http:// is the control service, which takes no jobs"
            )
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=KNOCK_S).close()
            self.client = authenticated(JobSubmissionClient, self.address)
        except AuthenticationError as error:
            raise SubmissionError(
                f"address={self.address} wants its cluster's token (401, 403): set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH unless the token is in ~/.ray/auth_token"
            ) from error
        except (OSError, RuntimeError, ValueError, requests.RequestException) as error:
            raise SubmissionError(
                f"address={self.address}: no Ray dashboard answers ({type(error).__name__}): give the "
                "address that `ray start --head` has printed, and start it with --include-dashboard=true"
            ) from error

    def send(
        self, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str], wait_s: float
    ) -> str:
        """Submit a job and return its id, waiting for the agent that starts jobs for up to `wait_s` seconds.

        Right after `ray start` there is none yet, and the dashboard answers 500. Raises SubmissionError.
        """
        deadline, told = time.monotonic() + wait_s, False
        while True:
            try:
                return self.client.submit_job(
                    entrypoint=entrypoint, runtime_env=dict(runtime_env), metadata=dict(metadata)
                )
            except (RuntimeError, requests.RequestException) as error:
                starting = NO_AGENT.lower() in str(error).lower()
                if not starting:
                    raise SubmissionError(
                        f"address={self.address} refused the job: {one_line(str(error))}"
                    ) from error
                if time.monotonic() > deadline:
                    raise SubmissionError(
                        f"address={self.address} has no agent that starts jobs, agent_wait_s={wait_s:g}: "
                        "wait longer, or move it off a port that another cluster of this machine uses (`ray "
                        "start --dashboard-agent-listen-port`)"
                    ) from error
                if not told:
                    logger.info("the cluster is starting: waiting for the agent that starts jobs")
                    told = True
                time.sleep(POLL_S)

    def follow(self, job: str, show: Callable[[str], None]) -> Ended:
        """Show a job's output from its beginning as it comes, and return how the job ended.

        A connection that breaks is made again, and nothing is shown twice. Raises SubmissionError if there is
        no such job or the dashboard is gone for longer than a minute.
        """
        shown, lost_at = 0, None

        async def tail() -> None:
            nonlocal shown, lost_at
            passed = 0
            async for text in self.client.tail_job_logs(job):
                new = text[max(0, shown - passed) :]
                passed += len(text)
                shown, lost_at = max(shown, passed), None
                if new:
                    show(new)

        self.state(job)
        while True:
            try:
                asyncio.run(tail())
                if ended := self.state(job):
                    return ended
            except LOST_LOGS as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > LOST_S:
                    raise SubmissionError(
                        f"address={self.address} sends no output of {job} any more: {one_line(str(error))}"
                    ) from error
            time.sleep(POLL_S)

    def state(self, job: str) -> Ended | None:
        """Return how a job ended, None while it has not. Raises SubmissionError if there is no such job."""
        for attempt in range(20):
            try:
                details = self.client.get_job_info(job)
                break
            except (RuntimeError, requests.RequestException) as error:
                if "does not exist" in str(error) or attempt == 19:
                    raise SubmissionError(
                        f"job={job} is not known at {self.address}: {one_line(str(error))}"
                    ) from error
                time.sleep(POLL_S)
        if not JobStatus(details.status).is_terminal():
            return None
        return Ended(str(JobStatus(details.status)), details.driver_exit_code, details.message or "")

    def stop(self, job: str) -> None:
        """Ask a job to stop, as `ray job stop` does."""
        self.client.stop_job(job)


def one_line(text: str) -> str:
    """Return what a dashboard's error says, without its traceback: the last line that names an error."""
    words = text.replace("\\n", "\n").strip()
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["unknown"])[-1].rstrip('."')


def last_result(lines: list[str]) -> dict[str, Any]:
    """Return the JSON object on the last of `lines` that holds one; empty if none does."""
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(found, dict):
                return found
    return {}
