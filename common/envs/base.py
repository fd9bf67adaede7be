"""What the environments of this package share: spaces from the task's layout, seeds, the end of an episode."""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec

Floats = NDArray[np.float32]


class TaskEnv(gym.Env[Floats, Floats]):
    """One task: an episode is a function of its seed and the actions; the horizon truncates what has not terminated.

    A subclass says how an episode starts (`_start`) and what an action does (`_act`). task: layout of observations and
    actions, and the suite's name of the environment; horizon: steps until truncation; render: allow `render()`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(self, task: TaskSpec, horizon: int, *, render: bool = False) -> None:
        self.task, self.horizon = task, horizon
        self.render_mode = "rgb_array" if render else None
        width = sum(width for _, width in task.obs)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (task.action_dim,), np.float32)
        self.steps = 0  # of the episode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Starts the episode that `seed` names, or one drawn from `np_random`, which a given seed restarts."""
        super().reset(seed=seed)
        self.steps = 0
        return self._start(int(self.np_random.integers(2**31)) if seed is None else seed), {"success": False}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Applies one action (A,). `info["success"]` is the task's success test after it."""
        obs, reward, terminated, success = self._act(action)
        self.steps += 1
        truncated = self.steps >= self.horizon and not terminated
        return obs, float(reward), bool(terminated), truncated, {"success": bool(success)}

    def _start(self, seed: int) -> Floats:
        """First observation (O,) of the episode that `seed` names."""
        raise NotImplementedError

    def _act(self, action: Floats) -> tuple[Floats, float, bool, bool]:
        """Observation (O,) after an action (A,), its reward, whether it ended the episode for good, success."""
        raise NotImplementedError
