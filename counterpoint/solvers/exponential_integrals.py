"""What a step of DPM-Solver-v3 integrates exactly (Zheng et al. 2023, eq. 14 and app. C.2).

The paper takes the trapezoidal rule on the grid of the statistics and keeps integrals from the grid's first
point, whose differences lose digits where e^{L+S} spans decades. Here l, s, b are taken as linear between
grid points and each step is integrated from its own start by Gauss-Legendre quadrature within the intervals.
So steps may begin and end between grid points, and the two fixed limits come out exact to rounding.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from counterpoint.solvers.empirical_statistics import ModelStatistics

HIGHEST = 4
"""Orders of polynomials that are integrated, from 0: the highest order of an update."""
_POINTS = 4


@dataclass(frozen=True, eq=False)
class Segment:
    """The integrals of one step from lambda_s to lambda_t, each [C,H,W] in float64."""

    growth: Tensor
    """L = integral of l."""
    scale: Tensor
    """S = integral of s."""
    shift: Tensor
    """B = integral of e^{-S(r)} b(r) dr, S from lambda_s to r."""
    moments: tuple[Tensor, ...]
    """E_k = integral of e^{L(r)+S(r)} (r - lambda_s)^k / k! dr."""
    drift: Tensor
    """Integral of e^{L(r)+S(r)} B(r) dr."""

    def to(self, device: torch.device) -> "Segment":
        """Return it on a device; itself if it is there."""
        if self.growth.device == device:
            return self
        moments = tuple(moment.to(device) for moment in self.moments)
        growth, scale, shift, drift = (
            x.to(device) for x in (self.growth, self.scale, self.shift, self.drift)
        )
        return Segment(growth, scale, shift, moments, drift)


@functools.lru_cache(maxsize=16)
def segments(statistics: ModelStatistics, lambdas: tuple[float, ...]) -> tuple[Segment, ...]:
    """Return the steps between consecutive `lambdas`, ascending; kept, as samplers ask for the same again."""
    return tuple(segment(statistics, *ends) for ends in itertools.pairwise(lambdas))


def segment(statistics: ModelStatistics, start: float, end: float) -> Segment:
    """Integrate one step from lambda `start` to `end`."""
    grid = statistics.lambdas
    ends = torch.tensor([start, end], dtype=torch.float64)
    knots = torch.cat([ends[:1], grid[(grid > start) & (grid < end)], ends[1:]])
    l, s, b = (_Linear(values, knots) for values in statistics.at(knots))  # noqa: E741
    width = knots.diff().reshape(-1, 1, 1, 1)
    begun = (knots[:-1] - start).reshape(-1, 1, 1, 1)
    before_l, before_s = _before(l.integral(1.0)), _before(s.integral(1.0))

    def shift(fraction: float) -> Tensor:
        """B's own part within each interval, up to `fraction` of it."""
        parts = (
            w * torch.exp(-before_s - s.integral(fraction * u)) * b.at(fraction * u) for u, w in _gauss()
        )
        return fraction * width * sum(parts)

    before_b = _before(shift(1.0))
    moments = [torch.zeros(()).double() for _ in range(HIGHEST)]
    drift = torch.zeros(()).double()
    for u, w in _gauss():
        weight = w * width * torch.exp(before_l + before_s + l.integral(u) + s.integral(u))
        passed = begun + u * width
        moments = [
            moment + (weight * passed**k / math.factorial(k)).sum(0) for k, moment in enumerate(moments)
        ]
        drift = drift + (weight * (before_b + shift(u))).sum(0)
    return Segment(l.integral(1.0).sum(0), s.integral(1.0).sum(0), shift(1.0).sum(0), tuple(moments), drift)


class _Linear:
    """A function that is linear between knots, by interval."""

    def __init__(self, values: Tensor, knots: Tensor) -> None:
        self.left, self.step = values[:-1], values.diff(dim=0)
        self.width = knots.diff().reshape(-1, 1, 1, 1)

    def at(self, fraction: float) -> Tensor:
        return self.left + fraction * self.step

    def integral(self, fraction: float) -> Tensor:
        """Integral from each interval's left end up to `fraction` of it."""
        return self.width * (fraction * self.left + 0.5 * fraction**2 * self.step)


def _before(parts: Tensor) -> Tensor:
    """Sums of all earlier intervals' parts."""
    return parts.cumsum(0) - parts


@functools.cache
def _gauss() -> list[tuple[float, float]]:
    """Points and weights of Gauss-Legendre quadrature on [0, 1]."""
    points, weights = np.polynomial.legendre.leggauss(_POINTS)
    return [(float(p) / 2 + 0.5, float(w) / 2) for p, w in zip(points, weights, strict=True)]
