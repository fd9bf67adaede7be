"""A user's own Gymnasium environment, brought to the contract of the built-in tasks."""

import importlib
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.base import Floats
from common.errors import UserError, blame

warnings.filterwarnings("ignore", ".*share an object")  # Gymnasium's, of observations, which are copied here


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
    """How the environment "package.module:EnvId" is registered, after import of the module. Raises UserError.

    The module may be in the current folder, wherever the script is.
    """
    module, _, name = env_id.partition(":")
    with _in_one_line(f"{env_id} cannot be made"):
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # last: nothing there hides a module of ours
        importlib.import_module(module)
        return gym.spec(name)


@cache
def _say_once(text: str) -> None:
    """A note, by the main process alone."""
    if multiprocessing.parent_process() is None:
        print(f"note: {text}", file=sys.stderr)


def _parts(space: gym.Space[Any], env_id: str) -> dict[str, gym.Space[Any]]:
    """What an observation consists of, by name, in order. Raises UserError for images and what is no numbers."""
    parts = {"all": space}
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        parts = {str(k): v for k, v in (space.items() if isinstance(space, gym.spaces.Dict) else enumerate(space))}
    for name, part in parts.items():
        if not part.is_np_flattenable or len(part.shape or ()) > 2:
            which = "" if part is space else f" as {name}"
            raise UserError(
                f"{env_id} observes {part}{which}; numbers in at most two dimensions are needed, no images: leave it "
                "out, with gymnasium.wrappers.FilterObservation or in the environment"
            )
    return parts


class UserEnv(gym.Wrapper[Floats, Floats, Any, NDArray[Any]]):
    """float32 observations, actions in [-1, 1], and an episode that terminates at the first success.

    The task's env_name is "package.module:EnvId"; the module is imported first, so that it can register EnvId.
    horizon: steps until truncation, None keeps the environment's own; render: make it with render_mode="rgb_array".

    Observations of several parts, or dimensions, are flattened, those of a Dict in alphabetical order; a note tells
    order and widths. Actions are rescaled to the environment's box, whose bounds (A,) are `action_bounds`.

    Raises UserError for an environment that cannot be made, or rendered if that is asked for, observes something else
    than numbers, has other actions than a Box of floats with finite bounds, or does not report `info["success"]`, or
    `info["is_success"]`, at every step.
    """

    def __init__(self, task: TaskSpec, horizon: int | None, *, render: bool = False) -> None:
        env_id = task.env_name
        spec = find_spec(env_id)
        with _in_one_line(f"{env_id} cannot be made"):
            env = gym.make(spec, max_episode_steps=horizon)
            if render and "rgb_array" not in env.metadata.get("render_modes", ()):
                raise UserError(f"no video: {env_id} does not list rgb_array among its render_modes")
            if render:
                env.close()
                env = gym.make(spec, max_episode_steps=horizon, render_mode="rgb_array")
        seen, action = env.observation_space, env.action_space
        if isinstance(seen, gym.spaces.Dict):
            seen = gym.spaces.Dict(dict(seen.items()))  # sorted, as the parts of demonstrations are
        widths = {name: gym.spaces.flatdim(part) for name, part in _parts(seen, env_id).items()}
        if len(seen.shape or ()) != 1:
            _say_once(f"{env_id}: an observation is {', '.join(f'{k} ({n})' for k, n in widths.items())}, flattened")
        floats = isinstance(action, gym.spaces.Box) and action.dtype.kind == "f" and action.is_bounded()
        if not (floats and (action.low < action.high).all()):
            raise UserError(f"{env_id} acts in {action}; a Box of floats with finite bounds, low < high, is needed")
        super().__init__(env)
        self.env_id, self.seen = env_id, seen
        self.action_bounds = action.low.ravel(), action.high.ravel()  # in the environment's own units
        self.box = [bound.astype(np.float64) for bound in self.action_bounds]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (sum(widths.values()),), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, self.action_bounds[0].shape, np.float32)
        with _in_one_line(f"{env_id} fails at its first reset or step"):
            self.reset(seed=0)
            self.step(np.zeros(self.action_space.shape, np.float32))  # finds missing success before training does

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """As the environment's own reset; `info["success"]` is False."""
        self.steps = 0
        obs, _ = self.env.reset(seed=seed, options=options)
        return self._flat(obs), {"success": False}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """As the environment's own step; success ends the episode."""
        low, high = self.box
        own, space = np.clip((low + high) / 2 + (high - low) / 2 * action, low, high), self.env.action_space
        obs, reward, terminated, truncated, info = self.env.step(own.astype(space.dtype).reshape(space.shape))
        said = [info[name] for name in ("success", "is_success") if name in info]
        if not said:
            raise UserError(
                f'{self.env_id} does not report info["success"], nor info["is_success"]; its step must set one of them '
                "to True or False"
            )
        self.steps += 1
        success = bool(said[0])
        terminated = success or bool(terminated)
        truncated = bool(truncated) and not terminated
        return self._flat(obs), float(reward), terminated, truncated, {"success": success}

    def _flat(self, obs: Any) -> Floats:
        """A copy (O,): the environment may write the next observation into its own."""
        return np.array(gym.spaces.flatten(self.seen, obs), np.float32)
