"""The episodes in progress, one in every environment, and how they are brought back exactly."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from common.errors import UserError
from common.evaluate import Encode, Policy, act_on_arrays
from common.rng import Rng
from common.seeds import train_seed


@dataclass
class Episode:
    """What one environment has done since its last reset."""

    seed: int
    obs: list[np.ndarray] = field(default_factory=list)  # T+1 of (O,)
    actions: list[np.ndarray] = field(default_factory=list)  # T of (A,), or of whole chunks (H, A)
    rewards: list[Any] = field(default_factory=list)  # T numbers, or (H,) arrays
    queue: list[np.ndarray] = field(default_factory=list)  # actions of its chunk that are still to execute
    steps: int = 0  # made so far
    success: bool = False  # at any of them


class Episodes:
    """Records what every environment of a vector does, and brings it back after a stop.

    Every episode starts from a seed of its own, so it is a function of that seed and its actions. That is what makes
    an exact resume possible in the middle of an episode with any deterministic environment: the saved actions are
    replayed from the saved seed.
    """

    def __init__(self, envs: gym.vector.VectorEnv, seed: int, encode: Encode = np.asarray, window: int = 20) -> None:
        """encode maps what the environments show to observations (E, O); window: finished episodes in `recent`."""
        self.envs, self.encode = envs, encode
        self.begun = [0] * envs.num_envs  # episodes, by environment
        self.seed = seed
        self.current: list[Episode | None] = [None] * envs.num_envs  # None: over, or never begun
        self.successes: deque[bool] = deque(maxlen=window)
        self.lengths: deque[int] = deque(maxlen=window)
        self.finished = 0

    def over(self) -> np.ndarray:
        """(E,) which environments have no episode in progress and must be reset."""
        return np.array([e is None for e in self.current])

    def begin(self, which: np.ndarray) -> list[int]:
        """New episodes for the environments `which` (E,); seeds of all, for the reset of these."""
        for i in np.flatnonzero(which).tolist():
            self.current[i] = Episode(train_seed(self.seed, i, self.begun[i]))
            self.begun[i] += 1
        return [e.seed for e in self.current]

    def see(self, obs: np.ndarray, which: np.ndarray) -> None:
        """First observations: obs (E, O), of the environments `which` (E,) that were reset."""
        for i in np.flatnonzero(which):
            self.current[i].obs = [obs[i].copy()]

    def obs(self) -> np.ndarray:
        """(E, O) newest observation of every environment."""
        return np.stack([e.obs[-1] for e in self.current])

    def next_actions(self, policy: Policy, rng: Rng) -> np.ndarray:
        """(E, A): the next of each environment's chunk; those at its end get a new one from the policy."""
        empty = [e for e in self.current if not e.queue]
        if empty:
            chunks = act_on_arrays(policy, np.stack([e.obs[-1] for e in empty]), rng)
            for e, chunk in zip(empty, chunks, strict=True):
                e.queue = list(chunk)
        return np.stack([e.queue[0] for e in self.current])

    def append(
        self, actions: np.ndarray, rewards: np.ndarray, obs: np.ndarray, success: np.ndarray,
        steps: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """What every environment did: actions (E, ...), rewards (E,) or (E, H), obs (E, O) after them, success (E,).

        steps (E,): environment steps in it, if not one each.
        """
        for i, e in enumerate(self.current):
            e.actions.append(actions[i])
            del e.queue[:1]
            e.rewards.append(rewards[i])
            e.obs.append(obs[i].copy())
            e.success |= bool(success[i])
            e.steps += 1 if steps is None else int(steps[i])

    def finish(self, i: int) -> Episode:
        """The episode of environment i, which is over."""
        episode, self.current[i] = self.current[i], None
        self.successes.append(episode.success)
        self.lengths.append(episode.steps)
        self.finished += 1
        return episode

    def give_up(self, i: int) -> None:
        """Forget the episode of environment i, which failed: its next one begins from another seed."""
        self.current[i] = None

    def recent(self) -> dict[str, float]:
        """Success and length of the last episodes, empty before the first has ended."""
        if not self.successes:
            return {}
        return {"success": float(np.mean(self.successes)), "length": float(np.mean(self.lengths))}

    def state_dict(self) -> dict[str, Any]:
        """A finished episode is None, and so is one that was never seen: it begins again."""
        current = [e if e and e.obs else None for e in self.current]
        unseen = [bool(e and not e.obs) for e in self.current]
        return {
            "begun": [n - again for n, again in zip(self.begun, unseen, strict=True)],
            "successes": list(self.successes),
            "lengths": list(self.lengths),
            "finished": self.finished,
            "episodes": [
                e and {k: torch.tensor(np.array(v)) if isinstance(v, list) else v for k, v in vars(e).items()}
                for e in current
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters and bring every environment to where it was by replaying its episode.

        Raises UserError if an environment does not reproduce the saved observation (not deterministic, or changed).
        """
        self.begun, self.finished = list(state["begun"]), state["finished"]
        self.successes.extend(state["successes"])
        self.lengths.extend(state["lengths"])
        self.current = [
            e and Episode(**{k: list(v.numpy()) if isinstance(v, torch.Tensor) else v for k, v in e.items()})
            for e in state["episodes"]
        ]
        if not any(self.current):
            return
        # Shorter episodes begin later, so that all arrive together; until then, and where there is none, an environment
        # does what the longest does, which it is known to survive.
        longest = max(filter(None, self.current), key=lambda e: len(e.actions))
        n = len(longest.actions)
        late = np.array([n - len(e.actions) if e else n + 1 for e in self.current])  # (E,)
        seeds = [e.seed if e else longest.seed for e in self.current]
        shown, _ = self.envs.reset(seed=[s if d == 0 else longest.seed for s, d in zip(seeds, late, strict=True)])
        for k in range(n + 1):
            begin = (late == k) & (k > 0)
            if begin.any():
                shown, _ = self.envs.reset(seed=seeds, options={"reset_mask": begin})
            if k < n:
                played = [
                    e.actions[k - d] if d <= k else longest.actions[k] for e, d in zip(self.current, late, strict=True)
                ]
                shown = self.envs.step(np.stack(played))[0]
        obs = self.encode(shown)
        if not all(np.array_equal(e.obs[-1], o) for e, o in zip(self.current, obs, strict=True) if e):
            raise UserError(
                "cannot resume exactly: replaying the current episode gave other observations than saved; the "
                "environment or its version changed, or it is not deterministic given its seed"
            )
