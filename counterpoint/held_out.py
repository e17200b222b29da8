"""What a text-to-image student has learned: its latents beside the teacher's, under prompts it never saw."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from pydantic import Field
from torch import Tensor

from counterpoint.guidance import BaseGuidance
from counterpoint.sampling import sample
from counterpoint.section import Section
from counterpoint.seeds import generator


class HeldOutConfig(Section):
    """How a student is measured against its teacher."""

    share: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the prompts that no pair is made of."""
    samples: int = Field(default=64, ge=2)
    """Samples, each from noise of its own, spread over the held-out prompts."""
    batch_size: int = Field(default=16, ge=1)
    """Samples made at once."""
    seed: int = 1234
    """Seed of the samples' noise."""


@dataclass(frozen=True)
class Question:
    """Noise and prompts that teacher and student answer."""

    noise: Tensor
    """Gaussian noise [n,C,h,w]."""
    rows: Tensor
    """Held-out prompts int64 [n]."""


def pose(config: HeldOutConfig, rows: Tensor, shape: tuple[int, int, int]) -> Question:
    """Return the noise and the prompts of every sample; sample i depends on i and the seed alone."""
    noise = [
        torch.randn(shape, generator=generator(config.seed, "held-out", i)) for i in range(config.samples)
    ]
    return Question(torch.stack(noise), rows[torch.arange(config.samples) % len(rows)])


def answer(
    unet: Any,
    scheduler: SchedulerMixin,
    question: Question,
    steps: int,
    guider: BaseGuidance,
    config: HeldOutConfig,
) -> Tensor:
    """Return the latents [n,C,h,w], on the CPU, that a network makes in `steps` steps of `scheduler`."""
    made = []
    for start in range(0, len(question.rows), config.batch_size):
        part = slice(start, start + config.batch_size)
        streams = [generator(config.seed, "held-out steps", i) for i in range(len(question.rows))[part]]
        x, rows = question.noise[part].to(unet.device), question.rows[part].to(unet.device)
        made.append(sample(unet, scheduler, x, rows, steps, generator=streams, guider=guider)[0].cpu())
    return torch.cat(made)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return ||found - wanted|| / ||wanted|| over all samples: 0 is equal, 1 is as bad as nothing."""
    return float((found - wanted).norm() / wanted.norm())


def other_prompts(question: Question) -> Question | None:
    """Return the same noise with each prompt exchanged for another one of the question's.

    None where all samples have the same prompt, and there is no other.
    """
    prompts, place = question.rows.unique(return_inverse=True)
    if len(prompts) < 2:
        return None
    return Question(question.noise, prompts[(place + 1) % len(prompts)])
