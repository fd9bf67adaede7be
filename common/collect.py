"""Steps vectorised environments by open-loop action chunks and hands whole episodes to a replay buffer."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from common.errors import UserError
from common.evaluate import Encode, plain
from common.replay import ReplayBuffer

ENV_SEED_STRIDE = 1_000_000  # seeds of one environment's episodes do not meet another's


@dataclass
class Episode:
    """What one environment has done since its last reset."""

    seed: int
    obs: list[np.ndarray] = field(default_factory=list)  # T+1 of (O,)
    actions: list[np.ndarray] = field(default_factory=list)  # T of (A,), or of whole chunks (H, A)
    rewards: list[Any] = field(default_factory=list)  # T numbers, or (H,) arrays
    queue: list[np.ndarray] = field(default_factory=list)  # what is still to execute
    images: list[np.ndarray] = field(default_factory=list)  # T+1, if the buffer keeps them
    steps: int = 0  # made so far
    success: bool = False  # at any of them


class Collector:
    """Every episode starts from a seed of its own, so it is a function of that seed and its actions.

    That is what makes an exact resume possible in the middle of an episode with any deterministic environment:
    the saved actions are replayed from the saved seed.

    Environments that take whole chunks (`ChunkStep`) show only what follows a chunk: an episode's rows are then its
    chunks (H * A,), each with the H rewards of its steps, 0 after a success. A chunk that the time limit cuts short is
    left out.
    """

    def __init__(
        self,
        envs: gym.vector.VectorEnv,
        buffer: ReplayBuffer,
        reward: Callable[[float, bool], float],
        seed: int,
        window: int = 20,
        encode: Encode = plain,
    ) -> None:
        """reward(raw, success) is stored in place of the raw reward; window: episodes in the running success.

        encode maps what the environments show to observations (n, O).
        """
        self.envs, self.buffer, self.reward, self.encode = envs, buffer, reward, encode
        self.chunks = len(envs.single_action_space.shape) == 2
        self.count = [0] * envs.num_envs  # episodes begun, by environment
        self.base = [(seed * 1_000 + i) * ENV_SEED_STRIDE % 2**31 for i in range(envs.num_envs)]
        self.current: list[Episode] = []
        self.successes: deque[bool] = deque(maxlen=window)
        self.lengths: deque[int] = deque(maxlen=window)
        self.finished = 0

    def _begin(self, i: int) -> Episode:
        self.count[i] += 1
        return Episode(seed=self.base[i] + self.count[i] - 1)

    def _reset(self, mask: np.ndarray) -> None:
        shown, _ = self.envs.reset(seed=[e.seed for e in self.current], options={"reset_mask": mask})
        obs = self.encode(shown)
        for i in np.flatnonzero(mask):
            self.current[i].obs = [obs[i].copy()]
            self._keep_image(self.current[i], shown, i)

    def _keep_image(self, episode: Episode, shown: Any, i: int) -> None:
        if self.buffer.images is not None:
            episode.images.append(shown["images"][i].copy())

    def start(self) -> None:
        """Reset all environments for the first time."""
        self.current = [self._begin(i) for i in range(self.envs.num_envs)]
        self._reset(np.ones(self.envs.num_envs, bool))

    def step(self, act: Callable[[np.ndarray], np.ndarray]) -> int:
        """One step, or chunk, of every environment; act: (n, O) -> (n, H, A) for those that need a chunk.

        Returns the number of steps made.
        """
        empty = [e for e in self.current if not e.queue]
        if empty:
            chunks = act(np.stack([e.obs[-1] for e in empty]))
            for e, chunk in zip(empty, chunks, strict=True):
                e.queue = [chunk] if self.chunks else list(chunk)
        actions = np.stack([e.queue.pop(0) for e in self.current])
        shown, raw, terminated, truncated, info = self.envs.step(actions)
        obs = self.encode(shown)
        steps = info["steps"] if self.chunks else np.ones(len(actions), np.int64)
        for i, e in enumerate(self.current):
            e.actions.append(actions[i])
            if self.chunks:
                pairs = zip(info["rewards"][i], info["successes"][i], strict=True)
                e.rewards.append(np.array([self.reward(float(r), bool(s)) for r, s in pairs]) * info["made"][i])
            else:
                e.rewards.append(self.reward(float(raw[i]), bool(info["success"][i])))
            e.obs.append(obs[i].copy())
            self._keep_image(e, shown, i)
            e.success |= bool(info["success"][i])
            e.steps += int(steps[i])
        done = terminated | truncated
        for i in np.flatnonzero(done):
            e = self.current[i]
            whole = len(e.actions) - (self.chunks and truncated[i] and not info["made"][i].all())
            if whole:
                self.buffer.add_episode(
                    np.stack(e.obs[: whole + 1]),
                    np.stack(e.actions[:whole]).reshape(whole, -1),
                    np.stack(e.rewards[:whole]),
                    bool(terminated[i]),
                    e.success,
                    np.stack(e.images[: whole + 1]) if e.images else None,
                )
            self.successes.append(e.success)
            self.lengths.append(e.steps)
            self.finished += 1
            self.current[i] = self._begin(i)
        if done.any():
            self._reset(done)
        return int(steps.sum())

    def recent(self) -> dict[str, float]:
        """Success and length of the last episodes, empty before the first has ended."""
        if not self.successes:
            return {}
        return {"success": float(np.mean(self.successes)), "length": float(np.mean(self.lengths))}

    def state_dict(self) -> dict:
        episodes = [
            {
                "seed": e.seed,
                "actions": torch.tensor(np.array(e.actions)),
                "queue": torch.tensor(np.array(e.queue)),
                "rewards": torch.tensor(np.array(e.rewards)),
                "images": torch.tensor(np.array(e.images, np.uint8)),
                "steps": e.steps,
                "obs": torch.tensor(np.array(e.obs)),
                "success": e.success,
            }
            for e in self.current
        ]
        return {
            "count": list(self.count),
            "successes": list(self.successes),
            "lengths": list(self.lengths),
            "finished": self.finished,
            "episodes": episodes,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the counters and bring every environment to where it was by replaying its episode.

        Raises UserError if an environment does not reproduce the saved observation (not deterministic, or changed).
        """
        self.count, self.finished = list(state["count"]), state["finished"]
        self.successes.extend(state["successes"])
        self.lengths.extend(state["lengths"])
        self.current = [
            Episode(
                s["seed"],
                list(s["obs"].numpy()),
                list(s["actions"].numpy()),
                list(s["rewards"].numpy()),
                list(s["queue"].numpy()),
                list(s["images"].numpy()),
                s["steps"],
                s["success"],
            )
            for s in state["episodes"]
        ]
        steps = [len(e.actions) for e in self.current]
        longest = max(steps)
        shown, _ = self.envs.reset(seed=[e.seed for e in self.current])
        for k in range(longest):  # shorter episodes start later, so that all arrive together
            begin = np.array([longest - n == k and k > 0 for n in steps])
            if begin.any():
                self.envs.reset(seed=[e.seed for e in self.current], options={"reset_mask": begin})
            late = [longest - n for n in steps]
            actions = [
                e.actions[k - d] if k >= d else np.zeros_like(self.envs.single_action_space.low)
                for e, d in zip(self.current, late, strict=True)
            ]
            shown = self.envs.step(np.stack(actions))[0]
        begin = np.array([n == 0 and longest > 0 for n in steps])
        if begin.any():
            shown, _ = self.envs.reset(seed=[e.seed for e in self.current], options={"reset_mask": begin})
        obs = self.encode(shown)
        if not all(np.array_equal(e.obs[-1], o) for e, o in zip(self.current, obs, strict=True)):
            raise UserError(
                "cannot resume exactly: replaying the current episode gave other observations than saved; the "
                "environment or its version changed, or it is not deterministic given its seed"
            )
