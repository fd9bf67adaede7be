"""Runs that are stopped, cut off or let down by an environment: one line, exit code, and nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import ogpo_state as og
from common import checkpoint
from common.runlog import read_metrics
from tests.helpers import slow
from tests.test_training import (
    PATIENCE,
    ROOT,
    SMALL,
    assert_interruptions_change_nothing,
    assert_same_run,
    command,
    train,
    wait_for,
)

LINE = '''
import os, pathlib, sys, time
import gymnasium as gym
import numpy as np

class Line(gym.Env):
    """Ten steps from the start to the goal; `fault` strikes at step 5 of every third episode of a range of seeds."""
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(-9, 9, (2,))
    action_space = gym.spaces.Box(-2, 2, (1,))
    def __init__(self, fault="", first=2**29, last=2**31, render_mode=None):
        if fault == "constructor":
            raise ZeroDivisionError("in the constructor")
        self.fault, self.seeds, self.render_mode = fault, range(first, last), render_mode
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.strikes = seed in self.seeds and seed % 3 == 2
        if self.strikes and self.fault == "reset":
            raise OSError("no simulator")
        self.x, self.goal, self.n = 0.0, float(self.np_random.choice([-1.0, 1.0])), 0
        return np.array([self.x, self.goal], np.float32), {}
    def step(self, action):
        self.x += 0.05 * float(action[0])
        self.n += 1
        if self.fault == "slow":
            time.sleep(0.01)
        obs, reward = np.array([self.x, self.goal], np.float32), 0.0
        if self.strikes and self.n == 5:
            if self.fault == "raises":
                raise ZeroDivisionError("no such" + chr(10) + "number")
            if self.fault == "dies":
                os._exit(7)
            if self.fault == "hangs":
                pathlib.Path(os.environ["MARK"]).touch()
                while True:
                    time.sleep(1)
            if self.fault == "reward":
                reward = float("inf")
            if self.fault == "obs":
                obs[1] = np.nan
            if self.fault == "shape":
                obs = np.zeros(3, np.float32)
        return obs, reward, False, self.fault == "short" and self.n == 3, {"success": abs(self.x - self.goal) < 0.1}
    def render(self):
        assert self.fault != "render"
        return np.zeros((7,)) if self.fault == "picture" else np.zeros((16, 16, 3), np.uint8)

EVAL = dict(first=200_000, last=300_000)
for fault in " raises dies hangs reward obs shape reset slow short render picture constructor".split(" "):
    gym.register(f"{fault.title()}Line-v0", Line, max_episode_steps=20, kwargs=dict(fault=fault))
    gym.register(f"{fault.title()}EvalLine-v0", Line, max_episode_steps=20, kwargs=dict(fault=fault) | EVAL)
gym.register("EndlessLine-v0", Line)
gym.register("LongLine-v0", Line, max_episode_steps=37)
'''  # fmt: skip


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The module `line`, where a process finds it, and flags to train on one of its environments."""
    (tmp_path / "line.py").write_text(LINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    with h5py.File(tmp_path / "line.hdf5", "w") as file:
        for i in range(4):
            goal = 1.0 if i % 2 else -1.0
            file[f"data/demo_{i}/obs"] = np.stack([goal * 0.05 * np.arange(10), np.full(10, goal)], 1)
            file[f"data/demo_{i}/actions"] = np.full((10, 1), goal, np.float32)
    flags = [*SMALL, "--demos", str(tmp_path / "line.hdf5"), "--bc-steps", "2", "--bc-eval-every", "2"]
    return [*flags, "--total-steps", "400", "--run-name", "run"]


def start(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    """A run in a process group of its own."""
    return subprocess.Popen(
        command(tmp_path, *flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end(process: subprocess.Popen[str], code: int) -> str:
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == code, out
    assert "Traceback" not in out, out
    return out


# --- Environments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "envs", "said"),
    [
        slow("raises", "1", "the environment, episode seed 1000000001, step 5: ZeroDivisionError: no such (line.py:"),
        slow("raises", "2", "environment 1, episode seed 1001000000, step 5: ZeroDivisionError: no such (line.py:"),
        slow("reset", "1", "the environment, episode seed 1000000001, reset: OSError: no simulator (line.py:"),
        slow("reset", "2", "environment 1, episode seed 1001000000, reset: OSError: no simulator (line.py:"),
        slow("obs", "1", "the environment, episode seed 1000000001, step 5: number 1 of the observation is nan"),
        slow("reward", "2", "environment 1, episode seed 1001000000, step 5: the reward is inf"),
        slow("shape", "1", "episode seed 1000000001, step 5: the observation has shape (3,), not (2,)"),
        ("dies", "2", "environment 1, episode seed 1001000000, after step 4: its process died (exit code 7)"),
    ],
)
def test_train_failed_environment_is_named_and_the_run_goes_on_without_its_episode(
    fault: str, envs: str, said: str, tmp_path: Path, line: list[str]
) -> None:
    env = f"line:{fault.title()}Line-v0"
    again = ["--resume", str(tmp_path / "run"), "--env", env]
    done = train(tmp_path, *line, "--env", env, "--num-envs", envs, check=1)
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("stopped at step") == 1 and done.stderr.strip().endswith(" ".join(again))
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert all(saved["buffer"][k].isfinite().all() for k in ("obs", "rewards"))
    done = train(tmp_path, *again, check=1)  # meets the next one
    assert f"seed {1000000004 if envs == '1' else 1000000001}, " in done.stderr, done.stderr
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] > saved["step"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raises", "reward"])
def test_evaluate_failed_environment_is_named_and_the_evaluation_is_made_again(
    fault: str, tmp_path: Path, line: list[str]
) -> None:
    env = ["--env", f"line:{fault.title()}EvalLine-v0"]
    new = [*line, *env, "--eval-every", "200"]
    for flags in (new, ["--resume", str(tmp_path / "run"), *env]):
        done = train(tmp_path, *flags, check=1)
        assert "stopped at step 200: " in done.stderr and "episode seed 200000, " in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 200


@pytest.mark.slow
@pytest.mark.parametrize("where", ["", slow("Eval")])
def test_hanging_environment_ends_with_one_signal(where: str, tmp_path: Path, line: list[str]) -> None:
    flags = ["--num-envs", "2", "--eval-envs", "2", "--eval-every", "200"]
    with start(tmp_path, *line, "--env", f"line:Hangs{where}Line-v0", *flags) as process:
        wait_for(tmp_path / "mark", process)
        process.terminate()
        out = end(process, 0 if where else 1)
    assert where or "does not answer" in out, out
    assert "--resume" in out and checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [("ConstructorLine-v0", "ZeroDivisionError: in the constructor (line.py:"), ("NoSuchLine-v0", "NoSuchLine")],
)
def test_main_environment_that_cannot_be_made_is_one_line(
    name: str, said: str, tmp_path: Path, line: list[str]
) -> None:
    done = train(tmp_path, *line, "--env", f"line:{name}", check=2)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    "text", ["raise SystemExit(3)", slow("assert False, 'mine'"), "def f(:", slow("import nothing_here")]
)
def test_main_module_that_fails_is_one_line(
    text: str, tmp_path: Path, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(text)
    done = train(tmp_path, *line, "--env", "broken:Line-v0", check=2)
    assert "broken:Line-v0" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", [slow("Render"), "Picture"])
def test_record_video_bad_pictures_are_a_note(fault: str, tmp_path: Path, line: list[str]) -> None:
    done = train(tmp_path, *line, "--env", f"line:{fault}Line-v0", "--video")
    assert done.stdout.count("note: no video") == 1, done.stdout
    assert "final/bon_success" in read_metrics(tmp_path / "run")[-1]


@pytest.mark.slow
def test_horizon_is_the_environment_s_own(tmp_path: Path, line: list[str]) -> None:
    sys.path.append(str(tmp_path))
    try:
        assert og.default_args("line:LongLine-v0").task.horizon == 37
        assert og.default_args("line:EndlessLine-v0").task.horizon == 300
    finally:
        sys.path.remove(str(tmp_path))
    done = train(tmp_path, *line, "--env", "line:EndlessLine-v0", "--horizon", "8")
    out = done.stdout + done.stderr
    assert "note: line:EndlessLine-v0 is registered without max_episode_steps" in out
    assert "4 of the 4 demonstrations are longer than an episode may be, 10 steps of 8: raise --horizon" in out
    flags = ["--chunk", "38", "--run-name", "other"]
    assert "an episode of 37 steps" in train(tmp_path, *line, "--env", "line:LongLine-v0", *flags, check=2).stderr


def test_train_says_that_nothing_can_be_learnt(tmp_path: Path, line: list[str]) -> None:
    out = train(tmp_path, *line, "--env", "line:ShortLine-v0").stdout
    assert "note: step 200: nothing is learnt before the replay buffer holds --critic-batch 256 chunk starts" in out
    assert "it has 0. Episodes cut before --chunk 4 steps give none" in out


@pytest.mark.slow
def test_one_critic_trains(tmp_path: Path, line: list[str]) -> None:
    train(tmp_path, *line, "--env", "line:Line-v0", "--heads", "1", "--best-of-n-heads", "1")
    rows = [row for row in read_metrics(tmp_path / "run") if "ogpo/td_loss" in row]
    assert rows and all(row["ogpo/q_heads_std"] == 0 for row in rows)


# --- Signals ----------------------------------------------------------------------------------------------------------

WORKERS = ["--num-envs", "2", "--eval-envs", "2"]


@pytest.mark.parametrize("signum", [slow(signal.SIGINT), slow(signal.SIGTERM), signal.SIGHUP])
def test_signal_to_the_whole_group_saves_and_a_resumed_run_is_the_same(signum: int, tmp_path: Path) -> None:
    """As Slurm, `timeout` and a terminal that closes send it: workers and all."""
    flags = [*SMALL, *WORKERS, "--checkpoint-every", "5000"]
    assert_interruptions_change_nothing(tmp_path, flags, [("3", lambda process: os.killpg(process.pid, signum))])


@pytest.mark.slow
@pytest.mark.parametrize("kill", [slow(False), True])
def test_evaluation_cut_short_loses_no_row(kill: bool, tmp_path: Path, line: list[str]) -> None:
    """A stop, and a kill, in the middle of an evaluation at a step that is saved too."""
    flags = [*line, "--env", "line:SlowEvalLine-v0", "--eval-every", "200", "--checkpoint-every", "100"]
    train(tmp_path, *flags, "--run-name", "whole")
    with start(tmp_path, *flags, "--run-name", "broken") as process:
        wait_for(tmp_path / "broken" / "metrics.jsonl", process, '"step": 200')  # the evaluation begins
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        end(process, -signal.SIGKILL if kill else 0)
    assert not any("eval/bon_success" in row for row in read_metrics(tmp_path / "broken"))
    train(tmp_path, "--resume", str(tmp_path / "broken"), "--env", "line:SlowEvalLine-v0")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [slow(signal.SIGINT), signal.SIGTERM])
def test_eval_and_final_evaluation_stop_at_once(signum: int, tmp_path: Path, line: list[str]) -> None:
    train(tmp_path, *line, "--env", "line:SlowLine-v0", "--total-steps", "0", "--start-training", "0", *WORKERS)
    long = ["--eval-episodes", "100000", "--env", "line:SlowLine-v0"]
    with start(tmp_path, "--eval", str(tmp_path / "run"), *long) as process:
        wait_for_children(process, 2)
        process.send_signal(signum)
        end(process, 128 + signum)
    with start(tmp_path, "--resume", str(tmp_path / "run"), *long) as process:
        wait_for_children(process, 2)
        process.send_signal(signum)
        assert "--resume" in end(process, 0)


def children(pid: int) -> list[int]:
    """All processes below one."""
    found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and parent(int(p.name)) == pid]
    return found + [c for child in found for c in children(child)]


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def wait_for_children(process: subprocess.Popen[str], workers: int) -> list[int]:
    """Processes of a run whose `workers` environments are made: with a tracker of resources and a server of forks."""
    finish = time.monotonic() + PATIENCE
    while len(found := children(process.pid)) < workers + 2 and time.monotonic() < finish:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(2)  # until they are at work
    return found


@pytest.mark.slow
def test_workers_end_with_the_main_process(tmp_path: Path, line: list[str]) -> None:
    flags = ["--env", "line:HangsLine-v0", *WORKERS]
    with start(tmp_path, *line, *flags) as process:
        wait_for(tmp_path / "mark", process)
        below = children(process.pid)
        assert len(below) == 7  # four environments, one of which hangs, and what evaluates in two of them
        process.kill()
        out = process.communicate(timeout=PATIENCE)[0]
    finish = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in below):
        assert time.monotonic() < finish
        time.sleep(0.1)
    assert "Traceback" not in out, out


@pytest.mark.slow
def test_second_signal_aborts(tmp_path: Path) -> None:
    with start(tmp_path, *SMALL, *WORKERS, "--run-name", "run", "--update-every", "1", "--total-steps", "90000") as p:
        wait_for(tmp_path / "run" / "metrics.jsonl", p, '"step": 3')
        p.send_signal(signal.SIGSTOP)  # both arrive before it can save
        p.send_signal(signal.SIGTERM)
        p.send_signal(signal.SIGINT)
        p.send_signal(signal.SIGCONT)
        out = p.communicate(timeout=PATIENCE)[0]
    assert p.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM) and "Traceback" not in out, out
    assert not (tmp_path / "run" / "learning_curve.png").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", ["ogpo_state.py", "flm_train.py"])
def test_signal_during_the_imports_leaves_no_traceback(signum: int, script: str, tmp_path: Path) -> None:
    for module in ("numpy", "torch"):
        (tmp_path / f"{module}.py").write_text(
            f"import pathlib, time\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\ntime.sleep(3600)\n"
        )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for(tmp_path / "mark", process)
        process.send_signal(signum)
        end(process, -signum)


@pytest.mark.slow
def test_signal_during_demonstrations_and_the_same_command_starts_again(tmp_path: Path) -> None:
    flags = [*SMALL, "--run-name", "run", "--total-steps", "250"]
    with start(tmp_path, *flags, "--num-demos", "100000") as process:
        wait_for_output(process, "toy demonstrations")
        process.terminate()
        assert "nothing was saved" in end(process, 128 + signal.SIGTERM)
    for patience in (2, 8, 32, 128):  # ... and in the first evaluation, which a slow machine reaches later
        with start(tmp_path, *flags, "--bc-eval-episodes", "100000") as process:
            wait_for(tmp_path / "run" / "args.json", process)
            time.sleep(patience)
            process.send_signal(signal.SIGINT)
            out = process.communicate(timeout=PATIENCE)[0]
        if process.returncode == 128 + signal.SIGINT:
            break
        shutil.rmtree(tmp_path / "run")
    assert "nothing was saved" in out and process.returncode == 128 + signal.SIGINT and "Traceback" not in out, out
    train(tmp_path, *flags)
    assert "already exists" in train(tmp_path, *flags, check=2).stderr


def wait_for_output(process: subprocess.Popen[str], text: str) -> None:
    said = ""
    while text not in said:
        more = process.stdout.read(1)
        assert more, said
        said += more


def test_output_that_nobody_reads_ends_nothing(tmp_path: Path) -> None:
    with start(tmp_path, *SMALL, "--run-name", "run", "--total-steps", "300") as process:
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) == 0
    assert "final/bon_success" in read_metrics(tmp_path / "run")[-1]


# --- Machines ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resume_line_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    with start(folder, *SMALL, "--run-name", "it's", "--total-steps", "90000") as process:
        wait_for(folder / "it's" / "metrics.jsonl", process, '"step": 2')
        process.terminate()
        line = end(process, 0).split("go on with: ")[1].splitlines()[0]
    done = subprocess.run(
        f"exec {line.replace('python', sys.executable, 1)} --total-steps 90000 --seed x", shell=True, cwd=ROOT,
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2 and "--seed" in done.stderr, done.stderr


@pytest.mark.slow
def test_data_folder_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = train(tmp_path, *SMALL, "--run-name", "run", "--total-steps", "250", "--data-dir", str(tmp_path / "file"))
    assert "the demonstrations are made for this run alone" in done.stderr


@pytest.mark.slow
def test_missing_opengl_library_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries are those of a machine that has none, or EGL alone."""
    program = """
import ctypes, sys
cdll = ctypes.CDLL
def load(name, *rest, **more):
    if name and ("OSMesa" in name or "EGL" in name):
        raise OSError("not here")
    return cdll(name, *rest, **more)
ctypes.CDLL = load
import os
import common.envs
print("uses", os.environ.get("MUJOCO_GL"))
"""
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert "note: MUJOCO_GL=osmesa: its library is missing" in done.stdout and "uses None" in done.stdout, done.stderr
