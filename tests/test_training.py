"""The script as a user runs it: learning, exact resume, signals, bad input, compiled against eager."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import ogpo_state as og
from common import checkpoint, cli
from common.envs import TASKS, make_vec_env
from common.episodes import Episodes
from common.machine import accelerate
from common.replay import ReplayBuffer
from common.rng import Rng
from common.run import Run
from common.runlog import read_metrics
from tests.helpers import slow
from tests.warm import run_script
from tools.recording import Episode, write_demos

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 3_600  # seconds after which a process that hangs is given up; no machine is that slow
SMALL = [
    *("--env", "toy", "--preset", "laptop", "--no-video", "--num-demos", "10", "--bc-steps", "40"),
    *("--eval-envs", "0", "--bc-eval-every", "20", "--critic-successes", "0"),
    *("--bc-eval-episodes", "4", "--eval-episodes", "4", "--eval-interval-episodes", "4", "--eval-every", "500"),
    *("--log-every", "100", "--checkpoint-every", "200", "--start-training", "200", "--actor-hidden", "16", "16"),
    *("--critic-hidden", "16", "16", "--states", "8", "--critic-warmup", "5"),
]  # fmt: skip


def command(tmp_path: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "ogpo_state.py"),
        "--run-dir",
        str(tmp_path),
        "--data-dir",
        str(tmp_path),
        *flags,
    ]


def train(tmp_path: Path, *flags: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    return run_script(command(tmp_path, *flags)[1:], check=check)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_run(one: Path, two: Path) -> None:
    a, b = (checkpoint.load(p / "checkpoint.pt") for p in (one, two))
    for part in ("agent", "buffer", "episodes", "rng", "step"):
        assert same(a[part], b[part]), part
    strip = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(one)]
    assert strip == [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(two)]


def wait_for(path: Path, process: subprocess.Popen[str], text: str = "") -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[0]
        if path.exists() and text in path.read_text(errors="ignore"):
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


def assert_interruptions_change_nothing(
    tmp_path: Path, flags: Sequence[str], breaks: Sequence[tuple[str, Callable[[subprocess.Popen[str]], None]]]
) -> None:
    """A run is interrupted where its log has a step that begins so, and resumed; another one goes through.

    How far it comes is for the machine to say: it has no end in sight, and the other one goes as far.
    """
    broken = tmp_path / "broken"
    todo = [*flags, "--run-name", "broken", "--total-steps", "100000"]
    for step, interrupt in breaks:
        how: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        with subprocess.Popen(command(tmp_path, *todo), **how) as p:
            wait_for(broken / "metrics.jsonl", p, f'"step": {step}')
            interrupt(p)
            out = p.communicate(timeout=PATIENCE)[0]
        assert p.returncode == -signal.SIGKILL or (p.returncode == 0 and "--resume" in out), out
        todo = ["--resume", str(broken)]
    total = ["--total-steps", str(checkpoint.load(broken / "checkpoint.pt")["step"] + 300)]
    train(tmp_path, *todo, *total)
    train(tmp_path, *flags, *total, "--run-name", "whole")
    assert_same_run(tmp_path / "whole", broken)


@pytest.mark.slow
@pytest.mark.parametrize("envs", ["1", "3"])
def test_main_killed_and_resumed_runs_end_bitwise_equal(tmp_path: Path, envs: str) -> None:
    """In mid-training by SIGKILL, and in mid-episode by SIGTERM."""
    flags = [*SMALL, "--num-envs", envs]
    assert_interruptions_change_nothing(
        tmp_path, flags, [("6", subprocess.Popen.kill), ("9", subprocess.Popen.terminate)]
    )


@pytest.mark.slow
def test_pretrain_interrupted_resumes_exactly(tmp_path: Path) -> None:
    flags = [*SMALL, "--total-steps", "300", "--bc-steps", "200", "--bc-eval-episodes", "40"]
    train(tmp_path, *flags, "--run-name", "whole")
    start = command(tmp_path, *flags, "--run-name", "broken")
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
        wait_for(tmp_path / "broken" / "metrics.jsonl", p, '"bc/step": 60')
        p.send_signal(signal.SIGINT)
        out = p.communicate(timeout=PATIENCE)[0]
        assert p.returncode == 0, out
    train(tmp_path, "--resume", str(tmp_path / "broken"))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_pretrain_goes_back_to_what_it_had_cloned_before_it_was_stopped(tmp_path: Path) -> None:
    """Stopped after an evaluation at or below --bc-stop-success; the next one is above it."""
    flags = [*SMALL, "--total-steps", "250", "--bc-steps", "40", "--run-name", "run"]
    stopping = "import sys; import ogpo_state as og; from common.run import Run; save = Run.save; "
    stopping += "Run.save = lambda run: (save(run), setattr(run.stop, 'requested', True)); og.main(sys.argv[1:])"
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", stopping, *flags, *places], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["agent"]
    assert saved["bc_step"] == 20 and saved["bc_below"].keys() == saved["actor"].keys()
    train(tmp_path, "--resume", str(tmp_path / "run"), "--bc-stop-success", "0", "--bc-eval-episodes", "200")
    cloned = checkpoint.load(tmp_path / "run" / "cloned.pt")
    assert all(torch.equal(cloned[k], saved["bc_below"][k]) for k in cloned)


def test_evaluate_and_log_do_not_touch_training(tmp_path: Path) -> None:
    """Other evaluation, logging and checkpoint intervals: the same parameters in the end."""
    train(tmp_path, *SMALL, "--total-steps", "700", "--run-name", "a")
    other = ["--eval-every", "333", "--eval-interval-episodes", "2", "--log-every", "77", "--checkpoint-every", "1000"]
    train(tmp_path, *SMALL, "--total-steps", "700", "--run-name", "b", *other, "--eval-episodes", "3")
    a, b = (checkpoint.load(tmp_path / n / "checkpoint.pt") for n in "ab")
    assert same(a["agent"], b["agent"])


def test_main_run_folder_holds_what_its_reader_needs_and_eval_repeats_its_numbers(tmp_path: Path) -> None:
    out = train(tmp_path, *SMALL, "--total-steps", "600", "--run-name", "run").stdout
    run = tmp_path / "run"
    saved = json.loads((run / "args.json").read_text())
    assert saved["args"]["states"] == 8 and saved["versions"]["torch"]
    assert {"checkpoint.pt", "metrics.jsonl", "learning_curve.png"} <= {p.name for p in run.iterdir()}
    logged = {k for row in read_metrics(run) for k in row}
    documented = (ROOT / "docs" / "ogpo_state.md").read_text()
    assert not [k for k in logged if f"`{k}`" not in documented]
    head = out.splitlines()[:6]
    assert [line.partition(":")[0] for line in head] == [
        "run", "device", "task", "demonstrations", "networks", "budget",
    ]  # fmt: skip
    assert all(len(line) <= 80 for line in head[1:]) and str(run) in head[0] and "no CUDA device" in head[1]
    nets = checkpoint.load(run / "checkpoint.pt")["agent"]
    assert f"critic {sum(x.numel() for k, x in nets['critic'].items() if 'obs_' not in k):,} " in head[4]
    assert f"metrics: {run / 'metrics.jsonl'}\nlearning curve: {run / 'learning_curve.png'}\n" in out
    final = [line for line in out.splitlines() if line.startswith("final, ")]
    assert len(final) == 2
    again = train(tmp_path, "--eval", str(run)).stdout
    assert [line for line in again.splitlines() if line in final] == final
    assert "over 7 episodes" in train(tmp_path, "--eval", str(run), "--eval-episodes", "7").stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env", "nosuch"], ["nosuch", "nearest", "push"]),
        (["--env", "no.such.module:Env-v0"], ["no.such.module"]),
        (["--env", "toy", "--demos", "missing.hdf5"], ["missing.hdf5"]),
        (["--env", "toy", "--demos", "robomimic"], ["toy"]),
        (["--env", "toy", "--chunk", "0"], ["--chunk", "at least 1"]),
        (["--env", "toy", "--group", "1"], ["--group", "at least 2"]),
        (["--env", "toy", "--device", "cuda:99"], ["--device"]),
        (["--env", "toy", "--preset", "huge"], ["--preset", "paper"]),
        (["--resume", "nowhere"], ["nowhere", "checkpoint"]),
        (["--eval", "nowhere"], ["nowhere", "checkpoint"]),
        (["--env", "toy", "--lerning-rate", "1"], ["lerning"]),
    ],
)
def test_main_bad_input_gives_one_line_and_exit_code_2(tmp_path: Path, flags: list[str], words: list[str]) -> None:
    done = train(tmp_path, *flags, check=2)
    text = done.stdout + done.stderr
    assert all(word in text for word in words), text
    assert "Traceback" not in text
    if "error: " in done.stderr:
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_start_refuses_to_overwrite_or_to_change_a_run_s_networks(tmp_path: Path) -> None:
    train(tmp_path, *SMALL, "--total-steps", "250", "--run-name", "run")
    assert "already exists" in train(tmp_path, *SMALL, "--run-name", "run", check=2).stderr
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    refused = train(tmp_path, "--resume", str(tmp_path / "run"), "--heads", "5", check=2)
    assert "--heads" in refused.stderr and "3" in refused.stderr
    for way in ("--resume", "--eval"):  # what chose the defaults cannot change them afterwards
        refused = train(tmp_path, way, str(tmp_path / "run"), "--variant", "ogpo", check=2)
        assert "--variant: the run was started with ogpo+ca" in refused.stderr
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    longer = train(tmp_path, "--resume", str(tmp_path / "run"), "--total-steps", "400")
    assert "note: --total-steps" in longer.stdout
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 400


def test_stop_if_not_finite_leaves_a_dump(tmp_path: Path) -> None:
    done = train(tmp_path, *SMALL, "--total-steps", "600", "--run-name", "run", "--critic-lr", "1e30", check=1)
    assert "not finite" in done.stderr and "Traceback" not in done.stderr
    assert torch.load(tmp_path / "run" / "nonfinite.pt", weights_only=True)["step"] <= 600


def test_check_run_dir_unwritable_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = train(tmp_path, *SMALL, "--run-dir", str(tmp_path / "file"), check=2)
    assert "cloning" not in done.stdout and "file" in done.stderr


def test_main_runs_from_a_copy_beside_common_and_settings(tmp_path: Path) -> None:
    """The script beside nothing but common/ and settings/ (and tools/, which makes demonstrations): it still runs."""
    (tmp_path / "mine.py").write_text((ROOT / "ogpo_state.py").read_text())
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for room in ("common", "settings", "tools"):
        (tmp_path / room).symlink_to(ROOT / room)
    env.pop("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "mine.py", *SMALL, "--total-steps", "250", "--run-name", "r"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


USER_ENV = """
import gymnasium as gym
import numpy as np

class Line(gym.Env):
    observation_space = gym.spaces.Box(-5, 5, (2,))
    action_space = gym.spaces.Box(-2, 2, (1,))
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.goal = 0.0, float(self.np_random.choice([-1.0, 1.0]))
        return np.array([self.x, self.goal]), {}
    def step(self, action):
        self.x += 0.1 * float(action[0])
        success = abs(self.x - self.goal) < 0.15
        return np.array([self.x, self.goal]), 0.0, False, False, {"success": success}

gym.register("Line-v0", Line)
"""


def test_main_trains_on_own_environment_and_demonstrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """package.module:EnvId with --demos FILE.hdf5, actions rescaled from [-2, 2], trained, evaluated, resumed."""
    (tmp_path / "mine.py").write_text(USER_ENV)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with h5py.File(tmp_path / "line.hdf5", "w") as file:
        for i in range(10):
            goal, n = 1.0 if i % 2 else -1.0, 5
            x = goal * 0.2 * np.arange(n)
            file[f"data/demo_{i}/obs"] = np.stack([x, np.full(n, goal)], 1).astype(np.float32)
            file[f"data/demo_{i}/actions"] = np.full((n, 1), goal, np.float32)
    flags = [*SMALL, "--env", "mine:Line-v0", "--demos", str(tmp_path / "line.hdf5"), "--horizon", "20"]
    flags += ["--bc-steps", "500", "--bc-eval-every", "500", "--bc-stop-success", "1", "--bc-lr", "3e-3"]
    out = train(tmp_path, *flags, "--run-name", "run", "--total-steps", "300").stdout
    assert "best-of-N policy: success" in out
    cloned = next(row for row in read_metrics(tmp_path / "run") if "eval/ode_success" in row)
    assert cloned["eval/ode_success"] == 1.0 and cloned["eval/ode_length"] < 10  # 5 steps of 0.2 reach the goal
    assert "runs code of the module" in train(tmp_path, "--eval", str(tmp_path / "run"), check=2).stderr
    train(tmp_path, "--eval", str(tmp_path / "run"), "--env", "mine:Line-v0")
    train(tmp_path, "--resume", str(tmp_path / "run"), "--env", "mine:Line-v0", "--total-steps", "400")
    refused = train(tmp_path, *SMALL, "--demos", str(tmp_path / "line.hdf5"), check=2)
    assert "line.hdf5" in refused.stderr


@pytest.mark.parametrize(
    ("dense", "at_success", "ends", "offset", "bonus", "noted"),
    [
        (0.9, 0.95, True, 0, 0, "-0.9"),  # staying is worth 90
        (0.9, 0.95, True, 0, 50, "-0.9"),
        (0.9, 0.95, True, 0, 100, None),
        (0.9, 0.95, True, -1, 5, None),  # every step costs
        (0.9, 0.95, True, -0.5, 5, "-0.9"),
        (-0.1, 0.0, True, 0, 0, None),  # minus the distance
        (0.0, 1.0, True, -1, 5, None),  # sparse
        (0.0, 1.0, True, 0, 0, None),
        (3.0, 4.0, True, -7, 3, None),  # Kitchen's
        (5.0, 10.0, False, 0, 0, None),  # success does not end the episode
    ],
)
def test_run_notes_once_that_success_is_worth_avoiding(
    dense: float, at_success: float, ends: bool, offset: float, bonus: float, noted: str | None
) -> None:
    lines: list[str] = []
    run, buffer = object.__new__(Run), ReplayBuffer(100, 1, 1, 2)
    run.args, run.said = {"gamma": 0.99, "reward_offset": float(offset)}, set()
    run.log = SimpleNamespace(say=lines.append)
    raw = np.array([dense - 0.1, dense, dense - 0.2, at_success])
    obs = np.zeros((5, 1))
    buffer.add_episode(obs, obs[1:], raw[:3].repeat([1, 1, 2]) + offset, terminated=False, success=False)
    run._check_worth(buffer)
    buffer.add_episode(obs, obs[1:], raw + offset + bonus * (raw == at_success), terminated=ends, success=True)
    for _ in range(2):
        run._check_worth(buffer)
    assert len(lines) == bool(noted)
    if noted:
        assert f"--reward-offset {noted} every step costs" in lines[0] and "\n" not in lines[0]


MINIATURE = [
    *("--bc-steps", "20", "--bc-eval-every", "20", "--bc-eval-episodes", "2", "--horizon", "20"),
    *("--eval-episodes", "2", "--eval-interval-episodes", "2", "--eval-every", "100", "--log-every", "50"),
    *("--total-steps", "150", "--collect-horizon", "20", "--start-training", "60", "--critic-batch", "16"),
    *("--critic-successes", "0", "--critic-warmup", "0", "--preset", "laptop", "--no-video"),
]  # fmt: skip


def random_demos(path: Path, name: str) -> Path:
    """A file of the right schema for a task; its actions mean nothing."""
    task, rng = TASKS[name], np.random.default_rng(0)
    episode = Episode(
        {key: rng.standard_normal((12, width)).astype(np.float32) for key, width in task.obs},
        np.zeros((12, 1)),
        rng.uniform(-1, 1, (12, task.action_dim)).astype(np.float32),
        np.zeros(12),
    )
    args = dict(env_name=task.env_name, env_version="1.5.1", type=1, env_kwargs={})
    write_demos(path, [episode] * 3, json.dumps(args))
    return path


def test_main_lift_runs_from_demonstrations_to_evaluation(tmp_path: Path) -> None:
    """The main job in miniature, with the default workers."""
    out = train(tmp_path, "--env", "lift", "--run-name", "lift", *MINIATURE, "--num-demos", "2").stdout
    assert "over 2 episodes" in out


@pytest.mark.parametrize("name", [slow("peg-insert-side"), slow("door-dense"), slow("kitchen-mixed")])
def test_main_every_family_runs_in_miniature(tmp_path: Path, name: str) -> None:
    demos = random_demos(tmp_path / "demos.hdf5", name)
    out = train(
        tmp_path, "--env", name, "--run-name", "run", *MINIATURE, "--demos", str(demos), "--eval-envs", "0"
    ).stdout
    assert "best-of-N policy: success 0." in out
    losses = [row for row in read_metrics(tmp_path / "run") if "ogpo/td_loss" in row]
    assert losses and all(np.isfinite(list(row.values())).all() for row in losses)


@pytest.mark.slow
def test_evaluate_multi_task_success_is_told_by_task(tmp_path: Path) -> None:
    demos = random_demos(tmp_path / "demos.hdf5", "mt10")
    flags = [*MINIATURE, "--demos", str(demos), "--eval-episodes", "20", "--eval-envs", "0"]
    out = train(tmp_path, "--env", "mt10", "--run-name", "run", *flags).stdout
    assert "window-close 0." in out and "reach 0." in out
    last = [row for row in read_metrics(tmp_path / "run") if "final/bon_success" in row][-1]
    parts = [last[f"final/bon_success/{name}"] for name in TASKS["mt10"].tasks]
    assert np.mean(parts) == pytest.approx(last["final/bon_success"])


@pytest.mark.parametrize(("name", "updates"), [slow("tool_hang", 1), slow("transport", 0)])
def test_main_long_tasks_run_at_their_paper_settings(tmp_path: Path, name: str, updates: int) -> None:
    """Networks, chunk, chains and batch as published; budgets, caps and numbers of episodes cut."""
    demos = random_demos(tmp_path / "demos.hdf5", name)
    cut = ["--bc-steps", "2", "--bc-eval-every", "2", "--bc-eval-episodes", "1", "--eval-episodes", "1", "--no-video"]
    cut += ["--eval-envs", "0"]
    cut += ["--horizon", "40", "--collect-horizon", "40", "--total-steps", "360", "--log-every", "360"]
    cut += ["--eval-every", "1000", "--start-training", "360", "--update-every", "360" if updates else "1000"]
    out = train(tmp_path, "--env", name, "--preset", "paper", "--demos", str(demos), "--run-name", "run", *cut).stdout
    assert "best-of-N policy: success 0.00" in out
    args = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    want = dict(chunk=8, gamma=0.999, flow_steps=10, states=256, group=32, heads=10, actor_hidden=[512] * 5)
    assert {key: args[key] for key in want} == want
    assert sum("ogpo/td_loss" in row for row in read_metrics(tmp_path / "run")) == updates


def test_train_stores_rewards_ends_and_success_as_they_happen(tmp_path: Path) -> None:
    """A run's buffer: every stored episode is replayed by hand from its seed."""
    train(tmp_path, *SMALL, "--collect-horizon", "15", "--total-steps", "800", "--run-name", "run")
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    buffer = ReplayBuffer(5_000, 6, 2, 4)
    buffer.load_state_dict(saved["buffer"])
    env = make_vec_env("toy", 1, horizon=15).envs[0]
    assert len(buffer.episodes) >= 40
    for number, (lo, hi, success) in enumerate(buffer.episodes):
        obs, _ = env.reset(seed=1_000_000_000 + number)  # of --seed 1
        assert np.array_equal(obs, buffer.obs[lo])
        for row in range(lo, hi - 1):
            obs, raw, terminated, truncated, info = env.step(buffer.actions[row])
            assert np.array_equal(obs, buffer.obs[row + 1])
            assert buffer.rewards[row] == raw - 1 + 5 * info["success"]
            assert (terminated or truncated) == (row == hi - 2)
        assert buffer.terminated[hi - 2] == terminated and success == info["success"]


def test_episodes_come_back_at_any_step_of_any_environment() -> None:
    """Three environments whose episodes end at different steps; restored ones go on as those that never stopped."""
    rng = np.random.default_rng(0)
    chunks = torch.from_numpy(rng.uniform(-1, 1, (500, 4, 2)).astype(np.float32))

    def play(episodes: Episodes, steps: range) -> list[np.ndarray]:
        seen = []
        for k in steps:
            if (over := episodes.over()).any():
                obs, _ = episodes.envs.reset(seed=episodes.begin(over), options={"reset_mask": over})
                episodes.see(obs, over)
            actions = episodes.next_actions(lambda obs, rng, k=k: chunks[k : k + len(obs)], Rng(0, torch.device("cpu")))
            obs, raw, terminated, truncated, info = episodes.envs.step(actions)
            episodes.append(actions, raw, obs, info["success"])
            for i in np.flatnonzero(terminated | truncated):
                episodes.finish(i)
            seen.append(obs)
        return seen

    make = lambda: Episodes(make_vec_env("toy", 3, horizon=17), seed=3)  # noqa: E731
    for stop in (1, 16, 17, 30, 41):
        one, other = make(), make()
        play(one, range(stop))
        other.load_state_dict(one.state_dict())
        want, got = (play(episodes, range(stop, stop + 40)) for episodes in (one, other))
        assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))
        assert one.finished == other.finished and one.recent() == other.recent()
        one.envs.close(), other.envs.close()


@pytest.mark.slow
def test_accelerate_eager_and_compiled_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function that --compile compiles, in double precision, values and gradients."""
    torch.set_default_dtype(torch.float64)
    try:
        args = cli.override(og.default_args("toy", "laptop", "ogpo+ca"), dict(actor_hidden=(16,), critic_hidden=(16,)))
        agent = og.Agent(args, 5, 2, torch.device("cpu"), None)
        p, n = args.policy, 12
        g = torch.Generator().manual_seed(0)
        obs, noise = torch.randn(n, 5, generator=g), torch.randn(n, p.flow_steps + 1, 8, generator=g)
        action, x0, t = torch.rand(n, 8, generator=g), torch.randn(n, 8, generator=g), torch.rand(n, generator=g)

        def everything() -> list[torch.Tensor]:
            with torch.no_grad():
                chain, old = og.sample_chain(agent.actor, obs, noise, p)
            out = [chain, old]
            for net, loss in (
                (agent.actor, og.chain_log_prob(agent.actor, obs, 1.01 * chain, p).sum()),
                (agent.actor, og.bc_loss(agent.actor, obs, action, x0, t)),
                (agent.critic, og.critic_loss(agent.critic, obs, action, t)[0]),
            ):
                out += [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)]
            return [o for o in out if o is not None]

        eager = everything()
        names = og.COMPILED
        originals = {name: getattr(og, name) for name in names}
        accelerate(vars(og), names, (), agent.rng.generator)
        try:
            assert all(getattr(og, name) is not originals[name] for name in names)
            compiled = everything()
        finally:
            for name, function in originals.items():
                setattr(og, name, function)
        assert len(eager) == len(compiled) > 20
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(eager, compiled, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


def test_main_learns_the_toy_task(tmp_path: Path) -> None:
    """From a cloned policy below 0.5 to an acting policy above 0.9."""
    train(tmp_path, "--env", "toy", "--run-name", "toy", "--no-video")
    rows = read_metrics(tmp_path / "toy")
    before = next(row["eval/ode_success"] for row in rows if "eval/ode_success" in row)
    assert before < 0.5
    assert rows[-1]["final/bon_success"] > 0.9
    assert rows[-1]["final/ode_success"] > before + 0.2
