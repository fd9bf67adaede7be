"""The language-model scripts as a user runs them: learning, exact resume, several processes, bad input."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import checkpoint
from common.runlog import read_metrics
from common.textplots import read_scores

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("--data", "toy", "--threads", "1", "--layers", "1", "--width", "32", "--batch", "32", "--samples", "32"),
    *("--steps", "1", "2", "--log-every", "1", "--eval-every", "20", "--checkpoint-every", "10"),
]


def run(folder: Path, script: str, *flags: str, check: int = 0, processes: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    places = ["--run-dir", str(folder), "--data-dir", str(folder)]
    done = subprocess.run(
        [*launcher, str(ROOT / script), *places, *flags], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]


def test_several_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    """Same global batch, times and noise: losses agree to 1e-5 over 20 steps, in both scripts."""
    for script in ("flm_train.py", "fmlm_distill.py"):
        for name, processes in (("one", 0), ("two", 2)):
            run(tmp_path / script, script, *SMALL, "--total-steps", "20", "--run-name", name, processes=processes)
        one, two = (losses(tmp_path / script / name) for name in ("one", "two"))
        assert len(one) == 20 and one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("script", ["flm_train.py", "fmlm_distill.py"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(tmp_path: Path, script: str) -> None:
    flags = [*SMALL, "--total-steps", "60", "--dropout", "0.1"]
    run(tmp_path, script, *flags, "--run-name", "whole")
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *places, *flags, "--run-name", "cut"], stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while len(losses(tmp_path / "cut")) < 7 and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "--resume" in out
    assert checkpoint.load(tmp_path / "cut" / "checkpoint.pt")["step"] < 60
    run(tmp_path, script, "--resume", str(tmp_path / "cut"))
    whole, cut = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    trained = "net" if script == "flm_train.py" else "objective"
    for part in (trained, "ema"):
        assert all(torch.equal(whole[part][k], cut[part][k]) for k in whole[part])
    strip = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(tmp_path / "whole")]
    assert strip == [
        {k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(tmp_path / "cut")
    ]


def test_the_first_version_trains_both_networks_and_resumes(tmp_path: Path) -> None:
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


def test_evaluation_repeats_the_numbers_of_the_run(tmp_path: Path) -> None:
    first = run(tmp_path, "flm_train.py", *SMALL, "--total-steps", "20", "--run-name", "r").stdout
    again = run(tmp_path, "flm_train.py", "--eval", str(tmp_path / "r")).stdout
    table = lambda text: [line for line in text.splitlines() if line.startswith("|")]  # noqa: E731
    assert len(table(first)) == 5 and table(first) == table(again)  # head, rule, 1 and 2 steps, real text
    other = run(tmp_path, "flm_train.py", "--eval", str(tmp_path / "r"), "--steps", "3", "--sampler", "bridge").stdout
    assert "| 3 steps |" in other
    for name in ("samples_1_steps.txt", "samples_real_text.txt", "evaluation_ngram.md", "evaluation_ngram.png"):
        assert (tmp_path / "r" / name).stat().st_size > 0
    scores = read_scores(tmp_path / "r" / "evaluation_ngram.json")  # the bridge has files of its own
    assert [score.text for score in scores] == ["1 steps", "2 steps", "real text"]
    assert f"| {scores[0].perplexity:.2f} | {scores[0].entropy:.3f} |" in table(first)[2]
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
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(tmp_path: Path, script: str, flags: list[str], words: str) -> None:
    done = run(tmp_path, script, *flags, check=2)
    assert words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_learns_the_toy_language_and_keeps_it_in_one_step(tmp_path: Path) -> None:
    """Total variation distance from the true distribution over sentences; the undistilled flow fails in one step."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    flow = run(
        tmp_path, "flm_train.py", "--data", "toy", "--threads", "1", "--run-name", "flow", "--steps", "1", "32"
    ).stdout
    flow_map = run(
        tmp_path, "fmlm_distill.py", "--teacher", str(tmp_path / "flow"), "--threads", "1", "--steps", "1"
    ).stdout
    distance = lambda text, label: float(re.search(rf"{label}: total variation .* (\d\.\d+)", text)[1])  # noqa: E731
    assert distance(flow, "32 steps") < 0.2 and distance(flow, "1 steps") > 0.5
    assert distance(flow_map, "1 steps") < 0.25
