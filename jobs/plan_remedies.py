"""What to change where an actor does not fit, the cheapest change first, each tried on paper."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from counterpoint.footprint.learner import LearnerTrace
from counterpoint.footprint.sharding import share_out
from counterpoint.lora import LoraSection
from counterpoint.strategies.config import StrategyConfig
from jobs.plan_cast import sizes_of, trace_trainer
from jobs.plan_networks import network_of
from jobs.plan_settings import TextPlan

LORA_RANK = 16
Change = tuple[str, dict[str, Any]]
"""A remedy as a user writes it, and the fields of the planned configuration that it sets."""


@dataclass(frozen=True)
class Remedy:
    """A change, on top of those before it, and what a trainer then holds on its GPU."""

    setting: str
    device: int


def trainer_remedies(config: Any, trace: LearnerTrace, held: int, limit: int) -> list[Remedy]:
    """Return changes that bring a trainer from `held` bytes to at most `limit`, or all that help.

    `trace` is that of the configuration as it is; a step is followed again only where a change alters it.
    What is held beside the step (critics in the trainer, for one) stays as it is.
    """
    found: list[Remedy] = []
    traces = {_followed(config): trace}
    beside = held - _device(config, trace)
    for change in CHANGES:
        for setting, fields in change(config):
            tried = config.model_copy(update=fields)
            key = _followed(tried)
            if key not in traces:
                traces[key] = trace_trainer(tried, network_of(tried))
            device = beside + _device(tried, traces[key])
            if device >= held:
                continue
            held = device
            found.append(Remedy(setting, device))
            config = tried
            if device <= limit:
                return found
    return found


def _followed(config: Any) -> tuple[Any, ...]:
    """What a trainer's trace depends on, of all that a change may set."""
    sizes, strategy = sizes_of(config), config.trainer.strategy
    halved = strategy.precision == "bf16" and strategy.name
    adapters = config.lora.rank if isinstance(config, TextPlan) else 0
    return halved, strategy.activation_checkpointing, sizes.micro, min(2, sizes.accumulate), adapters


def _device(config: Any, trace: LearnerTrace) -> int:
    sizes = sizes_of(config)
    return share_out(trace, config.trainer.strategy, sizes.workers, sizes.accumulate, gpu=True).device


def _strategy(config: Any, **fields: Any) -> dict[str, Any]:
    known = config.trainer.strategy.model_dump(exclude_unset=True) | fields
    return {"trainer": config.trainer.model_copy(update={"strategy": StrategyConfig(**known)})}


def _checkpointing(config: Any) -> Iterator[Change]:
    if not config.trainer.strategy.activation_checkpointing:
        fields = _strategy(config, activation_checkpointing=True)
        yield "trainer.strategy.activation_checkpointing=true", fields


def _bf16(config: Any) -> Iterator[Change]:
    if config.trainer.strategy.precision == "fp32":
        yield "trainer.strategy.precision=bf16", _strategy(config, precision="bf16")


def _sharding(config: Any) -> Iterator[Change]:
    if config.trainer.workers > 1 and config.trainer.strategy.name == "ddp":
        yield "trainer.strategy.name=fsdp", _strategy(config, name="fsdp")
    if config.trainer.strategy.name == "deepspeed":
        for stage in range(config.trainer.strategy.zero_stage + 1, 4):
            yield f"trainer.strategy.zero_stage={stage}", _strategy(config, zero_stage=stage)


def _micro_batches(config: Any) -> Iterator[Change]:
    sizes = sizes_of(config)
    levels = config.critics.levels_per_step if hasattr(config, "critics") else 1
    for accumulate in range(sizes.accumulate + 1, max(sizes.batches.values()) + 1):
        parts = sizes.workers * accumulate * levels
        first = hasattr(config, "critics") and config.critics.order == "critics_first"
        if not any(size % parts for size in sizes.batches.values()):
            fields: dict[str, Any] = {"trainer": config.trainer.model_copy(update={"accumulate": accumulate})}
            if first and config.adversarial.uses_panel:
                fields["critics"] = config.critics.model_copy(update={"order": "student_first"})
            also = " critics.order=student_first" if "critics" in fields else ""
            yield f"trainer.accumulate={accumulate}{also}", fields
            return


def _offload(config: Any) -> Iterator[Change]:
    strategy = config.trainer.strategy
    if strategy.sharded and not strategy.offload:
        yield "trainer.strategy.offload=true", _strategy(config, offload=True)


def _lora(config: Any) -> Iterator[Change]:
    if isinstance(config, TextPlan) and config.lora.rank == 0:
        yield f"lora.rank={LORA_RANK}", {"lora": LoraSection(rank=LORA_RANK)}


CHANGES: tuple[Callable[[Any], Iterator[Change]], ...] = (
    _checkpointing, _bf16, _sharding, _offload, _micro_batches, _lora,
)  # fmt: skip
