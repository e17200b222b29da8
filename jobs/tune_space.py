"""What a sweep tries: the values of each key, under which conditions, and whether the job takes them.

    space:
      adversarial.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}
      critics.refresh_rate: {uniform: [0.0, 0.2]}
      rules.1.selection.rule: {choice: [random, masked_condition]}
      rules.1.selection.mask: {choice: [text, state], when: {rules.1.selection.rule: masked_condition}}

A key may have several entries, of which the first holds whose conditions hold; where none does, the trial
does not set the key. A condition on a key of the space that the trial does not set does not hold.
"""

import copy
import importlib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from counterpoint.section import Section
from jobs.config_errors import ConfigError, describe, unknown_key
from jobs.config_fields import Field, fields_of, nearest, show
from jobs.config_source import assign, over_defaults
from jobs.tune_parameter import (
    Entry,
    Parameter,
    Space,
    candidates,
    cells,
    conditions_of,
    entries,
    holding,
    in_order,
    is_grid,
    is_number,
    meets,
)

__all__ = [
    "Entry",
    "Parameter",
    "Space",
    "cells",
    "check_schedules",
    "check_space",
    "job_config",
    "laid_over",
    "resolved",
    "schedule_field",
    "settled",
]

SET_BY_SWEEP = {
    "run": "each run has a folder of the sweep",
    "resume": "a trial goes on by itself",
    "seed": "objective.seeds says how many seeds a trial has",
}
MODELS = {
    "train": ("jobs.settings", "TrainConfig"),
    "train_policy": ("jobs.train_policy", "PolicyTrainConfig"),
    "distill": ("jobs.settings", "DistillConfig"),
    "distill_text": ("jobs.text_settings", "DistillTextConfig"),
    "evaluate": ("jobs.evaluate", "EvaluateConfig"),
    "rollout": ("jobs.rollout_settings", "RolloutConfig"),
}


def settled(space: Space, job: str, base: Mapping[str, Any]) -> dict[str, Parameter | tuple[Parameter, ...]]:
    """Return the space without conditions on keys outside it: the base says once and for all if they hold.

    Entries whose conditions never hold are left out, and keys that have no other.
    """
    fixed = resolved(job, base).model_dump(mode="json")
    found: dict[str, Parameter | tuple[Parameter, ...]] = {}
    for key in in_order(space):
        left = []
        for parameter in entries(space[key]):
            inside = {name: wish for name, wish in parameter.when.items() if name in space}
            outside = {name: wish for name, wish in parameter.when.items() if name not in space}
            met = all(meets(_value_at(fixed, name), wish) for name, wish in outside.items())
            if met and all(name in found for name in inside):
                left.append(parameter.model_copy(update={"when": inside}))
        if left:
            found[key] = left[0] if len(left) == 1 else tuple(left)
    return {key: found[key] for key in space if key in found}


def job_config(job: str) -> type[Section]:
    """Return the configuration model of a verb; `train` is that of a teacher, `train_policy` of a policy."""
    if job not in MODELS:
        raise ValueError(f"job = {job}; give one of {', '.join(MODELS)}")
    module, name = MODELS[job]
    found: type[Section] = getattr(importlib.import_module(module), name)
    return found


def laid_over(base: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy of `base` with the dotted keys of `params` set, sections before what is in them.

    A number in a key is a place in a list. Raises ConfigError where the base has no place for a key.
    """
    data = copy.deepcopy(dict(base))
    for key, value in sorted(params.items(), key=lambda item: item[0].count(".")):
        assign(data, key, copy.deepcopy(value))
    return data


def resolved(job: str, data: Mapping[str, Any]) -> Section:
    """Return the checked configuration of a verb; ConfigError, one line, if it is wrong."""
    model = job_config(job)
    whole = over_defaults(model, data)
    try:
        return model.model_validate(whole)
    except ValidationError as error:
        raise ConfigError(describe(error, whole, fields_of(model))) from None


def schedule_field(job: str, base: Mapping[str, Any], key: str) -> str:
    """Return the field that takes a schedule and is `key`, or that `key` lies in.

    Raises ValueError, one line, for a key of a field that takes no schedule, or within a schedule of which
    the base says nothing, so that a piece of it would have nothing to stand on.
    """
    fields = fields_of(job_config(job))
    scheduled = [name.removesuffix(".pieces") for name in fields if name.endswith(".pieces")]
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        field = ".".join(parts[:length])
        if _documented(f"{field}.pieces", fields) is None:
            continue
        if field != key and _value_at(dict(base), field) is None:
            raise ValueError(
                f"space.{key} lies in the schedule {field}, which the base leaves to its default: "
                f"write {field} in base"
            )
        return field
    known = ", ".join(name for name in scheduled if ".pieces." not in name)
    raise ValueError(
        f"space.{key} takes no schedule, so it cannot change in mid-run as pbt has it: sweep what does "
        f"({known or 'nothing in this job'}), or take another scheduler"
    )


def check_schedules(space: Space, job: str, base: Mapping[str, Any]) -> None:
    """Raise ValueError, one line, unless every key may change in mid-run and is a number without conditions.

    Population-based training perturbs the values of a run that goes on, which only schedules allow.
    """
    for key, entry in space.items():
        if not isinstance(entry, Parameter) or entry.when:
            raise ValueError(
                f"space.{key} has conditions, which pbt cannot perturb: give one entry without when"
            )
        odd = [value for value in entry.values if not is_number(value)]
        if odd:
            raise ValueError(
                f"space.{key}: pbt perturbs numbers, and {show(odd[0])} of {entry.kind} = "
                f"{show(entry.values)} is none; list numbers only"
            )
        schedule_field(job, base, key)


def check_space(space: Space, job: str, base: Mapping[str, Any]) -> None:
    """Raise ValueError, one line that names the key, unless the job takes all that the space can try.

    Each key is tried by itself over the base, with what its conditions ask for and what it brings along:
    both ends of a range and a value between, and every option. What the job refuses only together fails
    as a trial.
    """
    fields = fields_of(job_config(job))
    try:
        resolved(job, base)
    except ConfigError as error:
        raise ValueError(f"base: {error}") from None
    for key, entry in space.items():
        _check_key(key, entry, fields)
        for other in conditions_of(entry):
            _check_named(key, other, space, fields)
    in_order(space)
    for key, entry in space.items():
        _check_grid(key, entry, space)
    held = settled(space, job, base)
    if not held:
        raise ValueError(f"space.{next(iter(space))}: the base rules out its conditions; mend base or `when`")
    for key, entry in held.items():
        for parameter in entries(entry):
            _check_values(key, parameter, held, job, base)


def _check_key(key: str, entry: Parameter | tuple[Parameter, ...], fields: Mapping[str, Field]) -> None:
    said = f"space.{key}"
    if key in SET_BY_SWEEP:
        raise ValueError(f"{said}: the sweep sets {key} itself ({SET_BY_SWEEP[key]}); leave it out")
    if not _is_known(key, fields):
        raise ValueError(f"{said}: {unknown_key(key, entries(entry)[0].values, fields)}")


def _check_named(key: str, other: str, space: Space, fields: Mapping[str, Field]) -> None:
    """Raise ValueError unless a condition's key is in the space, or in the job and untouched by the space."""
    if other in space:
        return
    said = f"space.{key}: when names {other}"
    if not _is_known(other, fields):
        raise ValueError(
            f"{said}, which is neither in the space nor a key of the job; the nearest valid key is "
            f"{nearest(other, fields)}"
        )
    for swept in space:
        if f"{other}.".startswith(f"{swept}.") or f"{swept}.".startswith(f"{other}."):
            raise ValueError(
                f"{said}, of which space.{swept} changes a part or the whole: name {swept} itself"
            )


def _check_grid(key: str, entry: Parameter | tuple[Parameter, ...], space: Space) -> None:
    """Raise ValueError unless a grid's cells depend on grids alone, as their number must be known before."""
    if not is_grid(entry):
        return
    if any(parameter.kind != "grid" for parameter in entries(entry)):
        raise ValueError(f"space.{key} mixes grid with drawn values: write all of its entries as grid")
    drawn = [name for name in conditions_of(entry) if name in space and not is_grid(space[name])]
    if drawn:
        raise ValueError(
            f"space.{key}: a grid cannot wait for {drawn[0]}, which is drawn: make {drawn[0]} a grid too, or "
            f"{key} a choice"
        )


def _check_values(key: str, parameter: Parameter, space: Space, job: str, base: Mapping[str, Any]) -> None:
    around = _asked_for(key, parameter, space)
    for value in parameter.samples():
        others = _brought_along(space, around | {key: value})
        try:
            resolved(job, laid_over(base, {**others, key: value}))
        except ValueError as error:
            beside = "".join(f", with {name} = {show(other)}" for name, other in others.items())
            raise ValueError(
                f"space.{key}: the job refuses {show(value)} of {parameter.kind} = {show(parameter.values)}"
                f"{beside}: {error}"
            ) from None


def _asked_for(key: str, parameter: Parameter, space: Space) -> dict[str, Any]:
    """Return values of other keys under which an entry's conditions hold.

    Raises ValueError, one line, for a condition that no value of the key it names can meet.
    """
    found: dict[str, Any] = {}
    for other, wish in parameter.when.items():
        for candidate in entries(space[other]):
            value = next((v for v in candidates(candidate, wish) if meets(v, wish)), None)
            if value is not None:
                found |= _asked_for(other, candidate, space) | {other: value}
                break
        else:
            raise ValueError(
                f"space.{key}: when {other} = {show(wish)} never holds, as space.{other} has "
                f"{' or '.join(f'{p.kind} = {show(p.values)}' for p in entries(space[other]))}; mend one"
            )
    return found


def _brought_along(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return all but the last of `params`, with a value of each key whose conditions they meet."""
    found = dict(params)
    for key in in_order(space):
        held = holding(space[key], found)
        if key not in found and held is not None and held[1].when:
            found[key] = held[1].samples()[0]
    return {key: value for key, value in found.items() if key != list(params)[-1]}


def _is_known(key: str, fields: Mapping[str, Field]) -> bool:
    """Say whether a key is a field, or lies below one whose keys are the user's own."""
    if _documented(key, fields):
        return True
    parts = key.split(".")
    above = [".".join(parts[:length]) for length in range(1, len(parts))]
    return any(fields[name].is_open for name in above if name in fields)


def _documented(key: str, fields: Mapping[str, Field]) -> str | None:
    """Return the key under which a field is documented, where one in a list has <n> or <name>, if it is."""
    if key in fields:
        return key
    for known in fields:
        if "<" in known:
            form = re.escape(known).replace("<n>", r"\d+").replace("<name>", r"[^.]+")
            if re.fullmatch(form, key):
                return known
    return None


def _value_at(data: Any, key: str) -> Any:
    """Return the value at a dotted key of plain data; None where there is none."""
    for part in key.split("."):
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(data, list):
            data = data[int(part)] if part.isdecimal() and int(part) < len(data) else None
    return data
