"""Adversarial losses on logits, per sample and head (NitroFusion, sec. 3.2; sheet of open choices)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from counterpoint.critics.config import LossForm


def critic_loss(form: LossForm, real: Tensor, fake: Tensor) -> Tensor:
    """Return what the heads minimise, elementwise over logits `real` and `fake` of one shape.

    critic: D(fake) - D(real); hinge: max(0, 1 - D(real)) + max(0, 1 + D(fake));
    softplus: the non-saturating loss log(1 + e^-D(real)) + log(1 + e^D(fake)).
    """
    return real_part(form, real) + fake_part(form, fake)


def real_part(form: LossForm, logits: Tensor) -> Tensor:
    """Return the share of `critic_loss` that real samples bear."""
    if form == "critic":
        return -logits
    return F.relu(1.0 - logits) if form == "hinge" else F.softplus(-logits)


def fake_part(form: LossForm, logits: Tensor) -> Tensor:
    """Return the share of `critic_loss` that fake samples bear."""
    if form == "critic":
        return logits
    return F.relu(1.0 + logits) if form == "hinge" else F.softplus(logits)


def blind_loss(form: LossForm) -> float | None:
    """Return the loss of a head that says 0 of everything; heads that stay above it are worse than none.

    None for `critic`, whose scale is the logits' own: there is no loss that a head should not exceed.
    """
    zero = torch.zeros(())
    return None if form == "critic" else float(critic_loss(form, zero, zero))


def generator_loss(form: LossForm, fake: Tensor) -> Tensor:
    """Return what the student minimises, elementwise over its samples' logits."""
    return F.softplus(-fake) if form == "softplus" else -fake
