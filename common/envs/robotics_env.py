"""Adroit hands and Franka Kitchen of gymnasium-robotics."""

import contextlib
import io
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.simulation import Simulation, mujoco  # before gymnasium-robotics imports mujoco
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


def flat_observation(obs: Any, task: TaskSpec) -> NDArray[np.float32]:
    """The benchmark's observation, or those of many steps, as numbers (..., O) in the order of the task's layout."""
    if task.suite == "kitchen":
        goals = [obs[kind][name] for kind in ("achieved_goal", "desired_goal") for name in sorted(task.goals)]
        obs = np.concatenate([obs["observation"], *goals], axis=-1)
    return np.asarray(obs, np.float32)


class RoboticsEnv(Simulation):
    """An Adroit or Kitchen task with flat float32 observations and `info["success"]`.

    Adroit: 24 joints of a hand and up to 6 of the arm; the benchmark's observation; sparse tasks pay 1 on success, else
    0, and end there [deviation: the benchmark pays 10 and -0.1 and goes on]; raw and dense ones are the benchmark's.

    Kitchen: 9 joint velocities of a Franka arm; observation (59,) with the achieved goals of the four tasks and their
    desired ones after it, by name; the reward is the number of tasks complete now; all four complete is success and
    terminates.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(self, task: TaskSpec, horizon: int, *, render: bool = False) -> None:
        super().__init__(task, horizon, render=render)
        more = {}
        if task.suite == "kitchen":
            # Rewards as in the paper's data: what is complete counts at every step.
            more = dict(tasks_to_complete=list(task.goals), remove_task_when_completed=False)
        self.env = gym.make(task.env_name, max_episode_steps=-1, **more)
        self.view = "fixed" if task.suite == "adroit" else kitchen_view()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts the episode that `seed` names, or the next one."""
        obs, _ = self.env.reset(seed=seed)
        self.steps = 0
        return flat_observation(obs, self.task), {"success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Applies one action (A,). `info["success"]` is the benchmark's success after the step."""
        obs, reward, terminated, _, info = self.env.step(action)
        obs = flat_observation(obs, self.task)
        if self.task.suite == "kitchen":
            return self.outcome(obs, reward, terminated, terminated)
        success = bool(info["success"])
        if self.task.raw:
            return self.outcome(obs, reward, False, success)
        return self.outcome(obs, success, success, success)

    def close(self) -> None:
        """Frees the renderer and the simulation."""
        super().close()
        self.env.close()
