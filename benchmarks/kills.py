"""Kills training runs at random points, resumes them, and compares them with runs that nothing interrupted.

python benchmarks/kills.py run      # 64 kills over the four scripts on their toy tasks; stores kills/kills.json
python benchmarks/kills.py report   # kills/results.md

A chain is one run: it is killed, resumed, killed again ... until it ends by itself. SIGKILL to the main process or to
its whole group; SIGTERM, SIGINT and SIGHUP to the group must save and exit with 0, or with the signal's code while
there is nothing to save (imports, demonstrations). At its end all lines of metrics.jsonl (but for times) and all
tensors of the checkpoint must be those of the uninterrupted run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import runs
from runs import ROOT, RUNS

sys.path.insert(0, str(ROOT))
from common import checkpoint
from common.files import write_atomic
from common.runlog import read_metrics

STORE = ROOT / "benchmarks" / "kills"
TOY = ["--env", "toy", "--no-video", "--bc-steps", "200", "--eval-episodes", "4", "--eval-interval-episodes", "4"]
TOY += ["--total-steps", "800", "--start-training", "200", "--eval-every", "200", "--log-every", "50"]
TOY += ["--checkpoint-every", "100", "--num-envs", "2", "--bc-eval-episodes", "8", "--eval-envs", "1"]
WORDS = ["--data", "toy", "--threads", "1", "--samples", "64", "--total-steps", "120", "--log-every", "5"]
WORDS += ["--eval-every", "40", "--checkpoint-every", "10"]
SCRIPTS = {"ogpo_state.py": TOY, "ogpo_pixels.py": TOY, "flm_train.py": WORDS, "fmlm_distill.py": WORDS}
KILLS = 16  # for each script, in two chains or more
GENTLE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a stop is asked for


def launch(script: str, name: str, flags: list[str]) -> subprocess.Popen[bytes]:
    """A new run, or the run of this name resumed, in a process group of its own."""
    folder = RUNS / name
    begun = any(folder.glob("checkpoint*.pt"))
    line = ["--resume", str(folder)] if begun else ["--run-name", name, *flags]
    with open(RUNS / f"{name}.txt", "ab") as out:
        return subprocess.Popen(
            [sys.executable, script, *line], cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )


def whole(script: str, flags: list[str]) -> tuple[str, float]:
    """Name and seconds of the uninterrupted run."""
    name = f"kills_{Path(script).stem}"
    shutil.rmtree(RUNS / name, ignore_errors=True)
    started = time.monotonic()
    assert launch(script, name, flags).wait() == 0, f"see runs/{name}.txt"
    return name, time.monotonic() - started


def chain(
    script: str, name: str, flags: list[str], seconds: float, most: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Every kill of one run, `most` at most: signal, whom it hit, when, exit code."""
    shutil.rmtree(RUNS / name, ignore_errors=True)
    (RUNS / f"{name}.txt").unlink(missing_ok=True)
    kills = []
    while True:
        process = launch(script, name, flags)
        after = rng.uniform(0.2, 0.9) * seconds
        try:
            code = process.wait(after if len(kills) < most else None)
        except subprocess.TimeoutExpired:
            sent, group = rng.choice((signal.SIGKILL, *GENTLE)), rng.random() < 0.5
            (os.killpg if group or sent in GENTLE else os.kill)(process.pid, sent)
            code = process.wait()
            whom = "group" if group or sent in GENTLE else "process"
            kills.append({"signal": sent.name, "to": whom, "seconds": round(after, 1), "code": code})
        else:
            assert code == 0, f"see runs/{name}.txt"
            if "saved; go on with" not in (RUNS / f"{name}.txt").read_text().splitlines()[-1]:
                return kills


def same(one: Any, two: Any) -> bool:
    """Equal to the bit: nested dicts, lists and tuples of tensors and plain values."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two run folders, but for times and names."""

    def lines(folder: Path) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)]

    states = [checkpoint.load(folder / "checkpoint.pt") for folder in (one, two)]
    for state in states:
        state["args"] = state["log"] = None
    return [what for what, equal in (("metrics", lines(one) == lines(two)), ("checkpoint", same(*states))) if not equal]


def run(seed: int) -> None:
    rng, found = random.Random(seed), []
    RUNS.mkdir(exist_ok=True)
    for script, flags in SCRIPTS.items():
        reference, seconds = whole(script, flags)
        made, n = 0, 0
        while made < KILLS:
            name = f"{reference}_{n}"
            kills = chain(script, name, flags, seconds, min(KILLS - made, KILLS // 2), rng)
            bad = differences(RUNS / reference, RUNS / name)
            found.append({"script": script, "kills": kills, "differs": bad})
            print(f"{script}, chain {n}: {len(kills)} kills, differs: {bad}", flush=True)
            made, n = made + len(kills), n + 1
        write_atomic(STORE / "kills.json", json.dumps(found, indent=1).encode())


def ended_by_signal(kill: dict[str, Any]) -> bool:
    number = signal.Signals[kill["signal"]].value
    return kill["code"] in (-number, 128 + number)


def tables() -> dict[str, str]:
    found = json.loads((STORE / "kills.json").read_bytes())
    rows = []
    for script in SCRIPTS:
        chains = [c for c in found if c["script"] == script]
        kills = [kill for c in chains for kill in c["kills"]]
        hard = [f"{kill['signal']} {kill['to']}" for kill in kills]
        count = [hard.count(f"SIGKILL {whom}") for whom in ("process", "group")]
        gentle = [kill for kill in kills if kill["signal"] != "SIGKILL"]
        saved = sum(kill["code"] == 0 for kill in gentle)
        early = sum(map(ended_by_signal, gentle))
        equal = sum(not c["differs"] for c in chains)
        others = len(gentle) - saved - early
        rows.append((f"`{script}`", len(kills), *count, saved, early, others, f"{equal} of {len(chains)}"))
    head = "| script | kills | SIGKILL, process | group | stop: saved | nothing to save | otherwise | same bits |"
    return {"kills": runs.table(head, "|---|---:|---:|---:|---:|---:|---:|---:|", rows)}


def report() -> None:
    text = (
        "# Kills\n\nMade by `python benchmarks/kills.py run`; chains of kills at random points of short toy runs.\n\n"
    )
    write_atomic(STORE / "results.md", (text + tables()["kills"] + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--seed", type=int, default=1, help="of the random points")
    args = parser.parse_args()
    if args.what == "run":
        run(args.seed)
    report()


if __name__ == "__main__":
    main()
