"""Unbiased kernel distance against scikit-learn's kernel, a naive loop and fixtures."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import polynomial_kernel

from counterpoint.metrics.kernel import kernel_distance


def formula_grid() -> tuple[np.ndarray, np.ndarray]:
    i, j = np.arange(50)[:, None], np.arange(6)[None, :]
    x = np.sin(1 + 0.7 * i + 1.3 * j + 0.05 * i * j)[:40]
    return x, 0.8 * np.cos(0.3 + 0.9 * i + 0.4 * j + 0.03 * i * j) + 0.1 * j


def distance(x: np.ndarray, y: np.ndarray, block: int = 2048) -> float:
    return kernel_distance(torch.tensor(x), torch.tensor(y), block)


def sklearn_distance(x: np.ndarray, y: np.ndarray) -> float:
    xx, yy, xy = (polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    m, n = len(x), len(y)
    within = (xx.sum() - np.trace(xx)) / (m * (m - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.mean())


def loop_distance(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(z):
        return np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    return float(within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y]))


@pytest.mark.parametrize("block", [1, 7, 40, 2048])
def test_formula_grid(block):
    x, y = formula_grid()
    assert distance(x, y[:40], block) == pytest.approx(0.40376741243688397, abs=1e-12)
    assert distance(x, y, block) == pytest.approx(0.37088320803999286, abs=1e-12)
    assert distance(x, x, block) == pytest.approx(-0.11567020513125215, abs=1e-12)


def test_equals_a_naive_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), rng.normal(0.5, 2, size=(7, 4))
    assert distance(x, y) == pytest.approx(loop_distance(x, y), abs=1e-12)


def test_equals_scikit_learn_on_gaussians():
    x = np.random.RandomState(0).standard_normal((1000, 64))
    y = 0.9 * np.random.RandomState(1).standard_normal((1000, 64)) + 0.1
    z = np.random.RandomState(2).standard_normal((1000, 64))
    assert distance(x, y) == pytest.approx(0.03573266365864258, abs=1e-12)
    assert distance(x, z) == pytest.approx(0.0010190021153886342, abs=1e-12)
    assert distance(x, y[:300]) == pytest.approx(sklearn_distance(x, y[:300]), abs=1e-12)


def test_digits():
    digits = load_digits()
    pixels = digits.data / 16
    assert distance(pixels[0::2], pixels[1::2]) == pytest.approx(-0.0003370384521708125, abs=1e-12)
    zero, one = pixels[digits.target == 0], pixels[digits.target == 1]
    assert distance(zero, one) == pytest.approx(0.4441391710782132, abs=1e-12)


def test_float32_features_are_summed_in_float64():
    x, y = (part.astype(np.float32) for part in formula_grid())
    assert distance(x, y) == pytest.approx(distance(x.astype(np.float64), y.astype(np.float64)), abs=1e-14)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="not \\[N,d\\]"):
        kernel_distance(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="1 and 4 vectors"):
        kernel_distance(torch.zeros(1, 2), torch.zeros(4, 2))
