"""The catalogue of a configuration's fields by dotted key: for help, nearest keys and options."""

import difflib
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from counterpoint.schedules import SCHEDULES
from jobs.config_yaml import write_yaml

REQUIRED = "required"
_SCHEDULE_HELP = (
    "schedule: a number that changes with progress, 0 at the first step of its part and 1 after the last:",
    "    {kind: constant, value: 0.1}",
    "    {kind: linear, start: 0.1, end: 0.01}, and so cosine and exponential; begin: 0.2, until: 0.8",
    "    {kind: piecewise, pieces: [{at: 0.0, value: 0.1}, {at: 0.5, value: 0.01}]}; values may be schedules",
)


@dataclass(frozen=True)
class Field:
    """One documented key; in the key of a field inside a list or a mapping stands `<n>` or `<name>`."""

    key: str
    kind: str
    """Its type as a person writes it, such as `float` or `hinge | softplus`."""
    default: str
    """The default as YAML, or `required`; empty for a section."""
    description: str

    def __str__(self) -> str:
        stated = self.default if self.default in ("", REQUIRED) else f"default {self.default}"
        return f"{self.key} ({', '.join(filter(None, (self.kind, stated)))})"

    @property
    def is_open(self) -> bool:
        """Whether keys below this one are the user's own: those of a list or a mapping."""
        return bool(re.search(r"\b(list|tuple|set|dict|Mapping|Sequence|Any)\b", self.kind))


def fields_of(model: type[BaseModel]) -> dict[str, Field]:
    """Return every field of `model` and of the sections in it, in their order, by dotted key."""
    found: dict[str, Field] = {}
    for field in _walk(model, None, "", ()):
        known = found.get(field.key)
        if known and field.kind not in known.kind.split(" | "):  # one key in several sections of a union
            field = replace(known, kind=f"{known.kind} | {field.kind}")
        found[field.key] = field
    return found


def nearest(key: str, fields: Mapping[str, Field]) -> Field | None:
    """Return the field whose dotted key, or whose last part, is most like that of `key`, if any."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.95 * last)

    return fields[max(fields, key=likeness)] if fields else None


def help_text(model: type[BaseModel], program: str) -> str:
    """Return the usage and every field with its type, default and description."""
    lines = [f"usage: {program} [config.yaml] [key=value ...] [--key value ...]", ""]
    if model.__doc__:
        lines += [inspect.cleandoc(model.__doc__), ""]
    fields = fields_of(model)
    numbers = [key for key, field in fields.items() if "float | schedule" in field.kind]
    inside = ("", ".<n>")
    for field in fields.values():
        if any(field.key.startswith(f"{key}{part}.") for key in numbers for part in inside):
            continue  # said once, below
        default = f" = {field.default}" if field.default else ""
        lines.append(f"{field.key}: {field.kind}{default}")
        lines += [f"    {line}" for line in field.description.splitlines()]
    if numbers:
        lines += ["", *_SCHEDULE_HELP]
    return "\n".join(lines) + "\n"


def show(value: object, limit: int = 80) -> str:
    """Return `value` on one line, as YAML would have it, and not longer than `limit` characters."""
    if isinstance(value, str) and value:
        text = value
    else:
        plain = to_jsonable_python(value, inf_nan_mode="constants", fallback=repr)
        text = write_yaml(plain, flow=True)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def sections_in(annotation: Any, suffix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the sections that an annotation allows, with what stands between the field's key and theirs."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield suffix, annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            yield from sections_in(argument, suffix)
    elif origin is Annotated:
        yield from sections_in(arguments[0], suffix)
    elif origin in (list, tuple, set):
        yield from sections_in(arguments[0], suffix + ".<n>")
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield from sections_in(arguments[1], suffix + ".<name>")


def _walk(
    model: type[BaseModel], instance: BaseModel | None, prefix: str, above: tuple[type, ...]
) -> Iterator[Field]:
    for name, info in model.model_fields.items():
        default = (
            getattr(instance, name)
            if isinstance(instance, model)
            else info.get_default(call_default_factory=True, validated_data={})
        )
        key = prefix + name
        inner = list(sections_in(info.annotation))
        required = default is PydanticUndefined
        # A number that may be a schedule is no section: it is set as a whole, and has a plain default.
        is_section = any(suffix == "" and section not in SCHEDULES for suffix, section in inner)
        stated = REQUIRED if required else "" if isinstance(default, BaseModel) else show(default)
        yield Field(key, "section" if is_section else _kind(info.annotation), stated, info.description or "")
        for suffix, section in inner:
            if section not in above:
                below = default if isinstance(default, section) else None
                yield from _walk(section, below, f"{key}{suffix}.", (*above, model))


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in SCHEDULES:
        return "schedule"
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return " | ".join(show(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_kind(argument) for argument in arguments))
    if origin is not None:
        inner = ", ".join("..." if argument is ... else _kind(argument) for argument in arguments)
        return f"{origin.__name__}[{inner}]"
    if annotation is type(None):
        return "null"
    return str(getattr(annotation, "__name__", annotation))
