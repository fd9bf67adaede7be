"""OGPO on the task suite: runs every task and seed, stores their metrics, makes the table and the figures of the docs.

python benchmarks/tasks.py run --jobs 2 --tasks can square     # resumable: finished runs are skipped
python benchmarks/tasks.py run --tasks door pen --policies DIR  # Adroit: trained policies DIR/pol_TASK.npz
python benchmarks/tasks.py store               # keep the finished runs in tasks/runs.jsonl.gz
python benchmarks/tasks.py report              # tasks/results.md, tasks/curves.png from tasks/ alone
python benchmarks/tasks.py frames              # tasks/frames.png from the runs' videos
python benchmarks/tasks.py settings            # the tables of settings in docs/tasks.md
"""

import argparse
import os
import sys
from fnmatch import fnmatch
from pathlib import Path
from textwrap import wrap

import numpy as np

import plots
import runs
from common.envs import TASKS
from common.evaluate import wilson
from common.jobs import execute_all
from runs import ROOT, RUNS, Run

STORE = ROOT / "benchmarks" / "tasks"
SEEDS = (1, 2, 3)
NAMES = [
    *("can", "square", "peg-insert-side", "assembly", "hand-insert", "pick-place", "mt10"),
    *("door", "hammer", "pen", "relocate"),
]
AIMS = {
    **dict.fromkeys(("can", "peg-insert-side", "assembly", "door", "hammer"), 0.95),
    **dict.fromkeys(("square", "mt10"), 0.85),
    "pen": 0.8,
}
NO_EXPERT = ("fetch-slide", "pusht")
NAMES_WIDTH = 50  # characters of tasks' names in a line of the tables of settings
FRAMES = ("can", "peg-insert-side", "hammer")  # one task a family


def run_flags(name: str, seed: int, policies: Path | None) -> list[str]:
    """Raises SystemExit if the task's demonstrations need a trained policy and there is none."""
    flags = ["--env", name, "--preset", "laptop", "--seed", str(seed)]
    if TASKS[name].suite == "adroit":
        if policies is None:
            sys.exit(f"{name} has no expert of its own: give --policies DIR with trained policies pol_TASK.npz")
        flags += ["--demos", str(policies.resolve() / f"pol_{name}.npz")]
    return flags


def run(jobs: int, names: list[str], seeds: list[int], policies: Path | None) -> int:
    """Exit code of all runs."""

    def one(name: str, seed: int) -> int:
        return runs.execute("ogpo_state.py", f"task_{name}_s{seed}", run_flags(name, seed, policies))

    return execute_all(one, [(name, seed) for seed in seeds for name in names], jobs)


def store() -> None:
    runs.keep(STORE, {f"{name}_s{seed}": RUNS / f"task_{name}_s{seed}" for name in NAMES for seed in SEEDS})


def stored(name: str) -> dict[int, Run]:
    """{seed: run}"""
    return runs.read_seeds(STORE, name, SEEDS)


def rate_cell(wins: int, episodes: int) -> str:
    low, high = wilson(wins, episodes)
    return f"{wins / episodes:.2f} [{low:.2f}, {high:.2f}]"


def rates(run: Run) -> tuple[float, float, float]:
    """Success of the cloned policy, and of the noise-free and the acting one at the end."""
    return run.first("eval/ode_success"), run.last("final/ode_success"), run.last("final/bon_success")


def pooled(found: dict[int, Run]) -> list[str]:
    """Cells of the three policies' success over the episodes of all seeds, whose interval is not that of the seeds."""
    episodes = [run.args["eval_episodes"] for run in found.values()]
    cells = []
    for policy in zip(*map(rates, found.values()), strict=True):
        wins = sum(round(rate * n) for rate, n in zip(policy, episodes, strict=True))
        cells.append(rate_cell(wins, sum(episodes)))
    return cells


def mean_minutes(found: dict[int, Run]) -> str:
    return f"{np.mean([run.minutes for run in found.values()]):.0f}"


def summary_table() -> str:
    """All seeds of a task as one line."""
    lines = []
    for name in NAMES:
        found = stored(name)
        each = ", ".join(f"{rates(run)[-1]:.2f}" for run in found.values())
        lines.append((name, AIMS.get(name, "-"), *pooled(found), each, mean_minutes(found)))
    return runs.table(
        "| task | aim | cloned | ODE policy | best-of-N policy | best-of-N, each seed | minutes |",
        "|---|---:|---|---|---|---|---:|",
        lines,
    )


def short_table(found: dict[str, dict[int, Run]]) -> str:
    """{task: {seed: run}} as a narrow table: success of all seeds before and after, and the time of one."""
    lines = []
    for name, by_seed in found.items():
        cloned, _, best = pooled(by_seed)
        lines.append((name, cloned.split()[0], best, len(by_seed), mean_minutes(by_seed)))
    return runs.table("| task | cloned | fine-tuned | seeds | minutes |", "|---|---:|---|---:|---:|", lines)


def seeds_table(found: dict[str, dict[int, Run]]) -> str:
    """{task: {seed: run}} with a line for every run."""
    lines = []
    for name, by_seed in found.items():
        for seed, run in by_seed.items():
            episodes = run.args["eval_episodes"]
            cloned, *final = rates(run)
            cells = [f"{cloned:.2f}", *(rate_cell(round(rate * episodes), episodes) for rate in final)]
            cells.append(str(run.args["eval_interval_episodes"]))
            steps, success = run.series("eval/bon_success")
            for level in (0.8, 0.9):
                reached = (f"{step:,}" for step, value in zip(steps, success, strict=True) if value >= level)
                cells.append(next(reached, "-"))
            lines.append((name, seed, *cells, f"{run.metrics[-1]['step']:,}", f"{run.minutes:.0f}"))
    return runs.table(
        "| task | seed | cloned | ODE policy | best-of-N policy | look | steps to 0.8 | to 0.9 | steps | minutes |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|---:|",
        lines,
    )


def parts_table(name: str) -> str:
    """The tasks of a set, one by one: final success of the acting policy."""
    found = stored(name)
    lines = [
        (part, *(f"{run.last(f'final/bon_success/{part}'):.2f}" for run in found.values()))
        for part in TASKS[name].tasks
    ]
    return runs.table(
        f"| task | {' | '.join(f'seed {seed}' for seed in found)} |", "|---|" + "---:|" * len(found), lines
    )


def tables() -> dict[str, str]:
    found = {name: stored(name) for name in NAMES}
    return {
        "tasks/summary": summary_table(),
        "tasks/short": short_table(found),
        "tasks/seeds": seeds_table(found),
        "tasks/mt10": parts_table("mt10"),
    }


def report() -> None:
    text = [
        "# OGPO on the task suite: stored results",
        "",
        "All seeds of a task together: successes over all episodes of their last evaluations, with the Wilson 95 % "
        "interval of that many episodes; mean wall time.",
        "",
        summary_table(),
        "",
        "Made by `python benchmarks/tasks.py report`; `laptop` settings. Success over the last evaluation's episodes "
        "with Wilson 95 % interval: cloned policy (noise-free), both policies at the end. Steps to 0.8 and 0.9: the "
        "first evaluation during training (best-of-N policy; *look*: its episodes, the same ones each time) at that "
        "level. Wall time: the whole command, two or three runs at a time on two cores.",
        "",
        seeds_table({name: stored(name) for name in NAMES}),
        "",
        "## mt10, by task: best-of-N policy",
        "",
        parts_table("mt10"),
    ]
    (STORE / "results.md").write_text("\n".join(text) + "\n")
    plot()


def plot() -> None:
    """Success over environment steps, a panel a task."""
    figure, axes = plots.panels(3, 4, 3.2, 2.6, sharey=True)
    for axis in axes.flat[len(NAMES) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, NAMES, strict=False):
        plots.draw_runs(axis, stored(name).values())
        axis.set(title=name)
    plots.success_axes(axes.flat)
    figure.supylabel("success")
    figure.supxlabel("environment steps")
    figure.legend(*plots.one_label_each(axes[0, 0]), loc="outside upper center", ncols=2)
    figure.savefig(STORE / "curves.png", dpi=110)


def frames() -> None:
    """Three moments of an episode of the finished policy, one task a family."""
    import imageio.v2 as imageio
    from PIL import Image

    rows = []
    for name in FRAMES:
        pictures = imageio.mimread(RUNS / f"task_{name}_s{SEEDS[0]}" / "after.mp4", memtest=False)
        end = next(i for i, p in enumerate(pictures) if abs(p[2:6, 2:-2].astype(int) - (40, 170, 70)).max() < 60)
        rows.append(np.concatenate([pictures[i] for i in (0, end // 2, end)], axis=1))
    Image.fromarray(np.concatenate(rows)).save(STORE / "frames.png", optimize=True)


def settings_tables() -> str:
    """The settings of every task as three narrow Markdown tables; tasks with the same ones share a line, or a few."""
    from ogpo_state import default_args
    from settings.ogpo import SOURCES

    def shown(names: list[str]) -> str:
        rest = {name for name in names if TASKS[name].suite == "metaworld" and name not in NAMES}
        if len(rest) < 10:
            return ", ".join(names)
        return ", ".join([*(name for name in names if name not in rest), "other Meta-World"])

    groups: tuple[dict[tuple[str, ...], list[str]], ...] = ({}, {}, {})
    for preset in ("laptop", "paper"):
        for name in TASKS:
            args = default_args(name, preset, "ogpo+ca")
            t, p, c = args.task, args.policy, args.critic
            made = TASKS[name].suite == "adroit" and preset == "laptop"
            demos = f"{t.num_demos} of a policy file, noise {t.demo_noise:g}" if made else t.demos
            if demos == "scripted":
                demos = (
                    f"{t.num_demos} scripted, noise {t.demo_noise:g}" if name not in NO_EXPERT else "a file of yours"
                )
            elif demos == "robomimic":
                demos = f"robomimic-{TASKS[name].datasets[0]}"
            cap = f"{t.horizon:,}" + (f" ({t.collect_horizon:,})" if t.collect_horizon else "")
            reward = f"{c.reward_offset:+g}, {c.success_bonus:+g}"
            best = f"{p.best_of_n}, {f'least of {n}' if (n := p.best_of_n_heads) else 'mean'}"
            lr, every, steps = f"{args.actor.actor_lr:g}", f"{args.run.update_every}", f"{args.run.total_steps:,}"
            start = f"Cal-QL {c.calql_steps}" if c.calql_steps else f"{c.critic_successes} successes"
            chains = "ancestral" if p.eta == 1 else f"{p.noise_std:g}"
            source = next(text for (s, task), text in SOURCES.items() if s == preset and fnmatch(name, task))
            rows = (
                (preset, cap, reward, demos, f"{args.pretrain.bc_stop_success:g}"),
                (preset, f"{p.chunk}", f"{p.flow_steps}", f"{c.gamma:g}", best, lr, every, steps),
                (preset, chains, f"{c.n_step}", f"{c.critic_scale:g}", start, source),
            )
            for group, cells in zip(groups, rows, strict=True):
                group.setdefault(cells, []).append(name)
    heads = (
        ("| task | preset | cap | reward | demonstrations | cloned to |", "|---|---|---:|---|---|---:|"),
        (
            "| task | preset | H | K | gamma | best of | actor lr | steps an update | steps |",
            "|---|---|---:|---:|---:|---|---:|---:|---:|",
        ),
        ("| task | preset | chains | n | scale | start | source |", "|---|---|---|---:|---:|---|---|"),
    )
    return "\n\n".join(
        runs.table(
            *head,
            [
                (line.rstrip(","), *cells)
                for cells, names in group.items()
                for line in wrap(shown(names), NAMES_WIDTH, break_on_hyphens=False)
            ],
        )
        for group, head in zip(groups, heads, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "store", "report", "frames", "settings"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--policies", type=Path, help="folder of trained Adroit policies")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.what == "run":
        sys.exit(run(args.jobs, args.tasks, args.seeds, args.policies))
    elif args.what == "settings":
        print(settings_tables())
    else:
        {"store": store, "report": report, "frames": frames}[args.what]()


if __name__ == "__main__":
    main()
