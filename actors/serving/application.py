"""The Serve application: deployments bound together, and the configuration that `serve deploy` takes."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from actors.serving.config import HostedConfig, ReplicasConfig, ServiceConfig
from actors.serving.gateway import Gateway
from actors.serving.host import ModelHost
from cluster.connect import thread_env

IMPORT_PATH = "actors.serving.application:build"
GATEWAY, IMAGES, ACTIONS, SIMULATOR = "Gateway", "ImageServer", "ActionServer", "Simulator"
GATEWAY_ROOM = 2
"""The gateway itself says 429 at `limits.max_queue`; Serve must let through what it is to refuse."""
HEALTH = {"health_check_period_s": 2.0, "health_check_timeout_s": 20.0}
"""A busy replica answers late, a dead one is known to Ray at once."""


def build(args: Mapping[str, Any]) -> Application:
    """Return the application of a `ServiceConfig` that is given as plain data."""
    config = ServiceConfig.model_validate(args)
    images = actions = simulator = None
    if config.images.models:
        from actors.serving.image_server import ImageServer

        images = _hosting(ImageServer, IMAGES, config.images).bind(config)
    if config.actions.models:
        from actors.serving.action_server import ActionServer

        actions = _hosting(ActionServer, ACTIONS, config.actions).bind(config)
    if config.simulator is not None:
        from actors.serving.stage_server import StageServer

        simulator = serve.deployment(name=SIMULATOR)(StageServer).bind(config, actions)
    return serve.deployment(name=GATEWAY)(serve.ingress()(Gateway)).bind(config, images, actions, simulator)


def serve_config(config: ServiceConfig, runtime_env: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what `serve deploy` takes as YAML, and KubeRay's RayService as `serveConfigV2`.

    Only `user_config` names the checkpoints in force, so that changing it changes weights and nothing else.
    """
    deployments = [_gateway(config)]
    for name, hosted in ((IMAGES, config.images), (ACTIONS, config.actions)):
        if hosted.models:
            models = {
                model.name: {"checkpoint": model.checkpoint, "previous": None} for model in hosted.models
            }
            deployments.append(_hosted(name, hosted, config) | {"user_config": {"models": models}})
    if config.simulator is not None:
        deployments.append(
            {
                "name": SIMULATOR,
                "num_replicas": 1,
                "max_ongoing_requests": 8,
                "ray_actor_options": {"num_cpus": config.simulator.cpus},
            }
        )
    application = {
        "name": config.name,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "runtime_env": dict(runtime_env or {}),
        "args": config.model_dump(mode="json"),
        "deployments": deployments,
    }
    return {
        "http_options": {"host": config.host, "port": config.port},
        "proxy_location": "EveryNode",
        "logging_config": {"enable_access_log": False},  # the gateway writes its own, with the key's name
        "applications": [application],
    }


def _gateway(config: ServiceConfig) -> dict[str, Any]:
    room = GATEWAY_ROOM * (config.limits.max_queue + config.limits.max_sessions)
    return {
        "name": GATEWAY,
        **_replicas(config.gateways),
        "max_ongoing_requests": room,
        "max_queued_requests": room,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        **HEALTH,
    }


def _hosted(name: str, hosted: HostedConfig, config: ServiceConfig) -> dict[str, Any]:
    return {
        "name": name,
        **_replicas(hosted.replicas),
        # Enough for the next batch to stand ready while one is computed; the rest may go to other replicas.
        "max_ongoing_requests": max(16, 4 * hosted.batching.max_batch),
        "max_queued_requests": config.limits.max_queue,
        "graceful_shutdown_timeout_s": config.limits.deadline_s,
        **HEALTH,
    }


def _replicas(replicas: ReplicasConfig) -> dict[str, Any]:
    options = {
        "ray_actor_options": {
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            "runtime_env": {"env_vars": thread_env(replicas.threads)},
        }
    }
    if replicas.most is None:
        return {"num_replicas": replicas.count, **options}
    scaling = {
        "min_replicas": replicas.count,
        "max_replicas": replicas.most,
        "target_ongoing_requests": replicas.target_ongoing,
    }
    return {"autoscaling_config": scaling, **options}


def _hosting(host: type[ModelHost[Any]], name: str, hosted: HostedConfig) -> Any:
    """Return the deployment of `host` that keeps `hosted.resident` models in memory."""
    multiplexed = serve.multiplexed(max_num_models_per_replica=hosted.resident)(host.slot)
    return serve.deployment(type(name, (host,), {"slot": multiplexed, "__doc__": host.__doc__}), name=name)
