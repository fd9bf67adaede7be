"""OGPO from camera images, on Lift and Can: runs every seed, stores the metrics, makes the table and the figure.

python benchmarks/pixels.py run --jobs 2             # resumable: finished runs are skipped
python benchmarks/pixels.py run --tasks lift --seeds 1
python benchmarks/pixels.py store                    # keep the finished runs in pixels/runs.jsonl.gz
python benchmarks/pixels.py report                   # pixels/results.md and pixels/curves.png from pixels/ alone
"""

import argparse
import os
import sys

import plots
import runs
import tasks
from common.jobs import execute_all
from runs import ROOT, RUNS, Run

STORE = ROOT / "benchmarks" / "pixels"
SEEDS = (1, 2, 3)
NAMES = ("lift", "can")


def run_flags(name: str, seed: int) -> list[str]:
    return ["--env", name, "--preset", "laptop", "--seed", str(seed)]


def run_one(name: str, seed: int) -> int:
    """Exit code of one run."""
    return runs.execute("ogpo_pixels.py", f"pixels_{name}_s{seed}", run_flags(name, seed))


def store() -> None:
    runs.keep(STORE, {f"{name}_s{seed}": RUNS / f"pixels_{name}_s{seed}" for name in NAMES for seed in SEEDS})


def stored() -> dict[str, dict[int, Run]]:
    """{task: {seed: run}}"""
    return {name: runs.read_seeds(STORE, name, SEEDS) for name in NAMES}


def tables() -> dict[str, str]:
    return {"pixels/seeds": tasks.seeds_table(stored()), "pixels/short": tasks.short_table(stored())}


def report() -> None:
    text = [
        "# OGPO from pixels: stored results",
        "",
        "Made by `python benchmarks/pixels.py report`; `laptop` settings, two cameras of 84 x 84 pixels. Columns as in "
        "[tasks/results.md](../tasks/results.md), over 50 episodes.",
        "",
        tasks.seeds_table(stored()),
    ]
    (STORE / "results.md").write_text("\n".join(text) + "\n")
    plot()


def plot() -> None:
    """Success over environment steps, a panel a task."""
    figure, axes = plots.panels(1, len(NAMES), 4.5, 3.4, sharey=True)
    for axis, (name, by_seed) in zip(axes[0], stored().items(), strict=True):
        plots.draw_runs(axis, by_seed.values(), noise_free=True)
        axis.set(title=f"{name}, from pixels", xlabel="environment steps")
    plots.success_axes(axes[0])
    axes[0, 0].set_ylabel("success")
    figure.legend(*plots.one_label_each(axes[0, 0]), loc="outside upper center", ncols=3)
    figure.savefig(STORE / "curves.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "store", "report"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.what == "run":
        sys.exit(execute_all(run_one, [(name, seed) for seed in args.seeds for name in args.tasks], args.jobs))
    {"store": store, "report": report}[args.what]()


if __name__ == "__main__":
    main()
