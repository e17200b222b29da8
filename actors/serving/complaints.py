"""What is wrong with a request, in one line: pydantic's findings in the words of `ApiError`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from actors.serving.errors import ApiError

LONGEST = 80
"""Characters of a client's value that a message repeats."""
_NATURES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (Mapping, "an object"),
    ((bytes, bytearray), "raw bytes"),
    ((str,), "a string"),
    ((list, tuple), "a list"),
    (bool, "a truth value"),
    ((int, float), "a number"),
    (type(None), "null"),
)


def shortened(value: Any) -> str:
    """Return a client's value, of any type, as one line of ASCII; long ones lose their end."""
    if isinstance(value, str):
        text = json.dumps(value[:LONGEST])
        return text if len(value) <= LONGEST and len(text) <= 2 * LONGEST else text[:LONGEST] + '..."'
    if isinstance(value, bool | float | None):
        return json.dumps(value)
    if isinstance(value, int):
        # Python refuses to write integers of thousands of digits.
        return str(value) if value.bit_length() <= 256 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return _nature(value)


def complaint(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return what to tell the client of pydantic's `errors`, of which the first speaks for all."""
    error = errors[0]
    place = [str(part) for part in error["loc"]]
    source, *fields = place
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "malformed")
        where = f" at character {fields[0]}" if fields else ""
        return ApiError("invalid_value", f"the body is not JSON ({reason}{where}): send a JSON object")
    if not fields:
        return ApiError("invalid_value", _of_the_whole(error, source))
    param = ".".join(fields)[:LONGEST]
    return ApiError("invalid_value", _sentence(error, _printable(param)), param)


def _of_the_whole(error: Mapping[str, Any], source: str) -> str:
    if error["type"] in ("value_error", "assertion_error"):
        return _reason(error)
    found = "empty" if error["type"] == "missing" else _nature(error.get("input"))
    return f"the {source} is {found}: send a JSON object"


def _sentence(error: Mapping[str, Any], param: str) -> str:
    if error["type"] == "missing":
        return f"{param} is missing: give it a value"
    if error["type"] == "extra_forbidden":
        return f"{param} is not a field that this request has: leave it out"
    reason = _reason(error)
    if error["type"] == "value_error" and reason.startswith(param):
        return reason  # the validator has said it all
    return f"{param}={shortened(error.get('input'))} is not allowed: {reason[:1].lower()}{reason[1:]}"


def _reason(error: Mapping[str, Any]) -> str:
    return _printable(str(error["msg"]).removeprefix("Value error, "), 4 * LONGEST)


def _printable(text: str, longest: int = LONGEST) -> str:
    return json.dumps(text[:longest])[1:-1] if not text[:longest].isprintable() else text[:longest]


def _nature(value: Any) -> str:
    for types, name in _NATURES:
        if isinstance(value, types):
            return name
    return "of an unknown type"
