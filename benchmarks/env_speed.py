"""Environment steps per second: robosuite's own step against the fast control step, in the same run; all five tasks.

    OMP_NUM_THREADS=1 python benchmarks/env_speed.py          # or: env_speed.py lift can

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

from common.envs import TASKS, make_env
from common.envs.robosuite_env import RobosuiteEnv

TURNS, STEPS, SEEDS = 9, 100, range(5)


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


def compare(name: str) -> tuple[str, str]:
    """The task's lines of the two tables, speed and differences."""
    env = make_env(name, original_step=True), make_env(name)
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, len(env[0].action_space.low))).astype(np.float32)
    for one in env:
        episode_rate(one, actions[:10])  # compiles and warms up
    rates = np.array([[episode_rate(one, actions) for one in env] for _ in range(TURNS)])
    ratios = rates[:, 1] / rates[:, 0]
    # Contacts amplify rounding errors, so a deviation is to be read against robosuite's own sensitivity.
    own, fast, pushed = (
        np.array([joints(one, seed, actions, push) for seed in SEEDS])
        for one, push in ((env[0], 0.0), (env[1], 0.0), (env[0], 1e-15))
    )
    gaps = [np.abs(own - other).max(axis=2) for other in (fast, pushed)]
    resets = [1e3 * reset_seconds(env[1], seeds) for seeds in (list(range(16)), [100, 200, 300])]
    for one in env:
        one.close()
    speeds = [f"{np.median(column):.0f}" for column in rates.T] + [f"{np.median(ratios):.1f} ({ratios.max():.1f})"]
    speeds += [f"{ms:.1f}" for ms in resets]
    drifts = [f"{gaps[0][:, 0].max():.0e}"]
    drifts += [f"{np.median(gap.max(axis=1)):.0e} / {gap.max():.0e}" for gap in gaps]
    return f"| {name} | {' | '.join(speeds)} |", f"| {name} | {' | '.join(drifts)} |"


def main() -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("robosuite", "mujoco", "numpy", "numba"))
    print(f"{packages}; {os.cpu_count()} cores; {TURNS} turns of {STEPS} steps, {len(SEEDS)} episodes for the gaps\n")
    print("| task | robosuite's step /s | fast step /s | ratio (best turn) | reset ms | reset, new model ms |")
    print("|---|---:|---:|---:|---:|---:|")
    drifts = []
    for name in sys.argv[1:] or [name for name, task in TASKS.items() if task.suite == "robosuite"]:
        speed, drift = compare(name)
        print(speed, flush=True)
        drifts.append(drift)
    print("\n| task | first step | episode: median / largest | robosuite pushed by 1e-15 |\n|---|---:|---:|---:|")
    print("\n".join(drifts))


if __name__ == "__main__":
    main()
