"""Pick up the named block: an arm, a table, coloured blocks, and a camera in front of them."""

from typing import Any

import numpy as np

from counterpoint.environments.config import CAMERA, EnvironmentConfig
from counterpoint.environments.episode import Step
from counterpoint.environments.expert import expert_action
from counterpoint.environments.scene import Scene, shared_scene
from counterpoint.policies.observation import Observation
from counterpoint.seeds import seed_of

WRONG_BLOCK = "wrong block"
ATTEMPTS = 10_000


def scattered(random: np.random.Generator, config: EnvironmentConfig) -> np.ndarray:
    """Draw offsets [K,2] (m) uniformly within `config.spread`, at least `config.least_distance` apart.

    Raises ValueError if the blocks do not fit.
    """
    count = len(config.colours)
    for _ in range(ATTEMPTS):
        places: np.ndarray = random.uniform(-1.0, 1.0, (count, 2)) * config.spread
        gaps = np.linalg.norm(places[:, None] - places, axis=-1)[np.triu_indices(count, 1)]
        if (gaps >= config.least_distance).all():
            return places
    raise ValueError(
        f"{count} blocks at least least_distance={config.least_distance} apart do not fit into "
        f"spread={config.spread}: use fewer colours, a smaller distance or a larger spread"
    )


class BlocksEnv:
    """The task as an `Environment`; which block is named and how the blocks lie follows from the seed alone.

    Environments of a thread share the compiled model and the renderer, so that another one costs little; an
    environment is used in the thread that built it. Raises RuntimeError, in one line, when it is used after
    `close`, before `start` or beyond the end of an episode.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        scattered(np.random.default_rng(0), config)
        self.config = config
        self.observation_space = config.observation_space()
        self.action_space = config.action_space()
        self.instructions = config.instructions
        self.max_steps = config.max_steps
        self._shared: Scene | None = shared_scene(config)
        self._data = self._shared.new_state()
        self._named = 0
        self._rest = np.zeros(0)
        self._steps: int | None = None
        self._over = False

    def start(self, seed: int) -> Observation:
        """Begin the episode of `seed`."""
        scene = self._scene()
        random = np.random.default_rng(seed_of(seed, "blocks"))
        self._named = int(random.integers(len(self.instructions)))
        offsets = scattered(random, self.config)
        yaws = random.uniform(-self.config.yaw, self.config.yaw, len(offsets))
        scene.begin(self._data, scene.middle + offsets, yaws)
        self._rest = scene.blocks(self._data)[:, 2]
        self._steps, self._over = 0, False
        return self._observe(scene)

    def act(self, action: np.ndarray) -> Step:
        """Take one control step with `action` [4], clipped to the action space.

        Raises ValueError if it is not four finite numbers.
        """
        scene = self._running()
        scene.advance(self._data, self._checked(action))
        self._steps = steps = (self._steps or 0) + 1
        lifted = scene.blocks(self._data)[:, 2] - self._rest > self.config.lift_height
        success = bool(lifted[self._named])
        wrong = bool(lifted.any()) and not success
        self._over = success or wrong or steps >= self.max_steps
        return Step(self._observe(scene), success, self._over, WRONG_BLOCK if wrong else "")

    def expert_action(self) -> np.ndarray:
        """Return the scripted expert's action float32 [4] at this moment."""
        return self._expert(self._running(), self._data)

    def nearest_to_expert(self, candidates: np.ndarray) -> int:
        """Return which of the chunks [N,H,4] is nearest (L2 over the chunk) to the expert's next H actions.

        The expert acts on an exact copy of the simulation. The first wins a tie; chunks that are not finite
        are never chosen, -1 if none is.
        """
        scene = self._running()
        candidates = np.asarray(candidates, dtype=np.float64)
        if (
            candidates.ndim != 3
            or 0 in candidates.shape
            or candidates.shape[2] != self.action_space.dimensions
        ):
            raise ValueError(
                f"candidates have shape {list(candidates.shape)}: give [N, H, {self.action_space.dimensions}]"
            )
        scene.copy(self._data, scene.spare)
        wanted = [self._expert(scene, scene.spare)]
        while len(wanted) < candidates.shape[1]:
            scene.advance(scene.spare, wanted[-1])
            wanted.append(self._expert(scene, scene.spare))
        distances = np.linalg.norm((candidates - np.stack(wanted)).reshape(len(candidates), -1), axis=1)
        usable = np.isfinite(distances)
        return int(np.argmin(np.where(usable, distances, np.inf))) if usable.any() else -1

    def keypoints(self) -> np.ndarray:
        """Return the pixel (column, row) of each block in the order of the colours, then of the gripper.

        float32 [K+1,2], as `Camera.project` counts pixels; an object may be hidden behind another.
        """
        scene = self._scene(begun=True)
        return scene.camera.project(np.vstack([scene.blocks(self._data), scene.gripper(self._data)]))

    def close(self) -> None:
        """Let go of what the environments share; the last one gives back the renderer."""
        self._shared = self._data = None

    def _observe(self, scene: Scene) -> Observation:
        state = np.concatenate([scene.gripper(self._data), scene.openings(self._data)])
        images = {CAMERA: scene.camera.draw(self._data)}
        return Observation(images, state.astype(np.float32), self.instructions[self._named])

    def _expert(self, scene: Scene, data: Any) -> np.ndarray:
        return expert_action(scene.gripper(data), scene.openings(data), scene.blocks(data)[self._named])

    def _checked(self, action: np.ndarray) -> np.ndarray:
        names = ", ".join(self.action_space.names)
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (self.action_space.dimensions,):
            raise ValueError(
                f"action has shape {list(given.shape)}: give [{self.action_space.dimensions}] ({names})"
            )
        if not np.isfinite(given).all():
            raise ValueError(f"action={given.tolist()} is not finite: give {names} in [-1, 1]")
        return self.action_space.clip(given)

    def _scene(self, begun: bool = False) -> Scene:
        if self._shared is None:
            raise RuntimeError("this environment is closed: build another")
        if begun and self._steps is None:
            raise RuntimeError("no episode has begun: call start first")
        return self._shared

    def _running(self) -> Scene:
        scene = self._scene(begun=True)
        if self._over:
            raise RuntimeError(f"the episode is over after {self._steps} steps: call start for another")
        return scene
