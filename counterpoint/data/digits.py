"""The 1,797 real handwritten digits (grey, 8x8, ten classes) that come with scikit-learn."""

import torch

from counterpoint.data.config import DataConfig
from counterpoint.data.images import ImageSet, Split, resize
from counterpoint.data.split import stratified_split

TEST_SIZE = 497
"""Test digits unless the configuration says otherwise, which leaves 1,300 to train on."""


def load(config: DataConfig) -> Split:
    """The digits, 1,300 to train on and 497 to test on, each [1, 8, 8], unless `config` says otherwise."""
    test_size = TEST_SIZE if config.test_size is None else config.test_size
    return stratified_split(read(config.image_size), test_size, config.seed)


def read(image_size: int | None = None) -> ImageSet:
    """All digits in the order of scikit-learn; its pixel values 0 to 16 are mapped to [-1, 1]."""
    from sklearn.datasets import load_digits  # slow to import; see stratified_indices

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(8).sub(1).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    return ImageSet(resize(images, image_size), labels, 10, "digits")
