"""Environment steps per second of Lift: robosuite's own step against the fast control step, in the same run.

    OMP_NUM_THREADS=1 python benchmarks/env_speed.py

A step is the whole Gymnasium step: 25 physics steps with control, observation, reward and success. The two take
turns, so that other load on the machine meets both; the table gives the median and the best of the turns.
"""

import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.envs import make_env
from common.envs.robosuite_env import RobosuiteEnv

TURNS, STEPS, SEEDS = 9, 100, range(5)
NAMES = ("robosuite's step", "fast step")


def episode_rate(env: RobosuiteEnv, actions: np.ndarray) -> float:
    """Steps per second of one episode, its reset left out."""
    env.reset(seed=0)
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    return len(actions) / (time.perf_counter() - start)


def reset_seconds(env: RobosuiteEnv, seeds: list[int]) -> float:
    """Median duration of a reset."""
    times = []
    for seed in seeds:
        start = time.perf_counter()
        env.reset(seed=seed)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def joints(env: RobosuiteEnv, seed: int, actions: np.ndarray, push: float = 0.0) -> np.ndarray:
    """Joint positions (T, nq) of an episode whose first joint starts with velocity `push`."""
    env.reset(seed=seed)
    data = env.env.sim.data
    data.qvel[0] += push
    rows = []
    for action in actions:
        env.step(action)
        rows.append(data.qpos.copy())
    return np.array(rows)


def main() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, 7)).astype(np.float32)
    envs = (make_env("lift", original_step=True), make_env("lift"))
    for env in envs:
        episode_rate(env, actions[:10])  # compiles and warms up
    rates = np.array([[episode_rate(env, actions) for env in envs] for _ in range(TURNS)])

    packages = ", ".join(f"{name} {version(name)}" for name in ("robosuite", "mujoco", "numpy", "numba"))
    print(f"{packages}; {os.cpu_count()} cores")
    print(f"{'Lift, environment steps':28}{'median /s':>12}{'best /s':>16}")
    for name, column in zip(NAMES, rates.T, strict=True):
        print(f"{name:28}{np.median(column):12.0f}{column.max():16.0f}")
    ratios = rates[:, 1] / rates[:, 0]
    print(f"{'ratio within a turn':28}{np.median(ratios):12.1f}{ratios.max():16.1f}")

    # Contacts amplify rounding errors, so a deviation is to be read against robosuite's own sensitivity.
    own = [joints(envs[0], seed, actions) for seed in SEEDS]
    others = {
        "fast step": [joints(envs[1], seed, actions) for seed in SEEDS],
        "robosuite pushed by 1e-15": [joints(envs[0], seed, actions, 1e-15) for seed in SEEDS],
    }
    print(f"\n{f'max |dq|, {len(SEEDS)} episodes':28}{'first step':>12}{'median episode':>16}{'worst episode':>16}")
    for name, other in others.items():
        gap = np.abs(np.array(own) - np.array(other)).max(axis=2)
        episode = gap.max(axis=1)
        print(f"{name:28}{gap[:, 0].max():12.1e}{np.median(episode):16.1e}{episode.max():16.1e}")

    print(f"\nreset, same model {1e3 * reset_seconds(envs[1], list(range(16))):10.1f} ms")
    print(f"reset, new model  {1e3 * reset_seconds(envs[1], [100, 200, 300]):10.1f} ms")
    for env in envs:
        env.close()


if __name__ == "__main__":
    main()
