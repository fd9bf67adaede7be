"""Policy Decorator and DICE-RL: the corrected clone, its targets and losses against values by hand, and whole runs."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ogpo_state as og
from baselines import residual as rs
from common import checkpoint, cli
from common.replay import Batch
from common.rng import Rng
from common.runlog import read_metrics
from tests.helpers import TINY, demonstrated, differing, new_agent, perturbed, slow
from tests.warm import run_script

METHODS = ("decorator", "dice")
# What the script defines in its own words; all else is the text of ogpo_state.py.
OWN = {
    *("COMPILED", "RECORDED", "RunArgs", "PolicyArgs", "Args", "CriticArgs", "default_args"),
    *("TanhGaussian", "squash", "temperature_loss", "least_heads", "residual_loss"),
    *("Agent", "act_ode", "draw_chains", "draw_sums", "act_residual", "update_residual", "update_critic", "update"),
    *("pretrain", "train", "main"),
}
DROPPED = {"ActorArgs", "chain_log_prob", "group_advantage", "ppo_loss", "periodic_lr", "act_best_of_n", "update_actor"}
OBS = torch.linspace(-1, 1, 40).reshape(8, 5)


def small(method: str, **changes: object) -> tuple[Any, Any]:
    """Agent and arguments: observations of 5 numbers, chunks of 4 actions of 2; the residual acts, and is not 0."""
    agent, args = new_agent(rs, method, **dict(states=8, group=3, heads=3) | changes)
    perturbed(agent.residual, 0.1)
    agent.policy_gradient_on, agent.actor_updates = True, 10**6
    return agent, args


def base_of(agent: Any, args: Any, rng: Rng, obs: torch.Tensor = OBS) -> tuple[torch.Tensor, torch.Tensor]:
    """The z that a policy draws first from this source, and F(s, z)."""
    z = rng.randn(len(obs), 8)
    with torch.no_grad():
        return z, rs.sample_ode(agent.actor, obs, z, args.policy.flow_steps)


def batch_of(n: int = 8, terminated: float = 0.0) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        obs=torch.randn(n, 5, generator=g), actions=torch.rand(n, 4, 2, generator=g), rewards=-torch.ones(n, 12),
        steps=torch.full((n,), 12.0), next_obs=torch.randn(n, 5, generator=g),
        terminated=torch.full((n,), terminated), rows=np.arange(n),
    )  # fmt: skip


def targets(agent: Any, batch: Batch, args: Any, on: bool, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """(n,) that one critic step regresses to."""
    seen = []
    original = rs.critic_loss
    monkeypatch.setattr(rs, "critic_loss", lambda *a: (seen.append(a[3]), original(*a))[1])
    rs.update_critic(agent, batch, args, None, on)
    monkeypatch.setattr(rs, "critic_loss", original)
    return seen[0]


class Linear(torch.nn.Module):
    """Heads Q_m = slope_m sum(action) + offset_m of every state."""

    def __init__(self, slopes: list[float], offsets: list[float]) -> None:
        super().__init__()
        self.slopes, self.offsets = torch.tensor(slopes)[:, None], torch.tensor(offsets)[:, None]

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.slopes * action.sum(-1) + self.offsets


# --- the script -------------------------------------------------------------------------------------------------------


def test_the_script_is_a_diff_of_ogpo_state() -> None:
    assert differing(og, rs) == OWN | DROPPED
    lines = Path(rs.__file__).read_text().splitlines()
    variant = [line for line in Path(og.__file__).read_text().splitlines() if line.startswith("    variant: ")]
    theirs, ours = (text.split("class RunArgs")[1].split("@dataclass")[0] for text in (
        Path(og.__file__).read_text(), Path(rs.__file__).read_text()))  # fmt: skip
    assert theirs.replace(variant[0] + "\n", "") == ours
    assert len(lines) <= 650


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("env", "preset"), [("toy", "laptop"), ("lift", "laptop"), ("square", "paper")])
def test_default_args_of_a_method(method: str, env: str, preset: str) -> None:
    args = rs.default_args(env, preset, method)
    theirs = cli.flatten(og.default_args(env, preset))
    same = ("calql_steps", "critic_warmup", "critic_successes", "update_every", "n_step", "critic_lr", "chunk", "heads")
    assert {name: cli.flatten(args)[name] for name in same} == {name: theirs[name] for name in same}
    assert args.policy.method == method
    assert (args.policy.best_of_n == 1) == (args.policy.group == 1) == (method == "decorator")
    assert args.policy.states <= args.critic.critic_batch  # the critics' batch stays as large as OGPO's


# --- functions --------------------------------------------------------------------------------------------------------


def test_squash_is_the_density_of_tanh() -> None:
    """Against torch's own transform."""
    g = torch.Generator().manual_seed(0)
    mean, log_std, eps = (torch.randn(50, 8, generator=g) for _ in range(3))
    y, log_prob = rs.squash(mean, log_std, eps)
    normal = torch.distributions.Normal(mean.double(), log_std.double().exp())
    want = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    u = (mean + log_std.exp() * eps).double()
    inside = (u.abs() < 8).all(-1)
    torch.testing.assert_close(y.double(), u.tanh(), atol=1e-5, rtol=1e-5)
    exact = normal.log_prob(u) - want.transforms[0].log_abs_det_jacobian(u, u.tanh())
    torch.testing.assert_close(log_prob.double()[inside], exact.sum(-1)[inside], rtol=1e-4, atol=1e-3)


def test_least_heads_by_hand() -> None:
    q = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 9.0]])
    draws = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.5]])  # the smallest: heads 0 and 2, heads 1 and 2
    assert rs.least_heads(q, draws, 2).tolist() == [1.0, 4.0]
    assert rs.least_heads(q, draws, 1).tolist() == [1.0, 4.0]
    assert rs.least_heads(q, 1 - draws, 1).tolist() == [2.0, 5.0]
    assert rs.least_heads(q, draws, 0).tolist() == [2.0, 6.0]
    assert rs.least_heads(q, draws, 3).tolist() == rs.least_heads(q, draws, 9).tolist() == [1.0, 4.0]


def test_residual_loss_by_hand_and_its_gradient() -> None:
    q, r = torch.tensor([-4.0, -2.0], requires_grad=True), torch.tensor([[0.1, 0.3], [0.0, 0.2]], requires_grad=True)
    log_prob, alpha = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor(0.5)
    a = rs.PolicyArgs(method="dice", bc_weight=100.0)
    loss = rs.residual_loss(q, r, log_prob, alpha, a)
    assert loss.item() == pytest.approx(3 / 3 + 100 * (0.01 + 0.09 + 0.04) / 4)
    loss.backward()
    assert q.grad.tolist() == pytest.approx([-1 / 6, -1 / 6])  # the mean size of Q is no path of the gradient
    torch.testing.assert_close(r.grad, 100 * 2 * r.detach() / 4)
    q.grad = None
    loss = rs.residual_loss(q, r, log_prob, alpha, rs.PolicyArgs(method="decorator"))
    assert loss.item() == pytest.approx(0.5 * 2 + 3)
    loss.backward()
    assert q.grad.tolist() == [-0.5, -0.5] and log_prob.grad.tolist() == [0.25, 0.25]


# --- acting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_until_a_gate_opens_the_clone_acts_with_the_noise_of_ogpo(method: str) -> None:
    agent, args = small(method)
    agent.policy_gradient_on, agent.actor_updates = False, 0
    values = dict(actor_hidden=(32, 32), critic_hidden=(32, 32), heads=3)
    their_args = cli.override(og.default_args("toy"), values)
    theirs = og.Agent(their_args, 5, 2, torch.device("cpu"), None)
    for ours, other in ((agent.actor, theirs.actor), (agent.critic, theirs.critic)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))
    rngs = [Rng(7, torch.device("cpu")) for _ in range(2)]
    for _ in range(2):
        got, want = rs.act_residual(agent, args, OBS, rngs[0]), og.act_best_of_n(theirs, their_args, OBS, rngs[1])
        assert torch.equal(got, want)
        got, want = rs.act_ode(agent, args, OBS, rngs[0]), og.act_ode(theirs, their_args, OBS, rngs[1])
        assert torch.equal(got, want)
    assert torch.equal(*(r.generator.get_state() for r in rngs))


@pytest.mark.parametrize("case", ["zero head", "scale 0", "ramp not begun"])
def test_without_a_residual_the_sum_is_the_clone(case: str) -> None:
    """A zero head, lambda 0, or probability 0: exactly F(s, z)."""
    agent, args = small("dice" if case == "zero head" else "decorator", best_of_n=1)
    if case == "zero head":
        agent.residual.out.weight.data.zero_()
        agent.residual.out.bias.data.zero_()
    elif case == "scale 0":
        args = cli.override(args, dict(scale=0.0))
    else:
        agent.actor_updates = 0
    for act in (rs.act_residual,) if case == "ramp not begun" else (rs.act_residual, rs.act_ode):
        got = act(agent, args, OBS, Rng(3, torch.device("cpu")))
        _, want = base_of(agent, args, Rng(3, torch.device("cpu")))
        assert torch.equal(got, want.unflatten(1, (4, 2)))


def test_dice_gives_the_residual_the_noise_that_made_the_base() -> None:
    agent, args = small("dice")
    rng = Rng(3, torch.device("cpu"))
    rows, base, residual, log_prob = rs.draw_sums(agent, args, OBS, 3, rng)
    z = Rng(3, torch.device("cpu")).randn(24, 8)
    assert torch.equal(rows, OBS.repeat_interleave(3, 0)) and not log_prob.any()
    assert torch.equal(base, rs.sample_ode(agent.actor, rows, z, args.policy.flow_steps).detach())
    assert torch.equal(residual, agent.residual(rows, z)[0]) and residual.abs().min() > 0
    assert not torch.allclose(residual, agent.residual(rows, z.flip(0))[0], atol=1e-3)


def test_decorator_is_bounded_and_its_mean_evaluates() -> None:
    agent, args = small("decorator", scale=0.2)
    perturbed(agent.residual, 3.0)
    rng = Rng(3, torch.device("cpu"))
    _, base = base_of(agent, args, Rng(3, torch.device("cpu")))
    got = rs.act_ode(agent, args, OBS, rng).flatten(1)
    want = (base + 0.2 * agent.residual(OBS)[0].tanh()).clamp(-1, 1)
    torch.testing.assert_close(got, want.detach())
    _, base, residual, _ = rs.draw_sums(agent, args, OBS, 50, rng)
    assert 0.19 < residual.abs().max() <= 0.2
    assert rs.act_residual(agent, args, 100 * OBS, rng).abs().max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_ramp_mixes_whole_decisions(method: str) -> None:
    """The probability rises over half of 4,000 steps, two for an update; dice has no ramp."""
    changes = dict(ramp=0.5) if method == "decorator" else {}
    agent, args = small(method, best_of_n=1, total_steps=4_000, update_every=2, scale=0.3, **changes)
    obs = torch.randn(2_000, 5, generator=torch.Generator().manual_seed(0))
    _, base = base_of(agent, args, Rng(3, torch.device("cpu")), obs)
    for updates, share in ((0, 0.0), (250, 0.25), (500, 0.5), (1_000, 1.0), (9_000, 1.0)):
        agent.actor_updates = updates
        got = rs.act_residual(agent, args, obs, Rng(3, torch.device("cpu"))).flatten(1)
        moved = ((got - base).abs() > 1e-7).any(1)  # (n,)
        want = share if method == "decorator" or not updates else 1.0
        assert moved.float().mean().item() == pytest.approx(want, abs=0.04 * (0 < want < 1))


def test_best_of_n_takes_the_sum_that_the_critics_like() -> None:
    """Two heads that disagree: the least of both decides, as by the authors."""
    agent, args = small("dice", best_of_n=16, heads=2)
    agent.best_of_n_on, agent.critic_ema = True, Linear([1.0, 2.0], [0.0, 0.0])
    got = rs.act_residual(agent, args, OBS, Rng(3, torch.device("cpu"))).flatten(1)
    _, base, residual, _ = rs.draw_sums(agent, args, OBS, 16, Rng(3, torch.device("cpu")))
    sums = (base + residual).clamp(-1, 1).detach()
    q = torch.minimum(sums.sum(-1), 2 * sums.sum(-1)).unflatten(0, (8, 16))
    assert torch.equal(got, sums.unflatten(0, (8, 16))[torch.arange(8), q.argmax(1)])


# --- updates ----------------------------------------------------------------------------------------------------------


def test_update_residual_decorator_follows_the_soft_objective() -> None:
    agent, args = small("decorator", group=1, scale=0.2, alpha=0.3, min_heads=0)
    agent.critic = Linear([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    agent.residual_opt.step = lambda: None  # keeps the parameters
    state = agent.rng.state_dict()
    info = rs.update_residual(agent, OBS, args)
    got = [p.grad.clone() for p in agent.residual.parameters()]
    agent.rng.load_state_dict(state)
    z, eps = agent.rng.randn(8, 8), agent.rng.randn(8, 8)
    base = rs.sample_ode(agent.actor, OBS, z, args.policy.flow_steps).detach()
    mean, log_std = agent.residual(OBS)
    u = mean + log_std.exp() * eps
    log_prob = (-(eps**2) / 2 - log_std - math.log(2 * math.pi) / 2 - (1 - u.tanh() ** 2).log()).sum(-1)
    action = (base + 0.2 * u.tanh()).clamp(-1, 1)
    loss = (0.3 * log_prob - 2 * action.sum(-1)).mean()
    agent.residual.zero_grad()
    loss.backward()
    for one, other in zip(got, agent.residual.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-5)
    assert info["actor_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert info["entropy_gap"].item() == pytest.approx(-log_prob.mean().item() + 8, rel=1e-4)
    assert info["edit"].item() == pytest.approx((action - base).abs().mean().item(), rel=1e-4)


def test_update_residual_dice_gradient_is_that_of_a_mean_over_z() -> None:
    agent, args = small("dice", group=5, bc_weight=7.0, min_heads=9)
    agent.critic = Linear([1.0, 2.0, 3.0], [10.0, 9.0, 11.0])
    agent.residual_opt.step = lambda: None  # keeps the parameters
    agent.residual.out.weight.data *= 0.01  # a gradient below 1 is not clipped
    state = agent.rng.state_dict()
    rs.update_residual(agent, OBS, args)
    got = [p.grad.clone() for p in agent.residual.parameters()]
    agent.rng.load_state_dict(state)
    rows, z = OBS.repeat_interleave(5, 0), agent.rng.randn(40, 8)
    r = agent.residual(rows, z)[0]
    action = (rs.sample_ode(agent.actor, rows, z, args.policy.flow_steps).detach() + r).clamp(-1, 1)
    q = agent.critic(rows, action).amin(0)
    loss = -q.mean() / q.detach().abs().mean() + 7 * r.square().mean()
    agent.residual.zero_grad()
    loss.backward()
    size = torch.cat([p.grad.flatten() for p in agent.residual.parameters()]).norm()
    assert 0 < size < 1
    for one, other in zip(got, agent.residual.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-6)


def test_dice_penalty_decides_how_far_the_residual_goes() -> None:
    """Q about 100, of slope 1: at the optimum 1 / 100 = 2 w r / D in every number r."""
    found = []
    for weight in (100.0, 20.0):
        agent, args = small("dice", group=8, bc_weight=weight, actor_lr=1e-3)
        agent = rs.Agent(args, 5, 2, torch.device("cpu"), None)
        agent.actor.out.weight.data.zero_()
        agent.critic = Linear([1.0] * 3, [100.0] * 3)
        obs = torch.zeros(8, 5)
        for _ in range(300):
            rs.update_residual(agent, obs, args)
        z = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).clamp(-0.8, 0.8)
        found.append(agent.residual(torch.zeros(500, 5), z)[0].mean().item())
    # a chunk at the end of its range has no gradient of Q, so that some stay behind
    assert 0.4 * 8 / (200 * 100) < found[0] < 1.1 * 8 / (200 * 100)
    assert 4 < found[1] / found[0] < 6


def test_update_residual_moves_neither_clone_nor_critics() -> None:
    for method in METHODS:
        agent, args = small(method)
        kept = [[p.clone() for p in net.parameters()] for net in (agent.actor, agent.critic)]
        before = [p.clone() for p in agent.residual.parameters()]
        rs.update_residual(agent, OBS, args)
        for net, old in zip((agent.actor, agent.critic), kept, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(net.parameters(), old, strict=True))
            assert all(p.grad is None for p in net.parameters())
        assert not all(torch.equal(a, b) for a, b in zip(agent.residual.parameters(), before, strict=True))


def test_temperature_rests_where_the_entropy_is_met() -> None:
    """It falls from above the wanted entropy, rises from below it."""
    for bias, sign in ((0.0, -1), (-5.0, 1)):
        agent, args = small("decorator", group=64)
        agent.residual.out.weight.data.zero_()
        agent.residual.out.bias.data = torch.cat([torch.zeros(8), torch.full((8,), bias)])
        before = agent.temperature["log"].item()
        info = rs.update_residual(agent, OBS, args)
        assert math.copysign(1, info["entropy_gap"].item()) == -sign
        assert agent.temperature["log"].item() == pytest.approx(before + sign * args.policy.alpha_lr, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_update_critic_target_by_hand(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean over z of the least head of the corrected chunk, minus alpha log pi, behind twelve rewards."""
    agent, args = small(method, next_samples=5, min_heads=9, alpha=0.3, scale=0.2)
    agent.critic_ema, batch = Linear([1.0, 2.0, 3.0], [0.0, -1.0, 1.0]), batch_of()
    monkeypatch.setattr(rs, "update_ema", lambda *_: None)
    state = agent.rng.state_dict()
    got = targets(agent, batch, args, True, monkeypatch)
    agent.rng.load_state_dict(state)
    _, base, residual, log_prob = rs.draw_sums(agent, args, batch.next_obs, 5, agent.rng)
    q = agent.critic_ema(None, (base + residual).clamp(-1, 1)).amin(0) - 0.3 * log_prob
    gamma = args.critic.gamma
    want = -(1 - gamma**12) / (1 - gamma) + gamma**12 * q.unflatten(0, (8, 5)).mean(1)
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-4)
    assert log_prob.abs().min() > 0 if method == "decorator" else not log_prob.any()
    agent.rng.load_state_dict(state)
    got = targets(agent, batch_of(terminated=1.0), args, True, monkeypatch)
    torch.testing.assert_close(got, torch.full((8,), -(1 - gamma**12) / (1 - gamma)))


def test_update_critic_values_the_clone_until_the_residual_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, args = small("decorator", min_heads=0)
    agent.critic_ema, batch = Linear([1.0], [0.0]), batch_of()
    monkeypatch.setattr(rs, "update_ema", lambda *_: None)
    state = agent.rng.state_dict()
    got = targets(agent, batch, args, False, monkeypatch)
    agent.rng.load_state_dict(state)
    _, base, *_ = rs.draw_sums(agent, args, batch.next_obs, 1, agent.rng)
    gamma = args.critic.gamma
    want = -(1 - gamma**12) / (1 - gamma) + gamma**12 * base.sum(-1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_base_chunks_are_drawn_anew_and_their_mean_is_the_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision of B 4: a transition's target is another draw at every update, right on average.

    With a clone that ignores its state the value of the next state is E_z Q(F(z)), the same for all transitions. One
    update's targets differ by transition, as stored draws would for ever; their mean over updates does not.
    """
    agent, args = small("decorator", min_heads=0, scale=0.0)
    agent.critic_ema, batch = Linear([1.0], [0.0]), batch_of(32)
    monkeypatch.setattr(rs, "update_ema", lambda *_: None)
    agent.temperature["log"].data -= 100  # no entropy
    batch.next_obs[:] = 0
    got = torch.stack([targets(agent, batch, args, True, monkeypatch) for _ in range(400)])  # (updates, n)
    assert not torch.equal(got[0], got[1])
    z = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(1))
    base = rs.sample_ode(agent.actor, torch.zeros(20_000, 5), z, args.policy.flow_steps).detach()
    gamma = args.critic.gamma
    want = -(1 - gamma**12) / (1 - gamma) + gamma**12 * base.sum(-1).mean().item()
    spread = got[0].std().item()
    assert spread > 0.1
    torch.testing.assert_close(got.mean(0), torch.full((32,), want), atol=5 * spread / 20, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_residual_learns_what_the_critics_like(method: str) -> None:
    """Critics that like positive numbers: the sum moves up, by not more than lambda or what the penalty allows."""
    agent, args = small(method, scale=0.3, alpha=1e-3, bc_weight=1.0, actor_lr=3e-3, group=4)
    agent = rs.Agent(args, 5, 2, torch.device("cpu"), None)
    agent.critic = Linear([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    agent.policy_gradient_on = True
    for _ in range(150):
        info = rs.update_residual(agent, OBS, args)
    rng = Rng(3, torch.device("cpu"))
    _, base = base_of(agent, args, Rng(3, torch.device("cpu")))
    moved = rs.act_ode(agent, args, OBS, rng).flatten(1) - base
    assert moved.min() > -1e-3 and moved[base.abs() < 0.6].mean() > 0.2
    assert info["edit"] > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_update_opens_the_gates_as_ogpo_does(method: str) -> None:
    agent, args = small(method, critic_warmup=2, critic_successes=4, critic_batch=32, next_samples=1)
    agent.policy_gradient_on, agent.actor_updates = False, 0
    buffer, rng = demonstrated(), np.random.default_rng(0)
    before = [p.clone() for p in agent.residual.parameters()]
    for n in range(2):
        assert "actor_loss" not in rs.update(agent, buffer, args, rng)
        assert agent.best_of_n_on == (n == 1) and not agent.policy_gradient_on
    assert all(torch.equal(a, b) for a, b in zip(agent.residual.parameters(), before, strict=True))
    info = rs.update(agent, buffer, args, rng)
    assert agent.policy_gradient_on and agent.actor_updates == 1 and all(v.ndim == 0 for v in info.values())
    agent, args = small(method, critic_warmup=0, critic_successes=11, critic_batch=32)
    agent.policy_gradient_on = False
    rs.update(agent, buffer, args, rng)  # ten successes
    assert agent.best_of_n_on and not agent.policy_gradient_on


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_brings_the_agent_back(method: str, tmp_path: Path) -> None:
    """Temperature and optimizers too: the next updates are the same bits."""
    (agent, args), (other, _) = small(method, critic_batch=16), small(method, critic_batch=16, seed=2)
    buffer = demonstrated()
    for _ in range(2):
        rs.update(agent, buffer, args, np.random.default_rng(0))
    checkpoint.save(tmp_path / "a.pt", checkpoint.pack(agent))
    checkpoint.unpack(other, checkpoint.load(tmp_path / "a.pt"))
    for x in (agent, other):
        rs.update(x, buffer, args, np.random.default_rng(1))
    assert agent.temperature["log"].item() == other.temperature["log"].item()
    for name in ("residual", "critic", "critic_ema"):
        pair = (getattr(x, name).parameters() for x in (agent, other))
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["decorator", slow("dice")])
def test_the_script_trains_evaluates_and_resumes(method: str, tmp_path: Path) -> None:
    script = [rs.__file__]
    flags = [
        *(*TINY, "--method", method, "--states", "8", "--start-training", "200", "--eval-every", "200"),
        *("--critic-successes", "0", "--critic-warmup", "5", "--total-steps"),
    ]  # fmt: skip
    folders = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", "a"]
    for command in (
        [*script, *flags, "400", *folders],
        [*script, "--resume", str(tmp_path / "a"), "--total-steps", "600"],
        [*script, "--eval", str(tmp_path / "a")],
    ):
        done = run_script(command, check=0)
    assert "acting policy: success" in done.stdout
    rows = read_metrics(tmp_path / "a")
    assert any("ogpo/actor_grad" in row and math.isfinite(row["ogpo/actor_grad"]) for row in rows)
    assert any("eval/act_success" in row and row["step"] > 0 for row in rows)
    assert rows[-1]["step"] == 600


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(method: str, tmp_path: Path) -> None:
    flags = [*TINY, "--method", method, "--states", "8", "--start-training", "100", "--total-steps", "300"]
    flags += ["--critic-successes", "0", "--critic-warmup", "2", "--ramp", "0.5", "--checkpoint-every", "200"]
    flags += ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    run_script([rs.__file__, *flags, "--run-name", "whole"], check=0)
    run_script([rs.__file__, *flags, "--run-name", "broken"], check=0)
    (tmp_path / "broken" / "checkpoint.pt").unlink()  # the one of step 200 is left
    run_script([rs.__file__, "--resume", str(tmp_path / "broken")], check=0)
    whole, broken = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken"))
    assert whole["step"] == broken["step"] == 300
    for name in ("residual", "critic", "temperature", "actor"):
        assert all(torch.equal(x, broken["agent"][name][k]) for k, x in whole["agent"][name].items())


@pytest.mark.parametrize("method", [slow("decorator"), slow("dice")])
def test_the_first_episodes_are_those_of_ogpo(method: str, tmp_path: Path) -> None:
    """Bit for bit, through updates of the critics, from a clone of one's own: until a gate opens."""
    flags = [*TINY, "--total-steps", "400", "--start-training", "400", "--critic-warmup", "1000"]
    flags += ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name"]
    run_script([og.__file__, *flags, "ogpo"], check=0)
    run_script([rs.__file__, *flags, method, "--method", method], check=0)
    theirs, ours = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("ogpo", method))
    for name in ("obs", "actions", "rewards"):
        assert torch.equal(theirs["buffer"][name], ours["buffer"][name]) and len(ours["buffer"][name]) > 300
    cloned = [checkpoint.load(tmp_path / name / "cloned.pt") for name in ("ogpo", method)]
    assert all(torch.equal(cloned[0][k], cloned[1][k]) for k in cloned[0])


def test_the_method_of_a_run_stays(tmp_path: Path) -> None:
    flags = [*TINY, "--total-steps", "0", "--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", "a"]
    run_script([rs.__file__, *flags, "--method", "dice"], check=0)
    assert SimpleNamespace(**checkpoint.load(tmp_path / "a" / "checkpoint.pt")["args"]).best_of_n == 8
    done = run_script([rs.__file__, "--resume", str(tmp_path / "a"), "--method", "decorator"], check=2)
    assert "--method" in done.stderr
