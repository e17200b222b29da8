"""One micro-batch of each trainer with made-up samples, as `trace_learner` follows it."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from counterpoint.diffusion import NoisyBatch, diffusion_loss
from counterpoint.footprint.learner import MicroStep
from counterpoint.student import StudentConfig, student_x0


def teacher_micro_step(noise: SchedulerMixin, shape: tuple[int, int, int], samples: int) -> MicroStep:
    """Return the diffusion loss on `samples` images of `shape` [C,H,W]; see `TeacherTrainer.step`."""

    def loss(network: Callable[..., Any]) -> Tensor:
        zero = torch.zeros(samples, dtype=torch.long)
        images, draws = torch.zeros(samples, *shape), torch.zeros(samples, *shape)
        return diffusion_loss(network, noise, NoisyBatch(images, zero, zero, draws))

    return loss


def student_micro_step(
    noise: DDPMScheduler, shape: tuple[int, int, int], samples: int, student: StudentConfig
) -> MicroStep:
    """Return the student's loss against pairs and panel on `samples` samples; see `Distiller.step`."""

    def loss(network: Callable[..., Any]) -> Tensor:
        zero = torch.zeros(samples, dtype=torch.long)
        x_t, target, real, gradient = (torch.zeros(samples, *shape) for _ in range(4))
        fake = student_x0(network, x_t, zero, zero, noise, student.timestep_shift)
        whole = F.mse_loss(fake, target) + (fake * gradient).sum()
        del real
        return whole

    return loss
