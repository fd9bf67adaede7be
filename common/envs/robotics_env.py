"""Adroit hands and Franka Kitchen of gymnasium-robotics."""

import contextlib
import io
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.render import Camera, mujoco  # before gymnasium-robotics imports mujoco
from common.errors import UserError

try:
    # Its note on dense rewards would come from every process; docs/tasks.md has it.
    with contextlib.redirect_stderr(io.StringIO()):
        import gymnasium_robotics
except ImportError as error:
    raise UserError(
        f"gymnasium-robotics cannot be imported ({error}); run: pip install gymnasium-robotics==1.4.2"
    ) from error

gym.register_envs(gymnasium_robotics)


def kitchen_view() -> mujoco.MjvCamera:
    """The benchmark's own view of the kitchen, which is no camera of its model."""
    camera = mujoco.MjvCamera()
    camera.distance, camera.azimuth, camera.elevation, camera.lookat = 2.2, 70, -35, (-0.2, 0.5, 2)
    return camera


class RoboticsEnv(gym.Wrapper[NDArray[np.float32], NDArray[np.float32], Any, Any]):
    """An Adroit or Kitchen task with flat float32 observations and `info["success"]`.

    Adroit: 24 joints of a hand and up to 6 of the arm; the benchmark's observation; sparse tasks pay 1 on success, else
    0, and end there [deviation: the benchmark pays 10 and -0.1 and goes on]; dense ones are the benchmark's.

    Kitchen: 9 joint velocities of a Franka arm; observation (59,) with the achieved goals of the four tasks and their
    desired ones after it, by name; the reward is the number of tasks complete now; all four complete is success and
    terminates.

    Args:
        task: names the registered environment and, for Kitchen, the four tasks.
        horizon: steps until truncation.
        render: allow `render()`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(self, task: TaskSpec, horizon: int, *, render: bool = False) -> None:
        more = {}
        if task.suite == "kitchen":
            # Rewards as in the paper's data: what is complete counts at every step.
            more = dict(tasks_to_complete=list(task.goals), remove_task_when_completed=False)
        super().__init__(gym.make(task.env_name, max_episode_steps=-1, **more))
        self.task, self.horizon = task, horizon
        self.sparse = task.suite == "adroit" and "Sparse" in task.env_name
        self._render_mode = "rgb_array" if render else None
        width = sum(width for _, width in task.obs)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (task.action_dim,), np.float32)
        self._camera, self._view = Camera(), "fixed" if task.suite == "adroit" else kitchen_view()

    @property
    def render_mode(self) -> str | None:
        return self._render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts the episode that `seed` names, or the next one."""
        obs, _ = self.env.reset(seed=seed)
        self._steps = 0
        return self._observe(obs), {"success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Applies one action (A,). `info["success"]` is the benchmark's success after the step."""
        obs, reward, terminated, _, info = self.env.step(action)
        self._steps += 1
        if self.task.suite == "kitchen":
            success = bool(terminated)
        else:
            success = bool(info["success"])
            reward, terminated = (float(success), success) if self.sparse else (reward, False)
        truncated = self._steps >= self.horizon and not terminated
        return self._observe(obs), float(reward), bool(terminated), truncated, {"success": success}

    def _observe(self, obs: Any) -> NDArray[np.float32]:
        if self.task.suite == "kitchen":
            goals = [obs[kind][name] for kind in ("achieved_goal", "desired_goal") for name in sorted(self.task.goals)]
            obs = np.concatenate([obs["observation"], *goals])
        return np.asarray(obs, np.float32)

    def state(self) -> NDArray[np.float64]:
        """The simulator's joint positions and velocities (S,)."""
        data = self.unwrapped.data
        return np.concatenate([data.qpos, data.qvel])

    def render(self) -> NDArray[np.uint8] | None:
        """RGB image (256, 256, 3); None if made without render=True. Raises UserError where there is no OpenGL."""
        if self._render_mode is None:
            return None
        return self._camera(self.unwrapped.model, self.unwrapped.data, self._view)

    def close(self) -> None:
        self._camera.close()
        super().close()
