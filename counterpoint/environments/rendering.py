"""Off-screen images of a MuJoCo scene: drawn without a display, by one thread of one process.

The renderer of MuJoCo is chosen when it is first imported, by the variable MUJOCO_GL. This module sets it to
"egl" if nobody has, and is therefore where MuJoCo is imported from. EGL needs no GPU: Mesa draws on the CPU.
Where there is an NVIDIA GPU, several processes that draw through EGL at once may hang (MuJoCo's issue 3444):
set MUJOCO_GL=osmesa there.
"""

import atexit
import os
import sys
import threading
import weakref
from typing import Any

import numpy as np

ADVICE = (
    "install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri for MUJOCO_GL=egl, or libosmesa6 besides for "
    "MUJOCO_GL=osmesa, and set it before Python starts"
)

ELSEWHERE = (
    "images were drawn before in another thread or process: build an environment where it is used, and start "
    "processes by spawn, not by fork"
)

if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
    if "mujoco" in sys.modules:  # it would look for a display, and abort the process for want of one
        raise ImportError(
            "mujoco was imported before MUJOCO_GL was chosen: import counterpoint.environments.rendering "
            "first, or set MUJOCO_GL=egl before Python starts"
        )
    os.environ["MUJOCO_GL"] = "egl"
os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa would draw 64 x 64 pixels with a thread per core

try:
    import mujoco
except Exception as error:  # whatever the backend's libraries raise when they are missing
    raise ImportError(f"MUJOCO_GL={os.environ.get('MUJOCO_GL')} does not load ({error}): {ADVICE}") from error

_drawing: dict[str, Any] = {"process": None, "failure": ""}
"""The process that made the first renderer, and what went wrong with it."""
_renderers: weakref.WeakSet[mujoco.Renderer] = weakref.WeakSet()


class Camera:
    """A fixed camera of a model. It draws any MjData of it; its renderer lives from the first image on.

    An OpenGL context belongs to the thread that made it, and does not survive a fork: RuntimeError elsewhere.
    """

    def __init__(self, model: mujoco.MjModel, name: str, size: int) -> None:
        self.model, self.name, self.size = model, name, size
        self.renderer: mujoco.Renderer | None = None
        self._thread = 0

    def draw(self, data: mujoco.MjData) -> np.ndarray:
        """Return the image of `data`, uint8 [size, size, 3]; `data` must be up to date (mj_forward)."""
        if self.renderer is None:
            self.renderer, self._thread = _open(self.model, self.size), threading.get_ident()
        if _drawing["process"] != os.getpid() or self._thread != threading.get_ident():
            raise RuntimeError(ELSEWHERE)
        self.renderer.update_scene(data, camera=self.name)
        flags = self.renderer.scene.flags  # update_scene sets them anew; they cost more than all the rest
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        image: np.ndarray = self.renderer.render()
        return image

    def project(self, points: np.ndarray) -> np.ndarray:
        """Return the pixel (column, row) of world `points` [K,3] as float32 [K,2].

        Pixels are counted as array indices are: (0, 0) is the middle of the first pixel.
        """
        camera = self.model.camera(self.name)
        seen = (points - camera.pos) @ camera.mat0.reshape(3, 3)  # x right, y up, looking along -z
        focal = self.size / 2 / np.tan(np.radians(self.model.cam_fovy[camera.id]) / 2)
        offset = seen[:, :2] / -seen[:, 2:] * (focal, -focal)
        return (offset + (self.size - 1) / 2).astype(np.float32)


def _open(model: mujoco.MjModel, size: int) -> mujoco.Renderer:
    if _drawing["process"] not in (None, os.getpid()):  # the fork of a process that has drawn would hang
        raise RuntimeError(ELSEWHERE)
    if _drawing["failure"]:  # MuJoCo aborts the process where a backend that has failed is tried again
        raise RuntimeError(_drawing["failure"])
    _drawing["process"] = os.getpid()
    try:
        renderer = mujoco.Renderer(model, height=size, width=size)
    except Exception as error:  # OpenGL's, PyOpenGL's, MuJoCo's and GLFW's own kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _drawing["failure"] = f"MUJOCO_GL={os.environ.get('MUJOCO_GL')} cannot draw here ({reason}): {ADVICE}"
        raise RuntimeError(_drawing["failure"]) from error
    if not _renderers:
        atexit.register(_close_all)  # after EGL's own such call, and so before it
    _renderers.add(renderer)
    return renderer


def _close_all() -> None:
    for renderer in list(_renderers):
        renderer.close()
