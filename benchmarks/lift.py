"""OGPO on Lift: runs every variant and seed, stores their metrics, makes the table and the figures of the docs.

python benchmarks/lift.py run --jobs 2        # resumable: finished runs are skipped; about 12 minutes a run
python benchmarks/lift.py store               # copy args.json and metrics.jsonl.gz of finished runs to lift/
python benchmarks/lift.py report              # lift/results.md, lift/variants.png, lift/main.png from lift/ alone
"""

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

from runs import ROOT, RUNS, arguments, execute, execute_all, keep, kept, last, metrics, minutes, series

sys.path.insert(0, str(ROOT))
from common.evaluate import wilson

STORE = ROOT / "benchmarks" / "lift"
SEEDS = (1, 2, 3, 4, 5)
CONFIGS: dict[str, list[str]] = {
    "ogpo+ca": ["--profile"],
    "hard": [
        *("--horizon", "150", "--bc-stop-success", "0.15", "--bc-eval-every", "25", "--bc-eval-episodes", "100"),
        *("--total-steps", "30000", "--no-video"),
    ],
    "ogpo": ["--variant", "ogpo", "--no-video"],
    "ogpo+": ["--variant", "ogpo+", "--no-video"],
}
TITLES = {
    "ogpo+ca": "OGPO+CA (default)",
    "ogpo+": "OGPO+",
    "ogpo": "OGPO",
    "hard": "OGPO+CA, bc_stop_success 0.15, cap 150",
}


def run_one(config: str, seed: int) -> int:
    """Exit code of one run."""
    name = f"lift_{config}_s{seed}"
    flags = ["--env", "lift", "--preset", "cpu", "--seed", str(seed), *CONFIGS[config]]
    if config in ("ogpo", "ogpo+"):  # all variants start from the same cloned policy
        flags += ["--cloned", f"runs/lift_ogpo+ca_s{seed}"]
    return execute("ogpo_state.py", name, flags)


def run(jobs: int, configs: Sequence[str]) -> int:
    return execute_all(run_one, [(c, s) for c in configs for s in SEEDS], jobs)


def store() -> None:
    """Keeps what the report needs of each finished run."""
    for config in CONFIGS:
        for seed in SEEDS:
            keep(RUNS / f"lift_{config}_s{seed}", STORE / f"{config}_s{seed}")


def load(config: str) -> dict[int, list[dict]]:
    """{seed: lines of metrics.jsonl} of the stored runs."""
    return {seed: metrics(folder) for seed, folder in kept(STORE, config, SEEDS).items()}


def report() -> None:
    text = [
        "# OGPO on Lift: stored results",
        "",
        "Made by `python benchmarks/lift.py report`. Success over 100 evaluation episodes with fixed seeds, before "
        "the first update (BC) and at the end. *Steps to 0.9*: first of the evaluations during training (every "
        "4,000 steps, 20 episodes, best-of-N policy) at 0.9 or above. Wall time: the whole command, two runs at a "
        "time on two cores.",
        "",
    ]
    summary = ["| method | BC (no RL update) | ODE policy | best-of-N policy | seeds |", "|---|---|---|---|---|"]
    for config in ("ogpo", "ogpo+", "ogpo+ca", "hard"):
        runs = load(config)
        if not runs:
            continue
        text += [f"## {TITLES[config]}", ""]
        args = arguments(STORE / f"{config}_s{next(iter(runs))}")
        command = (
            f"`python ogpo_state.py --env lift {' '.join(CONFIGS[config])} --seed N`, {args['total_steps']:,} steps"
        )
        text += [command + (", from the default run's cloned policy" if args["cloned"] else ""), ""]
        text += [
            "| seed | BC | ODE | length | best-of-N | length | steps to 0.9 | minutes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        table = []
        for seed, rows in runs.items():
            bc = series(rows, "eval/ode_success")[1][0]
            steps, bon = series(rows, "eval/bon_success")
            reached = next((f"{s:,}" for s, v in zip(steps, bon, strict=True) if v >= 0.9), "-")
            ode, best = last(rows, "final/ode_success"), last(rows, "final/bon_success")
            table.append((bc, ode, best))
            wall = minutes(STORE / f"{config}_s{seed}")
            text.append(
                f"| {seed} | {bc:.2f} | {ode:.2f} | {last(rows, 'final/ode_length'):.0f} | {best:.2f} "
                f"| {last(rows, 'final/bon_length'):.0f} | {reached} | {wall:.1f} |"
            )
        text.append("")
        cells = []
        for column in np.array(table).T:
            n = 100 * len(column)
            low, high = wilson(round(column.sum() * 100), n)
            cells.append(f"{column.mean():.3f} [{low:.3f}, {high:.3f}]")
        summary.append(f"| {TITLES[config]} | {' | '.join(cells)} | {len(runs)} |")
    note = (
        "Mean over seeds; Wilson 95 % interval over all their episodes pooled (it does not cover seed-to-seed spread)."
    )
    (STORE / "results.md").write_text("\n".join([*text[:4], note, "", *summary, "", *text[4:]]))
    plot()


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"ogpo": "tab:gray", "ogpo+": "tab:blue", "ogpo+ca": "tab:orange", "hard": "tab:green"}

    def draw(axis: plt.Axes, config: str, key: str, label: str) -> None:
        curves = [series(rows, key) for rows in load(config).values()]
        if not curves:
            return
        for steps, values in curves:
            axis.plot(steps, values, color=colours[config], alpha=0.25, linewidth=1)
        n = min(len(s) for s, _ in curves)
        mean = np.mean([v[:n] for _, v in curves], 0)
        axis.plot(curves[0][0][:n], mean, color=colours[config], linewidth=2.5, label=label)

    if load("ogpo"):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
        for axis, key, title in zip(
            axes, ("eval/ode_success", "eval/bon_success"), ("ODE policy", "acting policy"), strict=True
        ):
            for config in ("ogpo", "ogpo+", "ogpo+ca"):
                draw(axis, config, key, TITLES[config])
            bc = [
                series(rows, "eval/ode_success")[1][0]
                for c in ("ogpo", "ogpo+", "ogpo+ca")
                for rows in load(c).values()
            ]
            axis.axhline(np.mean(bc), color="black", linestyle=":", label="no RL update")
            axis.set(xlabel="environment steps", title=title, ylim=(-0.03, 1.03))
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("success, 20 episodes (thin: seeds)")
        axes[0].legend(loc="lower right")
        figure.savefig(STORE / "variants.png", dpi=130)

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for config in ("ogpo+ca", "hard"):
        draw(axes[0], config, "train/success", TITLES[config])
        draw(axes[1], config, "train/length", TITLES[config])
    axes[0].set(xlabel="environment steps", ylabel="success of the last 20 episodes", ylim=(-0.03, 1.03))
    axes[1].set(xlabel="environment steps", ylabel="episode length (steps)")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.savefig(STORE / "main.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "store", "report"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.what == "run":
        sys.exit(run(args.jobs, args.configs))
    elif args.what == "store":
        store()
    else:
        report()


if __name__ == "__main__":
    main()
