"""Every process holds a shard of weights, gradients and moments (torch's fully_shard, FSDP2)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from counterpoint.strategies.blocks import blocks_of
from counterpoint.strategies.learner import MOMENTS, Learner, Shard
from counterpoint.strategies.whole import adamw


class ShardedLearner(Learner):
    """A network whose parameters are sharded along their first dimension, gathered block by block."""

    def _share_out(self) -> None:
        place, strategy = self.place, self.place.strategy
        bf16 = torch.bfloat16 if strategy.precision == "bf16" else None
        pinned = place.device.type == "cuda"
        options: dict[str, Any] = {
            "mesh": init_device_mesh(place.device.type, (place.ranks,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32 if bf16 else None),
            "offload_policy": CPUOffloadPolicy(pinned) if strategy.offload else OffloadPolicy(),
            "reshard_after_forward": True,
        }  # fmt: skip
        for block in blocks_of(self.module):
            fully_shard(block, **options)
        self.wrapped: FSDPModule = fully_shard(self.module, **options)
        # Kept because a module shows gathered parameters in their stead between passes.
        self.held: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        self.parameters = [self.held[name] for name in self.names]
        self.network = self._forward
        self.optimizer = adamw(self.parameters, self)

    def _forward(self, *args: Any, **options: Any) -> Any:
        # Autocast brings together what blocks hand each other and weights that are gathered as bf16.
        bf16 = self.place.strategy.precision == "bf16"
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=bf16):
            return self.module(*args, **options)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients are not averaged unless this is the last micro-batch."""
        return self._syncing(last)

    @contextmanager
    def _syncing(self, last: bool) -> Iterator[None]:
        self.wrapped.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        loss.backward()

    def _update(self) -> float:
        # Norms of shards meet on the network's device: NCCL does not take offloaded gradients.
        gradients = [_local(p.grad) for p in self.parameters if p.grad is not None]
        squared = nn.utils.get_total_norm(gradients).square().to(self.place.device)
        dist.all_reduce(squared)
        norm = squared.sqrt()
        scale = torch.clamp(self.max_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _piece(self, index: int) -> Tensor:
        return _local(self.parameters[index])

    def _span(self, index: int) -> tuple[int, int]:
        return self._rows(self.shapes[index])

    def _rows(self, shape: torch.Size) -> tuple[int, int]:
        """The span of a parameter that fully_shard gives this rank: as `chunk` would cut its rows."""
        rows, width = -(-shape[0] // self.place.ranks), shape.numel() // max(1, shape[0])
        start = min(self.place.rank * rows, shape[0])
        return start * width, min(start + rows, shape[0]) * width

    def _moments(self, index: int) -> Shard:
        kept = self.optimizer.state.get(self.parameters[index], {})
        return {key: _local(kept[key]) for key in MOMENTS if key in kept}

    def _forget(self) -> None:
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def _remember(self, index: int, moments: Shard, steps: float) -> None:
        parameter = self.parameters[index]
        kept: dict[str, Any] = {key: torch.zeros_like(parameter) for key in moments}
        for key, piece in moments.items():
            _local(kept[key]).copy_(piece)
        self.optimizer.state[parameter] = kept | {"step": torch.tensor(steps)}

    def _steps(self, index: int) -> float:
        return float(self.optimizer.state[self.parameters[index]]["step"])

    def _untrained(self, name: str, owner: int | None) -> Tensor | None:
        if name not in self.held:
            return super()._untrained(name, owner)
        held = self.held[name]
        return self._assemble(_local(held), held.shape, self._rows(held.shape), owner)

    def _set_untrained(self, name: str, value: Tensor) -> None:
        if name not in self.held:
            super()._set_untrained(name, value)
            return
        start, stop = self._rows(self.held[name].shape)
        piece = _local(self.held[name])
        piece.copy_(value.flatten()[start:stop].view(piece.shape))

    def _written(self) -> None:
        # A pass without gradients leaves the root's weights gathered: they would hide what was written.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's shard itself."""
    assert isinstance(tensor, DTensor)
    shard: Tensor = tensor.to_local().detach()
    return shard
