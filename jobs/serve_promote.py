"""Changing which checkpoint a running service answers with: one step on, or one step back.

Only Serve's `user_config` changes, so that replicas stay up: each loads the new weights beside the old, asks
them one question, and swaps. A replica that refuses keeps the old ones and says why; then all go back.
"""

import copy
import logging
import time
from collections.abc import Mapping
from typing import Any

import requests

from actors.serving.application import ACTIONS, IMAGES, serve_config
from actors.serving.checkpoints import check, locate
from actors.serving.config import ServiceConfig
from actors.serving.messages import Kind
from cluster.serving import Serving, ServingError
from jobs.serve_settings import PromoteConfig, RollbackConfig, ServiceAddress

logger = logging.getLogger(__name__)

HOSTS: dict[str, Kind] = {IMAGES: "images", ACTIONS: "actions"}
LOOKS_PER_REPLICA = 4
"""Answers in a row that must agree: which replica gives one is chance."""
PAUSE_S = 0.2


def promote(config: PromoteConfig) -> dict[str, Any]:
    """Make a service answer with `checkpoint`; ValueError, and everything as before, if it cannot."""
    return change(config, config.model, config.checkpoint)


def rollback(config: RollbackConfig) -> dict[str, Any]:
    """Make a service answer with what it had before the last promotion."""
    return change(config, config.model, None)


def change(address: ServiceAddress, model: str | None, checkpoint: str | None) -> dict[str, Any]:
    """Point a model at `checkpoint`, or at its previous one for None, and see that all replicas follow."""
    serving = Serving(address.dashboard)
    before = current_config(serving, address.service)
    application = named(before, address.service)
    entry, deployment, name = find(application, model)
    target = checkpoint if checkpoint is not None else entry["previous"]
    if target is None:
        raise ValueError(f"model={name} has nothing to go back to: it was not promoted since it was deployed")
    if target == entry["checkpoint"]:
        raise ValueError(f"checkpoint={target} is what model={name} answers with already")
    version = check(locate(application["args"]["root"], target), HOSTS[deployment])
    after = copy.deepcopy(before)
    changed, _, _ = find(named(after, address.service), name)
    changed["previous"] = entry["checkpoint"] if checkpoint is not None else None
    changed["checkpoint"] = target
    serving.deploy(after)
    refusal = follow(serving, address, name, version, deployment)
    if refusal is not None:
        serving.deploy(before)
        serving.wait(address.service, address.timeout_s)
        raise ValueError(f"checkpoint={target} was refused, {entry['checkpoint']} stays: {refusal}")
    return {"model": name, "checkpoint": target, "version": version, "previous": entry["checkpoint"]}


def current_config(serving: Serving, service: str) -> dict[str, Any]:
    """Return the configuration that the cluster serves now, every application of it."""
    application = serving.application(service)
    if application.get("deployed_app_config") is None:
        raise ServingError(
            f"service={service} was not deployed by `jobs.serve CONFIG`: deploy it anew with that"
        )
    own = ServiceConfig.model_validate(application["deployed_app_config"]["args"])
    applications = [
        found["deployed_app_config"]
        for found in serving.details()["applications"].values()
        if found.get("deployed_app_config") is not None
    ]
    return serve_config(own) | {"applications": applications}


def named(config: Mapping[str, Any], service: str) -> dict[str, Any]:
    """Return the application `service` of a configuration."""
    return next(each for each in config["applications"] if each["name"] == service)


def find(application: Mapping[str, Any], model: str | None) -> tuple[dict[str, Any], str, str]:
    """Return a model's entry in `user_config`, its deployment's name and its own."""
    found = {
        name: (entry, deployment["name"])
        for deployment in application["deployments"]
        for name, entry in ((deployment.get("user_config") or {}).get("models") or {}).items()
    }
    if model is None and len(found) > 1:
        raise ValueError(f"model is not given: give one of {', '.join(found)}")
    name = model if model is not None else next(iter(found))
    if name not in found:
        raise ValueError(f"model={name} is not served: give one of {', '.join(found)}")
    return (*found[name], name)


def follow(
    serving: Serving, address: ServiceAddress, model: str, version: str, deployment: str
) -> str | None:
    """Wait until all replicas answer with `version`; return why not, if one has refused it."""
    application = serving.wait(address.service, address.timeout_s)
    replicas = len(application["deployments"][deployment]["replicas"])
    options = serving.details()["http_options"]
    host = "127.0.0.1" if options["host"] in ("0.0.0.0", "::") else options["host"]
    deadline, agreeing, said = time.monotonic() + address.timeout_s, 0, ""
    while time.monotonic() < deadline:
        answer = requests.get(f"http://{host}:{options['port']}/readyz", timeout=30.0).json()
        told = answer.get("models", {}).get(model, {})
        if told.get("refused"):
            return str(told["refused"])
        said = str(told.get("version"))
        agreeing = agreeing + 1 if said == version else 0
        if agreeing >= LOOKS_PER_REPLICA * replicas:
            return None
        time.sleep(PAUSE_S if agreeing == 0 else 0.0)
    return f"after {address.timeout_s:g} s a replica still answers with {said} instead of {version}"
