"""Whether the service lives, whether it is ready, and what it has counted."""

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from actors.serving.backend import Backend
from actors.serving.door import Door
from actors.serving.error_responses import RESPONSES
from actors.serving.errors import ApiError

READY_S = 5.0
"""Seconds that the models have for a real question of the smallest size."""


def health_router(door: Door) -> APIRouter:
    """Return the routes /healthz and /readyz, which are open, and /metrics."""
    router = APIRouter(tags=["health"])
    under_way: set[asyncio.Task[dict[str, Any]]] = set()

    @router.get("/healthz", response_class=PlainTextResponse, summary="Is the process alive?")
    async def healthz() -> str:
        """Answer "OK" whatever the models are doing."""
        return "OK\n"

    @router.get("/readyz", summary="Can the models answer?", responses={503: RESPONSES[503]})
    async def readyz() -> dict[str, Any]:
        """Ask every deployment a real question of the smallest size; 503 unless all answer soon.

        Those who ask at the same time share the question: no key is needed here, so it must not add up.
        """
        if not under_way:
            task = asyncio.create_task(_readiness(door.backend))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        return await asyncio.shield(next(iter(under_way)))

    @router.get(
        "/metrics", response_class=PlainTextResponse, summary="Metrics for Prometheus",
        responses={401: RESPONSES[401], 429: RESPONSES[429]},
    )  # fmt: skip
    async def metrics() -> Response:
        """Return the metrics of the gateway replica that answers."""
        return Response(door.meters.render(), media_type=CONTENT_TYPE_LATEST)

    return router


async def _readiness(backend: Backend) -> dict[str, Any]:
    try:
        async with asyncio.timeout(READY_S):
            await backend.ready()
            models = await backend.models()
    except TimeoutError:
        text = f"the models have not answered within {READY_S:g} s: try again later"
        raise ApiError("unavailable", text) from None
    return {
        "status": "ready",
        "models": {model.name: {"version": model.version, "refused": model.refused} for model in models},
    }
