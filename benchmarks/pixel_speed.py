"""Environment steps per second with the task's cameras at 84 x 84 pixels, and the size of a replay of a million steps.

    OMP_NUM_THREADS=1 python benchmarks/pixel_speed.py            # or: pixel_speed.py lift can

Three ways take turns in one process: robosuite's own environment with camera observations (its defaults), our
environment drawn after every step, and ours drawn once per chunk of four, as ogpo_pixels.py does.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.envs import TASKS, Pixels, make_env
from common.replay import ReplayBuffer
from ogpo_pixels import default_args

TURNS, STEPS, SIZE, CHUNK = 5, 40, 84, 4


def rate(step: object, actions: np.ndarray) -> float:
    """Environment steps per second of `step` over actions (T, ...), each of which is one call."""
    start = time.perf_counter()
    for action in actions:
        step(action)  # type: ignore[operator]
    return STEPS / (time.perf_counter() - start)


def compare(name: str) -> str:
    """The task's line of the table: medians of the turns."""
    from common.envs.robosuite_env import env_kwargs, suite  # which the sizes below do without

    task, cameras = TASKS[name], default_args(name, "laptop", "ogpo+ca").pixels.cameras
    pixels = Pixels(cameras, SIZE)
    kwargs = env_kwargs(task.action_dim // 7) | dict(
        has_offscreen_renderer=True, use_camera_obs=True, camera_names=list(cameras), camera_heights=SIZE,
        camera_widths=SIZE, lite_physics=False,
    )  # fmt: skip
    default = suite.make(task.env_name, **kwargs)
    every, chunked = make_env(name, pixels=pixels), make_env(name, chunk=CHUNK, pixels=pixels)
    actions = 0.3 * np.random.default_rng(0).uniform(-1, 1, (STEPS, task.action_dim)).astype(np.float32)
    rates = []
    for _ in range(TURNS):
        default.reset()
        every.reset(seed=0)
        chunked.reset(seed=0)
        rates.append(
            (
                rate(default.step, actions),
                rate(every.step, actions),
                rate(chunked.step, actions.reshape(-1, CHUNK, task.action_dim)),
            )
        )
    a, b, c = np.median(rates, 0)
    return f"| {name} | {a:.1f} | {b:.1f} | {c:.1f} | {b / a:.1f} | {c / a:.1f} |"


def memory() -> dict[str, float]:
    """Bytes that replay needs for an environment step, with features, images or every step's images in its rows."""
    rows, features, felt, act = 10_000, 128, 9, 7
    kept = ReplayBuffer(rows, features + felt, act * CHUNK, 1, rewards=CHUNK)
    arrays = (kept.obs, kept.actions, kept.rewards, kept.terminated, kept.ends, kept.starts.rows)
    size = sum(x.nbytes for x in (*arrays, kept.success_starts.rows)) / rows
    images = float(np.zeros((2, SIZE, SIZE, 3), np.uint8).nbytes)
    return {"features": size / CHUNK, "images of a chunk": (size + images) / CHUNK, "images of every step": images}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("| task | robosuite's own | drawn every step | drawn once per chunk | every / own | chunk / own |")
    print("|---|---:|---:|---:|---:|---:|")
    for task in sys.argv[1:] or ("lift", "can", "square", "tool_hang", "transport"):
        print(compare(task), flush=True)
    print("\nReplay of a million environment steps, GiB:")
    print("\n".join(f"{what}: {size * 1e6 / 2**30:.2f}" for what, size in memory().items()))
