"""Adroit hands, Franka Kitchen and the Fetch arm of gymnasium-robotics."""

import contextlib
import io
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.simulation import Simulation

with contextlib.redirect_stderr(io.StringIO()):  # its note on dense rewards, from every process; docs/tasks.md has it
    import gymnasium_robotics

gym.register_envs(gymnasium_robotics)


def flat_observation(obs: Any, task: TaskSpec) -> NDArray[np.float32]:
    """The benchmark's observation, or those of many steps, as numbers (..., O) in the order of the task's layout."""
    if task.suite == "kitchen":
        goals = [obs[kind][name] for kind in ("achieved_goal", "desired_goal") for name in sorted(task.goals)]
        obs = np.concatenate([obs["observation"], *goals], axis=-1)
    if task.suite == "fetch":  # what is achieved, a position, is in the observation
        obs = np.concatenate([obs["observation"], obs["desired_goal"]], axis=-1)
    return np.asarray(obs, np.float32)


class RoboticsEnv(Simulation):
    """An Adroit, Kitchen or Fetch task with flat float32 observations and `info["success"]`.

    Adroit: 24 joints of a hand and up to 6 of the arm; the benchmark's observation; sparse tasks pay 1 on success, else
    0, and end there [deviation: the benchmark pays 10 and -0.1 and goes on]; raw and dense ones are the benchmark's.

    Kitchen: 9 joint velocities of a Franka arm; observation (59,) with the achieved goals of the four tasks and their
    desired ones after it, by name; the reward is the number of tasks complete now; all four complete is success and
    terminates.

    Fetch: position delta of the hand in units of 5 cm, and the fingers; observation and desired goal (3,); the reward
    is 1 on success, else 0, and success terminates [deviation: the benchmark pays -1 and 0, and goes on].
    """

    def __init__(self, task: TaskSpec, horizon: int, *, render: bool = False) -> None:
        super().__init__(task, horizon, render=render)
        self.view, more = "fixed", {}
        if task.suite == "kitchen":
            view = self.view = mujoco.MjvCamera()  # the benchmark's own, which is no camera of its model
            view.distance, view.azimuth, view.elevation, view.lookat = 2.2, 70, -35, (-0.2, 0.5, 2)
            # Rewards as in the paper's data: what is complete counts at every step.
            more = dict(tasks_to_complete=list(task.goals), remove_task_when_completed=False)
        elif task.suite == "fetch":
            view = self.view = mujoco.MjvCamera()
            view.distance, view.azimuth, view.elevation, view.lookat = 2.5, 132, -14, (1.3, 0.75, 0.55)
        self.env = gym.make(task.env_name, max_episode_steps=-1, **more)

    def _start(self, seed: int) -> NDArray[np.float32]:
        obs, _ = self.env.reset(seed=seed)
        if self.task.suite == "fetch":
            self.env.unwrapped._render_callback()  # puts the picture's target where the goal is
        return flat_observation(obs, self.task)

    def _act(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool]:
        obs, reward, terminated, _, info = self.env.step(action)
        kitchen = self.task.suite == "kitchen"
        success = terminated if kitchen else bool(info["is_success" if self.task.suite == "fetch" else "success"])
        own = kitchen or self.task.raw
        reward = reward if own else success
        return flat_observation(obs, self.task), reward, success and not self.task.raw, success

    def close(self) -> None:
        """Frees the renderers and the simulation."""
        super().close()
        self.env.close()
