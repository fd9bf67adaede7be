"""Every script for a few hundred steps on one GPU: does it run, how fast, in how much memory.

python benchmarks/gpu_check.py                    # at most eight minutes; writes benchmarks/gpu/results.md
python benchmarks/gpu_check.py --device cpu --tiny --only flm-eager    # how the check itself is tested

Each case is a command of its own, in the order of their worth: what does not fit into --minutes any more is left out,
and said so. What a user may want is among them: both presets, eager and compiled, bf16, long rows (flex attention),
torchrun with one process. Speeds are of the last log line, after compilation; a share of the device's speed (MFU) is
of its own matrix products, measured in the run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli
from common.machine import describe_machine
from common.runlog import read_metrics, write_json
from common.start import pick_device
from runs import ROOT, table

STORE = ROOT / "benchmarks" / "gpu"
SHORT = ["--total-steps", "300", "--log-every", "50", "--eval-every", "300", "--steps", "1", "--samples", "16"]
PAPER = ["--layers", "12", "--width", "768", "--heads", "12", "--conv", "0", "--self-condition", "0"]
BATCH = ["--batch", "64", "--micro-batch", "0"]
ROWS = ["--length", "128", "--loss-rows", "32", *BATCH]
LONG = ["--length", "1024", "--batch", "8", "--micro-batch", "8", "--loss-rows", "4"]
TEXT_TINY = ["--total-steps", "4", "--log-every", "2"]
NARROW = ["--layers", "1", "--width", "32", "--heads", "2"]  # a student has its teacher's network
ROBOT = ["--env", "toy", "--no-video", "--bc-steps", "200", "--eval-interval-episodes", "4", "--eval-episodes", "4"]
STATE = ["--total-steps", "3000", "--eval-every", "3000", "--log-every", "250"]
PIXELS = ["--total-steps", "1500", "--eval-every", "1500", "--log-every", "250"]
ROBOT_TINY = ["--total-steps", "400", "--log-every", "100", "--start-training", "200", "--bc-steps", "2"]


@dataclass(frozen=True)
class Case:
    """A command: script and flags. teacher: the case whose run it distils."""

    script: str
    flags: Sequence[str]
    teacher: str = ""
    torchrun: bool = False


CASES = {
    "state-laptop": Case("ogpo_state.py", [*ROBOT, *STATE]),
    "state-laptop-compiled": Case("ogpo_state.py", [*ROBOT, *STATE, "--compile"]),
    "flm-eager": Case("flm_train.py", SHORT),
    "flm-compiled": Case("flm_train.py", [*SHORT, "--compile"]),
    "fmlm-compiled": Case("fmlm_distill.py", [*SHORT, "--compile"], teacher="flm-eager"),
    "state-paper-compiled": Case("ogpo_state.py", [*ROBOT, *STATE, "--preset", "paper", "--compile"]),
    "state-paper": Case("ogpo_state.py", [*ROBOT, *STATE, "--preset", "paper"]),
    "pixels-compiled": Case("ogpo_pixels.py", [*ROBOT, *PIXELS, "--compile"]),
    "flm-paper-compiled": Case("flm_train.py", [*SHORT, *PAPER, *ROWS, "--compile"]),
    "fmlm-paper-compiled": Case("fmlm_distill.py", [*SHORT, *BATCH, "--compile"], teacher="flm-paper-compiled"),
    "flm-long-compiled": Case("flm_train.py", [*SHORT, *PAPER, *LONG, "--compile"]),
    "flm-torchrun": Case("flm_train.py", SHORT, torchrun=True),
    "flm-fp32": Case("flm_train.py", [*SHORT, "--precision", "fp32"]),
    "pixels": Case("ogpo_pixels.py", [*ROBOT, *PIXELS]),
    "flm-paper": Case("flm_train.py", [*SHORT, *PAPER, *ROWS]),
}


def command(name: str, folder: Path, device: str, tiny: bool) -> list[str]:
    case = CASES[name]
    launcher = ["-m", "tools.torchrun", "--nproc_per_node", "1"] if case.torchrun else []
    flags = [*case.flags, "--device", device, "--run-dir", str(folder), "--run-name", name]
    if case.teacher:
        flags += ["--teacher", str(folder / case.teacher)]
    if tiny and "--env" in flags:
        flags += ROBOT_TINY
    elif tiny:
        flags += TEXT_TINY if case.teacher else [*TEXT_TINY, *NARROW]
    return [sys.executable, *launcher, case.script, *flags]


def measured(folder: Path) -> dict[str, float]:
    """Speed and memory of a run: of text by its last log line, of a robot by the updates between its last two."""
    rows = [row for row in read_metrics(folder) if any(key.startswith("time/") for key in row)]
    if "time/tokens_per_second" in rows[-1]:
        return {key.removeprefix("time/"): value for key, value in rows[-1].items() if key.startswith("time/")}
    args = json.loads((folder / "args.json").read_text())["args"]
    trained = [row for row in rows if "ogpo/q" in row]
    (first, last), every = trained[-2:], args["update_every"]
    return {"updates_per_second": (last["step"] - first["step"]) / every / (last["time/wall"] - first["time/wall"])}


def check(name: str, folder: Path, device: str, tiny: bool, seconds: float) -> dict[str, float | str]:
    """What came of a case: its numbers, or the last line of its output."""
    started = time.monotonic()
    with open(folder / f"{name}.txt", "w+") as out:
        try:
            code = subprocess.run(
                command(name, folder, device, tiny), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"not at its end after {seconds:.0f} s, when the time was over"}
        out.seek(0)
        lines = out.read().strip().splitlines()
    if code:
        return {"failed": next((line for line in reversed(lines) if line.strip("=")), f"exit code {code}")}
    return measured(folder / name) | {"seconds": time.monotonic() - started}


def report(found: dict[str, dict[str, float | str]], machine: dict[str, Any], asked: Sequence[str]) -> str:
    """The page of results."""
    lines = []
    for name, got in found.items():
        if "failed" in got:
            lines.append((name, f"failed: {got['failed']}", "", "", "", ""))
            continue
        cells = [f"{got[key]:{how}}" if key in got else "" for key, how in COLUMNS]
        lines.append((name, *cells))
    left = [name for name in asked if name not in found]
    what = f"Not run, for lack of time: {', '.join(left)}." if left else "All cases were run."
    head = "| case | tokens/s | MFU | updates/s | peak GiB | seconds in all |"
    about = f"{machine.get('gpu') or machine.get('cpu')}, torch {machine['versions']['torch']}. {what}"
    text = ["# On one GPU", "", "Made by `python benchmarks/gpu_check.py`.", "", about, ""]
    return "\n".join([*text, table(head, "|---|---:|---:|---:|---:|---:|", lines)])


COLUMNS = (
    ("tokens_per_second", ",.0f"), ("mfu", ".0%"), ("updates_per_second", ".1f"), ("memory_gib", ".2f"),
    ("seconds", ".0f"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="a few steps of small networks")
    parser.add_argument("--out", type=Path, default=STORE, help="folder of results.json and results.md")
    args = parser.parse_args()
    pick_device(args.device)  # without it no case can run, and no page is written
    end, found = time.monotonic() + 60 * args.minutes, {}
    folder = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    machine = describe_machine()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in args.only:
            if (left := end - time.monotonic()) < 0:
                break
            found[name] = check(name, folder, args.device, args.tiny, left)
            print(name, json.dumps(found[name]), flush=True)
            write_json(args.out / "results.json", {"machine": machine, "cases": found})
            (args.out / "results.md").write_text(report(found, machine, args.only) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(any("failed" in got for got in found.values()))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(main)
