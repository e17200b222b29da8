"""Conditions that a policy can be asked to choose without."""

from typing import Literal, get_args

Mask = Literal["none", "text", "state", "both"]
"""Which conditions a policy is not told."""
MASKS: tuple[Mask, ...] = get_args(Mask)
HIDES: dict[str, tuple[str, ...]] = {
    "none": (),
    "text": ("text",),
    "state": ("state",),
    "both": ("text", "state"),
}
