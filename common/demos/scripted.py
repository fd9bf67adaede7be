"""Demonstrations by scripted experts: tremor in the hand, imprecise grasps, failures left out."""

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from common.demos.robomimic import Episode, write_demos
from common.envs import TaskSpec, make_env
from common.errors import UserError

Expert = Generator[NDArray[np.float32], NDArray[np.float32], None]
MAX_STEPS = 150  # an expert that needs longer has dropped the object
SEED_BASE = 2**31  # training and evaluation use smaller seeds: their episodes are not among the demonstrations


def lift_expert(env: gym.Env[Any, Any], obs: NDArray[np.float32], rng: np.random.Generator, noise: float) -> Expert:
    """Expert for Lift: above the cube, down, close, up. Yields actions (7,), is sent observations (19,).

    `noise` is the standard deviation of a tremor on the six pose commands, in units of the action range; with
    it the grasp also misses the cube's centre by up to 4 mm. `env` is unused: the observation says it all.
    """
    miss = rng.uniform(-0.004, 0.004, 3) if noise else np.zeros(3)
    # The fingers close along the hand's y axis; turn it to the nearest pair of the cube's faces.
    hand = Rotation.from_quat(obs[3:7]).as_matrix()
    cube = Rotation.from_quat(obs[12:16]).as_matrix()
    yaw = np.arctan2(hand[1, 1], hand[0, 1])
    turn = np.arctan2(cube[1, 0], cube[0, 0]) - yaw
    yaw += (turn + np.pi / 4) % (np.pi / 2) - np.pi / 4
    y, up = np.array([np.cos(yaw), np.sin(yaw), 0.0]), np.array([0.0, 0.0, 1.0])
    grasp = Rotation.from_matrix(np.stack([np.cross(up, y), y, -up], axis=1))

    phase, closing, lifted = "above", 0, np.zeros(3)
    while True:
        pos, cube_pos = obs[:3].astype(np.float64), obs[9:12].astype(np.float64)
        turn_left = (grasp * Rotation.from_quat(obs[3:7]).inv()).as_rotvec()
        if phase == "above" and _near(cube_pos + 0.08 * up, pos, 0.015) and _near(turn_left, 0, 0.15):
            phase = "down"
        elif phase == "down" and _near(cube_pos + miss, pos, 0.008):
            phase = "close"
        elif phase == "close" and closing == 5:
            phase, lifted = "up", pos + 0.12 * up
        closing += phase == "close"
        target = {"above": cube_pos + 0.08 * up, "up": lifted}.get(phase, cube_pos + miss)
        command = np.concatenate([1.5 * (target - pos) / 0.05, turn_left / 0.5])
        command = np.clip(command, -1, 1) + noise * rng.standard_normal(6)
        grip = 1.0 if phase in ("close", "up") else -1.0
        obs = yield np.append(np.clip(command, -1, 1), grip).astype(np.float32)


def _near(a: NDArray[np.float64], b: NDArray[np.float64] | float, distance: float) -> bool:
    return float(np.linalg.norm(a - b)) < distance


def _expert(task: TaskSpec) -> Callable[..., Expert]:
    if task.name == "toy":
        from common.envs.toy import toy_expert

        return toy_expert
    if task.name == "lift":
        return lift_expert
    raise UserError(f"{task.name} has no scripted expert; give demonstrations with --demos FILE.hdf5")


def generate(task: TaskSpec, num: int, noise: float, seed: int, path: Path) -> None:
    """Writes `num` successful episodes to `path`, in the robomimic schema. A function of its arguments."""
    expert = _expert(task)
    if num < 1:
        raise UserError(f"{num} demonstrations were asked for; ask for at least one")
    env = make_env(task.name, horizon=min(MAX_STEPS, task.horizon))
    keys = [key for key, _ in task.obs]
    splits = np.cumsum([width for _, width in task.obs])[:-1]
    episodes: list[Episode] = []
    try:
        with tqdm(total=num, desc=f"scripted {task.name} demonstrations", leave=False, mininterval=1) as bar:
            attempt = 0
            while len(episodes) < num:
                if attempt == 20 * num + 20:
                    raise UserError(f"the {task.name} expert fails with noise {noise}; use less noise")
                rng = np.random.default_rng([seed, attempt])
                rollout = _rollout(env, expert, rng, noise, SEED_BASE + 10**5 * seed + attempt)
                attempt += 1
                if rollout is not None:
                    obs, states, actions, rewards = rollout
                    parts = dict(zip(keys, np.split(obs, splits, axis=1), strict=True))
                    episodes.append(Episode(parts, states, actions, rewards))
                    bar.update()
    finally:
        env.close()
    write_demos(path, episodes, _env_args(task))


def _rollout(
    env: gym.Env[Any, Any], expert: Callable[..., Expert], rng: np.random.Generator, noise: float, seed: int
) -> tuple[NDArray[Any], ...] | None:
    """Observations, simulator states, actions and rewards of one episode; None if it failed."""
    obs, _ = env.reset(seed=seed)
    policy = expert(env, obs, rng, noise)
    action = next(policy)
    steps, done = [], False
    while not done:
        state = env.state() if hasattr(env, "state") else obs
        next_obs, reward, terminated, truncated, _ = env.step(action)
        steps.append((obs, state, action, reward))
        done, obs = terminated or truncated, next_obs
        if not done:
            action = policy.send(obs)
    return tuple(np.stack(column) for column in zip(*steps, strict=True)) if terminated else None


def _env_args(task: TaskSpec) -> str:
    if task.suite == "robosuite":
        import robosuite

        from common.envs.robosuite_env import ARM_ACTIONS, env_kwargs

        version, kwargs = robosuite.__version__, env_kwargs(task.action_dim // ARM_ACTIONS)
    else:
        version, kwargs = "1", {}
    return json.dumps({"env_name": task.env_name, "env_version": version, "type": 1, "env_kwargs": kwargs})
