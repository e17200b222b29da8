"""One line for whatever is wrong with a configuration: the key, the value and what would be right."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from jobs.config_fields import Field, nearest, show


class ConfigError(ValueError):
    """A mistake in a configuration file or in an override; the message is one line for the user."""


def unknown_key(key: str, value: object, fields: Mapping[str, Field]) -> str:
    """Return the line for a key that does not exist."""
    return f"unknown key {key} = {show(value)}; the nearest valid key is {nearest(key, fields)}"


def describe(error: ValidationError, data: Mapping[str, Any], fields: Mapping[str, Field]) -> str:
    """Return one line on the first mistake pydantic found in `data`; unknown keys come before bad values."""
    by_key: dict[str, list[Any]] = {}
    for mistake in error.errors(include_url=False):
        by_key.setdefault(_key(mistake, data), []).append(mistake)
    strangers = [key for key, mistakes in by_key.items() if mistakes[0]["type"] == "extra_forbidden"]
    unknown = [key for key in strangers if key not in fields]
    misplaced = [key for key in by_key if key in strangers and key in fields]  # of another branch of a union
    key = (unknown or [key for key in by_key if key not in misplaced] or misplaced)[0]
    mistake = by_key[key][0]
    rest = len(by_key) - 1
    more = f" (and {rest} more)" if rest and not misplaced else ""
    if mistake["type"] == "extra_forbidden":
        return unknown_key(key, mistake["input"], fields) + more
    if mistake["type"] in ("missing", "union_tag_not_found"):
        return f"required key {nearest(key, fields)} is missing; set {key}=..." + more
    return _bad_value(key, by_key[key], fields) + more


def _bad_value(key: str, mistakes: Sequence[Any], fields: Mapping[str, Field]) -> str:
    first = mistakes[0]
    value = first["ctx"]["tag"] if first["type"] == "union_tag_invalid" else first["input"]
    wrong = " or ".join(dict.fromkeys(_reason(mistake) for mistake in mistakes))
    if first["type"] == "value_error" and isinstance(
        value, Mapping
    ):  # a rule between the fields of a section
        return f"{key}: {wrong}" if key else wrong
    return f"invalid {key} = {show(value)}: {wrong}; the nearest valid key is {nearest(key, fields)}"


def _reason(mistake: Mapping[str, Any]) -> str:
    if mistake["type"] == "union_tag_invalid":
        return f"expected one of {mistake['ctx']['expected_tags']}"
    message = " ".join(str(mistake["msg"]).removeprefix("Value error, ").split())
    return message[:1].lower() + message[1:] if mistake["type"] != "value_error" else message


def _key(mistake: Mapping[str, Any], data: object) -> str:
    """Return the dotted key of a mistake, without the names of union branches that pydantic adds to it."""
    parts: list[str] = []
    node = data
    for part in mistake["loc"]:
        if (isinstance(node, Mapping) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            parts.append(str(part))
            node = node[part]
    if mistake["type"] == "missing":
        parts.append(str(mistake["loc"][-1]))
    if mistake["type"].startswith("union_tag"):
        parts.append(mistake["ctx"]["discriminator"].strip("'()"))
    return ".".join(parts)
