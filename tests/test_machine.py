"""Recorded updates: equal to eager ones, bookkeeping with a graph that a CPU plays, optimizers between machines."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import ogpo_state as og
from common import checkpoint
from common.machine import Recorded, adam, set_rate
from common.replay import Batch
from tests.helpers import perturbed, small_agent


@pytest.mark.parametrize("cloning", [True, False])
@pytest.mark.parametrize("advantage", ["conservative", "vanilla"])
def test_update_actor_of_fixed_shapes_is_the_eager_one(advantage: str, cloning: bool) -> None:
    """--compile keeps the chains without advantage: same networks, same numbers to log."""
    steps = []
    for recorded in (False, True):
        agent, args = small_agent(og, advantage=advantage, compile=recorded)
        perturbed(agent.actor, 0.1)
        g = torch.Generator().manual_seed(3)
        obs, actions = torch.randn(8, 5, generator=g), torch.rand(8, 4, 2, generator=g)
        batch = Batch(obs, actions, torch.zeros(8, 4), torch.full((8,), 4.0), obs, torch.zeros(8), np.arange(8))
        infos = [og.update_actor(agent, obs, batch if cloning else None, args) for _ in range(3)]
        steps.append((torch.nn.utils.parameters_to_vector(agent.actor.parameters()), infos))
    (eager, told), (fixed, said) = steps
    torch.testing.assert_close(fixed, eager, rtol=1e-4, atol=1e-6)
    share = told[-1]["nonzero"].item()
    assert 0 < share < 1 if advantage == "conservative" else share == 1
    for one, other in zip(told, said, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-5, msg=name)


class Played:
    """Stands for torch.cuda.CUDAGraph: what was recorded runs again, on the arguments it was recorded with."""

    recording = False

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generator = generator

    def replay(self) -> None:
        self.work(None, *self.args)


def test_recorded_copies_arguments_replays_and_keeps_kinds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    state, calls = torch.zeros(()), []

    def work(scale: object, x: torch.Tensor, batch: Batch | None) -> dict[str, torch.Tensor]:
        calls.append((x, batch))
        if not Played.recording:  # a kernel that is recorded does not run
            state.add_(x.sum())
        return {"state": state}

    @contextmanager
    def graph(played: Played) -> Iterator[None]:
        Played.recording = True
        yield
        Played.recording = False
        played.work, played.args = work, calls[-1]

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Played)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    fn, scale, total, earlier = Recorded(work, torch.Generator()), object(), 0.0, []
    for i in range(1, 8):
        for whole in (False, True):
            x, obs = torch.full((2,), float(i)), torch.full((3,), 10.0 * i)
            batch = Batch(obs, *[torch.zeros(1)] * 5, np.zeros(1)) if whole else None
            said = fn(scale, x, batch)
            total += 2.0 * i
            assert state == said["state"] == total  # the call that is recorded counts once, too
            if i > Recorded.WARMUP:
                mine, other = calls[-1]
                assert mine is not x and torch.equal(mine, x)  # arguments of its own, with the new numbers
                assert not whole or (other.obs is not obs and torch.equal(other.obs, obs))
                earlier.append((said["state"], total))
    assert len(fn.graphs) == 2
    assert all(value == then for value, then in earlier)  # results are not overwritten by a replay


def test_set_rate_and_unpack_of_an_optimizer_from_another_machine() -> None:
    """A GPU's optimizer can be recorded and has its rate in a tensor; here it goes on as one of a CPU, and back."""
    cpu = torch.device("cpu")
    net = torch.nn.Linear(2, 1)
    theirs = adam(net.parameters(), 1e-2, cpu)
    for _ in range(3):
        theirs.zero_grad()
        net(torch.ones(4, 2)).sum().backward()
        theirs.step()
    state = copy.deepcopy(checkpoint.pack(theirs))
    state["param_groups"][0] |= {"lr": torch.tensor(1e-2), "capturable": True}
    mine = adam(net.parameters(), 3e-4, cpu)
    checkpoint.unpack(mine, state)
    assert mine.param_groups[0]["capturable"] is False and mine.param_groups[0]["lr"] == pytest.approx(1e-2)
    before = [p.clone() for p in net.parameters()]
    mine.zero_grad()
    net(torch.ones(4, 2)).sum().backward()
    mine.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))

    set_rate(mine, 0.5)
    assert mine.param_groups[0]["lr"] == 0.5
    kept = torch.tensor(0.1)
    mine.param_groups[0]["lr"] = kept
    set_rate(mine, 0.5)
    assert mine.param_groups[0]["lr"] is kept and kept == 0.5
    checkpoint.unpack(mine, checkpoint.pack(theirs))  # of a CPU, to where the rate is a tensor
    assert mine.param_groups[0]["lr"] is kept and kept.item() == pytest.approx(1e-2)
