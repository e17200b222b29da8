"""Random subsets of equal size that depend on the sets alone, not on the order of their rows."""

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]


def equal_subsets(a: Features, b: Features, largest: int, seed: int) -> tuple[Features, Features]:
    """Return subsets of `a` [N,d] and `b` [M,d] of equal size min(N, M, largest), drawn without replacement.

    Rows are sorted before the draw, so that shards may arrive in any order; a set of that size stays whole.
    """
    size = min(len(a), len(b), largest)
    return _subset(a, size, [seed, 0]), _subset(b, size, [seed, 1])


def _subset(rows: Features, size: int, seed: list[int]) -> Features:
    if len(rows) == size:
        return rows
    ordered = rows[np.lexsort(rows.T[::-1])]
    return ordered[np.random.default_rng(seed).choice(len(rows), size, replace=False)]
