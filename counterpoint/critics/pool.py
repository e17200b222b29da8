"""Who is in the pool and whose turn it is: slots, head numbers, panels, refreshes, noise levels.

Everything drawn here comes from counter-based streams, so any process can work out the panel of any step
and the generation of any head without having seen the steps before.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from counterpoint.critics.config import KINDS, REFERENCE_SIDE, CriticsConfig
from counterpoint.critics.heads import HeadShape
from counterpoint.schedules import Scheduled, extremes, is_constant, progress_at, value_at
from counterpoint.seeds import generator


@dataclass(frozen=True)
class Slot:
    """A place for interchangeable heads: one kind on one feature level, within one noise level."""

    kind: int
    """Index into KINDS."""
    level: int
    """Feature level, 0 the finest."""
    shape: HeadShape
    """Architecture of the heads that sit here."""


@dataclass(frozen=True)
class Pool:
    """The whole pool as every process sees it; weights live elsewhere."""

    config: CriticsConfig
    slots: tuple[Slot, ...]
    """The slots of one noise level; every noise level has the same."""
    timesteps: tuple[int, ...]
    """The noise levels t*, scaled to the images, one per critic group."""
    seed: int
    total_steps: int = 0
    """Panel steps of the whole training, in which numbers that change do so; 0 where nobody knows."""

    def __post_init__(self) -> None:
        changing = self.config.changing()
        if changing and not self.total_steps:
            raise ValueError(
                f"critics.{changing[0]} changes over training, but how many steps this panel judges is not "
                "known here: give it as one number"
            )
        high = 1.0 if self.config.heads_drawn is None else extremes(self.config.heads_drawn)[1]
        if high > self.heads_per_group:
            raise ValueError(
                f"critics.heads_drawn reaches {high:g}, but a noise level has {self.heads_per_group} heads: "
                "lower it, or raise critics.heads_per_slot"
            )

    @property
    def heads_per_group(self) -> int:
        """Heads at one noise level."""
        return len(self.slots) * self.config.heads_per_slot

    @property
    def size(self) -> int:
        """Heads in the pool."""
        return self.heads_per_group * len(self.timesteps)

    @property
    def levels(self) -> int:
        """Feature levels that any head sits on."""
        return max(slot.level for slot in self.slots) + 1

    def head_id(self, group: int, slot: int, spare: int) -> int:
        """Return the number of a head, unique in the pool and stable over the run."""
        return (group * len(self.slots) + slot) * self.config.heads_per_slot + spare

    def initial_head(self, head_id: int, generation: int) -> Tensor:
        """Build the weights [P] of a head at the start of its `generation`-th life, anywhere."""
        slot = head_id % self.heads_per_group // self.config.heads_per_slot
        return self.slots[slot].shape.initial(generator(self.seed, "head", head_id, generation))

    def panel(self, step: int, group: int) -> list[tuple[int, int]]:
        """Return the (slot, spare) pairs that judge at `step`, sorted."""
        slots, spares = len(self.slots), self.config.heads_per_slot
        if self.config.panel == "all":
            return [(slot, spare) for slot in range(slots) for spare in range(spares)]
        stream = generator(self.seed, "panel", step, group)
        if self.config.panel == "uniform":
            drawn = self.heads_drawn(step)
            chosen = torch.randperm(slots * spares, generator=stream)[:drawn].sort().values.tolist()
            return [(head // spares, head % spares) for head in chosen]
        draw = torch.randint(0, spares, (slots,), generator=stream).tolist()
        return list(enumerate(draw))

    def progress(self, step: int) -> float:
        """Return how far panel step `step` is, in [0,1]; 0 where the number of steps is not known."""
        return progress_at(step, self.total_steps) if self.total_steps else 0.0

    def heads_drawn(self, step: int) -> int:
        """Return how many heads of a noise level judge at `step` with `panel: uniform`."""
        drawn = self.config.heads_drawn
        return len(self.slots) if drawn is None else round(value_at(drawn, self.progress(step)))

    def band_weights(self, step: int) -> list[float]:
        """Return the weight of each group's judgement at `step`, with a mean of 1; empty for all alike."""
        weights = [value_at(weight, self.progress(step)) for weight in self.config.band_weights]
        mean = math.fsum(weights) / max(1, len(weights))
        return [weight / mean for weight in weights]

    def refreshed(self, tick: int, ticks_per_step: int = 1) -> list[int]:
        """Return the ids of the heads that are re-initialised at the end of `tick`, anywhere in the pool."""
        rate, ticks = self.config.refresh_rate, self.total_steps * ticks_per_step
        now = value_at(rate, progress_at(tick, ticks) if ticks else 0.0)
        if now == 0:
            return []
        stream = generator(self.seed, "refresh", tick)
        if self.config.refresh_draw == "bernoulli":
            return torch.nonzero(torch.rand(self.size, generator=stream) < now).flatten().tolist()
        # Fractions carry over: 0.6 heads a tick are three in five ticks. In floats 0.29 * 100 is not 29.
        if is_constant(rate):
            due = Fraction(str(now)) * self.size
            count = math.floor((tick + 1) * due) - math.floor(tick * due)
        else:
            before, after = (math.floor(_due(rate, ticks, t) * self.size) for t in (tick, tick + 1))
            count = after - before
        return torch.randperm(self.size, generator=stream)[:count].sort().values.tolist()

    def assign_groups(self, step: int, batch: int) -> Tensor:
        """Return the critic group [batch] that judges each sample of a step, as even a share as possible.

        `levels_per_step` groups are drawn, and samples are dealt to them in turn, so any contiguous part of
        the batch (a rank's) is shared out evenly too.
        """
        groups = len(self.timesteps)
        chosen = torch.randperm(groups, generator=generator(self.seed, "levels", step))[
            : self.config.levels_per_step
        ]
        return chosen.sort().values[torch.arange(batch) % len(chosen)]


def build_pool(
    config: CriticsConfig,
    map_shapes: list[tuple[int, int]],
    patch_shapes: list[tuple[int, int]],
    side: int,
    alphas_cumprod: Tensor,
    seed: int,
    total_steps: int = 0,
) -> Pool:
    """Lay out the pool for feature maps of whole images and of windows, each [(channels, side)] per level.

    Raises ValueError if a noise level lies beyond the schedule, and for numbers that change over training
    where its `total_steps` are not given.
    """
    slots = []
    for kind, name in enumerate(KINDS):
        if name in config.kinds:
            shapes = map_shapes if name.startswith("global") else patch_shapes
            for level, (channels, map_side) in enumerate(shapes):
                slots.append(Slot(kind, level, HeadShape(channels, map_side, config.width, config.groups)))
    levels = config.noise_levels
    if max(levels) >= len(alphas_cumprod):
        raise ValueError(
            f"critics.noise_levels has {max(levels)}, beyond the schedule's {len(alphas_cumprod)} timesteps: "
            "lower it"
        )
    if config.scale_levels:
        levels = scaled_levels(levels, side, alphas_cumprod)
    return Pool(config, tuple(slots), tuple(levels), seed, total_steps)


def _due(rate: Scheduled, ticks: int, tick: int) -> Fraction:
    """Return the share of the heads that is due before `tick` of `ticks`: the sum of the rates so far."""
    sums = _sums(rate, ticks)
    return sums[min(tick, ticks)] + max(0, tick - ticks) * Fraction(str(value_at(rate, 1.0)))


@lru_cache(maxsize=8)
def _sums(rate: Scheduled, ticks: int) -> tuple[Fraction, ...]:
    """Return the sums of the rates of the first 0, 1, ... `ticks` ticks."""
    rates = (Fraction(str(value_at(rate, progress_at(tick, ticks)))) for tick in range(ticks))
    return tuple(accumulate(rates, initial=Fraction(0)))


def scaled_levels(levels: tuple[int, ...], side: int, alphas_cumprod: Tensor) -> tuple[int, ...]:
    """Return the timesteps at which a `side`-pixel image is as hidden as a 128-pixel one is at `levels`.

    The same noise per pixel destroys more of a smaller image: a pattern spread over more pixels averages it
    away. Constant is sigma / alpha * (128 / side). A level that falls on another takes the nearest free step.
    """
    ratio = ((1.0 - alphas_cumprod) / alphas_cumprod).sqrt()
    result: list[int] = []
    for level in levels:
        distance = (ratio - ratio[level] * side / REFERENCE_SIDE).abs()
        distance[result] = torch.inf
        result.append(int(distance.argmin()))
    return tuple(result)
