"""Where one replica of a trainer stands among its peers, and how it averages with them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


def _alone(network: nn.Module) -> nn.Module:
    return network


@dataclass(frozen=True)
class Place:
    """One replica's place; the defaults are a single process."""

    rank: int = 0
    ranks: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = _alone
    """Makes a network average its gradients over the ranks (DistributedDataParallel, FSDP ...)."""

    def accumulating(self, network: Any, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients stay local, unless this is the last micro-batch."""
        if last or not hasattr(network, "no_sync"):
            return nullcontext()
        context: AbstractContextManager[None] = network.no_sync()
        return context


ALONE = Place()
"""The only replica, on the CPU."""
