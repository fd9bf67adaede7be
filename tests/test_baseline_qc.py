"""QC, QC-FQL and FQL: their values by hand, what their updates move, and that they start as OGPO does."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import ogpo_state as og
from baselines import qc
from common import checkpoint, cli
from common.errors import UserError
from common.replay import ReplayBuffer
from common.rng import Rng
from common.runlog import read_metrics
from settings.tasks import TASKS
from tests import helpers
from tests.helpers import OPEN, TINY, definitions, demonstrated, differing, folders, new_agent, perturbed, slow, weights
from tests.warm import run_script

POLICIES = ("best-of-n", "one-step")
OWN = {
    *("RunArgs", "PolicyArgs", "ActorArgs", "CriticArgs", "default_args", "COMPILED"),
    *("OneStepNet", "one_step_loss", "decode", "draw_action", "draw_chains", "pretrain_one_step"),
    *("chain_log_prob", "group_advantage", "ppo_loss", "periodic_lr"),  # OGPO's alone
    *("Agent", "act_ode", "act_best_of_n", "update_actor", "update_critic", "update", "pretrain", "main"),
}


def small_agent(policy: str = "best-of-n", gates: bool = True, **changes: object) -> tuple[Any, Any]:
    """Observations of 5 numbers, actions of 2, chunks of 4; weights away from their start; gates open unless told."""
    agent, args = new_agent(qc, policy, **dict(heads=3, critic_batch=32) | changes)
    perturbed(agent.critic, 0.1, 1)
    perturbed(agent.critic_ema, 0.1, 2)
    if agent.one_step:
        perturbed(agent.one_step, 0.1, 3)
    agent.best_of_n_on = agent.policy_gradient_on = gates
    return agent, args


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class Lessons:
    """Demonstrations: 40 chunks of steps at random observations."""

    def chunks(self, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        return rng.normal(size=(40, 5)).astype(np.float32), rng.uniform(-1, 1, (40, 2 * horizon)).astype(np.float32)


# --- what it shares, and its arguments --------------------------------------------------------------------------------


def test_what_is_not_qc_is_the_text_of_ogpo_state() -> None:
    assert differing(og, qc) == OWN
    ours, theirs = (definitions(module)["RunArgs"].splitlines() for module in (qc, og))
    assert ours == [line for line in theirs if not line.startswith("    variant:")]


@pytest.mark.parametrize("policy", POLICIES)
def test_default_args_are_ogpo_s_but_for_the_method(policy: str) -> None:
    own = {"policy", "clone_data", "alpha", "distill_steps"}
    for env in (*TASKS, "door-raw"):
        for preset in ("laptop", "paper"):
            ours, theirs = cli.flatten(qc.default_args(env, preset, policy)), cli.flatten(og.default_args(env, preset))
            assert ours["policy"] == policy and ours["actor_lr"] == 3e-4
            assert ours["best_of_n"] == (1 if policy == "one-step" else theirs["best_of_n"])
            assert ours.keys() - theirs.keys() == own
            shared = ours.keys() - own - {"actor_lr", "best_of_n"}
            assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}, (env, preset)
    with pytest.raises(UserError, match="--policy two-step"):
        qc.default_args("toy", "laptop", "two-step")


# --- networks and losses ----------------------------------------------------------------------------------------------


def test_one_step_net_is_the_mlp_of_observation_and_noise() -> None:
    """By hand, from the columns of those two; nothing of the time embedding's weights counts."""
    mean, std = torch.randn(5), torch.rand(5) + 0.5
    net = qc.OneStepNet(8, (16, 16), mean, std)
    perturbed(net, 0.1)
    obs, z = torch.randn(7, 5), torch.randn(7, 8)
    h = torch.cat([(obs - mean) / std, z], 1) @ net.layers[0].weight[:, :13].T + net.layers[0].bias
    h = torch.nn.functional.gelu(net.layers[1](torch.nn.functional.gelu(h)))
    torch.testing.assert_close(net(obs, z), net.out(h))
    before = net(obs, z)
    perturbed(net.time, 1.0)
    assert torch.equal(net(obs, z), before)


@pytest.mark.parametrize("alpha", [0.5, 1e6])
def test_one_step_loss_is_least_where_it_should_be(alpha: float) -> None:
    """With Q = w.mu + constant in every head: at mu = F + D w / (2 alpha mean |Q|), so at F itself as alpha grows."""
    n, d = 6, 4
    flow, w = torch.randn(n, d).double(), 0.1 * torch.randn(d).double()
    size = 2.0  # of mean |Q|, as if it were held: it is a constant of the gradient
    action = (flow + d * w / (2 * alpha * size)).requires_grad_()
    q = action @ w
    q = (q + size - q.detach().mean()).expand(3, n)  # mean over the batch is `size`, all above 0
    assert (q > 0).all()
    loss, info = qc.one_step_loss(action, flow, q, alpha)
    loss.backward()
    assert action.grad.abs().max() < 1e-10
    assert loss.item() == pytest.approx(alpha * info["distill_loss"].item() - 1)
    assert alpha < 1e3 or (action - flow).abs().max() < 1e-6


def test_one_step_loss_by_hand() -> None:
    action, flow = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    q = torch.tensor([[-2.0, 4.0], [-4.0, 8.0]])  # heads' means -3 and 6: mean 1.5, mean size 4.5
    loss, info = qc.one_step_loss(action, flow, q, 2.0)
    assert loss.item() == pytest.approx(2 * (1 + 4 + 0 + 1) / 4 - 1.5 / 4.5)
    assert info["distill_loss"].item() == 1.5 and info["q_policy"].item() == 1.5


def test_one_step_loss_does_not_depend_on_the_size_of_rewards() -> None:
    grads = []
    for size in (1.0, 50.0):
        action = torch.full((4, 3), 0.3, requires_grad=True)
        q = size * (action.sum(1) * torch.tensor([1.0, 2.0, -3.0, 1.0])).expand(2, 4)
        qc.one_step_loss(action, torch.zeros(4, 3), q, 1.0)[0].backward()
        grads.append(action.grad)
    torch.testing.assert_close(*grads)


def test_pretrain_one_step_distils_the_clone_and_moves_nothing_else() -> None:
    """alpha without bound: mu becomes F, here of chunks of one step and a flow with something in it."""
    changes = dict(chunk=1, distill_steps=800, actor_lr=3e-3, actor_hidden=(32, 32))
    agent, args = small_agent("one-step", gates=False, **changes)
    before, draws = weights(agent.actor), agent.rng.generator.get_state()
    run = MagicMock(stop=SimpleNamespace(requested=False))
    qc.pretrain_one_step(run, agent, Lessons(), args)
    assert agent.distill_step == 800 and run.save.called
    assert torch.equal(weights(agent.actor), before) and torch.equal(agent.rng.generator.get_state(), draws)
    obs, z = torch.from_numpy(Lessons().chunks(1)[0]), torch.randn(40, 2)
    with torch.no_grad():
        flow = qc.sample_ode(agent.actor, obs, z, args.policy.flow_steps)
        error = (agent.one_step(obs, z) - flow).square().mean().item()
    assert flow.var().item() > 0.1 and error < 3e-3


def test_pretrain_one_step_stopped_goes_on_exactly() -> None:
    class Stop:
        def __init__(self, after: int) -> None:
            self.left = after

        @property
        def requested(self) -> bool:
            self.left -= 1
            return self.left < 0

    whole, args = small_agent("one-step", gates=False, distill_steps=20)
    qc.pretrain_one_step(MagicMock(stop=Stop(10**6)), whole, Lessons(), args)
    broken, _ = small_agent("one-step", gates=False, distill_steps=20)
    qc.pretrain_one_step(MagicMock(stop=Stop(7)), broken, Lessons(), args)
    assert broken.distill_step == 7
    again, _ = small_agent("one-step", gates=False, distill_steps=20)
    checkpoint.unpack(again, checkpoint.pack(broken))
    qc.pretrain_one_step(MagicMock(stop=Stop(10**6)), again, Lessons(), args)
    assert again.distill_step == 20 and torch.equal(weights(again.one_step), weights(whole.one_step))


# --- the policy that acts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_choice_is_the_argmax_of_the_online_critics_mean(policy: str) -> None:
    """Two heads set by hand: x and -3 x of the chunk's first number. Their mean wants it least, one alone or the least
    of both would want another; the target critics must not be asked."""
    agent, args = small_agent(policy, best_of_n=6)
    agent.critic = lambda rows, action: torch.stack([action[:, 0], -3 * action[:, 0]])
    agent.critic_ema = None
    obs = torch.randn(50, 5)
    got = qc.act_best_of_n(agent, args, obs, Rng(3, torch.device("cpu"))).flatten(1)  # (50, D)
    rows, z = obs.repeat_interleave(6, 0), Rng(3, torch.device("cpu")).randn(300, 8)
    with torch.no_grad():
        if policy == "one-step":
            candidates = agent.one_step(rows, z).clamp(-1, 1)
        else:
            candidates = qc.sample_ode(agent.actor, rows, z, args.policy.flow_steps)
    candidates = candidates.unflatten(0, (50, 6))
    best = candidates[..., 0].argmin(1)
    assert torch.equal(got, candidates[torch.arange(50), best]) and best.unique().numel() == 6
    assert not torch.equal(best, candidates[..., 0].argmax(1))


@pytest.mark.parametrize("policy", POLICIES)
def test_ode_policy_is_one_draw_of_the_method_without_choice(policy: str) -> None:
    agent, args = small_agent(policy, best_of_n=6)
    obs, cpu = torch.randn(9, 5), torch.device("cpu")
    z = Rng(4, cpu).randn(9, 8)
    with torch.no_grad():
        flow = qc.sample_ode(agent.actor, obs, z, args.policy.flow_steps)
        want = agent.one_step(obs, z).clamp(-1, 1) if agent.one_step else flow
    assert torch.equal(qc.act_ode(agent, args, obs, Rng(4, cpu)).flatten(1), want)
    agent.best_of_n_on = False  # before the critics can tell it is the clone's
    assert torch.equal(qc.act_ode(agent, args, obs, Rng(4, cpu)).flatten(1), flow)


@pytest.mark.parametrize("policy", POLICIES)
def test_behind_closed_gates_acting_and_critics_are_ogpo_s_bit_for_bit(policy: str) -> None:
    changes = dict(actor_hidden=(32, 32), critic_hidden=(32, 32), chunk=4, heads=3, critic_batch=32, states=8)
    waiting = dict(critic_successes=1_000, critic_warmup=3)
    theirs, og_args = helpers.small_agent(og, **changes, **waiting)
    del changes["states"]
    ours = qc.Agent(args := cli.override(qc.default_args("toy", "laptop", policy), changes | waiting), 5, 2,
                    torch.device("cpu"), None)  # fmt: skip
    buffer, obs = demonstrated(), torch.randn(3, 5)
    for _ in range(6):
        actions = qc.act_best_of_n(ours, args, obs, ours.rng), og.act_best_of_n(theirs, og_args, obs, theirs.rng)
        assert torch.equal(*actions)
        qc.update(ours, buffer, args, np.random.default_rng(0))
        og.update(theirs, buffer, og_args, np.random.default_rng(0))
        assert torch.equal(weights(ours.critic), weights(theirs.critic))
        assert torch.equal(weights(ours.critic_ema), weights(theirs.critic_ema))
    assert torch.equal(weights(ours.actor), weights(theirs.actor)) and not ours.best_of_n_on


# --- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "n"), [("best-of-n", 1), ("best-of-n", 5), ("one-step", 1)])
def test_update_critic_regresses_to_the_acting_policy_s_next_action(policy: str, n: int) -> None:
    """N = 1: SARSA, the value of the flow itself; more: the online critics choose, the target critics value."""
    agent, args = small_agent(policy, best_of_n=n)
    batch = demonstrated().sample(16, np.random.default_rng(1), torch.device("cpu"), chunks=2)
    agent.rng = Rng(5, torch.device("cpu"))
    z = Rng(5, torch.device("cpu")).randn(16 * n, 8)
    with torch.no_grad():
        rows = batch.next_obs.repeat_interleave(n, 0)
        action = agent.one_step(rows, z).clamp(-1, 1) if agent.one_step else qc.sample_ode(agent.actor, rows, z, 4)
        best = agent.critic(rows, action).mean(0).view(16, n).argmax(1)
        value = agent.critic_ema(batch.next_obs, action.view(16, n, 8)[torch.arange(16), best]).mean(0)
        q = agent.critic(batch.obs, batch.actions.flatten(1))
    target = torch.zeros(16)
    for i in range(16):
        steps = int(batch.steps[i])
        target[i] = sum(0.95**k * batch.rewards[i, k] for k in range(steps))
        target[i] += 0.95**steps * (1 - batch.terminated[i]) * value[i]
    assert args.policy.flow_steps == 4 and args.critic.gamma == 0.95 and 0 < batch.terminated.sum() < 16
    info = qc.update_critic(agent, batch, args, None, True)
    torch.testing.assert_close(info["td_loss"], (q - target).square().mean())


def test_update_actor_moves_only_what_its_losses_are_of() -> None:
    agent, args = small_agent("one-step", alpha=0.7)
    batch = demonstrated().sample(16, np.random.default_rng(1), torch.device("cpu"))
    before = {name: weights(getattr(agent, name)) for name in ("actor", "one_step", "critic", "critic_ema")}
    agent.rng = Rng(6, torch.device("cpu"))
    info = qc.update_actor(agent, batch, None, args)
    moved = {name for name, old in before.items() if not torch.equal(weights(getattr(agent, name)), old)}
    assert moved == {"one_step"} and "bc_loss" not in info
    assert all(p.grad is None for net in (agent.critic, agent.actor) for p in net.parameters())
    twin, _ = small_agent("one-step", alpha=0.7)
    z = Rng(6, torch.device("cpu")).randn(16, 8)
    action = twin.one_step(batch.obs, z)
    flow = qc.sample_ode(twin.actor, batch.obs, z, 4).detach()
    q = twin.critic(batch.obs, action.clamp(-1, 1)).mean(0)
    (0.7 * (action - flow).square().mean() - q.mean() / q.abs().mean().item()).backward()
    for mine, want in zip(agent.one_step.parameters(), twin.one_step.parameters(), strict=True):
        assert (mine.grad is None) == (want.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(mine.grad, want.grad)


@pytest.mark.parametrize("policy", POLICIES)
def test_update_actor_imitates_as_cloning_does(policy: str) -> None:
    """The flow's gradient is that of flow matching alone, whatever the critics say; in QC nothing else moves."""
    agent, args = small_agent(policy)
    batch = demonstrated().sample(16, np.random.default_rng(1), torch.device("cpu"))
    agent.rng, rng = Rng(6, torch.device("cpu")), Rng(6, torch.device("cpu"))
    critic = weights(agent.critic)
    if agent.one_step:
        rng.randn(16, 8)
    twin, _ = small_agent(policy)
    action = batch.actions.flatten(1)
    loss = qc.bc_loss(twin.actor, batch.obs, action, rng.randn(16, 8), rng.rand(16))
    loss.backward()
    info = qc.update_actor(agent, batch, batch, args)
    assert info["bc_loss"] == loss and torch.equal(weights(agent.critic), critic)
    for mine, want in zip(agent.actor.parameters(), twin.actor.parameters(), strict=True):
        assert torch.equal(mine.grad, want.grad)


def episodes(buffer: ReplayBuffer, lengths: list[int], success: bool, value: float) -> None:
    """Episodes whose every action is the same number, another one in each: value, value + 0.01, ..."""
    rng = np.random.default_rng(7)
    for i, n in enumerate(lengths):
        obs, actions = rng.normal(size=(n + 1, 5)), np.full((n, 2), value + 0.01 * i)
        buffer.add_episode(obs.astype(np.float32), actions.astype(np.float32), -np.ones(n), success, success)


@pytest.mark.parametrize("clone_data", ["all", "success", "frozen"])
def test_update_imitates_whole_chunks_of_the_wanted_episodes(clone_data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that an episode's end cuts has the authors' weight 0: here none is drawn, of short and of long ones."""
    agent, args = small_agent(gates=False, clone_data=clone_data, critic_warmup=0, critic_successes=1, success_min=20)
    buffer, seen, real = ReplayBuffer(1_000, 5, 2, 4), [], qc.bc_loss

    def recorded(net: Any, obs: Any, action: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(action)
        return real(net, obs, action, *rest)

    monkeypatch.setattr(qc, "bc_loss", recorded)
    episodes(buffer, [9, 3, 6], False, -0.9)  # the one of 3 steps is cut before a chunk ends
    episodes(buffer, [10, 8], True, 0.5)  # 7 + 5 chunk starts
    before, rng = weights(agent.actor), np.random.default_rng(0)
    qc.update(agent, buffer, args, rng)
    assert len(seen) == (clone_data == "all")  # too few successes yet
    episodes(buffer, [12], True, 0.7)  # 9 more
    for _ in range(20):
        qc.update(agent, buffer, args, rng)
    assert torch.equal(weights(agent.actor), before) == (clone_data == "frozen")
    assert len(seen) == {"all": 21, "success": 20, "frozen": 0}[clone_data]
    if seen:
        actions = torch.cat(seen[1:])  # (n, D)
        assert (actions == actions[:, :1]).all()  # of one episode each
        values = {round(x, 2) for x in actions[:, 0].tolist()}
        assert values == {0.5, 0.51, 0.7} | ({-0.9, -0.88} if clone_data == "all" else set())


@pytest.mark.parametrize("policy", POLICIES)
def test_update_waits_for_its_gates(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choice after the warm-up and a quarter of the successes, imitation and the one-step policy after all of them."""
    agent, args = small_agent(policy, gates=False, critic_warmup=2, critic_successes=4)
    own, real = [], qc.update_critic
    monkeypatch.setattr(qc, "update_critic", lambda *a: own.append(a[4]) or real(*a))
    buffer, rng = ReplayBuffer(2_000, 5, 2, 4), np.random.default_rng(0)
    episodes(buffer, [10, 10], False, 0.0)
    nets = (agent.actor, agent.one_step) if agent.one_step else (agent.actor,)
    start = [weights(net) for net in nets]
    moving = []
    for successes in (0, 0, 0, 1, 0, 3, 0):
        episodes(buffer, [10] * successes, True, 0.5)
        qc.update(agent, buffer, args, rng)
        moving.append([not torch.equal(weights(net), old) for net, old in zip(nets, start, strict=True)])
    assert own == [False] * 4 + [True] * 3
    assert moving == [[False] * len(nets)] * 5 + [[True] * len(nets)] * 2


def test_update_with_success_as_its_data_raises_the_flow_s_share_of_it() -> None:
    """Two ways of acting in the buffer, one of them successful: the flow ends up imitating that one."""
    open_at_once = dict(gates=False, critic_warmup=0, critic_successes=1, success_min=20)
    agent, args = small_agent(**open_at_once, clone_data="success", bc_lr=3e-3)
    buffer, rng = ReplayBuffer(1_000, 5, 2, 4), np.random.default_rng(0)
    episodes(buffer, [10] * 8, False, -0.6)
    episodes(buffer, [10] * 8, True, 0.5)
    for _ in range(200):
        qc.update(agent, buffer, args, rng)
    drawn = qc.act_ode(agent, args, torch.randn(100, 5), Rng(1, torch.device("cpu")))
    assert drawn.mean().item() == pytest.approx(0.53, abs=0.1)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [slow("best-of-n"), "one-step"])
def test_qc_trains_resumes_and_evaluates(policy: str, tmp_path: Path) -> None:
    flags = [*TINY, *OPEN, "--policy", policy, "--distill-steps", "50"]
    for command in (
        [*flags, "--total-steps", "400", *folders(tmp_path, "a")],
        ["--resume", str(tmp_path / "a"), "--total-steps", "600"],
    ):
        run_script([qc.__file__, *command], check=0)
    done = run_script([qc.__file__, "--eval", str(tmp_path / "a"), "--best-of-n", "3"], check=0)
    assert "acting policy: success" in done.stdout and "ODE policy: success" in done.stdout
    rows = read_metrics(tmp_path / "a")
    assert rows[-1]["step"] == 600 and any("final/act_success" in row for row in rows)
    assert {"ogpo/bc_loss", "ogpo/actor_grad"} <= {k for row in rows for k in row}
    assert (policy == "one-step") == any("ogpo/distill_loss" in row for row in rows)
    refused = run_script([qc.__file__, "--resume", str(tmp_path / "a"), "--policy", "two-step"])
    assert refused.returncode == 2


@pytest.mark.parametrize("policy", [slow("best-of-n"), slow("one-step")])
def test_first_episodes_are_those_of_ogpo(policy: str, tmp_path: Path) -> None:
    flags = [*TINY, "--start-training", "200", "--critic-successes", "1000", "--total-steps", "400"]
    run_script([og.__file__, *flags, "--states", "8", *folders(tmp_path, "og")], check=0)
    more = ["--policy", policy, "--distill-steps", "20"]
    run_script([qc.__file__, *flags, *more, *folders(tmp_path, "qc")], check=0)
    theirs, ours = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("og", "qc"))
    assert theirs["buffer"]["row"] > 300 and theirs["agent"]["updates"] > 0
    assert same(theirs["buffer"], ours["buffer"]) and same(theirs["episodes"], ours["episodes"])
    assert same(theirs["agent"]["critic"], ours["agent"]["critic"])


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_resumed_run_ends_as_one_that_was_not_stopped(policy: str, tmp_path: Path) -> None:
    flags = [*TINY, *OPEN, "--policy", policy, "--distill-steps", "50", "--eval-every", "200", "--log-every", "100"]
    run_script([qc.__file__, *flags, "--total-steps", "600", *folders(tmp_path, "whole")], check=0)
    run_script([qc.__file__, *flags, "--total-steps", "430", *folders(tmp_path, "broken")], check=0)
    run_script([qc.__file__, "--resume", str(tmp_path / "broken"), "--total-steps", "600"], check=0)
    whole, broken = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken"))
    assert all(same(whole[part], broken[part]) for part in ("agent", "buffer", "episodes", "rng", "step"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--policy", "one-step", "--chunk", "1"], ["--clone-data", "frozen"]])
def test_a_start_with_cal_ql_opens_the_gates(flags: list[str], tmp_path: Path) -> None:
    """Also for FQL, whose chunks are single steps, and where the flow stays the clone."""
    more = [*flags, "--calql-steps", "10", "--distill-steps", "20", "--start-training", "150", "--total-steps", "300"]
    run_script([qc.__file__, *TINY, *more, *folders(tmp_path, "a")], check=0)
    agent, clone = (checkpoint.load(tmp_path / "a" / name) for name in ("checkpoint.pt", "cloned.pt"))
    agent = agent["agent"]
    assert agent["best_of_n_on"] and agent["policy_gradient_on"] and agent["updates"] > 0
    assert same(dict(agent["actor"]), dict(clone)) == ("frozen" in flags)


@pytest.mark.parametrize(("policy", "seed"), [slow("best-of-n", 1), slow("one-step", 1)])
def test_qc_learns_the_toy_task(policy: str, seed: int, tmp_path: Path) -> None:
    flags = ["--env", "toy", "--policy", policy, "--seed", str(seed), "--no-video", "--threads", "1"]
    run_script([qc.__file__, *flags, *folders(tmp_path, "a")], check=0)
    rows = read_metrics(tmp_path / "a")
    cloned = next(row["eval/ode_success"] for row in rows if "eval/ode_success" in row)
    assert cloned < 0.6 and rows[-1]["final/act_success"] > 0.9
