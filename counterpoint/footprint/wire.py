"""Bytes that actors send each other in a step: samples to critics, gradients back, what replicas learned."""

from dataclasses import dataclass

from counterpoint.critics.config import KINDS, CriticsConfig

LABEL = 8
"""Bytes of a label, int64."""
LOGIT = 4


@dataclass(frozen=True)
class PanelTraffic:
    """Bytes of arrays in one step against the panel, over all trainers and critics."""

    to_critics: int
    """Fake and real samples with their labels."""
    to_trainers: int
    """Gradients, and mean logits by kind and level."""
    between_replicas: int
    """Gradients of the heads that judged, from each replica to each other."""

    @property
    def total(self) -> int:
        """All together."""
        return self.to_critics + self.to_trainers + self.between_replicas


def panel_traffic(
    config: CriticsConfig,
    shape: tuple[int, int, int],
    batch: int,
    levels: int,
    judging: int,
    ranks: int = 1,
    micros: int = 1,
    replicas: int = 1,
    number: int = 4,
) -> PanelTraffic:
    """Return the traffic of a step of `batch` samples of `shape` [C,H,W] over all ranks and micro-batches.

    `levels` are feature levels with heads, `judging` the parameters of the heads of one group that judge a
    step, `number` the bytes of a number on the wire (2 for bfloat16). Headers of messages are not counted.
    """
    image = number * shape[0] * shape[1] * shape[2]
    messages = ranks * micros * config.levels_per_step
    statistics = 2 * LOGIT * len(KINDS) * levels
    peers = replicas * (replicas - 1) * config.levels_per_step
    return PanelTraffic(
        to_critics=batch * (2 * image + LABEL),
        to_trainers=batch * image + messages * statistics,
        between_replicas=peers * (4 * judging + micros * statistics),
    )
