"""FLM and FMLM beside AR, MDLM, Duo and their students, at equal settings and at the entropy of held-out text.

python benchmarks/text_peers.py tune --data austen      # three learning rates a teacher, on a seed of its own
python benchmarks/text_peers.py run --data toy          # resumable: finished runs are skipped; teachers first
python benchmarks/text_peers.py run --budget seconds    # AR, MDLM and Duo again, for as long as FLM has trained
python benchmarks/text_peers.py evaluate                # resumable: every finished run on its grid of samplers
python benchmarks/text_peers.py evaluate --judge smollm2
python benchmarks/text_peers.py store                   # keep the finished runs in text_peers/runs.jsonl.gz
python benchmarks/text_peers.py report                  # text_peers/results.md and figures from text_peers/ alone

docs/baselines.md says what is equal, what is a method's own, and what was expected before the runs.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import runs
import text_configs as configs
import text_report
import text_stats as stats
from common import cli
from common.errors import UserError
from common.jobs import execute_all
from common.judge import JUDGES
from common.judge.metrics import REAL, Judge
from common.text import TextData, load_text, toy_probabilities
from common.text_run import load_judge
from runs import ROOT
from text_configs import DATA, METHODS, SEEDS, STORE, TEACHERS, TIMED, TUNED, TUNED_AT, TUNED_ON, Job

# --- Runs and their evaluations --------------------------------------------------------------------------------------


def run_flags(data: str, method: str, seed: int, kind: str = "") -> list[str]:
    m = METHODS[method]
    taken = [m.taken_by, str(configs.folder_of(data, m.teacher, seed).relative_to(ROOT))]
    flags = ["--seed", str(seed), *m.flags, *(taken if m.teacher else ["--data", data])]
    trial = kind not in ("", "seconds")
    if method != "ar":
        flags += ["--steps", *map(str, (TUNED_AT,) if trial else configs.calls_of(method))]
    if kind == "seconds":
        flags += ["--total-steps", str(equal_seconds(data, method, seed))]
    if rate := kind if trial else TUNED.get((data, method), ""):
        flags += ["--lr", rate]
    return flags


def equal_seconds(data: str, method: str, seed: int) -> int:
    """Steps in which a method trains as long as FLM of this seed, by the speed that the runs of equal tokens logged.

    Raises UserError if one of these runs is not finished.
    """
    pair = [(name, configs.folder_of(data, name, seed)) for name in (method, "flm")]
    if missing := [folder.name for _, folder in pair if not runs.is_finished(folder)]:
        raise UserError(
            f"--budget seconds takes its steps from the speed of {missing[0]}, which is not finished; first: python "
            f"benchmarks/text_peers.py run --data {data} --methods {method} flm --seeds {seed}"
        )
    one, other = (runs.load(*named) for named in pair)
    return round(other.args["total_steps"] * stats.seconds_a_step(other) / stats.seconds_a_step(one))


def run_one(*job: Any) -> int:
    return runs.execute(METHODS[job[1]].script, configs.folder_of(*job).name, run_flags(*job))


def run(data: Sequence[str], methods: Sequence[str], seeds: Sequence[int], budget: str, jobs: int) -> int:
    """Exit code of all runs, those of the students' teachers among them."""
    if budget == "seconds":
        wanted: list[Job] = [(d, m, seed, "seconds") for d, seed, m in product(data, seeds, methods) if m in TIMED]
        for job in wanted:
            equal_seconds(*job[:3])  # complains before anything is run
    else:
        needed = [m for m in METHODS if m in methods or m in {METHODS[name].teacher for name in methods}]
        wanted = [(d, m, seed, "") for d, seed, m in product(data, seeds, needed)]
    return execute_all(run_one, wanted, jobs, lambda job: (job[0], METHODS[job[1]].teacher, *job[2:]))


def tune(data: Sequence[str], methods: Sequence[str], jobs: int) -> int:
    """Exit code of the trials, and of the evaluations of those that a likelihood cannot judge."""
    trials = [(d, m, TUNED_ON, rate) for d in data for m in methods if m in TEACHERS for rate in DATA[d]]
    failed = execute_all(run_one, trials, jobs)
    return failed or evaluate([job for job in trials if job[1] == "flm"], "ngram", jobs)


def evaluate_one(job: Job, judge: str, tag: str) -> int:
    """Exit code of one evaluation, whose output goes behind that of the run."""
    data, method, _, kind = job
    folder = configs.folder_of(*job)
    calls = configs.calls_of(method, tag, judge) if kind in ("", "seconds") else (TUNED_AT,)
    steps = ["--steps", *map(str, calls)] if method != "ar" else []
    flags = [*configs.grid(data, method)[tag], "--judge", judge, *steps]
    command = [sys.executable, METHODS[method].script, "--eval", str(folder), *flags]
    with open(f"{folder}.txt", "a") as out:
        return subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT).returncode


def evaluate(jobs: Sequence[Job], judge: str, workers: int) -> int:
    """Exit code of the evaluations of finished runs that have not been made yet."""
    found = [job for job in jobs if runs.is_finished(configs.folder_of(*job))]
    missing = [
        (job, judge, tag)
        for job in found
        for tag in configs.grid(*job[:2])
        if not (configs.folder_of(*job) / f"evaluation_{judge}{tag}.json").exists()
    ]
    print(f"{len(found)} finished runs, {len(missing)} evaluations to make")
    return execute_all(evaluate_one, missing, workers)


# --- What is stored --------------------------------------------------------------------------------------------------


@functools.cache
def corpus(data: str, length: int) -> tuple[TextData, Judge | None]:
    """The rows that a run has trained on, and its n-gram judge; the toy language has its law instead."""
    text = load_text(data, length=length, data_dir=ROOT / "data")
    return text, None if data == "toy" else load_judge("ngram", "", text, ROOT / "data", "cpu")


def results(folder: Path) -> dict[str, Any]:
    """points: a line of every evaluation; nats: of held-out tokens, by simple models and the run; samples."""
    args = json.loads((folder / "args.json").read_text())["args"]
    data, judge = corpus(args["data"], args["length"])
    points, samples, nats = [], {}, stats.ngram_nats(data.train, data.valid[:1024], data.tokenizer.vocab_size)
    for file in sorted(folder.glob("evaluation_*.json")):
        by, tag = re.fullmatch(r"evaluation_([^_]+)(.*)", file.stem).groups()
        for row in json.loads(file.read_text()):
            point = row | {"judge": by, "tag": tag, "calls": 0 if row["text"] == REAL else int(row["text"].split()[0])}
            name = f"samples_{row['text'].replace(' ', '_')}{tag}.txt"
            texts = (folder / name).read_text().removesuffix("\n").split("\n----\n")
            if data.name == "toy":
                point |= stats.language(texts)
            elif by == judge.name:
                point["error"] = stats.sampling_error(texts, data.tokenizer.encode_batch(texts), judge)
            points.append(point)
            if not tag:
                samples[name] = texts[:3]
    if data.name == "toy":
        law, rows = toy_probabilities(), data.valid[:1024].tolist()
        nats["true"] = float(-np.mean([np.log(law[tuple(row)]) for row in rows]) / len(rows[0]))
    for name, key in (("entropy", "held_out_nll"), ("likelihood", "valid/elbo"), ("bound", "valid/bound")):
        if (file := folder / f"{name}.json").exists():
            nats["model"] = json.loads(file.read_text())[key]
    return {"points": points, "nats": nats} | samples


def store() -> None:
    """Keeps the finished runs, trials of tuning among them."""
    jobs = [*product(DATA, METHODS, SEEDS, ("", "seconds"))]
    jobs += [(data, method, TUNED_ON, rate) for data in DATA for method in TEACHERS for rate in DATA[data]]
    STORE.mkdir(exist_ok=True)
    folders = {configs.name_of(*job): configs.folder_of(*job) for job in jobs}
    print(f"kept {len(runs.keep(STORE, folders, results))} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "evaluate", "store", "report"))
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--budget", choices=("tokens", "seconds"), default="tokens", help="what is equal in a run")
    parser.add_argument("--judge", choices=JUDGES, default="ngram")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    a = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if a.what == "run":
        sys.exit(run(a.data, a.methods, a.seeds, a.budget, a.jobs))
    if a.what == "tune":
        sys.exit(tune(a.data, a.methods, a.jobs))
    if a.what == "evaluate":
        sys.exit(evaluate([*product(a.data, a.methods, a.seeds, ("", "seconds"))], a.judge, a.jobs))
    {"store": store, "report": text_report.report}[a.what]()


if __name__ == "__main__":
    cli.run(main)
