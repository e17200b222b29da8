"""A network heard several times at once: with its condition, without it, perturbed; a guider combines them.

Guiders are diffusers' (`diffusers.guiders`) or those of `counterpoint.guiders`, which have the same
interface. One that perturbs the network for some of a batch's rows has, beside it, a method
`perturbing(network, rows)`: a context manager within which the rows marked in `rows` (bool [n]) are heard
perturbed. Then all branches fit into one forward pass.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import guiders
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance, guider_utils
from pydantic import Field
from torch import Tensor

from counterpoint.named_class import find_class
from counterpoint.section import Section
from counterpoint.unet import null_class

PACKAGE = "counterpoint.guiders"
PERTURBED = "pred_cond_skip"
"""What diffusers calls the branch in which the network is perturbed."""

# Each new guider would warn again that diffusers' interface is young; constraints.txt pins it.
guider_utils.logger.addFilter(lambda record: "experimental feature" not in record.getMessage())


class GuiderConfig(Section):
    """How the branches are combined: a guider by name."""

    guider: str = "ClassifierFreeGuidance"
    """Class name of a guider of diffusers or of `counterpoint.guiders`."""
    options: dict[str, Any] = Field(default_factory=lambda: {"guidance_scale": 1.0})
    """Keyword arguments of that class. diffusers' `guidance_scale` is 1 for no guidance."""


def build_guider(config: GuiderConfig) -> BaseGuidance:
    """Return the guider that `config` names.

    Raises ValueError if there is no such guider, or it refuses an option.
    """
    cls = find_class(config.guider, BaseGuidance, guiders, PACKAGE, "guider.guider")
    try:
        guider: BaseGuidance = cls(**config.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"guider.options={config.options} does not fit {config.guider}: {error}") from error
    return guider


def classifier_free(guidance_scale: float) -> BaseGuidance:
    """Return null + guidance_scale (conditional - null), Ho & Salimans 2022, eq. 6; 1 hears one branch."""
    return ClassifierFreeGuidance(guidance_scale=guidance_scale)


def guided(network: Any, x: Tensor, t: Tensor, labels: Tensor, guider: BaseGuidance) -> Tensor:
    """Return the network's output [B,C,H,W] under guidance, at x [B,C,H,W], `t` (one or [B]), labels [B].

    The branches are rows of one forward pass. Guiders of diffusers that hook themselves into the network's
    layers, as its skip-layer guidance does, cannot mark rows, and are heard branch by branch.
    """
    null = torch.full_like(labels, null_class(network))
    branches = guider.prepare_inputs({"class_labels": (labels, null)})
    if hooks_layers(guider):
        for branch in branches:
            guider.prepare_models(network)
            try:
                branch.noise_pred = network(x, t, class_labels=branch.class_labels).sample
            finally:
                guider.cleanup_models(network)
    else:
        condition = torch.cat([branch.class_labels for branch in branches])
        times = t if t.ndim == 0 else t.repeat(len(branches))
        with perturbed(network, guider, branches, len(x)):
            output = network(x.repeat(len(branches), 1, 1, 1), times, class_labels=condition).sample
        for branch, part in zip(branches, output.chunk(len(branches)), strict=True):
            branch.noise_pred = part
    combined: Tensor = guider(branches).pred
    return combined


def perturbed(
    network: Any, guider: BaseGuidance, branches: list[Any], rows: int
) -> AbstractContextManager[None]:
    """Return the context within which the perturbed branch's rows of a batch of all branches are perturbed.

    Each branch has `rows` rows, one branch after another.
    """
    marks = [is_perturbed(branch) for branch in branches]
    if not any(marks):
        return contextlib.nullcontext()
    marked = torch.tensor(marks).repeat_interleave(rows)
    context: AbstractContextManager[None] = guider.perturbing(network, marked)
    return context


def is_perturbed(branch: Any) -> bool:
    """Whether a branch that a guider prepared is to be heard perturbed."""
    return bool(getattr(branch, BaseGuidance._identifier_key) == PERTURBED)


def hooks_layers(guider: BaseGuidance) -> bool:
    """Whether a guider hooks itself into layers, and so can only perturb an evaluation as a whole."""
    own = type(guider).prepare_models is not BaseGuidance.prepare_models
    return own and not hasattr(guider, "perturbing")
