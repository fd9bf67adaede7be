"""EXPO: what it shares with ogpo_state.py, its edits and their entropy, its choice, its updates, and whole runs."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform, TanhTransform

import ogpo_state as og
from baselines import expo
from common import checkpoint, cli
from common.replay import Batch, ReplayBuffer
from common.rng import Rng
from common.runlog import read_metrics
from settings import ogpo as settings
from tests.helpers import TINY, demonstrated, differing, new_agent, perturbed, slow, weights
from tests.warm import run_script

OWN = {  # what EXPO has in its own words, and what of OGPO it has not
    *("COMPILED", "RECORDED", "RunArgs", "PolicyArgs", "ActorArgs", "CriticArgs", "Args", "default_args"),
    *("TanhGaussian", "squash", "temperature_loss", "edit_chunk", "entropy_target"),
    *("Agent", "act_ode", "on_the_fly", "act_best_of_n", "update_actor", "update_critic", "update", "pretrain", "main"),
    *("chain_log_prob", "group_advantage", "ppo_loss", "periodic_lr"),
}
OPENED = [*TINY, "--critic-successes", "0", "--critic-warmup", "5"]
SCALES = (0.05, 0.1, 0.3, 0.7)


def agent_of(module=expo, **changes: object):
    """Agent and arguments: observations of 5 numbers, actions of 2, chunks of 4."""
    return new_agent(module, **dict(heads=3) | changes)


def opened(**changes: object):
    """The same with open gates, and networks that are no longer as they started."""
    agent, args = agent_of(**changes)
    for i, net in enumerate((agent.actor, agent.actor_ema, agent.critic, agent.critic_ema)):
        perturbed(net, 0.05, seed=i)
    agent.best_of_n_on = agent.policy_gradient_on = True
    return agent, args


class Quadratic(nn.Module):
    """Heads -w_m |a - target|^2."""

    def __init__(self, target: Tensor, weights: tuple[float, ...] = (1.0, 3.0)) -> None:
        super().__init__()
        self.target, self.weights = target, weights

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return -torch.tensor(self.weights)[:, None] * (action - self.target).square().sum(-1)


def batch_of(buffer: ReplayBuffer, n: int = 64) -> Batch:
    return buffer.sample(n, np.random.default_rng(0), torch.device("cpu"), chunks=1)


def test_expo_is_ogpo_where_it_is_not_expo():
    assert differing(og, expo) == OWN


def test_defaults_are_ogpos_row_with_values_of_its_own():
    for env, preset in (("toy", "laptop"), ("lift", "laptop"), ("square", "laptop"), ("square", "paper")):
        ours, theirs = (cli.flatten(module.default_args(env, preset)) for module in (expo, og))
        different = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
        assert different <= {"best_of_n", "actor_lr"}
        assert (ours["best_of_n"], ours["actor_lr"]) == (8, 3e-4)
        settings.check(ours)


# --- edits and their entropy ------------------------------------------------------------------------------------------


def test_edit_chunk_has_the_density_of_a_scaled_tanh_gaussian():
    torch.manual_seed(0)
    mean, log_std, eps, action = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6, 8), 0.1 * torch.randn(6, 8)
    edited, log_prob = expo.edit_chunk(lambda obs, a: (mean, log_std), torch.zeros(6, 5), action, eps, 0.3)
    move = edited - action
    assert move.abs().max() <= 0.3
    torch.testing.assert_close(move, 0.3 * (mean + log_std.exp() * eps).tanh())
    density = TransformedDistribution(
        Normal(mean.double(), log_std.double().exp()), [TanhTransform(), AffineTransform(0.0, 0.3)]
    )
    exact = 0.3 * (mean.double() + log_std.double().exp() * eps.double()).tanh()
    torch.testing.assert_close(log_prob.double(), density.log_prob(exact).sum(-1), rtol=1e-4, atol=1e-3)


def test_edit_chunk_stays_in_the_action_range():
    action = torch.tensor([[-1.0, 0.95, 0.0, 1.0]])
    mean = torch.tensor([[-9.0, 9.0, 9.0, 9.0]])
    edited, _ = expo.edit_chunk(lambda *_: (mean, mean * 0), torch.zeros(1, 5), action, torch.zeros(1, 4), 0.1)
    torch.testing.assert_close(edited, torch.tensor([[-1.0, 1.0, 0.1, 1.0]]))


@pytest.mark.parametrize("scale", SCALES)
def test_no_edit_has_more_entropy_than_a_uniform_one(scale: float):
    """Entropies by an even grid over the quantiles of eps, in one dimension."""
    eps = Normal(0.0, 1.0).icdf((torch.arange(20_000) + 0.5) / 20_000)[:, None]

    def entropy(mean: float, std: float) -> float:
        heads = torch.full_like(eps, mean), torch.full_like(eps, math.log(std))
        return -expo.edit_chunk(lambda *_: heads, eps * 0, eps * 0, eps, scale)[1].mean().item()

    most = math.log(2 * scale)
    found = {(m, s): entropy(m, s) for m in (0.0, 0.5, 2.0) for s in (0.05, 0.3, 0.6, 0.87, 1.0, 2.0, 7.0)}
    assert max(found.values()) < most
    assert max(found, key=found.get) == (0.0, 0.87) and found[0.0, 0.87] == pytest.approx(most, abs=0.02)
    uniform = torch.rand(100_000, 1) * 2 * scale - scale  # what that is the entropy of
    assert -torch.distributions.Uniform(-scale, scale).log_prob(uniform).mean().item() == pytest.approx(most, abs=1e-5)
    assert expo.entropy_target(1, scale, released=False) < found[0.0, 0.87]
    reachable = expo.entropy_target(1, scale, released=True) < most
    assert reachable == (scale > math.exp(-0.5) / 2)


def test_entropy_target_by_hand():
    assert expo.entropy_target(28, 0.05, released=True) == -14
    assert 28 * math.log(2 * 0.05) == pytest.approx(-64.47, abs=0.01)  # the most there is, far below it
    assert expo.entropy_target(28, 0.05, released=False) == pytest.approx(-14 - 83.88, abs=0.01)
    assert expo.entropy_target(7, 1.0, released=True) == expo.entropy_target(7, 1.0, released=False) == -3.5


def test_alpha_rests_at_its_target_and_moves_towards_it():
    log_alpha = nn.Parameter(torch.tensor(math.log(0.3)))
    slopes = []
    for entropy in (-22.0, -22.5, -21.0):
        (slope,) = torch.autograd.grad(expo.temperature_loss(log_alpha, torch.full((5,), -entropy), -22.0), log_alpha)
        slopes.append(slope.item())
    assert slopes == pytest.approx([0.0, -0.3 * 0.5, 0.3 * 1.0])  # descent: alpha stays, rises, falls


def test_a_released_target_out_of_reach_raises_alpha_at_every_update():
    """Whatever the edit does: with Adam by about its learning rate. The corrected target lets it fall."""
    buffer, alphas, gaps = demonstrated(), {}, {}
    for released in (True, False):
        agent, args = opened(edit_scale=0.1, released_entropy=released, alpha=1.0, alpha_lr=1e-3)
        with torch.no_grad():  # nearly uniform edits, as a large alpha makes them
            agent.edit.out.bias[8:] = math.log(0.87)
        infos = [expo.update_actor(agent, batch_of(buffer), None, args) for _ in range(30)]
        alphas[released] = agent.temperature["log"].item()
        gaps[released] = [info["entropy_gap"].item() for info in infos]
    assert alphas[True] == pytest.approx(30 * 1e-3, rel=0.02)
    assert alphas[False] == pytest.approx(-30 * 1e-3, rel=0.02)
    most = 8 * math.log(2 * 0.1)
    assert max(gaps[True]) < most - (-4) + 1 < 0  # of batches of 64: around the bound, never near 0
    assert min(gaps[False]) > 3


# --- the choice -------------------------------------------------------------------------------------------------------


def choose_by_hand(agent, args, obs: Tensor, n: int, rng: Rng) -> Tensor:
    """QC's rule with the least of two heads: for every state the best of n chunks of the averaged flow."""
    rows = obs.repeat_interleave(n, 0)
    chunks = expo.sample_ode(agent.actor_ema, rows, rng.randn(len(rows), 8), args.policy.flow_steps)
    with torch.no_grad():
        q = agent.critic_ema(rows, chunks)  # (M, B n)
    draws = rng.rand(len(q), len(obs), 1)
    chosen = []
    for b in range(len(obs)):
        heads = draws[:, b, 0].argsort()[:2].tolist()
        score = [min(q[h, b * n + i].item() for h in heads) for i in range(n)]
        chosen.append(chunks[b * n + int(np.argmax(score))])
    return torch.stack(chosen)


def test_without_edits_it_is_best_of_n():
    agent, args = opened()
    agent.policy_gradient_on = False  # edits are not trained yet
    obs = torch.randn(7, 5)
    acted = expo.act_best_of_n(agent, args, obs, Rng(3, obs.device))
    with torch.no_grad():
        want = choose_by_hand(agent, args, obs, 8, Rng(3, obs.device))
    assert acted.shape == (7, 4, 2)
    assert torch.equal(acted.flatten(1), want)


def test_tiny_edits_leave_the_choice_as_it_is():
    agent, args = opened(edit_scale=1e-7, min_heads=0)
    obs = torch.randn(7, 5)
    with torch.no_grad():
        plain, without = expo.on_the_fly(agent, args, agent.actor, obs, 8, Rng(3, obs.device))
        edited, with_ = expo.on_the_fly(agent, args, agent.actor, obs, 16, Rng(3, obs.device))
    torch.testing.assert_close(edited, plain, rtol=0, atol=1e-6)
    assert without.max() < 8 <= 16 > with_.max()


def test_choice_is_the_best_of_both_and_says_which():
    """Of heads -w |a - goal|^2 the least is that of the larger w, the best the nearest chunk or copy."""
    agent, args = opened(best_of_n=4, edit_scale=0.2)
    obs, goal = torch.randn(50, 5), torch.full((8,), 0.3)
    agent.critic_ema = Quadratic(goal)
    with torch.no_grad():
        action, pick = expo.on_the_fly(agent, args, agent.actor, obs, 8, Rng(5, obs.device))
        rng = Rng(5, obs.device)
        rows = obs.repeat_interleave(4, 0)
        chunks = expo.sample_ode(agent.actor, rows, rng.randn(200, 8), args.policy.flow_steps)
        copies, _ = expo.edit_chunk(agent.edit, rows, chunks, rng.randn(200, 8), 0.2)
    both = torch.cat([chunks.unflatten(0, (50, 4)), copies.unflatten(0, (50, 4))], 1)  # (50, 8, 8)
    best = (both - goal).square().sum(-1).argmin(-1)
    assert torch.equal(pick, best) and torch.equal(action, both[torch.arange(50), best])
    assert 0 < (pick >= 4).float().mean() < 1


def test_candidates_of_a_state_are_scored_by_the_same_heads():
    """Three heads of which two random ones count: with pairs of its own for each chunk the order would be mixed."""

    class Shifted(Quadratic):
        def forward(self, obs: Tensor, action: Tensor) -> Tensor:
            return super().forward(obs, action) + torch.tensor([-1e3, 0.0, 1e3])[:, None]

    agent, args = opened(best_of_n=4, edit_scale=0.2)
    agent.critic_ema = Shifted(torch.zeros(8), (1.0, 1.0, 1.0))
    obs = torch.randn(50, 5)
    with torch.no_grad():
        _, pick = expo.on_the_fly(agent, args, agent.actor, obs, 8, Rng(5, obs.device))
        agent.critic_ema = Quadratic(torch.zeros(8), (1.0, 1.0, 1.0))
        _, want = expo.on_the_fly(agent, args, agent.actor, obs, 8, Rng(5, obs.device))
    assert torch.equal(pick, want)


def test_acting_begins_as_ogpos():
    """The same chunk and the same random numbers, also where OGPO's N is another."""
    agent, args = agent_of()
    other, other_args = agent_of(og)
    assert all(torch.equal(a, b) for a, b in zip(agent.actor.parameters(), other.actor.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(agent.critic.parameters(), other.critic.parameters(), strict=True))
    obs = torch.randn(3, 5)
    for _ in range(2):
        one, two = expo.act_best_of_n(agent, args, obs, agent.rng), og.act_best_of_n(other, other_args, obs, other.rng)
        assert torch.equal(one, two)
    assert torch.equal(agent.rng.randn(4), other.rng.randn(4))


def test_act_ode_is_the_base_and_then_its_mean_edit():
    agent, args = opened(edit_scale=0.2)
    obs = torch.randn(3, 5)
    with torch.no_grad():
        agent.edit.out.bias[:8] = 3.0  # up, everywhere
    edited = expo.act_ode(agent, args, obs, Rng(0, obs.device))
    agent.policy_gradient_on = False
    plain = expo.act_ode(agent, args, obs, Rng(0, obs.device))
    noise = Rng(0, obs.device).randn(3, 8)
    assert torch.equal(plain.flatten(1), expo.sample_ode(agent.actor, obs, noise, args.policy.flow_steps).detach())
    torch.testing.assert_close(edited, (plain + 0.2 * math.tanh(3)).clamp(-1, 1), rtol=0, atol=5e-3)


# --- updates ----------------------------------------------------------------------------------------------------------


def test_target_is_the_least_of_two_fresh_heads_at_the_choice():
    """The TD loss against one by hand, with the online flow, from the same random numbers."""
    agent, args = opened(best_of_n=4, n_step=1, gamma=0.9)
    batch = batch_of(demonstrated())
    twin = copy.deepcopy(agent)
    info = expo.update_critic(agent, batch, args, None, 8)
    with torch.no_grad():
        chunk, pick = expo.on_the_fly(twin, args, twin.actor, batch.next_obs, 8, twin.rng)
        q, draws = twin.critic_ema(batch.next_obs, chunk), twin.rng.rand(3, 64)  # (M, n)
        value = torch.stack([q[draws[:, i].argsort()[:2], i].min() for i in range(64)])
        reward = (batch.rewards * 0.9 ** torch.arange(4)).sum(-1)
        target = reward + 0.9**4 * (1 - batch.terminated) * value
        want = (twin.critic(batch.obs, batch.actions.flatten(1)) - target).square().mean()
    assert batch.terminated.any() and not batch.terminated.all()
    assert info["td_loss"].item() == pytest.approx(want.item(), rel=1e-5)
    assert info["edited"].item() == pytest.approx((pick >= 4).float().mean().item())


def test_without_least_heads_a_target_is_their_mean():
    agent, args = opened(n_step=1, gamma=0.9, min_heads=0)
    batch = batch_of(demonstrated())
    twin = copy.deepcopy(agent)
    info = expo.update_critic(agent, batch, args)
    with torch.no_grad():
        chunk, _ = expo.on_the_fly(twin, args, twin.actor, batch.next_obs, 1, twin.rng)
        value = twin.critic_ema(batch.next_obs, chunk).mean(0)
        target = (batch.rewards * 0.9 ** torch.arange(4)).sum(-1) + 0.9**4 * (1 - batch.terminated) * value
        want = (twin.critic(batch.obs, batch.actions.flatten(1)) - target).square().mean()
    assert info["td_loss"].item() == pytest.approx(want.item(), rel=1e-5)


def test_edit_gradient_is_that_of_alpha_log_prob_minus_mean_q():
    agent, args = opened(edit_scale=0.2, alpha=0.3, actor_lr=0.0, alpha_lr=0.0)
    batch = batch_of(demonstrated())
    twin = copy.deepcopy(agent)
    expo.update_actor(agent, batch, None, args)
    action = batch.actions.flatten(1)
    edited, log_prob = expo.edit_chunk(twin.edit, batch.obs, action, twin.rng.randn(*action.shape), 0.2)
    loss = 0.3 * log_prob.mean() - twin.critic(batch.obs, edited).mean()
    want = torch.autograd.grad(loss, list(twin.edit.parameters()))
    got = [p.grad for p in agent.edit.parameters()]
    assert all(torch.allclose(g, w, rtol=1e-4, atol=1e-6) for g, w in zip(got, want, strict=True))
    assert all(p.grad is None for p in agent.critic.parameters())


def test_edits_learn_to_climb_within_their_scale():
    """Replayed chunks lie around 0.5 and 0.9 would be best: edits end near their bound there, 0.1 above the chunk."""
    agent, args = opened(edit_scale=0.1, actor_lr=3e-3, alpha=0.01, alpha_lr=0.0)
    agent.critic = Quadratic(torch.full((8,), 0.9))
    buffer, rng = demonstrated(), np.random.default_rng(0)
    for _ in range(150):
        expo.update_actor(agent, buffer.sample(64, rng, torch.device("cpu")), None, args)
    batch = batch_of(buffer)
    with torch.no_grad():
        mean = 0.1 * agent.edit(batch.obs, batch.actions.flatten(1))[0].tanh()
    assert 0.09 < mean.min() and mean.max() <= 0.1


def test_the_base_only_imitates():
    """Critics do not move it; without a batch nothing does; with one it is the cloning step of ogpo_state.py."""
    agent, args = opened(
        best_of_n=4,
    )
    batch, before = batch_of(demonstrated()), weights(agent.actor)
    expo.update_actor(agent, batch, None, args)
    assert torch.equal(weights(agent.actor), before)
    expo.update_critic(agent, batch, args, None, 8)
    assert torch.equal(weights(agent.actor), before)
    twin, state = copy.deepcopy(agent), agent.rng.state_dict()
    agent.critic = Quadratic(torch.zeros(8))  # others change nothing
    info = expo.update_actor(agent, batch, batch, args)
    twin.rng.load_state_dict(state)
    action = batch.actions.flatten(1)
    loss = og.bc_loss(twin.actor, batch.obs, action, twin.rng.randn(64, 8), twin.rng.rand(64))
    twin.actor_opt.zero_grad()
    loss.backward()
    twin.actor_opt.step()
    assert info["bc_loss"].item() == loss.item()
    assert torch.equal(weights(agent.actor), weights(twin.actor))
    lagging = torch.lerp(weights(twin.actor_ema), weights(twin.actor), args.policy.actor_ema)
    torch.testing.assert_close(weights(agent.actor_ema), lagging)


@pytest.mark.parametrize("base", ["all", "successes"])
def test_updates_wait_for_the_critics_and_the_base_for_successes(base: str):
    agent, args = agent_of(base=base, critic_warmup=2, critic_successes=8, critic_batch=32, success_min=170)
    buffer, rng = demonstrated(), np.random.default_rng(0)  # ten successes
    start = {name: weights(getattr(agent, name)) for name in ("actor", "edit", "critic")}

    def moved() -> set[str]:
        return {name for name, before in start.items() if not torch.equal(weights(getattr(agent, name)), before)}

    seen = []
    for _ in range(3):
        seen.append((agent.best_of_n_on, expo.update(agent, buffer, args, rng), moved()))
    assert [on for on, _, _ in seen] == [False, False, True]
    assert seen[0][2] == seen[1][2] == {"critic"}
    assert "alpha" not in seen[1][1] and "alpha" in seen[2][1]
    assert buffer.success_starts.size == 170  # ten episodes of 20 steps, chunks of 4: just enough
    assert seen[2][2] == {"critic", "edit", "actor"}

    agent, args = agent_of(base=base, critic_warmup=0, critic_successes=0, critic_batch=32, success_min=171)
    start = {name: weights(getattr(agent, name)) for name in start}
    info = expo.update(agent, buffer, args, rng)
    assert ("actor" in moved()) == ("bc_loss" in info) == (base == "all")


def test_successes_are_what_the_base_imitates():
    """Failures at -0.5 beside successes at 0.5: chunks of the base end near what it was given."""
    ends = {}
    for base in ("all", "successes"):
        agent, args = agent_of(base=base, critic_warmup=0, critic_successes=0, critic_batch=64, actor_lr=3e-3)
        buffer, rng = demonstrated(), np.random.default_rng(0)
        for _ in range(10):
            buffer.add_episode(rng.standard_normal((21, 5)), np.full((20, 2), -0.5), -np.ones(20), False, False)
        for _ in range(150):
            expo.update(agent, buffer, args, rng)
        obs = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            chunks = expo.sample_ode(agent.actor, obs, Rng(0, obs.device).randn(200, 8), 4)
        ends[base] = (chunks.mean(-1) < 0).float().mean().item()
    assert ends["successes"] < 0.05 < 0.25 < ends["all"] < 0.75


def test_calql_pulls_other_chunks_down():
    agent, args = agent_of(calql_steps=10)
    batch = batch_of(demonstrated())
    returns = torch.full((64,), -20.0)
    first = expo.update_critic(agent, batch, args, returns)
    for _ in range(60):
        last = expo.update_critic(agent, batch, args, returns)
    assert last["calql"] < first["calql"] - 1


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--base", "all"],
        slow(["--base", "successes", "--best-of-n", "1", "--min-heads", "0", "--calql-steps", "3"]),
        slow(["--released-entropy"]),
    ],
)
def test_expo_trains_evaluates_and_resumes(tmp_path: Path, flags: list[str]):
    begun = [expo.__file__, *OPENED, *flags, "--success-min", "1", "--start-training", "200", "--total-steps", "400"]
    begun += ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", "a"]
    released = "--released-entropy" in flags
    assert ("alpha can only grow" in run_script(begun, check=0).stdout) == released
    for command in (
        [expo.__file__, "--resume", str(tmp_path / "a"), "--total-steps", "600"],
        [expo.__file__, "--eval", str(tmp_path / "a")],
    ):
        done = run_script(command, check=0)
    assert "acting policy: success" in done.stdout
    rows = read_metrics(tmp_path / "a")
    assert rows[-1]["step"] == 600 and "final/act_success" in rows[-1]
    trained = [row for row in rows if "ogpo/alpha" in row]
    assert trained and all(math.isfinite(x) for row in trained for x in row.values())
    assert all((row["ogpo/entropy_gap"] < -8) == released for row in trained)
    assert any(row["ogpo/edited"] > 0 for row in trained)


@pytest.mark.slow
def test_first_episodes_are_ogpos(tmp_path: Path):
    """Until the first update, bit for bit: states, actions, rewards."""
    flags = [*OPENED, "--total-steps", "150", "--start-training", "150", "--update-every", "1000", "--data-dir"]
    flags += [str(tmp_path), "--run-dir", str(tmp_path), "--run-name"]
    for module, name in ((og, "ogpo"), (expo, "expo")):
        run_script([module.__file__, *flags, name], check=0)
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("ogpo", "expo"))
    assert len(one["buffer"]["episodes"]) >= 2 and one["buffer"]["episodes"] == two["buffer"]["episodes"]
    for key in ("obs", "actions", "rewards"):
        assert torch.equal(one["buffer"][key], two["buffer"][key])


@pytest.mark.slow
def test_a_target_out_of_reach_is_said_at_the_start(tmp_path: Path):
    flags = [*OPENED, "--total-steps", "0", "--start-training", "0", "--run-dir", str(tmp_path), "--data-dir"]
    done = run_script([expo.__file__, *flags, str(tmp_path), "--released-entropy"], check=0)
    assert "no edit within 0.1 has the entropy of --released-entropy" in done.stdout


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path):
    flags = [*OPENED, "--start-training", "200", "--log-every", "50", "--checkpoint-every", "250"]
    flags += ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name"]
    run_script([expo.__file__, *flags, "whole", "--total-steps", "500"], check=0)
    run_script([expo.__file__, *flags, "broken", "--total-steps", "330"], check=0)
    run_script([expo.__file__, "--resume", str(tmp_path / "broken"), "--total-steps", "500"], check=0)
    whole, broken = (checkpoint.load(tmp_path / name / "checkpoint.pt")["agent"] for name in ("whole", "broken"))
    assert whole["updates"] == broken["updates"] > 0
    for part in ("actor", "critic", "edit", "temperature"):
        assert all(torch.equal(whole[part][key], broken[part][key]) for key in whole[part])


@pytest.mark.slow
def test_expo_learns_the_toy_task(tmp_path: Path):
    folders = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", "a"]
    run_script([expo.__file__, "--env", "toy", "--seed", "1", "--no-video", *folders], check=0)
    rows = read_metrics(tmp_path / "a")
    cloned = next(row["eval/ode_success"] for row in rows if "eval/ode_success" in row)
    assert cloned < 0.65 and rows[-1]["final/act_success"] > 0.9
