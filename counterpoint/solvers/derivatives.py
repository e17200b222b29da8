"""Derivatives at a point from values at it and at others near (DPM-Solver-v3, app. C.2 and theorem 3.4)."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def polynomial(values: Sequence[Tensor], offsets: Sequence[float]) -> list[Tensor]:
    """Return the value and n - 1 derivatives, at offset 0, of the polynomial through n values.

    `offsets` [n], the first 0, say where the values are.
    """
    orders = range(1, len(values))
    powers = torch.tensor([[offset**k for k in orders] for offset in offsets[1:]], dtype=torch.float64)
    inverse = torch.linalg.inv(powers.reshape(len(orders), len(orders)))
    rises = torch.stack(list(values)) - values[0]
    scaled = [
        math.factorial(k) * torch.tensordot(row.to(rises), rises[1:], 1)
        for k, row in zip(orders, inverse, strict=True)
    ]
    return [values[0], *scaled]


def divided(values: Sequence[Tensor], offsets: Sequence[float]) -> list[Tensor]:
    """Return the same, the k-th derivative from the first k + 1 values alone, as k! times their divided
    difference: of lower order from the second derivative's on, and calmer where points are far apart."""
    differences, found = list(values), [values[0]]
    for k in range(1, len(values)):
        differences = [
            (first - second) / (offsets[j] - offsets[j + k])
            for j, (first, second) in enumerate(itertools.pairwise(differences))
        ]
        found.append(math.factorial(k) * differences[0])
    return found
