"""Frechet distance between two Gaussians fitted to features (Heusel et al. 2017, eq. 6)."""

import numpy as np

from counterpoint.metrics.moments import Array, Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), in squared feature units.

    The last trace is the nuclear norm of S_a^(1/2) S_b^(1/2), taken over the ranges of both matrices: no
    square root of a product that is not symmetric, and no epsilon on the diagonal for singular covariances.
    Equal moments give 0 up to round-off of either sign. The value falls with the sample counts (about 2d/N
    for N samples of a unit Gaussian), so distances compare only at equal counts.

    Raises ValueError when the dimensions differ or a side has fewer than two vectors.
    """
    if a.dimension != b.dimension:
        raise ValueError(f"moments have dimensions {a.dimension} and {b.dimension}: use one feature network")
    covariance_a, covariance_b = a.covariance, b.covariance
    gap = a.mean - b.mean
    cross = np.linalg.svd(_factor(covariance_a).T @ _factor(covariance_b), compute_uv=False).sum()
    return float(gap @ gap + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * cross)


def _factor(covariance: Array) -> Array:
    """Return F [d,r] with F F^T = covariance, r its numerical rank.

    Eigenvalues below round-off are dropped, because the root would raise noise of 1e-16 to 1e-8.
    """
    values, vectors = np.linalg.eigh(covariance)
    floor = values[-1] * len(values) * np.finfo(np.float64).eps
    kept = values > max(floor, 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])
