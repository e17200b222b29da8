"""Episodes by HTTP: POST /v1/episodes plays one in the service's simulator, and tells it as it happens."""

import contextlib
import json
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field
from starlette.types import Receive, Scope, Send

from actors.serving.deadline import deadline_of
from actors.serving.door import Door
from actors.serving.errors import ApiError
from actors.serving.messages import ModelInfo
from actors.serving.selecting import Selecting, selection_of

logger = logging.getLogger(__name__)

LARGEST_SEED = 2**63 - 1
LARGEST_DRAWN = 2**53
EVENT_LINES = "application/x-ndjson"


class EpisodeBody(Selecting):
    """An episode of a policy under a rule; null is the same as leaving a field out.

    Types are strict: neither "3" nor true is a number. Fields that are not listed are refused by name.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"selection": "mg-select", "num_candidates": 4, "seed": 7}]}
    )

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(None, examples=["blocks"])
    """Which policy, see GET /v1/models; the service's first by default."""
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = Field(None, examples=[7])
    """Of the episode: scene, instruction and all candidates follow from it. Drawn where missing, below 2^53
    so that every JSON reader keeps it exactly, and told in the first event."""


class EventLines(Response):
    """Sends events as they come, one JSON object a line; a client that hangs up ends them.

    The events are asked for in the task that answers the request, and in no other.
    """

    media_type = EVENT_LINES

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__()
        self.events = events
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # proxies shall not collect what is meant to be seen at once
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        async with contextlib.aclosing(self.events), anyio.create_task_group() as group:
            group.start_soon(_end_on_disconnect, receive, group.cancel_scope)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.events:
                line = json.dumps(event, allow_nan=False).encode() + b"\n"
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            group.cancel_scope.cancel()


def episodes_router(door: Door) -> APIRouter:
    """Return the route; what goes wrong before the first event is in the form of ApiError.

    Episodes do not count against `limits.max_queue`: they last long, and the simulator has a line of its own.
    """
    router = APIRouter(tags=["episodes"])

    @router.post(
        "/v1/episodes",
        status_code=200,  # FastAPI cannot read it off a class of ours
        response_class=EventLines,
        response_description="Events, one JSON object a line.",
    )
    async def play_episode(request: Request, body: EpisodeBody) -> Response:
        """Play an episode in the service's simulator.

        Each line is a JSON object: {"event": "start", "instruction", "seed", "max_steps", "action_space"};
        for each decision {"event": "decision", "step", "image" (PNG in base64), "chosen", "actions",
        "candidates" (null where undecodable), "confidences", "work"}; {"event": "end", "success", "outcome",
        "steps", "image"}; or {"event": "error", "error"} if it cannot go on. Hanging up ends the episode.
        """
        deadline_s = deadline_of(request.headers, door.config.limits)
        info = await _policy(door, body.model)
        request.state.model = info.name
        conditions = frozenset(info.details.get("conditions", ()))
        selection = selection_of(body, door.config.actions.selection, conditions, door.config.limits)
        seed = secrets.randbelow(LARGEST_DRAWN) if body.seed is None else body.seed
        events = door.backend.play(info.name, selection.model_dump(mode="json"), seed, deadline_s)
        first = await anext(events)
        return EventLines(_to_the_end(first, events))

    return router


async def _policy(door: Door, name: str | None) -> ModelInfo:
    if name is None:
        if not door.config.actions.models:
            raise ApiError("model_not_found", "no policy is served here: see GET /v1/models", "model")
        name = door.config.actions.models[0].name
    info = await door.backend.model(name)
    if info.kind != "actions":
        message = f"model={info.name!r} makes {info.kind}: give a policy, see GET /v1/models"
        raise ApiError("invalid_value", message, "model")
    return info


async def _to_the_end(
    first: dict[str, Any], events: AsyncIterator[dict[str, Any]]
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the events; an error becomes the last of them, as the answer has begun."""
    try:
        yield first
        async for event in events:
            yield event
    except ApiError as error:
        yield {"event": "error"} | error.body()
    except Exception:
        logger.exception("an episode failed")
        yield {"event": "error"} | ApiError("internal_error", "the episode failed: play it again").body()
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()


async def _end_on_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
