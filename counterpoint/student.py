"""The student: one to four steps with the same weights, each step an estimate of x_0 (NitroFusion, sec. 3.5).

The network hears a shifted time t' = floor(t S / 1000) and its output is converted with abar of t', while
its input is noised as at t: at t = 999 sqrt(abar) is tiny and the conversion would amplify every error.
"""

from typing import Any

import torch
from diffusers import DDPMScheduler
from pydantic import Field, model_validator
from torch import Tensor

from counterpoint.diffusion import predict_x0
from counterpoint.pairs import Pairs
from counterpoint.section import Section
from counterpoint.seeds import generator

MAX_STEPS = 4


class StudentConfig(Section):
    """How the student steps and in which order it learns to."""

    timestep_shift: int = Field(default=500, ge=1)
    """S of t' = floor(t S / num_train_timesteps): 250 or 500 in the paper, num_train_timesteps for none."""
    refinement: tuple[float, ...] = (0.4, 0.6, 0.8)
    """Progress of the warm-up at which 2, 3 and 4 steps join (bottom-up refinement); empty for one only."""
    first_step_share: float = Field(default=0.6, gt=0.0, le=1.0)
    """Share of samples that train the first step once later ones have joined."""

    @model_validator(mode="after")
    def _check(self) -> "StudentConfig":
        if len(self.refinement) >= MAX_STEPS or list(self.refinement) != sorted(self.refinement):
            raise ValueError(
                f"refinement={list(self.refinement)} must be at most {MAX_STEPS - 1} rising shares"
            )
        return self

    def stage(self, progress: float) -> int:
        """Return the largest number of steps that is trained at `progress` in [0, 1]."""
        return 1 + sum(progress >= start for start in self.refinement)


def student_timesteps(steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Return the noise times of a chain: 1 [999], 2 [999, 499], 3 [999, 749, 499], 4 [999, 749, 499, 249].

    They are LCM's: `steps` of a base of four, from the noisiest. Raises ValueError outside 1 to 4.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps={steps}: the student takes 1 to {MAX_STEPS} steps")
    base = [num_train_timesteps * (i + 1) // MAX_STEPS - 1 for i in range(MAX_STEPS)][::-1]
    return [base[i * MAX_STEPS // steps] for i in range(steps)]


def shifted(timesteps: Tensor, shift: int, num_train_timesteps: int) -> Tensor:
    """Return the time the network hears, floor(t S / num_train_timesteps), with S at most that number."""
    if shift > num_train_timesteps:
        raise ValueError(
            f"student.timestep_shift={shift} is beyond noise.num_train_timesteps={num_train_timesteps}"
        )
    return timesteps * shift // num_train_timesteps


def student_x0(
    unet: Any, x_t: Tensor, timesteps: Tensor, labels: Tensor, noise: DDPMScheduler, shift: int
) -> Tensor:
    """Return the estimate of x_0 [B,C,H,W] from x_t at noise times `timesteps` [B] under `labels` [B]."""
    heard = shifted(timesteps, shift, noise.config.num_train_timesteps)
    output = unet(x_t, heard, class_labels=labels).sample
    return predict_x0(output, x_t, heard, noise.alphas_cumprod, noise.config.prediction_type)


def draw_inputs(
    pairs: Pairs, batch: int, stage: int, config: StudentConfig, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a batch for one student step: inputs x_t, noise times [B], labels [B] and the teacher's x_0.

    The first step starts from the pair's noise; later steps start from the state the teacher's own trajectory
    passes at their time, whose end is known.
    """
    stream = generator(seed, "student", step)
    index = torch.randint(0, len(pairs.labels), (batch,), generator=stream)
    first, *later = sorted(
        {t for steps in range(1, stage + 1) for t in student_timesteps(steps, pairs.horizon)}
    )[::-1]
    timesteps = torch.full((batch,), first)
    x_t = pairs.noise[index]
    if later:
        is_later = torch.rand(batch, generator=stream) >= config.first_step_share
        which = torch.tensor(later)[torch.randint(0, len(later), (batch,), generator=stream)]
        timesteps = torch.where(is_later, which, timesteps)
        for t in later:
            x_t = torch.where((timesteps == t)[:, None, None, None], pairs.states[t][index], x_t)
    return x_t, timesteps, pairs.labels[index], pairs.samples[index]
