"""Wrappers: whole action chunks as steps, and images in place of the state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from common.errors import UserError


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
