"""Floating-point operations of the parts of a distillation step, counted as the real modules run on shapes.

Tensors are on the meta device: shapes without numbers. `torch.utils.flop_counter` counts matrix products,
convolutions and attention, forward and backward, two operations for each multiply-add; what is elementwise is
left out, as in the peak figures that vendors state.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.losses import critic_loss, generator_loss
from counterpoint.critics.prompted_encoder import PromptedEncoder
from counterpoint.critics.seats import Seats
from counterpoint.critics.views import Features, Look, look_at
from jobs.sdxl_parts import SDXL, MadePrompts, build_layout, build_network, weightless_panel

META = torch.device("meta")


@dataclass(frozen=True)
class StepFlops:
    """Operations for one sample, and what is averaged between actors, in numbers."""

    forward: int
    """The student, or one evaluation of the teacher."""
    backward: int
    """The student's gradients."""
    learn: int
    """In a critic group: the encoder's three views of the fake and the real sample, and the heads' step."""
    judge: int
    """In a critic group: from the heads' votes back to the sample."""
    parameters: int
    """Of the student."""
    head_parameters: int
    """Of the heads of one noise level that judge in a step."""
    heads: int
    """In the whole pool."""
    sample: int
    """Numbers in one sample."""


def count(work: Callable[[], Any]) -> tuple[int, Any]:
    """Return the operations of `work`, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        made = work()
    return counter.get_total_flops(), made


def step_flops(unet: Mapping[str, Any], critics: CriticsConfig) -> StepFlops:
    """Return the operations of a step; `unet` is what the configuration departs from SDXL's in."""
    config = {**SDXL, **unet}
    prompts = MadePrompts(config, 1, META)
    network = build_network(config, prompts, META, torch.float32)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
    x, t, label = torch.empty(shape, device=META), torch.empty(1, device=META), _zeros(1)
    forward, output = count(lambda: network(x, t, class_labels=label).sample)
    backward, _ = count(lambda: output.sum().backward())
    encoder = PromptedEncoder(network, prompts)  # type: ignore[arg-type]
    pool, alphas = build_layout(encoder, critics)
    panel = weightless_panel(pool)
    learn, fake, images = _learning(encoder, critics, panel, alphas.to(META), shape)
    judge, _ = count(lambda: _judge(panel, critics, fake, images))
    rows = sum(seats.bank.rows.numel() for seats in panel)
    return StepFlops(
        forward, backward, learn, judge, parameters, rows, pool.size, shape[1] * shape[2] * shape[3]
    )


def _learning(
    encoder: PromptedEncoder,
    critics: CriticsConfig,
    panel: list[Seats],
    alphas: Tensor,
    shape: tuple[int, ...],
) -> tuple[int, Features, Tensor]:
    """Count what a critic group does before it judges; return the fake features with their graph, too."""
    images = torch.empty(shape, device=META, requires_grad=True)
    look = Look(
        torch.empty(shape, device=META), torch.zeros(critics.patch_windows, 2, dtype=torch.long, device=META)
    )

    def see(what: Tensor) -> Features:
        return look_at(encoder, critics, what, _zeros(1), look, critics.noise_levels[0], alphas)

    seen, fake = count(lambda: see(images))
    with torch.no_grad():
        again, real = count(lambda: see(images))
    taught, _ = count(lambda: _teach(panel, critics, fake, real))
    return seen + again + taught, fake, images


def _teach(panel: list[Seats], critics: CriticsConfig, fake: Features, real: Features) -> None:
    """Take the gradients of heads in features that are cut off from the samples, as `Lesson` does."""
    cut = [[[m.detach() for m in maps] for maps in features] for features in (real, fake)]
    for seats in panel:
        weights = seats.weights().requires_grad_()
        logits = [seats.logits(weights, features) for features in cut]
        torch.autograd.grad(critic_loss(critics.loss, *logits).sum(), weights)


def _judge(panel: list[Seats], critics: CriticsConfig, fake: Features, images: Tensor) -> Tensor:
    """Take the student's gradient, as `student_gradient` does."""
    votes = torch.cat([seats.logits(seats.weights(), fake) for seats in panel], dim=1)
    (gradient,) = torch.autograd.grad(generator_loss(critics.loss, votes).sum(), images)
    return gradient


def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long, device=META)
