"""Wrappers: whole action chunks as steps, images in place of the state, and errors that say where they arose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from common.errors import EnvError, UserError, blame


@dataclass(frozen=True)
class Pixels:
    """What the policy sees instead of the state: cameras by name, and the width and height of their images."""

    cameras: tuple[str, ...]
    size: int


class ChunkStep(gym.Wrapper[Any, Any, Any, Any]):
    """One step executes a chunk (H, A) open loop; the end of the episode discards the rest.

    The reward is the sum over the steps made, `info["steps"]` their number; `info` has "rewards" and "successes" of
    every step and "made", 1 for the steps made and 0 for the rest, all (H,). One message a chunk instead of one a step
    is what keeps environments in other processes busy.
    """

    def __init__(self, env: gym.Env[Any, Any], chunk: int) -> None:
        super().__init__(env)
        self.action_space = gym.vector.utils.batch_space(env.action_space, chunk)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """action (H, A)"""
        rewards, successes, made = np.zeros((3, len(action)))
        for i, one in enumerate(action):
            obs, rewards[i], terminated, truncated, info = self.env.step(one)
            successes[i], made[i] = info["success"], 1
            if terminated or truncated:
                break
        more = {"success": bool(successes.any()), "steps": int(made.sum())}
        more |= {"rewards": rewards, "successes": successes, "made": made}
        return obs, float(rewards.sum()), terminated, truncated, info | more


class PixelEnv(gym.ObservationWrapper[Any, Any, Any]):
    """Observes {"images": (N, S, S, 3) uint8, "proprio": (P,) float32}, drawn after every step of `env`.

    Around a ChunkStep that is once per chunk: the steps between are never drawn. The environment has a method
    images(cameras, size); proprio lists the numbers of its observation that are kept. Raises UserError for an image of
    one colour, which is a broken renderer's.
    """

    def __init__(self, env: gym.Env[Any, Any], proprio: Sequence[int], pixels: Pixels) -> None:
        super().__init__(env)
        self.pixels, self.proprio = pixels, list(proprio)
        shape = (len(pixels.cameras), pixels.size, pixels.size, 3)
        self.observation_space = gym.spaces.Dict(
            {
                "images": gym.spaces.Box(0, 255, shape, np.uint8),
                "proprio": gym.spaces.Box(-np.inf, np.inf, (len(self.proprio),), np.float32),
            }
        )

    def observation(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """obs (O,) of `env` -> what is seen and felt"""
        images = self.env.unwrapped.images(self.pixels.cameras, self.pixels.size)
        for name, image in zip(self.pixels.cameras, images, strict=True):
            if (image == image[0, 0]).all():
                raise UserError(
                    f"camera {name} shows one colour, {image[0, 0].tolist()}: the renderer is broken; set MUJOCO_GL to "
                    "egl or osmesa, and look at what --render-check writes"
                )
        return {"images": images, "proprio": obs[self.proprio]}


class Guard(gym.Wrapper[Any, Any, Any, Any]):
    """Raises EnvError, with the episode's seed and step, for what the environment raises or returns that is no number.

    An environment below counts the `steps` of its episode. Raises UserErrors as they are.
    """

    seed: int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seed = seed
        obs, info = self._call(self.env.reset, 0, seed=seed, options=options)
        self._check(obs, 0.0)
        return obs, info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        result = self._call(self.env.step, 1, action)
        self._check(*result[:2])
        return result

    def _call(self, method: Callable[..., Any], begun: int, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            raise self._error(blame(error), begun) from error

    def _check(self, obs: Any, reward: float) -> None:
        numbers, space = obs, self.observation_space
        if isinstance(obs, dict):
            numbers, space = obs["proprio"], space["proprio"]
        if numbers.shape != space.shape:
            raise self._error(f"the observation has shape {numbers.shape}, not {space.shape}")
        if not np.isfinite(numbers).all():
            where = np.flatnonzero(~np.isfinite(numbers))[0]
            raise self._error(f"number {where} of the observation is {numbers[where]}")
        if not np.isfinite(reward):
            raise self._error(f"the reward is {reward}")

    def _error(self, what: str, begun: int = 0) -> EnvError:
        steps = self.env.get_wrapper_attr("steps") + begun
        return EnvError(f"episode seed {self.seed}, {f'step {steps}' if steps else 'reset'}: {what}")
