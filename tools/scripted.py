"""Scripted experts: who demonstrates which task. robosuite_experts.py has robosuite's, fetch_experts.py Fetch's."""

import warnings
from collections.abc import Callable, Generator
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.toy import GAP_CENTRE, GAP_HALF_WIDTH, STEP
from common.errors import UserError

Expert = Generator[NDArray[np.float32], NDArray[np.float32], None]
VERSION = 2  # of the experts and their shares: cached episodes of another version are left alone
MAX_STEPS = {"lift": 150, "can": 250, "square": 400}  # an expert that needs longer has lost the object


def toy_expert(env: gym.Env[Any, Any], obs: NDArray[np.float32], rng: np.random.Generator, noise: float) -> Expert:
    """Demonstrator as a generator: yields an action (2,) float32, is sent the next observation.

    It takes one of the gaps at random and steers through it to the target with hand tremor of standard
    deviation `noise` (in units of the action range). `env` is unused: the observation tells everything.
    """
    gap = GAP_CENTRE if rng.random() < 0.5 else -GAP_CENTRE
    while True:
        x, y, goal_x, goal_y = obs[:4].tolist()
        if x < -0.12 or (x < 0.0 and abs(y - gap) > 0.6 * GAP_HALF_WIDTH):
            aim_x, aim_y = -0.1, gap  # line up in front of the gap
        elif x < 0.1:
            aim_x, aim_y = 0.2, gap  # go straight through
        else:
            aim_x, aim_y = goal_x, goal_y
        command = np.array((aim_x - x, aim_y - y)) / STEP
        command /= max(1.0, float(np.abs(command).max()))
        action = np.clip(command + noise * rng.standard_normal(2), -1.0, 1.0).astype(np.float32)
        obs = yield action


def metaworld_expert(
    env: gym.Env[Any, Any], obs: NDArray[np.float32], rng: np.random.Generator, noise: float
) -> Expert:
    """Meta-World's own policy of the episode's task, with tremor in the three position commands."""
    from metaworld.policies import ENV_POLICY_MAP

    warnings.filterwarnings("ignore", "Constant")  # "may be too high": actions are clipped
    policy = ENV_POLICY_MAP[env.names[env.which]]()
    while True:
        action = np.clip(policy.get_action(obs[:39].astype(np.float64)), -1, 1)
        action[:3] += noise * rng.standard_normal(3)
        obs = yield np.clip(action, -1, 1).astype(np.float32)


def find_expert(task: TaskSpec) -> Callable[..., Expert]:
    """The task's expert: called with environment, first observation, generator and noise. Raises UserError."""
    if task.name == "toy":
        return toy_expert
    if task.suite == "metaworld":
        return metaworld_expert
    if task.name in MAX_STEPS:
        from tools import robosuite_experts

        return getattr(robosuite_experts, f"{task.name}_expert")
    if task.suite == "fetch" and task.name != "fetch-slide":
        from tools import fetch_experts

        return getattr(fetch_experts, f"{task.name.removeprefix('fetch-').replace('-', '_')}_expert")
    if task.suite == "adroit":
        raise UserError(f"{task.name} has no scripted expert; name a trained policy with --demos POLICY.npz")
    raise UserError(
        f"{task.name} has no scripted expert; give demonstrations with --demos FILE, or record those of a policy with "
        "python -m tools.record (docs/tasks.md)"
    )
