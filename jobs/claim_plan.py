"""Which runs a claim takes: arms and the models under them, for each seed, named by what they compute."""

import hashlib
import importlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from counterpoint.section import Section
from jobs.claim import ClaimConfig, VariationConfig
from jobs.config_errors import ConfigError, describe
from jobs.config_fields import fields_of
from jobs.config_source import merged, over_defaults

ALONE: dict[str, dict[str, Any]] = {
    "trainer": {"workers": 0, "threads": 1},
    "critics": {"actors": 0},
    "evaluation": {"workers": 0},
    "workers": {"count": 0},
    "samplers": {"count": 0},
}
"""Sections by which a run takes one process on one core, as many of them go side by side."""


@dataclass(frozen=True)
class Run:
    """One run of a claim; plain values, as it crosses processes."""

    name: str
    """What it is, for people: arm or model, and seed."""
    job: str
    config: dict[str, Any]
    """The resolved configuration as JSON has it."""
    uri: str
    """Where its headline is kept, and all else if the job has storage of its own."""
    needs: tuple[str, ...] = ()
    """URIs of the runs that come before it."""


@dataclass(frozen=True)
class Plan:
    """All runs of a claim on one set of images."""

    models: tuple[Run, ...]
    arms: dict[tuple[str, int], Run]
    """By arm and seed."""

    @property
    def runs(self) -> list[Run]:
        """All different runs, those that others need first."""
        return list({run.uri: run for run in (*self.models, *self.arms.values())}.values())


def planned(claim: ClaimConfig, variations: tuple[VariationConfig, ...], root: str) -> Plan:
    """Return the runs of a claim under variations, below the URI `root`.

    A run's place is named by its job and a hash of all that its configuration sets, the places of the runs
    that it needs included, so that claims share what is the same. It is not named by the code: delete `root`
    to measure anew what a change of code may have changed. Raises ConfigError, one line, for a configuration
    that its job refuses.
    """
    seeds = next((v.seeds for v in reversed(variations) if v.seeds), claim.seeds)
    models: list[Run] = []
    arms: dict[tuple[str, int], Run] = {}
    for seed in seeds:
        made: dict[str, Run] = {}
        for name, model in claim.models.items():
            data = _under(model.config, *(v.models.get(name, {}) for v in variations))
            made[name] = _run(f"{name}, seed {seed}", model.job, data, seed, made, root)
        models += made.values()
        for name, arm in claim.arms.items():
            over = (x for v in variations for x in (v.config, v.arms.get(name, {})))
            data = _under(claim.base.config, arm.config, *over)
            arms[name, seed] = _run(f"{name}, seed {seed}", claim.base.job, data, seed, made, root)
    return Plan(tuple(models), arms)


def entry(job: str) -> tuple[Any, type[Section]]:
    """Return a verb's `main` and the model of the configuration that it takes.

    Raises ConfigError if there is no such verb.
    """
    try:
        main = importlib.import_module(f"jobs.{job}").main
        return main, typing.get_type_hints(main)["config"]
    except (ModuleNotFoundError, AttributeError, KeyError):
        raise ConfigError(
            f"job = {job} is no verb: give the name of a module of jobs with main(config)"
        ) from None


def _under(*layers: Mapping[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for layer in layers:
        whole = merged(whole, layer)
    return whole


def _run(name: str, job: str, data: Mapping[str, Any], seed: int, made: Mapping[str, Run], root: str) -> Run:
    model = entry(job)[1]
    fields = model.model_fields
    alone = {section: values for section, values in ALONE.items() if _has(fields, section, values)}
    whole = _filled(merged(alone, data), {key: run.uri for key, run in made.items()})
    if "seed" in fields:
        whole["seed"] = seed
    elif "evaluation" in fields:
        # What only draws images has the seed of their noise: the same for all arms, another for each seed.
        whole["evaluation"] = {**whole.get("evaluation", {}), "seed": 1234 + seed}
    own_storage = "resume" in fields
    if own_storage:
        whole.pop("run", None)
    whole = over_defaults(model, whole)
    try:
        checked = model.model_validate(whole)
    except ValidationError as error:
        raise ConfigError(f"{name}: {describe(error, whole, fields_of(model))}") from None
    # Defaults are left out, so that a run is still the same once its job has another field.
    told = checked.model_dump(mode="json", exclude_defaults=True, exclude={"run"} if own_storage else None)
    text = json.dumps(told, sort_keys=True)
    uri = f"{root.rstrip('/')}/{job}-{hashlib.sha256(f'{job} {text}'.encode()).hexdigest()[:12]}"
    config = checked.model_dump(mode="json") | ({"run": uri} if own_storage else {})
    return Run(name, job, config, uri, tuple(run.uri for run in made.values() if run.uri in text))


def _has(fields: Mapping[str, Any], section: str, values: Mapping[str, Any]) -> bool:
    """Whether a job has a section with all those keys."""
    annotation = fields[section].annotation if section in fields else None
    return set(values) <= set(getattr(annotation, "model_fields", {}))


def _filled(value: Any, uris: Mapping[str, str]) -> Any:
    """Return `value` with the URI of a model in place of its name in braces, in every text."""
    if isinstance(value, Mapping):
        return {key: _filled(item, uris) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(item, uris) for item in value]
    if isinstance(value, str):
        for name, uri in uris.items():
            value = value.replace(f"{{{name}}}", uri)
    return value
