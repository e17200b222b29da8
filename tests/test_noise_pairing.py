"""Noise is paired with images as the two papers say; what is not paired stays what it was, bit for bit."""

from itertools import permutations
from typing import Any

import pytest
import torch
from tiny import digits, unet
from torch import Tensor

from counterpoint.data import DataConfig, load_data
from counterpoint.diffusion import NoiseConfig, NoisyBatch, build_noise_scheduler
from counterpoint.flow import flow_sigmas
from counterpoint.noise_pairing import Paired, PairingConfig, assign, distance, nearest, pair
from counterpoint.sampling import SamplerConfig, build_sampler
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.seeds import generator
from counterpoint.teacher import TeacherConfig, TeacherTrainer


def draw(count: int, *name: int | str) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=generator(0, "draw", *name))


def batch(count: int = 64, step: int = 0) -> NoisyBatch:
    train = load_data(DataConfig()).train
    index = torch.randint(0, len(train), (count,), generator=generator(0, "index", step))
    return NoisyBatch(
        train.images[index], train.labels[index], torch.arange(count), draw(count, "noise", step)
    )


def paired(whole: NoisyBatch, step: int = 0, mean: Tensor | None = None, **options: Any) -> Paired:
    return pair(whole, PairingConfig(**options), mean, 7, step)


def test_an_assignment_deals_out_the_same_noise() -> None:
    images, noise = batch().images, draw(64)
    dealt = assign(images, noise)
    assert sorted(row.tolist() for row in dealt.flatten(1)) == sorted(
        row.tolist() for row in noise.flatten(1)
    )
    assert not torch.equal(dealt, noise)


@pytest.mark.parametrize("case", range(4))
def test_an_assignment_is_the_best_of_all_orders(case: int) -> None:
    images, noise = batch(5, case).images, draw(5, case)
    best = min(float(distance(images, noise[list(order)]).sum()) for order in permutations(range(5)))
    assert float(distance(images, assign(images, noise)).sum()) == pytest.approx(best, rel=1e-6)


def test_the_nearest_noise_is_found_one_by_one_as_all_at_once() -> None:
    images, drawn = batch().images, torch.stack([draw(64, i) for i in range(6)])
    all_distances = (images[None] - drawn).square().flatten(2).sum(dim=2)
    expected = drawn[all_distances.argmin(dim=0), torch.arange(64)]
    assert torch.equal(nearest(images, drawn[0], iter(drawn[1:])), expected)


def test_one_candidate_is_independent_noise() -> None:
    whole = batch()
    assert torch.equal(paired(whole, kind="nearest", candidates=1).batch.noise, whole.noise)
    plain, one = (trainer(kind=kind, candidates=1) for kind in ("none", "nearest"))
    for step in range(3):
        assert plain.step(step)["loss"] == one.step(step)["loss"]


def test_more_candidates_keep_the_first() -> None:
    """So that arms that differ in their number differ in nothing else."""
    whole = batch()
    two, four = (paired(whole, kind="nearest", candidates=k).batch.noise for k in (2, 4))
    same = (two == four).flatten(1).all(dim=1)
    assert 0.3 < same.float().mean() < 0.7
    kept = (two == whole.noise).flatten(1).all(dim=1)
    assert 0.3 < kept.float().mean() < 0.7


@pytest.mark.parametrize("kind", ["assignment", "nearest"])
def test_labels_images_and_timesteps_stay_in_place(kind: str) -> None:
    whole = batch()
    found = paired(whole, kind=kind).batch
    for name in ("images", "labels", "timesteps"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert not torch.equal(found.noise, whole.noise)


@pytest.mark.parametrize(
    ("candidates", "norm", "drop"), [(2, 0.963, 0.046), (4, 0.936, 0.082), (8, 0.918, 0.113)]
)
def test_noise_shrinks_on_digits_as_measured(candidates: int, norm: float, drop: float) -> None:
    """64 values of standard deviation 0.75; independent noise has a mean norm of 0.996 sqrt(64)."""
    found = [paired(batch(256, i), i, kind="nearest", candidates=candidates) for i in range(16)]
    assert sum(p.noise_norm for p in found) / 16 == pytest.approx(norm, abs=0.006)
    assert sum(p.distance_drop for p in found) / 16 == pytest.approx(drop, abs=0.006)


def test_what_a_choice_does_to_the_noise_can_be_taken_back() -> None:
    mean = load_data(DataConfig()).train.images.mean(dim=0)
    size = mean.square().mean().sqrt()

    def leaning(centre: Tensor | None, **options: Any) -> float:
        """How far the chosen noise leans towards the mean image, in the mean image's own direction."""
        found = [paired(batch(256, i), i, centre, kind="nearest", **options).batch.noise for i in range(8)]
        return float((torch.cat(found) * mean / size).mean())

    plain, centred = leaning(None), leaning(mean, centred=True)
    assert plain > 0.05
    assert abs(centred) < 0.3 * plain
    rescaled = paired(batch(), kind="nearest", candidates=8, rescale=True)
    assert rescaled.batch.noise.square().mean() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("options", [{"kind": "assignment", "rescale": True}, {"centred": True}])
def test_a_correction_of_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="corrects what kind=nearest does"):
        PairingConfig(**options)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_scaled_images_are_another_schedule(scale: float) -> None:
    """What the network sees is the state of images times `scale`, brought to the variance of the schedule."""
    plain = build_noise_scheduler(NoiseConfig())
    scaled = build_noise_scheduler(NoiseConfig(image_scale=scale))
    images, noise = batch(4).images, draw(4)
    times = torch.tensor([0, 300, 700, 999])
    abar = plain.alphas_cumprod[times].reshape(-1, 1, 1, 1)
    expected = plain.add_noise(scale * images, noise, times) / (scale**2 * abar + 1 - abar).sqrt()
    torch.testing.assert_close(scaled.add_noise(images, noise, times), expected, rtol=2e-4, atol=2e-4)


def test_samplers_and_students_take_over_the_scale_of_images() -> None:
    config = NoiseConfig(image_scale=2.0)
    abar = build_noise_scheduler(config).alphas_cumprod
    assert torch.equal(build_sampler(SamplerConfig(), build_noise_scheduler(config)).alphas_cumprod, abar)
    student = TimestepShiftScheduler(**config.diffusion_options())
    assert torch.equal(TimestepShiftScheduler.from_config(dict(student.config)).alphas_cumprod, abar)
    with pytest.raises(ValueError, match=r"image_scale=2\.0 has no meaning with process=flow"):
        NoiseConfig(process="flow", image_scale=2.0)


def test_the_shift_of_a_flow_is_its_scale_of_images() -> None:
    """(1 - u) c x + u e, divided by (1 - u) c + u, is the state at sigma = u / ((1 - u) c + u)."""
    scale, u = 2.0, torch.arange(1, 1001) / 1000
    sigmas = flow_sigmas(torch.arange(1000), 1000, 1 / scale)
    torch.testing.assert_close(sigmas, u / ((1 - u) * scale + u))


def trainer(**pairing: Any) -> TeacherTrainer:
    config = TeacherConfig(steps=6, batch_size=12, pairing=PairingConfig(**pairing))
    return TeacherTrainer(unet(), build_noise_scheduler(NoiseConfig()), digits(), config, 0)


@pytest.mark.parametrize("pairing", [{"kind": "assignment"}, {"kind": "nearest", "centred": True}])
def test_a_teacher_trains_on_pairs_and_says_what_they_did(pairing: dict[str, Any]) -> None:
    figures = trainer(**pairing).step(0)
    assert figures["loss"] != trainer().step(0)["loss"]
    assert 0.0 < figures["distance_drop"] < 0.2
    assert 0.8 < figures["noise_norm"] < 1.05
    assert "noise_norm" not in trainer().step(0)
