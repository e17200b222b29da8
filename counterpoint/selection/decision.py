"""What came of one decision: the candidates, their confidences, and the one that was kept."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stream:
    """Names the random numbers of one decision, so that they depend on nothing else."""

    seed: int
    """The environment's seed of the episode."""
    decision: int
    """Index of the decision within the episode."""


@dataclass(frozen=True)
class Decision:
    """One decision's trace, in plain arrays; enough to audit or replay it."""

    actions: np.ndarray
    """The chunk that was kept, in the environment's units, float32 [H,D]."""
    chosen: int
    """Index of the kept candidate; -1 where the greedy chunk was taken instead, because none could be decoded
    or none of those that could had a confidence other than NaN."""
    candidates: np.ndarray
    """All candidates' chunks, float32 [N,H,D]; NaN where a candidate could not be decoded."""
    tokens: tuple[tuple[int, ...], ...]
    """Each candidate's action tokens, without the end token."""
    confidences: np.ndarray
    """Each candidate's confidence, float64 [N]; -inf where it could not be decoded, NaN for rules without."""
    token_confidences: np.ndarray
    """The terms that confidences aggregate, float32 [N,K]; zero where a candidate had ended."""
    rejected: int
    """Candidates that could not be decoded."""
    clipped: int
    """Entries of the kept chunk that had to be clipped to the action space."""
