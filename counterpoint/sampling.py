"""Sampling from a class-conditional diffusion model through any diffusers scheduler."""

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DModel
from pydantic import Field
from torch import Tensor

from counterpoint.section import Section
from counterpoint.unet import null_class

Generators = torch.Generator | list[torch.Generator] | None

# Not the whole configuration: from_config would let the noise schedule's untouched defaults win over options.
_SHARED = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")


class SamplerConfig(Section):
    """A multi-step sampler: a diffusers scheduler by name."""

    scheduler: str = "DDIMScheduler"
    """Class name of a scheduler in diffusers."""
    options: dict[str, Any] = Field(
        default_factory=lambda: {"timestep_spacing": "trailing", "clip_sample": True}
    )
    """Keyword arguments of that class, beside those of the noise schedule."""


def build_sampler(config: SamplerConfig, noise: DDPMScheduler) -> SchedulerMixin:
    """Return the scheduler `config` names, over the same forward process as `noise`.

    Raises ValueError if diffusers has no such scheduler or the scheduler refuses an option.
    """
    cls: Any = getattr(diffusers, config.scheduler, None)
    if SchedulerMixin not in getattr(cls, "__mro__", ()):
        raise ValueError(
            f"sampler.scheduler={config.scheduler} is not a diffusers scheduler: try DDIMScheduler"
        )
    try:
        return cls.from_config({name: noise.config[name] for name in _SHARED} | config.options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"sampler.options={config.options} does not fit {config.scheduler}: {error}"
        ) from error


@torch.no_grad()
def sample(
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    noise: Tensor,
    labels: Tensor,
    steps: int,
    guidance_scale: float = 1.0,
    generator: Generators = None,
    keep: Collection[int] = (),
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Integrate from `noise` [B,C,H,W] at the last timestep to a sample under `labels` [B].

    Classifier-free guidance in the convention output = null + guidance_scale * (cond - null): 1 is the plain
    conditional model and costs one evaluation a step, anything else two. What noise the scheduler adds comes
    from `generator`, one for the batch or one per sample. Returns the final sample and, for each timestep in
    `keep` that the schedule visits, the state [B,C,H,W] the network saw there.
    """
    scheduler.set_timesteps(steps)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise * float(scheduler.init_noise_sigma)
    kept: dict[int, Tensor] = {}
    for t in progress(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t)
        if int(t) in keep:
            kept[int(t)] = model_input
        output = guided(unet, model_input, t, labels, guidance_scale)
        x = scheduler.step(output, t, x, **extra).prev_sample
    return x, kept


def guided(unet: UNet2DModel, x: Tensor, t: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
    """Return the network's output at timestep `t` under guidance (Ho & Salimans 2022, eq. 6)."""
    if guidance_scale == 1.0:
        return unet(x, t, class_labels=labels).sample
    null = torch.full_like(labels, null_class(unet))
    both = unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, null])).sample
    conditional, unconditional = both.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
