"""Any of our environments as a gymnasium.Env, for what is written against that interface."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from counterpoint.environments.episode import Environment
from counterpoint.policies.observation import Observation


class GymnasiumEnv(gymnasium.Env[dict[str, Any], np.ndarray]):
    """An `Environment` behind `reset` and `step`: reward 1 for success, termination with success or failure.

    Observations are {"images": {camera: uint8 [H,W,3]}, "state": float32 [D], "instruction": text}. The seed
    of `reset` is the episode's; without one it is drawn from the stream of the last seed given.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        observed, acted = environment.observation_space, environment.action_space
        images: dict[str, spaces.Space[Any]] = {
            camera: spaces.Box(0, 255, (*size, 3), np.uint8) for camera, size in observed.cameras.items()
        }
        letters = frozenset("".join(environment.instructions))
        longest = max(map(len, environment.instructions))
        self.observation_space = spaces.Dict(
            images=spaces.Dict(images),
            state=spaces.Box(-np.inf, np.inf, (len(observed.state),), np.float32),
            instruction=spaces.Text(longest, charset=letters),
        )
        self.action_space = spaces.Box(np.array(acted.low, np.float32), np.array(acted.high, np.float32))
        self.metadata = {**self.metadata, "render_fps": round(acted.control_hz)}
        self.render_mode = "rgb_array"
        self._image: np.ndarray | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the episode of `seed`; the info tells the seed."""
        super().reset(seed=seed)
        episode = int(self.np_random.integers(2**31)) if seed is None else seed
        return self._shown(self.environment.start(episode)), {"seed": episode}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take one control step; the info tells "success" and, of a failure, the "outcome"."""
        step = self.environment.act(action)
        ended = step.success or bool(step.outcome)
        info = {"success": step.success, "outcome": step.outcome}
        return self._shown(step.observation), float(step.success), ended, step.over and not ended, info

    def render(self) -> np.ndarray | None:
        """Return the first camera's last image, uint8 [H,W,3]."""
        return self._image

    def close(self) -> None:
        """Close the environment."""
        self.environment.close()

    def _shown(self, observation: Observation) -> dict[str, Any]:
        self._image = next(iter(observation.images.values()))
        return {
            "images": dict(observation.images),
            "state": observation.state,
            "instruction": observation.instruction,
        }
