"""The service's HTTP side: every route, and what all of them share."""

from typing import Any

from fastapi import FastAPI
from starlette.routing import Route

from actors.serving.actions_routes import actions_router
from actors.serving.admission import Admission
from actors.serving.backend import Backend
from actors.serving.config import ServiceConfig
from actors.serving.door import Door
from actors.serving.episodes_routes import episodes_router
from actors.serving.error_responses import RESPONSES, answer_errors
from actors.serving.health_routes import health_router
from actors.serving.images_routes import images_router
from actors.serving.keys import Keyring
from actors.serving.meters import Meters
from actors.serving.middleware import Gate, Record
from actors.serving.models_routes import models_router
from actors.serving.page_routes import page_router
from actors.serving.sessions import sessions_router

VERSION = "1.0.0"
"""Of the interface; the first number is the one in the paths."""
API = (images_router, models_router, actions_router, sessions_router, episodes_router)
"""Makers of the routers below /v1."""


def create_app(backend: Backend, config: ServiceConfig, behind_serve: bool = False) -> FastAPI:
    """Return the application that answers for the models of `backend`.

    Answers on all paths carry `x-request-id`; errors have the form of `ApiError.body`. Nothing is shared with
    other applications in the process. `behind_serve` says that Ray Serve's proxy lies before it, which gives
    requests their ids and adds them to the answers itself.
    """
    names = [model.name for model in config.images.models] + [model.name for model in config.actions.models]
    meters = Meters(names)
    door = Door(backend, config, meters, Keyring(config.keys), Admission(config.limits.max_queue, meters))
    app = _Application(
        title="Counterpoint",
        version=VERSION,
        description="Image generators and robot policies, with seeds.",
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
    )
    answer_errors(app)
    api = [make(door) for make in API]
    rest = [health_router(door), page_router(door)]
    for router in api:
        app.include_router(router, responses=RESPONSES)
    for router in rest:
        app.include_router(router)
    # The last one added is the outermost.
    app.add_middleware(Gate, keyring=door.keyring, limits=config.limits)
    routes = [route for router in (*api, *rest) for route in router.routes]
    endpoints = [route for route in routes if isinstance(route, Route)]
    app.add_middleware(Record, meters=meters, endpoints=endpoints, tell_id=not behind_serve)
    return app


class _Application(FastAPI):
    """FastAPI whose document tells of the key, and of errors in this service's form only."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            components = schema.setdefault("components", {})
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for name in ("HTTPValidationError", "ValidationError"):
                components.get("schemas", {}).pop(name, None)
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    _correct(operation["responses"])
                    if path.startswith("/v1/") or path == "/metrics":
                        operation["security"] = [{"key": []}, {}]
        return self.openapi_schema or {}


def _correct(responses: dict[str, Any]) -> None:
    """Leave out FastAPI's validation errors, and document errors as JSON where successes are not."""
    responses.pop("422", None)
    for status, response in responses.items():
        if int(status) >= 400:
            (content,) = response["content"].values()
            response["content"] = {"application/json": content}
