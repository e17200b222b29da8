"""Statistics of DPM-Solver-v3 against closed forms and against the paper's two passes done naively."""

import functools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from solver_parts import SIDE, Mixture, normal, schedule
from tiny import unet
from torch import Tensor

from counterpoint.seeds import generator
from counterpoint.solvers import model_statistics
from counterpoint.solvers.empirical_statistics import load_statistics, save_statistics
from counterpoint.solvers.model_statistics import (
    SUMS,
    EstimationConfig,
    Sums,
    Velocity,
    coefficients,
    describe,
    estimate,
    has_forward_mode,
    noise_levels,
    observe,
    probe_of,
    weights_fingerprint,
)

CENTRES = 0.5 * normal(5, 1, SIDE, SIDE, seed=1)
SPREAD = normal(1, SIDE, SIDE, seed=2).abs() + 0.3
LABELS = torch.arange(40) % 5


def config(**options: Any) -> EstimationConfig:
    return EstimationConfig(**{"samples": 60, "intervals": 24, "batch_size": 32, "clip": 50.0} | options)


def images() -> Tensor:
    return CENTRES[LABELS] + SPREAD * normal(40, 1, SIDE, SIDE, seed=3)


def signal_and_noise(levels: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = torch.sigmoid(2 * levels).sqrt(), torch.sigmoid(-2 * levels).sqrt()
    return alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)


def test_gaussian_classes_have_the_statistics_of_the_closed_form() -> None:
    """The score is linear: l = sigma^2 / (alpha^2 c^2 + sigma^2), f = -l mu of the class, f' = -l' mu."""
    noise = schedule()
    network = Mixture(noise, CENTRES, SPREAD, by_class=True)
    fine = config(intervals=120, samples=20)
    found = coefficients(estimate(network, noise, images(), LABELS, fine, seed=0), noise, fine, {})
    alpha, sigma = signal_and_noise(noise_levels(noise, 120))
    linear = sigma**2 / (alpha**2 * SPREAD**2 + sigma**2)
    torch.testing.assert_close(found.l, linear, atol=1e-9, rtol=1e-9)
    # dl/dlambda = -2 l (1 - l); the estimate takes it by differences on the grid, worse at its ends.
    torch.testing.assert_close(found.s, -2 * (1 - linear), atol=0.2, rtol=0)
    torch.testing.assert_close(found.b, torch.zeros_like(found.b), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_what_the_network_predicts_makes_no_difference(kind: str) -> None:
    found = []
    for noise in (schedule(), schedule(kind)):
        network, wanted = Mixture(noise, CENTRES, 0.4), config(samples=8)
        sums = estimate(network, noise, images(), LABELS, wanted, seed=0)
        found.append(coefficients(sums, noise, wanted, {}))
    for name in ("l", "s", "b"):
        first, second = (getattr(each, name) for each in found)
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_one_pass_finds_what_the_papers_two_passes_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """f' by the paper's formula from eps and its exact derivative, which a narrow difference comes near."""
    monkeypatch.setattr(model_statistics, "observe", lambda *given: observe(*given[:-1], 1e-4))
    noise = schedule("epsilon")
    network, wanted = Mixture(noise, CENTRES, 0.4), config(samples=12)
    batches = [wanted.model_copy(update={"batch_size": size}) for size in (12, 5)]
    first, again = (estimate(network, noise, images(), LABELS, each, seed=4) for each in batches)
    found = coefficients(first, noise, wanted, {})
    levels, eps_of = noise_levels(noise, 24), functools.partial(network.at, labels=LABELS[:1])
    states, probes = _replayed(levels, 12, seed=4)
    products = []
    for i, level in enumerate(levels):
        _, moved = torch.func.jvp(lambda z, at=level: eps_of(z, at)["epsilon"], (states[:, i],), (probes,))
        products.append(torch.sigmoid(-2 * level).sqrt() * moved * probes)
    linear = torch.stack(products).mean(1)
    torch.testing.assert_close(found.l, linear, atol=1e-9, rtol=1e-9)
    rate = torch.from_numpy(np.gradient(linear.numpy(), levels.numpy(), axis=0, edge_order=2))
    for i, level in enumerate(levels):
        alpha, sigma = torch.sigmoid(2 * level).sqrt(), torch.sigmoid(-2 * level).sqrt()
        x = states[:, i]
        eps = eps_of(x, level)["epsilon"]
        _, deps = torch.func.jvp(
            lambda z, at: eps_of(z, at)["epsilon"],
            (x, level),
            (sigma**2 * x - sigma * eps, torch.ones_like(level)),
        )
        f = (sigma * eps - linear[i] * x) / alpha
        df = sigma / alpha * ((linear[i] - 1) * eps + deps) - rate[i] * x / alpha
        slope = ((f * df).mean(0) - f.mean(0) * df.mean(0)) / ((f * f).mean(0) - f.mean(0) ** 2)
        torch.testing.assert_close(found.s[i], slope.clamp(-50, 50), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.b[i], df.mean(0) - found.s[i] * f.mean(0), atol=1e-6, rtol=1e-6)
    for name in SUMS:
        np.testing.assert_allclose(again.sums[name], first.sums[name], atol=1e-9, rtol=1e-9)


def _replayed(levels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """States [count,levels,C,H,W] and probes [count,C,H,W], from the streams that the samples have."""
    states, probes, data = [], [], images()
    alpha, sigma = signal_and_noise(levels)
    for index in range(count):
        stream = generator(seed, "statistics", index)
        clean = data[int(torch.randint(len(data), (), generator=stream))]
        noise = torch.randn(clean.shape, generator=stream, dtype=torch.float64)
        probes.append(probe_of(index, tuple(clean.shape), seed))
        states.append(alpha * clean + sigma * noise)
    return torch.stack(states), torch.stack(probes)


def test_shards_add_up_to_the_whole_in_any_order() -> None:
    noise = schedule()
    network = Mixture(noise, CENTRES, 0.4)
    small = config(samples=17, intervals=16)
    part = functools.partial(estimate, network, noise, images(), LABELS, small, 2)
    whole, shards = part(), [part(i, 3) for i in range(3)]
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = functools.reduce(Sums.merge, [shards[i] for i in order])
        assert merged.count == whole.count == 17
        for name in SUMS:
            np.testing.assert_allclose(merged.sums[name], whole.sums[name], atol=1e-9, rtol=1e-9)


def test_a_block_of_probes_finds_a_diagonal_exactly() -> None:
    matrix = normal(12, 12)
    for first in (0, 16):
        probes = torch.stack([probe_of(first + i, (1, 3, 4), seed=1) for i in range(16)]).flatten(1)
        assert bool((probes.abs() == 1).all())
        torch.testing.assert_close(((probes @ matrix.T) * probes).mean(0), matrix.diagonal())
    assert not torch.equal(probe_of(0, (12,), 1), probe_of(16, (12,), 1))


def test_forward_mode_and_differences_agree_on_a_unet() -> None:
    noise, labels = schedule(betas="squaredcos_cap_v2"), torch.tensor([1, 7])
    field = Velocity(unet().eval(), noise, labels)
    x, probe, level = normal(2, 1, 8, 8), normal(2, 1, 8, 8, seed=5).sign(), torch.tensor(0.3).double()
    assert has_forward_mode(field, x, level)
    exact, near = (observe(field, x, level, probe, forward, 0.2) for forward in (True, False))
    for one, other in zip(exact, near, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_layers_without_forward_mode_are_told(caplog: pytest.LogCaptureFixture) -> None:
    field = Velocity(unet(mid_attention=True).eval(), schedule(), torch.tensor([1]))
    with caplog.at_level(logging.INFO):
        assert not has_forward_mode(field, normal(1, 1, 8, 8), torch.tensor(0.3).double())
    assert "by differences, as forward mode fails" in caplog.text


def test_guided_statistics_are_those_of_the_guided_field() -> None:
    network, noise, labels = unet().eval(), schedule(), torch.tensor([1, 7])
    x, level = normal(2, 1, 8, 8), torch.tensor(-0.4).double()
    with torch.no_grad():
        plain, none, guided = (
            Velocity(network, noise, of, scale)(x, level)
            for of, scale in ((labels, 1.0), (torch.tensor([10, 10]), 1.0), (labels, 2.5))
        )
    torch.testing.assert_close(guided, none + 2.5 * (plain - none), atol=1e-5, rtol=1e-5)
    settings = config(guidance_scale=2.5, samples=2, intervals=16, own_sample_steps=2)
    data = torch.zeros(3, 1, 8, 8)
    sums = estimate(network, noise, data, torch.tensor([1, 2, 3]), settings, seed=0)
    assert sums.count == 2
    clean = sums.sums["xx"][-1].mean() / 2
    assert clean > 0.01  # the model's own samples, not the data


def test_a_ridge_and_a_clip_bound_s() -> None:
    noise = schedule()
    network = Mixture(noise, CENTRES, 0.2)
    sums = estimate(network, noise, images(), LABELS, config(), seed=0)
    raw, ridged, clipped = (
        coefficients(sums, noise, config(**options), {}).s for options in ({}, {"ridge": 0.05}, {"clip": 1.0})
    )
    assert bool((ridged.abs() <= raw.abs() + 1e-12).all())
    torch.testing.assert_close(clipped, raw.clamp(-1.0, 1.0))


def test_a_file_gives_back_what_it_was_given(tmp_path: Any) -> None:
    network, noise = unet(), schedule()
    small = config(samples=2, intervals=16)
    made_for = describe(network, noise, small, 3)
    sums = estimate(network, noise, torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), small, 3)
    written = coefficients(sums, noise, small, made_for)
    save_statistics(tmp_path / "statistics.safetensors", written)
    read = load_statistics(f"file://{tmp_path}/statistics.safetensors")
    assert read.made_for == made_for
    assert made_for["weights"] == weights_fingerprint(unet())
    assert made_for["weights"] != weights_fingerprint(unet(seed=1))
    for name in ("lambdas", "l", "s", "b"):
        assert torch.equal(getattr(read, name), getattr(written, name))
