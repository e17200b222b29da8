"""The student's chain: times, shift, scheduler and pipelines, against the closed form and stock diffusers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, LCMScheduler, UNet2DModel
from diffusers.utils import dynamic_modules_utils
from tiny import ABAR, SIDE, unet
from torch import Tensor

import counterpoint.pipeline
from counterpoint.diffusion import NoiseConfig, PredictionType, build_noise_scheduler
from counterpoint.pairs import Pairs
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.sampling import SamplerConfig, build_sampler
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.student import StudentConfig, draw_inputs, shifted, student_timesteps, student_x0

CHAINS = {1: [999], 2: [999, 499], 3: [999, 749, 499], 4: [999, 749, 499, 249]}
LABELS = torch.tensor([3, 0, 9])


def streams(n: int = 3, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def pipeline_of(network: UNet2DModel, **options: Any) -> ClassConditionalPipeline:
    pipeline = ClassConditionalPipeline(network.eval(), TimestepShiftScheduler(**options))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made(pipeline: Any, *args: Any, **options: Any) -> Tensor:
    images: Tensor = pipeline(*args, output_type="pt", **options).images
    return images


@pytest.mark.parametrize(("steps", "times"), CHAINS.items())
def test_chains_are_lcms_with_a_base_of_four(steps: int, times: list[int]) -> None:
    assert student_timesteps(steps) == times
    lcm = LCMScheduler(original_inference_steps=4)
    lcm.set_timesteps(steps)
    assert lcm.timesteps.tolist() == times


@pytest.mark.parametrize("steps", [0, 5, -1])
def test_other_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps={steps}: the student takes 1 to 4 steps"):
        student_timesteps(steps)


def test_the_shift_is_the_papers() -> None:
    times = torch.tensor([999, 749, 499, 249])
    assert shifted(times, 250, 1000).tolist() == [249, 187, 124, 62]
    assert shifted(times, 500, 1000).tolist() == [499, 374, 249, 124]
    assert shifted(times, 1000, 1000).tolist() == times.tolist()
    everywhere = torch.arange(1000)
    assert shifted(everywhere, 250, 1000).tolist() == [math.floor(t * 250 / 1000) for t in range(1000)]
    with pytest.raises(ValueError, match=r"timestep_shift=1001 is beyond noise\.num_train_timesteps=1000"):
        shifted(times, 1001, 1000)


def closed_form(
    network: UNet2DModel, noises: list[Tensor], steps: int, shift: int, prediction: PredictionType
) -> Tensor:
    """The chain as NitroFusion writes it, a number at a time."""
    abar = ABAR.double()
    x = x0 = noises[0].double()
    for i, t in enumerate(CHAINS[steps]):
        heard = int(t * shift / 1000)
        output = network(x, heard, class_labels=LABELS).sample
        a, s = math.sqrt(abar[heard]), math.sqrt(1 - abar[heard])
        x0 = {"epsilon": (x - s * output) / a, "v_prediction": a * x - s * output, "sample": output}[
            prediction
        ]
        x0 = x0.clamp(-1, 1)
        if i + 1 < steps:
            following = CHAINS[steps][i + 1]
            x = math.sqrt(abar[following]) * x0 + math.sqrt(1 - abar[following]) * noises[i + 1].double()
    return x0


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("shift", [250, 500, 1000])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_pipeline_runs_the_papers_chain(steps: int, shift: int, prediction: PredictionType) -> None:
    pipeline = pipeline_of(unet(), timestep_shift=shift, prediction_type=prediction)
    images = made(pipeline, LABELS, steps, generator=streams())
    own = streams()
    noises = [torch.stack([torch.randn(1, 8, 8, generator=stream) for stream in own]) for _ in range(4)]
    with torch.no_grad():
        expected = closed_form(unet().eval().double(), noises, steps, shift, prediction)
    torch.testing.assert_close(images.double(), expected, atol=2e-3, rtol=1e-3)


def test_the_scheduler_announces_the_times_the_network_must_hear() -> None:
    scheduler = TimestepShiftScheduler(timestep_shift=250)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [249, 187, 124, 62]
    assert scheduler.noise_times.tolist() == CHAINS[4]
    assert (scheduler.init_noise_sigma, scheduler.order, len(scheduler)) == (1.0, 1, 1000)
    x = torch.randn(2, 1, 8, 8)
    assert scheduler.scale_model_input(x, 249) is x


def test_a_chain_ends() -> None:
    scheduler = TimestepShiftScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 1, 8, 8)
    for t in scheduler.timesteps:
        previous, x0 = scheduler.step(x, t, x, generator=streams(1), return_dict=False)
    assert torch.equal(previous, x0)
    with pytest.raises(ValueError, match="all 2 steps are taken: call set_timesteps"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match="1 to 4 steps"):
        scheduler.set_timesteps(8)


def test_clipping_is_an_option() -> None:
    x, output = torch.full((1, 1, 2, 2), 5.0), torch.full((1, 1, 2, 2), -5.0)
    for clip in (True, False):
        step = TimestepShiftScheduler(clip_sample=clip).step(output, 499, x)
        assert (step.pred_original_sample.max() > 1) is not clip


def test_training_and_sampling_make_the_same_estimate() -> None:
    network, noise = unet().eval(), build_noise_scheduler(NoiseConfig())
    x = torch.randn(3, 1, SIDE, SIDE)
    with torch.no_grad():
        trained = student_x0(network, x, torch.full((3,), 999), LABELS, noise, 500)
        output = network(x, 499, class_labels=LABELS).sample
    sampled = TimestepShiftScheduler(clip_sample=False).step(output, 499, x).prev_sample
    torch.testing.assert_close(trained, sampled, atol=1e-6, rtol=1e-5)


def test_a_stock_pipeline_runs_the_scheduler() -> None:
    """DDPMPipeline knows nothing of us: the shifted times and the last step's x0 are the scheduler's own."""
    network = UNet2DModel(
        sample_size=SIDE, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8, add_attention=False,
    ).eval()  # fmt: skip
    pipeline = DDPMPipeline(network, TimestepShiftScheduler(timestep_shift=250, prediction_type="sample"))
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=2, output_type="np").images
    stream = torch.Generator().manual_seed(3)
    with torch.no_grad():
        x0 = network(torch.randn(2, 1, 8, 8, generator=stream), 249).sample.clamp(-1, 1)
        x = ABAR[499].sqrt() * x0 + (1 - ABAR[499]).sqrt() * torch.randn(2, 1, 8, 8, generator=stream)
        x0 = network(x, 124).sample.clamp(-1, 1)
    np.testing.assert_allclose(found, (x0 / 2 + 0.5).permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_an_images_neighbours_do_not_matter() -> None:
    pipeline = pipeline_of(unet())
    whole = made(pipeline, LABELS, 3, generator=streams())
    for i, stream in enumerate(streams()):
        alone = made(pipeline, LABELS[i : i + 1], 3, generator=[stream])
        torch.testing.assert_close(alone[0], whole[i], atol=1e-5, rtol=1e-5)


def test_pipelines_survive_storage(tmp_path: Path) -> None:
    pipeline = pipeline_of(unet(), timestep_shift=250, beta_schedule="linear", prediction_type="epsilon")
    pipeline.save_pretrained(tmp_path)
    expected = made(pipeline, LABELS, 2, generator=streams())
    back = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert isinstance(back.scheduler, TimestepShiftScheduler)
    assert back.scheduler.config.timestep_shift == 250
    assert torch.equal(made(back, LABELS, 2, generator=streams()), expected)
    scheduler = TimestepShiftScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert torch.equal(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    # Stock diffusers, which knows no class of ours, loads the network.
    network = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    assert all(
        torch.equal(p, q) for p, q in zip(network.parameters(), pipeline.unet.parameters(), strict=True)
    )
    assert not network.training


def test_a_teachers_pipeline_survives_storage(tmp_path: Path) -> None:
    noise = build_noise_scheduler(NoiseConfig())
    pipeline = ClassConditionalPipeline(unet().eval(), build_sampler(SamplerConfig(), noise))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    expected = made(pipeline, LABELS, 3, 2.0, generator=streams())
    back = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert torch.equal(made(back, LABELS, 3, 2.0, generator=streams()), expected)


def test_outputs_are_pictures_arrays_or_tensors() -> None:
    pipeline = pipeline_of(unet())
    tensor, array, pictures = (
        pipeline([1, 2], 1, generator=streams(2), output_type=kind, return_dict=False)[0]
        for kind in ("pt", "np", "pil")
    )
    assert tensor.shape == (2, 1, 8, 8)
    assert float(tensor.abs().max()) <= 1
    np.testing.assert_allclose(array, (tensor / 2 + 0.5).permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1, :, :, 0] * 255).round().astype("uint8"))


@pytest.mark.parametrize("labels", [[11], [-1, 2], []])
def test_unknown_classes_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="must be classes from 0 to 9"):
        pipeline_of(unet())(labels)


def fake_pairs(n: int = 20) -> Pairs:
    """Pairs whose every tensor says which pair and which time it is of."""
    number = torch.arange(n, dtype=torch.float)[:, None, None, None].expand(n, 1, 2, 2)
    states = {t: number + 1000 * t for t in CHAINS[4]}
    return Pairs(number + 0.25, torch.arange(n) % 10, number + 0.5, states, 1000)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_later_steps_start_where_the_teachers_trajectory_passes(stage: int) -> None:
    config = StudentConfig(first_step_share=0.6)
    x, times, labels, target = draw_inputs(fake_pairs(), 4000, stage, config, seed=1, step=2)
    number = target[:, 0, 0, 0] - 0.5
    assert torch.equal(labels, number.long() % 10)
    expected = torch.where(times == 999, number + 0.25, number + 1000.0 * times)
    assert torch.equal(x[:, 0, 0, 0], expected)
    known = sorted({t for steps in range(1, stage + 1) for t in CHAINS[steps]}, reverse=True)
    shares = [float((times == t).float().mean()) for t in known]
    later = [0.4 / (len(known) - 1)] * (len(known) - 1) if stage > 1 else []
    assert shares == pytest.approx([0.6 if stage > 1 else 1.0, *later], abs=0.03)
    assert sum(shares) == pytest.approx(1)


def test_draws_are_named_by_seed_and_step() -> None:
    first = draw_inputs(fake_pairs(), 50, 4, StudentConfig(), 1, 2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first, draw_inputs(fake_pairs(), 50, 4, StudentConfig(), 1, 2), strict=True)
    )
    assert not torch.equal(first[3], draw_inputs(fake_pairs(), 50, 4, StudentConfig(), 1, 3)[3])


def test_steps_join_from_the_bottom_up() -> None:
    config = StudentConfig(refinement=(0.4, 0.6, 0.8))
    assert [config.stage(p) for p in (0.0, 0.39, 0.4, 0.6, 0.79, 0.8, 1.0)] == [1, 1, 2, 3, 3, 4, 4]
    assert StudentConfig(refinement=()).stage(1.0) == 1
    for wrong in ((0.6, 0.4), (0.1, 0.2, 0.3, 0.4)):
        with pytest.raises(ValueError, match="must be at most 3 rising shares"):
            StudentConfig(refinement=wrong)


def test_diffusers_own_loader_takes_the_pipeline_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DiffusionPipeline loads only its own classes by name; of ours it wants the file and our word for it."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipeline = pipeline_of(unet())
    pipeline.save_pretrained(tmp_path / "run")
    back = DiffusionPipeline.from_pretrained(
        tmp_path / "run", custom_pipeline=counterpoint.pipeline.__file__, trust_remote_code=True
    )
    assert type(back).__name__ == "ClassConditionalPipeline"
    expected = made(pipeline, LABELS, 2, generator=streams())
    assert torch.equal(made(back, LABELS, 2, generator=streams()), expected)
