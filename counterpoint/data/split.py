"""Seeded, class-balanced choices of images: the train and test split, and small training subsets."""

import torch
from torch import Tensor

from counterpoint.data.images import ImageSet, Split

DEFAULT_SHARE = 0.2
"""Share of test images for sources that have none of their own."""


def stratified_split(images: ImageSet, test_size: int | float, seed: int) -> Split:
    """Split `images` so that each class has the same share in train and test.

    `test_size` is a number of images (int) or a share in (0, 1) (float); the same seed gives the same split.
    Raises ValueError where a class has fewer than two images or a side would be empty.
    """
    train, test = stratified_indices(images.labels, test_size, seed)
    return Split(images.subset(train), images.subset(test))


def stratified_indices(labels: Tensor, test_size: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """The ascending indices (int64) of train and of test for `labels` (int64 [N])."""
    # Slow to import, and most processes that import this never split anything.
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(
            torch.arange(len(labels)).numpy(), test_size=test_size, random_state=seed, stratify=labels.numpy()
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data.test_size={test_size} does not split {len(labels)} images of "
            f"{len(labels.unique())} classes ({reason}); change it or add images"
        ) from error
    return torch.from_numpy(train).sort().values, torch.from_numpy(test).sort().values


def balanced_subset(images: ImageSet, limit: int, seed: int) -> ImageSet:
    """`limit` of the `images`, class counts within one of each other as far as each class reaches.

    With one seed a smaller limit gives a subset of a larger one, so that studies of few data are nested.
    """
    if limit > len(images):
        raise ValueError(
            f"data.limit={limit} exceeds the {len(images)} training images of {images.name}; lower it"
        )
    return images.subset(balanced_order(images.labels, seed)[:limit])


def balanced_order(labels: Tensor, seed: int) -> Tensor:
    """A seeded order (int64 [N]) of `labels` that deals one index of each class, then another, and so on."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    rank = torch.empty_like(labels)
    for label in labels.unique():
        positions = torch.nonzero(labels[shuffled] == label).flatten()
        rank[positions] = torch.arange(len(positions))
    return shuffled[torch.argsort(rank, stable=True)]


def given_or_stratified_split(
    images: ImageSet, in_test: Tensor, test_size: int | float | None, seed: int
) -> Split:
    """Split `images` where the source says so, else with `stratified_split`.

    `in_test` (bool [N]) marks the source's own test images; where it marks none, `test_size` applies (unset:
    a share of 0.2). Raises ValueError where both are given, or where a class is only in the test images.
    """
    if not in_test.any():
        return stratified_split(images, DEFAULT_SHARE if test_size is None else test_size, seed)
    if test_size is not None:
        raise ValueError(
            f"data.test_size={test_size}, but {images.name} has its own test images; leave it unset"
        )
    split = Split(
        images.subset(torch.nonzero(~in_test).flatten()), images.subset(torch.nonzero(in_test).flatten())
    )
    unseen = sorted(set(split.test.labels.tolist()) - set(split.train.labels.tolist()))
    if unseen:
        raise ValueError(
            f"{images.name}: no training image has label {unseen[0]}, test images do; add or drop some"
        )
    return split
