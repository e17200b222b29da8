"""Sampling from a class-conditional diffusion model through any diffusers scheduler."""

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from pydantic import Field
from torch import Tensor

from counterpoint.guidance import BaseGuidance, classifier_free, guided
from counterpoint.named_class import find_class
from counterpoint.section import Section

Generators = torch.Generator | list[torch.Generator] | None

# Not the whole configuration: from_config would let the noise schedule's untouched defaults win over options.
_SHARED = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")


class SamplerConfig(Section):
    """A multi-step sampler: a scheduler by name."""

    scheduler: str = "DDIMScheduler"
    """Class name of a scheduler of diffusers or of `counterpoint.solvers`."""
    options: dict[str, Any] = Field(
        default_factory=lambda: {"timestep_spacing": "trailing", "clip_sample": True}
    )
    """Keyword arguments of that class, beside those of the noise schedule."""


def build_sampler(config: SamplerConfig, noise: DDPMScheduler) -> SchedulerMixin:
    """Return the scheduler `config` names, over the same forward process as `noise`.

    Raises ValueError if there is no such scheduler or it refuses an option.
    """
    cls = find_class(config.scheduler, SchedulerMixin, diffusers, "counterpoint.solvers", "sampler.scheduler")
    try:
        return cls.from_config({name: noise.config[name] for name in _SHARED} | config.options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"sampler.options={config.options} does not fit {config.scheduler}: {error}"
        ) from error


@torch.no_grad()
def sample(
    network: Any,
    scheduler: SchedulerMixin,
    noise: Tensor,
    labels: Tensor,
    steps: int,
    guidance_scale: float = 1.0,
    generator: Generators = None,
    keep: Collection[int] = (),
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    guider: BaseGuidance | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Integrate from `noise` [B,C,H,W] at the last timestep to a sample under `labels` [B].

    Classifier-free guidance in the convention output = null + guidance_scale * (cond - null): 1 is the plain
    conditional model and costs one evaluation a step, anything else two. A `guider` takes its place. What
    noise the scheduler adds comes from `generator`, one for the batch or one per sample. Returns the final
    sample and, for each timestep in `keep` that the schedule visits, the state [B,C,H,W] the network saw
    there.
    """
    guider = classifier_free(guidance_scale) if guider is None else guider
    scheduler.set_timesteps(steps)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise * float(scheduler.init_noise_sigma)
    kept: dict[int, Tensor] = {}
    for step, t in enumerate(progress(scheduler.timesteps)):
        model_input = scheduler.scale_model_input(x, t)
        if int(t) in keep:
            kept[int(t)] = model_input
        guider.set_state(step=step, num_inference_steps=len(scheduler.timesteps), timestep=t)
        output = guided(network, model_input, t, labels, guider)
        x = scheduler.step(output, t, x, **extra).prev_sample
    return x, kept
