"""Verdicts asked for a step ahead: how a checkpoint holds them, and how other ranks take them up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoint.critics.messages import Verdict
from counterpoint.critics.panel import PanelVerdict

FIGURES = ("step", "loss", "critic_loss", "samples", "refreshed", "voting")
WHOLE = ("step", "samples", "refreshed", "voting")


@dataclass(frozen=True)
class Answered:
    """A question whose answer is at hand; a `Pending`."""

    verdict: PanelVerdict

    def result(self) -> PanelVerdict:
        """Return the answer."""
        return self.verdict


def verdict_tensors(verdicts: Sequence[PanelVerdict], parts: Sequence[slice]) -> dict[str, Tensor]:
    """Return the verdicts on `parts` of a step's batch as tensors, whose names differ from other ranks'.

    A name ends in the first sample of its part; all ranks' together tell of the whole batch.
    """
    stored: dict[str, Tensor] = {}
    for verdict, part in zip(verdicts, parts, strict=True):
        at = f"{part.start:08d}"
        stored[f"loss.{at}"] = torch.tensor([verdict.loss, part.stop - part.start], dtype=torch.float64)
        if verdict.gradient is not None:
            stored[f"gradient.{at}"] = verdict.gradient.detach().cpu().clone()
        for group, one in verdict.groups.items():
            figures = [float(getattr(one, name)) for name in FIGURES]
            stored[f"group{group}.figures.{at}"] = torch.tensor(figures, dtype=torch.float64)
            stored[f"group{group}.real.{at}"] = one.real_logits.cpu().clone()
            stored[f"group{group}.fake.{at}"] = one.fake_logits.cpu().clone()
    return stored


def verdicts_of(stored: Mapping[str, Tensor], parts: Sequence[slice]) -> list[PanelVerdict]:
    """Return the verdicts on `parts` of the batch from what all ranks' `verdict_tensors` gave together.

    The same parts get back what was stored, bit for bit. Other ones, of another number of ranks, get their
    samples' gradients, rescaled from the mean over the old part to that over the new one, and the figures of
    the old parts that they overlap.
    """
    starts = sorted(int(name.removeprefix("loss.")) for name in stored if name.startswith("loss."))
    sizes = {start: int(stored[f"loss.{start:08d}"][1]) for start in starts}
    return [
        _verdict(stored, part, [s for s in starts if s < part.stop and s + sizes[s] > part.start], sizes)
        for part in parts
    ]


def _verdict(
    stored: Mapping[str, Tensor], part: slice, starts: Sequence[int], sizes: Mapping[int, int]
) -> PanelVerdict:
    """Return the verdict on `part` from the stored parts that begin at `starts`."""
    size = part.stop - part.start
    loss, gradients = 0.0, []
    for start in starts:
        here = slice(max(part.start, start), min(part.stop, start + sizes[start]))
        loss += float(stored[f"loss.{start:08d}"][0]) * ((here.stop - here.start) / size)
        if f"gradient.{start:08d}" in stored:
            gradient = stored[f"gradient.{start:08d}"][here.start - start : here.stop - start]
            gradients.append(gradient if sizes[start] == size else gradient * (sizes[start] / size))
    return PanelVerdict(loss, torch.cat(gradients) if gradients else None, _groups(stored, starts[0]))


def _groups(stored: Mapping[str, Tensor], start: int) -> dict[int, Verdict]:
    """Return what each group said of the part that begins at `start`."""
    end = f".figures.{start:08d}"
    said = {}
    for group in sorted(int(name.removesuffix(end)[len("group") :]) for name in stored if name.endswith(end)):
        values = dict(zip(FIGURES, stored[f"group{group}{end}"].tolist(), strict=True))
        whole = {name: int(values[name]) for name in WHOLE}
        said[group] = Verdict(
            loss=values["loss"],
            critic_loss=values["critic_loss"],
            gradient=None,
            real_logits=stored[f"group{group}.real.{start:08d}"],
            fake_logits=stored[f"group{group}.fake.{start:08d}"],
            **whole,
        )
    return said
