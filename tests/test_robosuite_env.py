"""Environments: the fast control step against robosuite's own, seeding, flags, vectors and users' environments."""

import os
import signal
from collections.abc import Iterator
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest

from common.envs import TASKS, make_env, make_vec_env, resolve, robosuite_env
from common.envs.gymnasium_env import UserEnv
from common.envs.osc import FastStep
from common.envs.robosuite_env import RobosuiteEnv
from common.envs.simulation import mujoco  # sets MUJOCO_GL before mujoco is imported
from common.errors import UserError
from tools.robosuite_experts import lift_expert, square_expert

ACTIONS = np.random.default_rng(0).uniform(-1, 1, (100, 7)).astype(np.float32)


@pytest.fixture(scope="module")
def fast() -> Iterator[RobosuiteEnv]:
    env = make_env("lift")
    yield env
    env.close()


@pytest.fixture(scope="module")
def slow() -> Iterator[RobosuiteEnv]:
    env = make_env("lift", original_step=True)
    yield env
    env.close()


def rollout(env: gym.Env, seed: int, actions: np.ndarray) -> np.ndarray:
    """Observations of an episode (T + 1, O)."""
    return np.stack([env.reset(seed=seed)[0]] + [env.step(action)[0] for action in actions])


def qpos(env: RobosuiteEnv) -> np.ndarray:
    return env.env.sim.data.qpos


def test_fast_step_equals_robosuites(fast: RobosuiteEnv, slow: RobosuiteEnv) -> None:
    fast.reset(seed=3)
    slow.reset(seed=3)
    model, kind = slow.env.sim.model._model, mujoco.mjtState.mjSTATE_INTEGRATION
    state, gaps = np.empty(mujoco.mj_stateSize(model, kind)), []
    for action in ACTIONS:
        mujoco.mj_getState(model, slow.env.sim.data._data, state, kind)
        mujoco.mj_setState(model, fast.env.sim.data._data, state, kind)
        fast.step(action)
        slow.step(action)
        gaps.append(np.abs(qpos(fast) - qpos(slow)).max())
    assert np.median(gaps) < 1e-15
    assert np.quantile(gaps, 0.9) < 1e-12 and max(gaps) < 1e-6  # new contacts amplify rounding errors


def test_fast_step_episode_equals_robosuites(fast: RobosuiteEnv, slow: RobosuiteEnv) -> None:
    for env in (fast, slow):
        env.reset(seed=5)
    for action in ACTIONS:
        obs, reward, *_ = fast.step(action)
        raw, raw_reward, *_ = slow.env.step(action.astype(np.float64))
        keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state")
        assert np.abs(obs - np.concatenate([raw[key] for key in keys])).max() < 1e-5
        assert reward == raw_reward
        assert np.abs(qpos(fast) - qpos(slow)).max() < 1e-5


@pytest.mark.parametrize("name", ["can", "square", "tool_hang", "transport"])
def test_fast_step_of_other_tasks_equals_robosuites(name: str) -> None:
    """Layout, relative poses at a reset, one control step from equal states, and an episode."""
    task, rng = TASKS[name], np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (15, task.action_dim)).astype(np.float32)
    fast, slow = make_env(name), make_env(name, original_step=True)
    first = fast.reset(seed=5)[0]
    np.testing.assert_array_equal(slow.reset(seed=5)[0], first)
    assert first.shape == (sum(width for _, width in task.obs),)
    if name in ("can", "square"):
        hand, near = first[:3], first[9:12]
        assert np.linalg.norm(near) == pytest.approx(np.linalg.norm(first[16:19] - hand), rel=1e-5)
    low, high = fast.env.action_spec
    assert (low == fast.action_space.low).all() and (high == fast.action_space.high).all()
    model, kind = slow.env.sim.model._model, mujoco.mjtState.mjSTATE_INTEGRATION
    state, gaps = np.empty(mujoco.mj_stateSize(model, kind)), []
    keys = [key if key != "object" else "object-state" for key, _ in task.obs]
    drifts = task.obs[-1][1] if name == "transport" else 0  # contacts of its objects amplify rounding errors
    for action in actions:  # an episode
        obs, reward, *_ = fast.step(action)
        raw, raw_reward, *_ = slow.env.step(action.astype(np.float64))
        assert np.abs(obs - np.concatenate([raw[key] for key in keys]))[: len(obs) - drifts].max() < 1e-5
        assert reward == raw_reward
    for action in actions:  # single steps from equal states
        mujoco.mj_getState(model, slow.env.sim.data._data, state, kind)
        mujoco.mj_setState(model, fast.env.sim.data._data, state, kind)
        obs, reward, *_ = fast.step(action)
        raw, raw_reward, *_ = slow.env.step(action.astype(np.float64))
        assert np.abs(obs - np.concatenate([raw[key] for key in keys])).max() < 1e-6
        assert reward == raw_reward
        gaps.append(np.abs(qpos(fast) - qpos(slow)).max())
    assert np.median(gaps) < 1e-14 and max(gaps) < 1e-6  # new contacts amplify rounding errors
    np.testing.assert_array_equal(fast.reset(seed=5)[0], first)
    fast.close()
    slow.close()


def test_robosuite_env_original_step_reports_the_end_of_the_step(slow: RobosuiteEnv) -> None:
    slow.reset(seed=5)
    for action in ACTIONS[:5]:
        raw = slow.env.step(action.astype(np.float64))[0]
        obs = slow._observe()
        np.testing.assert_array_equal(obs[:3], raw["robot0_eef_pos"].astype(np.float32))
        np.testing.assert_array_equal(obs[9:], raw["object-state"].astype(np.float32))


def test_robosuite_env_layout_matches_task(fast: RobosuiteEnv) -> None:
    obs, info = fast.reset(seed=5)
    assert obs.dtype == np.float32 and fast.observation_space.contains(obs) and info == {"success": False}
    low, high = fast.env.action_spec
    assert (low == fast.action_space.low).all() and (high == fast.action_space.high).all()
    raw = fast.env._get_observations()
    for key, part in zip(
        ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state"),
        np.split(obs, np.cumsum([width for _, width in TASKS["lift"].obs])[:-1]),
        strict=True,
    ):
        np.testing.assert_array_equal(part, raw[key].astype(np.float32))
    np.testing.assert_allclose(obs[16:19], obs[9:12] - obs[:3], atol=1e-6)


def test_robosuite_env_reset_is_a_function_of_the_seed(fast: RobosuiteEnv, slow: RobosuiteEnv) -> None:
    actions = ACTIONS[:30]
    first = rollout(fast, 5, actions)
    size = fast.env.cube.size
    other = rollout(fast, 6, actions[:10])
    assert fast.env.cube.size == size and (other[0] != first[0]).any()
    np.testing.assert_array_equal(rollout(fast, 5, actions), first)  # after an episode of the same model
    rollout(fast, 5 + 2 * robosuite_env.MODEL_BLOCK, actions[:10])
    assert fast.env.cube.size != size
    np.testing.assert_array_equal(rollout(fast, 5, actions), first)  # after another model
    reference = rollout(slow, 5, actions)
    np.testing.assert_array_equal(reference[0], first[0])
    rollout(slow, 6, actions[:10])
    np.testing.assert_array_equal(rollout(slow, 5, actions), reference)


def test_robosuite_env_reset_without_seed_is_drawn(fast: RobosuiteEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robosuite_env, "MODEL_BLOCK", 2**40)  # one model: compiling is slow
    drawn = []
    for _ in range(2):
        seeded = fast.reset(seed=3)[0]
        drawn.append([fast.reset()[0], fast.reset()[0]])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0][0] != seeded).any() and (drawn[0][0] != drawn[0][1]).any()


def expert_episode(env: RobosuiteEnv) -> list[tuple[float, bool, bool, dict]]:
    obs, _ = env.reset(seed=5)
    policy = lift_expert(env, obs, np.random.default_rng(0), 0.0)
    action, steps = next(policy), []
    while not steps or not (steps[-1][1] or steps[-1][2]):
        obs, *step = env.step(action)
        steps.append(tuple(step))
        action = policy.send(obs)
    return steps


def test_robosuite_env_success_ends_and_horizon_cuts(fast: RobosuiteEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = expert_episode(fast)
    assert steps[-1] == (1.0, True, False, {"success": True})
    assert all(step == (0.0, False, False, {"success": False}) for step in steps[:-1])
    monkeypatch.setattr(fast, "horizon", len(steps))
    assert expert_episode(fast) == steps  # success on the last step is no truncation
    monkeypatch.setattr(fast, "horizon", len(steps) - 1)
    assert expert_episode(fast) == [*steps[:-2], (0.0, False, True, {"success": False})]


def test_square_expert_begins_again_when_the_nut_is_not_in_its_hand() -> None:
    """Twice its grasp is made to fail: the hand is opened behind its back."""
    env = make_env("square", horizon=400)
    obs, _ = env.reset(seed=50)
    policy = square_expert(env, obs, np.random.default_rng(0), 0.0)
    action, grasps, done = next(policy), 0, False
    while not done:
        closed = action[6] > 0
        if grasps < 2:
            action = np.append(action[:6], -1.0).astype(np.float32)
        obs, _, success, cut, _ = env.step(action)
        action, done = policy.send(obs), success or cut
        grasps += int(closed and action[6] < 0)
    env.close()
    assert success and grasps >= 2


def test_fast_step_refuses_other_controllers(fast: RobosuiteEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    fast.reset(seed=5)
    controller = fast.env.robots[0].part_controllers["right"]
    for attribute, value, words in (
        ("input_ref_frame", "base", "world"),
        ("input_type", "absolute", "delta"),
        ("impedance_mode", "variable", "fixed"),
        ("uncoupling", False, "uncouple"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=words):
            patch.setattr(controller, attribute, value)
            FastStep(fast.env)
    monkeypatch.delitem(fast.env.robots[0].part_controllers, "right_gripper")
    with pytest.raises(ValueError, match="GRIP"):
        FastStep(fast.env)


def test_robosuite_env_render_leaves_the_episode_alone(fast: RobosuiteEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    fast.reset(seed=5)
    assert fast.render() is None
    expected = rollout(fast, 5, ACTIONS[:10])
    monkeypatch.setattr(fast, "render_mode", "rgb_array")
    try:
        fast.render()
    except UserError as error:
        pytest.skip(str(error))
    fast.reset(seed=5)
    images = []
    for action, obs in zip(ACTIONS[:10], expected[1:], strict=True):
        np.testing.assert_array_equal(fast.step(action)[0], obs)
        images.append(fast.render())
    assert images[0].shape == (256, 256, 3) and images[0].dtype == np.uint8
    assert images[0].std() > 10 and (images[0] != images[-1]).any()


def test_draw_without_opengl_is_a_user_error(fast: RobosuiteEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no display")

    fast.reset(seed=5)
    monkeypatch.setattr(fast, "render_mode", "rgb_array")
    monkeypatch.setattr(fast, "_renderers", {})
    monkeypatch.setattr(mujoco.Renderer, "__init__", fail)
    with pytest.raises(UserError, match=r"no display.*MUJOCO_GL"):
        fast.render()


def test_make_vec_env_of_lift_equals_single(fast: RobosuiteEnv) -> None:
    envs = make_vec_env("lift", 2)
    try:
        obs, _ = envs.reset(seed=[5, 6])
        singles = [rollout(fast, seed, ACTIONS[:1]) for seed in (5, 6)]
        np.testing.assert_array_equal(obs, [single[0] for single in singles])
        obs, *_ = envs.step(ACTIONS[[0, 0]])
        np.testing.assert_array_equal(obs, [single[1] for single in singles])
        obs, _ = envs.reset(seed=[7, 99], options={"reset_mask": np.array([True, False])})
        np.testing.assert_array_equal(obs, [fast.reset(seed=7)[0], singles[1][1]])
    finally:
        envs.close()


@pytest.mark.parametrize("num_envs", [1, 3])
def test_make_vec_env_resets_only_what_the_mask_says(num_envs: int) -> None:
    single, envs = make_env("toy", horizon=3), make_vec_env("toy", num_envs, horizon=3)
    try:
        envs.reset(seed=list(range(num_envs)))
        action = np.full((num_envs, 2), 0.5, np.float32)
        for step in range(3):
            obs, _, terminated, truncated, info = envs.step(action)
            assert truncated.all() == (step == 2) and not terminated.any() and not info["success"].any()
        mask = np.arange(num_envs) % 2 == 0
        reset, _ = envs.reset(seed=[10 + i for i in range(num_envs)], options={"reset_mask": mask})
        for i in range(num_envs):
            np.testing.assert_array_equal(reset[i], single.reset(seed=10 + i)[0] if mask[i] else obs[i])
        if num_envs > 1:  # Ctrl-C reaches every process of the terminal; the workers leave it to the parent
            for process in envs.processes:
                os.kill(process.pid, signal.SIGINT)
            assert envs.step(action)[0].shape == (num_envs, 6)
    finally:
        envs.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("given", "near"),
    [("lfit", "lift"), ("door-open-v3", "door-open"), ("metaworld-push", "push"), ("FetchPush", "fetch-push")],
)
def test_resolve_unknown_task_names_the_nearest(given: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"'{given}'; nearest are .*\b{near},.*package.module:EnvId") as caught:
        resolve(given)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


class Tiny(gym.Env):
    """Counts its steps; succeeds when told to. A user's environment with other bounds, dtype and flags."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gym.spaces.Box(-10, 10, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-2.0, 0.0]), np.array([4.0, 1.0]), dtype=np.float64)

    def __init__(self, success_at: int = 5, render_mode: str | None = None) -> None:
        self.success_at, self.render_mode = success_at, render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.array([0.0, self.np_random.uniform()]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return action.copy(), -1.0, False, False, {"success": self.steps == self.success_at}


class Silent(Tiny):
    """Says nothing about success."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return (*super().step(action)[:4], {})


class Discrete(Tiny):
    action_space = gym.spaces.Discrete(2)


class Unbounded(Tiny):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


class Image(Tiny):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Plain(Tiny):
    """Draws nothing, as many do."""

    metadata: ClassVar[dict] = {"render_modes": []}

    def __init__(self) -> None:
        super().__init__()


for cls in (Plain, Tiny, Silent, Discrete, Unbounded, Image):
    gym.register(f"{cls.__name__}-v0", cls, disable_env_checker=True)


def test_user_env_meets_the_contract() -> None:
    env = make_env(f"{__name__}:Tiny-v0", horizon=6)
    assert isinstance(env, UserEnv) and resolve(f"{__name__}:Tiny-v0").suite == "gymnasium"
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    obs, info = env.reset(seed=1)
    assert obs.dtype == np.float32 and info == {"success": False}
    np.testing.assert_array_equal(obs, env.reset(seed=1)[0])
    obs, reward, terminated, truncated, info = env.step(np.array([-1.0, 1.0], np.float32))
    np.testing.assert_allclose(obs, [-2.0, 1.0])  # the environment's own bounds
    assert (obs.dtype, reward, terminated, truncated, info) == (np.float32, -1.0, False, False, {"success": False})
    flags = [env.step(np.zeros(2, np.float32))[2:] for _ in range(4)]
    assert flags[-1] == (True, False, {"success": True}) and not any(flag[0] or flag[1] for flag in flags[:-1])


@pytest.mark.parametrize(("horizon", "flags"), [(4, (False, True)), (5, (True, False))])
def test_user_env_never_ends_twice(horizon: int, flags: tuple[bool, bool]) -> None:
    env = make_env(f"{__name__}:Tiny-v0", horizon=horizon)
    env.reset(seed=0)
    assert [env.step(np.zeros(2, np.float32))[2:4] for _ in range(horizon)][-1] == flags


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{__name__}:Silent-v0", 'Silent-v0 does not report info\\["success"\\]'),
        (f"{__name__}:Discrete-v0", "finite bounds"),
        (f"{__name__}:Unbounded-v0", "finite bounds"),
        (f"{__name__}:Image-v0", r"observes Box\(0, 255, \(8, 8, 3\), uint8\); .*no images"),
        (f"{__name__}:Missing-v0", "cannot be made"),
        ("no_such_package:Env-v0", "No module named"),
    ],
)
def test_make_env_unusable_environment_is_a_user_error(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_env(name)


def test_user_env_without_pictures_says_so(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(UserError, match=r"no video: .*Plain-v0 does not list rgb_array among its render_modes"):
        make_env(f"{__name__}:Plain-v0", render=True)
    assert not [w for w in recwarn.list if "render" in str(w.message)]
    assert make_env(f"{__name__}:Tiny-v0", render=True).render_mode == "rgb_array"
