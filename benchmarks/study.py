"""What holds OGPO up: variants of OGPO against one another, from one cloned policy per task and seed.

python benchmarks/study.py run --figure stabilizers --jobs 2   # resumable: finished runs are skipped
python benchmarks/study.py run --figure tasks --seeds 1        # figures: stabilizers, start, reference, extraction, ...
python benchmarks/study.py store                               # keep the finished runs in study/runs.jsonl.gz
python benchmarks/study.py report                              # study/results.md and study/FIGURE.png from study/

study_configs.py says what is compared, study_stats.py how.
"""

import argparse
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

import plots
import runs
import study_stats as stats
from common.jobs import execute_all
from runs import ROOT, RUNS
from study_configs import ALONE, CLAIMS, CONFIGS, EARLIER, EVERY, FIGURES, SAME, SEEDS, STEPS, Figure, Panel, settings


def cloned(task: str, seed: int) -> Path:
    """Folder of the cloned policy of a task and seed: the stored one, so that later runs start from it too."""
    kept = stats.STORE / f"{task}_clone_s{seed}"
    return kept if (kept / "cloned.pt").exists() else RUNS / f"study_{task}_clone_s{seed}"


def script_of(config: str) -> str:
    return "ogpo_state.py" if config == "clone" else CONFIGS[config].script


def common_flags(task: str, config: str, seed: int) -> list[str]:
    shared = settings(task, script_of(config))
    return ["--env", task, "--preset", "laptop", "--seed", str(seed), "--no-video", *shared]


def run_flags(task: str, config: str, seed: int) -> list[str]:
    """Flags of a run; `clone` makes the policy from which the others of the task and seed start."""
    flags = common_flags(task, config, seed)
    if config == "clone":
        return [*flags, "--total-steps", "0"]
    flags += ["--total-steps", str(STEPS[task]), "--eval-every", str(EVERY[task]), *CONFIGS[config].flags]
    if config not in ALONE:
        flags += ["--cloned", str(cloned(task, seed).relative_to(ROOT))]
    return flags


def run_one(task: str, config: str, seed: int) -> int:
    """Exit code of one run; the stored cloned policies are not made again."""
    if config == "clone" and cloned(task, seed).parent == stats.STORE:
        return 0
    return runs.execute(script_of(config), f"study_{task}_{config}_s{seed}", run_flags(task, config, seed))


def run(
    figures: Sequence[str], seeds: Sequence[int], jobs: int, tasks: Sequence[str] = (), only: Sequence[str] = ()
) -> int:
    """Exit code of all runs of some figures, or only of some tasks and configurations of them."""
    others = [
        (task, config, seed)
        for seed in seeds
        for figure in figures
        for task in FIGURES[figure].tasks
        if not tasks or task in tasks
        for config in FIGURES[figure].configs
        if not only or config in only
    ]
    others.sort(key=lambda job: job[1] not in ALONE)  # they need not wait for a clone
    clones = [(task, "clone", seed) for task, config, seed in others if config not in ALONE]

    def needs(job: tuple) -> tuple | None:
        task, config, seed = job
        return None if config in (*ALONE, "clone") else (task, "clone", seed)

    return execute_all(run_one, list(dict.fromkeys(clones + others)), jobs, needs)


def store() -> None:
    """Keeps the finished runs, and the cloned policies as files of their own: --cloned reads them."""
    names = [f"{task}_{config}_s{seed}" for task in STEPS for config in ("clone", *CONFIGS) for seed in SEEDS]
    for name in runs.keep(stats.STORE, {name: RUNS / f"study_{name}" for name in names}):
        if "_clone_" in name:
            (stats.STORE / name).mkdir(exist_ok=True)
            shutil.copy(RUNS / f"study_{name}" / "cloned.pt", stats.STORE / name / "cloned.pt")


def machines() -> str:
    """What the stored runs were trained on, with how many of them, by seed."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for run in runs.read(stats.STORE).values():
        counts[run.machine["gpu"] or f"{run.machine['cpu']} without GPU"][run.args["seed"]] += 1
    return "; ".join(
        f"{machine} ({', '.join(f'{n} of seed {seed}' for seed, n in sorted(seeds.items()))})"
        for machine, seeds in counts.items()
    )


def configs_table(task: str, configs: Sequence[str]) -> str:
    """The measures of some configurations on a task, each by seed; of the final rates also the intervals."""
    lines = []
    for config in configs:
        found = stats.numbers(task, config).values()
        moves = [f"{stats.first_move(run):.0f}".replace("inf", "never") for run in stats.stored(task, config).values()]
        cells = [CONFIGS[config].title, " ".join(moves)]
        for key in ("cloned", "lowest", "area", "fall"):
            cells.append(" ".join(f"{run.values[key]:.2f}" for run in found))
        for key in ("ode", "final"):
            middle, low, high = stats.summary(task, config, key)
            by_seed = " ".join(f"{run.values[key]:.2f}" for run in found)
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}] ({by_seed})")
        lines.append(cells)
    return runs.table(
        "| method | moves | cloned | lowest | area | fall | final, noise-free | final, acting |",
        "|---|---|---|---|---|---|---|---|",
        lines,
    )


def claims_table() -> str:
    """Every claim on every task that has its runs."""
    lines = []
    for claim in CLAIMS:
        second = CONFIGS[claim.second].title + (f" ({claim.other})" if claim.other else "")
        for task in STEPS:
            if found := stats.judge(claim, task):
                by_seed = " ".join(f"{value:+.2f}" for value in found.by_seed)
                difference = f"{found.middle:+.2f} [{found.low:+.2f}, {found.high:+.2f}] ({by_seed})"
                methods = f"{CONFIGS[claim.first].title} / {second}"
                lines.append((claim.text, task, methods, claim.measure, difference, found.verdict))
    return runs.table(
        "| claim | task | first / second | measure | difference | verdict |", "|---|---|---|---|---|---|", lines
    )


def verdicts_table() -> str:
    """The claims, narrow: difference with its interval, and verdict."""
    lines = [
        (claim.text, task, f"{found.middle:+.2f} [{found.low:+.2f}, {found.high:+.2f}]", found.verdict)
        for claim in CLAIMS
        for task in STEPS
        if (found := stats.judge(claim, task))
    ]
    return runs.table("| claim | task | difference | verdict |", "|---|---|---|---|", lines)


def tables() -> dict[str, str]:
    by_figure = {
        f"study/{name}/{task}": configs_table(task, figure.configs)
        for name, figure in FIGURES.items()
        for task in figure.tasks
    }
    return by_figure | {"study/claims": claims_table(), "study/verdicts": verdicts_table()}


def report() -> None:
    text = [
        "# What holds OGPO up: stored results",
        "",
        "Made by `python benchmarks/study.py report`. All methods of a task and seed start from one cloned policy "
        "(diffusion: its own). *Moves*: first logged step (every 500) with an actor gradient; most wait for ten "
        "successes. *Cloned*: success of the noise-free policy before the first update, 100 episodes. "
        "*Lowest*: the lowest of its evaluations since the actor moved (20 episodes each: chance alone puts the lowest "
        "of several below their mean). *Area*: mean of the acting policy's evaluations once updates began; *fall*: the "
        "largest of one from an earlier one. Final: 100 episodes, interquartile mean over seeds with 95 % interval "
        "(seeds in parentheses): a bootstrap over seeds, each rate drawn from its posterior given its episodes "
        "(Jeffreys). "
        f"Trained on: {machines()}. {EARLIER}: before a correction of the method (docs/log.md, 2026-11-29).",
    ]
    for name, figure in FIGURES.items():
        for task in figure.tasks:
            text += ["", f"## {name}: {task}, {STEPS[task]:,} steps", "", configs_table(task, figure.configs)]
        plot(name, figure)
    text += [
        "",
        "## Claims",
        "",
        "First minus second of the measure, by seed (same cloned policy), its interquartile mean and interval; "
        "*final*, *fall*, *area* of the acting policy; *early*: the noise-free policy's lowest of "
        f"{stats.DIP_EPISODES} episodes after 1 to 500 updates of the actor, *before*: ahead of them. A claim holds if "
        "the whole interval is on its side, does not if it is on the other; rates agree if it is within "
        f"{SAME} of zero.",
        "",
        claims_table(),
    ]
    (stats.STORE / "results.md").write_text("\n".join(text) + "\n")


def plot(name: str, figure: Figure) -> None:
    """A panel for every question and task: success of the acting policy in training and, on the right, at the end."""
    places = [(task, panel) for task in figure.tasks for panel in figure.panels]
    columns = min(3, len(places))
    drawing, axes = plots.panels(-(-len(places) // columns), columns, 4.1, 4.1, sharey=True)
    for axis in axes.flat[len(places) :]:
        axis.set_visible(False)
    for axis, (task, panel) in zip(axes.flat, places, strict=False):
        plot_panel(axis, task, panel)
    drawing.supylabel("success, acting policy")
    drawing.supxlabel(
        "environment steps (thin: seeds); right of the line: final success, 95 % interval", fontsize="medium"
    )
    drawing.savefig(stats.STORE / f"{name}.png", dpi=110)


def plot_panel(axis: Axes, task: str, panel: Panel) -> None:
    plots.success_axes([axis])
    steps, others = STEPS[task], iter(plots.OTHERS)
    for i, config in enumerate(panel.configs):
        colour = plots.VARIANTS.get(config) or next(others)
        seeds = stats.stored(task, config).values()
        plots.draw_seeds(axis, seeds, "eval/bon_success", colour, CONFIGS[config].title)
        middle, low, high = stats.summary(task, config, "final")
        at = steps * (1.06 + 0.04 * i)
        axis.plot([at, at], [low, high], color=colour, linewidth=2)
        axis.plot([at], [middle], "o", color=colour, markersize=5)
    cloned = [run.first("eval/ode_success") for run in stats.stored(task, "clone").values()]
    axis.axhline(np.mean(cloned), color="black", linestyle=":", label="cloned flow policy")
    axis.axvline(1.025 * steps, color="black", linewidth=0.8)
    axis.set(xlim=(0, 1.23 * steps), xticks=range(0, steps + 1, steps // 4))
    axis.set_title(f"{task}: {panel.question}", fontsize="medium")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8, ncols=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "store", "report"))
    parser.add_argument("--figure", nargs="+", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--tasks", nargs="+", choices=list(STEPS), default=[], help="only these")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=[], help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.what == "run":
        sys.exit(run(args.figure, args.seeds, args.jobs, args.tasks, args.configs))
    {"store": store, "report": report}[args.what]()


if __name__ == "__main__":
    main()
