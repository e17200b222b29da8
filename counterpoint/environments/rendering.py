"""Off-screen images of a MuJoCo scene: drawn without a display, by one thread of one process.

The renderer of MuJoCo is chosen when it is first imported, by the variable MUJOCO_GL. This module sets it to
"egl" if nobody has, and is therefore where MuJoCo is imported from. EGL needs no GPU: Mesa draws on the CPU.
"""

import os
import sys
import threading

import numpy as np

ADVICE = (
    "install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri for MUJOCO_GL=egl, or libosmesa6 besides for "
    "MUJOCO_GL=osmesa, and set it before Python starts"
)

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa would draw 64 x 64 pixels with a thread per core

try:
    import mujoco
except Exception as error:  # whatever the backend's libraries raise when they are missing
    raise ImportError(f"MUJOCO_GL={os.environ.get('MUJOCO_GL')} does not load ({error}): {ADVICE}") from error


class Camera:
    """A fixed camera of a model. It draws any MjData of it; the renderer is made with the first image.

    An OpenGL context belongs to the thread that made it, and does not survive a fork: RuntimeError elsewhere.
    """

    def __init__(self, model: mujoco.MjModel, name: str, size: int) -> None:
        self.model, self.name, self.size = model, name, size
        self.renderer: mujoco.Renderer | None = None
        self._home: tuple[int, int] | None = None

    def draw(self, data: mujoco.MjData) -> np.ndarray:
        """Return the image of `data`, uint8 [size, size, 3]; `data` must be up to date (mj_forward)."""
        here = (os.getpid(), threading.get_ident())
        if self.renderer is None:
            self.renderer, self._home = self._open(), here
        if here != self._home:
            raise RuntimeError(
                "this environment has drawn images in another thread or process: build one where it is used, "
                "and start processes by spawn, not by fork"
            )
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

    def close(self) -> None:
        """Give back the renderer; the next image makes another."""
        if self.renderer is not None and self._home == (os.getpid(), threading.get_ident()):
            self.renderer.close()
        self.renderer = self._home = None

    def _open(self) -> mujoco.Renderer:
        try:
            return mujoco.Renderer(self.model, height=self.size, width=self.size)
        except Exception as error:  # OpenGL's, PyOpenGL's, MuJoCo's and GLFW's own kinds
            raise RuntimeError(
                f"MUJOCO_GL={os.environ.get('MUJOCO_GL')} cannot draw here ({error}): {ADVICE}"
            ) from error
