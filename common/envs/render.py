"""Pictures of a MuJoCo simulation, and which OpenGL library makes them. Import this before anything imports mujoco."""

import ctypes
import os
import platform
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

if platform.system() == "Linux" and "MUJOCO_GL" not in os.environ:
    # MuJoCo picks its OpenGL library on import, and EGL is the one that needs no display.
    with suppress(OSError):
        ctypes.CDLL("libEGL.so.1")
        os.environ["MUJOCO_GL"] = "egl"

import mujoco  # after MUJOCO_GL is set

IMAGE_SIZE = 256


class _Renderer(mujoco.Renderer):
    """A renderer whose deletion is silent if OpenGL failed before it was complete."""

    _gl_context = _mjr_context = None


class Camera:
    """Renders a simulation, which stays as it is.

    The OpenGL context is made at the first picture, in the process that draws, and again for another model.

    Args:
        camera: name or number of a camera of the model, or a free one.
        hidden: groups of geometry that are left out, e.g. collision shapes.
    """

    def __init__(self, camera: str | int | mujoco.MjvCamera, hidden: tuple[int, ...] = ()) -> None:
        self._camera, self._option = camera, mujoco.MjvOption()
        for group in hidden:
            self._option.geomgroup[group] = False
        self._model: mujoco.MjModel | None = None

    def __call__(self, model: mujoco.MjModel, data: mujoco.MjData) -> NDArray[np.uint8]:
        """RGB image (256, 256, 3). Raises UserError where there is no OpenGL."""
        if model is not self._model:
            self.close()
            # Reflections and multisampling take nine tenths of the time on a CPU and change little.
            model.vis.quality.offsamples = 0
            model.vis.global_.offwidth = model.vis.global_.offheight = IMAGE_SIZE
            try:
                self._renderer = _Renderer(model, IMAGE_SIZE, IMAGE_SIZE)
            except Exception as error:  # every OpenGL library fails in its own way
                raise UserError(
                    f"cannot render ({error}); install libegl1 and libgl1, or set MUJOCO_GL to egl or osmesa"
                ) from error
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
            self._model = model
        self._renderer.update_scene(data, self._camera, self._option)
        return self._renderer.render()

    def close(self) -> None:
        """Frees the context; a later picture makes a new one."""
        if self._model is not None:
            self._renderer.close()
            self._model = None
