"""The simulation: gymnasium-robotics' Fetch PickAndPlace (v4), its scene extended to coloured blocks.

One compiled model, one renderer and one spare state serve all environments of a thread; an environment of
its own has only a state (MjData).
"""

import contextlib
import io
import threading
import weakref
from typing import Any

import numpy as np

from counterpoint.environments.config import CAMERA, EnvironmentConfig
from counterpoint.environments.rendering import Camera, mujoco

with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about hands, in every process
    from gymnasium_robotics.envs.fetch.pick_and_place import MujocoFetchPickAndPlaceEnv

HALF_SIZE = 0.025
"""Half a block's edge in metres."""
TABLE_TOP = 0.4
FINGERS = ("robot0:r_gripper_finger_joint", "robot0:l_gripper_finger_joint")


def extended_model(path: str, config: EnvironmentConfig) -> mujoco.MjModel:
    """Compile the Fetch scene of the XML file at `path` with one block per colour and our camera.

    What is drawn for a viewer only (sites, the body that pulls the gripper) becomes invisible.
    """
    spec = mujoco.MjSpec.from_file(path)
    for index, shares in enumerate(config.colours.values()):
        if index == 0:
            geom = spec.body("object0").geoms[0]
        else:
            body = spec.worldbody.add_body(name=f"object{index}", pos=(1.3, 0.5 + 0.1 * index, 0.5))
            body.add_freejoint(name=f"object{index}:joint")
            geom = body.add_geom(
                name=f"object{index}", type=mujoco.mjtGeom.mjGEOM_BOX, size=[HALF_SIZE] * 3, condim=3
            )
        geom.material, geom.rgba, geom.mass = "", (*shares, 1.0), config.mass
    for thing in [*spec.sites, *spec.body("robot0:mocap").geoms]:
        thing.rgba = (0.0, 0.0, 0.0, 0.0)
    camera = spec.worldbody.add_camera(name=CAMERA, pos=config.camera.position, fovy=config.camera.fovy)
    camera.alt.type = mujoco.mjtOrientation.mjORIENTATION_XYAXES
    camera.alt.xyaxes = [*config.camera.right, *config.camera.up]
    spec.visual.quality.offsamples = 0  # anti-aliasing takes most of the time of an image
    spec.visual.global_.offwidth = spec.visual.global_.offheight = config.image_size
    return spec.compile()


class FetchBlocks(MujocoFetchPickAndPlaceEnv):
    """Fetch PickAndPlace with our model; what it does with an action is left as it is."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.config = config
        super().__init__()

    def _initialize_simulation(self) -> None:
        self.model = extended_model(self.fullpath, self.config)
        self.data = mujoco.MjData(self.model)
        self._model_names = self._utils.MujocoModelNames(self.model)
        self._env_setup(initial_qpos=self.initial_qpos)

    def advance(self, data: mujoco.MjData, action: np.ndarray) -> None:
        """Take one control step of `data` with `action` [4] in [-1, 1]."""
        self.data = data
        self._set_action(action)
        self._mujoco_step(action)


class Scene:
    """The compiled model with all that its states share."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.config = config
        self.fetch = FetchBlocks(config)
        self.model = self.fetch.model
        self.beginning = self.fetch.data
        """The state in which the arm waits above the table."""
        self.fetch.data = self.spare = mujoco.MjData(self.model)
        """A state for looking ahead."""
        self.camera = Camera(self.model, CAMERA, config.image_size)
        self.middle = self.beginning.site("robot0:grip").xpos[:2].copy()
        names = [f"object{index}" for index in range(len(config.colours))]
        self._blocks = [int(self.model.body(name).id) for name in names]
        self._places = [int(self.model.joint(f"{name}:joint").qposadr[0]) for name in names]
        self._grip = int(self.model.site("robot0:grip").id)
        self._fingers = [int(self.model.joint(name).qposadr[0]) for name in FINGERS]

    def new_state(self) -> mujoco.MjData:
        """Return a state of its own for one environment."""
        return mujoco.MjData(self.model)

    def copy(self, source: mujoco.MjData, target: mujoco.MjData) -> None:
        """Make `target` the exact likeness of `source`, derived quantities and the arm's puller included."""
        mujoco.mj_copyData(target, self.model, source)

    def begin(self, data: mujoco.MjData, places: np.ndarray, yaws: np.ndarray) -> None:
        """Put the arm to its beginning and the blocks to `places` [K,2] (m), turned by `yaws` [K] (rad)."""
        self.copy(self.beginning, data)
        for address, place, yaw in zip(self._places, places, yaws, strict=True):
            turn = [np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
            data.qpos[address : address + 7] = [*place, TABLE_TOP + HALF_SIZE, *turn]
        data.qvel[:] = 0.0
        mujoco.mj_forward(self.model, data)
        for _ in range(self.config.settle):
            self.advance(data, np.zeros(4))

    def advance(self, data: mujoco.MjData, action: np.ndarray) -> None:
        """Take one control step of `data` with `action` [4] in [-1, 1]."""
        self.fetch.advance(data, np.asarray(action, dtype=np.float64))

    def gripper(self, data: mujoco.MjData) -> np.ndarray:
        """Return the place [3] between the fingers, in metres."""
        place: np.ndarray = data.site_xpos[self._grip].copy()
        return place

    def openings(self, data: mujoco.MjData) -> np.ndarray:
        """Return how far the right and left finger [2] are from the middle, in metres."""
        openings: np.ndarray = data.qpos[self._fingers]
        return openings

    def blocks(self, data: mujoco.MjData) -> np.ndarray:
        """Return the blocks' centres [K,3] in metres, in the order of the configured colours."""
        centres: np.ndarray = data.xpos[self._blocks]
        return centres


_shared: Any = threading.local()


def shared_scene(config: EnvironmentConfig) -> Scene:
    """Return this thread's scene for `config`; it lives as long as an environment holds it."""
    if not hasattr(_shared, "scenes"):
        _shared.scenes = weakref.WeakValueDictionary()
    key = config.model_dump_json()
    scene: Scene | None = _shared.scenes.get(key)
    if scene is None:
        scene = _shared.scenes[key] = Scene(config)
    return scene
