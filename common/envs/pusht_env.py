"""Push-T of gym-pusht: a disc pushes a block onto its outline on the table."""

from typing import Any

import gym_pusht  # noqa: F401  says at once if it is missing

from common.envs.base import Floats
from common.envs.gymnasium_env import UserEnv


class PushT(UserEnv):
    """Observation (5,): position of the disc and of the block, 0 to 512, and the block's angle; action (2,): where the
    disc goes. Success, the benchmark's: 95 % of the outline are covered. The reward is 1 on success, else 0
    [deviation: the benchmark pays for coverage].
    """

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = super().step(action)
        return obs, float(info["success"]), terminated, truncated, info
