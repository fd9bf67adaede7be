"""What a run has saved survives what ends it: divergence between two lines of the log, a full disk, another device."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

import flm_train
import ogpo_state
from common import checkpoint, cli
from common.errors import EnvError, RunError
from common.rng import Rng
from common.runlog import RunLog
from common.start import CHECKPOINT
from common.tracked_run import TrackedRun
from tests.helpers import slow

CPU = torch.device("cpu")

TOY = ["--env", "toy", "--no-video", "--bc-steps", "20", "--eval-episodes", "2", "--eval-interval-episodes", "2"]
TOY += ["--total-steps", "600", "--start-training", "60", "--critic-warmup", "0", "--critic-successes", "0"]
WORDS = ["--data", "toy", "--threads", "1", "--samples", "16", "--total-steps", "40", "--eval-every", "40"]


@pytest.mark.parametrize("script", [flm_train, ogpo_state])
def test_save_keeps_the_last_finite_checkpoint(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that stop being finite between two lines of the log are dumped, not saved."""
    flags = [*(TOY if script is ogpo_state else WORDS), "--run-dir", str(tmp_path), "--run-name", "r"]
    flags += ["--log-every", "1000", "--checkpoint-every", "40" if script is ogpo_state else "10"]
    if script is ogpo_state:
        loss, made = ogpo_state.critic_loss, []

        def diverging(*values: Any) -> Any:
            made.append(1)
            value, info = loss(*values)
            return value * (float("inf") if len(made) > 50 else 1), info

        monkeypatch.setattr(ogpo_state, "critic_loss", diverging)
    else:
        monkeypatch.setattr(flm_train, "learning_rate", lambda step, a: float("inf") if step == 25 else 1e-3)
    with pytest.raises(RunError, match=r"stopped at step \d+: .* not finite"):
        script.main(flags)
    kept = checkpoint.load(tmp_path / "r" / "checkpoint.pt")
    dumped = torch.load(tmp_path / "r" / "nonfinite.pt", weights_only=True)
    assert checkpoint.not_finite(kept) == [] and checkpoint.not_finite(dumped)
    assert 0 < kept["step"] < dumped["step"]


def test_save_of_a_resumed_run_keeps_what_is_not_restored_yet(tmp_path: Path) -> None:
    """A stop or a failed environment may come before everything is restored, or while it is."""

    class Broken(Rng):
        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            raise EnvError("while its episode was replayed")

    parts = dict(agent=Rng(1, CPU), episodes=Rng(2, CPU), buffer=Rng(3, CPU))
    with checkpoint.StopSignal() as stop, TrackedRun(tmp_path, None, stop, {}) as run:
        run.open_log(10, "", False)
        run.track(**parts)
        run.save()
    saved = checkpoint.load(tmp_path / CHECKPOINT)
    with checkpoint.StopSignal() as stop, TrackedRun(tmp_path, checkpoint.load(tmp_path / CHECKPOINT), stop, {}) as run:
        run.open_log(10, "", False)
        run.track(agent=Rng(4, CPU))
        with pytest.raises(EnvError):
            run.track(episodes=Broken(5, CPU))
        run.save()
    again = checkpoint.load(tmp_path / CHECKPOINT)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name]["generator"], saved[name]["generator"]) for name in parts)


def test_load_falls_back_from_a_checkpoint_that_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"w": torch.ones(2)})
    checkpoint.save(path, {"w": torch.tensor([1.0, torch.nan])})
    assert checkpoint.load(path)["w"].tolist() == [1.0, 1.0]
    assert "note: using checkpoint.prev.pt instead" in capsys.readouterr().out


@pytest.mark.parametrize("full", [slow("log"), slow("checkpoint")])
def test_run_on_a_full_disk_is_one_line_and_keeps_the_checkpoint(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, write = RunLog.log, torch.save

    def full_at(step: int) -> None:
        if step > 20:
            raise OSError(errno.ENOSPC, "No space left on device")

    def log_until(self: RunLog, step: int, scalars: dict[str, float]) -> None:
        full_at(step)
        log(self, step, scalars)

    def write_until(state: dict[str, Any], file: Any) -> None:
        full_at(state["step"])
        write(state, file)

    if full == "log":
        monkeypatch.setattr(RunLog, "log", log_until)
    else:
        monkeypatch.setattr(torch, "save", write_until)
    flags = [*WORDS, "--log-every", "5", "--checkpoint-every", "10", "--run-dir", str(tmp_path), "--run-name", "r"]
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: flm_train.main(flags))
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    assert "No space left on device" in said and "--resume" in said and said.strip().count("\n") == 0
    assert isinstance(end.value.code, str) or end.value.code == 1
    assert checkpoint.load(tmp_path / "r" / "checkpoint.pt")["step"] == 20
    monkeypatch.undo()
    flm_train.main(["--resume", str(tmp_path / "r")])


def test_rng_of_another_kind_of_device_starts_anew_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    rng, fresh = Rng(3, torch.device("cpu")), Rng(3, torch.device("cpu"))
    rng.load_state_dict({"generator": torch.zeros(16, dtype=torch.uint8)})  # as long as a GPU's
    assert torch.equal(rng.randn(4), fresh.randn(4))
    assert "noise starts anew" in capsys.readouterr().out
