"""The configuration that a member of a population has lived by: schedules that switch where it changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from counterpoint.section import Section
from jobs.progress import progress_of
from jobs.tune_space import laid_over, resolved, schedule_field

Lineage = Sequence[tuple[int, Mapping[str, Any]]]
"""Parameters by the step from which they hold, the first from step 0."""


def learned(job: str, base: Mapping[str, Any], lineage: Lineage) -> dict[str, Any]:
    """Return the configuration under which a single run does what the members of a lineage did in turn.

    A field that was changed becomes a piecewise schedule, each piece of which is what the field was then,
    at the progress that the field has at the step of the change. A single segment changes nothing more.

    Raises ConfigError, one line, if the job refuses it.
    """
    data = laid_over(base, lineage[0][1])
    if len(lineage) == 1:
        return data
    configs = [(step, resolved(job, laid_over(base, params))) for step, params in lineage]
    lives = [(step, config.model_dump(mode="json")) for step, config in configs]
    fields = {schedule_field(job, base, key) for _, params in lineage for key in params}
    return laid_over(data, {field: _pieces(configs[0][1], field, lives) for field in sorted(fields)})


def value_of(data: Mapping[str, Any], field: str) -> Any:
    """Return what stands under a dotted key, in which numbers count the items of lists."""
    value: Any = data
    for part in field.split("."):
        value = value[int(part)] if isinstance(value, list | tuple) else value[part]
    return value


def _pieces(config: Section, field: str, lives: Sequence[tuple[int, Mapping[str, Any]]]) -> Any:
    """Return a field's schedule over all lives; what it was alone if it never changed."""
    found: list[dict[str, Any]] = []
    for step, data in lives:
        value = value_of(data, field)
        at = progress_of(config, field, step) if found else 0.0
        if found and at <= found[-1]["at"]:
            # A change at or before the field's own beginning replaces what was there.
            found[-1]["value"] = value
        elif not found or found[-1]["value"] != value:
            found.append({"at": at, "value": value})
    return found[0]["value"] if len(found) == 1 else {"kind": "piecewise", "pieces": found}
