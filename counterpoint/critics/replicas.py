"""Several copies of one critic group that judge a share of the samples each and learn from all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contribution:
    """What one replica has to tell about a micro-batch; or, added up, what all have."""

    samples: int
    """Samples of this micro-batch."""
    learned: int
    """Samples of the step so far, over which `gradients` are summed."""
    critic_loss: float
    """As in `Verdict`, averaged over `samples`."""
    real_logits: Tensor
    """As in `Verdict`, averaged over `samples`, [kinds, levels]."""
    fake_logits: Tensor
    """The same on fake samples."""
    gradients: tuple[Tensor, ...] = ()
    """Gradient of the heads' loss, summed over `learned`, [heads, P] for each part of the panel; empty before
    the last micro-batch of a step."""


class Replication(Protocol):
    """The place of a critic group among its replicas."""

    index: int
    """Which share of each micro-batch this replica judges."""
    count: int
    """How many replicas there are."""

    def exchange(self, key: tuple[int, int], mine: Contribution) -> Contribution:
        """Bring this replica's part of (step, micro-batch) `key` and return all parts, added up.

        Every replica is given the same bits.
        """
        ...


def added_up(parts: Sequence[Contribution]) -> Contribution:
    """Return the contributions of all replicas, in their order, as that of one.

    Gradients are summed on the CPU in the order of `parts`, so that whoever adds them up gets the same bits.
    """
    samples = sum(part.samples for part in parts)
    return Contribution(
        samples,
        sum(part.learned for part in parts),
        sum(part.critic_loss * part.samples for part in parts) / samples,
        sum((part.real_logits * part.samples for part in parts), torch.zeros(())) / samples,
        sum((part.fake_logits * part.samples for part in parts), torch.zeros(())) / samples,
        tuple(_sum(gradients) for gradients in zip(*(part.gradients for part in parts), strict=True)),
    )


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].cpu().clone()
    for tensor in tensors[1:]:
        total += tensor.cpu()
    return total
