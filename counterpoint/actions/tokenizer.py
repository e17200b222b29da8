"""What every action tokenizer can do: chunks of actions to tokens and back."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from counterpoint.actions.statistics import ActionStatistics


class Undecodable(ValueError):  # noqa: N818
    """Tokens that stand for no chunk of actions; sampling can produce them, and its user must expect them."""


class ActionTokenizer(Protocol):
    """Turns chunks of actions [H,D], in environment units, into tokens and back."""

    @property
    def statistics(self) -> ActionStatistics:
        """What actions are scaled by."""
        ...

    @property
    def vocab_size(self) -> int:
        """Action tokens V, the end token included if there is one."""
        ...

    @property
    def end_token(self) -> int | None:
        """Token that ends a chunk of variable length; None where all chunks have `max_tokens` tokens."""
        ...

    @property
    def max_tokens(self) -> int:
        """Most tokens of a chunk, the end token included if there is one."""
        ...

    def encode(self, actions: np.ndarray) -> list[list[int]]:
        """Return the tokens of each chunk of `actions` [B,H,D], without an end token."""
        ...

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the chunk float64 [H,D] of `tokens`, not clipped; raises Undecodable if there is none.

        An end token may stand at the end, and nowhere else.
        """
        ...


def check_tokens(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """Return `tokens` as int64 [L]; raise Undecodable unless they are whole numbers in [0, vocab_size)."""
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise Undecodable(f"tokens are {array.dtype} {list(array.shape)}: give a flat list of whole numbers")
    wrong = array[(array < 0) | (array >= vocab_size)]
    if wrong.size:
        raise Undecodable(f"token {int(wrong[0])} is outside the {vocab_size} action tokens")
    return array.astype(np.int64)
