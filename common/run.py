"""One training run of a robot script: its folder, log, evaluations and checkpoints."""

import copy
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoint
from common.demos import Demos, get_demos
from common.envs import Pixels, make_env, make_vec_env, resolve
from common.episodes import Episodes
from common.errors import EnvError, UserError, blame, first_line, reading
from common.evaluate import Encode, EvalResult, Policy, record_video
from common.evaluator import Evaluator, Work, acting, evaluate_all
from common.record import RECORD
from common.replay import ReplayBuffer
from common.runlog import counted, plot_curves, read_metrics, write_json
from common.seeds import eval_seeds
from common.tracked_run import TrackedRun

POLICY_NAMES = {"ode": "ODE policy", "bon": "best-of-N policy", "act": "acting policy"}
ACTING = ("bon", "act")  # the policy that collects, in OGPO and in a baseline


def due(before: int, after: int, every: int) -> int:
    """How many multiples of `every` lie in (before, after]."""
    return after // every - before // every


def clone_file(folder: Path) -> Path:
    """The cloned policy of the run in `folder`. Raises UserError if it has none."""
    path = folder / "cloned.pt"
    if not path.exists():
        raise UserError(f"--cloned {folder}: it has no {path.name}; give the folder of a run")
    return path


def load_clone(folder: Path, net: nn.Module, args: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights for `net`, of the policy that the run in `folder` has cloned. args: all arguments of this run.

    Raises UserError if they are of another task or other cameras (where the folder has its args.json), or of other
    shapes.
    """
    path, recorded = clone_file(folder), folder / RECORD
    if recorded.exists():
        with reading(recorded, "without that file the policy is taken whatever its task"):
            there = json.loads(recorded.read_text())["args"]
            for name in {"env", "cameras", "image_size"} & args.keys():
                one, other = (str(list(x) if isinstance(x, tuple) else x) for x in (there[name], args[name]))
                if one.removesuffix("-dense") != other.removesuffix("-dense"):
                    raise UserError(
                        f"--cloned {folder}: its {name} is {one}, here {other}; give a run of the same task"
                    )
    state, want = checkpoint.load(path), net.state_dict()
    with reading(path, "give --cloned the folder of a run"):
        wrong = sorted(want.keys() ^ state.keys()) or [k for k in want if want[k].shape != state[k].shape]
        if wrong:
            here, there = (tuple(part[wrong[0]].shape) if wrong[0] in part else "none" for part in (want, state))
            raise UserError(
                f"--cloned: {path} does not fit: {wrong[0]} is {there}, here {here}; give a run of the same script "
                "with the same --chunk and --actor-hidden"
            )
    return state


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
        self.said: set[str] = set()  # notes
        self.demos = ""  # what they are
        self.policies: dict[str, Policy] = {}
        self.encode: Encode = np.asarray
        self.evaluation: dict[str, Any] | None = None  # arguments of the one that the run waits for
        self.beside: dict[str, Any] | None = None  # the one that goes on beside the training, and what it evaluates
        self.evaluator: Evaluator | None = None
        self.rates: list[tuple[int, float]] = []  # step and success of the acting policy's evaluations in training

    def closing(self, envs: gym.vector.VectorEnv) -> gym.vector.VectorEnv:
        """`envs`, to be closed with the run, by force if it ends before its time."""
        envs.hurry = lambda: self.stop.requested
        self.push(lambda kind, *_: envs.close(terminate=kind is not None))
        return envs

    def open_log(self, total_steps: int, wandb_project: str, tensorboard: bool) -> None:
        """As `TrackedRun.open_log`; an evaluation that a stop cut short is made now, one that went on begins again."""
        super().open_log(total_steps, wandb_project, tensorboard)
        self._introduce(total_steps)
        self.push(self._draw)
        keys = [f"eval/{name}_success" for name in ACTING]
        self.rates = [(row["step"], row[k]) for row in read_metrics(self.folder) for k in keys if k in row]
        saved = self.saved or {}
        if evaluation := saved.get("evaluation"):
            self.evaluate(**evaluation)
            del saved["evaluation"]
        if beside := saved.pop("beside", None):
            self._begin_again(beside)

    def _introduce(self, total_steps: int) -> None:
        a, nets = self.args, {}
        for name, net in vars(self.parts["agent"]).items():
            if isinstance(net, nn.Module):
                nets[name] = sum(p.numel() for p in net.parameters() if p.requires_grad)  # of an average: 0
        about = {
            "task": ", ".join([a["env"], *(f"{k} {a[k]}" for k in ("preset", "variant", "method", "seed") if k in a)]),
            "demonstrations": self.demos,
            "networks": f"{', '.join(f'{k} {n:,}' for k, n in nets.items() if n)} parameters",
        }
        rest = f"an evaluation of {counted(a['eval_episodes'], 'episode')} at the end"
        if during := total_steps // a["eval_every"]:
            rest = f"{counted(during, 'evaluation')} of {a['eval_interval_episodes']:,}, {rest}"
        self.introduce(self.device, about, total_steps, rest)

    def open_evaluation(self, processes: int, chunk: int) -> None:
        """Environments of the evaluations; what they show and take gives obs_dim and act_dim.

        processes: with an environment each, driven by another one, for which training need not wait; 0: one environment
        here. With pixels obs_dim is what the robot feels, without features.
        """
        number = max(processes, 1)
        make = partial(make_vec_env, self.task.name, number, horizon=self.horizon, chunk=chunk, pixels=self.pixels)
        if processes and not self.args["eval"]:
            envs = self.evaluator = Evaluator(make)
            self.callback(envs.close)
        else:
            envs = self.eval_envs = self.closing(make())
        space = envs.single_observation_space
        self.obs_dim = (space["proprio"] if self.pixels else space).shape[0]
        self.act_dim = envs.single_action_space.shape[-1]

    def get_demos(self, source: str, num: int, noise: float, cache: Path, filter_key: str) -> Demos:
        """Demonstrations for the evaluation's environment; arguments and errors are those of `common.demos.get_demos`.

        A stop signal raises Stopped.
        """
        with self.stop.at_once():
            demos = get_demos(self.task.name, source, num, noise, cache, filter_key=filter_key, pixels=self.pixels)
        demos.check_fit(self.task.name, self.obs_dim, self.act_dim, self.horizon)
        self.demos = f"{counted(len(demos.ends), 'episode')}, {counted(len(demos.obs), 'step')}, {source}"
        return demos

    def check_disk(self, buffer_bytes: int) -> None:
        """Raises UserError if the run folder cannot be written or has no room for checkpoints with such a buffer."""
        checkpoint.check_run_dir(self.folder, 3 * (buffer_bytes + 2**25))

    def evaluate(self, use: str, episodes: int, label: str, only: str = "", log: str = "") -> dict[str, EvalResult]:
        """{name: result} of all policies, or of one; printed after `label`, and logged under the prefix `log` if given.

        Fixed episode seeds (`use`: one of `common.seeds.USES`) and a noise source of its own: the same weights give the
        same numbers in as many environments. In others the episodes have other noise. A stop signal raises Stopped.
        """
        self._end_evaluation()
        self.evaluation = dict(use=use, episodes=episodes, label=label, only=only, log=log)
        work = self._work(self.policies, self.encode, use, episodes, only)
        with self.stop.at_once():
            if self.evaluator:
                self.evaluator.ask(work)
            results = self.evaluator.answer() if self.evaluator else work(self.eval_envs)
        self.evaluation = None
        self._report(self.step, label, log, results)
        if use == "final" and not only:
            self._keep_evaluation(use, results)
        return results

    def _keep_evaluation(self, use: str, results: Mapping[str, EvalResult]) -> None:
        """Write evaluation.json and, by --eval, the video that is not there yet."""
        kept = {"step": self.step, "seeds": use, "horizon": self.horizon, "eval_envs": self.args["eval_envs"]}
        kept["policies"] = {name: result.summary() for name, result in results.items()}
        try:
            write_json(self.folder / "evaluation.json", kept)
        except OSError as error:
            self._note_once("evaluation", f"evaluation.json is not written ({first_line(error)})")
            return
        if self.args["eval"] and not (self.folder / "after.mp4").exists():
            acts = next(name for name in ACTING if name in results)
            self.record_video(acts, "after.mp4", self.args["video"])

    def begin_evaluation(self, use: str, episodes: int, label: str, log: str, only: str = "") -> None:
        """Like `evaluate`, of the policies as they are now, but training goes on while it lasts (`good_enough`)."""
        if not self.evaluator:
            self.evaluate(use, episodes, label, only, log)
            return
        agent = copy.deepcopy(checkpoint.pack(self.parts["agent"]))
        beside = dict(use=use, episodes=episodes, label=label, log=log, only=only, step=self.step, agent=agent)
        self._begin(beside, self.policies, self.encode)

    def _begin_again(self, beside: dict[str, Any]) -> None:
        """Evaluate the agent as it was, by the record of an evaluation that checkpoints hold until it has ended."""
        agent, policies, encode = copy.deepcopy((self.parts["agent"], self.policies, self.encode))
        checkpoint.unpack(agent, beside["agent"])
        self._begin(beside, policies, encode)

    def _begin(self, beside: dict[str, Any], policies: Mapping[str, Policy], encode: Encode) -> None:
        self.evaluator.ask(self._work(policies, encode, beside["use"], beside["episodes"], beside["only"]))
        self.beside = self.parts["beside"] = beside

    def good_enough(self, rate: float) -> bool:
        """Whether the acting policy reached this rate in its last two evaluations; 0: never.

        The newest counts just before the next training step that would log or evaluate: there a run waits for the one
        that goes on beside it, so that logs have the same lines in the same order. A stop signal raises Stopped.
        """
        newest = self.beside["step"] if self.beside else self.rates[-1][0] if self.rates else -1
        line = min((newest // every + 1) * every for every in (self.args["log_every"], self.args["eval_every"]))
        if newest < 0 or self.step + self.args["num_envs"] * (self.args["chunk"] if self.pixels else 1) < line:
            return False
        self._end_evaluation()
        return rate > 0 and len(self.rates) > 1 and min(success for _, success in self.rates[-2:]) >= rate

    def _end_evaluation(self) -> None:
        """Wait for the evaluation that goes on, if there is one, and log it with the step at which it began."""
        if self.beside:
            with self.stop.at_once():
                results = self.evaluator.answer()
            self._report(self.beside["step"], self.beside["label"], self.beside["log"], results)
            self.beside = None
            del self.parts["beside"]

    def _work(self, policies: Mapping[str, Policy], encode: Encode, use: str, episodes: int, only: str) -> Work:
        chosen = {only: policies[only]} if only else dict(policies)
        seeds = eval_seeds(use, episodes)
        return partial(evaluate_all, chosen, encode, seeds, self.task.tasks, self.device)

    def _report(self, step: int, label: str, log: str, results: dict[str, EvalResult]) -> None:
        if log:
            rates = {f"{log}/{k}_success": r.rate for k, r in results.items()}
            rates |= {f"{log}/{k}_length": r.mean_length for k, r in results.items()}
            rates |= {f"{log}/{k}_success/{part}": x for k, r in results.items() for part, x in r.by_part.items()}
            rates["time/wall"] = time.perf_counter() - self.started
            self.log.log(step, rates)
        if log == "eval":
            self.rates += [(step, results[name].rate) for name in ACTING if name in results]
        for name, result in results.items():
            self._say(f"{label}, {POLICY_NAMES.get(name, name)}: {result}")

    def show_progress(self, episodes: Episodes) -> None:
        """Refresh the progress line."""
        recent = episodes.recent()
        self.log.progress(self.step, {"success": f"{recent['success']:.2f}" if recent else "-"})

    def log_training(self, updates: Mapping[str, float], episodes: Episodes) -> None:
        """A line of metrics.jsonl: means over the updates and over the last episodes, number of finished episodes.

        Stops the run if one of the updates' is not finite.
        """
        self.stop_if_not_finite(updates)
        buffer, need = self.parts["buffer"], self.args["critic_batch"]
        if self.step >= self.args["start_training"] and buffer.starts.size < need:
            self.log.say(
                f"note: step {self.step}: nothing is learnt before the replay buffer holds --critic-batch {need} chunk "
                f"starts; it has {buffer.starts.size}. Episodes cut before --chunk {self.args['chunk']} steps give none"
            )
        line = {f"ogpo/{k}": v for k, v in updates.items()} | {f"train/{k}": v for k, v in episodes.recent().items()}
        line |= {"train/episodes": episodes.finished, "time/wall": time.perf_counter() - self.started}
        self.log.log(self.step, line)
        self._check_worth(buffer)

    def _check_worth(self, buffer: ReplayBuffer) -> None:
        """Say once if success, which ends an episode, is worth less than going on beside it for ever."""
        staying = buffer.staying / max(1 - self.args["gamma"], 1e-3)
        if staying > max(buffer.ending, 0):
            cost = self.args["reward_offset"] - buffer.staying
            self._note_once(
                "worth",
                f"success earns {buffer.ending:.3g} and ends the episode, while steps without it earn up to "
                f"{buffer.staying:.3g}, kept up {staying:.3g}: it is worth avoiding; with --reward-offset {cost:.3g} "
                "every step costs (docs/tasks.md, dense rewards)",
            )

    def _say(self, text: str) -> None:
        """Print a line, beside the progress line if there is one."""
        (self.log.say if self.log else print)(text)

    def _note_once(self, kind: str, text: str) -> None:
        if kind not in self.said:
            self._say(f"note: {text}")
        self.said.add(kind)

    def record_video(self, policy: str, name: str, wanted: bool) -> None:
        """If wanted, write three episodes of a policy as mp4, or a one-line note on why there is no video."""
        if not wanted:
            return
        seeds = eval_seeds("final", 3)
        try:
            with suppress(checkpoint.Stopped), self.stop.at_once(), ExitStack() as stack:
                env = make_env(self.task.name, horizon=self.horizon, render=True, pixels=self.pixels)
                stack.callback(env.close)
                self._say(f"recording {name}; without a GPU this can take minutes, and --no-video leaves it out")
                record_video(
                    env,
                    acting(self.policies[policy], self.device),
                    self.folder / name,
                    seeds,
                    encode=self.encode,
                )
                self._say(f"video: {self.folder / name}")
        except UserError as error:
            self._note_once("video", str(error))
        except Exception as error:  # of the environment: a run does without pictures
            self._note_once("video", f"no video: {blame(error)}")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        """As `TrackedRun.__exit__`, with a checkpoint first where a stop or an environment ended the run."""
        if isinstance(error, (checkpoint.Stopped, EnvError)):
            self.callback(self._rescue, error)
        return super().__exit__(kind, error, trace)

    def _rescue(self, error: BaseException) -> None:
        """Save what the run goes on from: exactly after a stop, without the failed episode after an error."""
        episodes = self.parts.get("episodes")
        if episodes and isinstance(error, EnvError) and error.envs is episodes.envs:
            episodes.give_up(error.index)
        if self.evaluation:
            if self.evaluation["log"] != "eval":
                return  # the last checkpoint is of the same state, or of cloning before this evaluation
            self.parts["evaluation"] = self.evaluation
        self.save()

    def _draw(self, kind: type[BaseException] | None, *_: object) -> None:
        """Draw the learning curve, unless the user is in a hurry."""
        if self.step and kind is not KeyboardInterrupt:
            self.log.say(f"metrics: {self.folder / 'metrics.jsonl'}\nlearning curve: {plot_curves(self.folder)}")
