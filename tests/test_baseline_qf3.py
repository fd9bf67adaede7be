"""QF3: where critics are asked, which numbers get their gradient, its anchors, and that it starts as OGPO does."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ogpo_state as og
from baselines import qf3
from common import checkpoint, cli
from common.runlog import read_metrics
from tests.helpers import TINY, definitions, demonstrated, differing, folders, new_agent, perturbed, weights
from tests.warm import run_script

OWN = {
    *("RunArgs", "ActorArgs", "default_args", "COMPILED", "filtered_prediction", "actor_loss"),
    *("chain_log_prob", "group_advantage", "ppo_loss"),  # OGPO's alone
    *("Agent", "update_actor", "update", "pretrain", "main"),
}


def small_agent(**changes: object) -> tuple[Any, Any]:
    """Observations of 5 numbers, actions of 2, chunks of 4; the actor has left the clone a little."""
    agent, args = new_agent(qf3, **dict(heads=3, critic_batch=32) | changes)
    perturbed(agent.actor, 0.05)
    perturbed(agent.critic, 0.2)
    return agent, args


def some_batch(n: int = 16) -> Any:
    return demonstrated().sample(n, np.random.default_rng(0), torch.device("cpu"))


# --- what it shares, and its arguments --------------------------------------------------------------------------------


def test_what_is_not_qf3_is_the_text_of_ogpo_state() -> None:
    assert differing(og, qf3) == OWN
    ours, theirs = (definitions(module)["RunArgs"].splitlines() for module in (qf3, og))
    assert ours == [line for line in theirs if not line.startswith("    variant:")]


@pytest.mark.parametrize("preset", ["laptop", "paper"])
@pytest.mark.parametrize("env", ["toy", "lift", "square", "tool_hang", "transport", "pen", "kitchen-mixed"])
def test_default_args_are_ogpos_but_for_the_papers_values(preset: str, env: str) -> None:
    ours, theirs = cli.flatten(qf3.default_args(env, preset)), cli.flatten(og.default_args(env, preset, "ogpo+ca"))
    clip = 0.02 if env == "transport" else 0.12
    own = dict(velocity_clip=clip, base_coef=12.5, cfm_coef=0.01, bc_coef=100.0)
    alone = 100_000 if env == "transport" else 20_000
    own["critic_warmup"] = alone if preset == "paper" else theirs["critic_warmup"]
    assert {name: ours[name] for name in own} == own
    assert {k: v for k, v in ours.items() if k not in own} == {k: theirs[k] for k in ours.keys() - own.keys()}
    assert theirs.keys() - ours.keys() == {"variant", "advantage", "states", "group", "clip"}


# --- the filter -------------------------------------------------------------------------------------------------------


def test_filtered_prediction_by_hand() -> None:
    action, x0 = torch.tensor([[0.2, -0.4], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 2.0]])
    u, t = action - x0, torch.tensor([0.75, 0.0])
    v = u + torch.tensor([[0.1, -0.3], [0.5, -0.05]])
    predicted, inside = qf3.filtered_prediction(v, u, action, t, 0.2)
    want = [0.2 + 0.25 * 0.1, -0.4 - 0.25 * 0.2, 1.0 + 0.2, -0.05]
    assert predicted.flatten().tolist() == pytest.approx(want) and inside.item() == 0.5


def test_filtered_prediction_within_the_clip_is_one_step_of_the_flow() -> None:
    action, x0, t, v = torch.rand(9, 4) * 2 - 1, torch.randn(9, 4), torch.rand(9), torch.randn(9, 4)
    x_t = (1 - t[:, None]) * x0 + t[:, None] * action
    predicted, inside = qf3.filtered_prediction(v, action - x0, action, t, 100.0)
    torch.testing.assert_close(predicted, x_t + (1 - t[:, None]) * v)
    assert inside == 1
    near, _ = qf3.filtered_prediction(v, action - x0, action, t, 0.1)
    assert ((near - action).abs() <= 0.1 * (1 - t[:, None]) + 1e-6).all()
    exact, _ = qf3.filtered_prediction(action - x0, action - x0, action, t, 0.1)
    assert torch.equal(exact, action)


def test_gradient_of_q_reaches_the_numbers_inside_alone() -> None:
    """dQ/dv = (1 - t) m dQ/da at the prediction [P 3.2, eq. 5], with a real critic."""
    agent, _ = small_agent()
    obs, action, t = torch.randn(32, 5), torch.rand(32, 8) * 2 - 1, torch.rand(32)
    u = action - torch.randn(32, 8)
    v = (u + 0.2 * torch.randn(32, 8)).requires_grad_()
    predicted, inside = qf3.filtered_prediction(v, u, action, t, 0.2)
    (got,) = torch.autograd.grad(agent.critic(obs, predicted).amin(0).sum(), v)
    asked = predicted.detach().requires_grad_()
    (slope,) = torch.autograd.grad(agent.critic(obs, asked).amin(0).sum(), asked)
    mask = (v - u).abs() < 0.2
    assert 0.5 < inside.item() < 0.9 and inside.item() == pytest.approx(mask.float().mean().item())
    torch.testing.assert_close(got, (1 - t[:, None]) * mask * slope)
    assert (got[mask] != 0).all()


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_actor_loss_by_hand() -> None:
    q = torch.tensor([[1.0, -10.0], [3.0, -20.0]])  # two heads, two chunks: the least are 1 and -20
    v, u, v_base = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    a = qf3.ActorArgs(base_coef=3.0, cfm_coef=2.0)
    loss, info = qf3.actor_loss(q, v, u, v_base, a)
    assert loss.item() == pytest.approx(9.5 + 2 * 1 / 4 + 3 * 20 / 4)
    assert [info[k].item() for k in ("q_policy", "cfm_loss", "base_loss")] == pytest.approx([-9.5, 0.25, 5.0])


def test_numbers_outside_are_pulled_back_by_the_replay_alone() -> None:
    """Q rises to the right; v is right of the clip in the first number and inside in the second [P 3.2, fig. 2]."""
    u, action, t = torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0.5])
    v = torch.tensor([[0.3, 0.05]], requires_grad=True)
    predicted, _ = qf3.filtered_prediction(v, u, action, t, 0.1)
    a = qf3.ActorArgs(base_coef=0.0, cfm_coef=0.4)
    loss, _ = qf3.actor_loss(7 * predicted.sum(-1)[None], v, u, u, a)
    (gradient,) = torch.autograd.grad(loss, v)
    assert gradient[0].tolist() == pytest.approx([0.4 * 0.3, -0.5 * 7 + 0.4 * 0.05])


def test_the_optimum_under_a_linear_q_is_a_shift_of_the_clone() -> None:
    """Unfiltered, without replay's anchor: v - v_base = (1 - t) D g / (2 base_coef), for any replay and noise."""
    g = torch.randn(4)
    a = qf3.ActorArgs(base_coef=12.5, cfm_coef=0.0)
    action, u, t, v_base = torch.rand(6, 4) * 2 - 1, torch.randn(6, 4), torch.rand(6), torch.randn(6, 4)
    v = (v_base + (1 - t[:, None]) * 4 * g / (2 * 12.5)).requires_grad_()
    predicted, _ = qf3.filtered_prediction(v, u, action, t, 1e6)
    loss, _ = qf3.actor_loss((predicted @ g)[None], v, u, v_base, a)
    (gradient,) = torch.autograd.grad(loss, v)
    assert gradient.abs().max() < 1e-6
    moved = (v.detach() + 0.1).requires_grad_()
    predicted, _ = qf3.filtered_prediction(moved, u, action, t, 1e6)
    assert qf3.actor_loss((predicted @ g)[None], moved, u, v_base, a)[0] > loss


# --- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_success", [True, False])
def test_update_actor_is_the_gradient_of_its_loss_and_moves_nothing_else(with_success: bool) -> None:
    agent, args = small_agent(velocity_clip=1.0, base_coef=2.0, cfm_coef=0.3, bc_coef=5.0, actor_ema=0.25)
    batch, success = some_batch(), some_batch(8) if with_success else None
    others = ("base", "critic", "critic_ema")
    before = {name: weights(getattr(agent, name)) for name in (*others, "actor_ema")}
    rng = qf3.Rng(args.run.seed, agent.rng.device)
    action, x0, t = batch.actions.flatten(1), rng.randn(16, 8), rng.rand(16)[:, None]
    x_t, u = (1 - t) * x0 + t * action, action - x0
    v, v_base = (net(batch.obs, x_t, net.embed(t[:, 0])) for net in (agent.actor, agent.base))
    q = agent.critic(batch.obs, action + (1 - t) * (v - u).clamp(-1, 1)).min(0).values
    loss = -q.mean() + 0.3 * (v - u).square().mean() + 2 * (v - v_base).square().mean()
    if with_success:
        lesson = success.actions.flatten(1)
        loss = loss + 5 * qf3.bc_loss(agent.actor, success.obs, lesson, rng.randn(8, 8), rng.rand(8))
    want = torch.autograd.grad(loss, list(agent.actor.parameters()))
    info = qf3.update_actor(agent, batch, success, args)
    for p, gradient in zip(agent.actor.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(before[name], weights(getattr(agent, name))) for name in others)
    assert all(p.grad is None for name in others for p in getattr(agent, name).parameters())
    torch.testing.assert_close(
        weights(agent.actor_ema), before["actor_ema"] + 0.25 * (weights(agent.actor) - before["actor_ema"])
    )
    assert ("bc_loss" in info) == with_success
    assert info["moved"].item() == pytest.approx(((1 - t) * (v - v_base)).abs().mean().item(), rel=1e-5)
    assert all(x.numel() == 1 and not x.requires_grad and math.isfinite(x) for x in info.values())


def test_update_actor_evaluates_each_network_once_and_draws_no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, args = small_agent()
    calls = []
    for name in ("actor", "base", "critic"):
        getattr(agent, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    for name in ("sample_chain", "sample_ode"):
        monkeypatch.setattr(qf3, name, None)
    qf3.update_actor(agent, some_batch(), None, args)
    assert sorted(calls) == ["actor", "base", "critic"]


def test_the_clone_is_a_fixed_point_where_q_is_flat() -> None:
    agent, args = small_agent(cfm_coef=0.0)
    agent.actor.load_state_dict(agent.base.state_dict())
    agent.critic.forward = lambda obs, action: (0 * action).sum(-1).expand(3, -1)
    info = qf3.update_actor(agent, some_batch(), None, args)
    assert info["actor_grad"] == 0 and info["moved"] == 0 and torch.equal(weights(agent.actor), weights(agent.base))


def test_updates_move_the_policy_towards_what_the_critics_prefer() -> None:
    """A fixed replay of the clone's own chunks; Q is better the larger the first number. The anchor limits the move."""
    shift = {}
    for coef in (1.0, 100.0):
        agent, args = small_agent(base_coef=coef, velocity_clip=0.5, actor_lr=1e-3)
        agent.actor.load_state_dict(agent.base.state_dict())
        agent.critic.forward = lambda obs, action: 2 * action[:, 0].expand(3, -1)
        g = torch.Generator().manual_seed(0)
        obs, noise = torch.randn(256, 5, generator=g), torch.randn(256, 8, generator=g)
        batch = some_batch(256)
        batch.obs, batch.actions = obs, qf3.sample_ode(agent.base, obs, noise, 4).unflatten(1, (4, 2))
        for _ in range(150):
            qf3.update_actor(agent, batch, None, args)
        ends = [qf3.sample_ode(net, obs, noise, 4).detach() for net in (agent.actor, agent.base)]
        shift[coef] = (ends[0] - ends[1]).mean(0)
    assert shift[1.0][0] > 0.1 and shift[1.0][1:].abs().max() < 0.3 * shift[1.0][0]
    assert 0 < shift[100.0][0] < 0.3 * shift[1.0][0]


def test_update_waits_for_the_critics_then_moves_the_actor_first() -> None:
    agent, args = small_agent(critic_warmup=2, critic_successes=10, success_min=64)
    buffer, rng, order = demonstrated(), np.random.default_rng(0), []
    for name in ("actor", "critic"):
        getattr(agent, f"{name}_opt").register_step_post_hook(lambda *_, name=name: order.append(name))
    for _ in range(2):
        assert "inside" not in qf3.update(agent, buffer, args, rng) and not agent.policy_gradient_on
    info = qf3.update(agent, buffer, args, rng)
    assert order == ["critic", "critic", "actor", "critic"] and agent.policy_gradient_on and agent.actor_updates == 1
    assert {"inside", "moved", "q_policy", "base_loss", "cfm_loss", "bc_loss", "td_loss"} <= info.keys()
    args.actor.bc_coef = 0.0
    assert "bc_loss" not in qf3.update(agent, buffer, args, rng)


# --- training ---------------------------------------------------------------------------------------------------------


FLAGS = [
    *(*TINY, "--start-training", "200", "--critic-successes", "0", "--critic-warmup", "5", "--success-min", "1"),
    *("--log-every", "100", "--total-steps"),
]


def test_qf3_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    script = qf3.__file__
    run_script([script, *FLAGS, "300", *folders(tmp_path, "a")], check=0)
    run_script([script, "--resume", str(tmp_path / "a"), "--total-steps", "400"], check=0)
    done = run_script([script, "--eval", str(tmp_path / "a")], check=0)
    assert "acting policy: success" in done.stdout and "ODE policy: success" in done.stdout
    agent, cloned = (
        checkpoint.load(tmp_path / "a" / "checkpoint.pt")["agent"],
        checkpoint.load(tmp_path / "a/cloned.pt"),
    )
    assert all(torch.equal(agent["base"][k], cloned[k]) for k in cloned)  # frozen
    assert not all(torch.equal(agent["actor"][k], cloned[k]) for k in cloned)
    rows = read_metrics(tmp_path / "a")
    assert rows[-1]["step"] == 400 and "final/act_success" in rows[-1]
    assert any(math.isfinite(row.get("ogpo/inside", math.nan)) for row in rows)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    script = qf3.__file__
    run_script([script, *FLAGS, "300", *folders(tmp_path, "a")], check=0)
    run_script([script, "--resume", str(tmp_path / "a"), "--total-steps", "400"], check=0)
    run_script([script, *FLAGS, "400", *folders(tmp_path, "whole")], check=0)
    a, whole = (checkpoint.load(tmp_path / name / "checkpoint.pt")["agent"] for name in ("a", "whole"))
    for part in ("actor", "actor_ema", "base", "critic", "critic_ema"):
        assert all(torch.equal(a[part][k], whole[part][k]) for k in whole[part]), part


@pytest.mark.slow
def test_first_episodes_are_those_of_ogpo(tmp_path: Path) -> None:
    """Same clone and chunks, and the same critics after as many updates, until a gate opens."""
    flags = [*TINY, "--start-training", "200", "--critic-warmup", "1000", "--total-steps", "400"]
    for name, script in (("ours", qf3), ("theirs", og)):
        run_script([script.__file__, *flags, *folders(tmp_path, name)], check=0)
    ours, theirs = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("ours", "theirs"))
    assert ours["agent"]["updates"] > 20
    for part in ("actor", "actor_ema", "critic", "critic_ema"):
        assert all(torch.equal(ours["agent"][part][k], theirs["agent"][part][k]) for k in theirs["agent"][part])
    assert len(ours["buffer"]["obs"]) > 200
    for name in ("obs", "actions", "rewards", "terminated"):
        assert torch.equal(ours["buffer"][name], theirs["buffer"][name])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_qf3_learns_the_toy_task(tmp_path: Path, seed: int) -> None:
    run_script([qf3.__file__, "--env", "toy", "--no-video", "--seed", str(seed), *folders(tmp_path, "a")], check=0)
    rows = read_metrics(tmp_path / "a")
    cloned = next(row["eval/ode_success"] for row in rows if "eval/ode_success" in row)
    assert rows[-1]["final/act_success"] > max(cloned + 0.25, 0.8)
