"""ImageSet and Split: what they refuse, and what a fingerprint sees."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from skimage.transform import downscale_local_mean

from counterpoint.data import DataConfig, ImageSet, Split
from counterpoint.data.images import from_uint8, resize


def image_set(count: int = 6, size: int = 4, num_classes: int = 3) -> ImageSet:
    images = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ImageSet(images, torch.arange(count) % num_classes, num_classes, "squares")


def test_subset_and_of_class_agree_with_a_loop():
    images = image_set()
    assert len(images) == 6
    assert images.image_shape == (1, 4, 4)
    assert images.of_class(2).tolist() == [i for i, label in enumerate(images.labels.tolist()) if label == 2]
    subset = images.subset([4, 0])
    assert subset.labels.tolist() == [1, 0]
    assert torch.equal(subset.images, torch.stack([images.images[4], images.images[0]]))


def test_fingerprint_sees_content_only():
    images = image_set()
    renamed = ImageSet(images.images.clone(), images.labels.clone(), 3, "renamed")
    brighter = images.images.clone()
    brighter[0, 0, 0, 0] += 1e-6
    swapped = images.labels.flip(0)
    assert images.fingerprint() == renamed.fingerprint()
    others = {
        ImageSet(brighter, images.labels, 3, "squares").fingerprint(),
        ImageSet(images.images, swapped, 3, "squares").fingerprint(),
        ImageSet(images.images, images.labels, 4, "squares").fingerprint(),
        ImageSet(images.images.reshape(6, 1, 2, 8), images.labels, 3, "squares").fingerprint(),
    }
    assert len(others | {images.fingerprint()}) == 5


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(2, 4, 4),
            torch.zeros(2).long(),
            r"float32 \[N, C, H, W\], found torch.float32 \[2, 4, 4\]",
        ),
        (torch.zeros(2, 1, 4, 4).double(), torch.zeros(2).long(), "found torch.float64"),
        (torch.zeros(0, 1, 4, 4), torch.zeros(0).long(), "found no image"),
        (torch.full((2, 1, 4, 4), 1.5), torch.zeros(2).long(), r"must lie in \[-1, 1\], found \[1.5, 1.5\]"),
        (torch.full((2, 1, 4, 4), torch.nan), torch.zeros(2).long(), r"must lie in \[-1, 1\], found \[nan"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(3).long(), r"labels must be int64 \[2\].*\[3\]"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2), "found torch.float32"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 3]), r"must lie in \[0, 3\), found \[0, 3\]"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([-1, 0]), r"found \[-1, 0\]"),
    ],
)
def test_image_set_refuses(images, labels, message):
    with pytest.raises(ValueError, match=f"squares: .*{message}"):
        ImageSet(images, labels, 3, "squares")


def test_of_class_refuses_unknown_label():
    with pytest.raises(ValueError, match=r"label 3 does not exist; use one in \[0, 3\)"):
        image_set().of_class(3)


def test_split_refuses_sides_that_do_not_match():
    with pytest.raises(ValueError, match=r"image_shape is \(1, 4, 4\) in train and \(1, 8, 8\) in test"):
        Split(image_set(), image_set(size=8))
    with pytest.raises(ValueError, match="num_classes is 3 in train and 2 in test"):
        Split(image_set(), image_set(num_classes=2))


def test_from_uint8_maps_the_ends():
    assert from_uint8(np.array([0, 255], dtype=np.uint8)).tolist() == [-1, 1]


def test_resize_is_antialiased_and_stays_in_range():
    # Averages of 4x4 independent pixels have a quarter of their deviation; point samples keep over a half.
    noise = torch.rand(20, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert resize(noise, 16).std() < 0.35 * noise.std()
    checks = torch.ones(1, 1, 16, 16)
    checks[:, :, ::2, 1::2] = checks[:, :, 1::2, ::2] = -1
    smooth = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16).contiguous()
    expected = downscale_local_mean(smooth[0, 0].numpy(), (2, 2))
    assert np.abs(resize(smooth, 8)[0, 0].numpy() - expected).max() < 0.03
    assert resize(checks, 32).abs().max() <= 1
    assert resize(checks, None) is checks
    with pytest.raises(ValueError, match=r"data.image_size=4 needs square images, found 8x16"):
        resize(checks[:, :, :8], 4)


@pytest.mark.parametrize(
    "fields",
    [{"source": "os"}, {"test_size": 0}, {"test_size": 1.5}, {"limit": 0}, {"seed": -1}, {"size": 8}],
)
def test_config_refuses(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        DataConfig(**fields)
