"""The deployment that speaks HTTP: it computes nothing, and asks those that host models."""

from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from actors.serving.app import create_app
from actors.serving.config import ServiceConfig
from actors.serving.priority import step_back
from actors.serving.remote import RemoteModels


class Gateway:
    """The ingress; `serve.ingress()` without an application asks it for one in every replica."""

    def __init__(
        self,
        config: ServiceConfig,
        images: DeploymentHandle[Any] | None,
        actions: DeploymentHandle[Any] | None,
        simulator: DeploymentHandle[Any] | None,
    ) -> None:
        step_back()
        self.config = config
        self.backend = RemoteModels(config, images, actions, simulator)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application."""
        return create_app(self.backend, self.config, behind_serve=True)
