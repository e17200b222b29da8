"""The panel as the trainer sees it: samples are routed to critic groups and their verdicts merged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from counterpoint.critics.encoder import Encoder
from counterpoint.critics.group import CriticGroup, Samples, Verdict
from counterpoint.critics.pool import Pool


@dataclass(frozen=True)
class PanelVerdict:
    """The groups' verdicts on one micro-batch, put back in the order of its samples."""

    loss: float
    """Student's loss, averaged over the samples."""
    gradient: Tensor | None
    """Gradient of that average with respect to the fake samples, [n,C,H,W]."""
    groups: dict[int, Verdict]
    """What each group said, without gradients; absent if it was not asked."""


class Pending(Protocol):
    """A question that has been asked."""

    def result(self) -> PanelVerdict:
        """Wait for the answer."""
        ...


class Panel(Protocol):
    """What hosts critic groups: this process, or actors anywhere."""

    pool: Pool

    def ask(self, samples: Samples, groups: Tensor) -> Pending:
        """Have samples judged, sample i by group groups[i]; returns at once where the host can."""
        ...

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return every group's state by name."""
        ...

    def load(self, state: dict[str, dict[str, Tensor]], step: int) -> None:
        """Return every group to a stored state, after which panel step `step` comes next."""
        ...

    def digests(self) -> dict[str, str]:
        """Return each group's digest of its heads."""
        ...


def route(samples: Samples, groups: Tensor) -> dict[int, tuple[Tensor, Samples]]:
    """Split a micro-batch by critic group: {group: (positions, its samples)}, groups in order."""
    routed = {}
    for group in groups.unique().tolist():
        where = torch.nonzero(groups == group).flatten()
        at = where.to(samples.fake.device)
        routed[group] = (
            where,
            Samples(
                samples.step,
                samples.fake[at],
                samples.real[at],
                samples.labels[at],
                samples.judge,
                samples.micro,
                samples.micros,
            ),
        )
    return routed


def merge(samples: Samples, positions: dict[int, Tensor], verdicts: dict[int, Verdict]) -> PanelVerdict:
    """Put the groups' verdicts back in the order of the samples and average over them.

    Each verdict speaks of sums over its samples, so the result does not depend on how they were routed.
    """
    n = len(samples.fake)
    gradient = torch.zeros_like(samples.fake) if samples.judge else None
    for group, where in positions.items():
        part = verdicts[group].gradient
        if gradient is not None and part is not None:
            gradient[where.to(gradient.device)] = part.to(gradient) / n
    said = {group: replace(verdict, gradient=None) for group, verdict in verdicts.items()}
    return PanelVerdict(sum(v.loss for v in verdicts.values()) / n, gradient, said)


@dataclass(frozen=True)
class _Answered:
    verdict: PanelVerdict

    def result(self) -> PanelVerdict:
        return self.verdict


class LocalPanel:
    """All critic groups in this process, one after the other."""

    def __init__(self, pool: Pool, encoder: Encoder, alphas_cumprod: Tensor) -> None:
        self.pool = pool
        self.groups: Sequence[CriticGroup] = [
            CriticGroup(pool, i, encoder, alphas_cumprod) for i in range(len(pool.timesteps))
        ]

    def ask(self, samples: Samples, groups: Tensor) -> Pending:
        """Judge at once; see `Panel.ask`."""
        routed = route(samples, groups)
        verdicts = {group: self.groups[group].judge(part) for group, (_, part) in routed.items()}
        return _Answered(merge(samples, {group: where for group, (where, _) in routed.items()}, verdicts))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return every group's state by name."""
        return {group_name(i): group.state() for i, group in enumerate(self.groups)}

    def load(self, state: dict[str, dict[str, Tensor]], step: int) -> None:
        """Return every group to a stored state; a group knows its own step."""
        for i, group in enumerate(self.groups):
            group.load(state[group_name(i)])

    def digests(self) -> dict[str, str]:
        """Return each group's digest of its heads."""
        return {group_name(i): group.digest() for i, group in enumerate(self.groups)}


def group_name(index: int) -> str:
    """Return the name under which group `index` is stored and reported."""
    return f"critics-{index}"
