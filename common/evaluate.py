"""Episodes with open-loop action chunks: success, length, confidence interval and video."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, first_line
from common.files import replacing
from common.rng import Rng
from common.runlog import counted

Policy = Callable[[Tensor, Rng], Tensor]  # observations (n, O), source of noise -> chunks (n, H, A)
Act = Callable[[np.ndarray], np.ndarray]
Encode = Callable[[Any], np.ndarray]  # what environments show, stacked (n, ...), to observations (n, O)


def act_on_arrays(policy: Policy, obs: np.ndarray, rng: Rng) -> np.ndarray:
    """A policy between arrays: obs (n, O) -> chunks (n, H, A)."""
    return policy(torch.from_numpy(obs).float().to(rng.device), rng).cpu().numpy()


@dataclass(frozen=True)
class EvalResult:
    """Outcome of E episodes, in the order of their seeds."""

    success: np.ndarray  # (E,) bool
    length: np.ndarray  # (E,) int64, environment steps
    parts: tuple[str, ...] = ()  # (E,) task of every episode, where one policy serves several

    @property
    def rate(self) -> float:
        """Fraction of episodes that succeeded."""
        return float(self.success.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the success probability."""
        return wilson(int(self.success.sum()), len(self.success))

    @property
    def mean_length(self) -> float:
        """Mean number of environment steps per episode, failures included."""
        return float(self.length.mean())

    @property
    def by_part(self) -> dict[str, float]:
        """Fraction of every task's episodes that succeeded, by name."""
        parts = np.array(self.parts)
        return {name: float(self.success[parts == name].mean()) for name in sorted(set(self.parts))}

    def summary(self) -> dict[str, Any]:
        """These numbers, for a file."""
        return {
            "episodes": len(self.success),
            "successes": int(self.success.sum()),
            "interval": self.interval,
            "mean_length": self.mean_length,
            "by_task": self.by_part,
        }

    def __str__(self) -> str:
        low, high = self.interval
        parts = ", ".join(f"{name} {rate:.2f}" for name, rate in self.by_part.items())
        return (
            f"success {self.rate:.2f} [{low:.2f}, {high:.2f}] over {counted(len(self.success), 'episode')}, "
            f"mean length {self.mean_length:.1f}{f' ({parts})' if parts else ''}"
        )


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson 95 % interval of `k` successes in `n` trials. Raises ValueError if there can be no such k."""
    from scipy.stats import binomtest  # takes a second to import, which no start should wait for

    interval = binomtest(k, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def evaluate(
    envs: gym.vector.VectorEnv, act: Act, seeds: Sequence[int], encode: Encode = np.asarray
) -> EvalResult:  # fmt: skip
    """Run an episode from every one of E seeds, in W ChunkStep environments with autoreset disabled.

    encode maps what the environments show to observations (W, O), act those of the environments still running, (n, O),
    to chunks (n, H, A). Worker w runs a contiguous block of the episodes; for a policy that treats rows independently
    and draws nothing the result does not depend on W. A policy that draws noise for the episodes running together
    gives other episodes with another W.
    """
    episodes = len(seeds)
    if not episodes:
        raise ValueError("evaluate needs at least one episode")
    left = [deque(block.tolist()) for block in np.array_split(np.arange(episodes), envs.num_envs)]  # by worker
    success = np.zeros(episodes, dtype=bool)
    length = np.zeros(episodes, dtype=np.int64)

    def begin() -> list[int]:
        # A worker without episodes still has to step: it replays the last one and nobody looks.
        return [seeds[todo[0] if todo else -1] for todo in left]

    obs = encode(envs.reset(seed=begin())[0])
    while any(left):
        active = [w for w, todo in enumerate(left) if todo]
        episode = [left[w][0] for w in active]
        chunks = np.zeros(envs.action_space.shape, dtype=envs.single_action_space.dtype)  # (W, H, A)
        chunks[active] = act(obs[active])
        shown, _, terminated, truncated, info = envs.step(chunks)
        length[episode] += info["steps"][active]
        success[episode] |= info["success"][active].astype(bool)
        done = terminated | truncated
        if done.any():
            for w in active:
                if done[w]:
                    left[w].popleft()
            shown, _ = envs.reset(seed=begin(), options={"reset_mask": done})
        obs = encode(shown)
    return EvalResult(success, length)


def record_video(
    env: gym.Env, act: Act, path: Path, seeds: Sequence[int], fps: int = 20, encode: Encode = np.asarray
) -> None:
    """Write an episode from every seed to the mp4 file `path`.

    `env` was made with render=True; `act` and `encode` are as in `evaluate`, for one environment. The last picture
    of each episode stays for half a second, with a green (success) or red (failure) border.

    Raises UserError without working OpenGL or ffmpeg. Training can go on without the video.
    """
    try:
        with replacing(path) as temp:
            try:
                import imageio.v2 as imageio

                writer = imageio.get_writer(temp, fps=fps, macro_block_size=2)  # the pixel format needs even sizes
            except Exception as error:
                raise UserError(f"no video: {first_line(error)}; run: pip install imageio imageio-ffmpeg") from error
            with writer:
                for seed in seeds:
                    for picture in _film(env, act, encode, seed, hold=fps // 2):
                        writer.append_data(picture)
    except OSError as error:
        raise UserError(f"no video: ffmpeg stopped ({first_line(error)})") from error


def write_views(env: gym.Env, folder: Path) -> None:
    """Writes what every camera of a `PixelEnv` sees at the start of an episode, to folder/cameras_NAME.png."""
    import imageio.v3 as imageio

    shown, _ = env.reset(seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"cameras_{name}.png" for name in env.get_wrapper_attr("pixels").cameras]
    for path, image in zip(paths, shown["images"], strict=True):
        imageio.imwrite(path, image)
    env.close()
    print(f"cameras: {', '.join(map(str, paths))}")


def _film(env: gym.Env, act: Act, encode: Encode, seed: int, hold: int) -> Iterator[np.ndarray]:
    """Pictures of one episode, and `hold` more of its end with a border that shows the outcome."""
    obs, _ = env.reset(seed=seed)
    queue: list[np.ndarray] = []
    done = success = False
    yield _picture(env)
    while not done:
        if not queue:
            shown = {k: v[None] for k, v in obs.items()} if isinstance(obs, dict) else obs[None]  # as by a vector
            queue = list(act(encode(shown))[0])
        obs, _, terminated, truncated, info = env.step(queue.pop(0))
        success |= bool(info["success"])
        done = terminated or truncated
        yield _picture(env)
    end = _picture(env).copy()
    edge = max(2, end.shape[0] // 40)
    for side in (end[:edge], end[-edge:], end[:, :edge], end[:, -edge:]):
        side[:] = (40, 170, 70) if success else (210, 50, 50)
    yield from [end] * hold


def _picture(env: gym.Env) -> np.ndarray:
    """One picture (H, W, 3) uint8; any failure of the OpenGL stack becomes a UserError."""
    try:
        picture = np.asarray(env.render())
        if picture.ndim != 3:
            raise ValueError("render() returned no image (H, W, 3)")
        return picture
    except Exception as error:
        raise UserError(
            f"no video: cannot render ({first_line(error)}); try MUJOCO_GL=egl (GPU) or MUJOCO_GL=osmesa"
        ) from error
