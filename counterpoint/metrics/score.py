"""Scores of generated images against real ones, gathered by shards that merge."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.metrics.extractor import Classifier, FeatureNetwork, extract_features, predict_classes
from counterpoint.metrics.frechet import frechet_distance
from counterpoint.metrics.kernel import kernel_distance
from counterpoint.metrics.moments import Moments
from counterpoint.metrics.precision_recall import improved_precision_recall
from counterpoint.metrics.subset import equal_subsets

logger = logging.getLogger(__name__)

Features = NDArray[np.float32]

BATCH_SIZE = 256
NEIGHBOURS = 3
MAX_NEIGHBOUR_SAMPLES = 10_000
"""Largest number of images a side for precision and recall, whose cost is quadratic."""


class ScoreTable(TypedDict):
    """What `Scores.compute` returns; plain numbers, fit for JSON."""

    fd: float
    kid: float
    precision: float
    recall: float
    accuracy: NotRequired[float]
    samples: int
    extractor: str


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of the real images that generated ones are scored against."""

    extractor: str
    moments: Moments
    features: Features

    @classmethod
    def from_images(cls, images: Tensor, network: FeatureNetwork, batch_size: int = BATCH_SIZE) -> Reference:
        """Return the reference of `images` [N,C,H,W] in [-1,1] in the feature space of `network`."""
        features = extract_features(network, images, batch_size)
        return cls(network.extractor, Moments.of(features), features.numpy())

    def as_arrays(self) -> dict[str, NDArray]:
        """Return the reference as NumPy arrays, fit for npz or a wire."""
        return _pack(self.extractor, self.moments, self.features)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Reference:
        """Return what `as_arrays` wrote; raises ValueError when an array is missing or wrong."""
        return cls(*_unpack(arrays))


class Scores:
    """Accumulates one shard of generated images; shards merge in any order.

    Holds the moments, the float32 features (kernel distance, precision and recall need them) and the count of
    images whose predicted class is the wanted one. It holds no network, so that it crosses a wire as arrays.
    """

    def __init__(self, extractor: str) -> None:
        """Start empty in the feature space named `extractor` (`network.extractor`)."""
        self.extractor = extractor
        self.judged = 0
        self.correct = 0
        self._moments: Moments | None = None
        self._parts: list[Features] = []

    @property
    def samples(self) -> int:
        """Return the number of images seen."""
        return self._moments.count if self._moments else 0

    def update(
        self,
        images: Tensor,
        labels: Tensor | None,
        network: FeatureNetwork,
        classifier: Classifier | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Add `images` [N,C,H,W] in [-1,1] made for classes `labels` [N], or for none.

        Without `classifier` the feature network itself judges the classes, if it can.

        Raises ValueError when counts differ, a feature is not finite, or `network` is not the one named at
        the start.
        """
        _same_extractor(self.extractor, network.extractor)
        if labels is not None and len(images) != len(labels):
            raise ValueError(f"{len(images)} images with {len(labels)} labels: give one label an image")
        features = extract_features(network, images, batch_size)
        self._add(Moments.of(features), [features.numpy()])
        judge = classifier or (network if isinstance(network, Classifier) else None)
        if judge is not None and labels is not None:
            self.judged += len(images)
            self.correct += int((predict_classes(judge, images, batch_size) == labels.cpu()).sum())

    def merge(self, other: Scores) -> Scores:
        """Return the scores of both shards together; neither operand changes.

        Raises ValueError when the shards come from different feature networks.
        """
        _same_extractor(self.extractor, other.extractor)
        merged = Scores(self.extractor)
        for shard in (self, other):
            merged.judged += shard.judged
            merged.correct += shard.correct
            if shard._moments is not None:
                merged._add(shard._moments, shard._parts)
        return merged

    def as_arrays(self) -> dict[str, NDArray]:
        """Return the shard as NumPy arrays, fit for npz or a wire; raises ValueError while it is empty."""
        counts = {"judged": np.array(self.judged), "correct": np.array(self.correct)}
        return _pack(self.extractor, *self._content()) | counts

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Scores:
        """Return what `as_arrays` wrote; raises ValueError when an array is missing or wrong."""
        _require(arrays, "judged", "correct")
        extractor, moments, features = _unpack(arrays)
        scores = cls(extractor)
        scores._add(moments, [features])
        scores.judged, scores.correct = int(arrays["judged"]), int(arrays["correct"])
        return scores

    def compute(self, reference: Reference, seed: int = 0, device: torch.device | str = "cpu") -> ScoreTable:
        """Return Frechet and kernel distance, precision, recall (k = 3) and accuracy against `reference`.

        The distances use every image of both sides. Precision and recall use as many real as generated
        images, at most 10,000: the larger side is subsampled without replacement by `seed`, after sorting its
        features, so that neither the order nor the cut of the shards changes the result. `accuracy` is left
        out where no classifier judged. `extractor` names the feature network and its weights.

        Raises ValueError when a side is too small or comes from another feature network.
        """
        _same_extractor(self.extractor, reference.extractor)
        moments, features = self._content()
        _warn_if_few(moments, reference.moments)
        real, generated = equal_subsets(reference.features, features, MAX_NEIGHBOUR_SAMPLES, seed)
        precision, recall = improved_precision_recall(
            _tensor(real, device), _tensor(generated, device), NEIGHBOURS
        )
        table = ScoreTable(
            fd=frechet_distance(reference.moments, moments),
            kid=kernel_distance(_tensor(reference.features, device), _tensor(features, device)),
            precision=precision,
            recall=recall,
            samples=moments.count,
            extractor=self.extractor,
        )
        if self.judged:
            table["accuracy"] = self.correct / self.judged
        return table

    def _add(self, moments: Moments, parts: list[Features]) -> None:
        """Append the features `parts`, whose moments are `moments`."""
        self._moments = self._moments.merge(moments) if self._moments else moments
        self._parts.extend(parts)

    def _content(self) -> tuple[Moments, Features]:
        """Return the moments and all features [N,d], or raise ValueError when empty."""
        if self._moments is None:
            raise ValueError("scores.samples=0: update with generated images first")
        return self._moments, np.concatenate(self._parts)


def _tensor(features: Features, device: torch.device | str) -> Tensor:
    return torch.tensor(features, device=device)


def _warn_if_few(*sides: Moments) -> None:
    count, dimension = min(side.count for side in sides), sides[0].dimension
    if count <= dimension:
        logger.warning(
            "Frechet distance of %d images in %d dimensions mostly measures their number: use more images",
            count,
            dimension,
        )


def _same_extractor(ours: str, theirs: str) -> None:
    if ours != theirs:
        raise ValueError(f"features of {ours} and of {theirs} do not compare: use one feature network")


def _pack(extractor: str, moments: Moments, features: Features) -> dict[str, NDArray]:
    return {"extractor": np.array(extractor), "features": features, **moments.as_arrays()}


def _unpack(arrays: Mapping[str, NDArray]) -> tuple[str, Moments, Features]:
    _require(arrays, "extractor", "features")
    moments, features = Moments.from_arrays(arrays), np.asarray(arrays["features"], dtype=np.float32)
    if features.shape != (moments.count, moments.dimension):
        expected = (moments.count, moments.dimension)
        raise ValueError(f"features {features.shape} do not belong to moments of {expected}: send both")
    return str(arrays["extractor"]), moments, features


def _require(arrays: Mapping[str, NDArray], *names: str) -> None:
    missing = sorted(set(names) - set(arrays))
    if missing:
        raise ValueError(f"arrays lack {missing}: pass what as_arrays returned")
