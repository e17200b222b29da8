"""Uniform bins, one token per control step and dimension, as in OpenVLA (arXiv 2406.09246, sec. 3.2).

The quantile range of each dimension is scaled to [-1,1] and cut by `bins` equidistant edges; a token is the
number of the last edge at or below the action. There are only bins-1 intervals between the edges: the last
token is kept for the upper end itself and decodes as the one before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from counterpoint.actions.statistics import ActionStatistics, check_chunks
from counterpoint.actions.tokenizer import Undecodable, check_tokens


@dataclass(frozen=True)
class UniformTokenizer:
    """Tokens 0 to bins-1, shared by all dimensions; step by step, each step's dimensions in order."""

    statistics: ActionStatistics
    """Range of each dimension."""
    horizon: int
    """Control steps of a chunk (H)."""
    bins: int = 256
    """Edges on [-1,1], both ends included, and so the number of tokens."""

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.bins < 3:
            raise ValueError(f"horizon={self.horizon} must be at least 1 and bins={self.bins} at least 3")

    @property
    def vocab_size(self) -> int:
        """Action tokens V."""
        return self.bins

    @property
    def end_token(self) -> None:
        """None: all chunks are equally long."""
        return None

    @property
    def max_tokens(self) -> int:
        """Tokens of every chunk, H*D."""
        return self.horizon * self.statistics.dimensions

    def encode(self, actions: np.ndarray) -> list[list[int]]:
        """Return the H*D tokens of each chunk of `actions` [B,H,D]; what leaves the range is clipped to it.

        Raises ValueError if the actions have another shape or are not finite.
        """
        actions = check_chunks(actions, self.horizon, self.statistics.dimensions)
        scaled = np.clip(self.statistics.normalise(actions), -1, 1)
        tokens = np.digitize(scaled, self._edges) - 1
        return tokens.reshape(len(actions), -1).tolist()

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the middle of each token's interval, float64 [H,D]; raises Undecodable if they misfit."""
        array = check_tokens(tokens, self.vocab_size)
        if len(array) != self.max_tokens:
            raise Undecodable(f"{len(array)} tokens are not the {self.max_tokens} of a chunk")
        middles = (self._edges[:-1] + self._edges[1:]) / 2
        scaled = middles[np.minimum(array, len(middles) - 1)]
        return self.statistics.unnormalise(scaled.reshape(self.horizon, -1))

    @property
    def _edges(self) -> np.ndarray:
        return np.linspace(-1, 1, self.bins)
