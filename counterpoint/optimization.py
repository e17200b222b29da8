"""What every trainer's optimizer is set to, weights by name, and sharing a batch out."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from counterpoint.schedules import Scheduled, bounds, is_constant, progress_at, value_at
from counterpoint.section import Section


class OptimizerConfig(Section):
    """AdamW with linear warm-up, cosine or constant learning rate, gradient clipping and EMA."""

    name: Literal["adamw"] = "adamw"
    """The one optimizer that FSDP2 and every ZeRO stage can take, each reading the state of any other."""
    learning_rate: Annotated[Scheduled, bounds(gt=0.0)] = 1e-3
    """Peak learning rate; or, with `decay: false`, a schedule of it."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW betas."""
    weight_decay: Annotated[Scheduled, bounds(ge=0.0)] = 0.01
    """AdamW weight decay."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises linearly."""
    decay: bool = True
    """Whether the learning rate falls along a half cosine to zero at the last step."""
    max_gradient_norm: Annotated[Scheduled, bounds(gt=0.0)] = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: Annotated[Scheduled, bounds(ge=0.0, lt=1.0)] = 0.999
    """Decay of the exponential moving average of the weights; 0 keeps the last weights."""

    @model_validator(mode="after")
    def _check_decay(self) -> "OptimizerConfig":
        if self.decay and not is_constant(self.learning_rate):
            raise ValueError(
                "decay=true lets learning_rate fall along a cosine, but learning_rate is a schedule itself: "
                "set decay=false"
            )
        return self

    def learning_rate_at(self, step: int, total: int) -> float:
        """Return the learning rate of step `step` (from 0) of `total`."""
        peak = value_at(self.learning_rate, progress_at(step, total))
        rate = peak * min(1.0, (step + 1) / max(1, self.warmup_steps))
        return rate * 0.5 * (1.0 + math.cos(math.pi * step / total)) if self.decay else rate


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy parameters by name into `network`; every parameter must be there."""
    missing, unexpected = network.load_state_dict(weights, strict=False)
    lacking = set(missing) & {name for name, _ in network.named_parameters()}
    if lacking or unexpected:
        raise ValueError(
            f"weights do not fit the network: missing {sorted(lacking)}, unknown {sorted(unexpected)}"
        )


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's state as contiguous CPU copies."""
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


def rank_slices(batch: int, rank: int, ranks: int, micros: int) -> list[slice]:
    """Return the micro-batches of rank `rank` as slices of the global batch, in order.

    Raises ValueError unless ranks and micro-batches divide the batch.
    """
    if batch % (ranks * micros):
        raise ValueError(
            f"batch_size={batch} cannot be shared out evenly over trainer.workers={ranks} times "
            f"trainer.accumulate={micros}: use a multiple of {ranks * micros}"
        )
    size = batch // (ranks * micros)
    # Micro-batch m of all ranks is one contiguous part: what critics judge together does not depend on ranks.
    return [slice((m * ranks + rank) * size, (m * ranks + rank + 1) * size) for m in range(micros)]
