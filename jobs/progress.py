"""How far along training a step is, for each number of a configuration that may change over it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from counterpoint.schedules import FORMS, Scheduled, extremes, is_constant, progress_at, read_scheduled
from counterpoint.section import Section


class Part(NamedTuple):
    """The part of a run over which a number changes."""

    first: int
    """Step of the run at which its progress is 0."""
    steps: int
    """Steps until its progress is 1."""


def progress_of(config: Section | Mapping[str, Any], key: str, step: int) -> float:
    """Return the progress in [0,1] at which the run of `config` reads the field `key` in `step` (from 0).

    `config` is that of a job that trains, or what its config.yaml holds; `key` is dotted and may lead into a
    schedule. A piece of a schedule that begins at this progress begins in exactly this step: it is the number
    that training itself computes. Before its part of the run a field has progress 0, after it 1. Raises
    ValueError for a key whose number never changes.
    """
    part = part_of(config, key)
    return progress_at(step - part.first, part.steps)


def part_of(config: Section | Mapping[str, Any], key: str) -> Part:
    """Return the part of the run of `config` over which the field `key` may change; see `progress_of`."""
    plain = config.model_dump(mode="json") if isinstance(config, Section) else config
    for prefix, part in _parts(plain):
        if key == prefix or key.startswith(f"{prefix}."):
            return part
    raise ValueError(f"{key} does not change over training in this job: give it one number")


def schedules_in(config: Mapping[str, Any]) -> Iterator[tuple[str, Scheduled]]:
    """Yield the dotted key and the schedule of each number in `config` that changes over training."""
    for key, value in _leaves(config, ""):
        try:
            scheduled = read_scheduled(value)
        except ValidationError:
            continue
        if not is_constant(scheduled) and any(key.startswith(prefix) for prefix, _ in _parts(config)):
            yield key, scheduled


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    """Yield the sections whose numbers may change and their parts of the run, inner sections first."""
    warmup, adversarial = config.get("warmup"), config.get("adversarial")
    if isinstance(warmup, Mapping) and isinstance(adversarial, Mapping):
        steps, alone = adversarial["steps"], adversarial["heads_alone"]
        if extremes(read_scheduled(adversarial["adversarial_weight"]))[1] <= 0:
            alone = 0  # without a panel no stage is there for it
        start = warmup["steps"]
        yield "warmup.optimizer", Part(0, max(1, start))
        yield "adversarial.optimizer", Part(start + alone, max(1, steps))
        yield "adversarial", Part(start, alone + steps)
        yield "critics", Part(start, alone + steps)
    elif config.get("learner") == "policy":
        training = config["training"]
        looking = training["perception"]["steps"] if config["network"]["vision"]["kind"] == "pointer" else 0
        yield "training.perception.optimizer", Part(0, max(1, looking))
        yield "training.optimizer", Part(looking, max(1, training["steps"]))
        yield "training.feature_noise", Part(looking, training["steps"])
    elif isinstance(config.get("teacher"), Mapping):
        yield "teacher.optimizer", Part(0, config["teacher"]["steps"])


def _leaves(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield every mapping with a `kind` of a schedule, however deep, with its dotted key."""
    if isinstance(tree, Mapping) and tree.get("kind") in FORMS:
        yield key, tree
    elif isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for name, value in items:
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
