"""The built-in reaching task: its physics by hand, its contract, and its demonstrator."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from common.envs import make_env, toy
from tools.scripted import toy_expert


def at(x, y, goal=(0.8, 0.0), velocity=(0.0, 0.0), **kwargs):
    """An environment with the point placed by hand."""
    env = make_env("toy", **kwargs)
    env.reset(seed=0)
    env.x, env.y, env.goal_x, env.goal_y = x, y, *goal
    env.vx, env.vy = velocity
    return env


def act(x, y):
    return np.array([x, y], np.float32)


def test_toy_reach_gymnasium_contract():
    check_env(make_env("toy", render=True), skip_render_check=True)


def test_step_velocity_follows_the_command_with_lag():
    env = at(-0.9, 0.0)
    positions = [env.step(act(1.0, -0.5))[0][:2] for _ in range(5)]
    velocity = 1 - toy.LAG ** np.arange(1, 6)  # geometric approach to the command
    path = toy.STEP * np.cumsum(velocity)
    np.testing.assert_allclose(positions, np.stack([-0.9 + path, -0.5 * path], axis=1), atol=1e-6)


def test_reset_observation_is_position_target_velocity():
    env = at(-0.5, 0.25, goal=(0.8, -0.5))
    obs = env.step(act(0.0, 1.0))[0]
    half = 1 - toy.LAG
    np.testing.assert_allclose(obs, [-0.5, 0.25 + toy.STEP * half, 0.8, -0.5, 0.0, half], atol=1e-6)
    assert obs.dtype == np.float32


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize(
    ("height", "passes"),
    [
        (0.0, False),
        (0.98, False),
        (toy.GAP_CENTRE, True),
        (toy.GAP_CENTRE + 0.99 * toy.GAP_HALF_WIDTH, True),
        (toy.GAP_CENTRE + 1.01 * toy.GAP_HALF_WIDTH, False),
        (toy.GAP_CENTRE - 0.99 * toy.GAP_HALF_WIDTH, True),
        (toy.GAP_CENTRE - 1.01 * toy.GAP_HALF_WIDTH, False),
    ],
)
def test_step_wall_blocks_except_in_the_gaps(side, height, passes):
    for direction in (1, -1):
        env = at(-0.01 * direction, side * height, goal=(0.0, -1.0 * side))
        obs = env.step(act(direction, 0.0))[0]
        assert (np.sign(obs[0]) == direction) == passes
        assert passes or obs[4] == 0.0  # the wall stops the point


def test_step_an_oblique_path_is_judged_where_it_crosses():
    # From (-0.05, 0.44) with velocity (1, 1): crosses x = 0 at y = 0.49, in the gap; ends at y = 0.54.
    env = at(-0.05, 0.44, velocity=(1.0, 1.0))
    assert env.step(act(1.0, 1.0))[0][0] > 0
    # From (-0.09, 0.70): crosses at y = 0.79, outside, though it starts at a height inside the gap.
    env = at(-0.09, 0.70, velocity=(1.0, 1.0))
    assert env.step(act(1.0, 1.0))[0][0] < 0


def test_step_success_terminates_and_pays_one():
    env = at(0.45, 0.0, goal=(0.8, 0.0), velocity=(1.0, 0.0))
    assert env.step(act(1.0, 0.0))[1:] == (0.0, False, False, {"success": False})  # 0.25 away
    assert env.step(act(1.0, 0.0))[1:] == (1.0, True, False, {"success": True})


def test_step_success_at_the_horizon_is_no_truncation():
    env = at(0.45, 0.0, goal=(0.8, 0.0), velocity=(1.0, 0.0), horizon=2)
    env.step(act(1.0, 0.0))
    assert env.step(act(1.0, 0.0))[2:4] == (True, False)


def test_step_horizon_truncates():
    env = make_env("toy", horizon=5)
    env.reset(seed=0)
    assert [env.step(act(-1.0, 0.0))[2:4] for _ in range(5)] == [(False, False)] * 4 + [(False, True)]


def test_step_commands_beyond_the_range_are_clipped():
    a, b = at(-0.5, 0.0), at(-0.5, 0.0)
    assert (a.step(act(7.0, -9.0))[0] == b.step(act(1.0, -1.0))[0]).all()


def test_toy_reach_episode_is_a_function_of_seed_and_actions():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (30, 2)).astype(np.float32)

    def run(env, seed):
        return np.stack([env.reset(seed=seed)[0]] + [env.step(a)[0] for a in actions])

    used = make_env("toy")
    run(used, 1)
    assert (run(used, 5) == run(make_env("toy"), 5)).all()
    assert (run(make_env("toy"), 5)[0] != run(make_env("toy"), 6)[0]).any()


def rollout(seed, noise):
    env = make_env("toy")
    obs, _ = env.reset(seed=seed)
    expert = toy_expert(env, obs, np.random.default_rng(seed), noise)
    action, path, terminated, truncated = next(expert), [obs], False, False
    while not (terminated or truncated):
        assert action.shape == (2,) and action.dtype == np.float32 and env.action_space.contains(action)
        obs, _, terminated, truncated, _ = env.step(action)
        assert env.observation_space.contains(obs)
        path.append(obs)
        action = expert.send(obs)
    return terminated, np.stack(path)


def test_expert_succeeds_through_either_gap():
    outcomes = [rollout(seed, noise=0.5) for seed in range(200)]
    assert np.mean([success for success, _ in outcomes]) > 0.9
    upper = [path[path[:, 0] > 0][0, 1] > 0 for success, path in outcomes if success]
    assert 0.4 < np.mean(upper) < 0.6


def test_expert_without_noise_never_fails_and_is_quick():
    outcomes = [rollout(seed, noise=0.0) for seed in range(100)]
    assert all(success for success, _ in outcomes)
    assert np.mean([len(path) - 1 for _, path in outcomes]) < 25


def test_render_shows_agent_and_goal():
    env = at(-0.5, 0.5, render=True)
    before = env.render()
    assert before.shape == (192, 192, 3) and before.dtype == np.uint8
    blue = np.argwhere((before == (40, 90, 220)).all(-1)).mean(0)
    assert blue == pytest.approx((0.25 * 191, 0.25 * 191), abs=1)  # left, and in the upper half
    env.step(act(1.0, 1.0))
    assert (env.render() != before).any()
