"""Decisions by HTTP: POST /v1/actions."""

import asyncio
import secrets
import time

from fastapi import APIRouter, Request, Response

from actors.serving.actions_api import ActionsAnswer, ActionsBody, actions_answer, policy_of
from actors.serving.deadline import deadline_of
from actors.serving.door import Door
from actors.serving.error_responses import RESPONSES
from actors.serving.errors import ApiError
from actors.serving.images_routes import DEADLINE, LARGEST_DRAWN, WORK_HEADERS
from actors.serving.messages import ActionRequest
from actors.serving.observing import ObservationBody, observation_of
from actors.serving.selecting import check_defaults, selection_of
from actors.serving.timings import work_headers
from counterpoint.policies.observation import Observation, ObservationSpace
from counterpoint.selection.decision import Stream

INLINE_CHARACTERS = 2**16
"""Of images in base64 that are decoded at once on the event loop, in about 2 ms; more go to a thread."""


def actions_router(door: Door) -> APIRouter:
    """Return the route; what it raises is in the form of ApiError.

    Raises ValueError, in one line, if the configuration's defaults of the selection are unfit.
    """
    defaults, limits = door.config.actions.selection, door.config.limits
    check_defaults(defaults)
    router = APIRouter(tags=["actions"])
    headers = {
        name: {"description": text, "schema": {"type": kind}} for name, (text, kind) in WORK_HEADERS.items()
    }

    @router.post(
        "/v1/actions",
        response_model=ActionsAnswer,
        response_description="The chunk of actions, and all that it takes to ask for the same one again.",
        responses={**RESPONSES, 200: {"headers": headers}},
        openapi_extra={"parameters": [DEADLINE]},
    )
    async def choose_actions(request: Request, body: ActionsBody) -> Response:
        """Choose a chunk of actions for one observation.

        Nothing is kept from one request to the next: an episode is its seed and the decisions' indices. For
        closed loops at a robot's pace there is the WebSocket /v1/actions/stream.
        """
        begun = time.perf_counter()
        deadline_s = deadline_of(request.headers, limits)
        policy = await policy_of(door.backend, door.config, body.model)
        request.state.model = policy.info.name
        selection = selection_of(body, defaults, policy.conditions, limits)
        observation = await _observed(body.observation, policy.observation_space)
        seed = secrets.randbelow(LARGEST_DRAWN) if body.seed is None else body.seed
        asked = ActionRequest(policy.info.name, observation, selection, Stream(seed, body.decision or 0))
        with door.admission.enter("actions"):
            answer = await door.backend.act(asked, deadline_s)
        door.meters.work("actions", policy.info.name, answer.work)
        seconds = time.perf_counter() - begun
        told = actions_answer(asked, answer, policy.action_space, bool(body.return_candidates), seconds)
        return Response(told.model_dump_json(), 200, work_headers(answer.work), "application/json")

    return router


async def _observed(body: ObservationBody, space: ObservationSpace) -> Observation:
    size = sum(len(sent if isinstance(sent, str) else sent.data) for sent in body.images.values())
    try:
        if size <= INLINE_CHARACTERS:
            return observation_of(body, space)
        return await asyncio.to_thread(observation_of, body, space)
    except ValueError as error:
        raise ApiError("invalid_value", str(error), "observation") from error
