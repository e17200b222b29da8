"""One training step of many heads: one batched computation against a Python loop over modules."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from counterpoint.critics.bank import HeadBank
from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.heads import HeadShape, head_logits
from counterpoint.critics.losses import critic_loss
from counterpoint.schedules import value_at
from counterpoint.section import Section
from counterpoint.seeds import generator


class HeadsBenchConfig(Section):
    """What is timed: forward on real and fake features, hinge loss, backward, AdamW step; all heads."""

    heads: tuple[int, ...] = (16, 64, 160, 480)
    """Numbers of heads."""
    heads_per_slot: int = Field(default=4, ge=1)
    """Heads that share a feature map, as in the pool."""
    batch: int = Field(default=16, ge=1)
    """Real and as many fake samples; 16 is one critic group's share of the demo's batch."""
    channels: int = 48
    """Channels of the feature maps."""
    side: int = 4
    """Side of the feature maps."""
    rounds: int = Field(default=9, ge=1)
    """Rounds, in each of which both take turns; the ratio is the median over rounds."""
    threads: int = Field(default=0, ge=0)
    """Threads for both; 0 keeps torch's default."""


def main(config: HeadsBenchConfig) -> dict[str, Any]:
    """Return `ratio_at_<heads>`: seconds of the loop over seconds of the batched step."""
    if config.threads:
        torch.set_num_threads(config.threads)
    result: dict[str, Any] = {"batch": config.batch, "threads": torch.get_num_threads()}
    for heads in config.heads:
        if heads % config.heads_per_slot:
            raise ValueError(
                f"heads={heads} is not a multiple of heads_per_slot={config.heads_per_slot}: change one"
            )
        batched, looped = contenders(config, heads)
        batched(), looped()
        ratios = []
        for _ in range(config.rounds):
            ours = seconds(batched)
            ratios.append(seconds(looped) / ours)
        result[f"ratio_at_{heads}"] = round(statistics.median(ratios), 2)
        result[f"spread_at_{heads}"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return result


def contenders(config: HeadsBenchConfig, heads: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the batched and the looped step on the same features."""
    shape = HeadShape(config.channels, config.side)
    slots = heads // config.heads_per_slot
    stream = generator(0, "bench", heads)
    features = torch.randn(
        2 * config.batch, slots, config.channels, config.side, config.side, generator=stream
    )
    rows = torch.stack([shape.initial(generator(0, "head", k)) for k in range(heads)])
    critics = CriticsConfig(heads_per_slot=config.heads_per_slot)
    bank = HeadBank(shape, list(range(slots)), rows.clone(), critics)
    modules = nn.ModuleList([as_module(shape, row) for row in rows])
    optimizer = torch.optim.AdamW(
        modules.parameters(),
        lr=value_at(critics.learning_rate, 0.0),
        betas=critics.betas,
        weight_decay=0.0,
        fused=True,
    )

    def batched() -> None:
        weights = bank.rows.clone().requires_grad_()
        fake, real = head_logits(shape, weights, features).chunk(2)
        (gradient,) = torch.autograd.grad(critic_loss("hinge", real, fake).mean(0).sum(), weights)
        bank.update(range(heads), gradient)

    def looped() -> None:
        optimizer.zero_grad(set_to_none=True)
        for k, head in enumerate(modules):
            fake, real = head(features[:, k // config.heads_per_slot]).flatten().chunk(2)
            critic_loss("hinge", real, fake).mean().backward()
        optimizer.step()

    return batched, looped


def as_module(shape: HeadShape, row: Tensor) -> nn.Sequential:
    """Return one head as ordinary torch modules with the weights of `row` [P]."""
    layers: list[nn.Module] = []
    channels = shape.channels
    for kernel, normalised in shape.stages:
        stride, padding = (2, 1) if kernel > 1 else (1, 0)
        layers.append(nn.Conv2d(channels, shape.width, kernel, stride, padding))
        layers += [nn.GroupNorm(shape.groups, shape.width)] if normalised else []
        layers.append(nn.SiLU())
        channels = shape.width
    head = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1), nn.AdaptiveAvgPool2d(1))
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), shape.split(row[None]).values(), strict=True):
            parameter.copy_(value[0])
    return head


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds that one call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
