"""Labelled images in memory, the one form in which every data source hands over its content."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in [-1, 1] with one class label each.

    `images` is float32 [N, C, H, W], `labels` is int64 [N] in [0, num_classes), `name` appears in messages
    and reports. Raises ValueError where shapes, dtypes or ranges differ from that.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    name: str

    def __post_init__(self) -> None:
        _check_images(self.images, self.name)
        _check_labels(self.labels, len(self.images), self.num_classes, self.name)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def fingerprint(self) -> str:
        """The sha256 (hex) of pixels, labels and their shapes; equal content has equal fingerprints."""
        digest = hashlib.sha256(f"{tuple(self.images.shape)} {self.num_classes}".encode())
        for tensor in (self.images, self.labels):
            # Viewed as bytes, an array is hashed in place; tobytes() would copy the whole set.
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).view(np.uint8).data)
        return digest.hexdigest()

    def subset(self, indices: Tensor | Sequence[int]) -> "ImageSet":
        """The images at `indices` (int64 [M]), in that order, as a copy."""
        picked = torch.as_tensor(indices, dtype=torch.int64)
        return ImageSet(self.images[picked], self.labels[picked], self.num_classes, self.name)

    def of_class(self, label: int) -> Tensor:
        """The indices (int64 [M]) of the images of class `label`, ascending."""
        if not 0 <= label < self.num_classes:
            raise ValueError(f"{self.name}: label {label} does not exist; use one in [0, {self.num_classes})")
        return torch.nonzero(self.labels == label).flatten()


@dataclass(frozen=True, eq=False)
class Split:
    """Training and test images of one source; no test image is ever trained on."""

    train: ImageSet
    test: ImageSet

    def __post_init__(self) -> None:
        for field in ("image_shape", "num_classes"):
            train, test = getattr(self.train, field), getattr(self.test, field)
            if train != test:
                raise ValueError(
                    f"{self.train.name}: {field} is {train} in train and {test} in test; make them equal"
                )


def from_uint8(pixels: np.ndarray) -> Tensor:
    """Images [N, C, H, W] (or any shape) of uint8 as float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1."""
    return torch.from_numpy(pixels.astype(np.float32, order="C")).div_(127.5).sub_(1)


def resize(images: Tensor, size: int | None) -> Tensor:
    """Square images [N, C, S, S] brought to [N, C, size, size], antialiased; `None` leaves them alone."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    if images.shape[2] != images.shape[3]:
        height, width = images.shape[2:]
        raise ValueError(
            f"data.image_size={size} needs square images, found {height}x{width}; leave it unset"
        )
    resized = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)  # the bicubic kernel overshoots at edges


def _check_images(images: Tensor, name: str) -> None:
    if images.ndim != 4 or images.dtype != torch.float32:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{name}: images must be float32 [N, C, H, W], found {found}; convert them first")
    if images.numel() == 0:
        raise ValueError(f"{name}: found no image (shape {list(images.shape)}); give at least one")
    low, high = (float(value) for value in torch.aminmax(images))
    if not (low >= -1 and high <= 1):  # also catches NaN, which aminmax propagates
        raise ValueError(f"{name}: pixels must lie in [-1, 1], found [{low:g}, {high:g}]; rescale them")


def _check_labels(labels: Tensor, count: int, num_classes: int, name: str) -> None:
    if labels.dtype != torch.int64 or tuple(labels.shape) != (count,):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"{name}: labels must be int64 [{count}], one an image, found {found}")
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{name}: labels must lie in [0, {num_classes}), found [{low}, {high}]; renumber them"
        )
