"""What a policy's actions are scaled by: quantiles per dimension, and the data that they came from."""

import math
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from counterpoint.section import Section

FAR_ABOVE = 5
"""A sample that leaves the range this many times as often as the quantiles imply is of other data."""


@dataclass(frozen=True)
class Clipping:
    """How much of a sample of actions lies outside the range of its statistics."""

    shares: np.ndarray
    """Share of the sample outside the range, by dimension, float64 [D]."""
    warning: str | None
    """One line if a share is far above what the quantiles imply, as with statistics of other data."""


class ActionStatistics(Section):
    """The range of each action dimension, in environment units, and the data that it was measured on."""

    low: tuple[float, ...] = Field(min_length=1)
    """Value that is scaled to -1, by dimension: the lower quantile."""
    high: tuple[float, ...]
    """Value that is scaled to 1, by dimension: the upper quantile."""
    mean: tuple[float, ...] | None = None
    """Mean by dimension, None if unknown."""
    std: tuple[float, ...] | None = None
    """Standard deviation by dimension, of the population; None if unknown."""
    count: int | None = Field(default=None, ge=1)
    """Control steps that were measured, None if unknown."""
    fingerprint: str
    """What identifies the data that were measured; two statistics of the same data have the same."""
    quantiles: tuple[float, float] = (0.01, 0.99)
    """Which quantiles `low` and `high` are."""
    scaled: tuple[bool, ...] | None = None
    """Which dimensions are scaled at all; the others pass unchanged. None scales all."""

    @model_validator(mode="after")
    def _check(self) -> "ActionStatistics":
        for field in ("high", "mean", "std", "scaled"):
            values = getattr(self, field)
            if values is not None and len(values) != self.dimensions:
                raise ValueError(
                    f"statistics.{field} has {len(values)} entries and statistics.low has {self.dimensions}: "
                    "give one each per dimension"
                )
        for field in ("low", "high", "mean", "std"):
            if not all(map(math.isfinite, getattr(self, field) or ())):
                raise ValueError(f"statistics.{field}={getattr(self, field)} is not finite: measure it anew")
        if any(low > high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"statistics.low={self.low} exceeds statistics.high={self.high}: swap them")
        if self.std is not None and min(self.std) < 0:
            raise ValueError(f"statistics.std={self.std} is negative: measure it anew")
        if not 0 <= self.quantiles[0] < self.quantiles[1] <= 1:
            raise ValueError(f"statistics.quantiles={self.quantiles} must rise within [0, 1]")
        return self

    @classmethod
    def from_actions(
        cls, actions: np.ndarray, fingerprint: str, quantiles: tuple[float, float] = (0.01, 0.99)
    ) -> "ActionStatistics":
        """Measure `actions` [F,D], F control steps in environment units.

        Raises ValueError if they are of another shape, empty or not finite.
        """
        actions = np.asarray(actions, np.float64)
        if actions.ndim != 2 or 0 in actions.shape:
            raise ValueError(f"actions have shape {list(actions.shape)}: give [steps, dimensions], not empty")
        _check_finite(actions)
        low, high = np.quantile(actions, quantiles, axis=0)
        return cls(
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
            mean=tuple(actions.mean(0).tolist()),
            std=tuple(actions.std(0).tolist()),
            count=len(actions),
            fingerprint=fingerprint,
            quantiles=quantiles,
        )

    @property
    def dimensions(self) -> int:
        """Dimensions of one control step (D)."""
        return len(self.low)

    def normalise(self, actions: np.ndarray) -> np.ndarray:
        """Return `actions` [...,D] with the quantile range mapped linearly to [-1,1], as float64.

        What lies outside the range stays outside. A dimension whose quantiles coincide carries nothing and
        becomes 0. Raises ValueError if the actions have other dimensions or are not finite.
        """
        actions = self._checked(actions)
        span = self._high - self._low
        scaled = np.where(span > 0, 2 * (actions - self._low) / np.where(span > 0, span, 1) - 1, 0.0)
        return np.where(self._scaled, scaled, actions)

    def unnormalise(self, actions: np.ndarray) -> np.ndarray:
        """Return `actions` [...,D] in environment units, as float64: the inverse of `normalise`.

        A dimension whose quantiles coincide becomes that one value, whatever is given.
        """
        actions = self._checked(actions)
        return np.where(self._scaled, (actions + 1) / 2 * (self._high - self._low) + self._low, actions)

    def clipping(self, actions: np.ndarray) -> Clipping:
        """Say how much of a sample of `actions` [...,D] lies outside the range of each dimension."""
        rows = self._checked(actions).reshape(-1, self.dimensions)
        if not len(rows):
            raise ValueError("the sample of actions is empty: give at least one")
        # Rounding of float32 actions must not count as leaving the range.
        slack = 1e-6 * np.maximum(np.abs(self._low), np.abs(self._high))
        outside = (rows < self._low - slack) | (rows > self._high + slack)
        shares = np.where(self._scaled, outside.mean(0), 0.0)
        implied = 1 - (self.quantiles[1] - self.quantiles[0])
        limit = FAR_ABOVE * (implied + 1 / len(rows))
        wrong = np.flatnonzero(shares > limit)
        if not len(wrong):
            return Clipping(shares, None)
        listed = ", ".join(f"{shares[d]:.0%} of dimension {d}" for d in wrong)
        return Clipping(
            shares,
            f"actions lie outside the statistics' range in {listed}, where {implied:.0%} is expected: "
            f"use the statistics of these data, not those of {self.fingerprint!r}",
        )

    @property
    def _low(self) -> np.ndarray:
        return np.array(self.low)

    @property
    def _high(self) -> np.ndarray:
        return np.array(self.high)

    @property
    def _scaled(self) -> np.ndarray:
        return np.array(self.scaled or (True,) * self.dimensions)

    def _checked(self, actions: np.ndarray) -> np.ndarray:
        actions = np.asarray(actions, np.float64)
        if actions.ndim == 0 or actions.shape[-1] != self.dimensions:
            raise ValueError(
                f"actions have shape {list(actions.shape)}, the statistics {self.dimensions} dimensions: "
                "use the statistics of this robot"
            )
        _check_finite(actions)
        return actions


def check_chunks(actions: np.ndarray, horizon: int, dimensions: int) -> np.ndarray:
    """Return `actions` as float64 [B,horizon,dimensions]; raise ValueError, in one line, if they misfit."""
    actions = np.asarray(actions, np.float64)
    if actions.ndim != 3 or actions.shape[1:] != (horizon, dimensions):
        raise ValueError(
            f"actions have shape {list(actions.shape)}, the tokenizer takes [B, {horizon}, {dimensions}]: "
            "cut them into chunks of its horizon"
        )
    _check_finite(actions)
    return actions


def _check_finite(actions: np.ndarray) -> None:
    if not np.isfinite(actions).all():
        wrong = sorted({int(index) for index in np.argwhere(~np.isfinite(actions))[:, -1]})
        raise ValueError(f"actions are not finite in dimensions {wrong}: repair the data")
