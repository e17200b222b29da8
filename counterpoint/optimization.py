"""The student's and the teacher's optimizer step: AdamW, warm-up and cosine decay, clipping, EMA."""

import math

import torch
from diffusers.training_utils import EMAModel
from pydantic import Field
from torch import Tensor, nn

from counterpoint.section import Section


class OptimizerConfig(Section):
    """AdamW with linear warm-up, cosine or constant learning rate, gradient clipping and EMA."""

    learning_rate: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW betas."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """AdamW weight decay."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises linearly."""
    decay: bool = True
    """Whether the learning rate falls along a half cosine to zero at the last step."""
    max_gradient_norm: float = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm."""
    ema_decay: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of the exponential moving average of the weights; 0 keeps the last weights."""

    def learning_rate_at(self, step: int, total: int) -> float:
        """Return the learning rate of step `step` (from 0) of `total`."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))
        return rate * 0.5 * (1.0 + math.cos(math.pi * step / total)) if self.decay else rate


class Optimization:
    """The optimizer state of one network over one stage of training."""

    def __init__(self, network: nn.Module, config: OptimizerConfig, total: int) -> None:
        self.config = config
        self.total = total
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.names = [name for name, p in network.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.ema = EMAModel(self.parameters, decay=config.ema_decay)

    def step(self, step: int) -> tuple[float, float]:
        """Apply the accumulated gradients as step `step` of the stage; return (learning rate, norm)."""
        rate = self.config.learning_rate_at(step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters)
        return rate, float(norm)

    def averaged(self) -> dict[str, Tensor]:
        """Return the moving average of the weights by parameter name, copied to the CPU."""
        return {
            name: p.detach().cpu().clone() for name, p in zip(self.names, self.ema.shadow_params, strict=True)
        }

    def state(self) -> dict[str, Tensor]:
        """Return optimizer moments and EMA as named tensors."""
        named: dict[str, Tensor] = {"ema_steps": torch.tensor(self.ema.optimization_step)}
        for name, p, shadow in zip(self.names, self.parameters, self.ema.shadow_params, strict=True):
            named[f"ema.{name}"] = shadow
            for key, value in self.optimizer.state.get(p, {}).items():
                named[f"{key}.{name}"] = value
        return {name: tensor.detach().cpu().clone() for name, tensor in named.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned, for the same network."""
        self.ema.optimization_step = int(state["ema_steps"])
        for name, p, shadow in zip(self.names, self.parameters, self.ema.shadow_params, strict=True):
            shadow.data.copy_(state[f"ema.{name}"])
            self.optimizer.state.pop(p, None)
            found = {key: state[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in state}
            if found:
                # The step counter stays on the CPU, as AdamW itself keeps it.
                self.optimizer.state[p] = {
                    key: value.clone() if key == "step" else value.to(p.device, copy=True)
                    for key, value in found.items()
                }


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


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
