"""The toy tasks of the quick starts, and the toy task with a dense reward: runs, stored metrics, tables.

python benchmarks/toy.py run      # resumable: finished runs are skipped; a minute or two each, one after the other
python benchmarks/toy.py store    # keep the finished runs in toy/runs.jsonl.gz
python benchmarks/toy.py report   # toy/results.md from toy/ alone
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

import runs
from common.jobs import execute_all
from runs import ROOT, RUNS, Run

STORE = ROOT / "benchmarks" / "toy"
COMMANDS: dict[str, list[str]] = {  # name -> script and flags
    "toy_state": ["ogpo_state.py", "--env", "toy"],
    "toy_pixels": ["ogpo_pixels.py", "--env", "toy"],
    "toy_flm": ["flm_train.py", "--data", "toy", "--steps", "1", "32"],
    "toy_fmlm": ["fmlm_distill.py", "--data", "toy"],
    "toy_fmlm_teacher": ["fmlm_distill.py", "--teacher", "runs/toy_flm"],
}
QUICK = tuple(COMMANDS)
DENSE = [  # from the demonstrations that toy_state has made
    *("ogpo_state.py", "--env", "benchmarks.dense_toy:DenseToy-v0", "--horizon", "40", "--eval-envs", "1"),
    *("--demos", "data/toy_scripted-v2_n40_noise0.3_seed0.hdf5", "--bc-eval-every", "50", "--bc-stop-success", "0.75"),
    *("--total-steps", "6000", "--start-training", "1000", "--eval-every", "2000"),
]
# What is added to every step and to success; 100 is 1 / (1 - gamma), the most that staying is worth.
REWARDS = {"toy_dense_raw": (0, 0), "toy_dense_bonus": (0, 100), "toy_dense_cost": (-1, 5)}
SEEDS = (1, 2, 3)
for _name, (_offset, _bonus) in REWARDS.items():
    for _seed in SEEDS:
        _flags = f"--reward-offset {_offset} --success-bonus {_bonus} --seed {_seed}"
        COMMANDS[f"{_name}_s{_seed}"] = [*DENSE, *_flags.split()]
DISTANCE = re.compile(r"^(\d+ steps|real text): total variation distance from the language (\S+)$", re.MULTILINE)


def run_one(name: str) -> int:
    """Exit code of one run."""
    script, *flags = COMMANDS[name]
    return runs.execute(script, name, flags)


def results(folder: Path) -> dict[str, Any]:
    """{text: total variation distance from the language} that a language model's evaluation printed."""
    found = DISTANCE.findall((RUNS / f"{folder.name}.txt").read_text())
    return {"distances": {text: float(distance) for text, distance in found}} if found else {}


def store() -> None:
    runs.keep(STORE, {name: RUNS / name for name in COMMANDS}, results)


def stored() -> dict[str, Run]:
    """{name: run}, in the order of COMMANDS."""
    found = runs.read(STORE)
    return {name: found[name] for name in COMMANDS if name in found}


def policies_table() -> str:
    """Success before and after, and the time of the whole command."""
    keys = ("final/ode_success", "final/bon_success")
    return runs.table(
        "| command | cloned | ODE policy | best-of-N policy | episodes | minutes |",
        "|---|---:|---:|---:|---:|---:|",
        [
            (
                f"`{' '.join(COMMANDS[name])}`",
                *(f"{rate:.2f}" for rate in (run.first("eval/ode_success"), *map(run.last, keys))),
                run.args["eval_episodes"],
                f"{run.minutes:.1f}",
            )
            for name, run in stored().items()
            if name in QUICK and "env" in run.args
        ],
    )


def dense_seeds() -> list[int]:
    """Seeds that are stored of every configuration."""
    return [seed for seed in SEEDS if all(f"{config}_s{seed}" in stored() for config in REWARDS)]


def dense_table() -> str:
    """Success before and after with a dense reward, mean and each seed, by what is added to it."""
    rows = []
    for config, (offset, bonus) in REWARDS.items():
        found = [stored()[f"{config}_s{seed}"] for seed in dense_seeds()]
        cloned = [run.first("eval/ode_success") for run in found]
        ode, best = ([run.last(f"final/{name}_success") for run in found] for name in ("ode", "bon"))
        means = (f"{np.mean(rates):.2f}" for rates in (cloned, ode, best))
        rows.append((f"{offset}, +{bonus}", *means, ", ".join(f"{rate:.2f}" for rate in best)))
    head = "| offset, bonus | cloned | ODE policy | best-of-N policy | best-of-N, each seed |"
    return runs.table(head, "|---|---:|---:|---:|---|", rows)


def language_table() -> str:
    """Total variation distance of the samples from the language, by number of network calls."""
    return runs.table(
        "| command | samples | text | distance | minutes |",
        "|---|---:|---|---:|---:|",
        [
            (f"`{' '.join(COMMANDS[name])}`", f"{run.args['samples']:,}", text, f"{distance:.3f}", f"{run.minutes:.1f}")
            for name, run in stored().items()
            for text, distance in run.files.get("distances", {}).items()
        ],
    )


def tables() -> dict[str, str]:
    return {"toy/policies": policies_table(), "toy/dense": dense_table(), "toy/language": language_table()}


def report() -> None:
    machines = {run.machine["cpu"] for run in stored().values()}
    text = [
        "# Toy tasks: stored results",
        "",
        f"Made by `python benchmarks/toy.py report`. Seed 1, one command at a time, on {', '.join(sorted(machines))} "
        "beside other work. Minutes: the whole command.",
        "",
        policies_table(),
        "",
        "The toy task with a dense reward, at most 1 a step, whose success ends the episode; mean over seeds "
        f"{', '.join(map(str, dense_seeds()))}, 100 episodes each. Other flags: "
        f"`{' '.join(DENSE)}`.",
        "",
        dense_table(),
        "",
        "Total variation distance of the samples from the toy language:",
        "",
        language_table(),
    ]
    (STORE / "results.md").write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "store", "report"))
    what = parser.parse_args().what
    if what == "run":  # one at a time, for their times
        sys.exit(execute_all(run_one, [(name,) for name in COMMANDS], workers=1))
    {"store": store, "report": report}[what]()


if __name__ == "__main__":
    main()
