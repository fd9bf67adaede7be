"""baselines/dppo.py: what it shares with ogpo_state.py, and its terms against closed forms."""

import difflib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import ogpo_state as og
from baselines import dppo
from common import checkpoint, cli
from common.envs import TASKS
from common.rng import Rng
from common.runlog import read_metrics
from settings import ogpo as settings
from tests.helpers import TINY, differing, gradients, new_agent, perturbed, slow, weights
from tests.warm import run_script

# What it defines in its own words, or does not have; all else is the text of ogpo_state.py.
OWN = {
    *("COMPILED", "RECORDED", "CLIP_GROWTH", "REWARD_CLIP", "RunArgs", "PolicyArgs", "ActorArgs", "CriticArgs"),
    *("WITHOUT", "default_args", "NoiseNet", "ValueNet", "transition", "sample_chain", "chain_log_prob", "gae"),
    *("compare", "step_weights", "ppo_loss", "Agent", "Rollout", "draw_chains", "executed", "act"),
    *("update_minibatch", "update", "pretrain", "train", "main"),
    *("CALQL_COEF", "CALQL_ACTIONS", "CriticEnsemble", "best_of_n", "group_advantage", "td_target", "critic_loss"),
    *("calql_term", "periodic_lr", "act_best_of_n", "update_ema", "update_actor", "update_critic", "pretrain_critic"),
}
MODES = [("fixed", "step"), ("learned", "chain"), ("fixed", "chain"), ("learned", "step")]
SHORT = [
    *(*TINY, "--num-envs", "2", "--rollout", "12", "--minibatch", "8", "--epochs", "2", "--value-iterations", "1"),
    *("--log-every", "100", "--eval-every", "200"),
]


def make(**changes: object) -> tuple[dppo.Agent, dppo.Args]:
    """Agent and arguments: observations of 5 numbers, actions of 2, chunks of 4."""
    return new_agent(dppo, **dict(num_envs=6, rollout=8, minibatch=16) | changes)


def filled(agent: dppo.Agent, args: dppo.Args, seed: int = 0) -> dppo.Rollout:
    """A rollout of random states, in which a chunk is worth the mean of its actions, and no value follows."""
    rollout, rng = dppo.Rollout(args, 5, 8, torch.device("cpu")), Rng(seed, torch.device("cpu"))
    n, one = args.task.num_envs, torch.ones(args.task.num_envs)
    for _ in range(args.run.rollout):
        obs = rng.randn(n, 5)
        chain, log_prob = dppo.draw_chains(agent, args, obs, rng)
        reward = dppo.executed(chain, 4).mean((1, 2))
        rollout.add(obs=obs, next_obs=rng.randn(n, 5), chain=chain, log_prob=log_prob, reward=reward)
        rollout.row -= 1
        rollout.add(discount=0.9 * one, terminated=one, over=one)
    return rollout


def test_it_shares_all_else_with_the_script() -> None:
    assert differing(og, dppo) == OWN
    a, b = (Path(m.__file__).read_text().splitlines() for m in (og, dppo))
    assert len(b) <= 650
    pretrain = [
        [line for line in text[text.index(next(x for x in text if x.startswith("def pretrain("))) :] if line]
        for text in (a, b)
    ]
    ends = [next(i for i, line in enumerate(t) if i and line.startswith("def ")) for t in pretrain]
    changed = difflib.ndiff(pretrain[0][: ends[0]], pretrain[1][: ends[1]])
    assert [line[0] for line in changed if line[0] in "+-"] == ["-"]  # the slow copy of the actor


def test_defaults_exist_for_every_task_and_preset() -> None:
    for task in TASKS:
        for preset in ("laptop", "paper"):
            args = dppo.default_args(task, preset)
            settings.check(cli.flatten(args))
            assert (args.actor.actor_lr, args.critic.critic_lr) == (1e-4, 1e-3) or task == "toy"
            _, sigmas = og.flow_schedule(args.policy, torch.device("cpu"))
            assert sigmas[-1].item() == pytest.approx(0.1, abs=0.02)  # DPPO's floor
            assert (sigmas.diff() < 0).all()
            assert args.run.total_steps > 10 * args.run.rollout * args.task.num_envs * args.policy.chunk


# --- chains and ratios ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise, ratio", MODES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ratio_is_one_at_equal_parameters_and_not_at_others(noise: str, ratio: str, eta: float) -> None:
    agent, args = make(noise=noise, eta=eta)
    obs = torch.randn(32, 5)
    chain, old = dppo.draw_chains(agent, args, obs, agent.rng)
    new, _ = dppo.chain_log_prob(agent.actor, agent.noise_net, obs, chain, args.policy)
    log_ratio = dppo.compare(new, old, ratio)
    assert log_ratio.shape == (32, 4 if ratio == "step" else 1)
    assert log_ratio.abs().max() < 1e-5
    perturbed(agent.actor, 0.05)
    new, _ = dppo.chain_log_prob(agent.actor, agent.noise_net, obs, chain, args.policy)
    assert dppo.compare(new, old, ratio).abs().mean() > 1e-3


def test_ratio_is_not_one_where_acting_has_another_time_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of ReinFlow's code would be seen by the test above."""
    agent, args = make(noise="learned")
    perturbed(agent.actor, 0.3)
    obs = torch.randn(32, 5)
    schedule = dppo.flow_schedule
    stretched = lambda p, device: (torch.linspace(0, 1, p.flow_steps), schedule(p, device)[1])  # noqa: E731
    monkeypatch.setattr(dppo, "flow_schedule", stretched)
    chain, old = dppo.draw_chains(agent, args, obs, agent.rng)
    monkeypatch.setattr(dppo, "flow_schedule", schedule)
    new, _ = dppo.chain_log_prob(agent.actor, agent.noise_net, obs, chain, args.policy)
    assert dppo.compare(new, old, "chain").abs().mean() > 1e-3


@pytest.mark.parametrize("noise", ["fixed", "learned"])
def test_log_density_is_that_of_gaussian_steps(noise: str) -> None:
    agent, args = make(noise=noise)
    perturbed(agent.actor, 0.3)
    p, obs = args.policy, torch.randn(7, 5)
    chain, log_prob = dppo.draw_chains(agent, args, obs, agent.rng)
    times, sigmas = og.flow_schedule(p, obs.device)
    with torch.no_grad():
        for k in range(4):
            x, emb = chain[:, k], agent.actor.embed(times[k])
            v = agent.actor(obs, x, emb)
            if noise == "fixed":
                mean, sigma = og.step_mean(x, v, times[k], sigmas[k], p), sigmas[k]
            else:
                mean, sigma = (x + v / 4).clamp(-1, 1), agent.noise_net(obs, emb)
            want = Normal(mean, sigma).log_prob(chain[:, k + 1]).mean(-1) + 0.5 * math.log(2 * math.pi)
            assert torch.allclose(log_prob[:, k], want, atol=1e-4)
            assert (chain[:, k + 1] - mean).abs().le(3 * sigma + 1e-5).all()


def test_chains_of_fixed_noise_are_those_of_the_script() -> None:
    agent, args = make()
    obs, noise = torch.randn(6, 5), torch.randn(6, 5, 8)
    ours, log_prob = dppo.sample_chain(agent.actor, None, obs, noise, args.policy)
    theirs, joint = og.sample_chain(agent.actor, obs, noise, args.policy)
    assert torch.allclose(ours, theirs, atol=1e-5)
    _, sigmas = og.flow_schedule(args.policy, obs.device)
    first = -0.5 * noise[:, 0].square().mean(-1)
    assert torch.allclose((first + (log_prob + sigmas.log()).sum(1)) / 5, joint, atol=1e-6)


def test_ratio_of_a_chain_is_its_joint_density_per_coordinate() -> None:
    """With the first noise, which cancels: (K+1) D coordinates."""
    agent, args = make()
    obs = torch.randn(6, 5)
    chain, old = dppo.draw_chains(agent, args, obs, agent.rng)
    before = og.chain_log_prob(agent.actor, obs, chain, args.policy)
    perturbed(agent.actor, 0.1)
    after = og.chain_log_prob(agent.actor, obs, chain, args.policy)
    new, _ = dppo.chain_log_prob(agent.actor, None, obs, chain, args.policy)
    assert torch.allclose(dppo.compare(new, old, "chain")[:, 0], after - before, atol=1e-5)


def test_learned_noise_stays_between_its_bounds_and_has_its_own_gradient() -> None:
    agent, _ = make(noise="learned", noise_low=0.07, noise_high=0.3)
    obs, emb = 100 * torch.randn(64, 5), agent.actor.embed(torch.rand(64))
    start = agent.noise_net(0 * obs, emb)
    assert start.log().mean().item() == pytest.approx(math.log(math.sqrt(0.07 * 0.3)), abs=0.2)  # in the middle
    perturbed(agent.noise_net, 3.0)
    sigma = agent.noise_net(obs, emb)
    assert 0.07 - 1e-6 <= sigma.min() < 0.08 and 0.28 < sigma.max() <= 0.3 + 1e-6
    sigma.log().mean().backward()
    assert all(p.grad is None for p in agent.actor.parameters())
    assert gradients(agent.noise_net).abs().max() > 0


# --- advantages -------------------------------------------------------------------------------------------------------


def by_definition(
    reward: torch.Tensor, discount: torch.Tensor, terminated: torch.Tensor, over: torch.Tensor, value: torch.Tensor,
    next_value: torch.Tensor, lam: float,
) -> Iterator[float]:  # fmt: skip
    """Of one environment: the weighted mean of all n-step advantages, until the episode or the rollout ends."""
    for start in range(len(reward)):
        total, weight, advantages = 0.0, 1.0, []
        for t in range(start, len(reward)):
            total += weight * reward[t].item()
            weight *= discount[t].item()
            bootstrap = 0.0 if terminated[t] else weight * next_value[t].item()
            advantages.append(total + bootstrap - value[start].item())
            if over[t]:
                break
        n = len(advantages)
        share = [(1 - lam) * lam**i for i in range(n - 1)] + [lam ** (n - 1)]
        yield sum(s * a for s, a in zip(share, advantages, strict=True))


def random_steps() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    steps = {k: torch.randn(9, 3, generator=g) for k in ("reward", "value", "next_value")}
    steps["discount"] = 0.8 + 0.2 * torch.rand(9, 3, generator=g)
    steps["terminated"], steps["over"] = torch.zeros(9, 3), torch.zeros(9, 3)
    steps["over"][4, 0] = 1  # truncated in the middle
    steps["over"][6, 1] = steps["terminated"][6, 1] = 1
    steps["over"][8, 2] = 1  # truncated with the rollout
    goes_on = steps["over"][:-1] == 0
    steps["next_value"][:-1][goes_on] = steps["value"][1:][goes_on]
    return steps


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_equals_its_definition(lam: float) -> None:
    steps = random_steps()
    ours = dppo.gae(**steps, lam=lam)
    for env in range(3):
        one = {k: x[:, env] for k, x in steps.items()}
        assert ours[:, env].tolist() == pytest.approx(list(by_definition(**one, lam=lam)), abs=1e-5)


def test_nothing_crosses_the_end_of_a_truncated_episode() -> None:
    steps = random_steps()
    before = dppo.gae(**steps, lam=0.95)[:5, 0]
    other = {k: x.clone() for k, x in steps.items()}
    for k in ("reward", "value", "next_value"):
        other[k][5:, 0] += 100  # the next episode
    assert torch.equal(dppo.gae(**other, lam=0.95)[:5, 0], before)
    other["next_value"][4, 0] += 1  # the value of the truncated one's last observation counts, discounted
    changed = dppo.gae(**other, lam=0.95)[:5, 0] - before
    assert changed[4].item() == pytest.approx(steps["discount"][4, 0].item(), rel=1e-4)
    assert (changed > 0).all()
    other["terminated"][4, 0] = 1
    assert dppo.gae(**other, lam=0.95)[4, 0].item() == pytest.approx((steps["reward"] - steps["value"])[4, 0].item())


def test_scaled_reward_by_hand() -> None:
    """Returns so far 1, 0.5 + 2 = 2.5 (over), 4; and 0 three times: their deviation, then that of all since."""
    _, args = make(num_envs=2, rollout=3, reward="raw")
    rollout = dppo.Rollout(args, 5, 8, torch.device("cpu"))
    rollout.reward[:, 0] = torch.tensor([1.0, 2.0, 4.0])
    rollout.discount[:] = 0.5
    rollout.over[1, 0] = 1
    returns = torch.tensor([1.0, 2.5, 4.0, 0.0, 0.0, 0.0])
    assert torch.allclose(rollout.scaled_reward(), rollout.reward / returns.std(correction=0))
    assert rollout.returns.tolist() == [4.0, 0.0]
    more = [2.0, 1.0, 0.5, 0.0, 0.0, 0.0]  # the first environment goes on from 4, and its second chunk ends it: 0 after
    more[2] = 0.0
    rollout.reward[:] = 0.0
    rollout.reward[2, 1] = more[5] = 20.0
    deviation = torch.cat([returns, torch.tensor(more)]).std(correction=0).item()
    assert rollout.scaled_reward().max().item() == pytest.approx(20 / deviation, rel=1e-4)
    rollout.moments[:] = torch.tensor([1e6, 0.0, 1.0])  # returns of 0.001 until now: this one is out of all proportion
    assert rollout.scaled_reward().max() == 10


def test_value_of_never_succeeding_is_where_the_value_network_starts() -> None:
    obs = torch.randn(200, 5)
    agent, _ = make(reward_offset=-1.0, gamma=0.95)
    assert agent.critic(obs).mean().item() == pytest.approx(-20, abs=1)
    assert agent.critic(obs).std() < 1
    agent, _ = make(reward="raw")
    assert abs(agent.critic(obs).mean().item()) < 1


# --- objective --------------------------------------------------------------------------------------------------------


def test_step_weights_grow_from_the_first_to_the_last_step() -> None:
    actor = dppo.default_args("lift").actor
    weight, clip = dppo.step_weights(10, actor, torch.device("cpu"))
    assert clip[0].item() == pytest.approx(0.001) and clip[-1].item() == pytest.approx(0.01)
    middle = 0.001 + 0.009 * (math.exp(3 * 4 / 9) - 1) / (math.exp(3) - 1)
    assert clip[4].item() == pytest.approx(middle, rel=1e-5)
    assert weight.tolist() == pytest.approx([0.99 ** (9 - i) for i in range(10)], rel=1e-5)
    for steps, kind in ((1, "step"), (10, "chain")):
        weight, clip = dppo.step_weights(steps, replace(actor, ratio=kind), torch.device("cpu"))
        assert (weight.tolist(), clip.tolist()) == ([1.0], pytest.approx([0.01]))


def test_ppo_loss_by_hand() -> None:
    log_ratio = torch.tensor([[1.5, 1.0], [0.5, 1.1]]).log().requires_grad_()
    advantage, weight, clip = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0]), torch.tensor([0.1, 0.2])
    loss, info = dppo.ppo_loss(log_ratio, advantage, weight, clip)
    # min(1.5, 1.1) * 1, 1 * 2; min(0.5 * -0.5, 0.9 * -0.5), 1.1 * -1
    assert loss.item() == pytest.approx(-(1.1 + 2.0 - 0.45 - 1.1) / 4)
    loss.backward()
    assert log_ratio.grad.tolist() == [[0.0, pytest.approx(-0.5)], [0.0, pytest.approx(1.1 / 4)]]
    assert info["clipped"].item() == 0.5
    assert info["ratio_off"].item() == pytest.approx((0.5 + 0 + 0.5 + 0.1) / 4)
    assert info["kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 1.0, 0.5, 1.1)) / 4)


def test_with_one_step_and_no_denoising_discount_it_is_ppo() -> None:
    """On a Gaussian of mean f(s) and deviation sigma, whose log-density is a mean over its coordinates."""
    agent, args = make(flow_steps=1, denoising_gamma=1.0, clip=0.2, noise_std=0.3, eta=0.0)
    obs, advantage = torch.randn(50, 5), torch.randn(50)
    chain, old = dppo.draw_chains(agent, args, obs, agent.rng)
    perturbed(agent.actor, 0.05)
    new, _ = dppo.chain_log_prob(agent.actor, None, obs, chain, args.policy)
    weights_ = dppo.step_weights(1, args.actor, obs.device)
    loss, info = dppo.ppo_loss(dppo.compare(new, old, "step"), advantage, *weights_)
    with torch.no_grad():
        v = agent.actor(obs, chain[:, 0], agent.actor.embed(torch.zeros(())))
        x, c = chain[:, 0], args.policy.noise_std
        mean = (x + v - 0.5 * c**2 * x).clamp(-1, 1)
        ratio = (Normal(mean, c).log_prob(chain[:, 1]).mean(-1) - (old[:, 0] - 0.5 * math.log(2 * math.pi))).exp()
        want = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)
    assert 0 < info["clipped"] < 1
    assert (dppo.compare(new, old, "chain") * 2).exp()[:, 0].tolist() == pytest.approx(ratio.tolist(), rel=1e-3)


# --- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise, ratio", MODES[:2])
def test_updates_raise_what_is_rewarded(noise: str, ratio: str) -> None:
    agent, args = make(
        noise=noise, ratio=ratio, eta=0.0, value_iterations=0, actor_lr=3e-3, clip=0.5, clip_first=0.5, epochs=5,
        kl_stop=1.0, rollout=16, minibatch=32,
    )  # fmt: skip
    rewards = []
    for seed in range(12):
        rollout = filled(agent, args, seed)
        rewards.append(rollout.reward.mean().item())
        dppo.update(agent, rollout, args)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    assert agent.iterations == 12 and rollout.row == 0


def test_the_value_network_goes_ahead_of_the_actor() -> None:
    agent, args = make(value_iterations=2)
    actor, critic = weights(agent.actor), weights(agent.critic)
    infos = [dppo.update(agent, filled(agent, args, seed), args) for seed in range(2)]
    assert torch.equal(weights(agent.actor), actor) and not torch.equal(weights(agent.critic), critic)
    assert not any("pg_loss" in info for info in infos[1])
    dppo.update(agent, filled(agent, args), args)
    assert not torch.equal(weights(agent.actor), actor)


def test_targets_of_the_value_network_are_advantage_plus_value() -> None:
    """Where every chunk ends an episode that is its reward."""
    agent, args = make(value_iterations=100, epochs=30, critic_lr=3e-3)
    losses = []
    for _ in range(6):
        rollout = filled(agent, args)
        losses.append(torch.stack([i["value_loss"] for i in dppo.update(agent, rollout, args)[:-1]]).mean().item())
    error = (agent.critic(rollout.obs) - rollout.reward).square().mean()
    assert losses[-1] < 0.05 * losses[0] and error < 0.2


def test_passes_stop_at_the_divergence_and_drop_what_fills_no_minibatch() -> None:
    agent, args = make(value_iterations=0, epochs=5, minibatch=20)  # 48 chains: 2 of 20
    assert len(dppo.update(agent, filled(agent, args), args)) == 5 * 2 + 1
    args = cli.override(args, dict(kl_stop=1e-12))
    infos = dppo.update(agent, filled(agent, args), args)
    assert len(infos) == 2 + 1 and infos[-1]["passes"].item() == 1
    args = cli.override(args, dict(minibatch=1_000, kl_stop=1.0))  # more than there is: all at once
    assert len(dppo.update(agent, filled(agent, args), args)) == 5 + 1


def test_entropy_widens_learned_noise_and_does_not_touch_fixed() -> None:
    for noise in ("learned", "fixed"):
        agents = []
        for coef in (0.0, 10.0):
            agent, args = make(noise=noise, ratio="chain", value_iterations=0, entropy_coef=coef, actor_lr=1e-2)
            infos = dppo.update(agent, filled(agent, args), args)
            agents.append(agent)
        widths = [info["log_sigma"].item() for info in infos[:-1]]
        assert (widths[-1] > widths[0] + 0.1) == (noise == "learned")
        same = torch.equal(weights(agents[0].actor), weights(agents[1].actor))
        assert same == (noise == "fixed")


# --- the rollout ------------------------------------------------------------------------------------------------------


class TwoEnvs:
    """Shows (environment, its steps in all, 0, 0, 0); episodes of the first are cut after two steps of a chunk."""

    num_envs = 2

    def __init__(self) -> None:
        self.calls, self.resets = 0, []

    def _obs(self) -> np.ndarray:
        return np.array([[i, self.calls, 0, 0, 0] for i in range(2)], np.float32)

    def reset(self, *, seed: list[int], options: dict[str, np.ndarray]) -> tuple[np.ndarray, dict]:
        self.resets.append(options["reset_mask"].tolist())
        return self._obs() + 100, {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        assert actions.shape == (2, 4, 2) and np.abs(actions).max() <= 1
        self.calls += 1
        short = self.calls == 2  # the first environment's episode is truncated, the second one's succeeds
        made = np.array([[1, 1, 0, 0], [1, 1, 1, 1]]) if short else np.ones((2, 4))
        successes = np.array([[0, 0, 0, 0], [0, 0, 0, 1]]) if short else np.zeros((2, 4))
        info = dict(made=made, rewards=0.5 * made, successes=successes, steps=made.sum(1).astype(int))
        ends = np.array([short, short])
        info["success"] = successes.any(1)
        return self._obs(), info["rewards"].sum(1), ends & [False, True], ends & [True, False], info


def test_train_records_what_the_environments_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks, of which the second ends both episodes; after the fourth the first environment fails."""
    agent, args = make(num_envs=2, rollout=8, total_steps=44, gamma=0.9, reward_offset=-1.0, success_bonus=5.0)
    envs, rollout = TwoEnvs(), dppo.Rollout(args, 5, 8, torch.device("cpu"))
    monkeypatch.setattr(dppo, "make_vec_env", lambda *_, **__: envs)
    fails = lambda episodes: episodes.give_up(0) if envs.calls == 4 else None  # noqa: E731
    run = SimpleNamespace(
        step=0, closing=lambda x: x, track=lambda **_: None, good_enough=lambda _: False, show_progress=fails,
        stop=SimpleNamespace(requested=0),
    )  # fmt: skip
    dppo.train(run, agent, rollout, args)
    assert (run.step, rollout.row, envs.calls) == (46, 6, 6)
    whole = -0.5 * (1 + 0.9 + 0.81 + 0.729)
    cut, won = -0.5 * (1 + 0.9), whole + 5 * 0.729
    assert rollout.reward[:6, 0].tolist() == pytest.approx([whole, cut, whole, whole, whole, whole])
    assert rollout.reward[:6, 1].tolist() == pytest.approx([whole, won, whole, whole, whole, whole])
    assert rollout.discount[:3, 0].tolist() == pytest.approx([0.9**4, 0.9**2, 0.9**4])
    assert rollout.terminated[:6].T.tolist() == [[0] * 6, [0, 1, 0, 0, 0, 0]]
    assert rollout.over[:6].T.tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert rollout.obs[:6, 0, 1].tolist() == [100, 1, 102, 3, 104, 5]  # 100 more after a reset
    assert rollout.next_obs[:6, 0, 1].tolist() == [1, 2, 3, 4, 5, 6]
    assert rollout.obs[:6, 1, 1].tolist() == [100, 1, 102, 3, 4, 5]
    assert envs.resets == [[True, True], [True, True], [True, False]]
    obs, chain = rollout.obs[:6].flatten(0, 1), rollout.chain[:6].flatten(0, 1)
    new, _ = dppo.chain_log_prob(agent.actor, None, obs, chain, args.policy)
    assert torch.allclose(new, rollout.log_prob[:6].flatten(0, 1), atol=1e-4)


# --- the script -------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


REINFLOW = ("--noise", "learned", "--ratio", "chain", "--reward", "raw", "--eval-envs", "1")


@pytest.mark.parametrize("flags", [slow(()), REINFLOW], ids=["dppo", "reinflow"])
def test_it_trains_evaluates_and_resumes(tmp_path: Path, flags: tuple[str, ...]) -> None:
    folders = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", "a"]
    for command in (
        [*SHORT, *flags, "--total-steps", "300", *folders],
        ["--resume", str(tmp_path / "a"), "--total-steps", "500"],
        ["--eval", str(tmp_path / "a")],
    ):
        done = run_script([dppo.__file__, *command], check=0)
    assert "acting policy: success" in done.stdout
    rows = read_metrics(tmp_path / "a")
    assert any(math.isfinite(row.get("ogpo/actor_grad", math.nan)) for row in rows)
    assert rows[-1]["step"] >= 500 and "final/act_success" in rows[-1]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), REINFLOW], ids=["dppo", "reinflow"])
def test_stopped_within_a_rollout_it_resumes_exactly(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """And within episodes; from the clone of a run of ogpo_state.py."""
    script, folders = [dppo.__file__], ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name"]
    shared = TINY[: TINY.index("--num-envs")]
    run_script([og.__file__, *shared, "--total-steps", "0", *folders, "clone"], check=0)
    todo = [*script, *SHORT, *flags, "--cloned", str(tmp_path / "clone"), *folders]
    run_script([*todo, "broken", "--total-steps", "450"], check=0)
    stopped = checkpoint.load(tmp_path / "broken" / "checkpoint.pt")
    assert 0 < stopped["rollout"]["row"] < 12 and any(stopped["episodes"]["episodes"])
    run_script([*script, "--resume", str(tmp_path / "broken"), "--total-steps", "700"], check=0)
    run_script([*todo, "whole", "--total-steps", "700"], check=0)
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("broken", "whole"))
    for part in ("agent", "rollout", "episodes", "step"):
        assert same(one[part], two[part]), part
