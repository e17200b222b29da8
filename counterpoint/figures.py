"""The figures of one step, added up over its micro-batches."""

from typing import Any

from counterpoint.critics.config import KINDS
from counterpoint.critics.panel import PanelVerdict


def describe_verdict(
    figures: dict[str, Any], verdict: PanelVerdict, micros: int, blind: float | None
) -> None:
    """Add a panel's verdict on one of `micros` micro-batches to the figures of a step.

    `critic_excess` is by how much the heads' loss exceeds `blind`, that of a head that sees nothing. Gaps
    between real and fake logits are by group, kind and level, and those of the last micro-batch.
    """
    groups = verdict.groups.values()
    samples = sum(v.samples for v in groups)
    critic_loss = sum(v.critic_loss * v.samples for v in groups) / samples
    tally(figures, "adversarial_loss", verdict.loss / micros)
    tally(figures, "critic_loss", critic_loss / micros)
    if blind is not None:
        tally(figures, "critic_excess", (critic_loss - blind) / micros)
    tally(figures, "refreshed", sum(v.refreshed for v in groups))
    if verdict.gradient is not None:
        tally(figures, "verdict_gradient_norm", float(verdict.gradient.norm()) / micros)
    figures["voting"] = sum(v.voting for v in groups)
    gaps = {}
    for index, v in verdict.groups.items():
        gap = v.real_logits - v.fake_logits
        gaps[f"group{index}"] = {
            kind: gap[k].tolist() for k, kind in enumerate(KINDS) if not gap[k].isnan().all()
        }
    figures["gap"] = gaps


def tally(figures: dict[str, Any], name: str, value: float) -> None:
    """Add `value` to figure `name`."""
    figures[name] = figures.get(name, 0) + value
