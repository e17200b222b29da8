"""Put trained models behind HTTP, and change what is served.

python -m jobs.serve CONFIG             deploy on RAY_ADDRESS's cluster, or on one started here until Ctrl-C
python -m jobs.serve CONFIG --check     check configuration and checkpoints, deploy nothing
python -m jobs.serve config CONFIG      write what `serve deploy` and KubeRay's RayService take
python -m jobs.serve promote CHECKPOINT swap a model's weights in place
python -m jobs.serve rollback           take the last promotion back
python -m jobs.serve key NAME           make a bearer token
python -m jobs.serve seal RUN           write the manifest of a run saved before there were any
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import requests
import yaml

from actors.serving.application import serve_config
from actors.serving.checkpoints import check, locate, seal_run
from actors.serving.config import ServiceConfig
from actors.serving.keys import new_token, openness
from actors.serving.messages import Kind
from actors.serving.proxy_headers import CALLBACK
from cluster.connect import Connection, connected
from cluster.serving import Serving, ServingError
from cluster.storage import RunStore
from counterpoint.section import Section
from jobs.config import run_job
from jobs.serve_promote import promote, rollback
from jobs.serve_settings import (
    KeyMakingConfig,
    ManifestConfig,
    PromoteConfig,
    RollbackConfig,
    SealConfig,
    ServeConfig,
)

logger = logging.getLogger(__name__)

SHIPPED = ("working_dir", "py_modules", "env_vars", "py_executable", "pip", "uv")
NOTICE_S = 0.5


def main(config: ServeConfig) -> dict[str, Any]:
    """Deploy; on a cluster that was started for it, stay until SIGINT or SIGTERM."""
    versions = check_all(config)
    if config.check:
        return {"service": config.name, "checked": True, **versions}
    # Answers are waited for: the service must not be the one to step back on a busy machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault(*CALLBACK)
    with connected(include_dashboard=True) as connection, stopping() as stop:
        return serve_on(connection, config, stop) | versions


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set; Ray must have started, as it sets handlers of its own."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {each: signal.signal(each, lambda *_: stop.set()) for each in signals}
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def serve_on(connection: Connection, config: ServeConfig, stop: threading.Event) -> dict[str, Any]:
    """Deploy on a connected cluster, and say when requests are answered."""
    if connection.started:
        check_port(config.host, config.port)
    serving = Serving(connection.dashboard)
    serving.deploy(serve_config(plain(config), shipped()))
    check_address(serving, config)
    serving.wait(config.name, config.timeout_s)
    url = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}"
    await_ready(url, config.timeout_s)
    sys.stderr.write(f"{openness(config)}\ndashboard: {serving.address}\nready: {url}\n")
    sys.stderr.flush()
    begun = time.monotonic()
    while connection.started and not stop.wait(NOTICE_S):
        pass
    return {
        "service": config.name, "url": url, "dashboard": serving.address,
        "served_s": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def plain(config: ServeConfig) -> ServiceConfig:
    """Return the service's own part of a configuration."""
    return ServiceConfig(**{name: getattr(config, name) for name in ServiceConfig.model_fields})


def check_all(config: ServeConfig) -> dict[str, str]:
    """Check the manifest of every named checkpoint; return the models' versions, ValueError if one is bad."""
    found = {}
    kinds: tuple[Kind, ...] = ("images", "actions")
    for kind in kinds:
        for i, model in enumerate(getattr(config, kind).models):
            try:
                found[model.name] = check(locate(config.root, model.checkpoint), kind)
            except ValueError as error:
                raise ValueError(f"{kind}.models[{i}].checkpoint: {error}") from error
    return found


def check_port(host: str, port: int) -> None:
    """Raise ValueError if something listens there already: Serve would only say so in a log."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port={port} on host={host} cannot be used ({error.strerror}): choose another"
            ) from error


def check_address(serving: Serving, config: ServeConfig) -> None:
    """Raise ServingError if Serve listens elsewhere already: it keeps its first address."""
    options = serving.details().get("http_options") or {}
    there = (options.get("host"), options.get("port"))
    if there != (config.host, config.port):
        raise ServingError(
            f"host={config.host} port={config.port}: Serve listens on {there[0]}:{there[1]} of this cluster "
            "already; use that address, or end it with `serve shutdown` first"
        )


def shipped() -> dict[str, Any]:
    """Return the part of this driver's runtime environment that replicas on other machines need."""
    environment = dict(ray.get_runtime_context().runtime_env)
    return {name: environment[name] for name in SHIPPED if environment.get(name)}


def await_ready(url: str, timeout: float) -> None:
    """Return once the service answers /readyz; ServingError after `timeout` seconds."""
    deadline, said = time.monotonic() + timeout, "nothing"
    while time.monotonic() < deadline:
        try:
            answer = requests.get(f"{url}/readyz", timeout=30.0)
            if answer.ok:
                return
            said = answer.text[:200]
        except requests.RequestException as error:
            said = type(error).__name__
        time.sleep(NOTICE_S)
    raise ServingError(f"{url}/readyz is not ready after {timeout:g} s: it answers {said}")


def write_manifest(config: ManifestConfig) -> dict[str, Any]:
    """Write Serve's own configuration file."""
    check_all(config)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(serve_config(plain(config)), sort_keys=False)
    RunStore(str(Path(config.out).absolute().parent)).write_text(Path(config.out).name, text)
    return {"out": config.out, "service": config.name}


def make_key(config: KeyMakingConfig) -> dict[str, Any]:
    """Make a token; it is shown this once, and only its hash is to be kept."""
    token, digest = new_token()
    entry: dict[str, Any] = {"name": config.name, "sha256": digest}
    if config.requests_per_minute is not None:
        entry["requests_per_minute"] = config.requests_per_minute
    sys.stderr.write(f"token (shown once): {token}\nput this into `keys` of the service's configuration:\n")
    return entry


def seal(config: SealConfig) -> dict[str, Any]:
    """Write the manifest that a run lacks, after loading what it would vouch for."""
    return {"run": config.run, **seal_run(config.run)}


VERBS: dict[str, tuple[Any, type[Section], str]] = {
    "config": (write_manifest, ManifestConfig, ""),
    "promote": (promote, PromoteConfig, "checkpoint"),
    "rollback": (rollback, RollbackConfig, ""),
    "key": (make_key, KeyMakingConfig, "name"),
    "seal": (seal, SealConfig, "run"),
}
"""What follows `jobs.serve`, with the field that a bare first argument is."""


def arguments(argv: Sequence[str]) -> tuple[Any, type[Section], list[str]]:
    """Return the function, its configuration's model and the remaining arguments that `argv` asks for."""
    if not argv or argv[0] not in VERBS:
        return main, ServeConfig, list(argv)
    function, model, field = VERBS[argv[0]]
    rest = list(argv[1:])
    if field and rest and "=" not in rest[0] and not rest[0].startswith("-"):
        rest[0] = f"{field}={rest[0]}"
    return function, model, rest


if __name__ == "__main__":
    chosen, configuration, remaining = arguments(sys.argv[1:])
    run_job(chosen, configuration, remaining)
