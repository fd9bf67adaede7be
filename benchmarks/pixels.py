"""OGPO from camera images, on Lift and Can: runs every seed, stores the metrics, makes the table and the figure.

python benchmarks/pixels.py run --jobs 2             # resumable: finished runs are skipped
python benchmarks/pixels.py run --tasks lift --seeds 1
python benchmarks/pixels.py store                    # copy args.json and metrics.jsonl.gz of finished runs to pixels/
python benchmarks/pixels.py report                   # pixels/results.md and pixels/curves.png from pixels/ alone
"""

import argparse
import os
import sys
from pathlib import Path

from runs import ROOT, RUNS, execute, execute_all, keep, kept, metrics, series
from tasks import HEAD, line

STORE = ROOT / "benchmarks" / "pixels"
SEEDS = (1, 2, 3)
NAMES = ("lift", "can")


def run_one(name: str, seed: int) -> int:
    """Exit code of one run."""
    flags = ["--env", name, "--preset", "cpu", "--seed", str(seed)]
    return execute("ogpo_pixels.py", f"pixels_{name}_s{seed}", flags)


def stored(name: str) -> dict[int, Path]:
    return kept(STORE, name, SEEDS)


def report() -> None:
    text = [
        "# OGPO from pixels: stored results",
        "",
        "Made by `python benchmarks/pixels.py report`; `cpu` settings, two cameras of 84 x 84 pixels. Columns as in "
        "[tasks/results.md](../tasks/results.md), over 50 episodes.",
        "",
        *HEAD,
    ]
    for name in NAMES:
        text += [line(name, seed, folder) for seed, folder in stored(name).items()]
    (STORE / "results.md").write_text("\n".join(text) + "\n")
    plot()


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in NAMES if stored(name)]
    if not names:
        return
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 3.2), layout="constrained", squeeze=False, sharey=True
    )
    for axis, name in zip(axes[0], names, strict=True):
        for folder in stored(name).values():
            rows = metrics(folder)
            axis.plot(*series(rows, "train/success"), color="tab:orange", alpha=0.4, linewidth=1)
            axis.plot(*series(rows, "eval/ode_success"), "o--", color="tab:green", alpha=0.7, markersize=3)
            axis.plot(*series(rows, "eval/bon_success"), "o-", color="tab:blue", alpha=0.7, markersize=3)
        axis.set(title=f"{name}, from pixels", ylim=(-0.03, 1.03))
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("success")
    figure.supxlabel(
        "environment steps\norange: last 20 training episodes; evaluations:\ngreen noise-free, blue best-of-N",
        fontsize="small",
    )
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
    elif args.what == "store":
        for name in NAMES:
            for seed in SEEDS:
                keep(RUNS / f"pixels_{name}_s{seed}", STORE / f"{name}_s{seed}")
    else:
        report()


if __name__ == "__main__":
    main()
