"""Textures: real photographs, and no pixel that train and test share."""

import numpy as np
import pytest
import skimage.data
from skimage.transform import downscale_local_mean

from counterpoint.data import DataConfig, Split, load_data
from counterpoint.data.textures import PHOTOGRAPHS, draw_crops, photograph


@pytest.fixture(scope="module")
def split() -> Split:
    return load_data(DataConfig(source="textures"))


def columns(width: int, size: int, held_out: bool, height: int = 160) -> set[int]:
    crops = draw_crops(height, width, size, 1500, np.random.default_rng(0), held_out)
    assert (crops.top >= 0).all()
    assert (crops.top + size <= height).all()
    return {int(left) + offset for left in crops.left for offset in range(size)}


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("width", [192, 225, 256, 370])
def test_train_and_test_crops_share_no_column(width, size):
    train, test = (columns(width, size, held_out) for held_out in (False, True))
    assert not train & test
    assert max(train | test) < width
    # Strip by strip, from the definition: two crops wide, the third of every four held out.
    assert {column // (2 * size) % 4 for column in test} == {2}


def test_crops_lie_where_their_corners_say(split):
    """Each image is found again in its own photograph, train images outside the held-out strips."""
    for label in (0, 5):
        pixels = photograph(PHOTOGRAPHS[label])
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (16, 16), axis=(0, 1))
        for side, held_out in ((split.train, False), (split.test, True)):
            image = side.images[side.of_class(label)[0]].add(1).mul(127.5).round().numpy().astype(np.uint8)
            _, lefts = np.nonzero((windows == image).all(axis=(2, 3, 4)))
            assert len(lefts) > 0
            assert {bool(left // 32 % 4 == 2) for left in lefts} == {held_out}


def test_crops_differ(split):
    for side in (split.train, split.test):
        assert len({image.numpy().tobytes() for image in side.images}) > 0.98 * len(side)


def test_crops_are_drawn_without_repetition():
    crops = draw_crops(100, 200, 16, 1000, np.random.default_rng(0), held_out=False)
    assert len(set(zip(crops.left.tolist(), crops.top.tolist(), strict=True))) == 1000


def test_sizes_and_balance(split):
    assert split.train.image_shape == (3, 16, 16)
    assert split.train.labels.bincount().tolist() == [1500] * 10
    assert split.test.labels.bincount().tolist() == [200] * 10
    uneven = load_data(DataConfig(source="textures", test_size=13, image_size=32)).test
    assert uneven.image_shape == (3, 32, 32)
    assert uneven.labels.bincount().tolist() == [2] * 3 + [1] * 7


@pytest.mark.parametrize("name", ["brick", "coffee", "chelsea"])
def test_photograph_is_halved_by_block_averages(name):
    original = getattr(skimage.data, name)()
    original = np.stack([original] * 3, axis=2) if original.ndim == 2 else original
    even = original[: original.shape[0] // 2 * 2, : original.shape[1] // 2 * 2]
    expected = downscale_local_mean(even.astype(np.float64), (2, 2, 1))
    assert np.abs(photograph(name) - expected).max() <= 0.5


def test_one_seed_gives_the_same_crops(split):
    again, other = (load_data(DataConfig(source="textures", seed=seed, test_size=100)) for seed in (0, 1))
    assert again.train.fingerprint() == split.train.fingerprint()
    assert other.train.fingerprint() != split.train.fingerprint()


def test_refusals_name_the_remedy():
    with pytest.raises(ValueError, match=r"data.test_size=0.2 is a share.*give a number"):
        load_data(DataConfig(source="textures", test_size=0.2))
    with pytest.raises(
        ValueError, match=r"data.image_size=128: .* train crops, 1500 wanted; lower image_size"
    ):
        load_data(DataConfig(source="textures", image_size=128))
    with pytest.raises(ValueError, match=r"lacks data/unicorn.png; install scikit-image"):
        photograph("unicorn")
