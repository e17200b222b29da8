"""Moments and Frechet distance against SciPy, closed forms and published-formula fixtures."""

from itertools import permutations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits

from counterpoint.metrics.frechet import frechet_distance
from counterpoint.metrics.moments import Moments


def gaussian(mean, covariance) -> Moments:
    """Moments of exactly this mean and covariance."""
    covariance = np.asarray(covariance, dtype=float)
    arrays = {"count": np.array(101), "mean": np.asarray(mean, dtype=float), "scatter": covariance * 100}
    return Moments.from_arrays(arrays)


def scipy_frechet(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a) + np.trace(b) - 2 * np.trace(root).real)


def formula_grid() -> tuple[np.ndarray, np.ndarray]:
    i, j = np.arange(50)[:, None], np.arange(6)[None, :]
    x = np.sin(1 + 0.7 * i + 1.3 * j + 0.05 * i * j)[:40]
    y = 0.8 * np.cos(0.3 + 0.9 * i + 0.4 * j + 0.03 * i * j) + 0.1 * j
    assert np.isclose(x.sum(), 1.398460137985579)
    assert np.isclose(y.sum(), 72.59182415622637)
    return x, y


def test_moments_equal_numpy_cov():
    features = np.random.default_rng(0).normal(3, 2, (57, 5))
    moments = Moments.of(torch.tensor(features))
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), atol=1e-12)
    np.testing.assert_allclose(moments.mean, features.mean(0), atol=1e-12)


def test_shards_merge_to_the_single_pass_in_any_order():
    # A mean of 1,000 is where sum(xx^T) - n mu mu^T loses its digits.
    features = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) + 1000
    shards = [Moments.of(part) for part in features.split([1, 120, 79, 100])]
    whole = Moments.of(features)
    for order in permutations(shards):
        merged = Moments(8)
        for shard in order:
            merged = merged.merge(shard)
        assert merged.count == 300
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=0, atol=1e-8)
        np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=0, atol=1e-8)


def test_updates_stream_and_empty_batches_change_nothing():
    features = torch.randn(90, 4, generator=torch.Generator().manual_seed(1))
    moments = Moments(4)
    for part in (features[:1], features[1:1], features[1:50], features[50:]):
        moments.update(part)
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, atol=1e-12)


def test_merge_leaves_its_operands_alone():
    a, b = Moments.of(np.eye(3)), Moments.of(2 * np.eye(3))
    before = a.scatter.copy()
    a.merge(b)
    assert a.count == 3
    np.testing.assert_array_equal(a.scatter, before)


def test_moments_survive_npz(tmp_path):
    moments = Moments.of(np.random.default_rng(0).normal(size=(20, 3)))
    np.savez(tmp_path / "moments.npz", **moments.as_arrays())
    with np.load(tmp_path / "moments.npz") as arrays:
        back = Moments.from_arrays(arrays)
    assert back.count == 20
    np.testing.assert_array_equal(back.covariance, moments.covariance)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3), "not \\[N,d\\]"),
        (torch.tensor([[0.0, float("nan")], [1.0, 2.0]]), "1 of 2 images are not finite"),
    ],
)
def test_bad_features_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        Moments.of(features)


def test_moments_refuse_what_does_not_belong_together():
    with pytest.raises(ValueError, match="dimension 2 and 3"):
        Moments(2).merge(Moments(3))
    with pytest.raises(ValueError, match="at least 2"):
        _ = Moments.of(np.zeros((1, 2))).covariance
    with pytest.raises(ValueError, match="lack"):
        Moments.from_arrays({"mean": np.zeros(2)})
    with pytest.raises(ValueError, match="do not belong together"):
        Moments.from_arrays({"count": np.array(3), "mean": np.zeros(2), "scatter": np.zeros((3, 3))})
    with pytest.raises(ValueError, match="dimensions 2 and 3"):
        frechet_distance(gaussian(np.zeros(2), np.eye(2)), gaussian(np.zeros(3), np.eye(3)))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (gaussian([0, 0], np.eye(2)), gaussian([3, 4], 4 * np.eye(2)), 27.0),
        (gaussian([0, 0], [[2, 1], [1, 2]]), gaussian([0, 0], np.diag([1, 3])), 0.5166852264521173),
        (gaussian([0, 0], np.diag([1, 0])), gaussian([0, 0], np.diag([0, 1])), 2.0),
        (gaussian([0, 0], np.zeros((2, 2))), gaussian([1, 0], np.zeros((2, 2))), 1.0),
    ],
)
def test_frechet_closed_forms(a, b, expected):
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-12)


def test_frechet_on_the_formula_grid():
    x, y = formula_grid()
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(2.305174519834603, abs=1e-10)
    assert scipy_frechet(x, y) == pytest.approx(2.305174519834603, abs=1e-10)


def test_frechet_of_shifted_gaussians():
    x = np.random.RandomState(0).standard_normal((1000, 64))
    y = 0.9 * np.random.RandomState(1).standard_normal((1000, 64)) + 0.1
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(3.289965606077, abs=1e-9)
    z = np.random.RandomState(2).standard_normal((1000, 64))
    assert frechet_distance(Moments.of(x), Moments.of(z)) == pytest.approx(2.245164481305352, abs=1e-9)


def test_frechet_on_digits_whose_covariance_is_singular():
    digits = load_digits()
    pixels = digits.data / 16
    even, odd = pixels[0::2], pixels[1::2]
    assert np.linalg.matrix_rank(np.cov(even, rowvar=False)) < 64
    assert frechet_distance(Moments.of(even), Moments.of(odd)) == pytest.approx(0.07052481833786217, abs=1e-9)
    zero, one = pixels[digits.target == 0], pixels[digits.target == 1]
    assert frechet_distance(Moments.of(zero), Moments.of(one)) == pytest.approx(9.244389286007852, abs=1e-9)
    noisy = np.clip(even + np.random.RandomState(0).normal(0, 0.1, even.shape), 0, 1)
    distance = frechet_distance(Moments.of(even), Moments.of(noisy))
    assert distance == pytest.approx(0.11057516587568905, abs=1e-9)


def test_frechet_with_fewer_vectors_than_dimensions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 30)), rng.normal(1, 2, size=(9, 30))
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.norm(centred_x @ centred_y.T, "nuc") / np.sqrt(11 * 8)
    traces = (centred_x**2).sum() / 11 + (centred_y**2).sum() / 8
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + traces - 2 * cross
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, abs=1e-10)
    assert abs(frechet_distance(Moments.of(x), Moments.of(x))) < 1e-12
