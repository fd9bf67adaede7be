"""common/runlog.py: what a run leaves behind, and what it shows while it runs."""

import io
import json
import math
import sys
import types

import imageio.v2 as imageio
import numpy as np
import pytest

from common import runlog
from common.errors import UserError
from common.runlog import RunLog, plot_curves, read_metrics


class Clock:
    """Replaces time.monotonic."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(runlog.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_run_log_each_call_is_one_json_line_at_once(tmp_path):
    log = RunLog(tmp_path / "run", total_steps=10, args={})
    log.log(0, {"a": 1, "time/wall": 0.5})
    log.log(5, {"a": np.float32(0.25), "bad": float("nan"), "worse": -math.inf})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # before close: already there

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 0, "a": 1.0, "time/wall": 0.5},
        {"step": 5, "a": 0.25, "bad": None, "worse": None},
    ]
    log.close()
    log.close()


def test_run_log_killed_and_resumed_equals_uninterrupted(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    log = RunLog(whole, total_steps=10, args={"seed": 1})
    for step in range(10):
        log.log(step, {"x": step / 3})
    log.close()

    log = RunLog(cut, total_steps=10, args={"seed": 1})
    for step in range(7):
        log.log(step, {"x": step / 3})
        if step == 4:
            position = log.position()
    with open(cut / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "x"')  # the kill fell into a write
    with pytest.raises(UserError, match="another process still writes"):
        RunLog(cut, total_steps=10, resume_bytes=position, args={"seed": 1})
    log.close()  # lets go of the lock, as the end of the process would
    log = RunLog(cut, total_steps=10, resume_bytes=position, args={"seed": 1})
    for step in range(5, 10):
        log.log(step, {"x": step / 3})
    log.close()
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_run_log_resume_with_lost_lines_goes_on_with_a_note(tmp_path, capsys):
    log = RunLog(tmp_path, total_steps=10, args={})
    log.log(0, {"x": 1.0})
    log.log(1, {"x": 2.0})
    position = log.position()
    log.close()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-3])
    log = RunLog(tmp_path, total_steps=10, resume_bytes=position, args={})
    log.log(2, {"x": 3.0})
    log.close()
    assert capsys.readouterr().out.startswith("note: metrics.jsonl is shorter")
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 2]


def test_progress_plain_every_15_seconds_with_measured_eta(tmp_path, capsys, monkeypatch):
    clock = Clock(monkeypatch)
    log = RunLog(tmp_path, total_steps=1000, args={})
    for second in range(31):  # 10 steps/s
        clock.now = 100.0 + second
        log.progress(second * 10, {"success": "0.50"})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 0/1000 (0 %)  0 steps/s  ETA ?  success 0.50",
        "step 150/1000 (15 %)  10 steps/s  ETA 0:01:25  success 0.50",
        "step 300/1000 (30 %)  10 steps/s  ETA 0:01:10  success 0.50",
    ]


def test_progress_fits_80_columns_and_leaves_out_the_last_fields(tmp_path, capsys, monkeypatch):
    clock = Clock(monkeypatch)
    fields = {"loss": "3.123", "tokens/s": "1,234,567", "MFU": "55%", "memory": "123.4 GiB"}
    for total, last in ((7_000, "tokens/s 1,234,567"), (1_000_000, "loss 3.123")):
        log = RunLog(tmp_path / str(total), total_steps=total, args={})
        for step in (0, total // 20):
            log.progress(step, fields)
            clock.now += 100.0
        line = capsys.readouterr().out.splitlines()[-1]
        assert len(line) <= 80 and line.endswith(f"  {last}")


def test_progress_eta_follows_a_change_of_speed_and_ignores_steps_before_a_resume(tmp_path, capsys, monkeypatch):
    clock = Clock(monkeypatch)
    log = RunLog(tmp_path, total_steps=10_000, resume_bytes=0, args={})
    step = 5000
    for second in range(0, 301, 15):
        clock.now = 100.0 + second
        log.progress(step, {})
        step += 15 * (100 if second < 150 else 1)
    lines = capsys.readouterr().out.splitlines()
    assert "  100 steps/s  " in lines[1]
    assert "  1 steps/s  " in lines[-1]


def test_progress_live_is_one_line_at_most_5_hz(tmp_path, monkeypatch):
    clock, terminal = Clock(monkeypatch), Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    log = RunLog(tmp_path, total_steps=100, args={})
    for tick in range(100):
        clock.now = 100.0 + tick / 100
        log.progress(tick, {"a": "long " * 20})
    shown = terminal.getvalue()
    assert "\n" not in shown and 4 <= shown.count("\r") <= 6
    assert all(len(part.removeprefix("\x1b[K")) < 40 for part in shown.split("\r"))
    log.say("hello")
    log.close()
    assert "\r\x1b[Khello\n" in terminal.getvalue() and terminal.getvalue().endswith("\n")


def test_run_log_missing_packages_are_user_errors_and_leave_no_folder(tmp_path, monkeypatch):
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        RunLog(tmp_path / "run", total_steps=1, tensorboard=True, args={})
    with pytest.raises(UserError, match="pip install wandb"):
        RunLog(tmp_path / "run", total_steps=1, wandb_project="p", args={})
    assert not (tmp_path / "run").exists()


def test_run_log_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, total_steps=10, tensorboard=True, args={})
    log.log(3, {"x": 0.5})
    log.log(4, {"x": 0.75})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("x")] == [(3, 0.5), (4, 0.75)]


def test_run_log_tensorboard_of_a_resumed_run_has_every_step_once(tmp_path):
    pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, total_steps=10, tensorboard=True, args={})
    log.log(3, {"x": 0.5})
    position = log.position()
    log.log(4, {"x": 0.625})  # after the checkpoint: made again
    log.close()
    log = RunLog(tmp_path, total_steps=10, tensorboard=True, resume_bytes=position, args={})
    for step, value in ((4, 0.75), (5, 1.0)):
        log.log(step, {"x": value})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("x")] == [(3, 0.5), (4, 0.75), (5, 1.0)]


def test_run_log_wandb_offline_gets_arguments_and_final_numbers_under_one_id(tmp_path, monkeypatch):
    """The real package, which writes to files what it would send."""
    wandb = pytest.importorskip("wandb", reason="wandb is optional")
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home"))
    folder, ids = tmp_path / "run", []
    args = {"seed": 1, "actor_hidden": (16, 16), "env": "toy"}
    for resume, step in ((None, 3), (0, 5)):
        log = RunLog(folder, total_steps=10, wandb_project="p", resume_bytes=resume, args=args)
        log.log(step, {"eval/success": step / 8, "bad": math.nan})
        log.log(step + 1, {"final/success": step / 16})
        run = wandb.run
        ids.append(run.id)
        assert (run.project, run.name, dict(run.config)) == ("p", "run", args | {"actor_hidden": [16, 16]})
        assert run.summary["eval/success"] == step / 8 and run.summary["final/success"] == step / 16
        assert run.summary["step"] == step + 1
        log.close()
        assert wandb.run is None  # finished
    assert ids[0] == ids[1] == json.loads((folder / "wandb_id.json").read_text())
    written = sorted(folder.glob(f"wandb/offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert len(written) == 2 and all(b"final/success" in file.read_bytes() for file in written)


class FakeWandb(types.ModuleType):
    """A W&B whose service can be down from the start (`up` = 0) or fail after `up` calls."""

    def __init__(self, up: int):
        super().__init__("wandb")
        self.up, self.id, self.sent, self.inits, self.finished = up, "abc123", [], [], False

    def _call(self):
        self.up -= 1
        if self.up < 0:
            raise ConnectionError("network down\nlong traceback")

    def init(self, **kwargs):
        self._call()
        self.inits.append(kwargs)
        return self

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, row):
        self._call()
        self.sent.append(row)

    def finish(self):
        self.finished = True


def test_run_log_wandb_gets_the_numbers_and_the_run_goes_on_when_resumed(tmp_path, monkeypatch):
    fake = FakeWandb(up=99)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(tmp_path, total_steps=10, wandb_project="p", args={"seed": 1})
    log.log(3, {"x": 0.5})
    position = log.position()
    log.close()
    RunLog(tmp_path, total_steps=10, wandb_project="p", resume_bytes=position, args={"seed": 1}).close()
    assert fake.sent == [{"step": 3, "x": 0.5}] and fake.finished
    assert [call["id"] for call in fake.inits] == [None, "abc123"]
    assert fake.inits[0]["config"] == {"seed": 1} and fake.inits[0]["project"] == "p"


@pytest.mark.parametrize("up", [0, 1, 2])
def test_run_log_wandb_failure_costs_one_note_and_no_number(tmp_path, monkeypatch, capsys, up):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(up))
    log = RunLog(tmp_path, total_steps=10, wandb_project="p", args={})
    for step in range(4):
        log.log(step, {"x": 1.0})
    log.close()
    out = capsys.readouterr().out
    assert out.count("note: W&B is off") == 1 and out.count("\n") == 1
    assert len(read_metrics(tmp_path)) == 4


def test_aligned_wraps_below_the_text_and_leaves_out_empty_ones():
    said = runlog.aligned({"run": "a/" + "long" * 30, "none": "", "budget": "word " * 20})
    assert [line[:8] for line in said.split("\n")] == ["run:    ", "budget: ", "        "]
    assert all(len(line) <= 80 for line in said.split("\n")[1:]) and "a/" + "long" * 30 in said


def test_counted_has_the_right_number():
    assert [runlog.counted(n, "step") for n in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]


def test_plot_curves_draws_what_was_logged(tmp_path):
    def draw(name, rates):
        log = RunLog(tmp_path / name, total_steps=100, args={})
        for i, rate in enumerate(rates):
            log.log(i * 10, {"train/success": rate / 2, "train/length": 50 - i})
            log.log(i * 10, {"eval/ode_success": rate, "eval/ode_length": 40 - i, "eval/bon_success": rate})
        log.close()
        with open(tmp_path / name / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 99')  # a kill in mid-line must not cost the picture
        path = plot_curves(tmp_path / name)
        assert path == tmp_path / name / "learning_curve.png"
        return imageio.imread(path)

    low, high = draw("a", [0.1, 0.2, float("nan"), 0.3]), draw("b", [0.1, 0.5, 0.8, 1.0])
    with open(tmp_path / "a" / "metrics.jsonl", "w") as file:
        for row in (read_metrics(tmp_path / "b"), [{"step": 30, "final/ode_success": 0.4, "final/bon_success": 0.9}]):
            file.writelines(json.dumps(line) + "\n" for line in row)
    assert (imageio.imread(plot_curves(tmp_path / "a"))[60:] != high[60:]).any()  # the final evaluation is in it
    assert low.shape == high.shape and low.shape[0] >= 600
    half = low.shape[0] // 2
    assert (low[60:half] != high[60:half]).any()  # below the title, the success panel differs


def test_plot_curves_without_metrics_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        plot_curves(tmp_path)
