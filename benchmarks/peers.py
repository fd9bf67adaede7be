"""OGPO beside its peers at equal settings: one cloned policy per task and seed, the same networks, critics, schedule.

python benchmarks/peers.py tune --jobs 2               # one knob per method, four values each, on a seed of its own
python benchmarks/peers.py run --tasks lift --jobs 2   # resumable: finished runs are skipped
python benchmarks/peers.py store                       # keep the finished runs in peers/runs.jsonl.gz
python benchmarks/peers.py report                      # peers/results.md, peers/peers.png from peers/ alone

docs/baselines.md says what is equal, what is a method's own, and what was expected before the runs.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

import plots
import runs
import study_stats as stats
from common.jobs import execute_all
from runs import ROOT, RUNS, Run

STORE = ROOT / "benchmarks" / "peers"
SEEDS = {"toy": (1, 2, 3), "lift": (1, 2, 3, 4, 5), "can": (1, 2, 3), "peg-insert-side": (1, 2, 3)}
TUNED_ON = ("lift", 6)  # a seed outside the comparison
STEPS = {"toy": 0, "lift": 10_000, "can": 20_000, "peg-insert-side": 10_000}  # 0: the script's own
EVERY = {"lift": 1_000, "can": 2_000, "peg-insert-side": 1_000}  # steps between evaluations
LEVELS = (0.8, 0.9)


@dataclass(frozen=True)
class Method:
    """One curve: its title, script and flags, and the one knob that is tuned. `long`: times the others' steps."""

    title: str
    script: str
    knob: str
    values: tuple[str, ...]
    flags: tuple[str, ...] = ()
    long: int = 1


METHODS: dict[str, Method] = {
    "ogpo+ca": Method("OGPO+CA", "ogpo_state.py", "--clip", ("0.003", "0.01", "0.03", "0.1")),
    "qc": Method("QC", "baselines/qc.py", "--best-of-n", ("4", "8", "16", "32")),
    "qc_fql": Method("QC-FQL", "baselines/qc.py", "--alpha", ("0.3", "1", "3", "10"), ("--policy", "one-step")),
    "dsrl": Method("DSRL-NA", "baselines/dsrl.py", "--noise-range", ("1", "1.5", "2", "3")),
    "expo": Method("EXPO", "baselines/expo.py", "--edit-scale", ("0.05", "0.1", "0.3", "0.7")),
    "decorator": Method("Policy Decorator", "baselines/residual.py", "--scale", ("0.03", "0.1", "0.2", "0.3")),
    "dice": Method("DICE-RL", "baselines/residual.py", "--bc-weight", ("3", "10", "30", "100"), ("--method", "dice")),
    "trqam": Method("TRQAM", "baselines/qam.py", "--budget", ("0.1", "0.5", "1", "3")),
    "qf3": Method("QF3", "baselines/qf3.py", "--velocity-clip", ("0.02", "0.06", "0.12", "0.3")),
    "dppo": Method("DPPO", "baselines/dppo.py", "--actor-lr", ("3e-5", "1e-4", "3e-4", "1e-3"), long=30),
    "reinflow": Method(
        "ReinFlow", "baselines/dppo.py", "--actor-lr", ("3e-5", "1e-4", "3e-4", "1e-3"),
        ("--noise", "learned", "--ratio", "chain"), long=30,
    ),
    "rlpd": Method("RLPD, no clone", "baselines/rlpd.py", "--actor-lr", ("1e-4", "3e-4", "1e-3", "3e-3")),
}  # fmt: skip
ALONE = ("rlpd",)  # methods without a cloned policy
TUNED: dict[str, str] = {}  # method -> the knob's value that `tune` chose, where it is not the script's default


def cloned(task: str, seed: int) -> Path:
    """Folder of the cloned policy of a task and seed: the study's stored one where there is one."""
    kept = ROOT / "benchmarks" / "study" / f"{task}_clone_s{seed}"
    return kept if (kept / "cloned.pt").exists() else RUNS / f"peers_{task}_clone_s{seed}"


def run_flags(task: str, method: str, seed: int, knob: str = "") -> tuple[str, list[str]]:
    """Script and flags of a run; `clone` makes the policy from which all others of the task and seed start."""
    flags = ["--env", task, "--seed", str(seed), "--no-video"]
    if method == "clone":
        return "ogpo_state.py", [*flags, "--total-steps", "0"]
    m = METHODS[method]
    flags += m.flags
    if STEPS[task]:
        flags += ["--total-steps", str(m.long * STEPS[task]), "--eval-every", str(m.long * EVERY[task])]
    if value := knob or TUNED.get(method, ""):
        flags += [m.knob, value]
    return m.script, flags if method in ALONE else [*flags, "--cloned", str(cloned(task, seed).relative_to(ROOT))]


def name_of(task: str, method: str, seed: int, knob: str = "") -> str:
    return f"{task}_{method}{f'_{knob}' if knob else ''}_s{seed}"


def run_one(task: str, method: str, seed: int, knob: str = "") -> int:
    """Exit code of one run; stored cloned policies are not made again."""
    if method == "clone" and cloned(task, seed).parent != RUNS:
        return 0
    script, flags = run_flags(task, method, seed, knob)
    return runs.execute(script, f"peers_{name_of(task, method, seed, knob)}", flags)


def run(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], jobs: int) -> int:
    """Exit code of all runs of some tasks and methods."""
    wanted = [(task, method, seed) for task in tasks for seed in seeds or SEEDS[task] for method in methods]
    return execute(wanted, jobs)


def tune(methods: Sequence[str], jobs: int) -> int:
    """Exit code of all trials of some methods: every value of their knob."""
    task, seed = TUNED_ON
    return execute([(task, method, seed, value) for method in methods for value in METHODS[method].values], jobs)


def execute(jobs: list[tuple], workers: int) -> int:
    clones = list(dict.fromkeys((job[0], "clone", job[2]) for job in jobs))
    return execute_all(
        run_one, [*clones, *jobs], workers, lambda job: None if job[1] == "clone" else (job[0], "clone", job[2])
    )


def store() -> None:
    """Keeps the finished runs, trials of tuning among them."""
    task, seed = TUNED_ON
    tuning = [name_of(task, method, seed, value) for method, m in METHODS.items() for value in m.values]
    names = [name_of(task, method, seed) for task in STEPS for method in METHODS for seed in SEEDS[task]]
    runs.keep(STORE, {name: RUNS / f"peers_{name}" for name in (*names, *tuning)})


def stored(task: str, method: str) -> dict[int, Run]:
    """{seed: run}"""
    return runs.read_seeds(STORE, f"{task}_{method}", SEEDS[task])


def acting(run: Run) -> str:
    """Name of the acting policy in the run's metrics."""
    return "act" if math.isfinite(run.last("final/act_success")) else "bon"


def steps_to(run: Run, level: float) -> float:
    """Environment steps at which the acting policy first evaluates at `level` or above; infinite if never."""
    steps, success = run.series(f"eval/{acting(run)}_success")
    return min(steps[success >= level], default=math.inf)


def final(run: Run, policy: str) -> tuple[float, np.ndarray]:
    """Success at the end, and draws of it from its posterior given its episodes (Jeffreys), (DRAWS,)."""
    rate, n = run.last(f"final/{policy}_success"), run.args["eval_episodes"]
    rng = np.random.default_rng([run.args["seed"], *policy.encode(), *run.name.encode()])
    return rate, rng.beta(n * rate + 0.5, n * (1 - rate) + 0.5, stats.DRAWS)


def interval_text(rates: Sequence[tuple[float, np.ndarray]]) -> str:
    """Interquartile mean over the seeds with its 95 % interval, and every seed's value."""
    values = np.array([value for value, _ in rates])
    middle, low, high = stats.interval(values, np.stack([drawn for _, drawn in rates], -1))
    return f"{middle:.2f} [{low:.2f}, {high:.2f}] ({' '.join(f'{value:.2f}' for value in values)})"


def difference_text(task: str, method: str) -> str:
    """Final success of the acting policy minus OGPO's from the same cloned policy."""
    one, two = stored(task, method), stored(task, "ogpo+ca")
    pairs = [(final(one[s], acting(one[s])), final(two[s], acting(two[s]))) for s in sorted(one.keys() & two.keys())]
    if method == "ogpo+ca" or not pairs:
        return "-"
    values = np.array([a[0] - b[0] for a, b in pairs])
    middle, low, high = stats.interval(values, np.stack([a[1] - b[1] for a, b in pairs], -1))
    return f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"


def task_table(task: str) -> str:
    """One line a method: steps to the levels, final success of both policies, difference to OGPO, minutes."""
    lines = []
    for method, m in METHODS.items():
        if not (found := list(stored(task, method).values())):
            continue
        reached = [
            " ".join(f"{steps:,.0f}" if math.isfinite(steps := steps_to(run, level)) else "never" for run in found)
            for level in LEVELS
        ]
        rates = [interval_text([final(run, policy or acting(run)) for run in found]) for policy in ("ode", "")]
        minutes = " ".join(f"{run.minutes:.1f}" for run in found)
        cloned = "-" if method in ALONE else " ".join(f"{run.first('eval/ode_success'):.2f}" for run in found)
        lines.append((m.title, cloned, *reached, *rates, difference_text(task, method), minutes))
    head = "| method | cloned | steps to 0.8 | to 0.9 | final, noise-free | final, acting | minus OGPO | minutes |"
    return runs.table(head, "|---|---|---|---|---|---|---|---|", lines)


def tuning_table() -> str:
    """Mean of the acting policy's evaluations over a run, by the value of the method's knob."""
    lines, (task, seed) = [], TUNED_ON
    for method, m in METHODS.items():
        trials = {value: runs.read(STORE).get(name_of(task, method, seed, value)) for value in m.values}
        areas = [f"{v}: {r.series(f'eval/{acting(r)}_success')[1].mean():.2f}" for v, r in trials.items() if r]
        if areas:
            lines.append((m.title, f"`{m.knob}`", ", ".join(areas), TUNED.get(method, "as it is")))
    return runs.table("| method | knob | area under the curve by value | taken |", "|---|---|---|---|", lines)


def tables() -> dict[str, str]:
    """Those that have runs."""
    found = {f"peers/{task}": task_table(task) for task in STEPS} | {"peers/tuning": tuning_table()}
    return {name: table for name, table in found.items() if table.count("\n") > 1}


def draw(axis: Axes, task: str, minutes: bool) -> None:
    """Success of the acting policy over steps or minutes: mean of the seeds, a line a method."""
    plots.success_axes([axis])
    shown = {method: m for method, m in METHODS.items() if m.long == 1}
    for (method, m), colour in zip(shown.items(), plots.PALETTE, strict=False):
        if not (found := list(stored(task, method).values())):
            continue
        curves = [run.series(f"eval/{acting(run)}_success") for run in found]
        length = min(len(steps) for steps, _ in curves)
        x = curves[0][0][:length]
        if minutes:  # evaluations are evenly spaced in a run, but for its start
            x = np.mean([run.minutes for run in found]) * x / x[-1]
        axis.plot(x, np.mean([values[:length] for _, values in curves], 0), "o-", color=colour, label=m.title, ms=3)
    axis.set_title(f"{task}: success over {'minutes' if minutes else 'environment steps'}", fontsize="medium")


def report() -> None:
    machines = sorted({run.machine["cpu"] for run in runs.read(STORE).values()})
    text = [
        "# OGPO beside its peers: stored results",
        "",
        "Made by `python benchmarks/peers.py report`. All methods of a task and seed start from one cloned policy, in "
        "the settings that docs/baselines.md lists. Steps at which the acting policy first evaluates at a level (20 "
        "episodes); final: 100 episodes, interquartile mean over seeds with 95 % interval (seeds in parentheses): a "
        "bootstrap over seeds, each rate drawn from its posterior given its episodes. "
        f"Trained on {', '.join(machines)}.",
    ]
    found = [task for task in STEPS if any(stored(task, method) for method in METHODS)]
    for task in found:
        text += ["", f"## {task}", "", task_table(task)]
    if "peers/tuning" in tables():
        text += ["", "## Tuning", "", f"{TUNED_ON[0]}, seed {TUNED_ON[1]}.", "", tuning_table()]
    shown = [task for task in found if task in EVERY]
    (STORE / "results.md").write_text("\n".join(text) + "\n")
    if not shown:
        return
    drawing, axes = plots.panels(2, len(shown), 4.6, 3.8, sharey=True)
    for column, task in enumerate(shown):
        for row in (0, 1):
            draw(axes[row, column], task, minutes=row == 1)
    axes[0, 0].legend(fontsize=8, loc="lower right")
    drawing.savefig(STORE / "peers.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "tune", "store", "report"))
    parser.add_argument("--tasks", nargs="+", choices=list(STEPS), default=list(EVERY))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="default: the task's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    STORE.mkdir(exist_ok=True)
    if args.what == "run":
        sys.exit(run(args.tasks, args.methods, args.seeds, args.jobs))
    if args.what == "tune":
        sys.exit(tune(args.methods, args.jobs))
    {"store": store, "report": report}[args.what]()


if __name__ == "__main__":
    main()
