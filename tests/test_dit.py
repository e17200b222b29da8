"""The diffusion transformer as any network here, and its learned variance's loss against closed forms."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from scipy import stats
from tiny import CLASSES, SIDE, digits
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from counterpoint import learned_variance
from counterpoint.diffusion import (
    NoiseConfig,
    NoisyBatch,
    PredictionType,
    build_noise_scheduler,
    draw_noisy_batch,
    noisy_input,
    training_target,
)
from counterpoint.dit import DiT, DiTConfig, DiTOutput, build_dit
from counterpoint.exactness import exact_sizes, unet_rows
from counterpoint.learned_variance import bound_terms, denoising_loss, log_likelihood, log_variances
from counterpoint.linear_attention import LinearAttention
from counterpoint.optimization import OptimizerConfig
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.seeds import generator
from counterpoint.teacher import TeacherConfig, TeacherTrainer
from counterpoint.unet import load_saved, null_class

SHAPE: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
NOISE = build_noise_scheduler(NoiseConfig())


def dit(trained: bool = True, **options: Any) -> DiT:
    """A small network; its modulation starts at zero, so `trained` shakes all weights."""
    network = build_dit(DiTConfig(**SHAPE | options), 1, SIDE, CLASSES, seed=0)
    if trained:
        for index, parameter in enumerate(network.parameters()):
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(0, "shake", index)))
    return network


def batch(count: int = 4) -> NoisyBatch:
    images = digits()
    return draw_noisy_batch(images.images, images.labels, count, 1000, CLASSES, 0.0, generator(0, "batch"))


@pytest.mark.parametrize("options", [{}, {"attention": "linear", "learned_variance": True, "patch_size": 2}])
def test_it_is_saved_and_loaded_alone_and_in_a_pipeline(tmp_path: Path, options: dict[str, Any]) -> None:
    network = dit(**options).eval()
    ClassConditionalPipeline(network, DDIMScheduler()).save_pretrained(tmp_path)
    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, 9, 3], 2, 2.0, generator(0, "images"), output_type="pt").images
    assert images.isfinite().all()
    x, labels = torch.randn(3, 1, SIDE, SIDE), torch.tensor([0, 9, 10])
    expected = network(x, torch.tensor(7), class_labels=labels)
    for loaded in (pipeline.unet, load_saved(tmp_path / "unet"), DiT.from_pretrained(tmp_path / "unet")):
        assert dict(loaded.config) == dict(network.config) | {"_name_or_path": loaded.config["_name_or_path"]}
        found = loaded(x, torch.tensor(7), class_labels=labels)
        torch.testing.assert_close(found.sample, expected.sample)
        assert (found.variance is None) == (not options)
    assert null_class(network) == CLASSES


def test_it_computes_what_diffusers_does() -> None:
    network = dit(learned_variance=True).eval()
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=2,
        sample_size=SIDE, patch_size=1, num_embeds_ada_norm=CLASSES,
    ).eval()  # fmt: skip
    theirs.load_state_dict(network.state_dict())
    x, labels = torch.randn(3, 1, SIDE, SIDE), torch.tensor([0, 4, 10])
    mean, raw = theirs(x, torch.tensor([3, 500, 999]), labels).sample.chunk(2, dim=1)
    found = network(x, torch.tensor([3, 500, 999]), class_labels=labels)
    torch.testing.assert_close(found.sample, mean)
    torch.testing.assert_close(found.variance, (raw + 1) / 2)


def test_timesteps_may_be_a_number_or_one_for_each_sample() -> None:
    network = dit().eval()
    x, labels = torch.randn(2, 1, SIDE, SIDE), torch.tensor([1, 2])
    each = network(x, torch.tensor([250.5, 250.5]), class_labels=labels).sample
    for timesteps in (250.5, torch.tensor(250.5), torch.tensor([250.5])):
        assert torch.equal(network(x, timesteps, class_labels=labels).sample, each)
    alone = network(x[1:], torch.tensor([250.5]), class_labels=labels[1:], return_dict=False)[0]
    torch.testing.assert_close(alone, each[1:])


def test_labels_are_not_dropped_in_training() -> None:
    network = dit().train()
    x, labels = torch.randn(64, 1, SIDE, SIDE), torch.arange(64) % CLASSES
    once = network(x, 5, class_labels=labels).sample
    assert torch.equal(once, network(x, 5, class_labels=labels).sample)
    assert torch.equal(once, network.eval()(x, 5, class_labels=labels).sample)


def test_it_starts_as_nothing_and_the_seed_is_all_its_weights_depend_on() -> None:
    first = dit(trained=False)
    assert first(torch.randn(2, 1, SIDE, SIDE), 5, class_labels=torch.tensor([0, 1])).sample.abs().max() == 0
    torch.rand(3)
    second = dit(trained=False)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_linear_attention_takes_the_place_of_softmax_in_every_block() -> None:
    network = dit(attention="linear", linear_heads=4, kernel_size=3)
    attention = [block.attn1 for block in network.transformer_blocks]
    assert [type(one) for one in attention] == [LinearAttention] * 2
    assert {(one.heads, one.local.kernel_size) for one in attention} == {(4, (3, 3))}


def test_rows_of_some_batch_sizes_are_exact() -> None:
    assert exact_sizes(unet_rows(dit().eval()), 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_attention_heads": 1, "attention_head_dim": 6}, "is 6: choose them"),
        ({"attention": "linear", "linear_heads": 3}, "linear_heads=3 does not divide the width of 16"),
        ({"kernel_size": 2}, "kernel_size=2 has no middle"),
        ({"patch_size": 3}, "dit.patch_size=3 does not divide a side of 8"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dit(**options)


def posterior(noise: DDPMScheduler, x_0: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, float]:
    """The mean and variance of q(x_{t-1} | x_t, x_0), by conditioning a joint Gaussian, in float64."""
    abar = noise.alphas_cumprod.double()
    before, beta = float(abar[t - 1]) if t else 1.0, float(noise.betas[t])
    # x_{t-1} ~ N(sqrt(before) x_0, 1 - before) and x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) e.
    prior, gain = 1.0 - before, math.sqrt(1.0 - beta)
    spread = gain * gain * prior + beta
    shift = prior * gain / spread * (x_t.double() - gain * math.sqrt(before) * x_0.double())
    return math.sqrt(before) * x_0.double() + shift, prior - prior * prior * gain * gain / spread


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_the_bound_is_the_divergence_of_the_two_reverse_steps(prediction: PredictionType) -> None:
    noise = build_noise_scheduler(NoiseConfig(prediction_type=prediction))
    drawn = batch(6)
    times = torch.tensor([1, 2, 40, 500, 800, 900])
    drawn = NoisyBatch(drawn.images, drawn.labels, times, drawn.noise)
    x_t, _ = noisy_input(noise, drawn.images, drawn.noise, times)
    target = training_target(noise, drawn.images, drawn.noise, times)
    output = target + 0.1 * torch.randn(target.shape, generator=generator(0, "error"))
    fraction = torch.rand(target.shape, generator=generator(0, "fraction"))
    found = bound_terms(output, fraction, noise, drawn, x_t)
    for i, t in enumerate(times.tolist()):
        abar = float(noise.alphas_cumprod[t])
        alpha, sigma = math.sqrt(abar), math.sqrt(1.0 - abar)
        x_0 = (x_t[i] - sigma * output[i]) / alpha if prediction == "epsilon" else (
            alpha * x_t[i] - sigma * output[i]
        )  # fmt: skip
        mean, variance = posterior(noise, x_0, x_t[i], t)
        true, least = posterior(noise, drawn.images[i], x_t[i], t)
        assert variance == least
        share = fraction[i].double()
        deviation = (share * math.log(float(noise.betas[t])) + (1 - share) * math.log(least)).mul(0.5).exp()
        exact = kl_divergence(Normal(true, torch.full_like(true, math.sqrt(least))), Normal(mean, deviation))
        assert float(found[i]) == pytest.approx(float(exact.mean() / math.log(2.0)), rel=2e-3)


def test_variances_lie_between_diffusers_own_ends() -> None:
    """Its scheduler of improved DDPM interpolates between the same two, for outputs of -1 and 1."""
    theirs = DDPMScheduler(**NOISE.config | {"variance_type": "learned_range"})
    for t in (1, 7, 500, 999):
        low, high = log_variances(torch.tensor([t]), NOISE, torch.zeros(1))
        for raw, ours in ((-1.0, low), (1.0, high), (0.2, 0.4 * low + 0.6 * high)):
            expected = theirs._get_variance(t, torch.tensor(raw))
            assert float(ours) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("mean", [-0.97, 0.1, 0.9])
def test_likelihoods_of_the_256_levels_are_a_gaussians_and_add_up_to_one(mean: float) -> None:
    levels = torch.arange(256).float() / 127.5 - 1.0
    edges = (levels[:-1] + levels[1:]) / 2
    cumulative = [0.0, *stats.norm(mean, 0.05).cdf(edges.numpy()), 1.0]
    expected = torch.tensor(cumulative[1:]) - torch.tensor(cumulative[:-1])
    found = log_likelihood(levels, torch.tensor(mean), torch.tensor(math.log(0.05))).exp()
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-3)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-4)


def test_the_first_timestep_is_the_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = batch(2)
    drawn = NoisyBatch(drawn.images, drawn.labels, torch.tensor([0, 500]), drawn.noise)
    x_t, _ = noisy_input(NOISE, drawn.images, drawn.noise, drawn.timesteps)
    target = training_target(NOISE, drawn.images, drawn.noise, drawn.timesteps)
    monkeypatch.setattr(learned_variance, "log_likelihood", lambda x, *_: torch.full_like(x, -math.log(8.0)))
    found = bound_terms(target, torch.zeros_like(target), NOISE, drawn, x_t)
    assert float(found[0]) == pytest.approx(3.0)
    # The true mean and variance: nothing is lost.
    assert float(found[1]) == pytest.approx(0.0, abs=1e-4)


class Fixed(torch.nn.Module):
    """A network that always says the same."""

    def __init__(self, prediction: Tensor, variance: Tensor | None) -> None:
        super().__init__()
        self.prediction = torch.nn.Parameter(prediction)
        self.variance = None if variance is None else torch.nn.Parameter(variance)

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> DiTOutput:
        return DiTOutput(sample=self.prediction, variance=self.variance)


def test_the_bound_teaches_the_variance_alone() -> None:
    drawn = batch()
    target = training_target(NOISE, drawn.images, drawn.noise, drawn.timesteps)
    wrong = target + 0.3
    plain, both = Fixed(wrong, None), Fixed(wrong, torch.full_like(target, 0.5))
    simple, hybrid = denoising_loss(plain, NOISE, drawn), denoising_loss(both, NOISE, drawn)
    x_t, _ = noisy_input(NOISE, drawn.images, drawn.noise, drawn.timesteps)
    assert both.variance is not None
    terms = bound_terms(wrong, both.variance, NOISE, drawn, x_t)
    assert float(simple.detach()) == pytest.approx(float(F.mse_loss(wrong, target)), rel=1e-5)
    # 0.001 times a thousand timesteps.
    assert float((hybrid - simple).detach()) == pytest.approx(float(terms.mean().detach()), rel=1e-4)
    simple.backward()
    hybrid.backward()
    assert plain.prediction.grad is not None
    torch.testing.assert_close(both.prediction.grad, plain.prediction.grad)
    assert both.variance.grad is not None
    assert both.variance.grad.abs().max() > 0


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_a_teacher_of_transformers_learns_prediction_and_variance(attention: str) -> None:
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=4, ema_decay=0.9)
    network = dit(trained=False, patch_size=2, attention=attention, learned_variance=True)
    config = TeacherConfig(steps=40, batch_size=24, optimizer=optimizer)
    teacher = TeacherTrainer(network, NOISE, digits(), config, seed=0)
    losses = [teacher.step(step)["loss"] for step in range(40)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    still = [name for name, p in network.named_parameters() if p.grad is not None and not p.abs().max()]
    assert still == []
