"""One network under training, whoever holds its weights: schedule, average, and one form of checkpoint.

A strategy decides which piece of each parameter this rank owns: a span of the flattened parameter, held in
fp32 with its two AdamW moments. The moving average is kept on the same pieces. Checkpoints hold whole tensors
by parameter name, so that any strategy at any world size goes on from any other's. They are safetensors:
DCP's and DeepSpeed's own checkpoints keep their metadata as pickles, which must not be read from storage
that others can write.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from counterpoint.optimization import OptimizerConfig
from counterpoint.place import ALONE, Place
from counterpoint.schedules import progress_at, value_at

MOMENTS = ("exp_avg", "exp_avg_sq")
REBUILT = "rebuilt_sum"
Frozen = Literal["stored", "rebuilt"]
"""Whether checkpoints hold the parameters that do not learn, or whoever goes on has made them again."""
Shard = dict[str, Tensor]


class Learner(ABC):
    """One network under training; every rank makes the same calls in the same order.

    Only parameters that require gradients learn. The buffers are part of the checkpoint, and so are the other
    parameters where they are `frozen="stored"`; whoever has made the same ones by the time of `load`, as with
    LoRA over a teacher, says `frozen="rebuilt"`, and only a sum is stored, by which a difference is noticed.
    """

    network: Callable[..., Any]
    """What to call for a forward pass; its answer may be bf16."""
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        total: int,
        place: Place = ALONE,
        micros: int = 1,
        prefix: str = "",
        frozen: Frozen = "stored",
    ) -> None:
        """Train `module` for `total` steps of `micros` micro-batches each.

        `prefix` goes before the names of its weights in checkpoints.
        """
        self.module = module.to(place.device)
        self.config, self.total, self.place = config, total, place
        self.micros, self.prefix = micros, prefix
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.shapes = [p.shape for _, p in trained]
        fixed = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self.rebuilt = fixed.keys() if frozen == "rebuilt" else set()
        self.rebuilt_sum = sum(_bits(fixed[name]) for name in self.rebuilt) % 2**62
        state = {name: x for name, x in module.state_dict().items() if name not in self.rebuilt}
        self.entries = {name: tensor.numel() for name, tensor in state.items()}
        self.max_norm = value_at(config.max_gradient_norm, 0.0)
        """What gradients are scaled down to in this step."""
        self._share_out()
        self._average()

    @abstractmethod
    def _share_out(self) -> None:
        """Take the network under the strategy: set `network` and `optimizer`."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Return a context for one micro-batch; gradients stay local unless it is the `last` of a step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, this rank's mean over its samples and micro-batches."""

    @abstractmethod
    def _update(self) -> float:
        """Clip, take an optimizer step, clear the gradients; return their norm over all ranks."""

    @abstractmethod
    def _piece(self, index: int) -> Tensor:
        """Return this rank's piece of trained parameter `index` itself, not a copy."""

    @abstractmethod
    def _span(self, index: int) -> tuple[int, int]:
        """Return which span of the flattened parameter that piece is."""

    @abstractmethod
    def _moments(self, index: int) -> Shard:
        """Return this rank's pieces of the AdamW moments themselves; empty before the first step."""

    @abstractmethod
    def _forget(self) -> None:
        """Set the optimizer back to before its first step."""

    @abstractmethod
    def _remember(self, index: int, moments: Shard, steps: float) -> None:
        """Set the pieces of the AdamW moments, after `steps` steps."""

    @abstractmethod
    def _steps(self, index: int) -> float:
        """Return how many steps AdamW has taken."""

    def _untrained(self, name: str, owner: int | None) -> Tensor | None:
        """Return an entry that does not learn on rank `owner`, on every rank if None."""
        return _here(self.module.state_dict()[name], owner, self.place.rank)

    def _set_untrained(self, name: str, value: Tensor) -> None:
        self.module.state_dict()[name].copy_(value)

    def _written(self) -> None:  # noqa: B027
        """Bring new pieces to the weights that the network computes with."""

    def step(self, step: int) -> tuple[float, float]:
        """Apply the accumulated gradients as step `step` of the stage; return (learning rate, norm)."""
        rate = self.config.learning_rate_at(step, self.total)
        self._set(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self._update()
        self.average.step([nn.Parameter(piece) for piece in self._pieces()])
        return rate, norm

    @torch.no_grad()
    def restart(self, config: OptimizerConfig, total: int, from_average: bool) -> None:
        """Begin another stage of the same network: fresh moments and average, `config`'s settings.

        With `from_average` the weights become their moving average first.
        """
        self.config, self.total = config, total
        if from_average:
            for piece, shadow in zip(self._pieces(), self.average.shadow_params, strict=True):
                piece.copy_(shadow)
            self._written()
        self._set(0)
        self._forget()
        for group in self.optimizer.param_groups:
            group["betas"] = config.betas
        self._average()

    def averaged(self, everywhere: bool = False) -> Shard:
        """Return the moving average of what learns by name, on the CPU; empty on other ranks than 0.

        With `everywhere` each rank gets all of it. Every rank must call.
        """
        owner = None if everywhere else 0
        found = {
            self.prefix + name: self._gather(index, self.average.shadow_params[index], owner)
            for index, name in enumerate(self.names)
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def weights(self) -> Shard:
        """Return this rank's share of the whole tensors of the network's state; every rank must call."""
        trained = {name: index for index, name in enumerate(self.names)}
        found = {}
        for name, owner in self._owners(list(self.entries)):
            if name in trained:
                tensor = self._gather(trained[name], self._piece(trained[name]), owner)
            else:
                tensor = self._untrained(name, owner)
            if tensor is not None:
                found[self.prefix + name] = tensor
        return found

    def state(self) -> Shard:
        """Return this rank's share of the optimizer's state, whole tensors; every rank must call."""
        found: dict[str, Tensor | None] = {}
        if self.place.rank == 0:
            found["ema_steps"] = torch.tensor(self.average.optimization_step)
            if self.rebuilt:
                found[REBUILT] = torch.tensor(self.rebuilt_sum)
        for index, (name, owner) in enumerate(self._owners(self.names)):
            full = self.prefix + name
            found[f"ema.{full}"] = self._gather(index, self.average.shadow_params[index], owner)
            moments = self._moments(index)
            for key, piece in moments.items():
                found[f"{key}.{full}"] = self._gather(index, piece, owner)
            if moments and owner == self.place.rank:
                found[f"step.{full}"] = torch.tensor(self._steps(index))
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Go on from what all ranks' `weights` and `state` returned together, under whichever strategy.

        Raises ValueError where the weights are not this network's, nor those that it was trained beside.
        """
        wanted = {self.prefix + name for name in self.entries}
        found = {name for name in weights if name.startswith(self.prefix)}
        if wanted != found:
            raise ValueError(
                f"weights do not fit the network: missing {sorted(wanted - found)}, "
                f"unknown {sorted(found - wanted)}"
            )
        if self.rebuilt and int(state[REBUILT]) != self.rebuilt_sum:
            raise ValueError(
                "the frozen weights are not those that the checkpoint's were trained on: give the run the "
                "teacher or start that it began with"
            )
        trained = set(self.names)
        for name in self.entries:
            if name not in trained:
                self._set_untrained(name, weights[self.prefix + name])
        self._forget()
        self._average()
        self.average.optimization_step = int(state["ema_steps"])
        for index, name in enumerate(self.names):
            full = self.prefix + name
            self._piece(index).copy_(self._cut(index, weights[full]))
            self.average.shadow_params[index].copy_(self._cut(index, state[f"ema.{full}"]))
            if f"step.{full}" in state:
                moments = {key: self._cut(index, state[f"{key}.{full}"]) for key in MOMENTS}
                self._remember(index, moments, float(state[f"step.{full}"]))
        self._written()

    def end(self) -> None:  # noqa: B027
        """Let go of what the strategy holds; the network must not be used any more."""

    def _pieces(self) -> list[Tensor]:
        return [self._piece(index) for index in range(len(self.names))]

    def _average(self) -> None:
        """Begin the moving average at the weights as they are."""
        self.average = EMAModel(self._pieces(), decay=value_at(self.config.ema_decay, 0.0))

    def _set(self, step: int) -> None:
        """Bring the settings that may change over training to those of step `step` of the stage."""
        progress = progress_at(step, self.total)
        self.max_norm = value_at(self.config.max_gradient_norm, progress)
        self.average.decay = value_at(self.config.ema_decay, progress)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = value_at(self.config.weight_decay, progress)

    def _cut(self, index: int, whole: Tensor) -> Tensor:
        """Return this rank's piece of a whole tensor."""
        start, stop = self._span(index)
        piece = self._piece(index)
        return whole.flatten()[start:stop].to(piece.device, piece.dtype).view(piece.shape)

    def _gather(self, index: int, piece: Tensor, owner: int | None) -> Tensor | None:
        """Return the whole tensor on the CPU of rank `owner`, of every rank if None; all ranks must call."""
        return self._assemble(piece, self.shapes[index], self._span(index), owner)

    def _assemble(
        self, piece: Tensor, shape: torch.Size, span: tuple[int, int], owner: int | None
    ) -> Tensor | None:
        start, stop = span
        if not self.place.strategy.sharded or self.place.ranks == 1:
            return _here(piece.view(shape), owner, self.place.rank)
        whole = torch.zeros(shape.numel(), dtype=piece.dtype, device=self.place.device)
        whole[start:stop] = piece.detach().flatten()
        if owner is None:
            dist.all_reduce(whole)
        else:
            dist.reduce(whole, dst=owner)
        return _here(whole.view(shape), owner, self.place.rank)

    def _owners(self, names: list[str]) -> Iterator[tuple[str, int]]:
        """Yield each name with the rank that saves it: runs of names of about equal size."""
        total = max(1, sum(self.entries[name] for name in names))
        done = 0
        for name in names:
            yield name, done * self.place.ranks // total
            done += self.entries[name]


def _here(tensor: Tensor, owner: int | None, rank: int) -> Tensor | None:
    return tensor.detach().to("cpu", copy=True) if owner in (None, rank) else None


def _bits(tensor: Tensor) -> int:
    """The sum of a tensor's bits read as integers: the same in any order and on any device."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.detach().contiguous().view(kinds[tensor.element_size()]).sum(dtype=torch.int64))
