"""OGPO on Lift: runs every variant and seed, stores their metrics, makes the table and the figures of the docs.

python benchmarks/lift.py run --jobs 2        # resumable: finished runs are skipped; about 15 minutes a run
python benchmarks/lift.py store               # keep the finished runs in lift/runs.jsonl.gz
python benchmarks/lift.py report              # lift/results.md, lift/variants.png, lift/main.png from lift/ alone
"""

import argparse
import json
import os
import sys
from datetime import datetime
from pathlib import Path

import numpy as np

import plots
import runs
from common.evaluate import wilson
from common.jobs import execute_all
from runs import ROOT, RUNS, Run
from study_configs import settings

STORE = ROOT / "benchmarks" / "lift"
SEEDS = (1, 2, 3, 4, 5)
# The settings of v0.2; where another run's cloned policy is taken, those of cloning do nothing.
EARLIER = [*settings("lift", "ogpo_state.py"), "--eval-every", "4000", "--total-steps", "20000"]
WEAK = ["--bc-stop-success", "0.15", "--bc-eval-every", "25", "--bc-eval-episodes", "100"]
CONFIGS: dict[str, list[str]] = {
    "ogpo+ca": [],
    "before": [*EARLIER, "--eval-every", "1000", "--total-steps", "10000", "--no-video"],
    "ogpo+ca_0.2": EARLIER,
    "hard_0.2": [*EARLIER, *WEAK, "--horizon", "150", "--total-steps", "30000", "--no-video"],
    "ogpo_0.2": ["--variant", "ogpo", *EARLIER, "--no-video"],
    "ogpo+_0.2": ["--variant", "ogpo+", *EARLIER, "--no-video"],
}
TITLES = {  # in the order of the report
    "ogpo+ca": "OGPO+CA (default)",
    "before": "settings of v0.2, same cloned policies",
    "ogpo_0.2": "OGPO, settings of v0.2",
    "ogpo+_0.2": "OGPO+, settings of v0.2",
    "ogpo+ca_0.2": "OGPO+CA, settings of v0.2",
    "hard_0.2": "OGPO+CA, settings of v0.2, bc_stop_success 0.15, cap 150",
}
START = {"before": "ogpo+ca", "ogpo_0.2": "ogpo+ca_0.2", "ogpo+_0.2": "ogpo+ca_0.2"}  # whose cloned policies it takes


def run_flags(config: str, seed: int) -> list[str]:
    flags = ["--env", "lift", "--preset", "laptop", "--seed", str(seed), *CONFIGS[config]]
    if config in START:
        flags += ["--cloned", f"runs/lift_{START[config]}_s{seed}"]
    return flags


def run_one(config: str, seed: int) -> int:
    """Exit code of one run."""
    return runs.execute("ogpo_state.py", f"lift_{config}_s{seed}", run_flags(config, seed))


def store() -> None:
    names = {f"{config}_s{seed}": RUNS / f"lift_{config}_s{seed}" for config in CONFIGS for seed in SEEDS}
    runs.keep(STORE, names, lambda folder: {"cloned": cloned_after(folder)})


def cloned_after(folder: Path) -> float:
    """Seconds from the start of a run to its cloned policy."""
    started = datetime.fromisoformat(json.loads((folder / "args.json").read_text())["started"])
    return round((folder / "cloned.pt").stat().st_mtime - started.timestamp(), 1)


def stored(config: str) -> dict[int, Run]:
    """{seed: run}"""
    return runs.read_seeds(STORE, config, SEEDS)


def rates(run: Run) -> list[float]:
    """Success of the cloned policy, and of the noise-free and the acting one at the end."""
    return [run.first("eval/ode_success"), run.last("final/ode_success"), run.last("final/bon_success")]


def summary_table() -> str:
    """Every configuration's mean over seeds, with the interval of all episodes pooled."""
    lines = []
    for config, title in TITLES.items():
        found = stored(config)
        cells = []
        for column in np.array([rates(run) for run in found.values()]).T:
            low, high = wilson(round(column.sum() * 100), 100 * len(column))
            cells.append(f"{column.mean():.3f} [{low:.3f}, {high:.3f}]")
        lines.append((title, *cells, len(found)))
    return runs.table(
        "| method | BC (no RL update) | ODE policy | best-of-N policy | seeds |", "|---|---|---|---|---|", lines
    )


def seeds_table(config: str) -> str:
    """A configuration, seed by seed."""
    lines = []
    for seed, run in stored(config).items():
        cloned, ode, best = rates(run)
        steps, successes = run.series("eval/bon_success")
        reached = next((f"{step:,}" for step, value in zip(steps, successes, strict=True) if value >= 0.9), "-")
        lengths = [f"{run.last(f'final/{policy}_length'):.0f}" for policy in ("ode", "bon")]
        cells = (f"{cloned:.2f}", f"{ode:.2f}", lengths[0], f"{best:.2f}", lengths[1], reached, f"{run.minutes:.1f}")
        lines.append((seed, *cells))
    return runs.table(
        "| seed | BC | ODE | length | best-of-N | length | steps to 0.9 | minutes |",
        "|---|---|---|---|---|---|---|---|",
        lines,
    )


def tables() -> dict[str, str]:
    return {"lift/summary": summary_table(), **{f"lift/{config}": seeds_table(config) for config in TITLES}}


def report() -> None:
    text = [
        "# OGPO on Lift: stored results",
        "",
        "Made by `python benchmarks/lift.py report`. Success over 100 evaluation episodes with fixed seeds, before "
        "the first update (BC) and at the end. *Steps to 0.9*: first of the evaluations during training (20 episodes, "
        "best-of-N policy) at 0.9 or above. Wall time: the whole command, two runs at a time on two cores.",
        "",
        "Mean over seeds; Wilson 95 % interval over all their episodes pooled (it does not cover seed-to-seed spread).",
        "",
        summary_table(),
        "",
    ]
    for config, title in TITLES.items():
        args = next(iter(stored(config).values())).args
        command = " ".join(["python ogpo_state.py --env lift", *CONFIGS[config], "--seed N"])
        start = f", from the cloned policies of: {TITLES[START[config]]}" if args["cloned"] else ""
        every = f", evaluated every {args['eval_every']:,}"
        about = f"`{command}`, {args['total_steps']:,} steps{every}{start}"
        text += [f"## {title}", "", about, "", seeds_table(config), ""]
    (STORE / "results.md").write_text("\n".join(text))
    plot_variants()
    plot_main()


def plot_variants() -> None:
    """Success of the three variants over environment steps, with the settings of v0.2."""
    figure, axes = plots.panels(1, 2, 5, 4, sharey=True)
    panels = (("eval/ode_success", "ODE policy"), ("eval/bon_success", "acting policy"))
    configs = {f"{variant}_0.2": colour for variant, colour in plots.VARIANTS.items()}
    cloned = [run.first("eval/ode_success") for config in configs for run in stored(config).values()]
    for axis, (key, title) in zip(axes[0], panels, strict=True):
        for config, colour in configs.items():
            plots.draw_seeds(axis, stored(config).values(), key, colour, TITLES[config].split(",")[0])
        axis.axhline(np.mean(cloned), color="black", linestyle=":", label="no RL update")
        axis.set(xlabel="environment steps", title=title)
    plots.success_axes(axes[0])
    axes[0, 0].set_ylabel("success, 20 episodes (thin: seeds)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(STORE / "variants.png", dpi=130)


def plot_main() -> None:
    """Success of the acting policy over environment steps and over minutes, now and before, same cloned policies."""
    figure, axes = plots.panels(1, 2, 5, 3.6, sharey=True)
    steps, minutes = axes[0]
    for config, colour in (("ogpo+ca", plots.VARIANTS["ogpo+ca"]), ("before", "tab:gray")):
        found = stored(config).values()
        plots.draw_seeds(steps, found, "eval/bon_success", colour, TITLES[config])
        for run in found:
            minutes.plot(*evaluations_by_minute(run), color=colour, alpha=0.5)
    plots.success_axes([steps])
    minutes.set_xlim(0)
    minutes.grid(alpha=0.3)
    steps.set(xlabel="environment steps", ylabel="success of the acting policy, 20 episodes")
    minutes.set(xlabel="minutes since the policy was cloned")
    figure.legend(*steps.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(STORE / "main.png", dpi=130)


def evaluations_by_minute(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Minutes from the cloned policy to an evaluation's end, and success of the acting policy in it."""
    rows = [row for row in run.metrics if "eval/bon_success" in row]
    minutes = [(row["time/wall"] - run.files["cloned"]) / 60 for row in rows]
    return np.array(minutes), np.array([row["eval/bon_success"] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "store", "report"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.what == "run":
        sys.exit(execute_all(run_one, [(config, seed) for config in args.configs for seed in SEEDS], args.jobs))
    {"store": store, "report": report}[args.what]()


if __name__ == "__main__":
    main()
