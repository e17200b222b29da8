"""Multi-step sampling against diffusers' pipelines and a loop by hand."""

from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from tiny import SIDE, unet
from torch import Tensor

from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.guidance import classifier_free, guided
from counterpoint.pairs import PairsConfig, make_pairs, pairs_from_tensors
from counterpoint.sampling import SamplerConfig, build_sampler, sample
from counterpoint.seeds import generator
from counterpoint.student import student_timesteps

NOISE = build_noise_scheduler(NoiseConfig())
LABELS = torch.tensor([3, 0, 9])
STOCHASTIC = SamplerConfig(scheduler="DDPMScheduler", options={"timestep_spacing": "trailing"})


def start(n: int = 3) -> Tensor:
    return torch.randn(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


class Unconditional(torch.nn.Module):
    """A class-conditional network that always hears one class, for pipelines that know of none."""

    def __init__(self, network: UNet2DModel, label: int) -> None:
        super().__init__()
        self.network, self.label, self.config = network, label, network.config
        self.device, self.dtype = network.device, network.dtype

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.network(x, t, class_labels=torch.full((len(x),), self.label))


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_samples_are_those_of_diffusers_own_pipeline(steps: int) -> None:
    network = unet().eval()
    sampler = build_sampler(
        SamplerConfig(options={"timestep_spacing": "leading", "clip_sample": True}), NOISE
    )
    noise = torch.randn(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    found, _ = sample(network, sampler, noise, torch.full((3,), 4), steps)
    pipeline = DDIMPipeline(unet=Unconditional(network, 4), scheduler=sampler)
    pipeline.set_progress_bar_config(disable=True)
    stream = torch.Generator().manual_seed(5)
    images = pipeline(3, stream, num_inference_steps=steps, output_type="np", use_clipped_model_output=False)
    expected = torch.from_numpy(images.images).permute(0, 3, 1, 2) * 2 - 1
    torch.testing.assert_close(found.clamp(-1, 1), expected, atol=1e-5, rtol=1e-5)


def test_samplers_have_the_noise_schedules_process_and_their_own_options() -> None:
    noise = build_noise_scheduler(NoiseConfig(beta_schedule="linear", prediction_type="epsilon"))
    sampler = build_sampler(SamplerConfig(), noise)
    assert isinstance(sampler, DDIMScheduler)
    assert torch.equal(sampler.alphas_cumprod, noise.alphas_cumprod)
    assert sampler.config.prediction_type == "epsilon"
    assert sampler.config.timestep_spacing == "trailing"
    assert sampler.config.clip_sample
    plain = build_sampler(SamplerConfig(options={}), noise)
    assert plain.config.clip_sample == DDIMScheduler().config.clip_sample
    assert isinstance(build_sampler(PairsConfig().sampler, noise), DPMSolverMultistepScheduler)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"scheduler": "DDIMSchedular"},
            "scheduler=DDIMSchedular is not a SchedulerMixin of diffusers, nor",
        ),
        ({"scheduler": "UNet2DModel"}, "is not a SchedulerMixin of diffusers"),
        (
            {"scheduler": "DPMSolverMultistepScheduler", "options": {"algorithm_type": "none"}},
            "does not fit DPMSolverMultistepScheduler",
        ),
    ],
)
def test_a_sampler_that_does_not_exist_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_sampler(SamplerConfig(**config), NOISE)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_starts_from_the_null_class(scale: float) -> None:
    network, x, t = unet().eval(), start(), torch.tensor(400)
    with torch.no_grad():
        conditional = network(x, t, class_labels=LABELS).sample
        null = network(x, t, class_labels=torch.full((3,), 10)).sample
        found = guided(network, x, t, LABELS, classifier_free(scale))
    torch.testing.assert_close(found, null + scale * (conditional - null), atol=1e-5, rtol=1e-5)


def test_no_guidance_costs_one_evaluation_and_guidance_two() -> None:
    network, seen = unet().eval(), []
    network.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    for scale in (1.0, 1.5):
        sample(network, build_sampler(SamplerConfig(), NOISE), start(), LABELS, 2, scale)
    assert seen == [3, 3, 6, 6]


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_kept_states_are_what_the_network_saw(scheduler: str) -> None:
    """States have the forward process's scale, whatever scale the scheduler itself works in."""
    network, seen = unet().eval(), {}

    def remember(_module: Any, args: Any, _output: Any) -> None:
        seen[int(args[1])] = args[0]

    network.register_forward_hook(remember)
    config = SamplerConfig(scheduler=scheduler, options={"timestep_spacing": "trailing"})
    times = student_timesteps(4)
    _, kept = sample(network, build_sampler(config, NOISE), start(), LABELS, 8, keep=times)
    assert sorted(kept, reverse=True) == times
    assert all(torch.equal(x, seen[t]) for t, x in kept.items())
    assert float(kept[999].std()) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(kept[999], start(), atol=1e-3, rtol=1e-3)


def test_a_stochastic_sampler_draws_from_the_given_stream() -> None:
    network, sampler = unet().eval(), build_sampler(STOCHASTIC, NOISE)

    def run(seed: int) -> Tensor:
        return sample(network, sampler, start(), LABELS, 4, generator=torch.Generator().manual_seed(seed))[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def pairs_config(**options: Any) -> PairsConfig:
    return PairsConfig(**{"count": 10, "steps": 4, "chunk": 4} | options)


def test_pairs_are_the_teachers_samples_and_pass_the_students_times() -> None:
    network, config = unet().eval(), pairs_config()
    sampler = build_sampler(config.sampler, NOISE)
    chunks = [make_pairs(network, sampler, config, i, 10, student_timesteps(4), seed=7) for i in range(3)]
    pairs = pairs_from_tensors([chunk.tensors() for chunk in chunks], chunks[0].horizon)
    assert [len(chunk.labels) for chunk in chunks] == [4, 4, 2]
    assert pairs.labels.tolist() == list(range(10))
    assert pairs.horizon == 1000
    assert sorted(pairs.states) == [249, 499, 749, 999]
    torch.testing.assert_close(pairs.states[999], pairs.noise, atol=1e-3, rtol=1e-3)
    expected, _ = sample(network, sampler, pairs.noise[4:8], pairs.labels[4:8], 4)
    torch.testing.assert_close(pairs.samples[4:8], expected.clamp(-1, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(pairs.noise[8:], torch.randn(2, 1, 8, 8, generator=generator(7, "pairs", 2)))


def test_pairs_of_a_stochastic_teacher_come_back_from_the_seed() -> None:
    network, config = unet().eval(), pairs_config(sampler=STOCHASTIC)
    sampler = build_sampler(config.sampler, NOISE)
    first, again = (make_pairs(network, sampler, config, 0, 10, [999], seed=7) for _ in range(2))
    assert torch.equal(first.samples, again.samples)


def test_a_trajectory_that_misses_the_students_times_is_refused() -> None:
    config = pairs_config(steps=5)
    with pytest.raises(ValueError, match=r"pairs.steps=5 .* times \[249, 499, 749\]: use a multiple of 4"):
        make_pairs(
            unet().eval(), build_sampler(config.sampler, NOISE), config, 0, 10, student_timesteps(4), 0
        )


def test_pairs_are_made_under_any_guidance() -> None:
    network, plainly = unet().eval(), SamplerConfig(options={"timestep_spacing": "trailing"})
    sampler = build_sampler(plainly, NOISE)
    projected = {"guider": "AdaptiveProjectedGuidance", "options": {"guidance_scale": 3.0}}

    def made(**options: Any) -> Tensor:
        config = pairs_config(**options)
        return make_pairs(network, sampler, config, 0, 10, student_timesteps(4), seed=0).samples

    plain = {"guider": "ClassifierFreeGuidance", "options": {"guidance_scale": 3.0}}
    assert torch.equal(made(guider=plain), made(guidance_scale=3.0))
    assert not torch.equal(made(guider=projected), made(guidance_scale=3.0))
    with pytest.raises(ValueError, match="beside guider=AdaptiveProjectedGuidance"):
        pairs_config(guider=projected, guidance_scale=2.0)
