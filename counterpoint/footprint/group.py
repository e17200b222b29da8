"""A critic group's memory: its encoder, its heads, and one judgement followed on paper."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.group import CriticGroup
from counterpoint.critics.messages import Samples
from counterpoint.critics.pool import Pool, build_pool
from counterpoint.critics.views import patch_side
from counterpoint.footprint.tracing import Ledger
from counterpoint.schedules import extremes


@dataclass(frozen=True)
class GroupTrace:
    """What one critic group has in memory, in bytes unless said otherwise."""

    heads: int
    """Heads of the group (a number)."""
    levels: int
    """Feature levels that heads sit on (a number)."""
    entries: int
    """Parameters of all its heads together (a number)."""
    judging: int
    """Parameters of the heads that judge one step (a number)."""
    encoder: int
    """The frozen encoder, and the tables of the noise schedule."""
    parameters: int
    """The heads' weights."""
    optimizer: int
    """Their AdamW moments, step counters and ages."""
    gradients: int
    """Gradients of the heads that judge a step, kept until the step ends."""
    activations: int
    """Most at once in one judgement beyond all that: samples, features with the graph back to the fake
    samples, and what heads and operations need on their way."""
    scratch: int
    """What the library of convolutions may copy while one runs."""

    @property
    def states(self) -> int:
        """What is held all the time."""
        return self.encoder + self.parameters + self.optimizer

    @property
    def peak(self) -> int:
        """Most bytes at once, without scratch."""
        return self.states + self.gradients + self.activations


@dataclass(frozen=True)
class PaperPool(Pool):
    """A pool whose draws were made before, as on paper nothing can be drawn."""

    judging: tuple[tuple[int, int], ...] = field(default=())
    """The (slot, spare) pairs that judge."""

    def panel(self, step: int, group: int) -> list[tuple[int, int]]:
        """Return the heads that judge, the same ones in every step."""
        return list(self.judging)

    def refreshed(self, tick: int, ticks_per_step: int = 1) -> list[int]:
        """Return no head: renewing one changes no size."""
        return []


def trace_group(
    ledger: Ledger,
    encoder: Callable[[], Any],
    config: CriticsConfig,
    samples: int,
    alphas_cumprod: Tensor,
    micros: int = 1,
) -> GroupTrace:
    """Follow one step of a group that judges `samples` fake and as many real images, under `ledger`.

    `encoder` builds the frozen encoder; `alphas_cumprod` [T] must have been made for real.
    """
    begun = ledger.live
    eyes = encoder()
    size = sum(t.numel() * t.element_size() for t in [*eyes.parameters(), *eyes.buffers()])
    side, channels = int(eyes.sample_size), int(eyes.in_channels)
    shapes = [eyes.map_shapes(s) for s in (side, patch_side(config, side))]
    pool = paper_pool(config, shapes, side, alphas_cumprod)
    group = CriticGroup(pool, 0, eyes, alphas_cumprod)
    rows = sum(bank.rows.numel() for bank in group.banks)
    parameters = sum(bank.rows.numel() * bank.rows.element_size() for bank in group.banks)
    states = ledger.mark() - begun
    fake, real = (torch.zeros(samples, channels, side, side) for _ in range(2))
    labels = torch.zeros(samples, dtype=torch.long)
    group.judge(Samples(0, fake, real, labels, config.order == "student_first" or micros == 1))
    judged = _judging(pool, config)
    # A later micro-batch's gradients are made beside the sum of those before.
    most = ledger.peak - begun - states + (4 * judged if micros > 1 else 0)
    return GroupTrace(
        heads=pool.heads_per_group,
        levels=pool.levels,
        entries=rows,
        judging=judged,
        encoder=size,
        parameters=parameters,
        optimizer=states - size - parameters,
        gradients=4 * judged,
        activations=max(0, most - 4 * judged),
        scratch=ledger.scratch,
    )


def paper_pool(
    config: CriticsConfig, shapes: list[list[tuple[int, int]]], side: int, alphas_cumprod: Tensor
) -> PaperPool:
    """Lay out a pool for `shapes` of whole images and of windows; as many judge as ever do."""
    schedule = torch.linspace(1.0, 0.0, len(alphas_cumprod))
    plain = config.model_copy(update={"scale_levels": False})
    pool = build_pool(plain, shapes[0], shapes[1], side, schedule, 0, total_steps=1)
    spares, slots = range(config.heads_per_slot), range(len(pool.slots))
    most = len(pool.slots) if config.heads_drawn is None else round(extremes(config.heads_drawn)[1])
    most = pool.heads_per_group if config.panel == "all" else most
    judging = tuple(sorted([(slot, spare) for spare in spares for slot in slots][:most]))
    known = {f.name: getattr(pool, f.name) for f in fields(Pool)}
    return PaperPool(**known, judging=judging)


def _judging(pool: PaperPool, config: CriticsConfig) -> int:
    return sum(pool.slots[slot].shape.size for slot, _ in pool.judging)
