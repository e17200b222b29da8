"""One swept key as an axis: numbers on a plain or a logarithmic scale, anything else side by side."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

from jobs.tune_ledger import Params
from jobs.tune_record import finite
from jobs.tune_table import said

RANGES = ("uniform", "loguniform", "randint")
LISTS = ("choice", "grid")


@dataclass(frozen=True)
class Dimension:
    """A swept key and its scale."""

    key: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    categories: tuple[str, ...] = ()
    """What identifies each value, in order, where it is not a scale of numbers."""

    def value(self, params: Params) -> float | None:
        """Return a trial's coordinate on this axis; None where the key is not among its parameters."""
        if self.key not in params:
            return None
        value = params[self.key]
        if self.categories:
            return float(self.categories.index(_identity(value)))
        return float(value)

    def place(self, value: float) -> float:
        """Return where a coordinate lies between the ends, from 0 to 1."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        return 0.5 if high == low else (value - low) / (high - low)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """Return the coordinates to mark on the axis, and what to write there."""
        if self.categories:
            return [(float(i), said(json.loads(text), 14)) for i, text in enumerate(self.categories)]
        if self.low == self.high:
            return [(self.low, f"{self.low:.4g}")]
        at = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        if self.log:
            subs = (1.0,) if self.high > 100.0 * self.low else (1.0, 2.0, 5.0)
            at = LogLocator(subs=subs, numticks=most + 4).tick_values(self.low, self.high)
        reach = 1e-9 * (self.high - self.low)
        kept = [float(v) for v in at if self.low - reach <= v <= self.high + reach]
        if len(kept) < 2:
            kept = [self.low, self.high]
        return [(v, f"{v:.6g}") for v in kept]

    def ticks_with(self, value: float) -> list[tuple[float, str]]:
        """Return the ticks with one at `value`, and without those too near to it."""
        apart = [tick for tick in self.ticks() if abs(self.place(tick[0]) - self.place(value)) > 0.06]
        return [*apart, (value, f"{value:.4g}")]

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value


def dimension(key: str, alternatives: Any, found: Sequence[Params]) -> Dimension:
    """Return the axis of a key.

    Args:
        key: dotted.
        alternatives: its entry of the space as plain values: a parameter, or several for conditional ranges.
        found: the parameters of all trials.
    """
    entries = [e for e in (alternatives if isinstance(alternatives, list) else [alternatives]) if e]
    values = [params[key] for params in found if key in params]
    listed = [v for entry in entries for name in LISTS for v in _items(entry, name)]
    ranges = [(name, _items(entry, name)) for entry in entries for name in RANGES if _items(entry, name)]
    plain = all(finite(value) for value in values)
    if not plain or (listed and not ranges) or not (values or ranges):
        return _side_by_side(key, [*listed, *values])
    bounds = [v for _, pair in ranges for v in pair]
    ends = [float(v) for v in [*bounds, *listed, *values] if finite(v)]
    low, high = min(ends), max(ends)
    log = bool(ranges) and all(name == "loguniform" for name, _ in ranges) and low > 0.0
    return Dimension(key, low, high, log)


def figure_axis(key: str, values: Sequence[float], log: bool) -> Dimension:
    """Return the axis of figures, all of them finite, at least one."""
    return Dimension(key, min(values), max(values), log)


def jitter(index: int) -> float:
    """Return a trial's shift from its category, in (-0.5, 0.5): even over trials, always the same."""
    return (index + 1) * 0.6180339887498949 % 1.0 - 0.5


def padded(axis: Dimension, share: float = 0.04) -> tuple[float, float]:
    """Return the ends of the axis with some air beyond them."""
    if axis.categories:
        return -0.6, len(axis.categories) - 0.4
    if axis.log:
        low, high = (math.log(axis.low), math.log(axis.high))
        air = share * (high - low) or 0.5
        return math.exp(low - air), math.exp(high + air)
    air = share * (axis.high - axis.low) or max(0.5 * abs(axis.high), 0.5)
    return axis.low - air, axis.high + air


def wrapped(name: str, width: int = 17) -> str:
    """Return a dotted name on lines of about `width` letters, broken after dots and underscores."""
    lines, line = [], ""
    for piece in name.replace(".", ".\0").replace("_", "_\0").split("\0"):
        if line and len(line) + len(piece) > width:
            lines.append(line)
            line = ""
        line += piece
    return "\n".join([*lines, line])


def _side_by_side(key: str, values: Sequence[Any]) -> Dimension:
    """Return an axis of categories: numbers in their order, anything else in that of the space."""
    known = {_identity(value): value for value in values} or {_identity(None): None}
    if all(finite(value) for value in known.values()):
        known = dict(sorted(known.items(), key=lambda pair: pair[1]))
    names = tuple(known)
    return Dimension(key, 0.0, float(len(names) - 1), categories=names)


def _identity(value: Any) -> str:
    """Return a text that is the same for equal values: a number that is whole is whole, as YAML reads it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def _items(entry: Any, name: str) -> list[Any]:
    found = entry.get(name) if isinstance(entry, Mapping) else None
    return list(found) if isinstance(found, list | tuple) else []
