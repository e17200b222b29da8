"""Which strategy trains a network over several processes, and with what savings of memory."""

import importlib.util
from typing import Literal

from pydantic import Field, model_validator

from counterpoint.section import Section


class StrategyConfig(Section):
    """How a trainer's weights, gradients and optimizer state are shared out over its workers."""

    name: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """ddp: every worker holds everything; fsdp: each holds a shard of everything (FSDP2); deepspeed: ZeRO."""
    zero_stage: Literal[1, 2, 3] = Field(default=2)
    """What deepspeed shares out: 1 optimizer state, 2 gradients too, 3 weights too."""
    offload: bool = False
    """Keep what is shared out in the memory of the host, not of the GPU; fsdp and deepspeed."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of forward and backward passes; the optimizer always works on fp32 weights."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass, one block at a time, instead of keeping them."""

    @model_validator(mode="after")
    def _check(self) -> "StrategyConfig":
        if self.offload and self.name == "ddp":
            raise ValueError(
                "offload=true with name=ddp: ddp shares nothing out to offload; set name=fsdp or "
                "name=deepspeed, or offload=false"
            )
        # Not "is it set": a stored configuration names every field, the default stage among them.
        if self.name != "deepspeed" and self.zero_stage != type(self).model_fields["zero_stage"].default:
            raise ValueError(
                f"zero_stage={self.zero_stage} with name={self.name}: only deepspeed has ZeRO stages; set "
                "name=deepspeed, or leave zero_stage out"
            )
        return self

    @property
    def sharded(self) -> bool:
        """Whether a worker holds only a part of the weights or of their optimizer's state."""
        return self.name != "ddp"

    @property
    def in_words(self) -> str:
        """What is set, in a few words: `deepspeed zero_stage=3 offload bf16`."""
        stage = [f"zero_stage={self.zero_stage}"] if self.name == "deepspeed" else []
        saving = [name for name in ("offload", "activation_checkpointing") if getattr(self, name)]
        return " ".join([self.name, *stage, *saving, self.precision])


def check_installed(strategy: StrategyConfig) -> None:
    """Raise ValueError if this machine, taken for the workers', lacks what the strategy is made of."""
    if strategy.name != "deepspeed":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "strategy.name=deepspeed, but deepspeed is not installed: pip install it after torch, or "
            "set strategy.name=fsdp"
        )
