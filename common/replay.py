"""Replay buffer of whole episodes, sampled as action chunks, with success marks."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

Arrays = Sequence[np.ndarray]  # one for every step of an episode


@dataclass
class Batch:
    """n action chunks of H steps, each from inside one episode, with what T steps from its first one on gave."""

    obs: torch.Tensor  # (n, O) observation at the chunk's first step
    actions: torch.Tensor  # (n, H, A)
    rewards: torch.Tensor  # (n, T), 0 after the episode's end
    steps: torch.Tensor  # (n,) T, or as many as there are to the episode's end; of a row with several rewards, those
    next_obs: torch.Tensor  # (n, O) observation after them
    terminated: torch.Tensor  # (n,) 1.0 where the episode ended for good with the last of them
    rows: np.ndarray  # (n,) the buffer's row of the chunk's first step


class IndexQueue:
    """First-in first-out set of row numbers with O(1) uniform sampling."""

    def __init__(self, capacity: int) -> None:
        self.rows = np.zeros(capacity, np.int64)
        self.head = self.size = 0

    def push(self, rows: np.ndarray) -> None:
        self.rows[(self.head + self.size + np.arange(len(rows))) % len(self.rows)] = rows
        self.size += len(rows)

    def drop(self, n: int) -> None:
        self.head = (self.head + n) % len(self.rows)
        self.size -= n

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return self.rows[(self.head + rng.integers(self.size, size=n)) % len(self.rows)]


class ReplayBuffer:
    """Keeps the newest episodes that fit into `capacity` rows; the oldest episodes leave whole.

    An episode of T steps takes T+1 rows (the last one holds only the final observation). Every step from which H
    steps remain inside the episode is a chunk start, not only the steps at which the policy decided; a chunk never
    crosses an episode's end. An episode that ends for good in fewer than H steps is one chunk: after the end its last
    action and final observation are repeated, with rewards of 0, which leaves its return as it is.
    """

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, horizon: int, rewards: int = 1) -> None:
        """rewards: numbers per row; several if a row is a whole chunk, with horizon 1."""
        self.capacity, self.horizon = capacity, horizon
        self.obs = np.zeros((capacity, obs_dim), np.float32)
        self.actions = np.zeros((capacity, act_dim), np.float32)
        self.rewards = np.zeros((capacity, rewards) if rewards > 1 else capacity, np.float32)
        self.terminated = np.zeros(capacity, np.float32)
        self.ends = np.zeros(capacity, np.int64)  # row of the episode's final observation
        self.episodes: deque[tuple[int, int, bool]] = deque()  # first row, one past the last row, success
        self.row = 0  # next row to write
        self.starts, self.success_starts = IndexQueue(capacity), IndexQueue(capacity)
        self.staying, self.ending = -np.inf, np.inf  # largest reward of other steps, latest of a success that ended all

    def add_episode(self, obs: Arrays, actions: Arrays, rewards: Arrays, terminated: bool, success: bool) -> None:
        """obs (T+1, O), actions (T, A), rewards (T,) or (T, rewards); terminated: the last step ended it for good."""
        if terminated and (missing := self.horizon - len(actions)) > 0:
            obs, actions = [*obs, *[obs[-1]] * missing], [*actions, *[actions[-1]] * missing]
            rewards = [*rewards, *[np.zeros_like(rewards[-1])] * missing]
        n = len(obs)
        if n > self.capacity:
            raise ValueError(f"an episode of {n - 1} steps does not fit into {self.capacity} rows")
        if self.row + n > self.capacity:
            self._evict(self.row, self.capacity)
            self.row = 0
        lo, hi = self.row, self.row + n
        self._evict(lo, hi)
        self.obs[lo:hi] = np.stack(obs)
        self.actions[lo : hi - 1] = np.stack(actions).reshape(n - 1, -1)
        self.rewards[lo : hi - 1] = np.stack(rewards)
        self.terminated[lo:hi] = 0.0
        self.terminated[hi - 2] = float(terminated)
        others = self.rewards[lo : hi - 1]
        if terminated and success:
            self.ending, others = float(np.sum(others[-1])), others[:-1]
        self.staying = max(self.staying, float(others.max(initial=-np.inf)))
        self.row = hi
        self._append(lo, hi, success)

    @property
    def successes(self) -> int:
        """Successful episodes in the buffer."""
        return sum(success for _, _, success in self.episodes)

    def _append(self, lo: int, hi: int, success: bool) -> None:
        self.episodes.append((lo, hi, success))
        self.ends[lo:hi] = hi - 1
        starts = np.arange(lo, max(lo, hi - self.horizon))
        self.starts.push(starts)
        if success:
            self.success_starts.push(starts)

    def _evict(self, lo: int, hi: int) -> None:
        while self.episodes and self.episodes[0][0] < hi and self.episodes[0][1] > lo:
            first, end, success = self.episodes.popleft()
            n = max(0, end - first - self.horizon)
            self.starts.drop(n)
            if success:
                self.success_starts.drop(n)

    def sample(
        self, n: int, rng: np.random.Generator, device: torch.device, success: bool = False, chunks: int = 1
    ) -> Batch:
        """n chunk starts, uniform with replacement, over all episodes or over the successful ones.

        chunks: the rewards of so many, as far as the episode has them, and what comes after those.
        """
        start = (self.success_starts if success else self.starts).sample(n, rng)  # (n,)
        ahead = start[:, None] + np.arange(chunks * self.horizon)  # (n, T)
        last = np.minimum(ahead[:, -1] + 1, self.ends[start])  # (n,)
        inside = (ahead < last[:, None]).reshape(*ahead.shape, *[1] * (self.rewards.ndim - 1))

        def tensor(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(x).to(device)

        return Batch(
            obs=tensor(self.obs[start]),
            actions=tensor(self.actions[ahead[:, : self.horizon]]),
            rewards=tensor(self.rewards[np.minimum(ahead, last[:, None])] * inside).flatten(1),
            steps=tensor(((last - start) * self.rewards[0].size).astype(np.float32)),
            next_obs=tensor(self.obs[last]),
            terminated=tensor(self.terminated[last - 1]),
            rows=start,
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        return dict(obs=self.obs, actions=self.actions, rewards=self.rewards, terminated=self.terminated)

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes in a checkpoint."""
        return sum(array[:1].nbytes for array in self._arrays().values())

    def state_dict(self) -> dict:
        used = max((hi for _, hi, _ in self.episodes), default=0)
        state = {k: torch.from_numpy(v[:used].copy()) for k, v in self._arrays().items()}
        return state | {"row": self.row, "episodes": [list(e) for e in self.episodes]}

    def load_state_dict(self, state: dict) -> None:
        used = len(state["obs"])
        if used > self.capacity:
            raise ValueError(f"the saved buffer has {used} rows, this one only {self.capacity}")
        for name, array in self._arrays().items():
            array[:used] = state[name].numpy()
        self.row = state["row"]
        for lo, hi, success in state["episodes"]:
            self._append(lo, hi, success)
