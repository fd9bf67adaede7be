"""Demonstrations by scripted experts: tremor in the hand, imprecise grasps, failures left out."""

import importlib.metadata
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.demos.robomimic import Episode, image_key, write_demos
from common.envs import Pixels, TaskSpec, make_env
from common.errors import UserError

Expert = Generator[NDArray[np.float32], NDArray[np.float32], None]
VERSION = 2  # of the experts and their shares: cached episodes of another version are left alone
SEED_BASE = 2**31  # training and evaluation use smaller seeds: their episodes are not among the demonstrations
MAX_STEPS = {"lift": 150, "can": 250, "square": 400}  # an expert that needs longer has lost the object


def metaworld_expert(
    env: gym.Env[Any, Any], obs: NDArray[np.float32], rng: np.random.Generator, noise: float
) -> Expert:
    """Meta-World's own policy of the episode's task, with tremor in the three position commands."""
    from metaworld.policies import ENV_POLICY_MAP

    policy = ENV_POLICY_MAP[env.names[env.which]]()
    while True:
        action = np.clip(policy.get_action(obs[:39].astype(np.float64)), -1, 1)
        action[:3] += noise * rng.standard_normal(3)
        obs = yield np.clip(action, -1, 1).astype(np.float32)


def find_expert(task: TaskSpec) -> Callable[..., Expert]:
    """The task's expert: called with environment, first observation, generator and noise. Raises UserError."""
    if task.name == "toy":
        from common.envs.toy import toy_expert

        return toy_expert
    if task.suite == "metaworld":
        return metaworld_expert
    if task.name in MAX_STEPS:
        from common.demos import robosuite_experts

        return getattr(robosuite_experts, f"{task.name}_expert")
    if task.suite == "adroit":
        raise UserError(f"{task.name} has no scripted expert; name a trained policy with --demos POLICY.npz")
    raise UserError(f"{task.name} has no scripted expert; give demonstrations with --demos FILE.hdf5")


def shares(num: int, weights: Sequence[int]) -> list[int]:
    """`num` episodes divided among tasks in proportion to `weights`; what does not divide goes to the first ones."""
    counts = [num * weight // sum(weights) for weight in weights]
    for i in range(num - sum(counts)):
        counts[i] += 1
    return counts


def generate(
    task: TaskSpec,
    expert: Callable[..., Expert],
    num: int,
    noise: float,
    seed: int,
    path: Path,
    pixels: Pixels | None = None,
) -> None:
    """Writes `num` successful episodes of an expert to `path`, in the robomimic schema. A function of its arguments.

    With `pixels` the images of every step go with them, as obs/CAMERA_image (T, S, S, 3) uint8.
    """
    if num < 1:
        raise UserError(f"{num} demonstrations were asked for; ask for at least one")
    env = make_env(task.name, horizon=MAX_STEPS.get(task.name, task.horizon))
    keys = [key for key, _ in task.obs]
    splits = np.cumsum([width for _, width in task.obs])[:-1]
    episodes: list[Episode] = []
    left = shares(num, task.demo_weights or (1,))
    try:
        with tqdm(total=num, desc=f"{task.name} demonstrations", leave=False, mininterval=1) as bar:
            attempt = 0
            while len(episodes) < num:
                if attempt == 20 * num + 20:
                    raise UserError(f"the {task.name} expert fails with noise {noise}; use less noise")
                rng = np.random.default_rng([seed, attempt])
                start = SEED_BASE + 10**5 * seed + attempt
                attempt += 1
                if not left[start % len(left)]:
                    continue  # this task has its share
                rollout = _rollout(env, expert, rng, noise, start, pixels)
                if rollout is not None:
                    left[start % len(left)] -= 1
                    obs, states, actions, rewards, *images = rollout
                    parts = dict(zip(keys, np.split(obs, splits, axis=1), strict=True))
                    if pixels:
                        parts |= {image_key(name): images[0][:, i] for i, name in enumerate(pixels.cameras)}
                    episodes.append(Episode(parts, states, actions, rewards))
                    bar.update()
    finally:
        env.close()
    write_demos(path, episodes, _env_args(task))


def _rollout(
    env: gym.Env[Any, Any],
    expert: Callable[..., Expert],
    rng: np.random.Generator,
    noise: float,
    seed: int,
    pixels: Pixels | None,
) -> tuple[NDArray[Any], ...] | None:
    """Observations, simulator states, actions, rewards and, if asked for, images of an episode; None if it failed."""
    obs, _ = env.reset(seed=seed)
    policy = expert(env, obs, rng, noise)
    action = next(policy)
    steps, done, success = [], False, False
    while not done:
        state = env.state() if hasattr(env, "state") else obs
        images = (env.images(pixels.cameras, pixels.size),) if pixels else ()  # type: ignore[attr-defined]
        next_obs, reward, terminated, truncated, info = env.step(action)
        steps.append((obs, state, action, reward, *images))
        success |= info["success"]
        done, obs = terminated or truncated, next_obs
        if not done:
            action = policy.send(obs)
    return tuple(np.stack(column) for column in zip(*steps, strict=True)) if success else None


def _env_args(task: TaskSpec) -> str:
    if task.suite == "robosuite":
        import robosuite

        from common.envs.robosuite_env import ARM_ACTIONS, env_kwargs

        version, kwargs = robosuite.__version__, env_kwargs(task.action_dim // ARM_ACTIONS)
    else:
        package = {"metaworld": "metaworld", "adroit": "gymnasium-robotics"}.get(task.suite)
        version, kwargs = importlib.metadata.version(package) if package else "1", {}
    return json.dumps({"env_name": task.env_name, "env_version": version, "type": 1, "env_kwargs": kwargs})
