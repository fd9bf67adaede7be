"""QAM and TRQAM: adjoint matching against closed forms, what its updates move, and that it starts as OGPO does."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ogpo_state as og
from baselines import qam
from common import checkpoint, cli
from common.rng import Rng
from common.runlog import read_metrics
from settings.ogpo import SETTINGS
from tests.helpers import OPEN, TINY, definitions, demonstrated, differing, folders, new_agent, perturbed, weights
from tests.helpers import slow as slow_case
from tests.warm import run_script

OWN = {
    *("RunArgs", "PolicyArgs", "ActorArgs", "CriticArgs", "default_args", "COMPILED"),
    *("GRAD_CLIP", "(DUAL_SCALE, DUAL_RATE, DUAL_RANGE)", "(DIVERGENCE_EMA, DIVERGENCE_CLIP)"),
    *("memoryless_schedule", "memoryless_chain", "lean_adjoint", "matching_loss", "dual_step"),
    *("chain_log_prob", "best_of_n", "group_advantage", "ppo_loss", "periodic_lr"),  # OGPO's alone
    *("Agent", "draw_chains", "act_best_of_n", "update_actor", "update_critic", "update", "pretrain", "main"),
}


def small_agent(**changes: object) -> tuple[Any, Any]:
    """Observations of 5 numbers, actions of 2, chunks of 4; the fast flow and the critics have moved a little."""
    agent, args = new_agent(qam, **dict(heads=3, critic_batch=32, states=16) | changes)
    agent.slow.load_state_dict(agent.actor.state_dict())
    perturbed(agent.actor, 0.05)
    perturbed(agent.critic_ema, 0.1)
    return agent, args


class Gaussian(nn.Module):
    """The flow from N(0, 1) to N(mean, std^2) in closed form, and an affine change at N times that can be learnt."""

    def __init__(self, mean: float, std: float, steps: int = 0) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.change = nn.Parameter(torch.zeros(steps, 2, dtype=torch.float64)) if steps else None

    def embed(self, t: Tensor) -> Tensor:
        return t[..., None].double()

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        slope = (t * self.std**2 - (1 - t)) / ((t * self.std) ** 2 + (1 - t) ** 2)
        v = self.mean + slope * (x - t * self.mean)
        if self.change is None:
            return v
        row = self.change[(t[..., 0] * len(self.change)).round().long()]  # (..., 2)
        return v + row[..., :1] * x + row[..., 1:]


def best_change(steps: int, mean: float, std: float, pull: float, goal: float, eta: float) -> Tensor:
    """The optimum of `matching_loss` under Q = -pull (a - goal)^2 / 2, (N, 2): by recursion from the chain's end.

    E[x_N | x_k] = r x_k + c, so the wanted v_f - v_s = -sigma^2 / 2 E[g_k | x_k] is affine too; v_f moves r and c.
    """
    h, carried, out = 1 / steps, 1.0, []
    slope = lambda t: (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t) ** 2)  # noqa: E731
    for k in reversed(range(steps)):
        t = k / steps
        a, b = slope(t), mean * (1 - t * slope(t))
        carried *= 1 + h * (2 * slope(t + h) - 1 / (t + h))
        weight = (1 - t + h) / (t + h) * carried * eta * pull
        if k == steps - 1:
            r, c = 1 + h * a, h * b
            da, db = -weight * r, -weight * (c - goal)
        else:  # change = -weight (r (keep x + 2 h (a x + b + change)) + c - goal)
            keep, scale = 1 - h / (t + h), 1 + 2 * h * weight * r
            da, db = -weight * r * (keep + 2 * h * a) / scale, -weight * (2 * h * r * b + c - goal) / scale
            r, c = r * (keep + 2 * h * (a + da)), r * 2 * h * (b + db) + c
        out.append((da, db))
    return torch.tensor(out[::-1], dtype=torch.float64)


def ends(fast: Gaussian, steps: int) -> tuple[float, float]:
    """Mean and deviation of the noise-free flow's end: it is affine, so two starts tell both."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for k in range(steps):
        x = x + fast(x, x, fast.embed(torch.tensor(k / steps))) / steps
    return x[0].item(), (x[1] - x[0]).item()


def match(fast: Any, slow: Any, obs: Tensor, noise: Tensor, pull: float, goal: float, eta: float) -> Tensor:
    with torch.no_grad():
        chain = qam.memoryless_chain(fast, slow, obs, noise)
    adjoint = qam.lean_adjoint(slow, obs, chain, eta * pull * (chain[:, -1] - goal))
    return qam.matching_loss(fast, slow, obs, chain, adjoint)[0]


# --- what it shares ---------------------------------------------------------------------------------------------------


def test_what_is_not_qam_is_the_text_of_ogpo_state() -> None:
    assert differing(og, qam) == OWN
    ours, theirs = (definitions(module)["RunArgs"].splitlines() for module in (qam, og))
    assert ours == [line for line in theirs if not line.startswith("    variant:")]


@pytest.mark.parametrize("preset", ["laptop", "paper"])
@pytest.mark.parametrize("env", ["toy", "lift", "square", "pen", "kitchen-mixed"])
def test_default_args_are_ogpo_s_but_for_the_method(preset: str, env: str) -> None:
    ours, theirs = cli.flatten(qam.default_args(env, preset)), cli.flatten(og.default_args(env, preset, "ogpo+ca"))
    assert (ours.pop("best_of_n"), ours.pop("actor_lr")) == (1, 3e-4)
    own = {"budget", "inv_temp", "adjoint_steps", "base", "pessimism"}
    assert ours.keys() - theirs.keys() == own
    assert {k: v for k, v in ours.items() if k not in own} == {k: theirs[k] for k in ours.keys() - own}
    set_by_tables = {name for row in SETTINGS.values() for name in row}
    gone = theirs.keys() - ours.keys() - {"best_of_n", "actor_lr", "next_samples"}
    assert gone == {*(set_by_tables - ours.keys() - {"best_of_n", "actor_lr"}), "variant"}


# --- adjoint matching -------------------------------------------------------------------------------------------------


def test_memoryless_schedule_by_hand() -> None:
    times, sigmas = qam.memoryless_schedule(4, torch.device("cpu"))
    assert times.tolist() == [0, 0.25, 0.5, 0.75]
    assert sigmas.square().tolist() == pytest.approx([10, 4, 2, 1])


def test_memoryless_chain_by_hand() -> None:
    """N = 2, v_f = 1, v_s = 3: x_1 = x_0 + (2 - 2 x_0) / 2 + sqrt(6 / 2) e, x_2 = x_1 + 3 / 2 without noise."""
    fast, slow = Gaussian(0, 1), Gaussian(0, 1)
    fast.forward, slow.forward = (lambda obs, x, t, v=v: torch.full_like(x, v) for v in (1.0, 3.0))
    noise = torch.tensor([[[0.4], [0.5]]], dtype=torch.float64)
    chain = qam.memoryless_chain(fast, slow, torch.zeros(1, 1), noise)
    first = 1 + math.sqrt(3) * 0.5
    assert chain.flatten().tolist() == pytest.approx([0.4, first, first + 1.5])


def test_the_chain_of_a_gaussian_flow_ends_in_its_gaussian_and_forgets_its_start() -> None:
    flow, g = Gaussian(0.3, 0.5), torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 100, 1, generator=g, dtype=torch.float64)
    chain = qam.memoryless_chain(flow, flow, noise[:, 0], noise)
    end = chain[:, -1, 0]
    assert end.mean().item() == pytest.approx(0.3, abs=0.02) and end.std().item() == pytest.approx(0.5, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([noise[:, 0, 0], end]))[0, 1]) < 0.03
    ode = qam.sample_ode(flow, noise[:, 0], noise[:, 0], 100)[:, 0]
    assert torch.corrcoef(torch.stack([noise[:, 0, 0], ode]))[0, 1] > 0.9  # which the noise-free flow does not


def test_lean_adjoint_is_autograd_through_the_whole_chain() -> None:
    """Where both flows are one; each step is written with the drift's later time, as the adjoint has it."""
    torch.manual_seed(0)
    slow, obs, steps = qam.VelocityNet(3, (16, 16), torch.zeros(2), torch.ones(2)), torch.randn(6, 2), 5
    noise = torch.randn(6, steps, 3)
    states = [torch.randn(6, 3, requires_grad=True)]
    for k in range(steps):
        later = torch.tensor((k + 1) / steps)
        drift = 2 * slow(obs, states[k], slow.embed(later)) - states[k] / later
        states.append(states[k] + drift / steps + noise[:, k])
    q = (states[-1].sin() * torch.tensor([1.0, -2.0, 3.0])).sum()
    want = torch.autograd.grad(-2 * q, states)  # with eta 2
    got = qam.lean_adjoint(slow, obs, torch.stack(states, 1).detach(), want[-1])
    torch.testing.assert_close(got, torch.stack(want[:-1], 1), rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in slow.parameters())


def test_lean_adjoint_of_a_gaussian_flow_by_hand() -> None:
    """N = 2, standard normal: v(x, 1/2) = 0, v(x, 1) = x; J_1 = 2 - 1, J_0 = 0 - 2."""
    flow, chain = Gaussian(0, 1), torch.randn(3, 3, 1, dtype=torch.float64)
    end = torch.tensor([[1.0], [2.0], [-4.0]], dtype=torch.float64)
    got = qam.lean_adjoint(flow, chain[:, 0], chain, end)
    torch.testing.assert_close(got[:, 1], 1.5 * end)
    torch.testing.assert_close(got[:, 0], torch.zeros_like(end))


def test_matching_loss_and_nats_by_hand() -> None:
    """N = 4 and a constant change of 1 in both of two numbers: noise moved by 2 / sigma, sigma^2 = 10, 4, 2, 1."""
    slow, fast, chain = Gaussian(0, 1), Gaussian(0, 1, 4), torch.randn(5, 5, 2, dtype=torch.float64)
    with torch.no_grad():
        fast.change[:, 1] = 1.0
    adjoint = torch.full((5, 4, 2), 0.5, dtype=torch.float64)
    loss, nats = qam.matching_loss(fast, slow, chain[:, 0], chain, adjoint)
    assert loss.item() == pytest.approx(2 * sum((2 / s + s / 2) ** 2 for s in map(math.sqrt, (10, 4, 2, 1))), rel=1e-5)
    # Of normals with deviation sqrt(h) sigma whose means differ by 2 h: (2 h)^2 / (2 h sigma^2) each.
    assert nats.item() == pytest.approx(2 * sum(0.5 / s for s in (10, 4, 2, 1)), rel=1e-5) and not nats.requires_grad


def test_without_eta_the_slow_flow_is_a_fixed_point_without_loss() -> None:
    torch.manual_seed(0)
    slow = qam.VelocityNet(3, (16,), torch.zeros(2), torch.ones(2))
    fast = qam.VelocityNet(3, (16,), torch.zeros(2), torch.ones(2))
    fast.load_state_dict(slow.state_dict())
    obs, chain = torch.randn(6, 2), torch.randn(6, 5, 3)
    adjoint = qam.lean_adjoint(slow, obs, chain, torch.zeros(6, 3))
    loss, nats = qam.matching_loss(fast, slow, obs, chain, adjoint)
    loss.backward()
    assert loss.item() == nats.item() == 0 and all(p.grad.abs().max() == 0 for p in fast.parameters())
    assert all(p.grad is None for p in slow.parameters())


@pytest.mark.parametrize("std", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("tilt", [0.3, 1.0, 3.0])  # eta pull std^2: how narrow the tilt is, by the flow's own measure
def test_the_optimum_is_the_gaussian_tilted_by_exp_eta_q(std: float, tilt: float) -> None:
    mean, pull, goal, eta = -0.2, 2.0, 0.7, tilt / (2.0 * std**2)
    fast = Gaussian(mean, std, 500)
    with torch.no_grad():
        fast.change.copy_(best_change(500, mean, std, pull, goal, eta))
        got = ends(fast, 500)
    variance = 1 / (1 / std**2 + eta * pull)
    want = (variance * (mean / std**2 + eta * pull * goal), math.sqrt(variance))
    assert got == pytest.approx(want, rel=0.02, abs=0.005)


def test_matching_loss_has_no_gradient_at_that_optimum() -> None:
    steps, slow, g = 10, Gaussian(-0.2, 0.5), torch.Generator().manual_seed(0)
    best = best_change(steps, -0.2, 0.5, 2.0, 0.7, 1.5)
    noise = torch.randn(40, 1_000, steps, 1, generator=g, dtype=torch.float64)
    for scale, near in ((1.0, True), (0.7, False)):
        gradients = []
        for part in noise:
            fast = Gaussian(-0.2, 0.5, steps)
            with torch.no_grad():
                fast.change.copy_(scale * best)
            match(fast, slow, part[:, 0], part, 2.0, 0.7, 1.5).backward()
            gradients.append(fast.change.grad)
        all_of = torch.stack(gradients)  # (40, N, 2); the last step has no noise, and rounding alone is left of it
        off = all_of.mean(0).abs() / (4.5 * all_of.std(0) / math.sqrt(len(noise)) + 1e-4)
        assert (off.max() < 1) if near else (off.max() > 10), off


def test_descent_on_matching_loss_finds_that_optimum() -> None:
    steps, slow, fast, g = 10, Gaussian(-0.2, 0.5), Gaussian(-0.2, 0.5, 10), torch.Generator().manual_seed(0)
    best = best_change(steps, -0.2, 0.5, 2.0, 0.7, 1.5)
    optimizer = torch.optim.Adam(fast.parameters(), lr=0.05)
    for i in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 300)
        noise = torch.randn(512, steps, 1, generator=g, dtype=torch.float64)
        loss = match(fast, slow, noise[:, 0], noise, 2.0, 0.7, 1.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(fast.change.detach(), best, rtol=0.05, atol=0.05)
    wanted = Gaussian(-0.2, 0.5, steps)
    with torch.no_grad():
        wanted.change.copy_(best)
    assert ends(fast, steps) == pytest.approx(ends(wanted, steps), abs=0.02)
    assert ends(fast, steps)[0] > ends(slow, steps)[0] + 0.3


def test_too_few_adjoint_steps_turn_the_sign_for_a_narrow_policy() -> None:
    """Why --adjoint-steps is not --flow-steps: of a policy of width 0.2 that Q wants 0.23 higher, four go down."""
    moved = {}
    for steps in (4, 10, 20):
        fast = Gaussian(0.0, 0.2, steps)
        with torch.no_grad():
            fast.change.copy_(best_change(steps, 0.0, 0.2, 1.0, 1.0, 0.3 / 0.2**2))
            moved[steps] = ends(fast, steps)[0]
    assert moved[4] < 0 and moved[10] == pytest.approx(0.23, abs=0.1) and moved[20] == pytest.approx(0.23, abs=0.05)


def test_dual_step_by_hand() -> None:
    step = lambda dual, x: qam.dual_step(torch.tensor(dual), torch.tensor(x), 0.5).tolist()  # noqa: E731
    assert step([1.0, 0.5], 0.0) == pytest.approx([1 - 0.01 * 0.05, 0.45])
    assert step([1.0, 0.5], 0.7) == pytest.approx([1 + 0.01 * 0.02, 0.52])
    assert step([1.0, 0.5], 50.0) == step([1.0, 0.5], 1.0) == pytest.approx([1 + 0.01 * 0.05, 0.55])  # two budgets
    assert step([0.01, 0.0], 0.0) == pytest.approx([0.01, 0.0]) and step([100.0, 1.0], 1.0)[0] == 100


# --- acting and updates -----------------------------------------------------------------------------------------------


def test_it_acts_as_ogpo_s_single_chain_until_the_fast_flow_may_move() -> None:
    agent, args = small_agent(best_of_n=1)
    other, other_args = og.Agent(args_of_ogpo(), 5, 2, torch.device("cpu"), None), args_of_ogpo()
    other.actor_ema.load_state_dict(agent.slow.state_dict())
    obs = torch.randn(7, 5)
    a, b = (Rng(3, torch.device("cpu")) for _ in range(2))
    assert torch.equal(qam.act_best_of_n(agent, args, obs, a), og.act_best_of_n(other, other_args, obs, b))
    assert torch.equal(a.randn(3), b.randn(3))
    agent.policy_gradient_on = True
    a, b = (Rng(3, torch.device("cpu")) for _ in range(2))
    assert torch.equal(qam.act_best_of_n(agent, args, obs, a), qam.act_ode(agent, args, obs, b))


def args_of_ogpo() -> Any:
    return cli.override(og.default_args("toy"), dict(actor_hidden=(32, 32), critic_hidden=(32, 32), best_of_n=1))


@pytest.mark.parametrize("opened", [False, True])
def test_best_of_n_takes_the_candidate_with_the_highest_mean(opened: bool) -> None:
    agent, args = small_agent(best_of_n=6)
    agent.best_of_n_on, agent.policy_gradient_on = True, opened
    obs = torch.randn(9, 5)
    a, b = (Rng(3, torch.device("cpu")) for _ in range(2))
    got = qam.act_best_of_n(agent, args, obs, a).flatten(1)
    rows = obs.repeat_interleave(6, 0)
    if opened:
        candidates = qam.act_ode(agent, args, rows, b).flatten(1)
    else:
        candidates = qam.draw_chains(agent, args, obs, 6, b)[1][:, -1].clamp(-1, 1)
    with torch.no_grad():
        q = agent.critic_ema(rows, candidates).mean(0).view(9, 6)
    assert torch.equal(got, candidates.view(9, 6, -1)[torch.arange(9), q.argmax(-1)])


@pytest.mark.parametrize("inv_temp", [0.0, 3.0])
def test_update_actor_is_the_gradient_of_the_authors_loss_and_moves_nothing_else(inv_temp: float) -> None:
    agent, args = small_agent(inv_temp=inv_temp, adjoint_steps=5, budget=0.1)
    agent.dual.copy_(torch.tensor([2.0, 0.3]))
    before = {name: weights(getattr(agent, name)) for name in ("slow", "critic", "critic_ema")}
    obs, h = torch.randn(16, 5), 0.2
    noise = Rng(agent.rng.generator.initial_seed(), agent.rng.device).randn(16, 5, 8)
    with torch.no_grad():
        chain = qam.memoryless_chain(agent.actor, agent.slow, obs, noise)
    end = chain[:, -1].clone().requires_grad_()
    slope = torch.autograd.grad(agent.critic_ema(obs, end.clamp(-1, 1)).mean(0).sum(), end)[0]
    assert ((slope == 0) == (end.abs() > 1)).all() and 0 < (slope == 0).float().mean() < 1
    # TRQAM: no eta in the adjoint, sigma / sqrt(3 lambda) in the loss. QAM: eta in the adjoint.
    adjoint = qam.lean_adjoint(agent.slow, obs, chain, -(inv_temp or 1.0) * slope)
    times = torch.arange(5)[:, None] * h
    sigma = (2 * (1 - times + h) / (times + h)).sqrt()
    scaled = sigma if inv_temp else sigma / math.sqrt(6.0)
    change = [net(obs[:, None], chain[:, :-1], net.embed(times[:, 0])) for net in (agent.actor, agent.slow)]
    change = change[0] - change[1].detach()
    loss = (2 * change / scaled + scaled * adjoint).square().sum((1, 2)).mean()
    gradient = torch.autograd.grad(loss, list(agent.actor.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    info = qam.update_actor(agent, obs, None, args)
    assert info["actor_grad"].item() == pytest.approx(norm.item(), rel=1e-3) and norm > 1
    for p, g in zip(agent.actor.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, g / norm, rtol=1e-3, atol=1e-5)
    nats = (2 * h / sigma.square() * change.square()).sum((1, 2)).mean().item() / 4
    assert info["divergence"].item() == pytest.approx(nats, rel=1e-4)
    assert info["inv_temp"].item() == pytest.approx(inv_temp or 1 / 6)
    average = 0.27 + 0.1 * min(nats, 0.2)
    assert agent.dual.tolist() == pytest.approx([2 + 0.01 * (average - 0.1), average], rel=1e-5)
    assert all(torch.equal(before[name], weights(getattr(agent, name))) for name in before)
    assert all(p.grad is None for name in before for p in getattr(agent, name).parameters())


def test_update_actor_with_successes_also_clones_them_with_the_slow_flow() -> None:
    agent, args = small_agent()
    success = demonstrated().sample(64, np.random.default_rng(0), agent.rng.device, success=True)
    losses = [qam.update_actor(agent, success.obs, success, args)["bc_loss"].item() for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])


def test_the_target_is_the_mean_of_the_heads_minus_half_a_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, args = small_agent(pessimism=0.5)
    agent.critic_ema.forward = lambda obs, action: torch.tensor([[1.0], [2.0], [6.0]]).expand(3, len(obs))
    seen = []
    monkeypatch.setattr(qam, "critic_loss", lambda *args: (seen.append(args[-1]), og.critic_loss(*args))[1])
    batch = demonstrated().sample(32, np.random.default_rng(0), agent.rng.device)
    qam.update_critic(agent, batch, args)
    value = 3 - 0.5 * math.sqrt((4 + 1 + 9) / 3)
    powers = 0.95 ** torch.arange(batch.rewards.shape[1])
    want = (batch.rewards * powers).sum(-1) + 0.95**batch.steps * (1 - batch.terminated) * value
    torch.testing.assert_close(seen[0], want)


def test_update_critic_with_cal_ql_scores_the_fast_flow_s_chunks() -> None:
    agent, args = small_agent()
    batch = demonstrated().sample(32, np.random.default_rng(0), agent.rng.device)
    low, high = (qam.update_critic(agent, batch, args, torch.full((32,), r))["calql"] for r in (-1e3, 1e3))
    assert low == pytest.approx(math.log(8), abs=0.5)  # nearly equal values: the log of their number
    assert high > 900  # no chunk is pushed below the return


@pytest.mark.parametrize("base", ["frozen", "successes"])
def test_update_waits_for_the_gates_and_trains_the_slow_flow_only_on_demand(base: str) -> None:
    agent, args = small_agent(critic_warmup=2, critic_successes=10, base=base, success_min=10)
    buffer, rng = demonstrated(), np.random.default_rng(0)
    fast, slow = weights(agent.actor), weights(agent.slow)
    for _ in range(2):
        assert "matching_loss" not in qam.update(agent, buffer, args, rng) and not agent.policy_gradient_on
    assert torch.equal(fast, weights(agent.actor)) and agent.best_of_n_on
    info = qam.update(agent, buffer, args, rng)
    assert agent.policy_gradient_on and {"inv_temp", "divergence", "moved", "td_loss", "actor_grad"} <= info.keys()
    assert all(value.numel() == 1 and math.isfinite(value) for value in info.values())
    assert not torch.equal(fast, weights(agent.actor))
    assert torch.equal(slow, weights(agent.slow)) == (base == "frozen") == ("bc_loss" not in info)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_lambda_keeps_the_divergence_at_its_budget_whatever_the_size_of_q(scale: float) -> None:
    agent, args = small_agent(budget=0.3, states=64)
    agent.actor.load_state_dict(agent.slow.state_dict())
    agent.critic_ema.forward = lambda obs, action: -scale * (action - 0.5).square().sum(-1).expand(3, -1)
    g, seen = torch.Generator().manual_seed(0), []
    for _ in range(1_200):
        seen.append(qam.update_actor(agent, torch.randn(64, 5, generator=g), None, args)["divergence"].item())
    assert np.mean(seen[-200:]) == pytest.approx(0.3, rel=0.15)


# --- training ---------------------------------------------------------------------------------------------------------


SUCCEEDING = ["--num-demos", "40", "--bc-steps", "200", "--bc-eval-every", "200", "--actor-hidden", "64", "64"]


@pytest.mark.parametrize(
    "mode",
    [
        [*SUCCEEDING, "--base", "successes", "--success-min", "1"],
        slow_case(["--inv-temp", "1"]),
        slow_case([]),
    ],
)
def test_qam_trains_resumes_exactly_and_evaluates(tmp_path: Path, mode: list[str]) -> None:
    script = qam.__file__
    flags = [script, *TINY, *OPEN, *mode, "--log-every", "100", "--total-steps"]
    run_script([*flags, "300", *folders(tmp_path, "a")], check=0)
    run_script([script, "--resume", str(tmp_path / "a"), "--total-steps", "400"], check=0)
    run_script([*flags, "400", *folders(tmp_path, "whole")], check=0)
    done = run_script([script, "--eval", str(tmp_path / "a")], check=0)
    assert "acting policy: success" in done.stdout and "ODE policy: success" in done.stdout
    a, whole = (checkpoint.load(tmp_path / name / "checkpoint.pt")["agent"] for name in ("a", "whole"))
    for part in ("actor", "slow", "critic", "critic_ema"):
        assert all(torch.equal(a[part][k], whole[part][k]) for k in whole[part]), part
    assert torch.equal(a["dual"], whole["dual"]) and a["dual"][0] != 1
    cloned = checkpoint.load(tmp_path / "a" / "cloned.pt")
    assert not all(torch.equal(a["actor"][k], cloned[k]) for k in cloned)
    assert all(torch.equal(a["slow"][k], cloned[k]) for k in cloned) == ("--base" not in mode)
    rows = read_metrics(tmp_path / "a")
    assert rows[-1]["step"] == 400 and "final/act_success" in rows[-1]
    assert any(math.isfinite(row.get("ogpo/matching_loss", math.nan)) for row in rows)


@pytest.mark.slow
def test_first_episodes_are_those_of_ogpo(tmp_path: Path) -> None:
    """Same clone, same critics, same steps, up to the first update, which step 303 would bring."""
    flags = [*TINY, "--start-training", "301", "--total-steps", "301"]
    for name, script in (("ours", qam), ("theirs", og)):
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
    run_script([qam.__file__, *flags, *folders(tmp_path, "a")], check=0)
    agent = checkpoint.load(tmp_path / "a" / "checkpoint.pt")["agent"]
    assert agent["calql_step"] == 3 and agent["policy_gradient_on"] and agent["best_of_n_on"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_qam_learns_the_toy_task(tmp_path: Path, seed: int) -> None:
    run_script([qam.__file__, "--env", "toy", "--no-video", "--seed", str(seed), *folders(tmp_path, "a")], check=0)
    rows = read_metrics(tmp_path / "a")
    cloned = next(row["eval/ode_success"] for row in rows if "eval/ode_success" in row)
    assert rows[-1]["final/act_success"] > max(cloned + 0.25, 0.8)
