"""Sampling from a class-conditional diffusion model through any diffusers scheduler."""

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from pydantic import Field
from torch import Tensor

from counterpoint.diffusion import NoiseConfig
from counterpoint.flow import (
    FLOW_SAMPLER,
    check_guider,
    check_process,
    follows_flow,
    initial_scale,
    scaled_input,
    set_steps,
    shared_options,
)
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


def default_sampler(noise: NoiseConfig) -> SamplerConfig:
    """Return the sampler of a teacher for which none is named: DDIM's, or Euler's for a flow."""
    if noise.process == "flow":
        return SamplerConfig(scheduler=FLOW_SAMPLER, options={})
    return SamplerConfig()


def build_sampler(config: SamplerConfig, noise: SchedulerMixin) -> SchedulerMixin:
    """Return the scheduler `config` names, over the same forward process as `noise`.

    Raises ValueError if there is no such scheduler, it follows another process or it refuses an option.
    """
    cls = find_class(config.scheduler, SchedulerMixin, diffusers, "counterpoint.solvers", "sampler.scheduler")
    flow = follows_flow(noise)
    check_process(config.scheduler, config.options, "flow" if flow else "diffusion")
    shared = shared_options(noise, config.options) if flow else {name: noise.config[name] for name in _SHARED}
    if not flow and noise.config.trained_betas is not None:
        shared["trained_betas"] = noise.config.trained_betas
    try:
        return cls.from_config(shared | config.options)
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
    there. Raises ValueError for a guider of flows under a sampler of diffusions.
    """
    guider = classifier_free(guidance_scale) if guider is None else guider
    check_guider(guider, scheduler)
    set_steps(scheduler, steps)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise * initial_scale(scheduler)
    kept: dict[int, Tensor] = {}
    for step, t in enumerate(progress(scheduler.timesteps)):
        model_input = scaled_input(scheduler, x, t)
        if round(float(t)) in keep:
            kept[round(float(t))] = model_input
        guider.set_state(step=step, num_inference_steps=len(scheduler.timesteps), timestep=t)
        output = guided(network, model_input, t, labels, guider)
        x = scheduler.step(output, t, x, **extra).prev_sample
    return x, kept
