"""The language-model scripts as a user runs them: learning, exact resume, several processes, bad input."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import flm_train
import fmlm_distill
from common import checkpoint
from common.errors import RunError, UserError
from common.runlog import read_metrics
from common.text.corpora import austen_sentences
from common.text_run import TextRun
from tests.helpers import slow
from tests.warm import run_script
from variants import flm_ablations, fmlm_recipes, fmlm_two_stage

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("--data", "toy", "--threads", "1", "--layers", "1", "--width", "32", "--batch", "32", "--samples", "32"),
    *("--steps", "1", "2", "--log-every", "1", "--eval-every", "20", "--checkpoint-every", "10"),
]


def run(folder: Path, script: str, *flags: str, check: int = 0, processes: int = 0) -> subprocess.CompletedProcess[str]:
    argv = [str(ROOT / script), "--run-dir", str(folder), "--data-dir", str(folder), *flags]
    if not processes:
        return run_script(argv, check=check)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*launcher, *argv], capture_output=True, text=True, timeout=3600, cwd=ROOT)
    assert done.returncode == check, done.stdout + done.stderr
    return done


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]


def test_train_in_several_processes_gives_the_losses_of_one(tmp_path: Path) -> None:
    """Same global batch, times and noise: losses agree to 1e-5 over 20 steps, in both scripts."""
    for script in ("flm_train.py", "fmlm_distill.py"):
        for name, processes in (("one", 0), ("two", 2)):
            run(tmp_path / script, script, *SMALL, "--total-steps", "20", "--run-name", name, processes=processes)
        one, two = (losses(tmp_path / script / name) for name in ("one", "two"))
        assert len(one) == 20 and one == pytest.approx(two, abs=1e-5)


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)]


@pytest.mark.parametrize("module", [flm_train, fmlm_distill])
def test_train_stopped_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    flags = [*SMALL, *places, "--total-steps", "60", "--dropout", "0.1", "--run-name"]
    module.main([*flags, "whole"])
    log_training = TextRun.log_training

    def log_and_stop(run: TextRun, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        log_training(run, metrics, speed)
        if run.step == 27:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TextRun, "log_training", log_and_stop)
        module.main([*flags, "cut"])
    assert "--resume" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "cut" / "checkpoint.pt")["step"] == 27
    module.main(["--resume", str(tmp_path / "cut")])
    whole, cut = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    for part in ("net" if module is flm_train else "objective", "ema"):
        assert all(torch.equal(whole[part][k], cut[part][k]) for k in whole[part])
    assert len(timeless(tmp_path / "whole")) > 60 and timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


@pytest.mark.parametrize("module", [flm_train, slow(fmlm_distill)])
@pytest.mark.parametrize(("method", "step", "saved"), [slow("log_training", 25, 20), ("log_samples", 20, 10)])
def test_train_resumed_from_a_periodic_checkpoint_ends_with_the_same_bits(
    tmp_path: Path, module: ModuleType, method: str, step: int, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power cut, between evaluations or in one: the lines after the checkpoint are made again."""
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    flags = [*SMALL, *places, "--total-steps", "40", "--run-name"]
    module.main([*flags, "whole"])
    original = getattr(TextRun, method)

    def die(run: TextRun, *values: object) -> None:
        if run.step == step:
            raise InterruptedError
        original(run, *values)

    with monkeypatch.context() as patch:
        patch.setattr(TextRun, method, die)
        with pytest.raises(InterruptedError):
            module.main([*flags, "cut"])
    assert checkpoint.load(tmp_path / "cut" / "checkpoint.pt")["step"] == saved
    module.main(["--resume", str(tmp_path / "cut")])
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


DRIVER = """
# flm_train.py with a first process that is slow to come, a group that waits a second, and a signal to one process.
import datetime, functools, os, signal, sys, time
import torch.distributed as dist

sys.path.append(os.getcwd())
import flm_train
from common import cli

rank, rate, load = os.environ["RANK"], flm_train.learning_rate, flm_train.load_judge
dist.init_process_group = functools.partial(dist.init_process_group, timeout=datetime.timedelta(seconds=1))

def slow(*values):
    time.sleep(3)  # in the first process: the others need no judge
    return load(*values)

def stopping(step, a):
    if step == 10 and rank == "1" and sys.argv[-1] == "cut":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun repeats what a whole group was sent
    return rate(step, a)

flm_train.load_judge, flm_train.learning_rate = slow, stopping
cli.run(lambda: flm_train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_train_in_several_processes_waits_and_stops_and_goes_on_as_one(tmp_path: Path) -> None:
    """Between two lines of the log, by a signal to one process; the resumed lines are those of the whole run."""
    (tmp_path / "driver.py").write_text(DRIVER)
    go = functools.partial(run, tmp_path, str(tmp_path / "driver.py"), processes=2)
    flags = [*SMALL, "--log-every", "7", "--total-steps", "20", "--run-name"]
    assert "| 1 steps |" in go(*flags, "whole").stdout
    out = go(*flags, "cut").stdout
    assert out.count("--resume") == 1 and "| 1 steps |" not in out
    assert checkpoint.load(tmp_path / "cut" / "checkpoint.pt")["step"] == 11
    assert "| 1 steps |" in go("--resume", str(tmp_path / "cut")).stdout
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut") and len(timeless(tmp_path / "cut")) == 5


@pytest.mark.parametrize("launcher", ["tools/torchrun.py", slow("torch.distributed.run")])
def test_torchrun_that_is_told_to_stop_leaves_a_saved_run(tmp_path: Path, launcher: str) -> None:
    """A signal to its whole group: ours ends well, PyTorch's own can only end with its traceback."""
    start = [
        sys.executable,
        *(["-m"] if "/" not in launcher else []),
        launcher,
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    flags = ["flm_train.py", *SMALL, "--total-steps", "1000000", "--run-name", "r", "--run-dir", str(tmp_path)]
    with subprocess.Popen(
        [*start, *flags], cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and not losses(tmp_path / "r"):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate()
    assert out.count("saved; go on with") == 1, out + err
    assert checkpoint.load(tmp_path / "r" / "checkpoint.pt")["step"] == len(losses(tmp_path / "r"))
    if launcher == "tools/torchrun.py":
        assert process.returncode == 0 and "Traceback" not in err


@pytest.mark.parametrize("module", [flm_train, slow(fmlm_distill)])
def test_train_stopped_in_its_last_step_does_not_evaluate(
    tmp_path: Path, module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", "r"]
    monkeypatch.setattr(TextRun, "log_training", lambda *values: os.kill(os.getpid(), signal.SIGTERM))
    module.main([*SMALL, *places, "--log-every", "5", "--total-steps", "5"])
    out = capsys.readouterr().out
    assert f"--resume {tmp_path / 'r'}" in out and "| real text |" not in out
    module.main(["--resume", str(tmp_path / "r")])
    assert "| real text |" in capsys.readouterr().out


@pytest.mark.parametrize("module", [flm_train, fmlm_distill])
def test_evaluate_ends_at_once_by_a_signal(tmp_path: Path, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the training and alone: there is nothing to save."""
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", "r"]
    evaluations = []

    def interrupted(run: TextRun, *values: object) -> None:
        evaluations.append(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TextRun, "evaluate", interrupted)
    for flags in ([*SMALL, *places, "--total-steps", "5"], ["--eval", str(tmp_path / "r")]):
        with pytest.raises(KeyboardInterrupt):
            module.main(flags)
    assert evaluations == [signal.SIG_DFL] * 2
    assert checkpoint.load(tmp_path / "r" / "checkpoint.pt")["step"] == 5


@pytest.mark.parametrize("module", [flm_train, flm_ablations, fmlm_distill, fmlm_recipes])
def test_train_that_diverges_in_embedding_space_ends_with_a_dump(
    tmp_path: Path, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the third step E^T E has no Cholesky factor; the next line of the log is that of the fifth."""
    monkeypatch.setattr(module, "learning_rate", lambda step, a: float("inf") if step == 2 else 1e-3)
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", "r", "--log-every", "5"]
    with pytest.raises(RunError, match=r"stopped at step 5: .*loss.* not finite"):
        module.main([*SMALL, *places, "--space", "embedding", "--width", "8", "--heads", "1", "--total-steps", "20"])
    assert torch.load(tmp_path / "r" / "nonfinite.pt", weights_only=True)["step"] == 5


def test_main_on_own_text_needs_the_encoding_of_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, lines = tmp_path / "mine.txt", austen_sentences()[0]
    text.write_text("\n".join(lines[:400]))
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path / "data"), "--threads", "1"]
    size = ["--layers", "1", "--width", "32", "--length", "16", "--samples", "64", "--steps", "1"]
    short = ["--batch", "8", "--total-steps", "5", "--eval-every", "5"]
    with pytest.raises(UserError, match=r"--batch 4096: .*mine.txt has only \d+ rows to train on; give a smaller"):
        flm_train.main(["--data", str(text), *places, *size, "--batch", "4096"])
    flm_train.main(["--data", str(text), *places, *size, *short, "--run-name", "flow"])
    out = capsys.readouterr().out
    assert "encoding: 512 tokens trained on this text" in out and "   1 call: perplexity" in out
    saved = checkpoint.load(tmp_path / "flow" / "checkpoint.pt")["net"]
    assert f"network: {sum(x.numel() for x in saved.values()):,} parameters, vocabulary 512\n" in out
    assert "budget:  5 steps; 8 rows each; 1 evaluation, then one of 64 samples\n" in out
    assert f"table, numbers, figure: {tmp_path / 'flow' / 'evaluation_ngram'}.md, .json, .png\n" in out
    (real,) = (int(line.split()[-2]) for line in out.splitlines() if line.startswith("| real text |"))
    assert real < 64 and f"note: real text has only {real} rows: --samples {real} compares equal numbers" in out
    distil = ["--teacher", str(tmp_path / "flow"), *places, *short, "--steps", "1", "--run-name"]
    fmlm_distill.main([*distil, "map"])  # finds the teacher's encoding
    again = [(flm_train, ["--eval", str(tmp_path / "flow")]), (fmlm_distill, ["--eval", str(tmp_path / "map")])]
    for module, flags in again:
        module.main(flags)
    text.write_text("\n".join(lines[1000:1400]))
    again += [(flm_train, ["--resume", str(tmp_path / "flow")]), (fmlm_distill, [*distil, "other"])]
    for module, flags in again:
        with pytest.raises(UserError, match=r"was trained on another encoding of .*mine.txt .*restore the text"):
            module.main(flags)


def test_main_refuses_the_runs_of_another_script(tmp_path: Path) -> None:
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--total-steps", "1", "--run-name"]
    flm_train.main([*SMALL, *places, "flow"])
    flm_ablations.main([*SMALL, *places, "velocity", "--predict", "velocity"])
    fmlm_distill.main([*SMALL, *places, "map"])
    checkpoint.save(tmp_path / "checkpoint.pt", {"args": {"env": "toy"}, "step": 1})
    flow, velocity, flow_map = (str(tmp_path / name) for name in ("flow", "velocity", "map"))
    for module, flag, folder, words in (
        (
            flm_train,
            "--eval",
            velocity,
            "--predict velocity, --softmax True, unknown here; use the script that made it",
        ),
        (flm_train, "--resume", velocity, "--predict velocity"),
        (flm_train, "--eval", flow_map, "is a run of fmlm_distill.py, whose networks are others"),
        (flm_train, "--eval", str(tmp_path), "--env toy, unknown here"),
        (fmlm_distill, "--eval", flow, "is a run of flm_train.py, whose networks are others"),
        (fmlm_distill, "--teacher", velocity, "was trained with --predict velocity: give a run of flm_train.py"),
        (fmlm_distill, "--teacher", flow_map, "is a run of fmlm_distill.py, whose networks are others"),
        (fmlm_distill, "--teacher", str(tmp_path), "was trained without --data: give a run of flm_train.py"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            module.main([flag, folder])
        assert "\n" not in str(caught.value)


def test_stop_if_not_finite_ends_the_run_with_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = flm_train.flm_loss
    monkeypatch.setattr(flm_train, "flm_loss", lambda *values: loss(*values) * float("inf"))
    with pytest.raises(RunError, match=r"stopped at step 1: .*loss not finite"):
        flm_train.main([*SMALL, "--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", "r"])
    assert torch.load(tmp_path / "r" / "nonfinite.pt", weights_only=True)["step"] == 1
    with pytest.raises(UserError, match="is not finite"):
        checkpoint.load(tmp_path / "r" / "nonfinite.pt")
    assert not (tmp_path / "r" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_train_of_the_two_stages_moves_residual_then_student(tmp_path: Path) -> None:
    """Stage one moves the residual network, stage two the student alone."""
    run(tmp_path, "flm_train.py", *SMALL, "--total-steps", "10", "--run-name", "flow")
    teacher = ["--teacher", str(tmp_path / "flow"), "--run-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    small = ["--threads", "1", "--batch", "32", "--samples", "8", "--steps", "1", "--total-steps", "6"]
    weights = {}
    for name, share in (("first", "1"), ("both", "0.5")):
        fmlm_two_stage.main([*teacher, *small, "--run-name", name, "--stage-one", share])
        weights[name] = checkpoint.load(tmp_path / name / "checkpoint.pt")["objective"]
    student = "student.output.weight"
    assert weights["first"]["residual.output.weight"].abs().sum() > 0  # it starts at 0
    flow = checkpoint.load(tmp_path / "flow" / "checkpoint.pt")["ema"]["output.weight"]
    assert torch.equal(weights["first"][student], flow) and not torch.equal(weights["both"][student], flow)


@pytest.mark.slow
def test_train_of_the_two_stages_resumes(tmp_path: Path) -> None:
    """Ten steps hold both stages; of twenty, the second ten are stage two, which moves the student alone."""
    run(tmp_path, "flm_train.py", *SMALL, "--total-steps", "10", "--run-name", "flow")
    flags = ["--teacher", str(tmp_path / "flow"), "--threads", "1", "--batch", "32", "--log-every", "1"]
    flags += ["--samples", "32", "--steps", "1", "--checkpoint-every", "10", "--run-name", "map", "--total-steps"]
    run(tmp_path, "variants/fmlm_two_stage.py", *flags, "10")
    first = checkpoint.load(tmp_path / "map" / "checkpoint.pt")["objective"]
    out = run(tmp_path, "variants/fmlm_two_stage.py", "--resume", str(tmp_path / "map"), "--total-steps", "20").stdout
    assert "| 1 steps |" in out and len(losses(tmp_path / "map")) == 20
    last = checkpoint.load(tmp_path / "map" / "checkpoint.pt")["objective"]
    moved = {k.split(".")[0] for k in first if not torch.equal(first[k], last[k])}
    assert moved == {"student"} and first["residual.output.weight"].abs().sum() > 0  # it starts at 0


@pytest.mark.slow
def test_evaluate_repeats_the_numbers_of_the_run(tmp_path: Path) -> None:
    first = run(tmp_path, "flm_train.py", *SMALL, "--total-steps", "20", "--run-name", "r").stdout
    again = run(tmp_path, "flm_train.py", "--eval", str(tmp_path / "r")).stdout

    def table(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("|")]

    assert len(table(first)) == 5 and table(first) == table(again)  # head, rule, 1 and 2 steps, real text
    sampling = ["--temperature", "0.5", "--guidance", "2"]
    other = run(tmp_path, "variants/flm_sampling.py", "--eval", str(tmp_path / "r"), "--steps", "3", *sampling).stdout
    assert "| 3 steps |" in other and (tmp_path / "r" / "evaluation_ngram_bridge_t0.5_p0.9_g2.md").exists()
    for name in ("samples_1_steps.txt", "samples_real_text.txt", "evaluation_ngram.md", "evaluation_ngram.png"):
        assert (tmp_path / "r" / name).stat().st_size > 0
    scores = json.loads((tmp_path / "r" / "evaluation_ngram.json").read_text())  # the bridge has files of its own
    assert [score["text"] for score in scores] == ["1 steps", "2 steps", "real text"]
    assert f"| {scores[0]['perplexity']:.2f} | {scores[0]['entropy']:.3f} |" in table(first)[2]
    glances = [row for row in read_metrics(tmp_path / "r") if "eval/perplexity_1" in row]
    assert len(glances) == 1 and glances[0]["eval/entropy_32"] > 0


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("flm_train.py", ["--data", "no_such_file.txt"], "no_such_file.txt"),
        ("flm_train.py", ["--data", "toy", "--space", "embedding"], "--space embedding"),
        ("flm_train.py", ["--data", "toy", "--judge", "nobody"], "nobody"),
        ("flm_train.py", ["--eval", "nowhere"], "nowhere"),
        ("fmlm_distill.py", ["--teacher", "nowhere"], "nowhere"),
        ("variants/fmlm_two_stage.py", ["--data", "toy"], "--teacher"),
        ("fmlm_distill.py", ["--data", "toy", "--gamma", "2"], "--gamma"),
        ("fmlm_distill.py", ["--data", "toy", "--heads", "3"], "--heads"),
        ("fmlm_distill.py", ["--data", "toy", "--steps", "0"], "--steps"),
        ("variants/flm_ablations.py", ["--predict", "velocity"], "--predict velocity"),
    ],
)
def test_main_with_bad_input_gives_one_line_and_exit_code_2(
    tmp_path: Path, script: str, flags: list[str], words: str
) -> None:
    done = run(tmp_path, script, *flags, check=2)
    assert words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_train_learns_the_toy_language_and_distillation_keeps_it_in_one_step(tmp_path: Path) -> None:
    """Total variation distance from the true distribution over sentences; the undistilled flow fails in one step."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    flow = run(
        tmp_path, "flm_train.py", "--data", "toy", "--threads", "1", "--run-name", "flow", "--steps", "1", "32"
    ).stdout
    flow_map = run(
        tmp_path, "fmlm_distill.py", "--teacher", str(tmp_path / "flow"), "--threads", "1", "--steps", "1"
    ).stdout

    def distance(text: str, label: str) -> float:
        return float(re.search(rf"{label}: total variation .* (\d\.\d+)", text)[1])

    assert distance(flow, "32 steps") < 0.2 and distance(flow, "1 steps") > 0.5
    assert distance(flow_map, "1 steps") < 0.25
