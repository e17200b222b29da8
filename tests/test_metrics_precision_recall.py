"""Precision, recall, density and coverage against a naive loop, closed forms and fixtures."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from counterpoint.metrics.precision_recall import density_coverage, improved_precision_recall


def formula_grid() -> tuple[torch.Tensor, torch.Tensor]:
    i, j = np.arange(50)[:, None], np.arange(6)[None, :]
    x = np.sin(1 + 0.7 * i + 1.3 * j + 0.05 * i * j)[:40]
    y = 0.8 * np.cos(0.3 + 0.9 * i + 0.4 * j + 0.03 * i * j) + 0.1 * j
    return torch.tensor(x), torch.tensor(y)


def loop_all(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density, coverage by the definitions, one pair at a time."""

    def radius(points, index):
        others = [np.linalg.norm(points[index] - other) for n, other in enumerate(points) if n != index]
        return sorted(others)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, j) for j in range(len(fake))]
    gaps = [[np.linalg.norm(x - y) for y in fake] for x in real]
    rows, columns = range(len(real)), range(len(fake))
    precision = np.mean([any(gaps[i][j] <= real_radii[i] for i in rows) for j in columns])
    recall = np.mean([any(gaps[i][j] <= fake_radii[j] for j in columns) for i in rows])
    density = sum(gaps[i][j] < real_radii[i] for i in rows for j in columns) / (k * len(fake))
    coverage = np.mean([any(gaps[i][j] < real_radii[i] for j in columns) for i in rows])
    return float(precision), float(recall), float(density), float(coverage)


def every(real: torch.Tensor, fake: torch.Tensor, k: int, block: int = 1024) -> tuple[float, ...]:
    return *improved_precision_recall(real, fake, k, block), *density_coverage(real, fake, k, block)


@pytest.mark.parametrize("block", [1, 13, 1024])
def test_formula_grid(block):
    x, y = formula_grid()
    assert every(x, y, 3, block) == pytest.approx((0.66, 0.20, 0.5333333333333333, 0.50), abs=1e-12)
    assert every(x, y, 5, block) == pytest.approx((0.80, 0.45, 0.568, 0.525), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_equals_a_naive_loop(k):
    rng = np.random.default_rng(k)
    real, fake = rng.normal(size=(31, 3)), rng.normal(0.7, 0.8, size=(24, 3))
    expected = loop_all(real, fake, k)
    assert every(torch.tensor(real), torch.tensor(fake), k, block=10) == pytest.approx(expected, abs=1e-12)


def test_gaussians():
    real = torch.tensor(np.random.RandomState(0).standard_normal((1000, 64)))
    fake = torch.tensor(0.9 * np.random.RandomState(1).standard_normal((1000, 64)) + 0.1)
    assert every(real, fake, 5) == pytest.approx((0.930, 0.351, 3.1708, 0.999), abs=1e-12)
    assert every(real, fake, 3) == pytest.approx((0.892, 0.254, 3.305667, 0.992), abs=1e-6)
    same = torch.tensor(np.random.RandomState(2).standard_normal((1000, 64)))
    assert every(real, same, 5) == pytest.approx((0.700, 0.733, 0.959, 0.964), abs=1e-3)


def test_digits_whose_distances_have_ties():
    pixels = load_digits().data / 16
    real, fake = pixels[0::2], pixels[1::2]
    obtained = every(torch.tensor(real), torch.tensor(fake), 5)
    radii, gaps = np.sort(cdist(fake, fake), axis=1)[:, 5], cdist(real, fake)
    open_balls, closed_balls = ((inside.any(axis=1).mean()) for inside in (gaps < radii, gaps <= radii))
    assert open_balls == pytest.approx(0.961068, abs=1e-6)
    # The published definition is the closed ball; on 17 grey levels two digits lie exactly on a border.
    assert closed_balls == pytest.approx(open_balls + 2 / 899)
    assert obtained == pytest.approx((0.955457, closed_balls, 0.970601, 0.967742), abs=1e-6)


def test_mode_drop_lowers_recall_and_not_precision():
    digits = load_digits()
    pixels, odd = torch.tensor(digits.data / 16), np.arange(len(digits.data)) % 2 == 1
    fake = pixels[odd & (digits.target == 0)]
    precision, recall, _, coverage = every(pixels[0::2], fake, 5)
    assert precision == pytest.approx(0.955, abs=1e-3)
    assert (recall, coverage) == pytest.approx((0.0957, 0.0968), abs=1e-3)


def test_coverage_of_equal_distributions_has_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(2, 400, 2, generator=generator) for _ in range(100)]
    coverage = np.mean([density_coverage(real, fake, k=3)[1] for real, fake in draws])
    expected = 1 - np.prod([(400 - i) / (800 - i) for i in range(1, 4)])
    assert coverage == pytest.approx(expected, abs=0.008)


def test_a_copy_and_duplicates_lie_on_the_border_of_their_balls():
    x, _ = formula_grid()
    assert improved_precision_recall(x, x) == (1.0, 1.0)
    point = torch.ones(6, 2)
    assert improved_precision_recall(point, point) == (1.0, 1.0)
    assert density_coverage(point, point) == (0.0, 0.0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="not \\[N,d\\]"):
        improved_precision_recall(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="k=3 with 9 real and 3 generated"):
        improved_precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="k=0"):
        density_coverage(torch.zeros(9, 2), torch.zeros(9, 2), k=0)
