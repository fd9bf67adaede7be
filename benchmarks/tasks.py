"""OGPO on the task suite: runs every task and seed, stores their metrics, makes the table and the figures of the docs.

python benchmarks/tasks.py run --jobs 2 --tasks can square     # resumable: finished runs are skipped
python benchmarks/tasks.py run --tasks door pen --policies DIR  # Adroit: trained policies DIR/pol_TASK.npz
python benchmarks/tasks.py store               # copy args.json and metrics.jsonl.gz of finished runs to tasks/
python benchmarks/tasks.py report              # tasks/results.md, tasks/curves.png from tasks/ alone
python benchmarks/tasks.py frames              # tasks/frames.png from the runs' videos
python benchmarks/tasks.py settings            # the table of settings in docs/tasks.md
"""

import argparse
import os
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from runs import ROOT, RUNS, arguments, execute, execute_all, keep, kept, last, metrics, minutes, series

sys.path.insert(0, str(ROOT))
from common.envs import TASKS
from common.evaluate import wilson
from common.settings import SOURCES

STORE = ROOT / "benchmarks" / "tasks"
SEEDS = (1, 2, 3)
NAMES = [
    *("can", "square", "peg-insert-side", "assembly", "hand-insert", "pick-place", "mt10"),
    *("door", "hammer", "pen", "relocate"),
]
HEAD = (
    "| task | seed | cloned | ODE policy | best-of-N policy | look | steps to 0.8 | to 0.9 | steps | minutes |",
    "|---|---:|---:|---|---|---:|---:|---:|---:|---:|",
)
SUMMARY = (
    "| task | aim | cloned | ODE policy | best-of-N policy | best-of-N, each seed | minutes |",
    "|---|---:|---|---|---|---|---:|",
)
AIMS = {
    **dict.fromkeys(("can", "peg-insert-side", "assembly", "door", "hammer"), 0.95),
    **dict.fromkeys(("square", "mt10"), 0.85),
    "pen": 0.8,
}
FRAMES = ("can", "peg-insert-side", "hammer")  # one task a family


def run(jobs: int, names: list[str], seeds: list[int], policies: Path | None) -> int:
    def one(name: str, seed: int) -> int:
        flags = ["--env", name, "--preset", "cpu", "--seed", str(seed)]
        if TASKS[name].suite == "adroit":
            if policies is None:
                sys.exit(f"{name} has no expert of its own: give --policies DIR with trained policies pol_TASK.npz")
            flags += ["--demos", str(policies.resolve() / f"pol_{name}.npz")]
        return execute("ogpo_state.py", f"task_{name}_s{seed}", flags)

    return execute_all(one, [(name, seed) for seed in seeds for name in names], jobs)


def stored(name: str) -> dict[int, Path]:
    return kept(STORE, name, SEEDS)


def interval(wins: int, episodes: int) -> str:
    low, high = wilson(wins, episodes)
    return f"{wins / episodes:.2f} [{low:.2f}, {high:.2f}]"


def summary(name: str, folders: dict[int, Path]) -> str:
    """All seeds of a task as one line: pooled rates, whose interval is that of the episodes, not of the seeds."""
    cells, runs = [], [metrics(folder) for folder in folders.values()]
    episodes = [arguments(folder)["eval_episodes"] for folder in folders.values()]
    for key, pick in (("eval/ode_success", 0), ("final/ode_success", -1), ("final/bon_success", -1)):
        rates = [series(rows, key)[1][pick] for rows in runs]
        wins = sum(round(rate * n) for rate, n in zip(rates, episodes, strict=True))
        cells.append(interval(wins, sum(episodes)))
    cells.append(", ".join(f"{rate:.2f}" for rate in rates))  # of the last key
    cells.append(f"{np.mean([minutes(folder) for folder in folders.values()]):.0f}")
    return f"| {name} | {AIMS.get(name, '-')} | {' | '.join(cells)} |"


def line(name: str, seed: int, folder: Path) -> str:
    rows, args = metrics(folder), arguments(folder)
    episodes = args["eval_episodes"]
    cells = [f"{series(rows, 'eval/ode_success')[1][0]:.2f}"]
    for policy in ("ode", "bon"):
        rate = last(rows, f"final/{policy}_success")
        cells.append(interval(round(rate * episodes), episodes))
    cells.append(str(args["eval_interval_episodes"]))
    steps, success = series(rows, "eval/bon_success")
    for level in (0.8, 0.9):
        cells.append(next((f"{s:,}" for s, v in zip(steps, success, strict=True) if v >= level), "-"))
    return f"| {name} | {seed} | {' | '.join(cells)} | {rows[-1]['step']:,} | {minutes(folder):.0f} |"


def report() -> None:
    text = [
        "# OGPO on the task suite: stored results",
        "",
        "All seeds of a task together: successes over all episodes of their last evaluations, with the Wilson 95 % "
        "interval of that many episodes; mean wall time.",
        "",
        *SUMMARY,
        *(summary(name, stored(name)) for name in NAMES if stored(name)),
        "",
        "Made by `python benchmarks/tasks.py report`; `cpu` settings. Success over the last evaluation's episodes with "
        "Wilson 95 % interval: cloned policy (noise-free), both policies at the end. Steps to 0.8 and 0.9: the "
        "first evaluation during training (best-of-N policy; *look*: its episodes, the same ones each time) at that "
        "level. Wall time: the whole command, two or three runs at a time on two cores.",
        "",
        *HEAD,
    ]
    for name in NAMES:
        text += [line(name, seed, folder) for seed, folder in stored(name).items()]
    for name in NAMES:
        if not (TASKS[name].tasks and stored(name)):
            continue
        text += ["", f"## {name}, by task: best-of-N policy", ""]
        runs = {seed: metrics(folder) for seed, folder in stored(name).items()}
        text += [f"| task | {' | '.join(f'seed {seed}' for seed in runs)} |", "|---|" + "---:|" * len(runs)]
        for task in TASKS[name].tasks:
            rates = [f"{last(rows, f'final/bon_success/{task}'):.2f}" for rows in runs.values()]
            text.append(f"| {task} | {' | '.join(rates)} |")
    (STORE / "results.md").write_text("\n".join(text) + "\n")
    plot()


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in NAMES if stored(name)]
    if not names:
        return
    columns = min(4, len(names))
    figure, axes = plt.subplots(
        -(-len(names) // columns), columns, figsize=(3.2 * columns, 2.6 * -(-len(names) // columns)),
        layout="constrained", squeeze=False, sharey=True,
    )  # fmt: skip
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        for folder in stored(name).values():
            rows = metrics(folder)
            axis.plot(*series(rows, "train/success"), color="tab:orange", alpha=0.4, linewidth=1)
            axis.plot(*series(rows, "eval/bon_success"), "o-", color="tab:blue", alpha=0.7, markersize=3)
        axis.set(title=name, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("success")
    figure.supxlabel("environment steps (orange: last 20 training episodes; blue: evaluations)")
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


def settings_table() -> list[str]:
    """The settings of every task as lines of a Markdown table; neighbours with the same ones share a line."""
    from ogpo_state import default_args

    groups: dict[tuple[str, ...], list[str]] = {}
    for preset in ("cpu", "paper"):
        for name in TASKS:
            args = default_args(name, preset, "ogpo+ca")
            t, p, b = args.task, args.policy, args.pretrain
            made = TASKS[name].suite == "adroit" and preset == "cpu"
            demos = f"{t.num_demos} of a policy file, noise {t.demo_noise:g}" if made else t.demos
            if demos == "scripted":
                demos = f"{t.num_demos} scripted, noise {t.demo_noise:g}"
            elif demos == "robomimic":
                demos = f"robomimic-{TASKS[name].datasets[0]}"
            cells = (
                preset, f"{p.chunk}", f"{p.flow_steps}", f"{args.critic.gamma:g}",
                f"{t.horizon:,}" + (f" ({t.collect_horizon:,})" if t.collect_horizon else ""),
                f"{args.critic.reward_offset:+g}, {args.critic.success_bonus:+g}", demos,
                f"{b.bc_stop_success:g}", f"{p.best_of_n}, {f'least of {n}' if (n := p.best_of_n_heads) else 'mean'}",
                f"{args.actor.actor_lr:g}", f"{args.loop.update_every}",
                f"{args.loop.total_steps:,}",
                next(text for (s, task), text in SOURCES.items() if s == preset and fnmatch(name, task)),
            )  # fmt: skip
            groups.setdefault(cells, []).append(name)
    head = "| task | preset | H | K | gamma | cap | reward | demonstrations | cloned to | best of | actor lr | steps "
    head += "an update | steps | source |"
    return [head, "|---|---|---:|---:|---:|---:|---|---|---:|---|---:|---:|---:|---|"] + [
        f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in groups.items()
    ]


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
    elif args.what == "store":
        for name in NAMES:
            for seed in SEEDS:
                keep(RUNS / f"task_{name}_s{seed}", STORE / f"{name}_s{seed}")
    elif args.what == "settings":
        print("\n".join(settings_table()))
    else:
        {"report": report, "frames": frames}[args.what]()


if __name__ == "__main__":
    main()
