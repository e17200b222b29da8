"""Errors as HTTP answers: whatever goes wrong on whatever path, the body is that of `ApiError`."""

import json
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from actors.serving.complaints import complaint, shortened
from actors.serving.errors import ApiError, Code


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    """For people, in one line: the field, its value and the remedy."""
    type: str
    """invalid_request_error, rate_limit_error or server_error."""
    param: str | None
    """The field of the request that is at fault, if one is."""
    code: str
    """For programs."""


class ErrorBody(BaseModel):
    """The body of every answer that is no success; the form is that of OpenAI's API."""

    error: ErrorDetail


_MEANINGS = {
    400: "The request is malformed, or a value of it is not allowed.",
    401: "The key is missing or not known.",
    404: "There is no such model, or no such route.",
    413: "The body is too large.",
    429: "The key's rate is used up, or the service is full; the header Retry-After has the seconds to wait.",
    500: "A fault of the service; the header X-Request-Id finds it in the log.",
    503: "No replica is there to answer.",
    504: "The deadline has passed.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning} for status, meaning in _MEANINGS.items()
}
"""For `include_router(responses=...)`: documents the errors of its routes."""

_CODES: dict[int, Code] = {
    401: "invalid_api_key", 403: "invalid_api_key", 404: "not_found", 405: "method_not_allowed",
    413: "body_too_large", 429: "rate_limit_exceeded", 503: "unavailable", 504: "deadline_exceeded",
}  # fmt: skip


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    """Return the answer that tells a client of `error`; `headers` are added to those that belong to it."""
    own = dict(headers or {})
    if error.retry_after is not None:
        own["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        own["www-authenticate"] = "Bearer"
    # Pure ASCII, because a message may quote a lone surrogate, which UTF-8 cannot carry.
    content = json.dumps(error.body(), ensure_ascii=True).encode()
    return Response(content, error.status, own, media_type="application/json")


def answer_errors(app: FastAPI) -> None:
    """Let `app` answer ApiError, validation errors and HTTPException; others are `middleware.Record`'s."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(complaint(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what Starlette and FastAPI raise themselves; their texts are not in our form."""
    assert isinstance(error, HTTPException)
    status, headers = error.status_code, dict(error.headers or {})
    code = _CODES.get(status, "internal_error" if status >= 500 else "invalid_value")
    place = shortened(request.url.path)
    if code == "not_found":
        message = f"there is nothing at {place}: /openapi.json lists what there is"
    elif code == "method_not_allowed":
        allowed = headers.get("Allow", "the method that /openapi.json gives")
        message = f"{shortened(request.method)} is not allowed at {place}: use {allowed}"
    elif code == "invalid_value":
        message = "the body cannot be read: send a JSON object"
    else:
        message = f"the request ended with status {status}"
    return error_response(ApiError(code, message), headers)
