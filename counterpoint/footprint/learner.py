"""A trainer's memory: one step of a network under training, followed on paper in one process."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from counterpoint.footprint.tracing import Ledger
from counterpoint.optimization import OptimizerConfig
from counterpoint.place import Place
from counterpoint.strategies.blocks import blocks_of
from counterpoint.strategies.build import build_learner
from counterpoint.strategies.config import StrategyConfig

MicroStep = Callable[[Callable[..., Any]], Tensor]
"""Calls a network on a micro-batch of its own making and returns the loss."""


@dataclass(frozen=True)
class LearnerTrace:
    """What one process that holds everything has in memory during a step, in bytes unless said otherwise."""

    trained: int
    """Parameters that learn (a number)."""
    largest: int
    """Parameters of the largest block that is gathered at once where weights are sharded (a number)."""
    root: int
    """Parameters that are in no block, and stay gathered for all of a step (a number)."""
    parameters: int
    """Weights that learn."""
    fixed: int
    """Weights that do not learn, and buffers."""
    optimizer: int
    """AdamW's two moments and its step counters."""
    average: int
    """The moving average of the weights."""
    activations: int
    """What the forward pass of one micro-batch leaves for the backward pass, inputs included."""
    beside: int
    """Most at once during forward and backward beyond weights, optimizer and average, where a process keeps
    its share of each gradient only: activations, what operations need on their way, shards."""
    step: int
    """Most at once beyond weights, optimizer and average during forward and backward, gradients included."""
    update: int
    """Most that clipping, AdamW and the average need on their way, beyond gradients."""
    scratch: int
    """What the library of convolutions may copy while one runs."""

    @property
    def gradients(self) -> int:
        """One gradient for each weight that learns, in its precision."""
        return self.parameters

    @property
    def states(self) -> int:
        """What is held all the time."""
        return self.parameters + self.fixed + self.optimizer + self.average

    @property
    def peak(self) -> int:
        """Most bytes at once in a step after the first, without scratch."""
        return self.states + max(self.step, self.gradients + self.update)


def trace_learner(
    ledger: Ledger,
    module: nn.Module,
    micro_step: MicroStep,
    optimizer: OptimizerConfig,
    strategy: StrategyConfig,
    micros: int = 1,
    ranks: int = 1,
) -> LearnerTrace:
    """Follow a step of `module` (built under `ledger`) with `micros` micro-batches, on paper or for real.

    `ranks` share the gradients out in `beside`; all else is held whole. `strategy` says precision and
    checkpointing: a sharding one in bf16 computes with bf16 weights, ddp under autocast.
    """
    ledger.kept = 1.0 / ranks
    learner = build_learner(module, optimizer, 1, Place(strategy=_whole(strategy)))
    network = learner.network
    largest, root = gathered(module)
    weights = [p for p in module.parameters() if p.requires_grad]
    for p in weights:
        p.grad = torch.zeros_like(p)
    before = ledger.mark()
    learner.step(0)
    # The first update makes the moments, and then works beside them as any later one does.
    made = [t for kept in learner.optimizer.state.values() for t in kept.values() if isinstance(t, Tensor)]
    moments = sum(map(_size, made))
    update = max(0, ledger.peak - before - moments)
    held = [*module.parameters(), *module.buffers()]
    parameters = sum(map(_size, weights))
    fixed = sum(map(_size, held)) - parameters
    if strategy.sharded and strategy.precision == "bf16":
        network = _in_bf16(module, autocast=strategy.name == "fsdp")
        weights = [p for p in module.parameters() if p.requires_grad]
    states = ledger.mark()
    with _setting_aside(ledger, weights):
        activations = 0
        for _ in range(min(micros, 2)):
            before = ledger.live
            loss = micro_step(network)
            activations = max(activations, ledger.live - before)
            learner.backward(loss)
            del loss
        step, beside = ledger.peak - states, ledger.peak_beside - states
    return LearnerTrace(
        trained=sum(p.numel() for p in weights),
        largest=largest,
        root=root,
        parameters=parameters,
        fixed=fixed,
        optimizer=moments,
        average=sum(map(_size, learner.average.shadow_params)),
        activations=activations,
        beside=beside,
        step=step,
        update=update,
        scratch=ledger.scratch,
    )


def gathered(module: nn.Module) -> tuple[int, int]:
    """Return the parameters of the largest block that FSDP gathers at once, and those of no block.

    A block that lies in another is gathered by itself.
    """
    blocks = blocks_of(module)
    taken: set[int] = set()
    sizes = [0]
    for block in blocks:
        own = {id(p): p.numel() for p in block.parameters() if id(p) not in taken}
        taken |= set(own)
        sizes.append(sum(own.values()))
    return max(sizes), sum(p.numel() for p in module.parameters() if id(p) not in taken)


def _whole(strategy: StrategyConfig) -> StrategyConfig:
    autocast = strategy.precision == "bf16" and not strategy.sharded
    return StrategyConfig(
        precision="bf16" if autocast else "fp32",
        activation_checkpointing=strategy.activation_checkpointing,
    )


@contextlib.contextmanager
def _setting_aside(ledger: Ledger, weights: list[nn.Parameter]) -> Iterator[None]:
    """Count the gradient of each weight, once it is there for the first time, as one that ranks share out."""
    counted = {id(p): 0 for p in weights}

    def set_aside(p: Tensor) -> None:
        if p.grad is not None and counted[id(p)] == 0:
            counted[id(p)] = _size(p.grad)
            ledger.aside += counted[id(p)]

    hooks = [p.register_post_accumulate_grad_hook(set_aside) for p in weights]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_bf16(module: nn.Module, autocast: bool) -> Callable[..., Any]:
    """Give a module bf16 weights; under autocast (FSDP), or with bf16 inputs (DeepSpeed)."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(p.detach().bfloat16(), requires_grad=p.requires_grad))

    def call(*args: Any, **options: Any) -> Any:
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                return module(*args, **options)
        return module(*tree_map(_halved, args), **tree_map(_halved, options))

    return call


def _halved(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
