"""Policies in closed loops, over WebSockets, in the language of openpi's clients."""

import asyncio
import logging

from fastapi import APIRouter, WebSocket
from pydantic import ConfigDict, Field, ValidationError
from starlette.websockets import WebSocketDisconnect, WebSocketState

from actors.serving.actions_api import ModelField, Seed, policy_of
from actors.serving.complaints import complaint
from actors.serving.deadline import deadline_of
from actors.serving.door import Door
from actors.serving.error_responses import error_response
from actors.serving.errors import ApiError
from actors.serving.keys import REMEDY
from actors.serving.selecting import Selecting
from actors.serving.session import Session, ViolationError

logger = logging.getLogger(__name__)

SECRETS = ("key", "api_key", "apikey", "token", "access_token", "authorization")
"""Query parameters in which clients of other services send their keys."""
TRY_AGAIN_LATER, POLICY_VIOLATION, INTERNAL_ERROR = 1013, 1008, 1011
LONGEST_REASON = 120
"""Bytes of a close frame's reason; the protocol allows 123."""


class StreamParameters(Selecting):
    """The query of a WebSocket's address; what is left out is as the service's configuration says."""

    model_config = ConfigDict(strict=False)  # a query is all text

    model: ModelField | None = Field(None, examples=["blocks"])
    """Which policy; the service's first one by default."""
    seed: Seed | None = Field(None, examples=[7])
    """Of the first episode; drawn where missing, and told in the first frame."""
    return_candidates: bool = Field(False, examples=[False])
    """Whether answers hold all candidates and their confidences."""


def sessions_router(door: Door) -> APIRouter:
    """Return the WebSocket routes.

    openpi's clients connect to the root path and work unmodified; /v1/actions/stream is the same. Frames are
    MessagePack maps (see `frames`). The server sends the first one, of metadata; then each observation is
    answered by a frame of actions or, where it is at fault, by a text frame with the JSON of an error, after
    which the session goes on. An observation that arrives while a decision is under way replaces the one that
    waits, if one does: that is dropped without an answer of its own, and counted in the next.

    Beside the observation's parts (see `ObservationKeys`) a frame may hold `observation_id` (a number or
    text, returned), `reset: true` (a new episode begins: decisions count from 0), `seed` (of the episode;
    another one begins a new episode) and `num_candidates`.
    """
    router = APIRouter(tags=["actions"])
    room = asyncio.Semaphore(door.config.limits.max_sessions)

    async def serve(socket: WebSocket) -> None:
        """Hold a session."""
        try:
            session = await _opened(door, socket)
        except ApiError as error:
            await _deny(socket, error)
            return
        await socket.accept()
        if room.locked():
            most = door.config.limits.max_sessions
            await socket.close(TRY_AGAIN_LATER, f"{most} sessions are open, the most there may be: try later")
            return
        async with room:
            door.meters.session(+1)
            try:
                await _hold(session, socket)
            finally:
                door.meters.session(-1)

    router.add_api_websocket_route("/v1/actions/stream", serve)
    router.add_api_websocket_route("/", serve)
    return router


async def _opened(door: Door, socket: WebSocket) -> Session:
    """Check all that can be checked before a connection is accepted; raises ApiError."""
    given = socket.headers.getlist("authorization")
    if any(name.lower() in SECRETS for name in socket.query_params):
        raise ApiError("invalid_value", f"keys do not belong in addresses, which get logged: {REMEDY}")
    if len(given) > 1:
        raise ApiError("invalid_api_key", "the header Authorization is given twice: send one")
    authorization = given[0] if given else None
    door.keyring.admit(authorization)
    deadline_s = deadline_of(socket.headers, door.config.limits)
    try:
        parameters = StreamParameters.model_validate(dict(socket.query_params))
    except ValidationError as error:
        found = [{**one, "loc": ("query", *one["loc"])} for one in error.errors(include_url=False)]
        raise complaint(found) from error
    policy = await policy_of(door.backend, door.config, parameters.model)
    return Session(
        door, socket, policy, parameters, parameters.seed, parameters.return_candidates, deadline_s,
        authorization,
    )  # fmt: skip


async def _hold(session: Session, socket: WebSocket) -> None:
    """Run a session to its end, and tell the client if it is not the client who ended it."""
    try:
        await session.run()
    except WebSocketDisconnect:
        pass
    except ViolationError as violation:
        await _close(socket, violation.code, str(violation))
    except Exception:
        logger.exception("a session failed")
        await _close(socket, INTERNAL_ERROR, "the service has failed: connect again")
    else:
        await _close(socket, 1000, "")
    logger.info("session ended: %d decisions, %d dropped", session.decided, session.dropped)


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    if WebSocketState.DISCONNECTED in (socket.client_state, socket.application_state):
        return
    short = reason.encode()[:LONGEST_REASON].decode(errors="ignore")
    try:
        await socket.close(code, short)
    except (WebSocketDisconnect, RuntimeError):
        logger.debug("the client was gone before its session was closed")


async def _deny(socket: WebSocket, error: ApiError) -> None:
    """Refuse a connection with an HTTP answer, or, where the server cannot send one, by a plain 403."""
    if "websocket.http.response" not in socket.scope.get("extensions", {}):
        await socket.close(POLICY_VIOLATION)
        return
    request_id = getattr(socket.state, "request_id", "")
    headers = {"x-request-id": request_id} if request_id else {}
    await socket.send_denial_response(error_response(error, headers))
