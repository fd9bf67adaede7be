"""The variants of ogpo_state.py: what they share with it, and every term they add against hand-computed values."""

import difflib
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import ogpo_state as og
from common import checkpoint, cli
from common.replay import ReplayBuffer
from common.runlog import read_metrics
from tests.helpers import TINY, demonstrated, differing, gradients, perturbed, slow, small_agent
from tests.helpers import weights as flat
from tests.warm import run_script
from variants import ogpo_critic, ogpo_diffusion, ogpo_extraction, ogpo_reference, ogpo_released

VARIANTS = (ogpo_critic, ogpo_diffusion, ogpo_extraction, ogpo_reference, ogpo_released)
# What each may define in its own words; all else is the text of ogpo_state.py.
OWN = {
    ogpo_critic: {
        *("RECORDED",),
        *("CriticArgs", "reduce_samples", "returns_to_go", "calql_term", "conservative", "update_critic", "update"),
        *("CALQL_COEF", "CALQL_ACTIONS", "pretrain_critic"),
    },
    ogpo_diffusion: {
        *("PolicyArgs", "VelocityNet", "DDPM_STEPS", "signal_level", "chain_schedule", "chain_step"),
        *("sample_chain", "chain_log_prob", "sample_ode", "bc_loss", "flow_schedule", "step_mean", "default_args"),
    },
    ogpo_extraction: {
        *("RECORDED",),
        *("ActorArgs", "group_advantage", "advantage_weights", "flow_losses", "awr_loss", "ofpo_loss"),
        *("Extraction", "extraction_loss", "update_actor"),
    },
    ogpo_reference: {
        *("RECORDED",),
        *("ReferenceArgs", "Args", "blend", "penalised_advantage", "ppo_loss", "Agent"),
        *("update_actor", "update_critic", "pretrain"),
    },
    ogpo_released: {
        *("RECORDED",),
        *("PolicyArgs", "ActorArgs", "CriticArgs", "default_args", "step_mean", "sample_chain"),
        *("chain_log_prob", "adamw", "Agent", "update_bc", "update_actor", "update_critic", "update", "pretrain"),
        *("PretrainArgs", "best_of_n", "act_best_of_n"),
    },
}


ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("module", VARIANTS)
def test_a_variant_is_a_short_diff_of_the_script(module: ModuleType) -> None:
    assert differing(og, module) == OWN[module], "carry a change over with: python tools/carry.py ogpo_state.py"
    a, b = (Path(m.__file__).read_text().splitlines() for m in (og, module))
    changed = [line for line in difflib.ndiff(a, b) if line[0] in "+-"]
    printed = subprocess.run(["diff", og.__file__, module.__file__], capture_output=True, text=True).stdout
    assert 30 < len(changed) <= len(printed.splitlines()) < 195


@pytest.mark.parametrize("module", [*map(slow, VARIANTS[2:]), *VARIANTS[:2]])
def test_a_variant_trains_evaluates_and_resumes(module: ModuleType, tmp_path: Path) -> None:
    script = [module.__file__]
    flags = [
        *(*TINY, "--states", "8", "--start-training", "200"),
        *("--critic-successes", "0", "--critic-warmup", "5", "--success-min", "1", "--total-steps"),
    ]  # fmt: skip
    folders = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", "a"]
    short = ["--calql-steps", "3"] if module is ogpo_critic else []
    for command in (
        [*script, *flags, "400", *folders, *short],
        [*script, "--resume", str(tmp_path / "a"), "--total-steps", "600"],
        [*script, "--eval", str(tmp_path / "a")],
    ):
        done = run_script(command, check=0)
    assert "best-of-N policy: success" in done.stdout
    rows = read_metrics(tmp_path / "a")
    assert any("ogpo/actor_grad" in row and math.isfinite(row["ogpo/actor_grad"]) for row in rows)
    assert rows[-1]["step"] == 600


@pytest.mark.parametrize("steps", [slow(400), slow(0)])
def test_pretrain_critic_stopped_before_rl_resumes_exactly(tmp_path: Path, steps: int) -> None:
    """Within Cal-QL, or between cloning and it (also where there is none)."""
    flags = [*TINY, "--calql-steps", str(steps), "--total-steps", "220", "--start-training", "220", "--log-every", "20"]
    flags += ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name"]
    run_script([og.__file__, *flags, "whole"], check=0)

    stopping = "import sys; import ogpo_state as m; f = m.pretrain; "
    stopping += (
        "m.pretrain = lambda run, *args: (f(run, *args), setattr(run.stop, 'requested', True)); m.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", stopping, *flags, "broken"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    agent = checkpoint.load(tmp_path / "broken" / "checkpoint.pt")["agent"]
    assert agent["bc_done"] and agent["calql_step"] == 0

    resume = [og.__file__, "--resume", str(tmp_path / "broken")]
    if steps:
        stopping = "import itertools, os, sys; import ogpo_state as m; "
        stopping += "n, f = itertools.count(1), m.update_critic; m.update_critic = lambda *args, **more: "
        stopping += "(next(n) == 40 and os.kill(os.getpid(), 15), f(*args, **more))[1]; m.main(sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", stopping, *resume[1:]], capture_output=True, text=True, cwd=ROOT)
        assert "--resume" in done.stdout and done.returncode == 0, done.stdout + done.stderr
        assert 40 <= checkpoint.load(tmp_path / "broken" / "checkpoint.pt")["agent"]["calql_step"] < steps
    run_script(resume, check=0)
    whole, broken = (checkpoint.load(tmp_path / name / "checkpoint.pt")["agent"] for name in ("whole", "broken"))
    assert whole["calql_step"] == broken["calql_step"] == steps
    assert sum("eval/ode_success" in row and row["step"] == 0 for row in read_metrics(tmp_path / "broken")) == 1
    for part in ("actor", "critic"):
        assert all(torch.equal(whole[part][k], broken[part][k]) for k in whole[part])


# --- other extractions ------------------------------------------------------------------------------------------------


def test_advantage_weights_by_hand() -> None:
    advantage = torch.tensor([-20.0, 0.0, 10.0, 100.0])
    e = math.e
    assert ogpo_extraction.advantage_weights(advantage, "ofpo", 10.0) is advantage
    every, positive, asymmetric = [e**-2, 1, e, 20], [0, 0, e, 20], [1, 1, e, 20]  # the three modes as released
    for kind, want in (
        ("aw_ogpo", every), ("awr_fm", every), ("aw_ogpo_nn", positive), ("aw_ogpo_asymmetric", asymmetric)
    ):  # fmt: skip
        assert ogpo_extraction.advantage_weights(advantage, kind, 10.0).tolist() == pytest.approx(want, rel=1e-6)


def test_flow_losses_by_draw_average_to_the_cloning_loss() -> None:
    agent, _ = small_agent(ogpo_extraction)
    obs, action = torch.randn(6, 5), torch.randn(6, 8)
    x0, t = torch.randn(6, 3, 8), torch.rand(6, 3)
    losses = ogpo_extraction.flow_losses(agent.actor, obs, action, x0, t)
    assert losses.shape == (6, 3)
    many = [og.bc_loss(agent.actor, obs, action, x0[:, k], t[:, k]) for k in range(3)]
    assert losses.mean().item() == pytest.approx(torch.stack(many).mean().item(), rel=1e-5)
    one = og.bc_loss(agent.actor, obs[2:3], action[2:3], x0[2:3, 1], t[2:3, 1])
    assert losses[2, 1].item() == pytest.approx(one.item(), rel=1e-5)
    huge = ogpo_extraction.flow_losses(agent.actor, obs, action + 100, x0, t, huber=True)
    assert huge.max() < 110  # linear beyond 1, where squares would be ten thousand


def test_awr_loss_renormalises_its_weights() -> None:
    losses = torch.tensor([[1.0, 3.0], [4.0, 6.0]])
    got = ogpo_extraction.awr_loss(losses, torch.tensor([1.0, 3.0]))
    assert got.item() == pytest.approx(0.5 * 2 + 1.5 * 5)
    assert ogpo_extraction.awr_loss(losses, torch.tensor([10.0, 30.0])).item() == pytest.approx(got.item())


def test_awr_loss_released_means_are_over_states() -> None:
    """Two states, two chains each: the first chains weigh 1 and 3, the second ones 2 and 2."""
    losses, weight = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0, 2.0])
    got = ogpo_extraction.awr_loss(losses, weight, group=2)
    assert got.item() == pytest.approx(1 / 2 * 1 + 1 * 2 + 3 / 2 * 3 + 1 * 4)
    assert ogpo_extraction.awr_loss(losses, weight).item() == pytest.approx((1 + 4 + 9 + 8) / 2)


def test_flow_losses_released_are_sums_and_twice_huber() -> None:
    """d^2 up to 1, 2 |d| - 1 beyond, summed over the chunk; without Huber the sum of squares."""
    agent, _ = small_agent(ogpo_extraction)
    obs, action = torch.randn(6, 5), 2 * torch.randn(6, 8)
    x0, t = torch.randn(6, 3, 8), torch.rand(6, 3)
    x_t = (1 - t[..., None]) * x0 + t[..., None] * action[:, None]
    d = (agent.actor(obs[:, None], x_t, agent.actor.embed(t)) - (action[:, None] - x0)).abs()
    assert (d < 1).any() and (d > 1).any()
    squares, huber = (
        ogpo_extraction.flow_losses(agent.actor, obs, action, x0, t, huber=h, released=True) for h in (False, True)
    )
    torch.testing.assert_close(squares, d.square().sum(-1))
    torch.testing.assert_close(huber, torch.where(d <= 1, d.square(), 2 * d - 1).sum(-1))


@pytest.mark.parametrize("by_draw", [False, True])
def test_ofpo_loss_is_the_released_one_on_any_losses(by_draw: bool) -> None:
    """Losses capped at 4, their difference at 5, ratio of the mean over draws or of each; mean of the PPO minimum."""
    g = torch.Generator().manual_seed(0)
    old, new = 8 * torch.rand(40, 6, generator=g), 8 * torch.rand(40, 6, generator=g)
    advantage, draws = torch.randn(40, generator=g), (old.clip(0, 4).double(), new.clip(0, 4).double())
    gap = draws[0] - draws[1] if by_draw else draws[0].mean(1, keepdim=True) - draws[1].mean(1, keepdim=True)
    ratio = gap.clip(-5, 5).exp()
    want = -torch.minimum(ratio * advantage[:, None], ratio.clip(0.99, 1.01) * advantage[:, None]).mean()
    got = ogpo_extraction.ofpo_loss(new, old, advantage, 0.01, by_draw=by_draw) / 40
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "released"), [("awr_fm", False), ("awr_fm", True), ("ofpo", True)])
def test_update_actor_extraction_takes_the_actions_and_the_batch_it_should(
    kind: str, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWR-FM: ends of noisy chains, released and OFPO: noise-free actions; AWR-FM's weights are of the whole batch."""
    agent, args = small_agent(
        ogpo_extraction, extraction=kind, released_losses=released, bc_coef=0.0, temperature=0.01, advantage="vanilla"
    )
    agent.critic_ema.forward = lambda obs, action: (
        9 * action.sum(-1).expand(3, -1)
    )  # the weight of some underflows to 0
    seen = {}

    def record(agent: object, obs: torch.Tensor, chain: torch.Tensor, *more: object) -> tuple:
        seen["chain"], seen["weight"] = chain, more[1]
        return original(agent, obs, chain, *more)

    original = ogpo_extraction.extraction_loss
    monkeypatch.setattr(ogpo_extraction, "extraction_loss", record)
    ogpo_extraction.update_actor(agent, torch.randn(8, 5), None, args)
    assert seen["chain"].shape == (32, 1 if released else args.policy.flow_steps + 1, 8)
    assert kind == "ofpo" or (seen["weight"] == 0).any()


def test_ofpo_loss_by_hand() -> None:
    """Two chains, two draws; the first advantage is positive, and one draw is far beyond the clip."""
    old, new = torch.tensor([[1.0, 1.0], [9.0, 2.0]]), torch.tensor([[0.5, 1.0], [8.0, 2.0]])
    advantage = torch.tensor([2.0, -1.0])
    mean = ogpo_extraction.ofpo_loss(new, old, advantage, 0.1, by_draw=False)
    assert mean.item() == pytest.approx(-(min(math.exp(0.25), 1.1) * 2) + 1.0, rel=1e-6)  # 9 and 8 are both capped at 4
    draws = ogpo_extraction.ofpo_loss(new, old, advantage, 0.1, by_draw=True)
    assert draws.item() == pytest.approx(-(1.1 * 2 + 1.0 * 2) / 2 + 1.0, rel=1e-6)


def test_update_actor_bptt_follows_the_gradient_of_q_through_the_chain() -> None:
    agent, args = small_agent(ogpo_extraction, extraction="bptt", bc_coef=0.0)
    perturbed(agent.critic_ema, 0.3)
    obs = torch.randn(8, 5)
    agent.actor_opt.step = lambda: None
    state = agent.rng.state_dict()
    ogpo_extraction.update_actor(agent, obs, None, args)
    got = gradients(agent.actor)
    agent.rng.load_state_dict(state)
    agent.actor.zero_grad()
    rows = obs.repeat_interleave(4, 0)
    x = agent.rng.randn(32, args.policy.flow_steps + 1, 8)[:, 0]
    for k in range(args.policy.flow_steps):
        t = torch.tensor(k / args.policy.flow_steps)
        x = x + agent.actor(rows, x, agent.actor.embed(t)) / args.policy.flow_steps
    (-agent.critic_ema(rows, x.clamp(-1, 1)).mean(0).sum() / 32).backward()
    assert got.abs().max() > 0
    torch.testing.assert_close(got, gradients(agent.actor), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("kind", ["awr_fm", "aw_ogpo", "aw_ogpo_nn", "aw_ogpo_asymmetric", "ofpo", "ofpo++"])
def test_update_actor_extractions_raise_what_the_critics_like(kind: str, released: bool) -> None:
    """One state, critics that like positive actions: after a few updates the policy's actions are more positive."""
    agent, args = small_agent(
        ogpo_extraction,
        extraction=kind,
        released_losses=released,
        bc_coef=0.0,
        temperature=1.0,
        group=32,
        advantage="vanilla",
        actor_lr=1e-3,
        actor_ema=0.2,
    )

    class Likes(torch.nn.Module):
        def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
            return action.sum(-1).expand(3, -1)

    agent.critic_ema = Likes()
    obs, noise = torch.zeros(8, 5), torch.randn(64, 8)

    def mean() -> float:
        with torch.no_grad():
            return og.sample_ode(agent.actor, torch.zeros(64, 5), noise, args.policy.flow_steps).mean().item()

    before = mean()
    for _ in range(60):
        ogpo_extraction.update_actor(agent, obs, None, args)
    assert mean() > before + 0.02


# --- regularization towards a slow reference --------------------------------------------------------------------------


def test_blend_by_hand() -> None:
    r = ogpo_reference.ReferenceArgs(sharpness=5.0)
    q = torch.tensor([[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]])
    log_rho = torch.tensor([1.0, 1.4, 1e-6]).log()
    w = [0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(5))]
    assert ogpo_reference.blend(q, log_rho, r).tolist() == pytest.approx([2 * (1 - x) for x in w], abs=1e-4)
    r.regularize = "kl"
    log_rho = torch.tensor([0.0, 0.4, -1.0])
    w = [0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(5))]
    assert ogpo_reference.blend(q, log_rho, r).tolist() == pytest.approx([2 * (1 - x) for x in w], abs=1e-4)
    r.regularize = "none"
    assert ogpo_reference.blend(q, log_rho, r).tolist() == [2.0, 2.0, 2.0]


def test_penalised_advantage_by_hand() -> None:
    """Two heads, one state, two chains; the second has become twice as probable as under the reference."""
    r = ogpo_reference.ReferenceArgs(penalty=0.5, penalty_sigma=2.0, sharpness=5.0)
    q = torch.tensor([[[1.0, 3.0]], [[1.0, 1.0]]])
    log_rho = torch.tensor([[1.0, 2.0]]).log()
    beta = 0.5 * (0 + 1) / 2 / 2  # standard deviations 0 and 1, over both heads
    w = 1 / (1 + math.exp(-5))
    values = [1 - beta, (1 - w) * 2 + w * 1 - 2 * beta]
    advantage, got = ogpo_reference.penalised_advantage(q, log_rho, r)
    assert got.item() == pytest.approx(beta, rel=1e-6)
    centre = sum(values) / 2
    assert advantage[0].tolist() == pytest.approx([v - centre for v in values], abs=1e-6)
    r.regularize = "kl"
    w = 1 / (1 + math.exp(-5 * math.log(2)))
    values = [1.0, (1 - w) * 2 + w * 1 - beta * math.log(2)]
    centre = sum(values) / 2
    got = ogpo_reference.penalised_advantage(q, log_rho, r)[0]
    assert got[0].tolist() == pytest.approx([v - centre for v in values], abs=1e-6)


def test_penalised_advantage_beta_is_that_of_the_whole_batch() -> None:
    """The mean over all states and chains of the deviation over M heads, not M - 1: at M = 4 smaller by 13 %."""
    r, q = ogpo_reference.ReferenceArgs(), torch.randn(4, 6, 5)
    beta = ogpo_reference.penalised_advantage(q, torch.zeros(6, 5), r)[1].item()
    spread = (q - q.mean(0)).square().sum(0)
    assert beta == pytest.approx(0.1 * (spread / 4).sqrt().mean().item(), rel=1e-5)
    assert beta == pytest.approx(0.1 * (spread / 3).sqrt().mean().item() * math.sqrt(3 / 4), rel=1e-5)


def test_ppo_loss_upper_bound_of_the_ratio() -> None:
    log_prob = torch.tensor([1.05, 1.05, 0.9]).log()
    advantage = torch.tensor([1.0, -1.0, -1.0])
    loss, _ = ogpo_reference.ppo_loss(log_prob, torch.zeros(3), advantage, 0.1, 1, torch.tensor(1.02))
    assert loss.item() == pytest.approx(-1.02 + 1.05 + 0.9, rel=1e-6)
    plain, _ = ogpo_reference.ppo_loss(log_prob, torch.zeros(3), advantage, 0.1, 1)
    assert plain.item() == pytest.approx(og.ppo_loss(log_prob, torch.zeros(3), advantage, 0.1, 1)[0].item(), rel=1e-6)


def test_update_actor_reference_is_slow_and_its_ratio_reaches_the_target() -> None:
    agent, args = small_agent(ogpo_reference, slow_rate=0.25, bc_coef=0.0)
    perturbed(agent.actor, 0.05)
    perturbed(agent.critic_ema, 0.3)
    slow = [p.clone() for p in agent.actor_slow.parameters()]
    obs = torch.randn(8, 5)
    info = ogpo_reference.update_actor(agent, obs, None, args)
    for before, after, new in zip(slow, agent.actor_slow.parameters(), agent.actor.parameters(), strict=True):
        torch.testing.assert_close(after, before + 0.25 * (new - before))
    assert info["rho"].item() != 1.0 and math.isfinite(info["rho"].item())
    assert agent.log_rho.exp().item() == pytest.approx(info["rho"].item())


def test_update_actor_without_regularization_is_that_of_ogpo_state() -> None:
    pairs = []
    for module, more in ((og, {}), (ogpo_reference, {"regularize": "none"})):
        agent, args = small_agent(module, **more)
        perturbed(agent.critic_ema, 0.3)
        perturbed(agent.actor, 0.02)
        module.update_actor(agent, torch.ones(8, 5), None, args)
        pairs.append(gradients(agent.actor))
    assert pairs[0].abs().max() > 0
    assert torch.equal(*pairs)


def test_update_actor_forward_kl_pulls_towards_samples_of_the_reference() -> None:
    agent, args = small_agent(
        ogpo_reference, regularize="none", forward_kl=1.0, bc_coef=0.0, actor_lr=3e-3, slow_rate=0.0
    )
    agent.critic_ema.forward = lambda obs, action: torch.zeros(3, len(obs))  # no advantage
    perturbed(agent.actor_slow, 0.3)
    obs, noise = torch.randn(8, 5), torch.randn(8, 8)

    def apart() -> float:
        with torch.no_grad():
            a, b = (og.sample_ode(net, obs, noise, args.policy.flow_steps) for net in (agent.actor, agent.actor_slow))
        return (a - b).square().mean().item()

    before = apart()
    for _ in range(200):
        info = ogpo_reference.update_actor(agent, obs, None, args)
    assert "forward_kl" in info and apart() < 0.5 * before


@pytest.mark.parametrize("noisy", [False, True])
def test_update_actor_forward_kl_clones_noise_free_actions_or_ends_of_chains(
    noisy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, args = small_agent(
        ogpo_reference, regularize="none", forward_kl=0.1, forward_kl_noise=noisy, bc_coef=0.0, noise_std=0.3
    )
    agent.critic_ema.forward = lambda obs, action: torch.zeros(3, len(obs))  # no advantage
    perturbed(agent.actor_slow, 0.3)
    cloned, obs, p = [], torch.randn(8, 5), args.policy
    loss = ogpo_reference.bc_loss
    monkeypatch.setattr(ogpo_reference, "bc_loss", lambda *rest: cloned.append(rest[2]) or loss(*rest))
    state = agent.rng.state_dict()
    ogpo_reference.update_actor(agent, obs, None, args)
    agent.rng.load_state_dict(state)
    agent.rng.randn(32, p.flow_steps + 1, 8)  # of the chains whose values are compared
    noise = agent.rng.randn(8, p.flow_steps + 1, 8) if noisy else agent.rng.randn(8, 8)
    before, _ = small_agent(ogpo_reference)
    perturbed(before.actor_slow, 0.3)  # as it was before the update moved it
    with torch.no_grad():
        ends = og.sample_chain(before.actor_slow, obs, noise, p)[0][:, -1].clamp(-1, 1) if noisy else None
        want = ends if noisy else og.sample_ode(before.actor_slow, obs, noise, p.flow_steps)
    assert torch.equal(cloned[0], want)


# --- warm starts of the critics ---------------------------------------------------------------------------------------


def filled(gamma: float = 0.5) -> ReplayBuffer:
    """A success of 3 steps and an episode of 2 steps cut by the time limit, chunks of 1."""
    buffer = ReplayBuffer(100, 1, 1, 1)
    buffer.add_episode(np.zeros((4, 1)), np.zeros((3, 1)), np.array([-1.0, -1.0, 4.0]), True, True)
    buffer.add_episode(np.zeros((3, 1)), np.zeros((2, 1)), np.array([-1.0, -1.0]), False, False)
    return buffer


def test_returns_to_go_by_hand() -> None:
    """gamma 0.5: never succeeding is worth -2; the failed episode's first step too."""
    got = ogpo_critic.returns_to_go(filled(), np.array([0, 1, 2, 4, 5]), 0.5, -2.0)
    assert got.tolist() == pytest.approx([-1 - 0.5 + 1, -1 + 2, 4, -2, -2])


def test_batches_name_their_rows() -> None:
    buffer = filled()
    batch = buffer.sample(50, np.random.default_rng(0), torch.device("cpu"))
    assert set(batch.rows.tolist()) == {0, 1, 2, 4, 5}
    assert batch.rewards[:, 0].tolist() == buffer.rewards[batch.rows].tolist()
    again = ReplayBuffer(100, 1, 1, 1)
    again.load_state_dict(buffer.state_dict())
    assert again.ends[:7].tolist() == buffer.ends[:7].tolist() == [3, 3, 3, 3, 6, 6, 6]


def test_calql_term_by_hand() -> None:
    """One head, one state: two random actions, two of the policy, of which one is below the return-to-go of 1."""
    q_data, q_random = torch.tensor([[2.0]]), torch.tensor([[[0.0, 3.0]]])
    q_policy, returns = torch.tensor([[[-5.0, 4.0]]]), torch.tensor([1.0])
    want = math.log(math.exp(0) + math.exp(3) + math.exp(1) + math.exp(4)) - 2
    assert ogpo_critic.calql_term(q_data, q_random, q_policy, returns).item() == pytest.approx(want, rel=1e-6)
    # released: the random 0 counts as 1 too, and the demonstrated action is one of five
    want = math.log(math.exp(1) + math.exp(3) + math.exp(1) + math.exp(4) + math.exp(2)) - 2
    assert ogpo_critic.calql_term(q_data, q_random, q_policy, returns, True).item() == pytest.approx(want, rel=1e-6)


def test_calql_trains_the_heads_it_draws() -> None:
    agent, args = small_agent(ogpo_critic, heads=4, calql_heads=2, calql_actions=4)
    batch = demonstrated().sample(64, np.random.default_rng(1), torch.device("cpu"))
    ogpo_critic.conservative(agent, batch, torch.zeros(64), args).backward()
    for parameter in agent.critic.parameters():
        assert parameter.grad.flatten(1).any(1).sum() == 2


def test_calql_puts_demonstrated_actions_above_random_ones() -> None:
    agent, args = small_agent(ogpo_critic, critic_lr=3e-3, reward_offset=0.0, calql_actions=4)
    buffer, rng = demonstrated(), np.random.default_rng(1)
    for _ in range(150):
        batch = buffer.sample(64, rng, torch.device("cpu"))
        returns = torch.from_numpy(ogpo_critic.returns_to_go(buffer, batch.rows, args.critic.gamma, 0.0))
        info = ogpo_critic.update_critic(agent, batch, args, returns, calql=True)
    with torch.no_grad():
        data = agent.critic(batch.obs, batch.actions.flatten(1)).mean()
        other = agent.critic(batch.obs, torch.rand(64, 8) * 2 - 1).mean()
    assert data > other + 0.5
    assert all(math.isfinite(v.item()) for v in info.values())


def test_monte_carlo_regression_moves_critics_to_the_returns() -> None:
    """gamma 0.9, a large weight: Q of the data comes near the return-to-go although its target is far from it."""
    errors = []
    for coef in (0.0, 100.0):
        agent, args = small_agent(ogpo_critic, gamma=0.9, mc_coef=coef, critic_lr=3e-3, critic_ema=0.0)
        buffer, rng = demonstrated(), np.random.default_rng(1)
        for _ in range(200):
            batch = buffer.sample(64, rng, torch.device("cpu"))
            returns = ogpo_critic.returns_to_go(buffer, batch.rows, 0.9, -10.0)
            ogpo_critic.update_critic(agent, batch, args, torch.from_numpy(returns))
        q = agent.critic(batch.obs, batch.actions.flatten(1)).mean(0).detach().numpy()
        errors.append(np.abs(q - returns).mean())
    assert errors[1] < 0.5 * errors[0]


# --- diffusion --------------------------------------------------------------------------------------------------------


def test_signal_rises_from_noise_to_the_chunk() -> None:
    times, signal = ogpo_diffusion.chain_schedule(20, torch.device("cpu"))
    assert times.tolist() == pytest.approx([j / 20 for j in range(20, 0, -1)])
    assert signal[-1] == 1 and signal[0] == pytest.approx(1e-3) and (signal.diff() > 0).all()
    assert ogpo_diffusion.signal_level(torch.tensor(0.5)).item() == pytest.approx(0.4938, abs=1e-3)  # of the paper
    fewer, _ = ogpo_diffusion.chain_schedule(3, torch.device("cpu"))
    assert fewer.tolist() == pytest.approx([1.0, 0.65, 0.35])


def test_a_step_over_one_training_step_is_the_ddpm_posterior() -> None:
    """Ho et al. 2020, eq. 7, wherever the predicted chunk is not clipped; eta 0 is DDIM's deterministic step."""
    _, signal = ogpo_diffusion.chain_schedule(20, torch.device("cpu"))
    chunk, eps = torch.linspace(-0.9, 0.9, 7), torch.randn(7, generator=torch.Generator().manual_seed(0))
    for k in range(1, 19):
        now, later = signal[k], signal[k + 1]
        x = now.sqrt() * chunk + (1 - now).sqrt() * eps
        alpha, beta = now / later, 1 - now / later
        mean, sigma = ogpo_diffusion.chain_step(x, eps, now, later, 1.0)
        want = later.sqrt() * beta / (1 - now) * chunk + alpha.sqrt() * (1 - later) / (1 - now) * x
        torch.testing.assert_close(mean, want, rtol=1e-4, atol=1e-5)
        assert sigma.item() == pytest.approx(((1 - later) / (1 - now) * beta).sqrt().item(), rel=1e-5)
        straight, none = ogpo_diffusion.chain_step(x, eps, now, later, 0.0)
        torch.testing.assert_close(straight, later.sqrt() * chunk + (1 - later).sqrt() * eps, rtol=1e-4, atol=1e-5)
        assert none == 0


class GaussianNoise(torch.nn.Module):
    """The exact noise prediction for data N(0.2, 0.3^2), the same for every coordinate."""

    out = torch.nn.Linear(1, 3)

    def embed(self, t: torch.Tensor) -> torch.Tensor:
        return t[..., None]

    def forward(self, obs: torch.Tensor, x: torch.Tensor, t_emb: torch.Tensor) -> torch.Tensor:
        signal = ogpo_diffusion.signal_level(t_emb)
        return (1 - signal).sqrt() * (x - signal.sqrt() * 0.2) / (signal * 0.09 + 1 - signal)


@pytest.mark.parametrize(("eta", "near"), [(1.0, 0.06), (0.0, 0.04)])
def test_chains_of_the_exact_network_follow_the_affine_recursion(
    eta: float, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of a Gaussian's chain is affine, so mean and variance are known; they come near the data's."""
    n, g = 100_000, torch.Generator().manual_seed(0)
    noise, net, obs = torch.randn(n, 21, 1, generator=g), GaussianNoise(), torch.zeros(n, 1)
    times, signal = ogpo_diffusion.chain_schedule(20, torch.device("cpu"))
    mean, var = 0.0, 1.0
    for k in range(20):
        x = torch.tensor([0.0, 0.1])  # small enough that nothing is clipped
        eps = net(None, x, times[k])
        (at0, at1), sigma = ogpo_diffusion.chain_step(x, eps, signal[k], signal[k + 1], eta)
        slope = (at1 - at0).item() / 0.1
        mean, var = at0.item() + slope * mean, slope**2 * var + sigma.item() ** 2
    if eta:
        monkeypatch.setattr(ogpo_diffusion, "NOISE_CLIP", 10.0)
        p = ogpo_diffusion.PolicyArgs(flow_steps=20, noise_std=1e-6)
        last = ogpo_diffusion.sample_chain(net, obs, noise, p)[0][:, -1, 0]
    else:
        last = ogpo_diffusion.sample_ode(net, obs, noise[:, 0], 20)[:, 0]
    assert last.mean().item() == pytest.approx(mean, abs=5e-3) == pytest.approx(0.2, abs=0.01)
    assert last.std().item() == pytest.approx(var**0.5, abs=5e-3) == pytest.approx(0.3, abs=near)


def test_noise_prediction_is_best_at_the_exact_network() -> None:
    g = torch.Generator().manual_seed(0)
    action, x0, t = (0.2 + 0.3 * torch.randn(100_000, 1, generator=g)), torch.randn(100_000, 1, generator=g), None
    t = torch.rand(100_000, generator=g)

    class Changed(GaussianNoise):
        def forward(self, obs: torch.Tensor, x: torch.Tensor, t_emb: torch.Tensor) -> torch.Tensor:
            return super().forward(obs, x, t_emb) + offset

    losses = {}
    for offset in (-0.1, 0.0, 0.1):
        losses[offset] = ogpo_diffusion.bc_loss(Changed(), torch.zeros(100_000, 1), action, x0, t).item()
    assert losses[0.0] < losses[0.1] - 0.008 and losses[0.0] < losses[-0.1] - 0.008


@pytest.mark.parametrize("steps", [4, 20])
def test_likelihood_of_diffusion_chains_is_that_of_their_gaussians(steps: int) -> None:
    agent, args = small_agent(ogpo_diffusion, flow_steps=steps)
    p, obs = args.policy, torch.randn(6, 5)
    chain, log_prob = ogpo_diffusion.sample_chain(agent.actor, obs, torch.randn(6, steps + 1, 8), p)
    again = ogpo_diffusion.chain_log_prob(agent.actor, obs, chain, p)
    torch.testing.assert_close(again, log_prob, rtol=1e-4, atol=1e-4)
    perturbed(agent.actor, 0.05)
    new = ogpo_diffusion.chain_log_prob(agent.actor, obs, chain, p)
    times, signal = ogpo_diffusion.chain_schedule(steps, obs.device)
    want = torch.zeros(6)
    constant = 0.0
    for k in range(steps):
        eps = agent.actor(obs, chain[:, k], agent.actor.embed(times[k]))
        mean, sigma = ogpo_diffusion.chain_step(chain[:, k], eps, signal[k], signal[k + 1], 1.0)
        std = sigma.clamp(min=p.noise_std)
        want = want + Normal(mean, std).log_prob(chain[:, k + 1]).sum(-1)
        constant -= 8 * (std.log().item() + 0.5 * math.log(2 * math.pi))
    want = want - constant - 0.5 * chain[:, 0].square().sum(-1)
    torch.testing.assert_close(new, want / ((steps + 1) * 8), rtol=1e-4, atol=1e-4)


def test_too_many_diffusion_steps_are_refused_in_one_line(tmp_path: Path) -> None:
    flags = ["--env", "toy", "--preset", "laptop", "--flow-steps", "21", "--run-dir", str(tmp_path), "--no-video"]
    done = run_script([ogpo_diffusion.__file__, *flags, "--data-dir", str(tmp_path), "--bc-eval-episodes", "1"])
    assert done.returncode == 2 and "--flow-steps 21: a chain has at most the 20 steps" in done.stderr


# --- what left the script: other advantages, other means over next actions, the released habits -----------------------


def test_group_advantage_other_rules_on_hand_made_ensembles() -> None:
    q = torch.tensor([[[3.0, -1.0, -2.0]], [[1.0, -3.0, 2.0]], [[2.0, -2.0, 0.0]]])  # group means are 0
    advantage = ogpo_extraction.group_advantage
    assert advantage(q, "penultimate").tolist() == [[2.0, -2.0, 0.0]]
    assert torch.allclose(advantage(q, "positive"), torch.tensor([[2.0, 0.0, 0.0]]))
    deviation = math.sqrt(8 / 3)  # of 2, -2 and 0, over three
    assert torch.allclose(advantage(q, "grpo"), torch.tensor([[2.0, -2.0, 0.0]]) / deviation)
    assert torch.equal(advantage(torch.ones(3, 1, 4), "grpo"), torch.zeros(1, 4))
    for kind in ("vanilla", "conservative"):
        assert torch.equal(advantage(q, kind), og.group_advantage(q, kind))


def test_group_advantage_penultimate_against_enumeration() -> None:
    q = torch.randn(4, 6, 5)
    got = ogpo_extraction.group_advantage(q, "penultimate")
    for b in range(6):
        for g in range(5):
            heads = sorted((q[m, b, g] - q[m, b].mean() for m in range(4)), key=abs)
            agree = all(h > 0 for h in heads) or all(h < 0 for h in heads)
            assert got[b, g].item() == pytest.approx(heads[1].item() if agree else 0.0, abs=1e-6)


def test_reduce_samples_on_hand_values() -> None:
    """Two heads, one state, eight next actions: mean, mean of the middle two, mean of the middle four."""
    reduce = ogpo_critic.reduce_samples
    q = torch.tensor([[[8.0, 1.0, 2.0, 3.0, 100.0, 4.0, 5.0, -3.0]], [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 8.0]]])
    for how, want in (("mean", [15.0, 1.0]), ("median", [3.5, 0.0]), ("trimmed", [3.5, 0.0])):
        assert reduce(q, how)[:, 0].tolist() == want
    q[0, 0, 2] = 2.5  # inside the middle half, beside the median
    assert reduce(q, "trimmed")[0, 0].item() == pytest.approx((2.5 + 3 + 4 + 5) / 4)
    assert reduce(q, "median")[0, 0].item() == 3.5
    assert torch.equal(reduce(q[..., :1], "median"), q[..., 0])


CORRECTED = dict(
    normalize_obs=True, score_correction="matched", clip_mean="last", clip_chain_end=False, bc_fallback=False,
    pessimistic_init=True, success_critic=False, critic_weight_decay=0.0, distinct_heads=True,
    target_before_actor=False, ema_lag=False, bc_stop_policy="ode",
)  # fmt: skip


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ogpo_released_without_its_habits_is_the_script(eta: float) -> None:
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(500, 5, 2, 4)
    for success in (True, False, True):
        actions = rng.uniform(-1, 1, (20, 2)).astype(np.float32)
        buffer.add_episode(rng.normal(size=(21, 5)).astype(np.float32), actions, -np.ones(20), success, success)
    shared = dict(critic_warmup=2, critic_successes=1, success_min=8, best_of_n=8)
    ends = []
    for module, more in ((og, {}), (ogpo_released, CORRECTED)):
        agent, args = small_agent(module, **shared, eta=eta, critic_scale=10.0, actor_lr_warmup=100, **more)
        for net in (agent.actor, agent.actor_ema, agent.critic, agent.critic_ema):
            net.obs_std.fill_(1.0)
        draws = np.random.default_rng(1)
        for _ in range(6):
            module.update(agent, buffer, args, draws)
        ends.append(torch.cat([p.flatten() for net in (agent.actor, agent.critic) for p in net.parameters()]))
    assert torch.equal(*ends)


def test_default_args_released_paper_preset_is_the_released_table() -> None:
    """Generation 3 of the released run scripts, Square column."""
    a = cli.flatten(ogpo_released.default_args("lift", "paper", "ogpo+ca"))
    want = dict(
        chunk=4, gamma=0.99, flow_steps=10, critic_ema=0.05, actor_ema=0.005, noise_std=0.05, bc_coef=1.0,
        advantage="conservative", success_critic=True, actor_hidden=(512,) * 4, critic_hidden=(512,) * 4,
        bc_steps=500_000, bc_stop_success=0.45, bc_eval_every=5_000, bc_stop_policy="bon", ema_lag=True,
        bc_cosine=False, distinct_heads=False, target_before_actor=True, eval_every=10_000,
        start_training=10_000, total_steps=2_000_000,
        critic_batch=256, states=256, eta=0.0, critic_scale=1.0, group=32, clip=0.01, heads=10, update_every=1,
        replay_size=2_000_000, best_of_n=8, best_of_n_heads=2, max_grad_norm=1_000.0,
        normalize_obs=False, actor_lr=4.5e-5, actor_lr_min=2e-5, actor_lr_warmup=2_000, actor_lr_period=50_000,
        critic_lr=4.5e-5, actor_weight_decay=0.0, critic_weight_decay=1e-5, bc_lr=3e-4, bc_batch=256,
        reward_offset=-1.0, success_bonus=5.0, eval_interval_episodes=64, bc_eval_episodes=64,
        score_correction="released", clip_mean="all", clip_chain_end=True, bc_fallback=True, horizon=300,
        critic_warmup=0, critic_successes=0, n_step=1, pessimistic_init=False, success_min=256,
    )  # fmt: skip
    assert {k: a[k] for k in want} == want
    assert not ogpo_released.default_args("lift", "paper", "ogpo").critic.success_critic
    assert not ogpo_released.default_args("tool_hang", "paper").critic.success_critic


def test_default_args_released_paper_preset_by_task() -> None:
    """Where the other columns of the table differ from Square's."""
    long = dict(chunk=8, gamma=0.999, actor_hidden=(512,) * 5, start_training=40_000, eval_every=20_000)
    for name, want in (
        ("tool_hang", long | dict(bc_eval_every=10_000, bc_steps=500_000, total_steps=2_000_000, success_critic=False)),
        ("transport", long | dict(bc_eval_every=20_000, bc_steps=1_000_000, total_steps=3_000_000, bc_cosine=True)),
        ("kitchen-mixed", dict(bc_eval_every=20_000, eval_every=20_000, bc_stop_success=1.0, success_critic=False)),
        ("door-raw", dict(bc_eval_every=1_000, bc_steps=50_000, gamma=0.95, flow_steps=3, actor_ema=0.05)),
        ("door-raw", dict(advantage="vanilla", reward_offset=0.0, success_bonus=0.0, success_critic=False)),
    ):
        a = cli.flatten(ogpo_released.default_args(name, "paper", "ogpo+ca"))
        assert {k: a[k] for k in want} == want, name
    assert og.default_args("door-raw", "paper").actor.advantage == "conservative"


class Lessons:
    """Demonstrations for `pretrain`: 40 chunks of 4 steps."""

    def chunks(self, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        return rng.normal(size=(40, 5)).astype(np.float32), rng.uniform(-1, 1, (40, 8)).astype(np.float32)


def clone(folder: Path, rates: dict[int, float], steps: int, **changes: object) -> tuple[SimpleNamespace, list[str]]:
    """A small agent of ogpo_released.py cloned where the evaluation at a step finds `rates`, and who was evaluated."""
    agent, args = small_agent(ogpo_released, bc_steps=steps, bc_eval_every=5, bc_stop_success=0.45, **changes)
    asked: list[str] = []

    def evaluate(use: str, episodes: int, label: str, only: str = "", log: str = "") -> dict[str, SimpleNamespace]:
        asked.append(only)
        return {only: SimpleNamespace(rate=rates.get(agent.bc_step, 0.0))}

    calls = dict(evaluate=evaluate, begin_evaluation=evaluate)
    run = MagicMock(folder=folder, stop=SimpleNamespace(requested=False), **calls)
    ogpo_released.pretrain(run, agent, Lessons(), args)
    return agent, asked


def test_pretrain_released_target_actor_lags_as_its_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cloning step moves it by the same share; --no-ema-lag and another run's policy begin RL without a lag."""
    weights, first = [], flat(small_agent(ogpo_released)[0].actor)
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *rest: object) -> None:
        step(self, *rest)
        weights.append(torch.cat([p.detach().flatten() for group in self.param_groups for p in group["params"]]))

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    agent, _ = clone(tmp_path, {}, 10, actor_ema=0.1)
    assert len(weights) == 10
    average = first
    for new in weights:
        average = average + 0.1 * (new - average)
    torch.testing.assert_close(flat(agent.actor_ema), average)
    assert torch.equal(flat(agent.actor), weights[-1]) and not torch.allclose(average, weights[-1], atol=1e-3)
    for changes in (dict(ema_lag=False), dict(cloned=str(tmp_path))):
        agent, _ = clone(tmp_path, {}, 10, actor_ema=0.1, **changes)
        assert torch.equal(flat(agent.actor_ema), flat(agent.actor))


def test_pretrain_released_stops_by_the_acting_policy_and_keeps_what_crossed(tmp_path: Path) -> None:
    agent, asked = clone(tmp_path, {5: 0.4, 10: 0.5}, 40)
    assert agent.bc_step == 10 and asked == ["bon", "bon", "ode"]  # the last one: the cloned policy is measured
    crossed, _ = clone(tmp_path, {}, 10)
    assert torch.equal(flat(agent.actor), flat(crossed.actor))
    agent, asked = clone(tmp_path, {5: 0.4, 10: 0.5}, 40, bc_stop_policy="ode")
    before, _ = clone(tmp_path, {}, 5)
    assert asked == ["ode"] * 3 and torch.equal(flat(agent.actor), flat(before.actor))


def test_pretrain_released_cosine_rate_is_the_actor_s_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *rest: rates.append(self.param_groups[0]["lr"]) or step(self, *rest)
    )
    schedule = dict(actor_lr=9.0, actor_lr_min=1e-5, actor_lr_warmup=2, actor_lr_period=6, bc_lr=3e-5)
    clone(tmp_path, {}, 8, bc_cosine=True, **schedule)
    falling = [1e-5 + 1e-5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx([1e-5, 2e-5, *falling, 1e-5, 2e-5])
    rates.clear()
    clone(tmp_path, {}, 8, **schedule)
    assert rates == [3e-5] * 8


def test_best_of_n_released_draws_heads_with_replacement() -> None:
    """One state, two candidates, three heads; the draws 0.1 and 0.2 both name the first head."""
    q = torch.tensor([[[5.0, 1.0]], [[0.0, 2.0]], [[0.0, 3.0]]])
    draws = torch.tensor([[[0.1, 0.4]], [[0.2, 0.9]], [[0.7, 0.0]]])
    assert ogpo_released.best_of_n(q, draws, 2, distinct=False).tolist() == [0]  # 5 against min(2, 3)
    assert ogpo_released.best_of_n(q, draws, 2).tolist() == og.best_of_n(q, draws, 2).tolist() == [1]  # 0, min(3, 1)
    same, many = 0, torch.rand(10, 20_000, 1, generator=torch.Generator().manual_seed(0))
    for head in range(10):  # both draws name this head: nothing else counts
        q = torch.zeros(10, 20_000, 1)
        q[head] = 1.0
        same += (q.gather(0, (many[:2] * 10).long()).amin(0) == 1).float().mean().item()
    assert same == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("before", [True, False])
def test_update_released_targets_come_from_the_target_actor_before_its_step(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(500, 5, 2, 4)
    for _ in range(3):
        actions = rng.uniform(-1, 1, (20, 2)).astype(np.float32)
        buffer.add_episode(rng.normal(size=(21, 5)).astype(np.float32), actions, -np.ones(20), True, True)
    agent, args = small_agent(ogpo_released, target_before_actor=before, success_min=8)
    seen, critic = [], ogpo_released.update_critic
    monkeypatch.setattr(
        ogpo_released, "update_critic", lambda agent, *rest: seen.append(flat(agent.actor_ema)) or critic(agent, *rest)
    )
    old = flat(agent.actor_ema)
    ogpo_released.update(agent, buffer, args, rng)
    moved = old + args.policy.actor_ema * (flat(agent.actor) - old)
    torch.testing.assert_close(flat(agent.actor_ema), moved)
    assert len(seen) == 2 and (moved - old).abs().max() > 1e-6  # on the batch and on successes
    for weights in seen:
        torch.testing.assert_close(weights, old if before else moved, rtol=0, atol=1e-7)


def test_sample_chain_released_clip_biases_the_ratio() -> None:
    agent, args = small_agent(ogpo_released, noise_std=0.3, clip_mean="last", score_correction="matched")
    perturbed(agent.actor, 0.3)
    agent.actor_ema.load_state_dict(agent.actor.state_dict())
    obs, noise = torch.randn(256, 5), torch.randn(256, args.policy.flow_steps + 1, 8)
    chain, old = ogpo_released.sample_chain(agent.actor_ema, obs, noise, args.policy)
    assert chain[:, -1].abs().max() <= 1
    ratio = (ogpo_released.chain_log_prob(agent.actor, obs, chain, args.policy) - old).exp()
    assert (ratio > 1 + 1e-4).any() and ratio.mean() > 1.001


def test_step_mean_released_correction_is_a_kth_of_the_matched_one() -> None:
    x, v, t = torch.randn(3, 8), torch.randn(3, 8), torch.tensor(0.5)
    p = dict(flow_steps=10, noise_std=0.3, eta=0.0)
    euler, sigma = x + v / 10, torch.tensor(0.3 * math.sqrt(0.5))
    released = ogpo_released.step_mean(x, v, t, sigma, ogpo_released.PolicyArgs(**p)) - euler
    torch.testing.assert_close(10 * released, og.step_mean(x, v, t, sigma, og.PolicyArgs(**p)) - euler)


def test_update_released_clones_any_chunk_until_there_are_successes() -> None:
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(500, 5, 2, 4)
    actions = rng.uniform(-1, 1, (20, 2)).astype(np.float32)
    buffer.add_episode(rng.normal(size=(21, 5)).astype(np.float32), actions, -np.ones(20), False, False)
    for waiting in (0, 5):
        agent, args = small_agent(ogpo_released, critic_warmup=waiting)
        info = ogpo_released.update(agent, buffer, args, rng)
        assert "bc_loss" in info and ("nonzero" in info) == (waiting == 0)
