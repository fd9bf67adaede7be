"""ogpo_state.py's own functions against closed forms, enumeration and torch.distributions."""

import ast
import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import ogpo_pixels
import ogpo_state as og
from common import cli
from common.demos import Demos
from common.envs import TASKS
from common.errors import UserError
from common.replay import Batch, ReplayBuffer
from common.rng import Rng
from tests import helpers
from tests.helpers import demonstrated, perturbed
from variants import (
    ogpo_critic,
    ogpo_diffusion,
    ogpo_extraction,
    ogpo_pixels_reference,
    ogpo_reference,
    ogpo_released,
)

VARIANTS = (ogpo_critic, ogpo_diffusion, ogpo_extraction, ogpo_reference, ogpo_released, ogpo_pixels_reference)
SCRIPTS = (og, ogpo_pixels, *VARIANTS)
DATA_STD, DATA_MEAN = 0.3, 0.2


class GaussianFlow(torch.nn.Module):
    """Exact velocity of the linear path from N(0, 1) to N(DATA_MEAN, DATA_STD^2), the same for every coordinate."""

    out = torch.nn.Linear(1, 3)  # only its width is read

    def embed(self, t):
        return t[..., None].expand(*t.shape, 1)

    def forward(self, obs, x, t_emb):
        t = t_emb
        var = (1 - t) ** 2 + (t * DATA_STD) ** 2
        return DATA_MEAN + (t * DATA_STD**2 - (1 - t)) / var * (x - t * DATA_MEAN)


small_agent = partial(helpers.small_agent, og)


# --- the stochastic chain ---------------------------------------------------------------------------------------------


def test_sample_chain_marginals_follow_the_affine_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a linear-Gaussian flow every step is affine, so mean and variance of each state are known exactly."""
    monkeypatch.setattr(og, "NOISE_CLIP", 10.0)
    p = og.PolicyArgs(flow_steps=6, noise_std=0.2, eta=0.0)
    n, net = 200_000, GaussianFlow()
    noise = torch.randn(n, p.flow_steps + 1, 1, generator=torch.Generator().manual_seed(0))
    chain, _ = og.sample_chain(net, torch.zeros(n, 1), noise, p)
    mean, var = 0.0, 1.0
    for k in range(p.flow_steps - 1):  # the last step clips its mean: not affine
        t = k / p.flow_steps
        gain = 0.5 * p.noise_std**2 * p.flow_steps
        slope_v = (t * DATA_STD**2 - (1 - t)) / ((1 - t) ** 2 + (t * DATA_STD) ** 2)
        slope = 1 + (slope_v + gain * (t * slope_v - 1)) / p.flow_steps
        offset = (1 + gain * t) * (DATA_MEAN - slope_v * t * DATA_MEAN) / p.flow_steps
        mean, var = slope * mean + offset, slope**2 * var + p.noise_std**2 * (1 - t)
        x = chain[:, k + 1, 0]
        assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(var / n))
        assert x.var().item() == pytest.approx(var, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_sample_chain_with_eta_marginals_follow_the_affine_recursion(
    eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a linear-Gaussian flow every step is affine, so mean and variance of each state are known exactly."""
    monkeypatch.setattr(og, "NOISE_CLIP", 10.0)
    p = og.PolicyArgs(flow_steps=6, noise_std=0.2, eta=eta)
    n, net = 200_000, GaussianFlow()
    noise = torch.randn(n, p.flow_steps + 1, 1, generator=torch.Generator().manual_seed(0))
    chain, _ = og.sample_chain(net, torch.zeros(n, 1), noise, p)
    mean, var = 0.0, 1.0
    for k in range(p.flow_steps):
        t, later = k / p.flow_steps, (k + 1) / p.flow_steps
        ancestral = (1 - later) * math.sqrt(1 - (t * (1 - later) / (later * (1 - t))) ** 2)
        sigma = max(0.2 * math.sqrt(1 - t), eta * ancestral)
        slope_v = (t * DATA_STD**2 - (1 - t)) / ((1 - t) ** 2 + (t * DATA_STD) ** 2)
        of_chunk = 1 + (1 - t) * slope_v  # slope of the predicted chunk in x, and its value at x = 0
        at_zero = (1 - t) * DATA_MEAN * (1 - t * slope_v)
        kept = math.sqrt(max((1 - later) ** 2 - sigma**2, 0))
        slope = later * of_chunk + kept * (1 - t * of_chunk) / (1 - t)
        mean, var = slope * mean + (later - kept * t / (1 - t)) * at_zero, slope**2 * var + sigma**2
        x = chain[:, k + 1, 0]
        assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(var / n))
        assert x.var().item() == pytest.approx(var, rel=5 * math.sqrt(2 / n) + 2e-3)  # few predictions are clipped


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_step_mean_keeps_the_marginals(eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many steps, and with noise that shrinks as their root, the chain ends at the data."""
    monkeypatch.setattr(og, "NOISE_CLIP", 10.0)
    steps, n = 200, 20_000
    noise = torch.randn(n, steps + 1, 1, generator=torch.Generator().manual_seed(1))
    p = og.PolicyArgs(flow_steps=steps, noise_std=1e-3 if eta else 1.5 / math.sqrt(steps), eta=eta)
    chain, _ = og.sample_chain(GaussianFlow(), torch.zeros(n, 1), noise, p)
    for t in (0.25, 0.5, 0.9):
        want = math.sqrt((1 - t) ** 2 + (t * DATA_STD) ** 2)
        assert chain[:, round(t * steps)].std().item() == pytest.approx(want, rel=0.05)
    assert chain[:, -2].std().item() == pytest.approx(DATA_STD, rel=0.05)


def test_step_mean_with_eta_1_is_the_posterior_of_the_path_s_noising() -> None:
    """As DDPM's: x_t given the later x is a Markov step of more noise, conditioned on chunk and x_t by Bayes' rule."""
    p = og.PolicyArgs(flow_steps=5, noise_std=1e-4, eta=1.0)
    times, sigmas = og.flow_schedule(p, torch.device("cpu"))
    chunk, noise = torch.tensor([0.3, -0.8]), torch.tensor([1.1, -0.4])
    for t, sigma in zip(times[:-1], sigmas[:-1], strict=True):
        x, later = t * chunk + (1 - t) * noise, t + 1 / p.flow_steps
        shrink = t / later
        added = (1 - t) ** 2 - (shrink * (1 - later)) ** 2
        precision = 1 / (1 - later) ** 2 + shrink**2 / added
        want = (later * chunk / (1 - later) ** 2 + shrink * x / added) / precision
        assert sigma.item() == pytest.approx(precision.item() ** -0.5, rel=1e-4)
        torch.testing.assert_close(og.step_mean(x, chunk - noise, t, sigma, p), want, rtol=1e-4, atol=1e-5)


def test_sample_ode_transports_noise_to_the_data() -> None:
    """The exact flow map of a Gaussian is x -> mean + std * x."""
    x = torch.linspace(-1.5, 1.5, 7)[:, None]
    out = og.sample_ode(GaussianFlow(), torch.zeros(7, 1), x, 2_000)
    assert torch.allclose(out, (DATA_MEAN + DATA_STD * x).clamp(-1, 1), atol=2e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_chain_log_prob_matches_torch_distributions(eta: float) -> None:
    agent, args = small_agent(noise_std=0.3, eta=eta)
    p, n, dim = args.policy, 16, 8
    obs = torch.randn(n, 5)
    chain, _ = og.sample_chain(agent.actor_ema, obs, torch.randn(n, p.flow_steps + 1, dim), p)
    perturbed(agent.actor, 0.02)
    want = torch.zeros(n)
    constant = torch.zeros(())
    times, sigmas = og.flow_schedule(p, torch.device("cpu"))
    for k in range(p.flow_steps):
        t, sigma = times[k], sigmas[k]
        v = agent.actor(obs, chain[:, k], agent.actor.embed(t))
        mean = og.step_mean(chain[:, k], v, t, sigma, p)
        want += Normal(mean, sigma).log_prob(chain[:, k + 1]).sum(-1)
        constant += dim * Normal(0.0, sigma).log_prob(torch.zeros(()))
    want += Normal(0.0, 1.0).log_prob(chain[:, 0]).sum(-1)
    constant += dim * Normal(0.0, 1.0).log_prob(torch.zeros(()))
    got = og.chain_log_prob(agent.actor, obs, chain, p)
    assert torch.allclose(got, (want - constant) / ((p.flow_steps + 1) * dim), atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_chain_log_prob_equals_the_sampler_s_at_equal_parameters(eta: float) -> None:
    agent, args = small_agent(noise_std=0.3, eta=eta)
    perturbed(agent.actor, 0.3)
    agent.actor_ema.load_state_dict(agent.actor.state_dict())
    obs, noise = torch.randn(256, 5), torch.randn(256, args.policy.flow_steps + 1, 8)
    chain, old = og.sample_chain(agent.actor_ema, obs, noise, args.policy)
    assert chain[:, -1].abs().max() > 1  # the last state is kept unclipped
    ratio = (og.chain_log_prob(agent.actor, obs, chain, args.policy) - old).exp()
    assert torch.allclose(ratio, torch.ones(256), atol=1e-5)


def test_sample_chain_clips_the_noise_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, args = small_agent()
    p = args.policy
    monkeypatch.setattr(og, "NOISE_CLIP", 0.5)
    noise = torch.randn(64, p.flow_steps + 1, 8)
    chain, _ = og.sample_chain(agent.actor, torch.zeros(64, 5), noise, p)
    times, sigmas = og.flow_schedule(p, torch.device("cpu"))
    for k in range(p.flow_steps):
        v = agent.actor(torch.zeros(64, 5), chain[:, k], agent.actor.embed(times[k]))
        step = chain[:, k + 1] - og.step_mean(chain[:, k], v, times[k], sigmas[k], p)
        assert step.abs().max() <= 0.5 * sigmas[k] + 1e-5


# --- advantages and the policy loss -----------------------------------------------------------------------------------


def test_group_advantage_on_hand_made_ensembles() -> None:
    # one state, three chains, three heads; group means are 0 for every head
    q = torch.tensor([[[3.0, -1.0, -2.0]], [[1.0, -3.0, 2.0]], [[2.0, -2.0, 0.0]]])
    assert og.group_advantage(q, "conservative").tolist() == [[1.0, -1.0, 0.0]]
    assert torch.allclose(og.group_advantage(q, "vanilla"), torch.tensor([[2.0, -2.0, 0.0]]))
    # a constant per head and state changes nothing
    shift = torch.tensor([5.0, -7.0, 100.0])[:, None, None]
    assert torch.allclose(
        og.group_advantage(q + shift, "conservative"), og.group_advantage(q, "conservative"), atol=1e-5
    )


def test_group_advantage_conservative_against_enumeration() -> None:
    q = torch.randn(4, 6, 5)
    got = og.group_advantage(q, "conservative")
    for b, g in itertools.product(range(6), range(5)):
        heads = sorted((q[m, b, g] - q[m, b].mean() for m in range(4)), key=abs)
        agree = all(h > 0 for h in heads) or all(h < 0 for h in heads)
        assert got[b, g].item() == pytest.approx(heads[0].item() if agree else 0.0, abs=1e-6)


def test_group_advantage_vanilla_sums_to_zero_in_each_group_and_keeps_its_scale() -> None:
    q = torch.randn(5, 7, 6)
    a = og.group_advantage(q, "vanilla")
    assert torch.allclose(a.sum(-1), torch.zeros(7), atol=1e-5)
    assert torch.allclose(og.group_advantage(10 * q, "vanilla"), 10 * a, atol=1e-4)


def test_ppo_loss_values_and_gradients() -> None:
    """Four cases: inside the clip, beyond it where the clip bites, beyond it where it must not, zero advantage."""
    ratios = torch.tensor([1.005, 1.05, 1.05, 0.9])
    adv = torch.tensor([2.0, 2.0, -2.0, 0.0])
    log_prob = ratios.log().requires_grad_()
    loss, info = og.ppo_loss(log_prob, torch.zeros(4), adv, 0.01, 8)
    assert loss.item() == pytest.approx(-(1.005 * 2 + 1.01 * 2 - 1.05 * 2 + 0) / 8, rel=1e-6)
    loss.backward()
    assert torch.allclose(8 * log_prob.grad, torch.tensor([-2.01, 0.0, 2.10, 0.0]), atol=1e-5)
    assert info["clipped"].item() == 2 / 8  # one without advantage does not count


def test_update_actor_leaves_out_chains_without_advantage_exactly() -> None:
    """The gradient equals that of the objective over all chains, drawn again with the same noise."""
    agent, args = small_agent()
    perturbed(agent.critic_ema, 0.3)
    perturbed(agent.actor, 0.02)
    agent.actor_opt.step = lambda: None
    obs, drawn = torch.randn(8, 5, generator=torch.Generator().manual_seed(3)), agent.rng.state_dict()
    info = og.update_actor(agent, obs, None, args)
    got = torch.cat([p.grad.flatten() for p in agent.actor.parameters()])
    small, args = small_agent()
    perturbed(small.critic_ema, 0.3)
    perturbed(small.actor, 0.02)
    small.rng.load_state_dict(drawn)
    rows = obs.repeat_interleave(args.actor.group, 0)
    noise = small.rng.randn(len(rows), args.policy.flow_steps + 1, 8)
    chain, old = og.sample_chain(small.actor_ema, rows, noise, args.policy)
    q = small.critic_ema(rows, chain[:, -1].clamp(-1, 1)).unflatten(1, (-1, args.actor.group))
    advantage = og.group_advantage(q, "conservative").flatten()
    log_prob = og.chain_log_prob(small.actor, rows, chain, args.policy)
    og.ppo_loss(log_prob, old, advantage, args.actor.clip, len(rows))[0].backward()
    want = torch.cat([p.grad.flatten() for p in small.actor.parameters()])
    share = (advantage != 0).float().mean().item()
    assert 0 < share < 1 and info["nonzero"].item() == pytest.approx(share)
    assert want.abs().max() > 0
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-8)


# --- critic -----------------------------------------------------------------------------------------------------------


def test_td_target_on_a_hand_solved_chain() -> None:
    """Three-step corridor, reward -1, +4 at the end, gamma 0.5, chunks of 2; Q-bar of the next state is known."""
    rewards = torch.tensor([[-1.0, -1.0], [-1.0, 4.0], [-1.0, -1.0], [-1.0, 0.0]])
    steps = torch.tensor([2.0, 2.0, 2.0, 1.0])
    terminated = torch.tensor([0.0, 1.0, 0.0, 0.0])  # the last two end by the time limit: they bootstrap
    q_next = torch.tensor([[8.0, 99.0, 4.0, 8.0], [4.0, -99.0, 0.0, 4.0]])  # heads: mean 6, ignored, 2, 6
    want = [-1 - 0.5 + 0.25 * 6, -1 + 0.5 * 4, -1 - 0.5 + 0.25 * 2, -1 + 0.5 * 6]
    assert og.td_target(rewards, steps, terminated, q_next, 0.5).tolist() == pytest.approx(want)


def test_update_critic_averages_next_actions_without_moving_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several next actions: the same expected target, a smaller spread from one draw to the next."""
    batch = Batch(
        obs=torch.zeros(64, 5),
        actions=torch.zeros(64, 4, 2),
        rewards=torch.zeros(64, 4),
        steps=torch.full((64,), 4.0),
        next_obs=torch.ones(64, 5),
        terminated=torch.zeros(64),
        rows=np.zeros(64, np.int64),
    )
    targets, real = [], og.critic_loss
    monkeypatch.setattr(og, "critic_loss", lambda *a: targets.append(a[-1]) or real(*a))
    spread = {}
    for samples in (1, 16):
        agent, args = small_agent(next_samples=samples, noise_std=0.5, critic_ema=0.0)
        perturbed(agent.critic_ema, 0.5)
        targets.clear()
        for _ in range(20):
            og.update_critic(agent, batch, args)
        spread[samples] = torch.stack(targets)  # (20, 64), the same state everywhere
    assert spread[16].std().item() == pytest.approx(spread[1].std().item() / 4, rel=0.15)
    assert spread[16].mean().item() == pytest.approx(spread[1].mean().item(), abs=0.1 * spread[1].std().item())


def test_critic_ensemble_heads_are_independent_and_equal_their_single_nets() -> None:
    agent, _ = small_agent()
    perturbed(agent.critic, 0.2)
    obs, action = torch.randn(6, 5), torch.randn(6, 8)
    q = agent.critic(obs, action)
    for m in range(3):
        h = torch.cat([(obs - agent.critic.obs_mean) / agent.critic.obs_std, action], -1)
        c = agent.critic
        for w, b, g, s in zip(c.weights, c.biases, c.scales, c.shifts, strict=False):
            h = h @ w[m] + b[m, 0]
            h = torch.nn.functional.layer_norm(h, h.shape[-1:], g[m, 0], s[m, 0], eps=1e-6)
            h = torch.nn.functional.gelu(h)
        h = c.output_scale * (h @ c.weights[-1][m] + c.biases[-1][m, 0])
        torch.testing.assert_close(q[m], h[:, 0], rtol=1e-5, atol=1e-4)
    with torch.no_grad():  # head by head, on a CPU
        torch.testing.assert_close(agent.critic(obs, action), q.detach(), rtol=1e-5, atol=1e-4)
    q[1].sum().backward()
    assert all(p.grad[0].abs().sum() == 0 and p.grad[2].abs().sum() == 0 for p in agent.critic.parameters())


def test_critic_loss_is_the_mean_squared_error_of_every_head() -> None:
    agent, _ = small_agent()
    obs, action, y = torch.randn(6, 5), torch.randn(6, 8), torch.randn(6)
    loss, _ = og.critic_loss(agent.critic, obs, action, y)
    assert loss.item() == pytest.approx(((agent.critic(obs, action) - y) ** 2).mean().item(), rel=1e-5)


def test_agent_critics_start_at_the_value_of_never_succeeding() -> None:
    """That value is the fixed point of the target when no chunk ever succeeds; unseen actions do not look better."""
    obs, action = torch.randn(500, 5), torch.rand(500, 8) * 2 - 1
    agent, args = small_agent(gamma=0.98, reward_offset=-1.0)
    assert agent.critic_ema(obs, action).mean(1) == pytest.approx(-50.0, abs=1.5)
    failing = torch.full((500, 4), args.critic.reward_offset)
    fixed = og.td_target(failing, torch.full((500,), 4.0), torch.zeros(500), torch.full((4, 500), -50.0), 0.98)
    torch.testing.assert_close(fixed, torch.full((500,), -50.0))


def test_update_critic_learns_the_values_of_a_two_state_mdp() -> None:
    """State 0 -> state 1 -> end, reward -1 a step, chunks of 1: Q(0) = -1 - gamma, Q(1) = -1."""
    agent, args = small_agent(chunk=1, gamma=0.9, critic_lr=3e-3, critic_ema=0.1, noise_std=0.1)
    states = torch.eye(5)[:2]
    batch = Batch(
        obs=states.repeat(32, 1),
        actions=torch.rand(64, 1, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        rewards=-torch.ones(64, 1),
        steps=torch.ones(64),
        next_obs=states.flip(0).repeat(32, 1),
        terminated=torch.tensor([0.0, 1.0]).repeat(32),
        rows=np.zeros(64, np.int64),
    )
    for _ in range(400):
        og.update_critic(agent, batch, args)
    q = agent.critic_ema(states, torch.zeros(2, 2)).mean(0)
    assert q.tolist() == pytest.approx([-1.9, -1.0], abs=0.1)


# --- behaviour cloning, acting ----------------------------------------------------------------------------------------


def test_bc_loss_is_minimised_by_the_exact_velocity() -> None:
    """With Gaussian data the minimiser is known; any constant or scaled change of it costs more."""
    n, g = 200_000, torch.Generator().manual_seed(0)
    action = DATA_MEAN + DATA_STD * torch.randn(n, 1, generator=g)
    x0, t = torch.randn(n, 1, generator=g), torch.rand(n, generator=g)

    class Changed(GaussianFlow):
        def __init__(self, offset: float, scale: float) -> None:
            super().__init__()
            self.offset, self.scale = offset, scale

        def forward(self, obs, x, t_emb):
            return self.offset + self.scale * super().forward(obs, x, t_emb)

    def loss(offset: float, scale: float) -> float:
        return og.bc_loss(Changed(offset, scale), torch.zeros(n, 1), action, x0, t).item()

    best = loss(0.0, 1.0)
    # expectation: E[Var(a - x0 | x_t)] = integral of s^2 / ((1-t)^2 + t^2 s^2) dt, in closed form (pi/2) s
    assert best == pytest.approx(math.pi / 2 * DATA_STD, rel=0.02)
    for offset, scale in ((0.05, 1.0), (-0.05, 1.0), (0.0, 1.1), (0.0, 0.9)):
        assert loss(offset, scale) > best


def test_best_of_n_against_enumeration() -> None:
    g = torch.Generator().manual_seed(0)
    q, draws = torch.randn(4, 5, 8, generator=g), torch.rand(4, 5, 8, generator=g)
    for heads in (1, 2, 4):
        got = og.best_of_n(q, draws, heads)
        for i in range(5):
            scores = []
            for n in range(8):
                order = sorted(range(4), key=lambda m: draws[m, i, n].item())
                scores.append(min(q[m, i, n].item() for m in order[:heads]))
            assert got[i].item() == int(np.argmax(scores))
    assert torch.equal(og.best_of_n(q, draws, 0), q.mean(0).argmax(-1))


def test_act_best_of_n_picks_the_candidate_its_critics_prefer() -> None:
    """A critic that values only the first coordinate: best-of-N acts with a larger one than a single sample."""
    agent, args = small_agent(noise_std=0.5, best_of_n=16)
    agent.best_of_n_on = True

    class First(torch.nn.Module):
        def forward(self, obs, action):
            return action[:, 0].expand(3, -1)

    agent.critic_ema = First()
    obs, cpu = torch.zeros(200, 5), torch.device("cpu")
    many = og.act_best_of_n(agent, args, obs, Rng(0, cpu))
    one = og.act_best_of_n(agent, cli.override(args, {"best_of_n": 1}), obs, Rng(0, cpu))
    assert many.shape == one.shape == (200, 4, 2)
    assert many[:, 0, 0].mean() > one[:, 0, 0].mean() + 0.3


def test_update_best_of_n_waits_for_a_success_and_the_actor_for_more() -> None:
    """Before: single samples; no policy gradient, the actor stays."""
    obs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    buffer = ReplayBuffer(500, 5, 2, 4)
    rng = np.random.default_rng(0)
    agent, args = small_agent(critic_warmup=3, critic_successes=4, success_min=8)

    def episode(success: bool) -> None:
        actions = rng.uniform(-1, 1, (20, 2)).astype(np.float32)
        buffer.add_episode(rng.normal(size=(21, 5)).astype(np.float32), actions, -np.ones(20), success, success)

    def acts_by_single_samples() -> bool:
        one = cli.override(args, {"best_of_n": 1})
        return torch.equal(*(og.act_best_of_n(agent, a, obs, Rng(0, torch.device("cpu"))) for a in (args, one)))

    episode(False), episode(False)
    for _ in range(4):
        og.update(agent, buffer, args, rng)
        assert acts_by_single_samples()
    agent.updates = 0
    episode(True)
    before = [p.clone() for p in agent.actor.parameters()]
    for k in range(5):
        assert acts_by_single_samples() == (k < 3)
        info = og.update(agent, buffer, args, rng)
        assert "nonzero" not in info and "bc_loss" not in info and "td_loss" in info
    assert all(torch.equal(p, q) for p, q in zip(before, agent.actor.parameters(), strict=True))
    assert not agent.policy_gradient_on
    episode(True), episode(True), episode(True)
    info = og.update(agent, buffer, args, rng)
    assert agent.policy_gradient_on and "nonzero" in info and "bc_loss" in info
    assert not acts_by_single_samples()


def test_update_learning_rate_counts_the_actors_own_updates() -> None:
    """The warm-up begins with the first step along the critics, however long they were trained before it."""
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(500, 5, 2, 4)
    buffer.add_episode(
        rng.normal(size=(21, 5)).astype(np.float32), rng.uniform(-1, 1, (20, 2)).astype(np.float32),
        -np.ones(20), True, True,
    )  # fmt: skip
    agent, args = small_agent(
        critic_warmup=3, critic_successes=1, success_min=8, actor_lr=1e-3, actor_lr_min=0.0, actor_lr_warmup=4,
        actor_lr_period=1_000,
    )  # fmt: skip
    before = [p.clone() for p in agent.actor.parameters()]
    for k in range(6):
        og.update(agent, buffer, args, rng)
        assert agent.updates == k + 1 and agent.actor_updates == max(0, k - 2)
        if k >= 3:
            assert agent.actor_opt.param_groups[0]["lr"] == pytest.approx(1e-3 * (k - 3) / 4)
        moved = any(not torch.equal(p, q) for p, q in zip(before, agent.actor.parameters(), strict=True))
        assert moved == (k > 3)  # its first step has length zero


def test_demos_chunks_repeat_the_last_action_and_stay_inside_their_episode() -> None:
    demos = Demos(
        obs=np.arange(5, dtype=np.float32)[:, None],
        actions=np.arange(5, dtype=np.float32)[:, None],
        ends=np.array([3, 5]),
        name="two episodes",
    )
    obs, action = demos.chunks(3)
    assert obs[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert action.tolist() == [[0, 1, 2], [1, 2, 2], [2, 2, 2], [3, 4, 4], [4, 4, 4]]


# --- schedules, presets, flags ----------------------------------------------------------------------------------------


# --- critics that start on demonstrations ----------------------------------------------------------------------------


def demonstrations() -> Demos:
    """Two of 6 and 3 steps; the second is shorter than a chunk of 4."""
    rng = np.random.default_rng(0)
    obs, actions = rng.standard_normal((9, 5)), rng.uniform(-1, 1, (9, 2))
    return Demos(obs.astype(np.float32), actions.astype(np.float32), np.array([6, 9]), "made here")


def test_calql_term_by_hand() -> None:
    """One head, one state: of four other chunks one is below the return of 1 and counts as much as that."""
    q_demo, q_other, returns = torch.tensor([[2.0]]), torch.tensor([[[3.0, -5.0, 4.0, 1.5]]]), torch.tensor([1.0])
    want = math.log(math.exp(3) + math.exp(1) + math.exp(4) + math.exp(1.5)) - 2
    assert og.calql_term(q_demo, q_other, returns).item() == pytest.approx(want, rel=1e-6)
    below = q_other.clone().requires_grad_()
    og.calql_term(q_demo, below, returns).backward()
    assert below.grad[0, 0, 1] == 0 and (below.grad[0, 0, [0, 2, 3]] > 0).all()


def test_demos_episodes_repeat_the_last_observation() -> None:
    demos = demonstrations()
    (obs, actions), (obs2, actions2) = demos.episodes()
    assert obs.shape == (7, 5) and actions.shape == (6, 2) and obs2.shape == (4, 5) and actions2.shape == (3, 2)
    assert (obs[:6] == demos.obs[:6]).all() and (obs[6] == demos.obs[5]).all() and (obs2[:3] == demos.obs[6:]).all()


def test_pretrain_critic_gives_each_chunk_the_return_that_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """-1 a step, 4 at the end (offset -1, success 1, bonus 4), gamma 0.5; afterwards nothing waits."""
    changes = dict(gamma=0.5, success_bonus=4.0, calql_steps=5, critic_batch=32)
    agent, args = small_agent(**changes)
    seen: dict[int, set[float]] = {}

    def spy(agent: og.Agent, batch: Batch, args: og.Args, returns: torch.Tensor) -> og.Info:
        for row, value in zip(batch.rows.tolist(), returns.tolist(), strict=True):
            seen.setdefault(row, set()).add(round(value, 6))
        assert batch.actions.shape == (32, 4, 2)
        return {"calql": torch.zeros(()), "td_loss": torch.zeros(())}

    monkeypatch.setattr(og, "update_critic", spy)
    run = MagicMock(obs_dim=5, act_dim=2)
    run.stop.requested = False
    assert not agent.best_of_n_on
    og.pretrain_critic(run, agent, demonstrations(), args)
    assert agent.calql_step == 5 and agent.best_of_n_on and agent.policy_gradient_on and run.save.called
    # The second demonstration is one chunk, in rows 7 to 11: its end is repeated once, which pays nothing.
    left = {0: 6, 1: 5, 2: 4, 7: 3}
    want = {row: -sum(0.5**i for i in range(n)) + 5 * 0.5 ** (n - 1) for row, n in left.items()}
    assert seen == {row: {round(value, 6)} for row, value in want.items()}


def test_pretrain_critic_stopped_within_leaves_the_actor_still(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, args = small_agent(calql_steps=5, critic_batch=32)
    run = MagicMock(obs_dim=5, act_dim=2)
    run.stop.requested = False

    def stop_at_once(*_: object) -> og.Info:
        run.stop.requested = True
        return {"calql": torch.zeros(()), "td_loss": torch.zeros(())}

    monkeypatch.setattr(og, "update_critic", stop_at_once)
    og.pretrain_critic(run, agent, demonstrations(), args)
    assert agent.calql_step == 1 and not (agent.best_of_n_on or agent.policy_gradient_on)


@pytest.mark.parametrize("env", ["kitchen-mixed", "pen-raw", "door-dense"])
def test_check_refuses_cal_ql_where_success_is_not_the_only_reward(env: str) -> None:
    args = cli.flatten(og.default_args(env))
    og.settings.check(args)
    with pytest.raises(UserError, match=f"--calql-steps: success is not the only reward of {env}"):
        og.settings.check(args | {"calql_steps": 500})


def test_update_critic_with_returns_puts_demonstrated_chunks_above_others() -> None:
    buffer, rng, gaps = demonstrated(), np.random.default_rng(1), []
    for returns in (None, torch.zeros(64)):
        agent, args = small_agent(critic_lr=3e-3, reward_offset=0.0)
        for _ in range(150):
            batch = buffer.sample(64, rng, torch.device("cpu"))
            info = og.update_critic(agent, batch, args, returns)
        with torch.no_grad():
            other = agent.critic(batch.obs, torch.rand(64, 8) * 2 - 1).mean()
            gaps.append((agent.critic(batch.obs, batch.actions.flatten(1)).mean() - other).item())
        assert all(math.isfinite(v.item()) and not v.requires_grad for v in info.values())
        assert ("calql" in info) == (returns is not None)
    assert gaps[1] > gaps[0] + 0.5


def test_periodic_lr_warms_up_decays_and_repeats() -> None:
    a = og.ActorArgs(actor_lr=4.5e-5, actor_lr_min=2e-5, actor_lr_warmup=2_000, actor_lr_period=50_000)
    assert og.periodic_lr(0, a) == 2e-5 and og.periodic_lr(2_000, a) == pytest.approx(4.5e-5)
    assert og.periodic_lr(1_000, a) == pytest.approx(3.25e-5) and og.periodic_lr(26_000, a) == pytest.approx(3.25e-5)
    assert og.periodic_lr(49_999, a) == pytest.approx(2e-5, rel=1e-4) and og.periodic_lr(50_000, a) == 2e-5
    a = replace(a, actor_lr_period=0)  # warms up once, then constant
    assert og.periodic_lr(0, a) == 2e-5 and og.periodic_lr(1_000, a) == pytest.approx(3.25e-5)
    assert og.periodic_lr(2_000, a) == og.periodic_lr(123_456, a) == 4.5e-5
    assert og.periodic_lr(0, replace(a, actor_lr_warmup=0)) == 4.5e-5


def test_default_args_paper_preset_has_the_paper_s_sizes_and_schedule() -> None:
    """Generation 3 of the released run scripts, Square column; our corrections stay on."""
    a = cli.flatten(og.default_args("lift", "paper", "ogpo+ca"))
    want = dict(
        chunk=4, gamma=0.99, flow_steps=10, critic_ema=0.05, actor_ema=0.005, noise_std=0.05, bc_coef=1.0,
        advantage="conservative", actor_hidden=(512,) * 4, critic_hidden=(512,) * 4,
        bc_steps=500_000, bc_stop_success=0.45, start_training=10_000, total_steps=2_000_000, eval_every=10_000,
        critic_batch=256, states=256, eta=0.0, critic_scale=1.0, group=32, clip=0.01, heads=10, update_every=1,
        replay_size=2_000_000, best_of_n=8, best_of_n_heads=2,
        actor_lr=4.5e-5, actor_lr_min=2e-5, actor_lr_warmup=2_000, actor_lr_period=50_000,
        critic_lr=4.5e-5, bc_lr=3e-4, bc_batch=256, reward_offset=-1.0, success_bonus=5.0,
        eval_interval_episodes=64, bc_eval_episodes=64, horizon=300,
    )  # fmt: skip
    assert {k: a[k] for k in want} == want
    ours = cli.flatten(og.Args())
    for name in ("critic_warmup", "critic_successes"):
        assert a[name] == ours[name] > 0


@pytest.mark.parametrize("module", SCRIPTS)
def test_default_args_are_the_same_whatever_the_device(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*TASKS, "gymnasium:Pendulum-v1"] if module is og else ["toy", "lift"]
    without = [module.default_args(name, *flags) for name in names for flags in ((), ("paper",))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [module.default_args(name, *flags) for name in names for flags in ((), ("paper",))] == without
    assert module.default_args().run.preset == "laptop"


def test_default_args_variants_differ_only_in_their_stabilizers() -> None:
    full, plus, plain = (cli.flatten(og.default_args("lift", "laptop", v)) for v in ("ogpo+ca", "ogpo+", "ogpo"))
    changed = lambda other: {k for k in full if full[k] != other[k]} - {"variant"}  # noqa: E731
    assert changed(plus) == {"advantage"} and plus["advantage"] == "vanilla"
    assert changed(plain) == {"advantage", "bc_coef", "best_of_n"}
    assert (plain["bc_coef"], plain["best_of_n"], full["best_of_n"], full["bc_coef"]) == (0.0, 1, 8, 1.0)


def test_parse_a_flag_wins_over_preset_task_and_variant() -> None:
    default = og.default_args("toy", "paper", "ogpo")
    args = cli.parse(default, ["--env", "toy", "--flow-steps", "7", "--best-of-n", "3", "--horizon", "9"], "")
    assert (args.policy.flow_steps, args.policy.best_of_n, args.task.horizon) == (7, 3, 9)
    assert args.critic.heads == 10  # the preset's


@pytest.mark.parametrize("module", SCRIPTS)
def test_args_every_flag_is_in_the_script_documented_and_read(module: ModuleType) -> None:
    """Read in the script, or by name where a run starts."""
    script, common = Path(module.__file__), Path(og.__file__).parent / "common"
    flags, start = cli.flatten(module.Args()), ast.parse((common / "start.py").read_text())
    tree, lines = ast.parse(script.read_text()), script.read_text().splitlines()
    reads = {n.value for n in ast.walk(start) if isinstance(n, ast.Constant)} | {"env", "preset", "variant"}
    reads |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    fields = [
        n for c in tree.body if isinstance(c, ast.ClassDef) and c.name.endswith("Args") and c.name != "Args"
        for n in c.body if isinstance(n, ast.AnnAssign)
    ]  # fmt: skip
    documented = {n.target.id: "  # " in lines[n.end_lineno - 1] for n in fields}
    assert [f for f in flags if f not in reads] == []
    assert documented.keys() == set(flags) and all(documented.values())
    assert module is not og or len(flags) <= 72


# --- replay -----------------------------------------------------------------------------------------------------------


def fill(buffer: ReplayBuffer, length: int, first: int, terminated: bool, success: bool) -> None:
    """Observation t of the episode is first + t, action t is 10 * (first + t), reward t is t."""
    t = np.arange(length + 1, dtype=np.float32)
    buffer.add_episode(first + t[:, None], 10 * (first + t[:-1, None]), t[:-1], terminated, success)


def test_replay_buffer_chunks_never_cross_an_episode_end() -> None:
    buffer = ReplayBuffer(100, 1, 1, 3)
    fill(buffer, 5, 0, True, True)
    fill(buffer, 2, 50, False, False)  # shorter than a chunk: no start
    fill(buffer, 4, 80, False, False)
    batch = buffer.sample(2_000, np.random.default_rng(0), torch.device("cpu"))
    starts = batch.obs[:, 0]
    assert set(starts.tolist()) == {0, 1, 2, 80, 81}
    assert torch.equal(batch.next_obs[:, 0], starts + 3)
    assert torch.equal(batch.actions[:, :, 0], 10 * (starts[:, None] + torch.arange(3)))
    # only the chunk that ends with the terminating step is terminal; a truncated episode has none
    assert torch.equal(batch.terminated, (starts == 2).float())
    good = buffer.sample(500, np.random.default_rng(0), torch.device("cpu"), success=True)
    assert set(good.obs[:, 0].tolist()) == {0, 1, 2}


def test_replay_buffer_rewards_of_several_chunks_stop_at_the_end_of_an_episode() -> None:
    buffer = ReplayBuffer(100, 1, 1, 2)
    fill(buffer, 9, 0, True, True)
    fill(buffer, 7, 50, False, False)
    batch = buffer.sample(2_000, np.random.default_rng(0), torch.device("cpu"), chunks=3)
    starts, last = batch.obs[:, 0], torch.where(batch.obs[:, 0] < 50, 9.0, 57.0)
    after = torch.minimum(starts + 6, last)
    assert set(starts.tolist()) == {*range(8), *range(50, 56)}
    assert torch.equal(batch.next_obs[:, 0], after) and torch.equal(batch.steps, after - starts)
    assert torch.equal(batch.terminated, (after == 9).float())  # the second episode is cut: it bootstraps
    seen = starts[:, None] + torch.arange(6)
    rewards = torch.where(seen < after[:, None], seen - 50.0 * (starts[:, None] >= 50), 0.0)
    assert torch.equal(batch.rewards, rewards)
    assert torch.equal(batch.actions[:, :, 0], 10 * (starts[:, None] + torch.arange(2)))


@pytest.mark.parametrize("chunks", [1, 2])
def test_replay_buffer_rows_of_whole_chunks_count_steps(chunks: int) -> None:
    """A row with two rewards, as from pixels, is two steps."""
    buffer = ReplayBuffer(100, 1, 1, 1, rewards=2)
    t = np.arange(4, dtype=np.float32)
    buffer.add_episode(t[:, None], t[:-1, None], np.stack([2 * t[:-1], 2 * t[:-1] + 1], 1), True, True)
    batch = buffer.sample(200, np.random.default_rng(0), torch.device("cpu"), chunks=chunks)
    starts = batch.obs[:, 0]
    after = torch.minimum(starts + chunks, torch.tensor(3.0))
    assert torch.equal(batch.next_obs[:, 0], after) and torch.equal(batch.steps, 2 * (after - starts))
    steps = 2 * starts[:, None] + torch.arange(2 * chunks)
    assert torch.equal(batch.rewards, torch.where(steps < 6, steps, 0.0))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_replay_buffer_an_end_before_the_chunk_is_full_keeps_its_return(steps: int) -> None:
    """One chunk, whose target is the discounted reward up to the end whatever the critics say of what follows."""
    buffer = ReplayBuffer(100, 1, 1, 4)
    fill(buffer, steps, 10, True, True)
    assert buffer.starts.size == buffer.success_starts.size == 1
    batch = buffer.sample(3, np.random.default_rng(0), torch.device("cpu"), success=True)
    assert (batch.obs == 10).all() and (batch.next_obs == 10 + steps).all() and (batch.terminated == 1).all()
    assert batch.actions[0, :, 0].tolist() == [10.0 * (10 + min(i, steps - 1)) for i in range(4)]
    target = og.td_target(batch.rewards, batch.steps, batch.terminated, torch.full((2, 3), 1e6), 0.5)
    assert torch.allclose(target, torch.full((3,), sum(t * 0.5**t for t in range(steps))))


def test_replay_buffer_drops_whole_old_episodes_and_survives_a_round_trip() -> None:
    buffer = ReplayBuffer(40, 1, 1, 2)
    rng = np.random.default_rng(0)
    for e in range(60):
        fill(buffer, int(rng.integers(1, 12)), 100 * e, bool(e % 2), bool(e % 3))
        rows = sum(hi - lo for lo, hi, _ in buffer.episodes)
        assert rows <= 40
        want = [buffer.obs[r, 0] for lo, hi, _ in buffer.episodes for r in range(lo, max(lo, hi - 2))]
        q = buffer.starts
        got = [buffer.obs[q.rows[(q.head + i) % 40], 0] for i in range(q.size)]
        assert got == want
        good = sum(max(0, hi - lo - 2) for lo, hi, s in buffer.episodes if s)
        assert buffer.success_starts.size == good
    copy = ReplayBuffer(40, 1, 1, 2)
    copy.load_state_dict(buffer.state_dict())
    one, two = (b.sample(50, np.random.default_rng(1), torch.device("cpu")) for b in (buffer, copy))
    assert all(np.array_equal(getattr(one, k), getattr(two, k)) for k in vars(one))
    fill(buffer, 9, 7, True, True), fill(copy, 9, 7, True, True)
    assert buffer.episodes == copy.episodes
