"""tools/record.py: a policy's episodes become demonstrations that --demos reads."""

from pathlib import Path

import numpy as np
import pytest

from common import cli
from common.demos import get_demos
from common.errors import EnvError, UserError
from common.seeds import DEMOS
from tests.test_policy import save_run
from tools import record

MINE = """
import gymnasium as gym
import numpy as np

class Line(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.buffer = np.array([0.0, self.np_random.choice([-1.0, 1.0])], np.float32)  # the same in every step
        return self.buffer, {}

    def step(self, action):
        self.buffer[0] += 0.1 * action[0]
        success = bool(abs(self.buffer[0] - self.buffer[1]) < 0.15)
        return self.buffer, float(success), False, False, {"success": success}

class Broken(Line):
    def step(self, action):
        return 1 / 0 if self.buffer[0] else super().step(action)

gym.register("Line-v0", Line, max_episode_steps=20)
gym.register("Broken-v0", Broken)

def act(obs, env):
    action = np.sign(obs[1:])
    obs[:] = 0  # a policy's own business
    return action

def right(obs, env):
    assert isinstance(env.unwrapped, Line) and env.get_wrapper_attr("steps") == round(obs[0] / 0.2)
    return [1.0]

def still(obs, env): return [0.0]
def far(obs, env): return [1.5]
def wide(obs, env): return [0.0, 0.0]
def wrong(obs, env): return obs["state"]
number = 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the user's module, and --out there."""
    (tmp_path / "recorded_line.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(policy: str, *flags: str, env: str = "recorded_line:Line-v0") -> None:
    policy = f"recorded_line:{policy}" if policy.isidentifier() else policy
    record.main(["--env", env, "--policy", policy, "--out", "demos.npz", *flags])


def test_main_records_a_function_in_an_own_environment(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("act", "--episodes", "6")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("success 1.00 [") and "over 6 episodes, mean length 5.0" in printed[0]
    assert printed[1:] == [
        "demos.npz: 6 episodes, 30 steps, 2 observations, 1 actions",
        "train on them: python ogpo_state.py --env recorded_line:Line-v0 --demos demos.npz",
    ]
    demos = get_demos("recorded_line:Line-v0", "demos.npz", 1, 0.0, here)
    assert demos.ends.tolist() == [5, 10, 15, 20, 25, 30]
    obs, actions = demos.obs.reshape(6, 5, 2), demos.actions.reshape(6, 5)
    goals = obs[:, :, 1:]
    assert set(goals.ravel()) == {-1, 1} and (goals == goals[:, :1]).all()
    np.testing.assert_allclose(obs[:, :, 0], goals[:, :, 0] * 0.2 * np.arange(5), atol=1e-6)  # what was seen, then done
    np.testing.assert_allclose(actions, goals[:, :, 0], atol=2e-5)
    with np.load("demos.npz") as file:
        assert file["rewards"].reshape(6, 5).tolist() == [[0, 0, 0, 0, 1]] * 6


def test_main_keeps_successes_only_and_all_with_all(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("right", "--episodes", "8", "--all")
    printed = capsys.readouterr().out
    with np.load("demos.npz") as file:
        goals, rewards = file["obs"][file["ends"], 1], file["rewards"]
    assert len(goals) == 8 and 0 < rewards.sum() < 8  # goals are on either side
    failed = 8 - int(rewards.sum())
    assert f"note: {failed} of them are failures" in printed and f"success {rewards.sum() / 8:.2f} [" in printed
    (here / "demos.npz").unlink()
    run("right", "--episodes", "8")
    with np.load("demos.npz") as file:
        assert file["ends"].sum() == file["rewards"].sum() == 8 and (file["obs"][:, 1] == 1).all()
    assert "failures" not in capsys.readouterr().out
    (here / "demos.npz").unlink()
    run("right", "--episodes", "8", "--all", "--seed", "1")
    with np.load("demos.npz") as file:
        assert (file["obs"][file["ends"], 1] != goals).any()


def test_record_gives_up_and_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def one_success(env: object, expert: object, rng: object, noise: float, seed: int) -> tuple[bool, tuple]:
        seeds.append(seed)
        return len(seeds) == 3, (np.zeros((2, 6)), np.zeros((2, 6)), np.zeros((2, 2)), np.zeros(2))

    monkeypatch.setattr(record, "rollout", one_success)
    kept, result = record.record("toy", lambda *_: None, 2)
    assert len(kept) == 1 and len(kept[0]) == 3 and result.success.sum() == 1
    assert seeds == list(range(DEMOS, DEMOS + 60))  # of demonstrations, each once


def test_main_records_a_trained_policy(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(here / "run")
    with pytest.raises(UserError, match="takes observations of 5 numbers, got 6"):
        run(str(here / "run"), env="toy")
    resets = []

    class Policy:
        def __call__(self, obs: np.ndarray) -> np.ndarray:
            return np.clip(obs[4:] + 0.01 * len(resets), -1, 1)

        def reset(self) -> None:
            resets.append(1)

    monkeypatch.setattr(record, "load_policy", lambda folder, seed: Policy())
    run(str(here / "run"), "--episodes", "3", "--all", env="toy")
    assert len(resets) == 3
    demos = get_demos("toy", "demos.npz", 1, 0.0, here)
    for i, (obs, actions) in enumerate(demos.episodes()):
        np.testing.assert_allclose(actions, np.clip(obs[:-1, 4:] + 0.01 * (i + 1), -1, 1), atol=2e-5)


@pytest.mark.parametrize(
    ("policy", "flags", "said"),
    [
        ("runs/none", [], "runs/none: there is no such folder; give runs/NAME, or module:function"),
        (".", [], "without an args.json"),
        ("gone:act", [], r"--policy gone:act cannot be imported \(ModuleNotFoundError"),
        ("gone", [], r"recorded_line:gone cannot be imported \(AttributeError"),
        ("number", [], r"fails \(TypeError: 'int' object is not callable"),
        ("wrong", [], r"fails \(IndexError: .*\(recorded_line.py:\d+\)\)"),
        ("far", [], r"gave an action \[1.5\] of shape \(1,\); \(1,\) numbers in \[-1, 1\]"),
        ("wide", [], r"of shape \(2,\); \(1,\) numbers"),
        ("still", ["--episodes", "1"], "none of 40 episodes of .*Line-v0 succeeded; mend the policy"),
        ("act", ["--episodes", "0"], "--episodes 0: give at least one"),
        ("act", ["--out", "demos.hdf5"], "written to .npz"),
        ("act", ["--out", "recorded_line.py/demos.npz"], "cannot be written"),
        ("act", ["--env", "nonsense"], "unknown task 'nonsense'"),
    ],
)
def test_main_refuses_in_one_line(here: Path, policy: str, flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        run(policy, *flags)
    assert "\n" not in str(caught.value)
    assert not (here / "demos.npz").exists()


def test_main_records_the_example_of_the_docs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "tasks.md"
    (here / "documented_line.py").write_text(page.read_text().split("```python\n")[1].split("```")[0])
    run("documented_line:act", "--episodes", "3", env="documented_line:Line-v0")
    assert "success 1.00 [" in capsys.readouterr().out
    assert len(get_demos("documented_line:Line-v0", "demos.npz", 1, 0.0, here).ends) == 3


def test_main_never_overwrites(here: Path) -> None:
    (here / "demos.npz").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"demos\.npz is there already"):
        run("act")
    assert (here / "demos.npz").read_bytes() == b"mine"


def test_main_environment_that_fails_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EnvError, match=rf"episode seed {DEMOS}, step 2: ZeroDivisionError"):
        run("act", env="recorded_line:Broken-v0")
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: run("act", env="recorded_line:Broken-v0"))
    assert "error: episode seed" in str(ended.value)
