"""Where a configuration's values come from: YAML files that may extend one another, and arguments."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Discriminator

from counterpoint.schedules import FORMS
from jobs.config_errors import ConfigError, unknown_key
from jobs.config_fields import Field, sections_in, show
from jobs.config_yaml import read_yaml

_OVERRIDE = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)


def split_arguments(
    argv: Sequence[str], fields: Mapping[str, Field]
) -> tuple[Path | None, list[tuple[str, str]]]:
    """Return the configuration file in `argv`, if any, and the overrides as pairs of key and YAML text."""
    path: Path | None = None
    overrides: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--"):
            overrides.append(_option(argument, rest, fields))
        elif match := _OVERRIDE.fullmatch(argument):
            overrides.append((match.group(1), match.group(2)))
        elif path is None:
            path = Path(argument)
        else:
            raise ConfigError(
                f"argument {argument!r} is neither key=value nor the configuration file ({path})"
            )
    return path, overrides


def read_file(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping in the YAML file, laid over that of the file it `extends`, or raise ConfigError.

    A section may extend a file too, also one in a list: that file then describes the section.
    """
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"configuration file {path} is not valid YAML: {error}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"configuration file {path} must hold keys and values, not {show(data)}")
    return _extended(data, path, (*extended_by, path.resolve()))


def _extended(data: dict[str, Any], path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """Return a mapping of the file `path` laid over what it, or a section inside it, `extends`."""
    base = data.pop("extends", None)
    data = {key: _with_extended_sections(value, path, extended_by) for key, value in data.items()}
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"extends = {show(base)} in {path} must be the path of one file")
    other = path.parent / base
    if other.resolve() in extended_by:
        raise ConfigError(f"configuration file {other} extends itself through {path.name}")
    return merged(read_file(other, extended_by), data)


def _with_extended_sections(value: Any, path: Path, extended_by: tuple[Path, ...]) -> Any:
    if isinstance(value, list):
        return [_with_extended_sections(item, path, extended_by) for item in value]
    return _extended(value, path, extended_by) if isinstance(value, dict) else value


def override(data: dict[str, Any], key: str, text: str, fields: Mapping[str, Field]) -> None:
    """Set the dotted `key` in `data` to the YAML value in `text`, making sections on the way."""
    value = _parse(key, text, fields)
    parts = key.split(".")
    parents = (fields.get(".".join(parts[:length])) for length in range(1, len(parts)))
    if key not in fields and not any(parent and parent.is_open for parent in parents):
        raise ConfigError(unknown_key(key, value, fields))
    assign(data, key, value)


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in `data`, making sections on the way; ConfigError where it has no place."""
    parts = key.split(".")
    node: Any = data
    for depth, part in enumerate(parts[:-1], start=1):
        place = _place(node, part, f"{key} = {show(value)}", ".".join(parts[: depth - 1]))
        if isinstance(node, dict) and node.get(part) is None:
            if parts[depth].isdecimal():
                at = ".".join(parts[:depth])
                raise ConfigError(f"{key} = {show(value)}: {at} has its default; set the whole of {at}")
            node[part] = {}
        node = node[place]
    node[_place(node, parts[-1], f"{key} = {show(value)}", ".".join(parts[:-1]))] = value


def _place(node: Any, part: str, wish: str, at: str) -> Any:
    """Return `part` as an index into `node`; ConfigError where `node` cannot hold it."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(f"{wish}: {at} is {show(node)} and has no key {part}; set the whole of {at}")
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"{wish}: {at} is a list of {len(node)}, counted from 0, and has no {part}")
    return int(part)


def over_defaults(model: type[BaseModel] | BaseModel, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` with the keys that it leaves out of a section taken from its default in its parent.

    Without this, setting one key of a section would put its others back to the defaults of its class.
    """
    merged = dict(data)
    of_class = isinstance(model, type)
    for name, info in (model if isinstance(model, type) else type(model)).model_fields.items():
        default = info.default if of_class else getattr(model, name)
        given = data.get(name)
        if isinstance(given, dict):
            classes = [section for suffix, section in sections_in(info.annotation) if not suffix]
            tagged = [part for part in info.metadata if isinstance(part, Discriminator)]
            branch = tagged[0].discriminator if tagged else info.discriminator
            if isinstance(default, BaseModel) and _same_branch(branch, default, given):
                merged[name] = over_defaults(default, given)
            elif len(classes) == 1:
                merged[name] = over_defaults(classes[0], given)
        elif name not in data and not of_class:
            merged[name] = default
    return merged


def _same_branch(discriminator: object, default: BaseModel, given: Mapping[str, Any]) -> bool:
    if callable(discriminator):
        return bool(discriminator(default) == discriminator(given))
    if not isinstance(discriminator, str):
        return True
    branch = getattr(default, discriminator)
    return bool(given.get(discriminator, branch) == branch)


def _option(argument: str, rest: list[str], fields: Mapping[str, Field]) -> tuple[str, str]:
    name, equals, value = argument[2:].partition("=")
    key = name.replace("-", "_")
    if equals:
        return key, value
    field = fields.get(key)
    if field is None:
        raise ConfigError(unknown_key(key, rest[0] if rest else True, fields))
    if field.kind in ("bool", "bool | null"):
        return key, "true"
    values = [rest.pop(0)] if rest and not rest[0].startswith("--") else []
    if not values:
        raise ConfigError(f"option {argument} needs a value; the valid key is {field}")
    if field.is_open and not values[0].startswith(("[", "{")):
        while rest and not rest[0].startswith("--") and not _OVERRIDE.fullmatch(rest[0]):
            values.append(rest.pop(0))
        return key, f"[{', '.join(values)}]"
    return key, values[0]


def _parse(key: str, text: str, fields: Mapping[str, Field]) -> Any:
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text} is not valid YAML: {error}") from None
    wants_text = key in fields and fields[key].kind in ("str", "str | null", "Path", "Path | null")
    return text if wants_text and value is not None and not isinstance(value, str) else value


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `top` laid over it, section by section; a schedule of another form replaces."""
    whole = dict(base)
    for key, value in top.items():
        under = whole.get(key)
        if isinstance(under, dict) and isinstance(value, dict) and not _other_form(under, value):
            whole[key] = merged(under, value)
        else:
            whole[key] = value
    return whole


def _other_form(under: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    """Whether two schedules have different forms, of which one replaces the other as a whole."""
    forms = [form for form in (under.get("kind"), value.get("kind")) if form in FORMS]
    return len(set(forms)) == 2
