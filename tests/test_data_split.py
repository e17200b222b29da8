"""The seeded split and the small subsets, and the digits that they are used on."""

import importlib
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit

from counterpoint.data import DataConfig, ImageSet, Source, load_data
from counterpoint.data.split import (
    balanced_order,
    balanced_subset,
    given_or_stratified_split,
    stratified_indices,
)


def rows(images: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.images}


def test_every_source_is_a_module_with_load():
    for source in get_args(Source):
        assert callable(importlib.import_module(f"counterpoint.data.{source}").load)


def test_digits_are_the_files_of_scikit_learn():
    split = load_data(DataConfig())
    bunch = load_digits()
    assert (len(split.train), len(split.test)) == (1300, 497)
    assert split.train.image_shape == (1, 8, 8)
    together = np.concatenate([split.train.images.numpy(), split.test.images.numpy()])[:, 0]
    assert sorted(((together + 1) * 8).sum(axis=(1, 2))) == sorted(bunch.images.sum(axis=(1, 2)))
    assert rows(split.train) | rows(split.test) == {
        image.astype(np.float32).tobytes() for image in (bunch.images / 8 - 1)
    }


def test_digits_are_stratified_as_by_scikit_learn():
    split = load_data(DataConfig(seed=3))
    labels = load_digits().target
    ((train, test),) = StratifiedShuffleSplit(1, test_size=497, random_state=3).split(labels, labels)
    assert split.train.labels.bincount().tolist() == np.bincount(labels[train]).tolist()
    assert split.test.labels.tolist() == labels[np.sort(test)].tolist()


def test_one_seed_gives_one_split():
    first, again, other = (load_data(DataConfig(seed=seed)) for seed in (1, 1, 2))
    assert first.train.fingerprint() == again.train.fingerprint()
    assert first.test.fingerprint() == again.test.fingerprint()
    assert first.train.fingerprint() != other.train.fingerprint()


def test_indices_are_a_partition():
    train, test = stratified_indices(torch.arange(100) % 4, 0.25, seed=0)
    assert sorted(train.tolist() + test.tolist()) == list(range(100))
    assert len(test) == 25


def test_share_as_test_size():
    assert len(load_data(DataConfig(test_size=0.5)).test) == 899


@pytest.mark.parametrize(("labels", "test_size"), [([0, 0, 1], 1), ([0, 0, 1, 1], 4), ([0, 0, 1, 1], 1)])
def test_impossible_split_is_refused_in_one_line(labels, test_size):
    with pytest.raises(
        ValueError, match=rf"^data.test_size={test_size} does not split {len(labels)}.*[^\n]*$"
    ):
        stratified_indices(torch.tensor(labels), test_size, seed=0)


def test_limit_is_balanced_and_nested():
    small, large = (load_data(DataConfig(limit=limit)).train for limit in (25, 100))
    assert sorted(small.labels.bincount().tolist()) == [2] * 5 + [3] * 5
    assert large.labels.bincount().tolist() == [10] * 10
    assert rows(small) < rows(large) < rows(load_data(DataConfig()).train)


def test_limit_leaves_the_test_images_alone():
    assert load_data(DataConfig(limit=25)).test.fingerprint() == load_data(DataConfig()).test.fingerprint()


def test_limit_is_seeded():
    order = balanced_order(torch.arange(60) % 3, seed=0)
    assert order.tolist() == balanced_order(torch.arange(60) % 3, seed=0).tolist()
    assert order.tolist() != balanced_order(torch.arange(60) % 3, seed=1).tolist()
    expected = balanced_subset(load_data(DataConfig(seed=1)).train, 25, seed=1)
    assert load_data(DataConfig(seed=1, limit=25)).train.fingerprint() == expected.fingerprint()


def test_order_goes_on_when_a_class_is_exhausted():
    labels = torch.tensor([0] * 5 + [1])
    order = balanced_order(labels, seed=0)
    assert sorted(order.tolist()) == list(range(6))
    assert sorted(labels[order[:2]].tolist()) == [0, 1]


def test_limit_beyond_the_training_images_is_refused():
    with pytest.raises(ValueError, match=r"data.limit=1301 exceeds the 1300 training images of digits"):
        load_data(DataConfig(limit=1301))


def test_digits_are_resized():
    assert load_data(DataConfig(image_size=16)).train.image_shape == (1, 16, 16)


def test_given_test_images_are_kept():
    images = ImageSet(torch.zeros(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]), 2, "given")
    split = given_or_stratified_split(images, torch.tensor([False, False, True, False]), None, seed=0)
    assert (split.train.labels.tolist(), split.test.labels.tolist()) == ([0, 1, 1], [0])
    with pytest.raises(ValueError, match=r"data.test_size=1, but given has its own test images"):
        given_or_stratified_split(images, torch.tensor([False, False, True, True]), 1, seed=0)
    with pytest.raises(ValueError, match="no training image has label 1"):
        given_or_stratified_split(images, torch.tensor([False, True, True, True]), None, seed=0)
