"""Pairs for the warm-up: noise, the teacher's sample from it, and states its trajectory passed on the way."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin, UNet2DModel
from pydantic import Field, model_validator
from torch import Tensor

from counterpoint.guidance import BaseGuidance, GuiderConfig, build_guider, classifier_free
from counterpoint.sampling import SamplerConfig, sample
from counterpoint.section import Section
from counterpoint.seeds import generator


class PairsConfig(Section):
    """How many pairs are made, and by which sampler."""

    count: int = Field(default=8192, ge=1)
    """Number of (noise, sample) pairs."""
    steps: int = Field(default=20, ge=4)
    """Teacher evaluations per pair; a multiple of 4 makes the trajectory pass the student's own times."""
    sampler: SamplerConfig = SamplerConfig(
        scheduler="DPMSolverMultistepScheduler", options={"timestep_spacing": "trailing"}
    )
    """The teacher's sampler."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the teacher, 1 for none."""
    guider: GuiderConfig | None = None
    """Another guidance of the teacher, in place of `guidance_scale`'s."""
    chunk: int = Field(default=512, ge=1)
    """Pairs made at once; each chunk has its own seed, so any worker can make any chunk."""

    @model_validator(mode="after")
    def _check(self) -> "PairsConfig":
        if self.guider is not None and self.guidance_scale != 1.0:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} beside guider={self.guider.guider}: give the scale in "
                "guider.options, and leave guidance_scale unset"
            )
        return self

    def guidance(self) -> BaseGuidance:
        """Return a new guider for one batch of samples; raises ValueError if `guider` names none."""
        return build_guider(self.guider) if self.guider else classifier_free(self.guidance_scale)


@dataclass(frozen=True)
class Pairs:
    """N pairs: noise [N,C,H,W], labels [N], samples [N,C,H,W], states {t: [N,C,H,W]} at noise time t."""

    noise: Tensor
    labels: Tensor
    samples: Tensor
    states: dict[int, Tensor]
    horizon: int
    """Number of train timesteps of the schedule."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the pairs as named tensors for storage."""
        named = {"noise": self.noise, "labels": self.labels, "samples": self.samples}
        return named | {f"state-{t}": x for t, x in self.states.items()}


def pairs_from_tensors(chunks: Sequence[dict[str, Tensor]], horizon: int) -> Pairs:
    """Put stored chunks back together, in their order."""
    whole = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    states = {int(name.removeprefix("state-")): x for name, x in whole.items() if name.startswith("state-")}
    return Pairs(whole["noise"], whole["labels"], whole["samples"], states, horizon)


def make_pairs(
    teacher: UNet2DModel,
    sampler: SchedulerMixin,
    config: PairsConfig,
    chunk: int,
    num_classes: int,
    times: Sequence[int],
    seed: int,
    conditions: Tensor | None = None,
    clip: bool = True,
) -> Pairs:
    """Make chunk number `chunk` of the pairs, on the teacher's device, returned on the CPU.

    Labels are spread evenly over the classes, or over the labels in `conditions` where they are given.
    Samples are clipped to the range of images, [-1, 1], unless `clip` is off, as it is for latents. Raises
    ValueError if the sampler's schedule does not pass the student's `times`.
    """
    size = min(config.chunk, config.count - chunk * config.chunk)
    side, channels, device = teacher.config.sample_size, teacher.config.in_channels, teacher.device
    stream = generator(seed, "pairs", chunk)
    noise = torch.randn(size, channels, side, side, generator=stream)
    allowed = torch.arange(num_classes) if conditions is None else conditions
    labels = allowed[torch.arange(chunk * config.chunk, chunk * config.chunk + size) % len(allowed)]
    samples, states = sample(
        teacher,
        sampler,
        noise.to(device),
        labels.to(device),
        config.steps,
        generator=stream,
        keep=times,
        guider=config.guidance(),
    )
    missing = sorted(set(times) - set(states))
    if missing:
        raise ValueError(
            f"pairs.steps={config.steps} with {config.sampler.scheduler} does not pass the student's times "
            f"{missing}: use a multiple of 4 and timestep_spacing=trailing"
        )
    horizon = int(sampler.config.num_train_timesteps)
    samples = samples.clamp(-1, 1) if clip else samples
    return Pairs(noise, labels, samples.cpu(), {t: x.cpu() for t, x in states.items()}, horizon)
