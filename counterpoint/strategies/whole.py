"""The whole network in every process: alone, or with gradients averaged (DistributedDataParallel)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from counterpoint.place import Place
from counterpoint.schedules import value_at
from counterpoint.strategies.learner import MOMENTS, Learner, Shard


class WholeLearner(Learner):
    """A network that each process holds whole, with fp32 weights; bf16 is torch's autocast."""

    def _share_out(self) -> None:
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.wrapped = self.module
        if averages(self.place):
            cuda = self.place.device.type == "cuda"
            self.wrapped = DistributedDataParallel(self.module, [self.place.device] if cuda else None)
        self.network = self._forward
        self.optimizer = adamw(self.parameters, self)

    def _forward(self, *args: Any, **options: Any) -> Any:
        bf16 = self.place.strategy.precision == "bf16"
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=bf16):
            return self.wrapped(*args, **options)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients are not averaged unless this is the last micro-batch."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        context: AbstractContextManager[None] = self.wrapped.no_sync()
        return context

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        loss.backward()

    def _update(self) -> float:
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _piece(self, index: int) -> Tensor:
        return self.parameters[index].detach()

    def _span(self, index: int) -> tuple[int, int]:
        return 0, self.shapes[index].numel()

    def _moments(self, index: int) -> Shard:
        kept = self.optimizer.state.get(self.parameters[index], {})
        return {key: kept[key] for key in MOMENTS if key in kept}

    def _forget(self) -> None:
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def _remember(self, index: int, moments: Shard, steps: float) -> None:
        kept: dict[str, Any] = {key: piece.clone() for key, piece in moments.items()}
        # The step counter stays on the CPU, as AdamW itself keeps it.
        self.optimizer.state[self.parameters[index]] = kept | {"step": torch.tensor(steps)}

    def _steps(self, index: int) -> float:
        return float(self.optimizer.state[self.parameters[index]]["step"])


def adamw(parameters: list[nn.Parameter], learner: Learner) -> torch.optim.AdamW:
    """Return the AdamW of a learner's configuration, as of its first step, over `parameters`."""
    config = learner.config
    return torch.optim.AdamW(
        parameters,
        lr=value_at(config.learning_rate, 0.0),
        betas=config.betas,
        weight_decay=value_at(config.weight_decay, 0.0),
    )


def averages(place: Place) -> bool:
    """Whether gradients are averaged over ranks; without a process group whoever drives the ranks does it."""
    return place.ranks > 1 and dist.is_initialized()
