"""One training run: its folder, log, environments, replay buffer and counters, and how they are saved and resumed."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from common import checkpoint
from common.collect import Collector
from common.demos import Demos, get_demos
from common.envs import Pixels, make_env, make_vec_env, resolve
from common.errors import UserError
from common.evaluate import Encode, EvalResult, evaluate, plain, record_video
from common.replay import ReplayBuffer
from common.runlog import Averages, RunLog, plot_curves
from common.start import CHECKPOINT, pick_device
from common.stopwatch import Stopwatch

Policy = Callable[[np.ndarray, torch.Generator], np.ndarray]  # observations (n, O), noise source -> chunks (n, H, A)
EVAL_SEEDS = {"final": 0, "bc": 100_000, "interval": 200_000}  # the final episodes never decided anything


@dataclass
class RunArgs:
    """What to run, and where its files go."""

    env: str = "lift"  # a task of docs/tasks.md, or your own Gymnasium environment as package.module:EnvId
    preset: Literal["auto", "cpu", "paper"] = "auto"  # settings for two CPU cores or the released ones; auto: by GPU
    seed: int = 1  # seeds networks, noise, batches and environments
    eval: str = ""  # run folder to evaluate: no training; prints success over --eval-episodes of both policies
    resume: str = ""  # run folder to continue from its newest checkpoint, exactly as if it had not stopped
    run_name: str = ""  # name of the run folder; default: env, variant, seed and time
    run_dir: str = "runs"  # folder of all run folders
    device: str = "auto"  # torch device; auto: cuda if there is one, else cpu
    threads: int = 1  # torch threads on a CPU; networks this small run best with one
    compile: bool = False  # torch.compile losses and sampler (on a CPU it needs a C++ compiler)
    profile: bool = False  # print at every evaluation which share of time env, acting, chains, actor and critic took
    video: bool = True  # write before.mp4 and after.mp4 of the best-of-N policy where a renderer exists
    wandb_project: str = ""  # also log to this Weights & Biases project
    tensorboard: bool = False  # also log to TensorBoard files in the run folder
    log_every: int = 500  # environment steps between lines of metrics.jsonl
    checkpoint_every: int = 5_000  # environment steps between checkpoints; the last two are kept


@dataclass
class TaskArgs:
    """Environment, demonstrations and evaluation protocol."""

    horizon: int = 300  # episode cap in steps (a truncation: it bootstraps); default: the task's
    original_step: bool = False  # robosuite's own env.step instead of the fast path (equal trajectories, slower)
    collect_horizon: int = 0  # cap of training episodes: a shorter one wastes fewer steps on failures; 0: the same
    num_envs: int = 1  # environments collecting in parallel processes
    demos: str = "scripted"  # scripted, robomimic, minari (docs/tasks.md), POLICY.npz to roll out, or FILE.hdf5
    num_demos: int = 60  # number of demonstrations made by an expert
    demo_noise: float = 0.5  # noise of that expert's actions, in units of the action range
    filter_key: str = ""  # only the demonstrations under mask/<key> of the file
    data_dir: str = "data"  # where demonstrations are cached
    eval_every: int = 4_000  # environment steps between evaluations during training
    eval_interval_episodes: int = 20  # episodes of each evaluation during training
    eval_episodes: int = 100  # episodes of the first and last evaluation and of --eval
    eval_envs: int = 2  # evaluation processes
    eval_seed: int = 0  # first of the fixed seeds of the evaluation episodes


class Run:
    """Holds everything but the agent, which `attach` brings in.

    `args` are the flat arguments of the script ({name: value}); read here are: env, seed, device, threads, horizon,
    collect_horizon, original_step, num_envs, eval_envs, eval_seed, demos, num_demos, demo_noise, filter_key, data_dir,
    replay_size, total_steps, chunk, log_every, eval_every, checkpoint_every, profile, video, wandb_project and
    tensorboard; with pixels also keep_images.
    """

    def __init__(
        self,
        args: Mapping[str, Any],
        run_dir: Path,
        stop: checkpoint.StopSignal,
        saved: dict[str, Any] | None,
        reward: Callable[[float, bool], float],
        training: bool = True,
        pixels: Pixels | None = None,
        features: int = 0,
    ) -> None:
        """saved: the checkpoint to go on from; reward(raw, success) is what the buffer stores.

        With `pixels` the environments show images once a chunk, `encode` must make observations of them, with
        `features` numbers before those that the robot feels, and a row of the buffer is a chunk.
        """
        self.flat, self.dir, self.stop, self.saved = dict(args), run_dir, stop, saved
        a = self.a = SimpleNamespace(**args)
        self.started = time.perf_counter()
        self.device, self.task = pick_device(a.device), resolve(a.env)
        torch.set_num_threads(a.threads)
        self.state: dict[str, Any] = saved["state"] if saved else {"step": 0}
        if training:
            checkpoint.check_run_dir(run_dir, 2**20)
        self.pixels = pixels
        self.encode: Encode = plain
        fixed = dict(original_step=a.original_step, pixels=pixels)
        self.eval_envs = make_vec_env(a.env, a.eval_envs, horizon=a.horizon, chunk=a.chunk, **fixed)
        space = self.eval_envs.single_observation_space
        felt = (space["proprio"] if pixels else space).shape[0]
        self.obs_dim = features + felt
        self.act_dim = self.eval_envs.single_action_space.shape[-1]
        self.demos: Demos | None = None
        if not training:
            return
        rows = 2 * a.total_steps  # at most, an episode's final observation included
        if pixels:
            kept = (len(pixels.cameras), pixels.size, pixels.size, 3) if a.keep_images else ()
            capacity = min(a.replay_size, rows) if kept else a.replay_size
            self.buffer = ReplayBuffer(capacity, self.obs_dim, self.act_dim * a.chunk, 1, rewards=a.chunk, images=kept)
            rows //= a.chunk  # about: a success cuts its chunk short
        else:
            self.buffer = ReplayBuffer(a.replay_size, self.obs_dim, self.act_dim, a.chunk)
        checkpoint.check_run_dir(run_dir, 3 * (min(a.replay_size, rows) * self.buffer.row_bytes + 2**25))
        if not (saved and saved["agent"]["bc_done"]):
            self.demos = get_demos(
                a.env,
                a.demos,
                a.num_demos,
                a.demo_noise,
                Path(a.data_dir),
                filter_key=a.filter_key or None,
                pixels=pixels,
            )
            for what, have, want in (
                ("observations", self.demos.obs, felt),
                ("actions", self.demos.actions, self.act_dim),
            ):
                if have.shape[1] != want:
                    raise UserError(
                        f"--demos {self.demos.name}: its {what} have {have.shape[1]} numbers, {a.env} has {want}; give "
                        "demonstrations of this environment"
                    )
        cap, chunk = a.collect_horizon or a.horizon, a.chunk if pixels else 0
        envs = make_vec_env(a.env, a.num_envs, horizon=cap, chunk=chunk, **fixed)
        self.collector = Collector(envs, self.buffer, reward, a.seed, encode=lambda shown: self.encode(shown))
        self.rng = np.random.default_rng(a.seed)  # replay indices
        self.averages = Averages()  # metrics of the updates since the last log line
        self.watch = Stopwatch(a.profile)
        self.first: tuple[float, int] | None = None  # time and updates at the first tick, for the speed
        self.log = RunLog(
            run_dir,
            total_steps=a.total_steps,
            wandb_project=a.wandb_project,
            tensorboard=a.tensorboard,
            resume_bytes=saved["log"] if saved else None,
            args=self.flat,
        )

    def attach(self, agent: object) -> None:
        """The agent to save with this run; on a resume, everything is restored here."""
        self.agent = agent
        if not self.saved:
            return
        checkpoint.unpack(agent, self.saved["agent"])
        if hasattr(self, "collector"):
            self.rng.bit_generator.state = self.saved["rng"]
            self.averages.load_state_dict(self.saved["averages"], self.device)
            self.buffer.load_state_dict(self.saved["buffer"])
            if self.saved["collector"]["episodes"]:
                self.collector.load_state_dict(self.saved["collector"])
        self.saved = None

    def save(self, name: str = CHECKPOINT) -> None:
        checkpoint.save(
            self.dir / name,
            {
                "args": {k: list(v) if isinstance(v, tuple) else v for k, v in self.flat.items()},
                "agent": checkpoint.pack(self.agent),
                "state": self.state,
                "rng": self.rng.bit_generator.state,
                "averages": self.averages.state_dict(),
                "buffer": self.buffer.state_dict(),
                "collector": self.collector.state_dict(),
                "log": self.log.position(),
            },
        )

    def evaluate(
        self, policies: Mapping[str, Policy], use: str, episodes: int, log: str = "eval"
    ) -> dict[str, EvalResult]:
        """{name: result}, logged under the prefix `log` unless that is empty.

        Fixed episode seeds (`use`: a key of EVAL_SEEDS) and a noise source of its own: the same weights give the same
        numbers.
        """
        results = {}
        for name, policy in policies.items():
            rng = torch.Generator(self.device).manual_seed(self.a.eval_seed)
            first = self.a.eval_seed + EVAL_SEEDS[use]
            result = evaluate(self.eval_envs, lambda obs, p=policy, r=rng: p(obs, r), episodes, first, self.encode)
            names = self.task.tasks
            parts = tuple(names[(first + i) % len(names)] for i in range(episodes)) if names else ()
            results[name] = replace(result, parts=parts)
        if log:
            rates = {f"{log}/{k}_success": r.rate for k, r in results.items()}
            rates |= {f"{log}/{k}_length": r.mean_length for k, r in results.items()}
            rates |= {f"{log}/{k}_success/{part}": x for k, r in results.items() for part, x in r.by_part.items()}
            self.log.log(self.state["step"], rates)
        return results

    def tick(self, before: int, updates: int) -> set[str]:
        """After a step of the collector: the progress line, and which of log, eval and save are due since `before`.

        What is due comes with a line of metrics.jsonl: the averages of the updates and of the last 20 training
        episodes. updates: how many the agent has had.
        """
        step, recent = self.state["step"], self.collector.recent()
        intervals = {"log": self.a.log_every, "eval": self.a.eval_every, "save": self.a.checkpoint_every}
        due = {name for name, every in intervals.items() if before // every != step // every}
        if due:
            metrics = self.averages.take()
            self.check_finite(metrics)
            line = {f"ogpo/{k}": v for k, v in metrics.items()} | {f"train/{k}": v for k, v in recent.items()}
            line |= {"train/episodes": self.collector.finished, "time/wall": time.perf_counter() - self.started}
            self.log.log(step, line)
        if "eval" in due and self.a.profile and self.watch.seconds:
            self.log.say("time: " + ", ".join(f"{k} {v:.0%}" for k, v in self.watch.shares().items()))
        if self.first is None:
            self.first = (time.perf_counter(), updates)
        rate = (updates - self.first[1]) / max(time.perf_counter() - self.first[0], 1e-9)
        success = f"{recent['success']:.2f}" if recent else "-"
        self.log.progress(step, {"updates/s": f"{rate:.1f}", "success of the last 20 episodes": success})
        return due

    def check_finite(self, metrics: Mapping[str, float]) -> None:
        """Stop the process with exit code 1 and a dump beside the last good checkpoint if a value is not finite."""
        if bad := [k for k, v in metrics.items() if not np.isfinite(v)]:
            self.save("nonfinite.pt")
            sys.exit(
                f"stopped at step {self.state['step']}: {', '.join(bad)} not finite; state dumped to "
                f"{self.dir / 'nonfinite.pt'}, last good state in {CHECKPOINT}"
            )

    def video(self, policy: Policy, name: str) -> None:
        """Write three episodes as mp4, or a one-line note on why there is no video."""
        if not self.a.video:
            return
        rng = torch.Generator(self.device).manual_seed(self.a.eval_seed)
        try:
            env = make_env(self.a.env, horizon=self.a.horizon, render=True, pixels=self.pixels)
            record_video(env, lambda obs: policy(obs, rng), self.dir / name, self.a.eval_seed, encode=self.encode)
            env.close()
        except UserError as error:
            self.log.say(f"note: {error}")

    def close(self) -> None:
        """Draw the learning curve and end the worker processes."""
        self.eval_envs.close()
        if hasattr(self, "collector"):
            self.log.close()
            self.collector.envs.close()
            if self.state["step"]:
                print(f"learning curve: {plot_curves(self.dir)}")
