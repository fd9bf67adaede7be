"""common/checkpoint.py: whatever happens while saving, the next run finds a sound checkpoint."""

import copy
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from common import checkpoint
from common.errors import UserError
from common.rng import Rng


def make_state(n: int, size: int = 200_000) -> dict:
    return {"n": n, "data": torch.full((size,), n), "nested": [{"n": n}]}


def assert_sound(state: dict) -> None:
    assert (state["data"] == state["n"]).all()
    assert state["nested"] == [{"n": state["n"]}]


def damage(path, offset: float = 0.5) -> None:
    """Flip one byte at the given relative position."""
    with open(path, "r+b") as file:
        file.seek(int(os.path.getsize(path) * offset))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def save_forever(path, start: int, reports) -> None:
    for n in range(start, start + 10_000):
        checkpoint.save(path, make_state(n))
        reports.send(n)


def test_save_sigkill_at_random_moments_never_costs_a_completed_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    context = multiprocessing.get_context("fork")  # torch is imported already: a child starts in milliseconds
    rng = random.Random(0)
    start = 0
    for _ in range(20):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=save_forever, args=(path, start, sender))
        child.start()
        sender.close()
        assert receiver.poll(30)
        completed = receiver.recv()
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        while receiver.poll():  # what was reported before the kill; then the pipe is at its end
            try:
                completed = receiver.recv()
            except EOFError:
                break
        state = checkpoint.load(path)
        assert_sound(state)
        assert state["n"] in (completed, completed + 1)
        start = state["n"] + 1


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


@pytest.mark.parametrize("newest_is_torn", [False, True])
@pytest.mark.parametrize("survived", range(5))
def test_save_kill_at_every_step(tmp_path, monkeypatch, survived, newest_is_torn):
    """Die before each of the calls of the third save in turn: fsync, rename, rename, fsync of the folder."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, make_state(1))
    checkpoint.save(path, make_state(2))
    if newest_is_torn:
        os.truncate(path, 1000)
    calls = 0

    def dying(real):
        def call(*args):
            nonlocal calls
            if calls == survived:
                raise Killed
            calls += 1
            return real(*args)

        return call

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    if survived < 4:
        with pytest.raises(Killed):
            checkpoint.save(path, make_state(3))
    else:
        checkpoint.save(path, make_state(3))
        assert calls == 4
    state = checkpoint.load(path)
    assert_sound(state)
    older = 1 if newest_is_torn else 2
    assert state["n"] == (3 if survived >= 2 and (newest_is_torn or survived >= 3) else older)


def test_save_keeps_the_last_two_and_nothing_else(tmp_path):
    for n in range(4):
        checkpoint.save(tmp_path / "checkpoint.pt", make_state(n, 10))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]
    assert checkpoint.load(tmp_path / "checkpoint.pt")["n"] == 3
    assert checkpoint.load(tmp_path / "checkpoint.prev.pt")["n"] == 2


@pytest.mark.parametrize("harm", [lambda p: os.truncate(p, 1000), lambda p: os.truncate(p, 0), damage, os.unlink])
def test_load_falls_back_from_a_damaged_newest_file_with_a_note(tmp_path, capsys, harm):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, make_state(1))
    checkpoint.save(path, make_state(2))
    harm(path)
    state = checkpoint.load(path)
    assert_sound(state)
    assert state["n"] == 1
    out = capsys.readouterr().out
    assert out.startswith("note: using checkpoint.prev.pt") and out.count("\n") == 1


def test_load_nothing_is_a_one_line_user_error(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(path)
    checkpoint.save(path, make_state(1))
    checkpoint.save(path, make_state(2))
    damage(path)
    damage(tmp_path / "checkpoint.prev.pt")
    with pytest.raises(UserError, match="no readable checkpoint") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_load_executes_no_code(tmp_path):
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"x": Payload()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not marker.exists()


@pytest.mark.parametrize("value", [np.zeros(2), np.float64(1), {1, 2}, object()])
def test_save_refuses_what_could_not_be_loaded(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]"):
        checkpoint.save(tmp_path / "checkpoint.pt", {"a": [0, value]})
    assert not list(tmp_path.iterdir())


def test_load_module_and_optimizer_state_round_trips_exactly(tmp_path):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "none": None, "ids": (1, 2.5, "x")}
    checkpoint.save(tmp_path / "c.pt", state)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert all(torch.equal(loaded["net"][k], v) for k, v in state["net"].items())
    moments, original = loaded["optimizer"]["state"][0], state["optimizer"]["state"][0]
    assert torch.equal(moments["exp_avg"], original["exp_avg"])
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert loaded["none"] is None and loaded["ids"] == (1, 2.5, "x")


def test_pack_random_streams_continue_where_they_were_saved(tmp_path):
    streams = {"numpy": np.random.default_rng(3), "torch": Rng(3, torch.device("cpu"))}
    streams["numpy"].random(5)
    streams["torch"].rand(5)
    streams["numpy"].integers(0, 9, dtype=np.uint32)  # leaves half a 64-bit word in the generator's state
    checkpoint.save(tmp_path / "c.pt", {name: checkpoint.pack(stream) for name, stream in streams.items()})

    def draw(streams):
        small = streams["numpy"].integers(0, 9, 3, dtype=np.uint32)
        torchs = (streams["torch"].randn(4), streams["torch"].rand(2, 2), streams["torch"].randint(0, 9, 3))
        return small, streams["numpy"].standard_normal(4), *torchs

    expected = draw(streams)
    loaded = checkpoint.load(tmp_path / "c.pt")
    fresh = {"numpy": np.random.default_rng(99), "torch": Rng(99, torch.device("cpu"))}
    fresh = {name: checkpoint.unpack(stream, loaded[name]) for name, stream in fresh.items()}
    for got, want in zip(draw(fresh), expected, strict=True):
        assert (np.asarray(got) == np.asarray(want)).all()


def test_unpack_restores_the_attributes_of_an_object():
    class Part:
        def __init__(self):
            self.net, self.count, self.best, self.mean = torch.nn.Linear(2, 3), 0, None, torch.zeros(())

    one, other = Part(), Part()
    one.count, one.mean = 7, torch.tensor(0.5)
    one.best = copy.deepcopy(torch.nn.ParameterDict({"w": torch.ones(2)}).state_dict())  # has attributes of its own
    got = checkpoint.unpack(other, checkpoint.pack(one))
    assert got is other and other.count == 7 and torch.equal(other.best["w"], torch.ones(2))
    assert type(checkpoint.pack(one)["best"]) is dict
    assert torch.equal(one.net.weight, other.net.weight) and other.mean == 0.5


def test_save_that_fails_is_reported_and_harms_nothing(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, make_state(1))
    checkpoint.save(path, make_state(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses the rest, as on a full disk
    try:
        with pytest.raises(UserError, match="earlier checkpoints are intact") as error:
            checkpoint.save(path, make_state(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert checkpoint.load(path)["n"] == 2
    assert checkpoint.load(tmp_path / "checkpoint.prev.pt")["n"] == 1
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_first_asks_second_aborts(signum, capfd):
    before = signal.getsignal(signum)
    with checkpoint.StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signum)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert signal.getsignal(signum) is before
    assert capfd.readouterr().out.strip().count("\n") == 0


def test_stop_signal_handlers_return_after_an_exception():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), checkpoint.StopSignal():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_check_run_dir(tmp_path, monkeypatch):
    checkpoint.check_run_dir(tmp_path / "a" / "b", 1000)
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run folder"):
        checkpoint.check_run_dir(tmp_path / "file" / "run", 1000)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    checkpoint.check_run_dir(tmp_path, 2**20)
    with pytest.raises(UserError, match="1 MiB free, the checkpoints of this run need 3 MiB"):
        checkpoint.check_run_dir(tmp_path, 3 * 2**20)
