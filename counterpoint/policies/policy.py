"""What test-time selection asks of an autoregressive policy: to be heard with its conditions and without.

Any network that implements `TokenPolicy` can be sampled, scored and trained by what lies around it; see
`compact` for a policy of our own and `openvla` for one of transformers'.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from counterpoint.policies.masks import HIDES, MASKS, Mask
from counterpoint.policies.prefix import Prefix

Inputs = Mapping[str, Tensor]
"""A batch of observations as tensors, the batch first in each; `PolicyBundle.prepare` makes it."""


class TokenPolicy(Protocol):
    """A policy that emits a chunk of actions as tokens, one after the other."""

    conditions: frozenset[str]
    """Conditions that it has besides images: "text", "state"."""
    vocabulary: int
    """Action tokens V, the end token included if there is one; all logits are over these."""
    end_token: int | None
    """Token that ends a chunk of variable length; None where all chunks have `max_tokens` tokens."""
    max_tokens: int
    """Most tokens of a chunk (L)."""

    def encode(self, inputs: Inputs) -> Inputs:
        """Return `inputs` with images turned into features: the part that every hearing shares."""
        ...

    def prefill(self, encoded: Inputs, masks: Sequence[Mask]) -> Prefix:
        """Read the observations once per mask, in one pass: rows are mask-major [len(masks)*B].

        `encoded` comes from `encode`. Rows of "none" have all conditions.
        """
        ...

    def advance(self, prefix: Prefix, tokens: Tensor) -> Prefix:
        """Read one more action token per row, `tokens` int64 [R] in [0, V)."""
        ...

    def logits(self, encoded: Inputs, mask: Mask, tokens: Tensor) -> Tensor:
        """Return the logits of every action token given those before it, without any cache.

        `tokens` int64 [B,L]; returns float32 [B,L,V], where entry i has seen tokens before i only.
        """
        ...


def check_mask(mask: Mask, conditions: frozenset[str]) -> None:
    """Raise ValueError if `mask` hides a condition that the policy does not have."""
    missing = [name for name in HIDES[mask] if name not in conditions]
    if missing:
        possible = [m for m in MASKS if m != "none" and set(HIDES[m]) <= conditions]
        raise ValueError(
            f"mask={mask} hides {' and '.join(missing)}, which this policy is never told "
            f"(it has {', '.join(sorted(conditions)) or 'images only'}): "
            f"use {' or '.join(possible) or 'no mask'}"
        )
