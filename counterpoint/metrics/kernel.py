"""Kernel distance of two sets of features: unbiased MMD^2, cubic kernel (Binkowski et al. 2018)."""

from torch import Tensor


def kernel_distance(x: Tensor, y: Tensor, block: int = 2048) -> float:
    """Return the unbiased MMD^2 of features `x` [N,d] and `y` [M,d] under k(a,b) = (a.b/d + 1)^3.

    Each within-set mean leaves out the pairs of a vector with itself, so equal distributions give 0 on
    average and single values may be negative; no clipping. The whole sets are used (no random subsets), in
    float64, `block` rows at a time, on the device of `x`. The expectation does not depend on N or M, which
    may differ.

    Raises ValueError when the dimensions differ or a side has fewer than two vectors.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"features {shapes} are not [N,d] and [M,d]: use one feature network")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"kernel distance of {len(x)} and {len(y)} vectors: each side needs at least 2")
    x, y = x.double(), y.double().to(x.device)
    across = _sum_between(x, y, block) / (len(x) * len(y))
    return _mean_within(x, block) + _mean_within(y, block) - 2.0 * across


def _mean_within(x: Tensor, block: int) -> float:
    """Return the mean kernel over ordered pairs of different rows of `x`."""
    diagonal = float(_cubic(x.square().sum(dim=1), x.shape[1]).sum())
    return (_sum_between(x, x, block) - diagonal) / (len(x) * (len(x) - 1))


def _sum_between(x: Tensor, y: Tensor, block: int) -> float:
    """Return the sum of the kernel over all pairs of a row of `x` and a row of `y`."""
    return sum(float(_cubic(part @ y.T, x.shape[1]).sum()) for part in x.split(block))


def _cubic(products: Tensor, dimension: int) -> Tensor:
    """Return (products / dimension + 1)^3."""
    return (products / dimension + 1.0).pow(3)
