"""Sharpness against a naive Fourier sum, single waves and blurring."""

import cmath
import math

import pytest
import torch

from counterpoint.data import DataConfig, load_data
from counterpoint.metrics.sharpness import high_frequency_energy, sharpness_ratio


def wave(cycles: float, size: int = 16) -> torch.Tensor:
    return torch.cos(2 * math.pi * cycles * torch.arange(size) / size).expand(1, 1, size, size)


def loop_energy(image: list[list[float]]) -> float:
    size, total, high = len(image), 0.0, 0.0
    for u in range(size):
        for v in range(size):
            terms = (
                image[y][x] * cmath.exp(-2j * math.pi * (u * y + v * x) / size)
                for y in range(size)
                for x in range(size)
            )
            radius = math.hypot(min(u, size - u) / size, min(v, size - v) / size)
            power = abs(sum(terms)) ** 2
            total += power if radius > 0 else 0
            high += power if radius >= 0.25 else 0
    return high / total


def test_equals_a_naive_fourier_sum():
    image = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    assert high_frequency_energy(image[None, None]) == pytest.approx(loop_energy(image.tolist()), abs=1e-9)


def test_single_waves_lie_on_their_side_of_the_cutoff():
    assert high_frequency_energy(wave(3)) == pytest.approx(0, abs=1e-9)
    assert high_frequency_energy(wave(5)) == pytest.approx(1)
    assert high_frequency_energy(wave(3) + wave(5) + 7) == pytest.approx(0.5, abs=1e-6)


def test_blurred_digits_are_softer():
    images = load_data(DataConfig()).test.images
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    assert sharpness_ratio(images, images) == 1.0
    assert sharpness_ratio(blurred, images) < 0.5


def test_flat_images():
    flat = torch.ones(2, 1, 4, 4)
    assert high_frequency_energy(flat) == 0.0
    with pytest.raises(ValueError, match="no energy"):
        sharpness_ratio(wave(5), flat)
