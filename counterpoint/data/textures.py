"""Crops of ten photographs that come with scikit-image: a harder set of ten classes in colour.

Each class is one photograph, halved in size and cut into vertical strips two crops wide. Every fourth strip
is held out for the test set, and a crop never leaves its strip, so train and test share no pixel.
"""

from importlib import metadata, resources
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from counterpoint.data.config import DataConfig
from counterpoint.data.images import ImageSet, Split, from_uint8

PHOTOGRAPHS = (
    "brick", "gravel", "grass", "coffee", "chelsea", "astronaut", "moon", "coins", "motorcycle_left", "ihc"
)  # fmt: skip
"""File names without ending, in the order of the labels; all of them lie inside the wheel."""

TRAIN_SIZE = 15_000
TEST_SIZE = 2_000
IMAGE_SIZE = 16

STRIP_PERIOD = 4
HELD_OUT_STRIP = 2  # of each period: with 32x32 crops the narrowest photograph has only three strips
TEST_STREAM = 1


class Crops(NamedTuple):
    """Corners of square crops: `left` and `top` are int64 [N] in pixels of the halved photograph."""

    left: np.ndarray
    top: np.ndarray


def load(config: DataConfig) -> Split:
    """15,000 train and 2,000 test crops [3, 16, 16], class-balanced, unless `config` says otherwise.

    `image_size` is the size of a crop, not a scale; `seed` chooses the crops, never which strips are held
    out.
    """
    test_size = TEST_SIZE if config.test_size is None else config.test_size
    if not isinstance(test_size, int):
        raise ValueError(
            f"data.test_size={test_size} is a share, but crops are drawn; give a number such as 2000"
        )
    size = config.image_size or IMAGE_SIZE
    photographs = [photograph(name) for name in PHOTOGRAPHS]
    train = _image_set(photographs, size, TRAIN_SIZE, config.seed, held_out=False)
    test = _image_set(photographs, size, test_size, config.seed, held_out=True)
    return Split(train, test)


def photograph(name: str) -> np.ndarray:
    """The photograph `name` halved in size, uint8 [H, W, 3]; grey ones have three equal channels."""
    # skimage.data would ask a registry and may download; the files are read as the wheel brought them.
    path = resources.files("skimage") / "data" / f"{name}.png"
    if not path.is_file():
        version = metadata.version("scikit-image")
        raise ValueError(f"textures: scikit-image {version} lacks data/{name}.png; install scikit-image 0.26")
    with path.open("rb") as file, Image.open(file) as image:
        even = image.convert("RGB").crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))
        # Averages of separate 2x2 blocks: antialiased, and no original pixel reaches into two strips.
        return np.asarray(even.reduce(2))


def draw_crops(
    height: int, width: int, size: int, count: int, rng: np.random.Generator, held_out: bool
) -> Crops:
    """Draw `count` different crops of `size` pixels from the test strips (`held_out`) or from the others.

    Crops overlap one another but stay inside their strip. Raises ValueError where there are not that many.
    """
    strips = [
        strip for strip in range(width // (2 * size)) if (strip % STRIP_PERIOD == HELD_OUT_STRIP) == held_out
    ]
    lefts = np.array(
        [2 * size * strip + offset for strip in strips for offset in range(size + 1)], dtype=np.int64
    )
    rows = max(height - size + 1, 0)
    if count > len(lefts) * rows:
        side = "test" if held_out else "train"
        raise ValueError(
            f"data.image_size={size}: a {height}x{width} photograph has {len(lefts) * rows} {side} crops, "
            f"{count} wanted; lower image_size or test_size"
        )
    chosen = rng.choice(len(lefts) * rows, size=count, replace=False)
    return Crops(lefts[chosen // rows], chosen % rows)


def _image_set(photographs: list[np.ndarray], size: int, total: int, seed: int, held_out: bool) -> ImageSet:
    stacks, labels = [], []
    for label, pixels in enumerate(photographs):
        # Remainders go to the first classes, so that counts differ by one at most.
        count = total // len(photographs) + (label < total % len(photographs))
        rng = np.random.default_rng([seed, label, TEST_STREAM if held_out else 0])
        crops = draw_crops(pixels.shape[0], pixels.shape[1], size, count, rng, held_out)
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (size, size), axis=(0, 1))
        stacks.append(windows[crops.top, crops.left])
        labels += [label] * count
    return ImageSet(from_uint8(np.concatenate(stacks)), torch.tensor(labels), len(photographs), "textures")
