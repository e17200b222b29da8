"""Ray Serve by its REST interface, the one that `serve deploy` and KubeRay use: deploy, look, wait, end.

A change that only concerns `user_config` reaches running replicas in place; anything else replaces them.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import requests
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import AuthenticationError

from cluster.progress import duration
from cluster.submission import DASHBOARD, authenticated

logger = logging.getLogger(__name__)

POLL_S = 0.25
BAD = ("DEPLOY_FAILED", "UNHEALTHY")


class ServingError(ValueError):
    """Serve could not be reached, or cannot do what it was asked: the user's to mend, in one line."""


class Serving:
    """Serve on the cluster whose dashboard is at `address`."""

    def __init__(self, address: str | None = None) -> None:
        """Connect; RAY_API_SERVER_ADDRESS or this machine's dashboard unless `address` is given.

        Raises ServingError, in one line, if nothing answers there.
        """
        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD
        try:
            self.client = authenticated(ServeSubmissionClient, self.address)
        except AuthenticationError as error:
            raise ServingError(
                f"dashboard={self.address} wants its cluster's token: set RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH unless it is in ~/.ray/auth_token"
            ) from error
        except (ConnectionError, RuntimeError, ValueError, requests.RequestException) as error:
            raise ServingError(
                f"dashboard={self.address}: no Ray dashboard answers ({type(error).__name__}): give the "
                "address that `jobs.serve` or `ray start` has printed"
            ) from error

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Make `config` what the cluster serves; returns before it does. Raises ServingError if refused."""
        try:
            self.client.deploy_applications(dict(config))
        except (RuntimeError, requests.RequestException) as error:
            raise ServingError(f"Serve refused the configuration: {last_line(str(error))}") from error

    def details(self) -> dict[str, Any]:
        """Return what Serve says of itself and its applications."""
        try:
            return self.client.get_serve_details()
        except (RuntimeError, requests.RequestException) as error:
            raise ServingError(
                f"dashboard={self.address} does not answer: {last_line(str(error))}"
            ) from error

    def application(self, name: str) -> dict[str, Any]:
        """Return one application's part of `details`; ServingError names those there are."""
        applications = self.details()["applications"]
        if name not in applications:
            raise ServingError(
                f"service={name} is not deployed: {', '.join(applications) or 'nothing'} is; start it with "
                "`python -m jobs.serve CONFIG`"
            )
        found: dict[str, Any] = applications[name]
        return found

    def wait(self, name: str, timeout: float) -> dict[str, Any]:
        """Return the application's details once it runs as last configured.

        Raises ServingError with Serve's own reason if it cannot, or after `timeout` seconds.
        """
        begun, said = time.monotonic(), ""
        while True:
            found = self.application(name)
            status, message = found["status"], last_line(found.get("message") or "")
            if status == "RUNNING":
                return found
            if status in BAD:
                raise ServingError(f"service={name} failed: {reason(found)}")
            waited = time.monotonic() - begun
            if waited > timeout:
                raise ServingError(f"service={name} is {status} after {duration(waited)}: {reason(found)}")
            if states(found) != said:
                said = states(found)
                logger.info("%s: %s%s", name, said, f" ({message})" if message else "")
            time.sleep(POLL_S)

    def end(self) -> None:
        """Delete everything that is served."""
        self.client.delete_applications()


def states(application: Mapping[str, Any]) -> str:
    """Return each deployment's state and replicas in one line."""
    parts = []
    for name, deployment in application["deployments"].items():
        running = sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])
        parts.append(f"{name} {deployment['status'].lower()}, {running} of {len(deployment['replicas'])} up")
    return "; ".join(parts) or str(application["status"]).lower()


def reason(application: Mapping[str, Any]) -> str:
    """Return why an application does not run, in one line: a deployment's own error where there is one."""
    told = [deployment.get("message") or "" for deployment in application["deployments"].values()]
    return next(
        (line for line in map(last_line, (*told, application.get("message") or "")) if line), "unknown"
    )


def last_line(text: str) -> str:
    """Return the line of a traceback that says what went wrong: the last that names an error."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or [""])[-1]
