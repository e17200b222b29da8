"""Flow matching against diffusers' forward process, closed-form velocities and a naive Euler loop."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from flow_parts import MixtureFlow
from pydantic import ValidationError
from tiny import unet
from torch import Tensor

from cluster.storage import RunStore
from counterpoint.diffusion import (
    LatentNoiseConfig,
    NoiseConfig,
    NoisyBatch,
    build_noise_scheduler,
    diffusion_loss,
    noisy_input,
    training_target,
)
from counterpoint.footprint.micro_steps import teacher_micro_step
from counterpoint.pairs import PairsConfig, make_pairs
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.sampling import SamplerConfig, build_sampler, default_sampler, sample
from jobs.config import dump_config
from jobs.distill import prepare
from jobs.settings import DistillConfig, TrainConfig

FLOW = NoiseConfig(process="flow")
NOISE = build_noise_scheduler(FLOW)
LEVELS = torch.tensor([0, 249, 700, 999])
LABELS = torch.zeros(4, dtype=torch.long)


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    x, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, noise


def gaussian(mean: float = 0.5, deviation: float = 0.3) -> MixtureFlow:
    return MixtureFlow(torch.full((1, 1, 8, 8), mean), torch.zeros(1, dtype=torch.long), 1, deviation)


def euler(config: NoiseConfig = FLOW) -> Any:
    return build_sampler(default_sampler(config), build_noise_scheduler(config))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_forward_process_is_diffusers(shift: float) -> None:
    noise, (x, e) = build_noise_scheduler(NoiseConfig(process="flow", shift=shift)), draw()
    other = FlowMatchEulerDiscreteScheduler(shift=shift)
    expected = other.timesteps[999 - LEVELS]
    state, heard = noisy_input(noise, x, e, LEVELS)
    torch.testing.assert_close(heard, expected)
    torch.testing.assert_close(state, other.scale_noise(x, expected, e))


def test_the_target_is_how_the_state_moves_with_sigma() -> None:
    x, e = (part.double() for part in draw())
    before, heard = noisy_input(NOISE, x, e, LEVELS[1:3].repeat(2))
    after, later = noisy_input(NOISE, x, e, LEVELS[1:3].repeat(2) + 1)
    slope = (after - before) / ((later - heard) / 1000).reshape(-1, 1, 1, 1)
    target = training_target(NOISE, x, e, LEVELS)
    torch.testing.assert_close(slope, target, rtol=1e-3, atol=1e-3)


def test_the_loss_is_the_velocitys_squared_error() -> None:
    network, (x, e), labels = unet(), draw(), torch.tensor([0, 3, 10, 9])
    sigma = (LEVELS + 1) / 1000
    total = 0.0
    for i, s in enumerate(sigma):
        state = (1 - s) * x[i : i + 1] + s * e[i : i + 1]
        output = network(state, 1000 * s, class_labels=labels[i : i + 1]).sample
        total += float((output - (e - x)[i : i + 1]).square().mean().detach()) / 4
    batch = NoisyBatch(x, labels, LEVELS, e)
    assert float(diffusion_loss(network, NOISE, batch).detach()) == pytest.approx(total, rel=1e-4)


def test_the_exact_velocity_has_the_least_loss() -> None:
    stream = torch.Generator().manual_seed(0)
    x = 0.5 + 0.3 * torch.randn(4000, 1, 8, 8, generator=stream)
    e = torch.randn(4000, 1, 8, 8, generator=stream)
    levels = torch.full((4000,), 499)
    batch = NoisyBatch(x, torch.zeros(4000, dtype=torch.long), levels, e)
    # Var(e - x_0 | x_t) of jointly Gaussian e and x_0 at sigma = 1/2.
    left = 1.09 - (0.5 - 0.5 * 0.09) ** 2 / (0.25 * 1.09)
    assert float(diffusion_loss(gaussian(), NOISE, batch)) == pytest.approx(left, rel=0.02)
    assert float(diffusion_loss(gaussian(0.6), NOISE, batch)) > 1.02 * left


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_is_eulers_method_in_steps_of_equal_length(shift: float) -> None:
    network, (_, noise) = gaussian(), draw()
    found, _ = sample(network, euler(NoiseConfig(process="flow", shift=shift)), noise, LABELS, 5)
    assert network.heard[0] == 1000
    x, times = noise, [u / 5 for u in (5, 4, 3, 2, 1, 0)]
    times = [shift * u / (1 + (shift - 1) * u) for u in times]
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * network(x, torch.tensor(1000 * now), LABELS).sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_many_steps_come_to_the_end_that_is_known() -> None:
    # The flow of a Gaussian carries each noise e to mean + deviation e.
    _, noise = draw()
    errors = [
        float((sample(gaussian(), euler(), noise, LABELS, n)[0] - (0.5 + 0.3 * noise)).norm())
        for n in (10, 100)
    ]
    assert errors[1] < 0.15 * errors[0]
    assert errors[1] < 0.02 * float(noise.norm())


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(scheduler="FlowMatchHeunDiscreteScheduler", options={}),
        SamplerConfig(scheduler="UniPCMultistepScheduler", options={"use_flow_sigmas": True}),
    ],
    ids=lambda config: config.scheduler,
)
def test_other_samplers_of_flows_come_there_sooner(config: SamplerConfig) -> None:
    _, noise = draw()
    end = 0.5 + 0.3 * noise
    by_euler = sample(gaussian(), euler(), noise, LABELS, 20)[0]
    found = sample(gaussian(), build_sampler(config, NOISE), noise, LABELS, 20)[0]
    assert float((found - end).norm()) < 0.5 * float((by_euler - end).norm())


def test_pairs_of_a_flow_pass_its_own_times() -> None:
    config = PairsConfig(count=4, chunk=4, steps=20, sampler=default_sampler(FLOW))
    made = make_pairs(gaussian(), euler(), config, 0, 1, [1000, 950, 500], seed=3)
    assert sorted(made.states) == [500, 950, 1000]
    assert torch.equal(made.states[1000], made.noise)
    first = gaussian()(made.noise, torch.tensor(1000.0), LABELS).sample
    torch.testing.assert_close(made.states[950], made.noise - 0.05 * first)


def test_a_saved_pipeline_samples_the_same(tmp_path: Path) -> None:
    pipeline = ClassConditionalPipeline(unet().eval(), euler(NoiseConfig(process="flow", shift=2.0)))
    pipeline.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert type(loaded.scheduler) is FlowMatchEulerDiscreteScheduler
    images = [
        p([1, 2], 3, 2.0, torch.Generator().manual_seed(0), output_type="pt").images
        for p in (pipeline, loaded)
    ]
    assert torch.equal(*images)


def test_the_planner_can_weigh_a_flows_step() -> None:
    loss = teacher_micro_step(NOISE, (1, 8, 8), 2)(unet())
    assert loss.requires_grad
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"process": "flow", "prediction_type": "epsilon"}, "prediction_type=epsilon has no meaning with"),
        ({"process": "flow", "beta_schedule": "linear"}, "beta_schedule=linear has no meaning with"),
        ({"shift": 3.0}, "shift=3.0 has no meaning with process=diffusion: leave it out"),
    ],
)
def test_fields_of_the_other_process_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NoiseConfig(**fields)


def test_latents_are_no_flow() -> None:
    with pytest.raises(ValidationError, match="process"):
        LatentNoiseConfig(process="flow")


def test_a_teacher_has_a_sampler_of_its_own_process() -> None:
    assert TrainConfig(noise=FLOW).sampler.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert TrainConfig().sampler == SamplerConfig()
    with pytest.raises(ValidationError, match=r"scheduler=DDIMScheduler follows a diffusion, .*=flow: use"):
        TrainConfig(noise=FLOW, sampler=SamplerConfig())
    with pytest.raises(ValueError, match=r"follows a flow, but the teacher has noise\.process=diffusion"):
        build_sampler(default_sampler(FLOW), build_noise_scheduler(NoiseConfig()))
    with pytest.raises(ValueError, match="follows a diffusion"):
        build_sampler(SamplerConfig(), NOISE)


def test_a_distillation_of_a_flow_is_refused_before_it_begins(tmp_path: Path) -> None:
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    RunStore(teacher).write_text("config.yaml", dump_config(TrainConfig(run=teacher, noise=FLOW)))
    with pytest.raises(ValueError, match=r"is a flow .*: train one with noise.process=diffusion"):
        prepare(DistillConfig(run=student, teacher=teacher))
    assert not (tmp_path / "student").exists()
