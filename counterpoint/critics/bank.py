"""The weights, optimizer state and life history of all heads of one architecture in one critic group."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from counterpoint.critics.config import KINDS, CriticsConfig
from counterpoint.critics.heads import HeadShape
from counterpoint.critics.pool import Pool
from counterpoint.schedules import value_at


class HeadBank:
    """K heads of one shape: rows of weights [K, P] with AdamW moments, update counts and generations.

    Each head has its own optimizer step counter, so a head that was just born gets its own bias correction
    and a head that rests is not touched at all, not even by weight decay.
    """

    def __init__(self, shape: HeadShape, slots: Sequence[int], rows: Tensor, config: CriticsConfig) -> None:
        self.shape = shape
        self.slots = tuple(slots)
        """Slots of the critic group that sit here, each with `heads_per_slot` consecutive rows."""
        self.config = config
        self.rows = rows
        self.exp_avg = torch.zeros_like(rows)
        self.exp_avg_sq = torch.zeros_like(rows)
        self.optimizer_steps = torch.zeros(len(rows), device=rows.device)
        self.updates = torch.zeros(len(rows), dtype=torch.int64)
        self.generations = torch.zeros(len(rows), dtype=torch.int64)
        self.born = torch.zeros(len(rows), dtype=torch.int64)

    def update(self, chosen: Sequence[int], gradients: Tensor, progress: float = 0.0) -> None:
        """Take one AdamW step (Loshchilov & Hutter 2019) on rows `chosen` with gradients [len(chosen), P].

        Learning rate and weight decay are those of `progress`.
        """
        beta1, beta2 = self.config.betas
        adamw(
            [self.rows[i] for i in chosen],
            list(gradients),
            [self.exp_avg[i] for i in chosen],
            [self.exp_avg_sq[i] for i in chosen],
            [],
            [self.optimizer_steps[i] for i in chosen],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=value_at(self.config.learning_rate, progress),
            weight_decay=value_at(self.config.weight_decay, progress),
            eps=1e-8,
            maximize=False,
        )
        self.updates[list(chosen)] += 1

    def renew(self, row: int, weights: Tensor, generation: int, tick: int) -> None:
        """Replace head `row` by a new one with `weights` [P], born at the end of `tick`."""
        self.rows[row] = weights.to(self.rows)
        self.generations[row] = generation
        self.born[row] = tick + 1
        self.updates[row] = 0
        if self.config.refresh_optimizer_state == "dropped":
            self.exp_avg[row] = 0.0
            self.exp_avg_sq[row] = 0.0
            self.optimizer_steps[row] = 0.0

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that the bank's future depends on, copied."""
        return {name: getattr(self, name).detach().cpu().clone() for name in _STATE}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a state from `state`; raises ValueError if it belongs to another bank."""
        for name in _STATE:
            mine: Tensor = getattr(self, name)
            if state[name].shape != mine.shape:
                raise ValueError(
                    f"critics: a stored {name} is {tuple(state[name].shape)} but this pool needs "
                    f"{tuple(mine.shape)}: resume with the configuration of the stored run"
                )
            mine.copy_(state[name])


def build_banks(pool: Pool, group: int, device: torch.device) -> list[HeadBank]:
    """Build all heads of critic group `group` in their first life, one bank for those that compute alike.

    Heads compute alike if they have one shape and see as many windows of an image.
    """
    homes: dict[tuple[HeadShape, bool], list[int]] = {}
    for number, slot in enumerate(pool.slots):
        homes.setdefault((slot.shape, KINDS[slot.kind].startswith("local")), []).append(number)
    banks = []
    for (shape, _), slots in homes.items():
        seats = itertools.product(slots, range(pool.config.heads_per_slot))
        rows = [pool.initial_head(pool.head_id(group, slot, spare), 0) for slot, spare in seats]
        banks.append(HeadBank(shape, slots, torch.stack(rows).to(device), pool.config))
    return banks


def digest(banks: Iterable[HeadBank]) -> str:
    """Return a short fingerprint of all heads' weights and generations, equal wherever they are equal."""
    sha = hashlib.sha256()
    for bank in banks:
        sha.update(bank.rows.cpu().numpy().tobytes())
        sha.update(bank.generations.numpy().tobytes())
    return sha.hexdigest()[:16]


_STATE = ("rows", "exp_avg", "exp_avg_sq", "optimizer_steps", "updates", "generations", "born")
