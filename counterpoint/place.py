"""Where one replica of a trainer stands among its peers, and how they share the work."""

from dataclasses import dataclass, field

import torch

from counterpoint.strategies.config import StrategyConfig


@dataclass(frozen=True)
class Place:
    """One replica's place; the defaults are a single process."""

    rank: int = 0
    ranks: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """How the replicas train one network together, over torch's default process group."""


ALONE = Place()
"""The only replica, on the CPU."""
