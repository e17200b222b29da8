"""A request's body: whole, of a bounded size, and JSON that no later step can stumble over."""

import asyncio

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import Message, Receive

from actors.serving.config import LimitsConfig
from actors.serving.errors import ApiError

MOST_MEMBERS = 10_000
"""Members of all objects of a body; unknown ones cost a thousand times their bytes to complain of."""
MOST_DIGITS = 18
"""Of a content-length."""


class ClientGoneError(Exception):
    """The client hung up before its request was complete."""


def has_body(method: str, headers: Headers) -> bool:
    """Whether to read a body; GET and HEAD have none unless their headers announce it."""
    announced = "content-length" in headers or "transfer-encoding" in headers
    return announced or method not in ("GET", "HEAD")


async def read_body(receive: Receive, headers: Headers, limits: LimitsConfig) -> bytes:
    """Return the whole body.

    Raises body_too_large as soon as the announced or the received bytes exceed `limits.max_body_bytes`,
    invalid_value for a content-length that is no number, deadline_exceeded if the body takes longer than
    `limits.deadline_s`, and ClientGoneError.
    """
    _check_length(headers, limits.max_body_bytes)
    pieces, size = [], 0
    try:
        async with asyncio.timeout(limits.deadline_s):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > limits.max_body_bytes:
                    raise _too_large(limits.max_body_bytes)
                more = message.get("more_body", False)
    except TimeoutError:
        text = f"the body did not arrive within {limits.deadline_s:g} s: send it faster, or less of it"
        raise ApiError("deadline_exceeded", text) from None
    return b"".join(pieces)


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body` in one piece, and then whatever `receive` gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def check_json(body: bytes, headers: Headers) -> None:
    """Raise invalid_value unless a body that is not empty is strict JSON in UTF-8, and says that it is.

    NaN, Infinity, lone surrogates, integers of thousands of digits and deep nesting are refused: Python's own
    parser takes some of them, and what comes after it stumbles. Asking for the content type keeps web pages
    of other origins out, which may send forms, but not JSON without asking first.
    """
    if not body:
        return
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError("invalid_value", "content-encoding is not supported: send the body as it is")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            "invalid_value", "content-type is not JSON: send the header content-type: application/json"
        )
    try:
        content = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise ApiError(
            "invalid_value", f"the body is not JSON ({error}): send a JSON object in UTF-8"
        ) from None
    if body.count(b":") > MOST_MEMBERS and _members(content) > MOST_MEMBERS:
        text = f"the body's objects have more than {MOST_MEMBERS} members: send only known fields"
        raise ApiError("invalid_value", text)


def _check_length(headers: Headers, limit: int) -> None:
    lengths = headers.getlist("content-length")
    if any(not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS) for text in lengths):
        raise ApiError("invalid_value", "content-length is no count of bytes: leave it to the HTTP library")
    if len({int(text) for text in lengths}) > 1:
        raise ApiError("invalid_value", "content-length is given twice, and differs: send one")
    if lengths and int(lengths[0]) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> ApiError:
    return ApiError("body_too_large", f"the body is larger than {limit} bytes: send less")


def _members(content: object) -> int:
    count, waiting = 0, [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            count += len(value)
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return count
