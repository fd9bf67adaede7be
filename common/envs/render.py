"""Pictures of a MuJoCo simulation, and which OpenGL library makes them. Import this before anything imports mujoco."""

import ctypes
import os
import platform
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError, first_line

if platform.system() == "Linux" and "MUJOCO_GL" not in os.environ:
    # MuJoCo picks its OpenGL library on import. EGL and OSMesa need no display; EGL, which can use a GPU, comes first.
    for _name, _library in (("egl", "libEGL.so.1"), ("osmesa", "libOSMesa.so.8")):
        with suppress(OSError):
            ctypes.CDLL(_library)
            os.environ.setdefault("MUJOCO_GL", _name)

import mujoco  # after MUJOCO_GL is set

IMAGE_SIZE = 256


class _Renderer(mujoco.Renderer):
    """A renderer whose deletion is silent if OpenGL failed before it was complete."""

    _gl_context = _mjr_context = None


class Camera:
    """Renders a simulation, which stays as it is.

    The OpenGL context is made at the first picture, in the process that draws, and again for another model.

    Args:
        hidden: groups of geometry that are left out, e.g. collision shapes.
        size: width and height of its pictures.
    """

    def __init__(self, hidden: tuple[int, ...] = (), size: int = IMAGE_SIZE) -> None:
        self._size, self._option = size, mujoco.MjvOption()
        for group in hidden:
            self._option.geomgroup[group] = False
        self._model: mujoco.MjModel | None = None

    def __call__(
        self, model: mujoco.MjModel, data: mujoco.MjData, view: str | int | mujoco.MjvCamera
    ) -> NDArray[np.uint8]:
        """RGB image (S, S, 3) as a camera of the model (by name or number) or a free one sees it.

        Raises UserError where there is no OpenGL, or no such camera.
        """
        if model is not self._model:
            self.close()
            # Reflections and multisampling take nine tenths of the time on a CPU and change little.
            model.vis.quality.offsamples = 0
            model.vis.global_.offwidth = model.vis.global_.offheight = self._size  # reading back a larger one is slow
            try:
                self._renderer = _Renderer(model, self._size, self._size)
            except Exception as error:  # every OpenGL library fails in its own way
                raise UserError(
                    f"cannot render ({first_line(error)}); install libegl1 and libgl1, or libosmesa6, and set "
                    "MUJOCO_GL to egl or osmesa"
                ) from error
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
            self._model = model
        try:
            self._renderer.update_scene(data, view, self._option)
        except ValueError as error:
            names = ", ".join(model.camera(i).name for i in range(model.ncam))
            raise UserError(f"there is no camera {view!r}; this model has {names}") from error
        return self._renderer.render()

    def close(self) -> None:
        """Frees the context; a later picture makes a new one."""
        if self._model is not None:
            self._renderer.close()
            self._model = None
