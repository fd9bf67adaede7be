"""What the suites that simulate with MuJoCo share: spaces from the task's layout, the end of an episode, pictures."""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.render import Camera, mujoco


class Simulation(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A task of a suite; the suite's own environment, which is made by a subclass, is `env`.

    Args:
        task: layout of observations and actions, and the suite's name of the environment.
        horizon: steps until truncation.
        render: allow `render()`.
    """

    hidden: ClassVar[tuple[int, ...]] = ()  # groups of geometry that no picture shows
    view: str | mujoco.MjvCamera  # what `render` shows
    steps: int  # of the episode

    def __init__(self, task: TaskSpec, horizon: int, *, render: bool = False) -> None:
        self.task, self.horizon = task, horizon
        self.render_mode = "rgb_array" if render else None
        width = sum(width for _, width in task.obs)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (task.action_dim,), np.float32)
        self._camera = Camera(self.hidden)

    def model_and_data(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """MuJoCo's model and data of the episode."""
        return self.env.unwrapped.model, self.env.unwrapped.data

    def draw_seed(self, seed: int | None) -> int:
        """`seed`, or one drawn from `np_random`; restarts that generator from a given one."""
        super().reset(seed=seed)
        return int(self.np_random.integers(2**31)) if seed is None else seed

    def outcome(
        self, obs: NDArray[np.float32], reward: float, terminated: bool, success: bool
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """What `step` returns; counts the step, and truncates at the horizon what has not terminated."""
        self.steps += 1
        truncated = self.steps >= self.horizon and not terminated
        return obs, float(reward), bool(terminated), truncated, {"success": bool(success)}

    def state(self) -> NDArray[np.float64]:
        """The simulator's joint positions and velocities (S,)."""
        _, data = self.model_and_data()
        return np.concatenate([data.qpos, data.qvel])

    def render(self) -> NDArray[np.uint8] | None:
        """RGB image (256, 256, 3) of the state, which stays as it is; None if made without render=True.

        Raises UserError where there is no OpenGL.
        """
        return self._camera(*self.model_and_data(), self.view) if self.render_mode else None

    def close(self) -> None:
        """Frees the renderer."""
        self._camera.close()
