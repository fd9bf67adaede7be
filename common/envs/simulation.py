"""What the suites that simulate with MuJoCo share: the simulator's state, and pictures of it."""

from typing import ClassVar

import mujoco
import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.base import TaskEnv
from common.errors import UserError, first_line


class _Renderer(mujoco.Renderer):
    """A renderer whose deletion is silent if OpenGL failed before it was complete."""

    _gl_context = _mjr_context = None


class Simulation(TaskEnv):
    """A task of a suite; the suite's own environment, which is made by a subclass, is `env`.

    A picture leaves the simulation as it is. OpenGL is started at the first one of a size, in the process that draws,
    and again for another model.
    """

    hidden: ClassVar[tuple[int, ...]] = ()  # groups of geometry that no picture shows, e.g. collision shapes
    view: str | mujoco.MjvCamera  # what `render` shows

    def __init__(self, task: TaskSpec, horizon: int, *, render: bool = False) -> None:
        super().__init__(task, horizon, render=render)
        self._drawn: mujoco.MjModel | None = None  # what the renderers, by the size of their pictures, were made for
        self._renderers: dict[int, _Renderer] = {}

    def model_and_data(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """MuJoCo's model and data of the episode."""
        return self.env.unwrapped.model, self.env.unwrapped.data

    def state(self) -> NDArray[np.float64]:
        """The simulator's joint positions and velocities (S,)."""
        _, data = self.model_and_data()
        return np.concatenate([data.qpos, data.qvel])

    def draw(self, view: str | mujoco.MjvCamera, size: int) -> NDArray[np.uint8]:
        """RGB image (size, size, 3) as a camera of the model (by name) or a free one sees it.

        Raises UserError where there is no OpenGL, or no such camera.
        """
        model, data = self.model_and_data()
        if model is not self._drawn:
            Simulation.close(self)  # not a subclass's, which frees the simulation too
            self._drawn = model
        if size not in self._renderers:
            # Reflections and multisampling take nine tenths of the time on a CPU and change little.
            model.vis.quality.offsamples = 0
            model.vis.global_.offwidth = model.vis.global_.offheight = size  # reading back a larger one is slow
            try:
                renderer = _Renderer(model, size, size)
            except Exception as error:  # every OpenGL library fails in its own way
                raise UserError(
                    f"cannot render ({first_line(error)}); install libegl1 and libgl1, or libosmesa6, and set "
                    "MUJOCO_GL to egl or osmesa"
                ) from error
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
            self._renderers[size] = renderer
        option = mujoco.MjvOption()
        option.geomgroup[list(self.hidden)] = False
        try:
            self._renderers[size].update_scene(data, view, option)
        except ValueError as error:
            names = ", ".join(model.camera(i).name for i in range(model.ncam))
            raise UserError(f"there is no camera {view!r}; this model has {names}") from error
        return self._renderers[size].render()

    def render(self) -> NDArray[np.uint8] | None:
        """The picture (256, 256, 3) of `view`; None if made without render=True. Raises what `draw` raises."""
        return self.draw(self.view, 256) if self.render_mode else None

    def close(self) -> None:
        """Frees the renderers; a later picture makes new ones."""
        while self._renderers:
            self._renderers.popitem()[1].close()
