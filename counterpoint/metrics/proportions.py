"""Success rates with intervals, and which of two rules succeeds more often on the same episodes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class PairedDifference:
    """How two rules compare on the same episodes."""

    trials: int
    gained: int
    """Episodes in which only the first succeeds."""
    lost: int
    """Episodes in which only the second succeeds."""
    difference: float
    """Success rate of the first minus that of the second."""
    low: float
    high: float
    """Bounds of the difference's interval."""
    p: float
    """McNemar's exact two-sided p-value."""


def paired_difference(first: ArrayLike, second: ArrayLike, level: float = 0.95) -> PairedDifference:
    """Compare the outcomes (bool [n], in the same order) of two rules on the same n episodes.

    The interval is Newcombe's (1998, Statistics in Medicine 17:2635, method 10): Wilson intervals of both
    rates, combined with the correlation of the pairs. Raises ValueError if the outcomes are not paired.
    """
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.ndim != 1 or one.shape != other.shape or not len(one):
        raise ValueError(
            f"outcomes of shapes {list(one.shape)} and {list(other.shape)} are not paired: "
            "give one of each per episode"
        )
    gained, lost = int((one & ~other).sum()), int((~one & other).sum())
    low, high = _newcombe(int((one & other).sum()), gained, lost, int((~one & ~other).sum()), level)
    return PairedDifference(
        len(one), gained, lost, (gained - lost) / len(one), low, high, mcnemar(gained, lost)
    )


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value that pairs which differ are as often gained as lost."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Return p-values adjusted by Holm's step-down method (1979), so that together they err at the level."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _newcombe(both: int, gained: int, lost: int, neither: int, level: float) -> tuple[float, float]:
    trials = both + gained + lost + neither
    first, second = both + gained, both + lost
    rate, other_rate = first / trials, second / trials
    low, high = wilson(first, trials, level)
    other_low, other_high = wilson(second, trials, level)
    correlation = _correlation(both, gained, lost, neither)
    down = _combined(rate - low, other_high - other_rate, correlation)
    up = _combined(high - rate, other_rate - other_low, correlation)
    return max(rate - other_rate - down, -1.0), min(rate - other_rate + up, 1.0)


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """The pairs' phi coefficient with Newcombe's correction for continuity, which lessens positive ones."""
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if margins == 0:
        return 0.0
    excess = float(both * neither - gained * lost)
    if excess > 0:
        excess = max(excess - (both + gained + lost + neither) / 2, 0.0)
    return excess / float(np.sqrt(float(margins)))


def _combined(one: float, other: float, correlation: float) -> float:
    return float(np.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0)))
