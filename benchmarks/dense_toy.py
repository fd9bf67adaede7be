"""The toy task with a dense reward, as a user's own environment: nearness to the target, at most 1 a step.

python ogpo_state.py --env benchmarks.dense_toy:DenseToy-v0 --horizon 40 --demos FILE.hdf5    # those of --env toy fit
"""

import math
from typing import Any, ClassVar

import gymnasium as gym

from common.envs import resolve
from common.envs.base import Floats
from common.envs.toy import ToyReach


class DenseToy(ToyReach):
    """`ToyReach` with the reward 1 - distance / 2: below 1, rarely below 0, and its success still ends the episode."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(resolve("toy"), 40, render=render_mode is not None)

    def _act(self, action: Floats) -> tuple[Floats, float, bool, bool]:
        obs, _, terminated, success = super()._act(action)
        return obs, 1 - math.hypot(self.x - self.goal_x, self.y - self.goal_y) / 2, terminated, success


gym.register("DenseToy-v0", DenseToy)
