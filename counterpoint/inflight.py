"""Sampling many images at once that need not be at the same step: batches of single steps (Orca, OSDI 2022).

A `Chain` is one image on its way from noise to sample. `advance` moves any set of them on by one step with
one evaluation of the network, so that between two evaluations chains may join and leave.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.unet import null_class

# What these know at step k of n is the same for every chain, so that one call can move many on.
_MEMORYLESS = (TimestepShiftScheduler, DDIMScheduler, DDPMScheduler)


class Chain:
    """One image between noise and sample; the same numbers as `ClassConditionalPipeline` on `generator`.

    Args:
        unet: the network, as in `sampling.sample`.
        scheduler: any diffusers scheduler; it is copied, never changed.
        label: the class, from 0.
        steps: of the scheduler, which raises ValueError for a number that it does not take.
        guidance_scale: see `sampling.sample`; 1 is the plain conditional model.
        generator: draws the noise; it stays where the first draw leaves it, a copy goes on.

    Attributes:
        state: x_t [1,C,H,W], after the last step the sample.
        index: how many steps are taken.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        label: int,
        steps: int,
        guidance_scale: float,
        generator: torch.Generator,
    ) -> None:
        self.label, self.steps, self.guidance_scale = label, steps, guidance_scale
        self.origin, self.scheduler = scheduler, _fork(scheduler)
        self.scheduler.set_timesteps(steps)
        weights = next(unet.parameters())
        side = unet.config.sample_size
        noise = randn_tensor(
            (1, unet.config.in_channels, side, side), generator, device=weights.device, dtype=weights.dtype
        )
        self.state: Tensor = noise * float(self.scheduler.init_noise_sigma)
        self.generator, self.index = generator.clone_state(), 0

    @property
    def rows(self) -> int:
        """Rows of an evaluation: 1, or 2 under classifier-free guidance."""
        return 1 if self.guidance_scale == 1.0 else 2

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.index == len(self.scheduler.timesteps)

    @property
    def image(self) -> Tensor:
        """The sample [C,H,W], not clamped; raises ValueError before the last step."""
        if not self.done:
            raise ValueError(
                f"{self.index} of {len(self.scheduler.timesteps)} steps are taken: advance first"
            )
        return self.state[0]


@torch.no_grad()
def advance(unet: UNet2DModel, chains: Sequence[Chain], sizes: Sequence[int]) -> int:
    """Move all `chains` on by one step with one evaluation of the network; return the rows evaluated.

    The rows of all chains are filled up with copies of the first to the smallest of `sizes` that holds them.
    If none does (a guided chain where only single rows are exact) there are several evaluations.
    With sizes from `exactness.exact_sizes` a chain's bits do not depend on the others. No chain has changed
    when an error is raised, whether the network's, a scheduler's, or ValueError for a chain that is done.
    """
    if any(chain.done for chain in chains) or not chains:
        raise ValueError("pass chains, and none that is done")
    groups = _groups(chains)
    steppers = [_fork(group[0].scheduler) for group in groups]
    times = [group[0].scheduler.timesteps[group[0].index] for group in groups]
    states = [torch.cat([chain.state for chain in group]) for group in groups]
    inputs = [
        stepper.scale_model_input(state, t) for stepper, state, t in zip(steppers, states, times, strict=True)
    ]
    heard = torch.stack([t for group, t in zip(groups, times, strict=True) for _ in group])
    outputs, rows = _guided(unet, torch.cat(inputs), heard, list(itertools.chain(*groups)), sizes)
    parts = outputs.split([len(group) for group in groups])
    moved = []
    for group, stepper, t, state, output in zip(groups, steppers, times, states, parts, strict=True):
        streams = [chain.generator.clone_state() for chain in group]
        extra = {"generator": streams} if _draws(type(stepper).step) else {}
        after = stepper.step(output, t, state, **extra).prev_sample
        moved.append((group, after.split(1), streams, stepper))
    for group, after, streams, stepper in moved:
        for chain, state, stream in zip(group, after, streams, strict=True):
            chain.state, chain.generator, chain.scheduler = state, stream, stepper
            chain.index += 1
    return rows


def _groups(chains: Sequence[Chain]) -> list[list[Chain]]:
    """Part the chains into those that one call of a scheduler moves on."""
    groups: dict[tuple[int, ...], list[Chain]] = {}
    for chain in chains:
        shared = type(chain.origin) in _MEMORYLESS
        key = (id(chain.origin), chain.steps, chain.index) if shared else (id(chain),)
        groups.setdefault(key, []).append(chain)
    return list(groups.values())


def _guided(
    unet: UNet2DModel, x: Tensor, times: Tensor, chains: Sequence[Chain], sizes: Sequence[int]
) -> tuple[Tensor, int]:
    """Return `sampling.guided`'s output [n,C,H,W] for inputs x [n,C,H,W] at times [n], and the rows."""
    guided = [row for row, chain in enumerate(chains) if chain.rows == 2]
    labels = [chain.label for chain in chains] + [null_class(unet)] * len(guided)
    source = [*range(len(chains)), *guided]
    outputs, rows = _evaluated(unet, x, times, labels, source, sizes)
    if not guided:
        return outputs, rows
    conditional, unconditional = outputs[guided], outputs[len(chains) :]
    scale = torch.tensor([chains[row].guidance_scale for row in guided], dtype=x.dtype).to(x.device)
    outputs = outputs[: len(chains)].clone()
    outputs[guided] = unconditional + scale.reshape(-1, 1, 1, 1) * (conditional - unconditional)
    return outputs, rows


def _evaluated(
    unet: UNet2DModel, x: Tensor, times: Tensor, labels: list[int], source: list[int], sizes: Sequence[int]
) -> tuple[Tensor, int]:
    """Return outputs [r,C,H,W] for the rows `source` [r] of x under `labels` [r], and the rows evaluated."""
    largest, outputs, rows = max(sizes), [], 0
    for start in range(0, len(source), largest):
        part, classes = source[start : start + largest], labels[start : start + largest]
        size = min(size for size in sizes if size >= len(part))
        fill = size - len(part)
        index = torch.tensor(part + part[:1] * fill)
        condition = torch.tensor(classes + classes[:1] * fill).to(x.device)
        output = unet(
            x[index.to(x.device)], times[index.to(times.device)].to(x.device), class_labels=condition
        ).sample
        outputs.append(output[: len(part)])
        rows += size
    return torch.cat(outputs), rows


def _fork(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return a copy whose steps leave `scheduler` as it is.

    diffusers' schedulers replace their attributes rather than change them, save for their lists of outputs.
    """
    twin = copy.copy(scheduler)
    vars(twin).update(
        {name: list(value) for name, value in vars(scheduler).items() if isinstance(value, list)}
    )
    return twin


@functools.cache
def _draws(step: Callable[..., Any]) -> bool:
    """Whether a scheduler's `step` takes generators; reading a signature is slow."""
    return "generator" in inspect.signature(step).parameters
