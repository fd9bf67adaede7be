"""RLPD on chunks: its losses against closed forms, what its batches hold, and that it needs no clone."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import ogpo_state as og
from baselines import rlpd
from common import checkpoint, cli
from common.demos import Demos
from common.errors import UserError
from common.replay import ReplayBuffer
from common.rng import Rng
from common.runlog import read_metrics
from tests.helpers import definitions, demonstrated, differing, folders, new_agent, perturbed, slow, weights
from tests.warm import run_script

SHARED = {
    *("Info", "RECORDED", "TaskArgs", "CriticEnsemble", "best_of_n", "td_target", "critic_loss", "update_ema"),
}  # of ogpo_state.py: all that is neither the policy nor its clone
TINY = [
    *("--env", "toy", "--preset", "laptop", "--no-video", "--num-demos", "10", "--eval-episodes", "4"),
    *("--eval-interval-episodes", "4", "--actor-hidden", "16", "16", "--critic-hidden", "16", "16"),
    *("--start-training", "200", "--log-every", "100"),
]


def small_agent(**changes: object) -> tuple[Any, Any]:
    """Observations of 5 numbers, actions of 2, chunks of 4; policy and critics have moved a little."""
    agent, args = new_agent(rlpd, **dict(heads=3, critic_batch=32) | changes)
    for net in (agent.actor, agent.critic, agent.critic_ema):
        perturbed(net, 0.1)
    return agent, args


def collected(action: float = -0.5) -> ReplayBuffer:
    """Ten failures of 20 steps with one action."""
    buffer = ReplayBuffer(1_000, 5, 2, 4)
    for _ in range(10):
        buffer.add_episode(np.zeros((21, 5)), np.full((20, 2), action), -np.ones(20), False, False)
    return buffer


def law(agent: Any, obs: torch.Tensor) -> TransformedDistribution:
    mean, log_std = agent.actor(obs)
    return TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))


# --- what it shares, and its arguments --------------------------------------------------------------------------------


def test_environment_critics_and_arguments_are_the_text_of_ogpo_state() -> None:
    assert definitions(og).keys() - differing(og, rlpd) == SHARED
    for name, gone in (
        ("RunArgs", {"    variant:"}),
        ("CriticArgs", {"    next_samples:", "    calql", "    critic_w"}),
    ):
        ours, theirs = (definitions(module)[name].splitlines() for module in (rlpd, og))
        gone = tuple(gone | {"    critic_successes:"})
        assert [x for x in ours if "backup_entropy" not in x] == [x for x in theirs if not x.startswith(gone)]


@pytest.mark.parametrize("preset", ["laptop", "paper"])
@pytest.mark.parametrize("env", ["toy", "lift", "square", "transport", "pen", "pen-raw", "kitchen-mixed"])
def test_default_args_are_ogpos_but_for_the_method(preset: str, env: str) -> None:
    ours, theirs = cli.flatten(rlpd.default_args(env, preset)), cli.flatten(og.default_args(env, preset, "ogpo+ca"))
    share = 0.0 if env in ("pen-raw", "kitchen-mixed") else 0.5
    own = dict(demo_share=share, target_entropy=-0.5, alpha=0.1, alpha_lr=1e-3, backup_entropy=False)
    own |= dict(best_of_n=1, actor_lr=3e-4)
    assert {name: ours[name] for name in own} == own
    assert {k: v for k, v in ours.items() if k not in own} == {k: theirs[k] for k in ours.keys() - own.keys()}
    rlpd.check(ours)


def test_demonstrations_are_refused_where_success_is_not_the_only_reward() -> None:
    for env in ("kitchen-mixed", "pen-raw", "door-dense"):
        with pytest.raises(UserError, match="--demo-share"):
            rlpd.check(cli.flatten(rlpd.default_args(env)) | dict(demo_share=0.5))
    rlpd.check(cli.flatten(rlpd.default_args("toy")))


# --- policy -----------------------------------------------------------------------------------------------------------


def test_policy_starts_nearly_uniform() -> None:
    args = cli.override(rlpd.default_args("toy"), dict(actor_hidden=(32, 32)))
    agent = rlpd.Agent(args, 5, 2, torch.device("cpu"), None)
    action, log_prob = rlpd.draw_actions(agent, torch.randn(4_000, 5), agent.rng)
    assert action.shape == (4_000, 8) and log_prob.shape == (4_000,)
    most = 8 * math.log(2)  # the entropy of uniform numbers in (-1, 1)
    assert most - 0.6 < -log_prob.mean().item() < most and action.mean().abs() < 0.02
    assert agent.temperature["log"].item() == pytest.approx(math.log(0.1))


def test_draw_actions_is_a_tanh_normal() -> None:
    agent, _ = small_agent()
    obs, eps = torch.randn(6, 5), Rng(3, agent.rng.device).randn(6, 8)
    action, log_prob = rlpd.draw_actions(agent, obs, Rng(3, agent.rng.device))
    mean, log_std = agent.actor(obs)
    torch.testing.assert_close(action, (mean + log_std.exp() * eps).tanh())
    torch.testing.assert_close(log_prob, law(agent, obs).log_prob(action).sum(-1), rtol=1e-3, atol=1e-3)


def test_acting_policy_and_its_best_of_n() -> None:
    agent, args = small_agent(best_of_n=1)
    obs = torch.randn(4, 5)
    one = rlpd.act_best_of_n(agent, args, obs, Rng(1, agent.rng.device))
    assert one.shape == (4, 4, 2)
    assert torch.equal(one.flatten(1), rlpd.draw_actions(agent, obs, Rng(1, agent.rng.device))[0])
    args.policy.best_of_n = 5
    rows = obs.repeat_interleave(5, 0)
    action, _ = rlpd.draw_actions(agent, rows, Rng(1, agent.rng.device))
    best = agent.critic_ema(rows, action).mean(0).view(4, 5).argmax(1)
    got = rlpd.act_best_of_n(agent, args, obs, Rng(1, agent.rng.device)).flatten(1)
    assert torch.equal(got, action.view(4, 5, 8)[range(4), best]) and best.unique().numel() > 1
    noise_free = rlpd.act_mean(agent, args, obs, agent.rng).flatten(1)
    torch.testing.assert_close(noise_free, agent.actor(obs)[0].tanh())


# --- losses -----------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand() -> None:
    q, log_prob = torch.tensor([[1.0, 10.0], [3.0, -20.0]]), torch.tensor([2.0, -4.0])  # means 2, -5
    log_alpha = torch.tensor(0.5).log().requires_grad_()
    loss = rlpd.policy_loss(q, log_prob, log_alpha)
    assert loss.item() == pytest.approx((0.5 * 2 - 2 + 0.5 * -4 + 5) / 2) and not loss.requires_grad


@pytest.mark.parametrize("bonus", [False, True])
def test_update_critic_regresses_to_the_mean_of_the_target_heads(bonus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, args = small_agent(gamma=0.9, n_step=2, alpha=0.5, backup_entropy=bonus)
    batch = demonstrated().sample(32, np.random.default_rng(0), agent.rng.device, chunks=2)
    assert 0 < batch.terminated.sum() < 32
    action, log_prob = rlpd.draw_actions(agent, batch.next_obs, Rng(2, agent.rng.device))
    value = agent.critic_ema(batch.next_obs, action).mean(0) - (0.5 * log_prob if bonus else 0)
    want = [
        sum(0.9**i * r for i, r in enumerate(rewards.tolist())) + 0.9**steps * (1 - over) * v
        for rewards, steps, over, v in zip(
            batch.rewards, batch.steps.tolist(), batch.terminated.tolist(), value.tolist(), strict=True
        )
    ]
    seen, loss = [], rlpd.critic_loss
    monkeypatch.setattr(rlpd, "critic_loss", lambda *given: seen.append(given) or loss(*given))
    agent.rng = Rng(2, agent.rng.device)
    before = weights(agent.actor)
    rlpd.update_critic(agent, batch, args)
    critic, obs, executed, target = seen[0]
    assert critic is agent.critic and obs is batch.obs and torch.equal(executed, batch.actions.flatten(1))
    assert target.tolist() == pytest.approx(want, rel=1e-4) and not target.requires_grad
    assert torch.equal(before, weights(agent.actor)) and all(p.grad is None for p in agent.actor.parameters())


def test_update_actor_is_the_gradient_of_its_loss_and_moves_no_critic() -> None:
    agent, args = small_agent(alpha=0.3)
    obs = torch.randn(16, 5)
    before = weights(agent.critic)
    action, log_prob = rlpd.draw_actions(agent, obs, Rng(args.run.seed, agent.rng.device))
    loss = (0.3 * log_prob - agent.critic(obs, action).mean(0)).mean()
    want = torch.autograd.grad(loss, list(agent.actor.parameters()))
    info = rlpd.update_actor(agent, obs, args)
    assert info["actor_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for p, gradient in zip(agent.actor.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)
    assert torch.equal(before, weights(agent.critic)) and all(p.grad is None for p in agent.critic.parameters())
    gap = -log_prob.mean().item() + 4  # the target of 8 numbers is -4
    assert info["entropy_gap"].item() == pytest.approx(gap, rel=1e-4)
    assert math.copysign(1, math.log(0.3) - agent.temperature["log"].item()) == math.copysign(1, gap)


def test_policy_and_temperature_settle_where_the_soft_optimum_is() -> None:
    """Q = -k |a - 0.2|^2: a narrow normal around 0.2 of variance alpha / 2k, whose entropy is the target."""
    agent, args = small_agent(alpha=1.0, alpha_lr=2e-2, actor_lr=3e-3)
    agent.critic.forward = lambda obs, a: -20 * (a - 0.2).square().sum(-1).expand(3, -1)
    g = torch.Generator().manual_seed(0)
    for _ in range(700):
        info = rlpd.update_actor(agent, torch.randn(64, 5, generator=g), args)
    action, log_prob = rlpd.draw_actions(agent, torch.randn(500, 5, generator=g), agent.rng)
    assert action.mean().item() == pytest.approx(0.2, abs=0.03)
    assert -log_prob.mean().item() / 8 == pytest.approx(-0.5, abs=0.1)
    variance = math.exp(2 * -0.5) / (2 * math.pi * math.e)
    assert info["alpha"].item() == pytest.approx(40 * variance, rel=0.25)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.5, 16), (0.25, 8), (0.0, 0), (1.0, 32)])
def test_batches_hold_the_share_of_demonstrations(share: float, count: int) -> None:
    _, args = small_agent(demo_share=share, n_step=2)
    batch = rlpd.sample_both(collected(), demonstrated(), args, np.random.default_rng(0), torch.device("cpu"))
    assert batch.actions.shape == (32, 4, 2) and batch.rewards.shape == (32, 8) and len(batch.rows) == 32
    assert (batch.actions.mean((1, 2)) > 0).tolist() == [True] * count + [False] * (32 - count)
    assert batch.terminated[count:].sum() == 0 and (batch.terminated[:count].sum() > 0) == (count > 0)


def test_without_demonstrations_a_batch_is_the_buffers() -> None:
    _, args = small_agent(demo_share=0.5)  # none were read
    batch = rlpd.sample_both(collected(), None, args, np.random.default_rng(5), torch.device("cpu"))
    want = collected().sample(32, np.random.default_rng(5), torch.device("cpu"), chunks=args.critic.n_step)
    assert torch.equal(batch.rewards, want.rewards) and np.array_equal(batch.rows, want.rows)


def test_demonstrations_have_the_rewards_of_a_success() -> None:
    _, args = small_agent(reward_offset=-1.0, success_bonus=5.0)
    obs = np.arange(12 * 5, dtype=np.float32).reshape(12, 5)
    actions = np.linspace(-0.9, 0.9, 24, dtype=np.float32).reshape(12, 2)
    taught = rlpd.read_demos(Demos(obs, actions, np.array([5, 12]), "test"), args, 5, 2)
    assert taught.successes == 2 and taught.starts.size == (5 - 4 + 1) + (7 - 4 + 1)
    assert taught.rewards[:5].tolist() == [-1, -1, -1, -1, 5] and taught.rewards[6:13].tolist() == [*[-1] * 6, 5]
    assert np.array_equal(taught.actions[6:13], actions[5:])


def test_update_moves_everything_once_and_waits_for_nothing() -> None:
    agent, args = small_agent()
    order = []
    for name in ("actor", "critic", "temperature"):
        getattr(agent, f"{name}_opt").register_step_post_hook(lambda *_, name=name: order.append(name))
    info = rlpd.update(agent, collected(), demonstrated(), args, np.random.default_rng(0))
    assert order == ["critic", "actor", "temperature"] and agent.updates == 1
    assert {"td_loss", "q", "alpha", "entropy_gap", "actor_loss", "actor_grad", "critic_grad"} <= info.keys()
    assert all(x.numel() == 1 and math.isfinite(x) and not x.requires_grad for x in info.values())


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["0.5", slow("0")])
def test_rlpd_trains_evaluates_and_resumes(tmp_path: Path, share: str) -> None:
    script = rlpd.__file__
    run_script([script, *TINY, "--demo-share", share, "--total-steps", "300", *folders(tmp_path, "a")], check=0)
    assert any(tmp_path.glob("*.hdf5")) == (share != "0")  # plain SAC reads no demonstration
    run_script([script, "--resume", str(tmp_path / "a"), "--total-steps", "400"], check=0)
    done = run_script([script, "--eval", str(tmp_path / "a")], check=0)
    assert "acting policy: success" in done.stdout and "ODE policy: success" in done.stdout
    agent = checkpoint.load(tmp_path / "a" / "checkpoint.pt")["agent"]
    standardised = not torch.equal(agent["actor"]["obs_mean"], torch.zeros(6))
    assert standardised == (share != "0") and not (tmp_path / "a" / "cloned.pt").exists()
    rows = read_metrics(tmp_path / "a")
    assert rows[-1]["step"] == 400 and "final/act_success" in rows[-1]
    assert any(math.isfinite(row.get("ogpo/entropy_gap", math.nan)) for row in rows)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    script = rlpd.__file__
    run_script([script, *TINY, "--total-steps", "300", *folders(tmp_path, "a")], check=0)
    run_script([script, "--resume", str(tmp_path / "a"), "--total-steps", "400"], check=0)
    run_script([script, *TINY, "--total-steps", "400", *folders(tmp_path, "whole")], check=0)
    a, whole = (checkpoint.load(tmp_path / name / "checkpoint.pt")["agent"] for name in ("a", "whole"))
    assert whole["updates"] > 50
    for part in ("actor", "critic", "critic_ema", "temperature"):
        assert all(torch.equal(a[part][k], whole[part][k]) for k in whole[part]), part


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_rlpd_learns_the_toy_task_from_nothing(tmp_path: Path, seed: int) -> None:
    run_script([rlpd.__file__, "--env", "toy", "--no-video", "--seed", str(seed), *folders(tmp_path, "a")], check=0)
    assert read_metrics(tmp_path / "a")[-1]["final/act_success"] > 0.8
