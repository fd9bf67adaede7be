"""A user's own Gymnasium environment, brought to the contract of the built-in tasks."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.base import Floats
from common.errors import UserError, blame


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Whatever a user's code raises, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} ({blame(error)}); check the module and the registered id") from error


def find_spec(env_id: str) -> EnvSpec:
    """How the environment "package.module:EnvId" is registered, after import of the module. Raises UserError."""
    module, _, name = env_id.partition(":")
    with _in_one_line(f"{env_id} cannot be made"):
        importlib.import_module(module)
        return gym.spec(name)


class UserEnv(gym.Wrapper[Floats, Floats, NDArray[Any], NDArray[Any]]):
    """float32 observations, actions in [-1, 1], and an episode that terminates at the first success.

    The task's env_name is "package.module:EnvId"; the module is imported first, so that it can register EnvId.
    horizon: steps until truncation, None keeps the environment's own; render: make it with render_mode="rgb_array".

    Raises UserError for an environment that cannot be made, or rendered if that is asked for, has spaces other than a
    1-D Box of observations and a bounded 1-D Box of actions, or does not report `info["success"]` at every step.
    """

    def __init__(self, task: TaskSpec, horizon: int | None, *, render: bool = False) -> None:
        env_id = task.env_name
        spec = find_spec(env_id)
        with _in_one_line(f"{env_id} cannot be made"):
            env = gym.make(spec)
            if render and "rgb_array" not in env.metadata.get("render_modes", ()):
                raise UserError(f"no video: {env_id} does not list rgb_array among its render_modes")
            if render:
                env.close()
                env = gym.make(spec, render_mode="rgb_array")
        obs, action = env.observation_space, env.action_space
        if not (isinstance(obs, gym.spaces.Box) and len(obs.shape) == 1):
            raise UserError(f"{env_id} observes {obs}; a 1-D Box is needed; wrap it in FlattenObservation")
        if not (isinstance(action, gym.spaces.Box) and len(action.shape) == 1 and action.is_bounded()):
            raise UserError(f"{env_id} acts in {action}; a 1-D Box with finite bounds is needed")
        if horizon is not None:
            env = gym.wrappers.TimeLimit(env, horizon)
        if (action.low != -1).any() or (action.high != 1).any():
            env = gym.wrappers.RescaleAction(env, action.dtype.type(-1), action.dtype.type(1))
        super().__init__(env)
        self.env_id = env_id
        self.action_bounds = action.low, action.high  # in the environment's own units
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)
        self.action_space = gym.spaces.Box(-1, 1, action.shape, np.float32)
        with _in_one_line(f"{env_id} fails at its first reset or step"):
            self.reset(seed=0)
            self.step(np.zeros(action.shape, np.float32))  # finds a missing info["success"] before training does

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """As the environment's own reset; `info["success"]` is False."""
        self.steps = 0
        obs, _ = self.env.reset(seed=seed, options=options)
        return np.array(obs, np.float32), {"success": False}  # a copy: the environment may write the next into its own

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """As the environment's own step; success ends the episode."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        if "success" not in info:
            raise UserError(f'{self.env_id} does not report info["success"]; its step must set it to True or False')
        self.steps += 1
        success = bool(info["success"])
        terminated = success or bool(terminated)
        truncated = bool(truncated) and not terminated
        return np.array(obs, np.float32), float(reward), terminated, truncated, {"success": success}
