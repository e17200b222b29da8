"""What an environment is to the rest of the house, and what is kept of an episode in it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from counterpoint.actions.space import ActionSpace
from counterpoint.policies.observation import Observation, ObservationSpace
from counterpoint.selection.decision import Decision


@dataclass(frozen=True)
class Step:
    """What came of one control step."""

    observation: Observation
    success: bool
    """Whether the task is done; the episode ends with it."""
    over: bool
    """Whether the episode has ended, by success or because its time is up."""
    outcome: str = ""
    """How a failed episode went wrong in the environment's words, such as "wrong block"; may stay empty."""


class Environment(Protocol):
    """A task with cameras, state, instructions and an expert; all of an episode follows from its seed."""

    observation_space: ObservationSpace
    action_space: ActionSpace
    instructions: tuple[str, ...]
    """Every instruction that episodes may have."""
    max_steps: int

    def start(self, seed: int) -> Observation:
        """Begin the episode of `seed`."""
        ...

    def act(self, action: np.ndarray) -> Step:
        """Take one control step with `action` [D]."""
        ...

    def expert_action(self) -> np.ndarray:
        """Return the scripted expert's action [D] at this moment, from privileged state."""
        ...

    def nearest_to_expert(self, candidates: np.ndarray) -> int:
        """Return which of the chunks [N,H,D] lies nearest to what the expert would do, by look-ahead.

        The expert is run for H steps on a copy of the simulation, which itself does not change. Chunks with
        NaN are never chosen; -1 if all have it.
        """
        ...

    def keypoints(self) -> np.ndarray:
        """Return the pixel (column, row) of every tracked object, float32 [K,2]: labels, never an input."""
        ...

    def close(self) -> None:
        """Give back the renderer."""
        ...


@dataclass(frozen=True)
class Episode:
    """One episode's outcome."""

    seed: int
    instruction: str
    success: bool
    outcome: str
    """"success", what the environment said, or "time is up"."""
    steps: int
    decisions: int
    rejected: int
    """Candidates that could not be decoded, over all decisions."""
    fallbacks: int
    """Decisions in which no candidate could be decoded."""
    clipped: int
    """Entries of executed actions that had to be clipped."""
    tied: int = 0
    """Decisions that left nothing to choose: several candidates, all of the same confidence."""
    trace: tuple[Decision, ...] = ()
    """Every decision, where asked for."""
    frames: np.ndarray | None = None
    """Images of the first camera, one per control step and the last, uint8 [T,H,W,3], where asked for."""
