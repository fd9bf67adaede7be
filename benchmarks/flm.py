"""FLM and FMLM on the embedded corpus: runs, ablations, judges' tables, figures.

python benchmarks/flm.py run                # resumable: finished runs are skipped; about an hour a seed on two cores
python benchmarks/flm.py ablations          # equal budget, one seed: what the paper's choices bring
python benchmarks/flm.py store              # copy args, metrics, tables and samples of finished runs to flm/
"""

import argparse
import gzip
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS, STORE = ROOT / "runs", ROOT / "benchmarks" / "flm"
SEEDS = (1, 2, 3)
ABLATIONS: dict[str, list[str]] = {
    "softmax_ce": [],
    "softmax_mse": ["--loss", "mse"],
    "raw_mse": ["--loss", "mse", "--no-softmax"],
    "velocity_mse": ["--loss", "mse", "--predict", "velocity", "--space", "onehot"],
    "no_reparam": ["--no-reparam"],
    "onehot_noise": ["--space", "onehot"],
}


def run_one(script: str, name: str, flags: list[str]) -> None:
    """One run to its end; an interrupted one is resumed."""
    folder = RUNS / name
    if (folder / "wall_seconds").exists():
        return
    started = time.time()
    if (folder / "checkpoint.pt").exists():
        flags = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--run-name", name, *flags]
    RUNS.mkdir(exist_ok=True)
    with open(RUNS / f"{name}.txt", "a") as out:
        done = subprocess.run([sys.executable, script, *flags], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{name} failed: see {RUNS / name}.txt")
    (folder / "wall_seconds").write_text(f"{time.time() - started:.0f}\n")


def run(seeds: list[int], judge: str) -> None:
    for seed in seeds:
        common = ["--seed", str(seed), "--judge", judge]
        run_one("flm_train.py", f"flm_s{seed}", common)
        run_one("fmlm_distill.py", f"fmlm_s{seed}", [*common, "--teacher", str(RUNS / f"flm_s{seed}")])


def ablations(steps: int) -> None:
    for name, flags in ABLATIONS.items():
        budget = ["--total-steps", str(steps), "--steps", "32", "128", "--seed", "1"]
        run_one("flm_train.py", f"flm_ablation_{name}", [*budget, *flags])


def store() -> None:
    """Keeps what the docs quote of every finished run."""
    for folder in sorted(RUNS.glob("f*lm_*")):
        if not (folder / "wall_seconds").exists():
            continue
        target = STORE / folder.name
        target.mkdir(parents=True, exist_ok=True)
        for file in [folder / "args.json", folder / "wall_seconds", *folder.glob("evaluation*.md")]:
            shutil.copy(file, target / file.name)
        for file in folder.glob("samples_*.txt"):
            (target / file.name).write_text("\n----\n".join(file.read_text().split("\n----\n")[:8]) + "\n")
        with gzip.GzipFile(target / "metrics.jsonl.gz", "wb", mtime=0) as out:
            out.write((folder / "metrics.jsonl").read_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "ablations", "store"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--judge", default="ngram")
    parser.add_argument("--total-steps", type=int, default=1_000)
    args = parser.parse_args()
    if args.what == "run":
        run(args.seeds, args.judge)
    elif args.what == "ablations":
        ablations(args.total_steps)
    else:
        store()
