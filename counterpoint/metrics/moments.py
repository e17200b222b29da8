"""Mean and covariance of features as a streaming, mergeable accumulator in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Moments:
    """Count, mean and centred second moment of feature vectors, exact under merging.

    Shards are joined by the pairwise update of Chan, Golub and LeVeque (1979): nothing is ever the
    difference of two large sums, so a far-off mean costs no digits. The order of updates and merges
    changes the result only by float64 round-off.
    """

    def __init__(self, dimension: int) -> None:
        """Start empty for vectors of `dimension` entries."""
        self.count = 0
        self.mean: Array = np.zeros(dimension)
        self.scatter: Array = np.zeros((dimension, dimension))

    @property
    def dimension(self) -> int:
        """Return the length d of the feature vectors."""
        return self.mean.shape[0]

    @property
    def covariance(self) -> Array:
        """Return the sample covariance [d,d] with divisor count - 1.

        Raises ValueError with fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"moments.count={self.count}: a covariance needs at least 2 feature vectors")
        return self.scatter / (self.count - 1)

    @classmethod
    def of(cls, features: Tensor | ArrayLike) -> Moments:
        """Return the moments of `features` [N,d] in one pass.

        Raises ValueError for another shape or a value that is not finite.
        """
        values = as_float64(features)
        moments = cls(values.shape[1])
        if len(values):
            moments.count = len(values)
            moments.mean = values.mean(axis=0)
            centred = values - moments.mean
            moments.scatter = centred.T @ centred
        return moments

    def update(self, features: Tensor | ArrayLike) -> None:
        """Add `features` [N,d] of any float dtype, on any device, in place.

        Raises ValueError for another shape or a value that is not finite.
        """
        merged = self.merge(Moments.of(features))
        self.count, self.mean, self.scatter = merged.count, merged.mean, merged.scatter

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together; neither operand changes.

        Raises ValueError when the dimensions differ.
        """
        if self.dimension != other.dimension:
            raise ValueError(
                f"moments of dimension {self.dimension} and {other.dimension} do not merge: "
                "use one feature network"
            )
        merged = Moments(self.dimension)
        merged.count = self.count + other.count
        if merged.count:
            share = other.count / merged.count
            gap = other.mean - self.mean
            merged.mean = self.mean + share * gap
            merged.scatter = self.scatter + other.scatter + (self.count * share) * np.outer(gap, gap)
        return merged

    def as_arrays(self) -> dict[str, NDArray]:
        """Return `count` (int64 scalar), `mean` [d] and `scatter` [d,d] (float64), fit for npz or a wire."""
        return {"count": np.array(self.count), "mean": self.mean.copy(), "scatter": self.scatter.copy()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Moments:
        """Return the moments that `as_arrays` wrote.

        Raises ValueError when an array is missing or the shapes do not belong together.
        """
        missing = {"count", "mean", "scatter"} - set(arrays)
        if missing:
            raise ValueError(f"moments lack {sorted(missing)}: pass what Moments.as_arrays returned")
        dimension = arrays["mean"].shape[-1] if arrays["mean"].ndim == 1 else -1
        if arrays["scatter"].shape != (dimension, dimension):
            raise ValueError(
                f"moments.mean {arrays['mean'].shape} and moments.scatter {arrays['scatter'].shape} "
                "do not belong together: pass what Moments.as_arrays returned"
            )
        moments = cls(dimension)
        moments.count = int(arrays["count"])
        moments.mean = np.array(arrays["mean"], dtype=np.float64)
        moments.scatter = np.array(arrays["scatter"], dtype=np.float64)
        return moments


def as_float64(features: Tensor | ArrayLike) -> Array:
    """Return `features` [N,d] as a float64 NumPy array.

    Raises ValueError when it is not two-dimensional or holds a value that is not finite.
    """
    raw = features.detach().double().cpu().numpy() if isinstance(features, Tensor) else features
    values = np.asarray(raw, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"features of shape {values.shape} are not [N,d]: flatten all but the first axis")
    if not np.isfinite(values).all():
        rows = int((~np.isfinite(values)).any(axis=1).sum())
        raise ValueError(
            f"features of {rows} of {len(values)} images are not finite: the images or the network diverged"
        )
    return values
