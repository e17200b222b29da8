"""The values of a key of a sweep's space, and the conditions under which they are tried."""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_serializer, model_validator

from counterpoint.section import Section
from jobs.config_fields import show

Kind = Literal["uniform", "loguniform", "randint", "choice", "grid"]
KINDS: tuple[Kind, ...] = ("uniform", "loguniform", "randint", "choice", "grid")
RANGES: tuple[Kind, ...] = ("uniform", "loguniform", "randint")
INSIDE = (math.sqrt(5.0) - 1.0) / 2.0
"""Where within a range a value is tried besides its ends: no whole number and no round one."""


class Parameter(Section):
    """The values of one key: exactly one of uniform, loguniform, randint, choice and grid."""

    uniform: tuple[Any, ...] | None = None
    """[low, high]: any number between them."""
    loguniform: tuple[Any, ...] | None = None
    """[low, high]: any number between them, even on the scale of its logarithm."""
    randint: tuple[Any, ...] | None = None
    """[low, high]: any whole number between them, both included."""
    choice: tuple[Any, ...] | None = None
    """One of these values."""
    grid: tuple[Any, ...] | None = None
    """Each of these values in turn, with each of every other grid."""
    when: dict[str, Any] = {}
    """When this entry holds, by dotted key of the space or the job: a value, a list of values, or
    {above: x}, {below: x} or both, ends excluded. All must hold."""

    @model_validator(mode="before")
    @classmethod
    def _check_mapping(cls, data: Any) -> Any:
        if not isinstance(data, Mapping | cls):
            raise ValueError("write what to try, such as {uniform: [0.0, 1.0]} or {choice: [a, b]}")
        return data

    @field_validator(*KINDS, mode="before")
    @classmethod
    def _check_list(cls, values: Any) -> Any:
        if values is not None and not isinstance(values, list | tuple):
            raise ValueError("write a list in square brackets")
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} together" if given else "nothing to try"
            raise ValueError(f"{said}: give exactly one of {', '.join(KINDS)}")
        if self.kind in RANGES:
            self._check_range()
        elif not self.values:
            raise ValueError(f"{self.kind} = [] has no values: list at least one, or leave the key out")
        elif any(same(a, b) for a, b in itertools.combinations(self.values, 2)):
            raise ValueError(f"{self.kind} = {show(self.values)} has a value twice: list each once")
        for key, condition in self.when.items():
            _check_condition(key, condition)
        return self

    def _check_range(self) -> None:
        values, said = self.values, f"{self.kind} = {show(self.values)}"
        if len(values) != 2:
            raise ValueError(f"{said} must be [low, high]")
        for value in values:
            if not is_number(value):
                raise ValueError(f"{said}: {show(value)} is not a finite number; give [low, high] as numbers")
        low, high = values
        if low > high:
            raise ValueError(f"{said}: low is above high; write [{show(high)}, {show(low)}]")
        if low == high:
            raise ValueError(f"{said} leaves nothing to try: set the key in base instead")
        if self.kind == "loguniform" and low <= 0:
            raise ValueError(
                f"{said}: {show(low)} has no logarithm; give a low above 0, or take uniform instead"
            )
        if self.kind == "randint" and any(value != int(value) for value in values):
            raise ValueError(f"{said} must be whole numbers; for fractions take uniform instead")

    @property
    def kind(self) -> Kind:
        """How the values are given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """Low and high of a range, or the options."""
        return tuple(getattr(self, self.kind))

    @property
    def low(self) -> float:
        """The low end of a range; an int of randint."""
        return int(self.values[0]) if self.kind == "randint" else float(self.values[0])

    @property
    def high(self) -> float:
        """The high end of a range; an int of randint."""
        return int(self.values[1]) if self.kind == "randint" else float(self.values[1])

    def samples(self) -> list[Any]:
        """Return values that stand for all: every option, or both ends of a range and one between."""
        if self.kind not in RANGES:
            return list(self.values)
        if self.kind == "loguniform":
            return [self.low, self.high, self.low * (self.high / self.low) ** INSIDE]
        between = self.low + INSIDE * (self.high - self.low)
        return [self.low, self.high, round(between) if self.kind == "randint" else between]

    @model_serializer(mode="plain")
    def _to_plain(self) -> dict[str, Any]:
        """Leave out what is not given."""
        found: dict[str, Any] = {self.kind: list(self.values)}
        return found | ({"when": self.when} if self.when else {})


def _form(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Entry = Annotated[
    Annotated[Parameter, Tag("one")] | Annotated[tuple[Parameter, ...], Field(min_length=1), Tag("several")],
    Discriminator(_form),
]
"""What a key of the space has: one entry, or several of which the first holds whose conditions hold."""
Space = Mapping[str, Parameter | tuple[Parameter, ...]]


def entries(entry: Parameter | tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """Return the entries of a key."""
    return (entry,) if isinstance(entry, Parameter) else entry


def is_grid(entry: Parameter | tuple[Parameter, ...]) -> bool:
    """Say whether a key is tried value by value."""
    return any(parameter.kind == "grid" for parameter in entries(entry))


def holding(
    entry: Parameter | tuple[Parameter, ...], params: Mapping[str, Any]
) -> tuple[int, Parameter] | None:
    """Return the first entry whose conditions hold under `params`, and its place; None if none does."""
    for place, parameter in enumerate(entries(entry)):
        if all(key in params and meets(params[key], wish) for key, wish in parameter.when.items()):
            return place, parameter
    return None


def meets(value: Any, condition: Any) -> bool:
    """Say whether a value is the one, or one of those, or within the bounds that a condition names."""
    if isinstance(condition, Mapping):
        above, below = condition.get("above", -math.inf), condition.get("below", math.inf)
        return is_number(value) and above < value < below
    wished = condition if isinstance(condition, list | tuple) else [condition]
    return any(same(value, wish) for wish in wished)


def same(left: Any, right: Any) -> bool:
    """Say whether two values of YAML are equal; unlike in Python, true is not 1."""
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


def in_order(space: Space) -> list[str]:
    """Return the keys, each after those that its conditions name; ValueError, one line, if they go round."""
    placed: list[str] = []

    def place(key: str, above: tuple[str, ...]) -> None:
        if key in above:
            circle = " -> ".join((*above[above.index(key) :], key))
            raise ValueError(f"space.{key}: the conditions go round in a circle ({circle}); drop one `when`")
        for other in conditions_of(space[key]):
            if other in space:
                place(other, (*above, key))
        if key not in placed:
            placed.append(key)

    for key in space:
        place(key, ())
    return placed


def cells(space: Space) -> list[dict[str, Any]]:
    """Return the grid's cells, the last key turning fastest; none where the space has no grid.

    Trial i gets cell i modulo their number; keys that are not grids are drawn for each trial.
    """
    keys = [key for key in in_order(space) if is_grid(space[key])]
    found: list[dict[str, Any]] = [{}] if keys else []
    for key in keys:
        found = [cell | more for cell in found for more in _options(key, space[key], cell)]
    return found


def _options(
    key: str, entry: Parameter | tuple[Parameter, ...], cell: Mapping[str, Any]
) -> list[dict[str, Any]]:
    held = holding(entry, cell)
    return [{}] if held is None else [{key: copy.deepcopy(value)} for value in held[1].values]


def candidates(parameter: Parameter, wish: Any) -> Iterator[Any]:
    """Yield values of an entry among which one meets `wish`, if any does."""
    yield from parameter.samples()
    if parameter.kind not in RANGES:
        return
    low, high = parameter.low, parameter.high
    if isinstance(wish, Mapping):
        if parameter.kind == "randint":
            bound = math.floor(wish["above"]) + 1 if "above" in wish else math.ceil(wish["below"]) - 1
            yield from (value for value in (bound,) if low <= value <= high)
        else:
            low, high = max(low, wish.get("above", low)), min(high, wish.get("below", high))
            yield from (value for value in ((low + high) / 2,) if low <= value <= high)
        return
    for value in wish if isinstance(wish, list | tuple) else [wish]:
        whole = parameter.kind != "randint" or (is_number(value) and value == int(value))
        if is_number(value) and low <= value <= high and whole:
            yield value


def conditions_of(entry: Parameter | tuple[Parameter, ...]) -> list[str]:
    """Return the keys that the conditions of an entry name, each once."""
    return list(dict.fromkeys(key for parameter in entries(entry) for key in parameter.when))


def _check_condition(key: str, condition: Any) -> None:
    if isinstance(condition, Mapping):
        good = condition and set(condition) <= {"above", "below"}
        if not good or not all(is_number(bound) for bound in condition.values()):
            raise ValueError(
                f"when {key} = {show(condition)}: give a value, a list of them, {{above: x}} or {{below: x}}"
            )
    elif isinstance(condition, list | tuple) and not condition:
        raise ValueError(f"when {key} = [] never holds: list at least one value")


def is_number(value: Any) -> bool:
    """Say whether a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
