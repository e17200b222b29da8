"""Precision, recall, density and coverage of generated features over k-nearest-neighbour balls."""

import torch
from torch import Tensor


def improved_precision_recall(
    real: Tensor, generated: Tensor, k: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Return precision and recall of features `generated` [M,d] against `real` [N,d].

    Precision is the share of generated vectors inside the k-NN ball of any real one, recall the share of
    real vectors inside the k-NN ball of any generated one; a ball holds its border (Kynkaanniemi et al. 2019,
    eq. 1 and 2). Distances are exact and in float64, `block` rows at a time, on the device of `real`.

    Raises ValueError when the dimensions differ or a side has no more than `k` vectors.
    """
    real, generated = _checked(real, generated, k)
    precision = _covered(generated, real, neighbour_radii(real, k, block), block)
    recall = _covered(real, generated, neighbour_radii(generated, k, block), block)
    return precision, recall


def density_coverage(real: Tensor, generated: Tensor, k: int = 5, block: int = 1024) -> tuple[float, float]:
    """Return density and coverage of features `generated` [M,d] against `real` [N,d].

    Density is the mean number of real k-NN balls around a generated vector divided by `k` (1 on average for
    equal distributions, and it may exceed 1); coverage is the share of real balls with a generated vector
    inside. A ball leaves out its border (Naeem et al. 2020, eq. 4 and 5).

    Raises ValueError when the dimensions differ or a side has no more than `k` vectors.
    """
    real, generated = _checked(real, generated, k)
    radii = neighbour_radii(real, k, block)
    parts = zip(real.split(block), radii.split(block), strict=True)
    hits = torch.cat([(_distances(part, generated) < radius[:, None]).sum(dim=1) for part, radius in parts])
    return float(hits.sum()) / (k * len(generated)), float((hits > 0).double().mean())


def neighbour_radii(points: Tensor, k: int, block: int) -> Tensor:
    """Return the distance [N] of each of `points` [N,d] to its k-th nearest other point."""
    # The nearest of all is the point itself, so the k-th other one comes as number k + 1.
    return torch.cat([_distances(part, points).kthvalue(k + 1, dim=1).values for part in points.split(block)])


def _covered(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    """Return the share of `points` within `radii` [N] of any of `centres` [N,d]."""
    inside = [(_distances(part, centres) <= radii).any(dim=1) for part in points.split(block)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return Euclidean distances [N,M], free of the cancellation of |a|^2 - 2ab + |b|^2."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(real: Tensor, generated: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return both sets in float64 on one device, or raise ValueError."""
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
        raise ValueError(f"features {shapes} are not [N,d] and [M,d]: use one network")
    if k < 1 or min(len(real), len(generated)) <= k:
        raise ValueError(
            f"k={k} with {len(real)} real and {len(generated)} generated vectors: k must be at least 1 and "
            "below both counts"
        )
    return real.double(), generated.double().to(real.device)
