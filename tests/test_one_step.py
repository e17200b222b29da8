"""A stock scheduler makes exactly the student's step, and ours runs inside SDXL pipelines."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from tiny_text import SHAPE, pipeline

from counterpoint.diffusion import LatentNoiseConfig, build_noise_scheduler, predict_x0
from counterpoint.lora import LoraSection, add_lora, merged, save_lora
from counterpoint.one_step import noise_of, one_step_scheduler
from counterpoint.prompted import PromptedUNet
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.seeds import generator

PROMPT = ["a red", "box"]


def latents(pipe: StableDiffusionXLPipeline, steps: int = 1) -> torch.Tensor:
    """What the pipeline makes of fixed noise."""
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=generator(0, "noise"))
    streams = [generator(0, i) for i in range(2)]
    made = pipe(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=0.0,
        latents=noise,
        generator=streams,
        output_type="latent",
    )
    return made.images


def student_latents(pipe: StableDiffusionXLPipeline, noise: LatentNoiseConfig, shift: int) -> torch.Tensor:
    """The student's x_0 of the same noise, from its formula."""
    embeds, _, pooled, _ = pipe.encode_prompt(PROMPT)
    x = torch.randn(2, 4, 8, 8, generator=generator(0, "noise"))
    heard = torch.full((2,), 999 * shift // 1000)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, -1)
    with torch.no_grad():
        output = pipe.unet(
            x, heard, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
    abar = build_noise_scheduler(noise).alphas_cumprod
    return predict_x0(output, x, heard, abar, noise.prediction_type)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("shift", [250, 500, 1000])
def test_a_stock_scheduler_makes_the_students_step(prediction: str, shift: int) -> None:
    noise = LatentNoiseConfig(prediction_type=prediction)
    pipe = pipeline()
    pipe.scheduler = one_step_scheduler(noise, shift)
    expected = student_latents(pipe, noise, shift)
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-5, atol=1e-5)
    pipe.scheduler = TimestepShiftScheduler(
        **noise.diffusion_options(), timestep_shift=shift, clip_sample=False
    )
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-5, atol=1e-5)
    assert latents(pipe, steps=4).isfinite().all()


def test_it_is_stock_and_survives_storage(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.scheduler = one_step_scheduler(SHAPE.noise, 500)
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert type(loaded.scheduler) is DDIMScheduler
    assert torch.equal(latents(loaded), latents(pipe))


def test_the_noise_schedule_is_the_teachers_own() -> None:
    wanted = LatentNoiseConfig(beta_end=0.013, prediction_type="v_prediction")
    assert noise_of(dict(EulerDiscreteScheduler(**wanted.diffusion_options()).config)) == wanted
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        noise_of(dict(DDIMScheduler(rescale_betas_zero_snr=True).config))
    with pytest.raises(ValueError, match="FlowMatch"):
        noise_of({"_class_name": "FlowMatchEulerDiscreteScheduler"})


def test_adapters_alone_learn_and_diffusers_loads_them(tmp_path: Path) -> None:
    config = LoraSection(rank=2, alpha=4)
    base = pipeline()
    own = PromptedUNet.from_config(dict(base.unet.config))
    own.load_state_dict(base.unet.state_dict())
    add_lora(own, config, seed=5)
    trained = {name: p for name, p in own.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    again = PromptedUNet.from_config(dict(base.unet.config))
    add_lora(again, config, seed=5)
    firsts = {name: p for name, p in again.named_parameters() if "lora_A" in name}
    assert firsts
    assert all(torch.equal(p, trained[name]) for name, p in firsts.items())
    weights = {name: torch.randn(p.shape, generator=generator(1, name)) * 0.2 for name, p in trained.items()}
    network = PromptedUNet.from_config(dict(base.unet.config))
    network.load_state_dict(base.unet.state_dict())
    network, adapters = merged(network, config, weights)
    assert network.state_dict().keys() == base.unet.state_dict().keys()
    save_lora(str(tmp_path), config, adapters)
    plain = latents(base)
    base.load_lora_weights(str(tmp_path))
    with_adapters = latents(base)
    assert (with_adapters - plain).abs().max() > 1e-2
    base.unload_lora_weights()
    base.unet.load_state_dict(network.state_dict())
    torch.testing.assert_close(latents(base), with_adapters, rtol=1e-4, atol=1e-4)


def test_adapters_for_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora\.target_modules"):
        add_lora(pipeline().unet, LoraSection(rank=2, target_modules=("nowhere",)), seed=0)
    with pytest.raises(ValueError, match="names differ"):
        merged(pipeline().unet, LoraSection(rank=2), {})
