"""One training run of a robot script: its folder, log, evaluations and checkpoints."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from common import checkpoint
from common.envs import Pixels, make_env, make_vec_env, resolve
from common.episodes import Episodes
from common.errors import UserError
from common.evaluate import Encode, EvalResult, Policy, act_on_arrays, evaluate, record_video
from common.rng import Rng
from common.runlog import plot_curves
from common.seeds import eval_seeds
from common.tracked_run import TrackedRun

POLICY_NAMES = {"ode": "ODE policy", "bon": "best-of-N policy"}


def due(before: int, after: int, every: int) -> int:
    """How many multiples of `every` lie in (before, after]."""
    return after // every - before // every


class Run(TrackedRun):
    """Where results go. It evaluates `policies` with noise of its own.

    Attributes set by a script: policies {name: policy}; with pixels also encode, which maps what the environments show
    to observations (n, O).
    """

    def __init__(
        self, folder: Path, saved: dict[str, Any] | None, stop: checkpoint.StopSignal, args: Mapping[str, Any],
        env: str, horizon: int, device: torch.device, pixels: Pixels | None = None,
    ) -> None:  # fmt: skip
        """horizon: cap of an episode; the others are those of `TrackedRun`."""
        super().__init__(folder, saved, stop, args)
        self.task, self.horizon, self.device, self.pixels = resolve(env), horizon, device, pixels
        self.started = time.perf_counter()
        self.policies: dict[str, Policy] = {}
        self.encode: Encode = np.asarray

    def closing(self, envs: gym.vector.VectorEnv) -> gym.vector.VectorEnv:
        """`envs`, to be closed with the run."""
        self.callback(envs.close)
        return envs

    def open_evaluation(self, num_envs: int, chunk: int, seed: int) -> None:
        """Environments of the evaluations; what they show and take gives obs_dim and act_dim.

        seed: of the first episode and of the noise. With pixels obs_dim is what the robot feels, without features.
        """
        envs = make_vec_env(self.task.name, num_envs, horizon=self.horizon, chunk=chunk, pixels=self.pixels)
        self.eval_envs, self.eval_seed = self.closing(envs), seed
        space = envs.single_observation_space
        self.obs_dim = (space["proprio"] if self.pixels else space).shape[0]
        self.act_dim = envs.single_action_space.shape[-1]

    def check_disk(self, buffer_bytes: int) -> None:
        """Raises UserError if the run folder cannot be written or has no room for checkpoints with such a buffer."""
        checkpoint.check_run_dir(self.folder, 3 * (buffer_bytes + 2**25))

    def evaluate(self, use: str, episodes: int, label: str, only: str = "", log: str = "") -> dict[str, EvalResult]:
        """{name: result} of all policies, or of one; printed after `label`, and logged under the prefix `log` if given.

        Fixed episode seeds (`use`: one of `common.seeds.USES`) and a noise source of its own: the same weights give the
        same numbers in as many environments. In others the episodes have other noise.
        """
        results, names = {}, self.task.tasks
        seeds = eval_seeds(use, self.eval_seed, episodes)
        for name in [only] if only else self.policies:
            act = self._acting(name)
            result = evaluate(self.eval_envs, act, seeds, self.encode)
            parts = tuple(names[seed % len(names)] for seed in seeds) if names else ()
            results[name] = replace(result, parts=parts)
        if log:
            rates = {f"{log}/{k}_success": r.rate for k, r in results.items()}
            rates |= {f"{log}/{k}_length": r.mean_length for k, r in results.items()}
            rates |= {f"{log}/{k}_success/{part}": x for k, r in results.items() for part, x in r.by_part.items()}
            self.log.log(self.step, rates)
        say = self.log.say if self.log else print
        for name, result in results.items():
            say(f"{label}, {POLICY_NAMES.get(name, name)}: {result}")
        return results

    def _acting(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        policy, rng = self.policies[name], Rng(self.eval_seed, self.device)
        return lambda obs: act_on_arrays(policy, obs, rng)

    def show_progress(self, episodes: Episodes) -> None:
        """Refresh the progress line."""
        recent = episodes.recent()
        self.log.progress(self.step, {"success": f"{recent['success']:.2f}" if recent else "-"})

    def log_training(self, updates: Mapping[str, float], episodes: Episodes) -> None:
        """A line of metrics.jsonl: means over the updates and over the last episodes, number of finished episodes."""
        line = {f"ogpo/{k}": v for k, v in updates.items()} | {f"train/{k}": v for k, v in episodes.recent().items()}
        line |= {"train/episodes": episodes.finished, "time/wall": time.perf_counter() - self.started}
        self.log.log(self.step, line)

    def record_video(self, policy: str, name: str, wanted: bool) -> None:
        """If wanted, write three episodes of a policy as mp4, or a one-line note on why there is no video."""
        if not wanted:
            return
        try:
            env = make_env(self.task.name, horizon=self.horizon, render=True, pixels=self.pixels)
            seeds = eval_seeds("final", self.eval_seed, 3)
            record_video(env, self._acting(policy), self.folder / name, seeds, encode=self.encode)
            env.close()
        except UserError as error:
            self.log.say(f"note: {error}")

    def __exit__(self, *error: object) -> None:
        """End the worker processes and draw the learning curve."""
        super().__exit__(*error)
        if self.log and self.step:
            print(f"learning curve: {plot_curves(self.folder)}")
