"""The heads of one bank that judge a step, and what the student hears from all that do."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoint.critics.bank import HeadBank
from counterpoint.critics.config import KINDS, CriticsConfig
from counterpoint.critics.heads import head_logits
from counterpoint.critics.losses import generator_loss
from counterpoint.critics.pool import Slot
from counterpoint.critics.views import Features


@dataclass(frozen=True)
class Seats:
    """Heads of one bank: `rows`, slot by slot, as many of each slot of `slots`."""

    bank: HeadBank
    rows: list[int]
    slots: list[Slot]
    """Whose features are judged, each by len(rows) / len(slots) heads in turn."""

    def weights(self) -> Tensor:
        """Return a copy of the heads' weights [len(rows), P]."""
        return self.bank.rows[self.rows]

    def logits(self, weights: Tensor, features: Features) -> Tensor:
        """Return the logits [n, len(rows)] of heads with `weights`, averaged over the windows of an image."""
        stacked = torch.stack([features[slot.kind][slot.level] for slot in self.slots], dim=1)
        logits = head_logits(self.bank.shape, weights, stacked)
        local = KINDS[self.slots[0].kind].startswith("local")
        return logits.unflatten(0, (-1, self.bank.config.patch_windows)).mean(1) if local else logits

    def homes(self) -> list[Slot]:
        """Return the slot of each row."""
        return [slot for slot in self.slots for _ in range(len(self.rows) // len(self.slots))]


def student_gradient(
    panel: Sequence[Seats], config: CriticsConfig, fake: Features, images: Tensor
) -> tuple[float, Tensor, int]:
    """Return the student's loss, summed over samples, its gradient in `images`, and how many heads voted.

    `fake` are the features of `images` [n,C,H,W], with their graph. Heads on probation do not vote; without a
    vote loss and gradient are zero.
    """
    votes = []
    for seats in panel:
        mature = (seats.bank.updates[seats.rows] >= config.probation).to(images.device)
        if mature.any():
            votes.append(seats.logits(seats.weights(), fake)[:, mature])
    if not votes:
        return 0.0, torch.zeros_like(images), 0
    losses = generator_loss(config.loss, torch.cat(votes, dim=1))
    total = (losses.sum(1) if config.reduction == "sum" else losses.mean(1)).sum()
    (gradient,) = torch.autograd.grad(total, images)
    return float(total.detach()), gradient, losses.shape[1]
