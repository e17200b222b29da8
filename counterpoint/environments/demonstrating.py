"""The expert's episodes, and scenes to learn to see from, as frames of demonstrations."""

from dataclasses import dataclass

import numpy as np

from counterpoint.data.demonstrations import Frame, Kind
from counterpoint.environments.episode import Environment
from counterpoint.environments.running import Guard, unguarded
from counterpoint.policies.observation import Observation
from counterpoint.seeds import seed_of

FEWEST_RANDOM_ACTIONS, MOST_RANDOM_ACTIONS = 2, 5


@dataclass(frozen=True)
class Recording:
    """What one episode gave."""

    seed: int
    success: bool
    frames: tuple[Frame, ...]
    """One per control step; of a scene there is one."""


def demonstrate(
    environment: Environment, seed: int, noise: float = 0.12, guard: Guard = unguarded
) -> Recording:
    """Let the expert play the episode of `seed` with Gaussian noise on what is executed.

    The noise, of standard deviation `noise` in units of half an action dimension's range, leads through
    states from which the expert has to recover; the actions in the frames are the expert's own.
    """
    stream = np.random.default_rng(seed_of(seed, "demonstration noise"))
    space = environment.action_space
    scale = noise * (np.asarray(space.high) - np.asarray(space.low)) / 2
    frames: list[Frame] = []
    with guard("start", seed, 0):
        observation = environment.start(seed)
    while True:
        with guard("act", seed, len(frames)):
            action = space.clip(environment.expert_action())
            frames.append(_frame(environment, seed, len(frames), observation, action, "demonstration"))
            done = environment.act(space.clip(action + scale * stream.standard_normal(space.dimensions)))
        if done.over:
            return Recording(seed, done.success, tuple(frames))
        observation = done.observation


def scene(environment: Environment, seed: int, guard: Guard = unguarded) -> Recording:
    """Record one moment of the episode of `seed`, after two to five random actions."""
    stream = np.random.default_rng(seed_of(seed, "scene"))
    space = environment.action_space
    with guard("start", seed, 0):
        observation = environment.start(seed)
    actions = int(stream.integers(FEWEST_RANDOM_ACTIONS, MOST_RANDOM_ACTIONS, endpoint=True))
    for step in range(actions):
        with guard("act", seed, step):
            observation = environment.act(space.clip(stream.uniform(space.low, space.high))).observation
    with guard("act", seed, actions):
        action = space.clip(environment.expert_action())
        frame = _frame(environment, seed, 0, observation, action, "scene")
    return Recording(seed, False, (frame,))


def _frame(
    environment: Environment, seed: int, step: int, observation: Observation, action: np.ndarray, kind: Kind
) -> Frame:
    keypoints = environment.keypoints()
    # Tracked objects come in the order of the instructions that name them, others after those.
    target = environment.instructions.index(observation.instruction)
    return Frame(
        seed, step, observation.images, observation.state, observation.instruction, action, keypoints,
        target if target < len(keypoints) else -1, kind,
    )  # fmt: skip
