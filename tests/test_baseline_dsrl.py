"""DSRL: its values by hand, what its updates move, and that it starts as OGPO does."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import ogpo_state as og
from baselines import dsrl
from common import checkpoint, cli
from common.errors import UserError
from common.ranges import check_ranges
from common.rng import Rng
from common.runlog import read_metrics
from settings.ogpo import SETTINGS
from tests.helpers import OPEN, TINY, definitions, demonstrated, differing, folders, new_agent, perturbed, weights
from tests.warm import run_script

OWN = {
    *("PolicyArgs", "ActorArgs", "CriticArgs", "RunArgs", "Args", "default_args", "COMPILED", "RECORDED"),
    *("TanhGaussian", "squash", "temperature_loss", "soft_value", "draw_actions", "draw_chains"),
    *("chain_log_prob", "group_advantage", "ppo_loss", "periodic_lr"),  # OGPO's alone
    *("Agent", "act_ode", "act_best_of_n", "update_temperature", "update_actor", "update_critic", "update"),
    *("pretrain", "main"),
}


def small_agent(obs_dim: int = 5, act_dim: int = 2, **changes: object) -> tuple[Any, Any]:
    """Observations of 5 numbers, actions of 2, chunks of 4, unless changed; the noise policy has moved a little."""
    values = dict(heads=3, critic_batch=32) | changes
    agent, args = new_agent(dsrl, obs_dim=obs_dim, act_dim=act_dim, **values)
    perturbed(agent.noise_policy, 0.1)
    return agent, args


def noise_of(agent: Any, obs: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tanh(u) and its log density by torch's own distributions."""
    mean, log_std = agent.noise_policy(obs)
    squashed = (mean + log_std.exp() * draws).tanh()
    normal = TransformedDistribution(Normal(mean.double(), log_std.exp().double()), TanhTransform())
    return squashed, normal.log_prob(squashed.double()).sum(-1).float()


# --- what it shares, and its arguments --------------------------------------------------------------------------------


def test_what_is_not_dsrl_is_the_text_of_ogpo_state() -> None:
    assert differing(og, dsrl) == OWN
    ours, theirs = (definitions(module)["RunArgs"].splitlines() for module in (dsrl, og))
    assert ours == [line for line in theirs if not line.startswith("    variant:")]


@pytest.mark.parametrize("preset", ["laptop", "paper"])
@pytest.mark.parametrize("env", ["toy", "lift", "square", "pen", "kitchen-mixed"])
def test_default_args_are_ogpo_s_but_for_the_method(preset: str, env: str) -> None:
    ours, theirs = cli.flatten(dsrl.default_args(env, preset)), cli.flatten(og.default_args(env, preset, "ogpo+ca"))
    assert (ours.pop("best_of_n"), ours.pop("actor_lr")) == (1, 3e-4)
    own = {"noise_range", "target_entropy", "alpha", "alpha_lr", "min_heads"}
    assert ours.keys() - theirs.keys() == own
    assert {k: v for k, v in ours.items() if k not in own} == {k: theirs[k] for k in ours.keys() - own}
    set_by_tables = {name for row in SETTINGS.values() for name in row}
    gone = theirs.keys() - ours.keys() - {"best_of_n", "actor_lr", "next_samples"}
    assert gone == {*(set_by_tables - ours.keys() - {"best_of_n", "actor_lr"}), "variant"}


def test_an_entropy_that_no_bounded_noise_has_is_refused() -> None:
    for value, good in ((math.log(2), False), (0.69, True), (-3.0, True)):
        args = cli.override(dsrl.default_args("toy"), dict(target_entropy=value))
        if good:
            check_ranges(dsrl.Args, cli.flatten(args))
        else:
            with pytest.raises(UserError, match="--target-entropy"):
                check_ranges(dsrl.Args, cli.flatten(args))


# --- the noise policy -------------------------------------------------------------------------------------------------


def test_squash_is_the_density_of_a_tanh_normal() -> None:
    torch.manual_seed(0)
    mean, log_std, eps = torch.randn(6, 3), 0.5 * torch.randn(6, 3), torch.randn(6, 3)
    y, log_prob = dsrl.squash(mean, log_std, eps)
    normal = TransformedDistribution(Normal(mean.double(), log_std.exp().double()), TanhTransform())
    torch.testing.assert_close(y, (mean + log_std.exp() * eps).tanh())
    torch.testing.assert_close(log_prob, normal.log_prob(y.double()).sum(-1).float(), rtol=1e-4, atol=1e-4)


def test_squash_far_from_zero_and_its_largest_entropy() -> None:
    far = torch.tensor([[30.0, -30.0]])
    y, log_prob = dsrl.squash(far, torch.zeros(1, 2), torch.zeros(1, 2))
    want = 2 * (-0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 30))
    assert y.tolist() == [[1.0, -1.0]] and log_prob.item() == pytest.approx(want, rel=1e-6)
    # u logistic with scale 1/2 is uniform after tanh; the normal nearest to it has nearly that entropy, and no more.
    eps = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    entropy = -dsrl.squash(torch.zeros(1), torch.tensor([math.log(0.87)]), eps)[1].mean()
    assert math.log(2) - 0.02 < entropy < math.log(2)


def test_noise_policy_starts_as_one_centred_noise_everywhere() -> None:
    args = cli.override(dsrl.default_args("toy"), dict(actor_hidden=(32, 32)))
    agent = dsrl.Agent(args, 5, 2, torch.device("cpu"), None)
    mean, log_std = agent.noise_policy(torch.randn(100, 5))
    assert mean.abs().max() < 0.1 and log_std.abs().max() < 0.1
    noise = args.policy.noise_range * dsrl.squash(mean, log_std, torch.randn(100, 8))[0]
    assert 0.8 < noise.std() < 1.1  # the clone was trained on 1


def test_decoded_normal_noise_is_the_clone_bit_for_bit() -> None:
    agent, args = small_agent()
    args_og = cli.override(og.default_args("toy", "laptop", "ogpo+ca"), dict(actor_hidden=(32, 32), chunk=4))
    theirs = og.Agent(args_og, 5, 2, torch.device("cpu"), None)
    assert torch.equal(weights(theirs.actor), weights(agent.actor))
    obs = torch.randn(7, 5)
    want = og.act_ode(theirs, args_og, obs, Rng(3, agent.rng.device))
    assert torch.equal(dsrl.act_ode(agent, args, obs, Rng(3, agent.rng.device)), want)
    noise = Rng(3, agent.rng.device).randn(7, 8)
    assert noise.abs().max() > args.policy.noise_range  # not clipped
    assert torch.equal(dsrl.sample_ode(agent.actor, obs, noise, 4).unflatten(1, (4, -1)), want)
    args_og.policy.best_of_n = 1  # gates closed: the noisy chain of OGPO
    want = og.act_best_of_n(theirs, args_og, obs, Rng(4, agent.rng.device))
    assert torch.equal(dsrl.act_best_of_n(agent, args, obs, Rng(4, agent.rng.device)), want)


def test_decoder_gets_b_tanh_u(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, args = small_agent(noise_range=2.5)
    agent.policy_gradient_on = True
    seen = []
    monkeypatch.setattr(dsrl, "sample_ode", lambda net, obs, x, k: seen.append((net, obs, x, k)) or x.clamp(-1, 1))
    obs, draws = torch.randn(3, 5), Rng(5, agent.rng.device).randn(6, 8)
    rows, action, log_prob = dsrl.draw_actions(agent, args, obs, 2, Rng(5, agent.rng.device))
    squashed, want = noise_of(agent, obs.repeat_interleave(2, 0), draws)
    net, given, noise, steps = seen[0]
    assert net is agent.actor and steps == args.policy.flow_steps and torch.equal(given, rows)
    torch.testing.assert_close(noise, 2.5 * squashed)
    torch.testing.assert_close(log_prob, want, rtol=1e-4, atol=1e-4)  # of tanh(u): without log b
    assert torch.equal(action, noise.clamp(-1, 1)) and rows.shape == (6, 5) and not action.requires_grad
    dsrl.act_ode(agent, args, obs, Rng(0, agent.rng.device))
    torch.testing.assert_close(seen[1][2], 2.5 * agent.noise_policy(obs)[0].tanh())
    dsrl.act_best_of_n(agent, args, obs, Rng(5, agent.rng.device))
    draws = Rng(5, agent.rng.device).randn(3, 8)
    torch.testing.assert_close(seen[2][2], 2.5 * noise_of(agent, obs, draws)[0])


def test_act_best_of_n_picks_by_the_target_critics() -> None:
    agent, args = small_agent(best_of_n=5, min_heads=0)
    perturbed(agent.critic_ema, 0.3)
    obs = torch.randn(4, 5)
    one = dsrl.act_best_of_n(agent, args, obs, Rng(1, agent.rng.device))  # before the critics can tell
    _, chain, _ = dsrl.draw_chains(agent, args, obs, 1, Rng(1, agent.rng.device))
    assert torch.equal(one.flatten(1), chain[:, -1].clamp(-1, 1))
    agent.best_of_n_on = agent.policy_gradient_on = True
    rows, action, _ = dsrl.draw_actions(agent, args, obs, 5, Rng(1, agent.rng.device))
    best = agent.critic_ema(rows, action).mean(0).view(4, 5).argmax(1)
    want = action.view(4, 5, 8)[range(4), best]
    assert torch.equal(dsrl.act_best_of_n(agent, args, obs, Rng(1, agent.rng.device)).flatten(1), want)
    assert best.unique().numel() > 1


# --- losses -----------------------------------------------------------------------------------------------------------


def test_soft_value_by_hand() -> None:
    q = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 0.0]])  # three heads, two states
    draws = torch.tensor([[0.1, 0.2], [0.9, 0.1], [0.5, 0.8]])  # the least draws: heads 0 and 2, heads 1 and 0
    log_prob, log_alpha = torch.tensor([2.0, -4.0]), torch.tensor(0.5).log().requires_grad_()
    value = dsrl.soft_value(q, draws, log_prob, log_alpha, 2)
    assert value.tolist() == pytest.approx([1 - 0.5 * 2, 10 + 0.5 * 4]) and not value.requires_grad
    assert dsrl.soft_value(q, draws, log_prob, log_alpha, 3).tolist() == pytest.approx([0.0, 2.0])
    assert dsrl.soft_value(q, draws, log_prob, log_alpha, 0).tolist() == pytest.approx([1.0, 12.0])


def test_temperature_loss_falls_above_the_target_and_rises_below() -> None:
    for log_prob, sign in ((-3.0, 1), (-1.0, -1), (-2.0, 0)):  # entropy 3, 1, 2
        log_alpha = torch.tensor(0.3, requires_grad=True)
        dsrl.temperature_loss(log_alpha, torch.full((4,), log_prob), 2.0).backward()
        assert log_alpha.grad.item() == pytest.approx(math.exp(0.3) * sign)


def test_update_critic_regresses_to_the_soft_target(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, args = small_agent(gamma=0.9, n_step=2, alpha=0.5, min_heads=3)
    perturbed(agent.critic_ema, 0.2)
    batch = demonstrated().sample(32, np.random.default_rng(0), agent.rng.device, chunks=2)
    assert 0 < batch.terminated.sum() < 32
    action, log_prob = dsrl.draw_actions(agent, args, batch.next_obs, 1, Rng(2, agent.rng.device))[1:]
    soft = agent.critic_ema(batch.next_obs, action).amin(0) - 0.5 * log_prob
    want = [
        sum(0.9**i * r for i, r in enumerate(rewards.tolist())) + 0.9**steps * (1 - over) * v
        for rewards, steps, over, v in zip(
            batch.rewards, batch.steps.tolist(), batch.terminated.tolist(), soft.tolist(), strict=True
        )
    ]
    seen = []
    loss = dsrl.critic_loss
    monkeypatch.setattr(dsrl, "critic_loss", lambda *given: seen.append(given) or loss(*given))
    agent.rng = Rng(2, agent.rng.device)
    dsrl.update_critic(agent, batch, args)
    (critic, obs, executed, target), _ = seen
    assert critic is agent.critic and obs is batch.obs and torch.equal(executed, batch.actions.flatten(1))
    assert target.tolist() == pytest.approx(want, rel=1e-4) and not target.requires_grad


def test_noise_critics_learn_their_own_head_on_normal_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, args = small_agent(noise_range=0.01)
    perturbed(agent.critic, 0.2)
    batch = demonstrated().sample(512, np.random.default_rng(0), agent.rng.device, chunks=3)
    seen = []
    loss = dsrl.critic_loss
    monkeypatch.setattr(dsrl, "critic_loss", lambda *given: seen.append(given) or loss(*given))
    dsrl.update_critic(agent, batch, args)
    net, obs, noise, q = seen[1]
    assert net is agent.noise_critic and obs is batch.obs and not q.requires_grad
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and noise.abs().max() > 3  # not within b
    with torch.no_grad():  # the critics as they are after their step
        want = agent.critic(obs, dsrl.sample_ode(agent.actor, obs, noise, args.policy.flow_steps))
    assert torch.equal(q, want) and q.shape == (3, 512)
    given = torch.randn(3, 512)
    agent.noise_critic.zero_grad()
    value, _ = loss(agent.noise_critic, obs, noise, given)
    heads = agent.noise_critic(obs, noise)
    torch.testing.assert_close(value, sum((heads[m] - given[m]).square().mean() for m in range(3)) / 3)


def test_noise_critics_become_the_critics_of_the_decoded_noise() -> None:
    """A toy of one number: with the critics held still, Q^W(s, w) is Q^A(s, F(s, w))."""
    sizes = dict(chunk=1, actor_hidden=(16, 16), critic_hidden=(64, 64), critic_scale=1.0)
    agent, args = small_agent(1, 1, **sizes)
    agent.critic_opt.param_groups[0]["lr"] = 0.0
    perturbed(agent.critic, 0.5)
    perturbed(agent.actor, 0.1)
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        obs = torch.randn(128, 1, generator=g)
        zeros = torch.zeros(128)
        batch = dsrl.Batch(obs, torch.zeros(128, 1, 1), zeros[:, None], zeros + 1, obs, zeros, np.arange(128))
        dsrl.update_critic(agent, batch, args)
    obs, w = torch.randn(1_000, 1, generator=g), torch.randn(1_000, 1, generator=g)
    with torch.no_grad():
        want = agent.critic(obs, dsrl.sample_ode(agent.actor, obs, w, args.policy.flow_steps))
        error = (agent.noise_critic(obs, w) - want).square().mean(1) / want.var(1)
    assert want.std(1).min() > 0.05 and error.max() < 0.02


def test_update_actor_is_the_gradient_of_its_loss_and_moves_nothing_else() -> None:
    agent, args = small_agent(alpha=0.3, min_heads=2, noise_range=2.0)
    perturbed(agent.noise_critic, 0.3)
    obs = torch.randn(16, 5)
    others = ("actor", "critic", "critic_ema", "noise_critic", "temperature")
    before = {name: weights(getattr(agent, name)) for name in others}
    rng = Rng(agent.rng.generator.initial_seed(), agent.rng.device)
    squashed, log_prob = noise_of(agent, obs, rng.randn(16, 8))
    q = agent.noise_critic(obs, 2.0 * squashed)
    pair = rng.rand(*q.shape).argsort(0)[:2]
    loss = (0.3 * log_prob - torch.minimum(*q.gather(0, pair))).mean()
    want = torch.autograd.grad(loss, list(agent.noise_policy.parameters()))
    info = dsrl.update_actor(agent, obs, args)
    assert info["actor_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    for p, gradient in zip(agent.noise_policy.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(before[name], weights(getattr(agent, name))) for name in others)
    assert all(p.grad is None for name in others for p in getattr(agent, name).parameters())


def entropy_after(pull: float, steps: int, log_std: float = -1.0) -> tuple[float, float]:
    """Entropy per number and alpha, after steps of temperature and policy under noise critics -pull |w|^2."""
    agent, args = small_agent(noise_range=1.0, alpha=1.0, alpha_lr=2e-2, actor_lr=3e-3, target_entropy=0.0)
    with torch.no_grad():
        agent.noise_policy.out.bias[8:] = log_std
    agent.noise_critic.forward = lambda obs, w: -pull * w.square().sum(-1).expand(3, -1)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        obs = torch.randn(64, 5, generator=g)
        dsrl.update_temperature(agent, obs, args)
        dsrl.update_actor(agent, obs, args)
    log_prob = dsrl.draw_actions(agent, args, torch.randn(500, 5, generator=g), 1, agent.rng)[2]
    return -log_prob.mean().item() / 8, agent.temperature["log"].exp().item()


def test_the_entropy_settles_at_its_target_where_the_critics_want_less() -> None:
    entropy, alpha = entropy_after(pull=3.0, steps=800)
    # Of a normal with entropy 0 the variance is 1 / (2 pi e); exp(-3 w^2 / alpha) has it at alpha = 6 / (2 pi e).
    assert abs(entropy) < 0.08 and alpha == pytest.approx(6 / (2 * math.pi * math.e), rel=0.25)


def test_the_entropy_rises_above_its_target_where_the_critics_are_constant() -> None:
    """The target is a floor: nothing pulls the policy down, and alpha falls."""
    entropy, alpha = entropy_after(pull=0.0, steps=300)
    assert entropy > 0.3 and alpha < 0.5


# --- training ---------------------------------------------------------------------------------------------------------


def test_update_waits_then_makes_each_step_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, args = small_agent(critic_warmup=2, critic_successes=10)
    buffer, rng, order = demonstrated(), np.random.default_rng(0), []
    frozen, policy = weights(agent.actor), weights(agent.noise_policy)
    for name in ("temperature", "critic", "noise_critic", "noise_policy"):
        optimizer = getattr(agent, f"{name}_opt")
        optimizer.register_step_post_hook(lambda *_, name=name: order.append(name))
    for _ in range(2):
        info = dsrl.update(agent, buffer, args, rng)
        assert "alpha" not in info and not agent.policy_gradient_on
    assert order == ["critic", "noise_critic"] * 2 and torch.equal(policy, weights(agent.noise_policy))
    assert agent.best_of_n_on
    info = dsrl.update(agent, buffer, args, rng)
    assert order[4:] == ["temperature", "critic", "noise_critic", "noise_policy"] and agent.policy_gradient_on
    assert {"alpha", "entropy_gap", "steered", "actor_grad", "noise_critic_loss", "td_loss"} <= info.keys()
    assert all(value.numel() == 1 and math.isfinite(value) for value in info.values())
    assert torch.equal(frozen, weights(agent.actor)) and not torch.equal(policy, weights(agent.noise_policy))


def test_update_critic_with_cal_ql_scores_the_noise_policy_s_chunks() -> None:
    agent, args = small_agent()
    batch = demonstrated().sample(32, np.random.default_rng(0), agent.rng.device)
    low, high = (dsrl.update_critic(agent, batch, args, torch.full((32,), r))["calql"] for r in (-1e3, 1e3))
    assert low == pytest.approx(math.log(8), abs=0.5)  # nearly equal values: the log of their number
    assert high > 900  # no chunk is pushed below the return


def test_dsrl_trains_resumes_and_evaluates(tmp_path: Path) -> None:
    run_script([dsrl.__file__, *TINY, *OPEN, "--total-steps", "300", *folders(tmp_path, "a")], check=0)
    run_script([dsrl.__file__, "--resume", str(tmp_path / "a"), "--total-steps", "400"], check=0)
    done = run_script([dsrl.__file__, "--eval", str(tmp_path / "a")], check=0)
    assert "acting policy: success" in done.stdout and "ODE policy: success" in done.stdout
    agent, cloned = (checkpoint.load(tmp_path / "a" / name) for name in ("checkpoint.pt", "cloned.pt"))
    agent = agent["agent"]
    assert all(torch.equal(agent["actor"][k], cloned[k]) for k in cloned)  # frozen
    assert agent["policy_gradient_on"] and agent["temperature"]["log"] != math.log(0.1)
    rows = read_metrics(tmp_path / "a")
    assert rows[-1]["step"] == 400 and "final/act_success" in rows[-1]


@pytest.mark.slow
def test_dsrl_resumes_exactly(tmp_path: Path) -> None:
    for name, steps in (("a", "300"), ("whole", "400")):
        run_script([dsrl.__file__, *TINY, *OPEN, "--total-steps", steps, *folders(tmp_path, name)], check=0)
    run_script([dsrl.__file__, "--resume", str(tmp_path / "a"), "--total-steps", "400"], check=0)
    a, whole = (checkpoint.load(tmp_path / name / "checkpoint.pt")["agent"] for name in ("a", "whole"))
    for part in ("actor", "critic", "critic_ema", "noise_critic", "noise_policy", "temperature"):
        assert all(torch.equal(a[part][k], whole[part][k]) for k in whole[part]), part


@pytest.mark.slow
def test_first_episodes_are_those_of_ogpo(tmp_path: Path) -> None:
    """Same clone, same critics, same steps, up to the first update."""
    flags = [*TINY, "--start-training", "300", "--total-steps", "300", "--update-every", "400"]
    for name, script in (("ours", dsrl), ("theirs", og)):
        run_script([script.__file__, *flags, *folders(tmp_path, name)], check=0)
    ours, theirs = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("ours", "theirs"))
    for part in ("actor", "critic"):
        assert all(torch.equal(ours["agent"][part][k], theirs["agent"][part][k]) for k in theirs["agent"][part])
    assert len(ours["buffer"]["obs"]) > 200
    for name in ("obs", "actions", "rewards", "terminated"):
        assert torch.equal(ours["buffer"][name], theirs["buffer"][name])


@pytest.mark.slow
def test_a_start_with_cal_ql_opens_the_gates(tmp_path: Path) -> None:
    flags = [*TINY, "--calql-steps", "3", "--start-training", "220", "--total-steps", "220"]
    run_script([dsrl.__file__, *flags, *folders(tmp_path, "a")], check=0)
    agent = checkpoint.load(tmp_path / "a" / "checkpoint.pt")["agent"]
    assert agent["calql_step"] == 3 and agent["policy_gradient_on"] and agent["best_of_n_on"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_dsrl_learns_the_toy_task(tmp_path: Path, seed: int) -> None:
    run_script([dsrl.__file__, "--env", "toy", "--no-video", "--seed", str(seed), *folders(tmp_path, "a")], check=0)
    rows = read_metrics(tmp_path / "a")
    cloned = next(row["eval/ode_success"] for row in rows if "eval/ode_success" in row)
    assert rows[-1]["final/act_success"] > max(cloned + 0.25, 0.8)
