"""Sampling many images at once that need not be at the same step: batches of single steps (Orca, OSDI 2022).

A `Chain` is one image on its way from noise to sample. `advance` moves any set of them on by one step with
one evaluation of the network, so that between two evaluations chains may join and leave.
"""

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from counterpoint.flow import check_guider, initial_scale, scaled_input, set_steps
from counterpoint.guidance import hooks_layers, is_perturbed
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.unet import null_class

# What these know at step k of n is the same for every chain, so that one call can move many on.
_MEMORYLESS = (TimestepShiftScheduler, DDIMScheduler, DDPMScheduler)


class Chain:
    """One image between noise and sample; the same numbers as `ClassConditionalPipeline` on `generator`.

    Args:
        network: as in `sampling.sample`.
        scheduler: any scheduler that `sampling.sample` takes; it is copied, never changed.
        label: the class, from 0.
        steps: of the scheduler, which raises ValueError for a number that it does not take.
        guidance_scale: see `sampling.sample`; 1 is the plain conditional model.
        generator: draws the noise; it stays where the first draw leaves it, a copy goes on.
        guider: takes the place of `guidance_scale`; it is copied, never changed. Raises ValueError for one
            that hooks itself into the network's layers, and so perturbs whole evaluations.

    Attributes:
        state: x_t [1,C,H,W], after the last step the sample.
        index: how many steps are taken.
    """

    def __init__(
        self,
        network: Any,
        scheduler: SchedulerMixin,
        label: int,
        steps: int,
        guidance_scale: float,
        generator: torch.Generator,
        guider: BaseGuidance | None = None,
    ) -> None:
        if guider is not None and hooks_layers(guider):
            raise ValueError(
                f"guider={type(guider).__name__} hooks the network's layers, which others hear too: use "
                "BatchedPerturbedAttentionGuidance, which marks rows"
            )
        check_guider(guider, scheduler)
        self.label, self.steps, self.guidance_scale = label, steps, guidance_scale
        self.origin, self.scheduler = scheduler, _fork(scheduler)
        set_steps(self.scheduler, steps)
        weights = next(network.parameters())
        side = network.config.sample_size
        noise = randn_tensor(
            (1, network.config.in_channels, side, side), generator, device=weights.device, dtype=weights.dtype
        )
        self.state: Tensor = noise * initial_scale(self.scheduler)
        self.generator, self.index = generator.clone_state(), 0
        self.perturber = guider
        self.guider = None if guider is None else _at_step(self, guider, 0)

    @property
    def rows(self) -> int:
        """Rows of the next evaluation: one for each branch that its guidance hears."""
        if self.guider is None:
            return 1 if self.guidance_scale == 1.0 else 2
        return int(self.guider.num_conditions)

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
def advance(network: Any, chains: Sequence[Chain], sizes: Sequence[int]) -> int:
    """Move all `chains` on by one step with one evaluation of the network; return the rows evaluated.

    The rows of all chains are filled up with copies of the first to the smallest of `sizes` that holds them.
    If none does (a guided chain where only single rows are exact) there are several evaluations. Chains of
    any guidance share one, as only rows of their own are heard without condition, or perturbed.
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
        scaled_input(stepper, state, t) for stepper, state, t in zip(steppers, states, times, strict=True)
    ]
    heard = torch.cat([t.reshape(1).expand(len(group)) for group, t in zip(groups, times, strict=True)])
    order = list(itertools.chain(*groups))
    guiders = [None if chain.guider is None else _fork(chain.guider) for chain in order]
    outputs, rows = _guided(network, torch.cat(inputs), heard, order, guiders, sizes)
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
    for chain, guider in zip(order, guiders, strict=True):
        if guider is not None:
            chain.guider = guider if chain.done else _at_step(chain, guider, chain.index)
    return rows


def _groups(chains: Sequence[Chain]) -> list[list[Chain]]:
    """Part the chains into those that one call of a scheduler moves on."""
    groups: dict[tuple[int, ...], list[Chain]] = {}
    for chain in chains:
        shared = type(chain.origin) in _MEMORYLESS
        key = (id(chain.origin), chain.steps, chain.index) if shared else (id(chain),)
        groups.setdefault(key, []).append(chain)
    return list(groups.values())


@dataclass(frozen=True)
class _Row:
    """A row of an evaluation."""

    source: int
    """Index of its chain."""
    label: int
    perturber: BaseGuidance | None = None
    """By whom it is perturbed, if it is."""


def _guided(
    network: Any,
    x: Tensor,
    times: Tensor,
    chains: Sequence[Chain],
    guiders: Sequence[BaseGuidance | None],
    sizes: Sequence[int],
) -> tuple[Tensor, int]:
    """Return `guidance.guided`'s output [n,C,H,W] for inputs x [n,C,H,W] at times [n], and the rows."""
    null = null_class(network)
    rows: list[list[_Row]] = []
    branches: dict[int, tuple[BaseGuidance, list[Any]]] = {}
    for index, (chain, guider) in enumerate(zip(chains, guiders, strict=True)):
        if guider is None:
            labels = [chain.label, null][: chain.rows]
            rows.append([_Row(index, label) for label in labels])
            continue
        conditions = (torch.tensor([chain.label]), torch.tensor([null]))
        heard = guider.prepare_inputs({"class_labels": conditions})
        branches[index] = (guider, heard)
        rows.append(
            [
                _Row(index, int(branch.class_labels), chain.perturber if is_perturbed(branch) else None)
                for branch in heard
            ]
        )
    outputs, evaluated = _evaluated(network, x, times, list(itertools.chain(*rows)), sizes)
    ends = list(itertools.accumulate(len(own) for own in rows))
    begins = [end - len(own) for end, own in zip(ends, rows, strict=True)]
    combined = outputs[begins]  # a copy; the condition's branch is the first of each
    free = [index for index, own in enumerate(rows) if index not in branches and len(own) == 2]
    if free:
        scale = torch.tensor([chains[index].guidance_scale for index in free], dtype=x.dtype).to(x.device)
        null_output = outputs[[begins[index] + 1 for index in free]]
        combined[free] = null_output + scale.reshape(-1, 1, 1, 1) * (combined[free] - null_output)
    for index, (guider, heard) in branches.items():
        for branch, output in zip(heard, outputs[begins[index] : ends[index]].split(1), strict=True):
            branch.noise_pred = output
        combined[index] = guider(heard).pred[0]
    return combined, evaluated


def _evaluated(
    network: Any, x: Tensor, times: Tensor, rows: Sequence[_Row], sizes: Sequence[int]
) -> tuple[Tensor, int]:
    """Return outputs [r,C,H,W] for `rows` [r] out of x [n,C,H,W] at times [n], and the rows evaluated."""
    largest, outputs, evaluated = max(sizes), [], 0
    for start in range(0, len(rows), largest):
        part = rows[start : start + largest]
        size = min(size for size in sizes if size >= len(part))
        full = [*part, *[part[0]] * (size - len(part))]
        source = torch.tensor([row.source for row in full])
        labels = torch.tensor([row.label for row in full]).to(x.device)
        with contextlib.ExitStack() as stack:
            for perturber in {id(row.perturber): row.perturber for row in full if row.perturber}.values():
                marked = torch.tensor([row.perturber is perturber for row in full])
                stack.enter_context(perturber.perturbing(network, marked))
            output = network(
                x[source.to(x.device)], times[source.to(times.device)].to(x.device), class_labels=labels
            ).sample
        outputs.append(output[: len(part)])
        evaluated += size
    return torch.cat(outputs), evaluated


def _fork(stepper: Any) -> Any:
    """Return a copy of a scheduler or a guider whose steps leave it as it is.

    diffusers' replace their attributes rather than change them, save for schedulers' lists of outputs and
    what adaptive projected guidance remembers.
    """
    twin = copy.copy(stepper)
    vars(twin).update(
        {
            name: copy.copy(value)
            for name, value in vars(stepper).items()
            if isinstance(value, list | MomentumBuffer)
        }
    )
    return twin


def _at_step(chain: Chain, guider: BaseGuidance, index: int) -> BaseGuidance:
    """Return a copy of `guider` that knows the step it is at."""
    twin: BaseGuidance = _fork(guider)
    times = chain.scheduler.timesteps
    twin.set_state(step=index, num_inference_steps=len(times), timestep=times[index])
    return twin


@functools.cache
def _draws(step: Callable[..., Any]) -> bool:
    """Whether a scheduler's `step` takes generators; reading a signature is slow."""
    return "generator" in inspect.signature(step).parameters
