"""common/evaluate.py against episodes whose outcome is known by hand."""

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from scipy.stats import norm

from common.envs import ChunkStep, make_env
from common.envs.toy import ToyReach
from common.errors import UserError
from common.evaluate import EvalResult, evaluate, record_video, wilson

CHUNK = 3
HORIZON = 8


class Scripted(gym.Env):
    """Seed s fails if s % 4 == 0 (truncated after 8 steps), else succeeds at step 1 + s % 7.

    The observation is (seed, steps so far). The action must repeat (seed, step), or the success is withheld.
    """

    observation_space = gym.spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = gym.spaces.Box(-1e6, 1e6, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps, self.faithful = seed, 0, True
        return np.array([seed, 0], np.float32), {"success": False}

    def step(self, action):
        self.faithful &= tuple(action) == (self.seed, self.steps)
        self.steps += 1
        success = self.seed % 4 != 0 and self.steps == 1 + self.seed % 7 and self.faithful
        truncated = self.steps == HORIZON and not success
        return np.array([self.seed, self.steps], np.float32), 0.0, success, truncated, {"success": success}


def faithful_act(obs):
    """Chunks (n, 3, 2) that repeat what the environment expects at each of the next steps."""
    assert obs.ndim == 2 and len(obs) > 0
    return obs[:, None] + np.arange(CHUNK)[None, :, None] * np.array([0.0, 1.0])


def vector(num_envs, kind=SyncVectorEnv):
    return kind([lambda: ChunkStep(Scripted(), CHUNK)] * num_envs, autoreset_mode=AutoresetMode.DISABLED)


def expected(seed, episodes):
    seeds = np.arange(seed, seed + episodes)
    return seeds % 4 != 0, np.where(seeds % 4 != 0, 1 + seeds % 7, HORIZON)


@pytest.mark.parametrize("num_envs", [1, 2, 3, 5, 11, 16])
def test_evaluate_success_and_length_of_each_episode(num_envs):
    result = evaluate(vector(num_envs), faithful_act, range(100, 111))
    success, length = expected(100, 11)
    assert result.success.dtype == bool and (result.success == success).all()
    assert (result.length == length).all()


def test_evaluate_worker_processes_give_the_same():
    envs = vector(2, AsyncVectorEnv)
    success, length = expected(7, 9)
    for _ in range(2):  # a second call on the same workers starts from scratch
        result = evaluate(envs, faithful_act, range(7, 16))
        assert (result.success == success).all() and (result.length == length).all()
    envs.close()


def test_evaluate_asks_only_at_chunk_borders_and_only_for_running_episodes():
    asked = []

    def act(obs):
        asked.extend(map(tuple, obs.astype(int)))
        return faithful_act(obs)

    result = evaluate(vector(4), act, range(20, 27))
    queries = [(20 + i, step) for i, length in enumerate(result.length) for step in range(0, int(length), CHUNK)]
    assert sorted(asked) == sorted(queries)


def test_chunk_step_is_the_steps_it_stands_for():
    """Chunks of 5 in episodes of 8: full, then cut by the end of the episode, its rest never executed."""
    plain, chunked = make_env("toy", horizon=8), ChunkStep(make_env("toy", horizon=8), 5)
    assert chunked.action_space.shape == (5, 2)
    np.testing.assert_array_equal(plain.reset(seed=3)[0], chunked.reset(seed=3)[0])
    actions = np.random.default_rng(0).uniform(-0.2, 0.2, (10, 2)).astype(np.float32)
    for rows, made, over in ((slice(0, 5), 5, False), (slice(5, 10), 3, True)):
        steps = [plain.step(action) for action in actions[rows][:made]]
        obs, reward, terminated, truncated, info = chunked.step(actions[rows])
        np.testing.assert_array_equal(obs, steps[-1][0])
        assert reward == pytest.approx(sum(s[1] for s in steps))
        assert (terminated, truncated) == (False, over) == steps[-1][2:4]
        assert info["steps"] == made and info["success"] == any(s[4]["success"] for s in steps)


def test_evaluate_no_episode_is_an_error():
    with pytest.raises(ValueError, match="at least one episode"):
        evaluate(vector(1), faithful_act, ())


def test_eval_result_summary():
    success = np.arange(100) >= 3
    result = EvalResult(success, np.where(success, 40, 80))
    assert result.rate == 0.97
    assert result.mean_length == pytest.approx(41.2)
    assert result.interval == wilson(97, 100)
    assert str(result) == "success 0.97 [0.92, 0.99] over 100 episodes, mean length 41.2"


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # by hand from the closed form
        (8, 10, 0.4902, 0.9433),
    ],
)
def test_wilson_published_values(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=6e-5)
    mirrored = wilson(n - k, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=6e-5)


@pytest.mark.parametrize("n", [1, 10, 100])
def test_wilson_at_the_borders(n):
    z2 = norm.ppf(0.975) ** 2
    assert wilson(0, n) == pytest.approx((0.0, z2 / (n + z2)))
    assert wilson(n, n) == pytest.approx((n / (n + z2), 1.0))


@pytest.mark.parametrize("k", range(11))
def test_wilson_limits_solve_the_score_equation(k):
    """Each limit p satisfies (k/n - p)^2 = z^2 p (1 - p) / n: the definition of the interval."""
    for p in wilson(k, 10):
        assert (k / 10 - p) ** 2 == pytest.approx(norm.ppf(0.975) ** 2 * p * (1 - p) / 10, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError):
        wilson(k, n)


def toy_act(obs):
    """Through the upper gap in chunks of 2 when the start is in the upper half; else into the wall."""
    x, y, goal_y = obs[:, 0], obs[:, 1], obs[:, 3]
    aim = np.where(x < 0.05, 0.5, goal_y)
    upper = np.where(obs[:, 1] > -0.2, aim, -1.0)
    speed = np.where((x < 0) & (np.abs(y - 0.5) > 0.05), (-0.15 - x) * 4, 0.5)
    action = np.stack([speed, (upper - y) * 4], axis=1).clip(-1, 1).astype(np.float32)
    return np.repeat(action[:, None], 2, axis=1)


def test_record_video_shows_every_step_and_the_outcome(tmp_path):
    env = make_env("toy", render=True)
    envs = SyncVectorEnv([lambda: ChunkStep(make_env("toy"), 2)], autoreset_mode=AutoresetMode.DISABLED)
    result = evaluate(envs, toy_act, range(6))
    assert 0 < result.success.sum() < 6  # both outcomes are on show
    record_video(env, toy_act, tmp_path / "a.mp4", range(6), fps=10)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    frames = np.stack(imageio.mimread(tmp_path / "a.mp4", memtest=False))
    hold = 5  # half a second
    assert frames.shape == (result.length.sum() + 6 * (1 + hold), 192, 192, 3)
    ends = np.cumsum(result.length + 1 + hold) - 1
    red, green = frames[ends, 0, 96, 0].astype(int), frames[ends, 0, 96, 1].astype(int)
    assert ((green > red) == result.success).all()


def test_record_video_no_opengl_is_a_user_error_without_a_half_made_file(tmp_path, monkeypatch):
    def no_gl(self):
        raise RuntimeError("libEGL not found\nlong story")

    monkeypatch.setattr(ToyReach, "render", no_gl)
    with pytest.raises(UserError, match=r"cannot render \(libEGL not found\).*MUJOCO_GL"):
        record_video(make_env("toy", render=True), toy_act, tmp_path / "a.mp4", [0])
    assert not list(tmp_path.iterdir())


def test_record_video_no_ffmpeg_is_a_user_error(tmp_path, monkeypatch):
    def no_ffmpeg(*args, **kwargs):
        raise ValueError("Could not find a backend")

    monkeypatch.setattr(imageio, "get_writer", no_ffmpeg)
    with pytest.raises(UserError, match="pip install imageio"):
        record_video(make_env("toy", render=True), toy_act, tmp_path / "a.mp4", [0])
