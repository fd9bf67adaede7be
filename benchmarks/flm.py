"""FLM and FMLM on the embedded corpus: runs, ablations, judges' tables, figures.

python benchmarks/flm.py run                # resumable: finished runs are skipped; about an hour a seed on two cores
python benchmarks/flm.py judge --judge smollm2   # the same runs under another judge, about ten minutes a seed
python benchmarks/flm.py frontier           # seed 1: both samplers at several temperatures
python benchmarks/flm.py ablations          # equal budget, one seed: what the paper's choices bring
python benchmarks/flm.py time               # short runs for their speed; nothing else may run
python benchmarks/flm.py store              # keep the finished runs and their first samples in flm/runs.jsonl.gz
python benchmarks/flm.py report             # flm/results.md, flm/steps_JUDGE.png, flm/frontier.png from flm/ alone
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import plots
import runs
from common.judge.metrics import REAL, TextScore
from runs import ROOT, RUNS, Run

STORE = ROOT / "benchmarks" / "flm"
SEEDS = (1, 2, 3)
USUAL = 0.55  # the default temperature, which the runs themselves are evaluated at
TEMPERATURES = {"euler": (0.4, 0.7, 1.0), "bridge": (0.55, 0.7, 1.0)}
FRONTIER_STEPS = 32
PAPER = ("--conv", "0", "--self-condition", "0")  # the network of the paper
ABLATIONS: dict[str, list[str]] = {  # name -> script and flags
    "softmax_ce": ["flm_train.py", *PAPER, "--temperature", "1"],
    "softmax_mse": ["variants/flm_ablations.py", *PAPER],
    "raw_mse": ["variants/flm_ablations.py", *PAPER, "--no-softmax"],
    "velocity_mse": ["variants/flm_ablations.py", *PAPER, "--predict", "velocity", "--space", "onehot"],
    "no_reparam": ["flm_train.py", *PAPER, "--temperature", "1", "--no-reparam"],
    "onehot_noise": ["flm_train.py", *PAPER, "--temperature", "1", "--space", "onehot"],
}
TIMED = 100  # steps of the runs that are timed
METHODS = {"flm": "FLM", "fmlm": "FMLM"}
COLOURS = {"flm": "tab:blue", "fmlm": "tab:orange"}
JUDGES = ("ngram", "smollm2")
GAMMAS = ("0.5", "0.8", "1")


def run_one(script: str, name: str, flags: list[str]) -> None:
    if runs.execute(script, name, flags):
        raise SystemExit(f"{name} failed: see {RUNS / name}.txt")


def run(seeds: list[int], judge: str) -> None:
    for seed in seeds:
        common = ["--seed", str(seed), "--judge", judge]
        run_one("flm_train.py", f"flm_s{seed}", common)
        run_one("fmlm_distill.py", f"fmlm_s{seed}", [*common, "--teacher", f"runs/flm_s{seed}"])


def time() -> None:
    """A short run of each script with the default network and batch; nothing else may run beside."""
    steps = ["--total-steps", str(TIMED), "--log-every", "25", "--steps", "1", "--samples", "32"]
    run_one("flm_train.py", "flm_time", steps)
    run_one("fmlm_distill.py", "fmlm_time", [*steps, "--teacher", "runs/flm_time"])


def evaluate(script: str, run: str, *flags: str) -> None:
    subprocess.run([sys.executable, script, "--eval", str(RUNS / run), *flags], cwd=ROOT, check=True)


def judge(seeds: list[int], name: str) -> None:
    """Few of the step counts, under another judge. The samples are the same; making them again is what takes time."""
    for seed in seeds:
        for script, run in (("flm_train.py", f"flm_s{seed}"), ("fmlm_distill.py", f"fmlm_s{seed}")):
            if not (RUNS / run / f"evaluation_{name}.json").exists():
                evaluate(script, run, "--judge", name, "--steps", "1", "4", "16", "32")


def ablations(steps: int) -> None:
    for name, (script, *flags) in ABLATIONS.items():
        budget = ["--total-steps", str(steps), "--steps", "32", "128", "--seed", "1"]
        run_one(script, f"flm_ablation_{name}", [*budget, *flags])


def frontier() -> None:
    """Evaluations of the first seed's FLM: both samplers over temperature, and FMLM over gamma."""
    for sampler, temperatures in TEMPERATURES.items():
        for t in temperatures:
            flags = (f"--sampler={sampler}", f"--temperature={t}", f"--steps={FRONTIER_STEPS}")
            evaluate("flm_train.py", f"flm_s{SEEDS[0]}", *flags)
    for gamma in GAMMAS:
        evaluate("fmlm_distill.py", f"fmlm_s{SEEDS[0]}", "--gamma", gamma, "--steps", "2", "4", "8")


def results(folder: Path) -> dict[str, Any]:
    """Tables of a run's evaluations, and the first eight samples of each."""
    files: dict[str, Any] = {file.name: json.loads(file.read_text()) for file in folder.glob("evaluation*.json")}
    for file in (*folder.glob("samples_*_steps*.txt"), folder / "samples_real_text.txt"):
        files[file.name] = "\n----\n".join(file.read_text().split("\n----\n")[:8]) + "\n"
    return dict(sorted(files.items()))


def store() -> None:
    """Keeps what the docs quote of every finished run."""
    folders = (folder for folder in RUNS.glob("f*lm_*") if folder.is_dir())
    runs.keep(STORE, {folder.name: folder for folder in folders}, results)


def read_scores(run: Run, table: str) -> list[TextScore]:
    """Lines of evaluation_TABLE.json, that of real text last; empty if the run has no such table."""
    rows = run.files.get(f"evaluation_{table}.json", [])
    return [TextScore(**row | {"distances": tuple(row["distances"])}) for row in rows]


def stored(prefix: str, judge: str) -> dict[int, list[TextScore]]:
    """{seed: lines of the judge's table}, those that all seeds have."""
    found = {seed: read_scores(run, judge) for seed, run in runs.read_seeds(STORE, prefix, SEEDS).items()}
    shared = set.intersection(*({score.text for score in table} for table in found.values())) if found else set()
    return {seed: [score for score in table if score.text in shared] for seed, table in found.items()}


def judges() -> list[str]:
    """Those under which all seeds of both methods have been evaluated."""
    return [judge for judge in JUDGES if all(all(stored(prefix, judge).values()) for prefix in METHODS)]


def score_rows(label: str, found: dict[int, list[TextScore]]) -> list[tuple[str, ...]]:
    """One line of the table per number of steps that all seeds have: mean, and each seed's perplexity."""
    lines = []
    for first in next(iter(found.values())):
        scores = [score for table in found.values() for score in table if score.text == first.text]
        if len(scores) == len(found):
            perplexity, entropy, self_bleu, copied = np.mean(
                [(score.perplexity, score.entropy, score.self_bleu, score.copied) for score in scores], 0
            )
            distances = np.mean([score.distances for score in scores], 0)
            each = ", ".join(f"{score.perplexity:.1f}" for score in scores)
            name = first.text if first.text == REAL else f"{label}, {first.text}"
            cells = (f"{perplexity:.1f} ({each})", f"{entropy:.3f}", f"{self_bleu:.3f}")
            lines.append((name, *cells, " / ".join(f"{x:.3f}" for x in distances), f"{copied:.2%}"))
    return lines


def scores_table(judge: str) -> str:
    """Both methods under a judge, mean of the seeds."""
    return runs.table(
        "| text | perplexity (seeds) | entropy | self-BLEU-4 | JS | copied |",
        "|---|---|---:|---:|---|---:|",
        score_rows("FLM", stored("flm", judge))[:-1] + score_rows("FMLM", stored("fmlm", judge)),
    )


def calls_table(prefix: str) -> str:
    """Perplexity / entropy over the number of network calls, every seed, judge ngram."""
    found = stored(prefix, "ngram")
    return runs.table(
        f"| calls | {' | '.join(f'seed {seed}' for seed in found)} |",
        "|---|" + "---|" * len(found),
        [
            (
                "held-out text" if line[0].text == REAL else line[0].text.removesuffix(" steps"),
                *(f"{score.perplexity:,.0f} / {score.entropy:.2f}" for score in line),
            )
            for line in zip(*found.values(), strict=True)
        ],
    )


def minutes_table() -> str:
    """Time of training with the default settings, alone on two cores, from the speed over a few steps."""
    lines = []
    for prefix, method in METHODS.items():
        run, steps = runs.read(STORE)[f"{prefix}_time"], stored_steps(prefix)
        rate = float(np.median(run.series("time/tokens_per_second")[1]))
        step = run.args["batch"] * run.args["length"] / rate
        lines.append((method, f"{steps:,}", f"{step:.2f}", f"{steps * step / 60:.0f}"))
    return runs.table("| method | steps | seconds a step | minutes |", "|---|---:|---:|---:|", lines)


def stored_steps(prefix: str) -> int:
    """Optimizer steps of the stored runs of a method."""
    return int(next(iter(runs.read_seeds(STORE, prefix, SEEDS).values())).args["total_steps"])


def frontier_scores() -> dict[str, dict[float, TextScore]]:
    """{sampler: {temperature: line of the table}} of the first seed's FLM, the default sampler's among them."""
    run = runs.read(STORE)[f"flm_s{SEEDS[0]}"]
    found: dict[str, dict[float, TextScore]] = {}
    for sampler, temperatures in TEMPERATURES.items():
        end = {"euler": "", "bridge": "_p1"}[sampler]
        tables = {t: read_scores(run, f"ngram_{sampler}_t{t:g}{end}") for t in temperatures}
        found[sampler] = {t: table[0] for t, table in tables.items() if table}
    usual = [s for s in read_scores(run, "ngram") if s.text == f"{FRONTIER_STEPS} steps"]
    found["euler"][USUAL] = usual[0]
    return {sampler: dict(sorted(line.items())) for sampler, line in found.items()}


def frontier_table() -> str:
    lines = [
        (f"{sampler}, {t:g}", f"{s.perplexity:.1f}", f"{s.entropy:.3f}", f"{s.self_bleu:.3f}")
        for sampler, line in frontier_scores().items()
        for t, s in line.items()
    ]
    real = stored("flm", "ngram")[SEEDS[0]][-1]
    lines.append((REAL, f"{real.perplexity:.1f}", f"{real.entropy:.3f}", f"{real.self_bleu:.3f}"))
    return runs.table("| sampler, temperature | perplexity | entropy | self-BLEU-4 |", "|---|---:|---:|---:|", lines)


def gamma_table() -> str:
    """FMLM of the first seed, sampled with noise between the steps."""
    run = runs.read(STORE)[f"fmlm_s{SEEDS[0]}"]
    return runs.table(
        "| FMLM | perplexity | entropy | self-BLEU-4 |",
        "|---|---:|---:|---:|",
        [
            (f"gamma {gamma}, {s.text}", f"{s.perplexity:.1f}", f"{s.entropy:.3f}", f"{s.self_bleu:.3f}")
            for gamma in GAMMAS
            for s in read_scores(run, f"ngram_gamma{gamma}")[:-1]
        ],
    )


def ablations_table() -> str:
    lines = []
    for name in ABLATIONS:
        run = runs.read(STORE)[f"flm_ablation_{name}"]
        proper = (
            run.args.get("softmax", True) and run.args.get("predict", "denoiser") == "denoiser"
        )  # else no cross entropy
        cross_entropy = f"{run.last('valid/ce'):.3f}" if proper else "-"
        scores = [f"{score.perplexity:.1f}, {score.entropy:.2f}" for score in read_scores(run, "ngram")[:2]]
        lines.append((name, cross_entropy, *scores))
    return runs.table(
        "| what | validation CE | perplexity, entropy in 32 calls | in 128 calls |", "|---|---:|---:|---:|", lines
    )


def ablations_detail_table() -> str:
    """The ablations in 128 calls, with the measures beside perplexity that tell a poor vocabulary."""
    lines = []
    for name in ABLATIONS:
        _, score, *_ = read_scores(runs.read(STORE)[f"flm_ablation_{name}"], "ngram")
        perplexity = f"{score.perplexity:,.0f}" if score.perplexity < 1e6 else f"{score.perplexity:.1e}"
        distances = " / ".join(f"{x:.2f}" for x in score.distances[:2])
        lines.append((name, perplexity, f"{score.entropy:.2f}", distances, f"{score.self_bleu:.2f}"))
    return runs.table("| what | perplexity | entropy | JS 1 / 2 | self-BLEU-4 |", "|---|---:|---:|---:|---:|", lines)


def tables() -> dict[str, str]:
    return {
        **{f"flm/{judge}": scores_table(judge) for judge in judges()},
        **{f"{prefix}/calls": calls_table(prefix) for prefix in METHODS},
        "flm/minutes": minutes_table(),
        "flm/frontier": frontier_table(),
        "flm/gamma": gamma_table(),
        "flm/ablations": ablations_table(),
        "flm/ablations-detail": ablations_detail_table(),
    }


def report() -> None:
    text = [
        "# FLM and FMLM on the embedded corpus: stored results",
        "",
        "Made by `python benchmarks/flm.py report`. Mean over the seeds, each seed's perplexity in brackets. JS: "
        "Jensen-Shannon divergence of 1-, 2- and 3-grams from held-out text, bits. Copied: share of 8-grams that "
        "occur in the training rows. 256 samples a line.",
    ]
    for judge in judges():
        unit = next(iter(stored("flm", judge).values()))[0].unit
        text += ["", f"## Judge {judge}, perplexity per {unit}", "", scores_table(judge)]
        plot_scores(judge)
    text += [
        "",
        f"Time of training alone on two cores, by the speed over {TIMED} steps (`python benchmarks/flm.py time`); the "
        "final evaluation comes on top. The runs above had one thread each, beside others.",
        "",
        minutes_table(),
        "",
        f"## Temperature, {FRONTIER_STEPS} calls, seed {SEEDS[0]}",
        "",
        frontier_table(),
        "",
        gamma_table(),
        "",
        "## Ablations: equal steps, seed 1",
        "",
        ablations_table(),
    ]
    (STORE / "results.md").write_text("\n".join(text) + "\n")
    plot_frontier()


def plot_scores(judge: str) -> None:
    """Perplexity and entropy of both methods over the number of network calls: seeds thin, their mean thick."""
    figure, axes = plots.panels(1, 2, 5, 4)
    (perplexity, entropy), real = axes[0], stored("flm", judge)[SEEDS[0]][-1]
    shown: set[int] = set()
    for prefix, method in METHODS.items():
        found = [table[:-1] for table in stored(prefix, judge).values()]
        shared = [
            text for text in (s.text for s in found[0]) if all(text in [s.text for s in table] for table in found)
        ]
        calls = [int(text.split()[0]) for text in shared]
        shown.update(calls)
        for axis, measure in ((perplexity, "perplexity"), (entropy, "entropy")):
            curves = np.array([[getattr(s, measure) for s in table if s.text in shared] for table in found])
            axis.plot(calls, curves.T, color=COLOURS[prefix], alpha=0.3, linewidth=1)
            axis.plot(calls, curves.mean(0), "o-", color=COLOURS[prefix], linewidth=2.5, label=method)
    for axis, level in ((perplexity, real.perplexity), (entropy, real.entropy)):
        axis.axhline(level, color="black", linestyle="--", linewidth=1, label=REAL)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(shown), sorted(shown))
        axis.minorticks_off()
        axis.set(xlabel="network calls (thin: seeds)")
        axis.grid(alpha=0.3)
    perplexity.set(yscale="log", ylabel=f"perplexity ({real.judge}, per {real.unit})")
    entropy.set(ylabel="entropy of a sample's tokens (nats)")
    figure.legend(*perplexity.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(STORE / f"steps_{judge}.png", dpi=150)


def plot_frontier() -> None:
    """Perplexity against entropy: both samplers over temperature, FMLM over the number of calls."""
    figure, axes = plots.panels(1, 1, 6, 4)
    axis, real = axes[0, 0], stored("flm", "ngram")[SEEDS[0]][-1]
    lines, student = frontier_scores(), stored("fmlm", "ngram")[SEEDS[0]]
    curves = {
        "FLM, Euler, 32 calls, temperature": ("o-", {f"{t:g}": score for t, score in lines["euler"].items()}),
        "FLM, bridge, 32 calls, temperature": ("^-", {f"{t:g}": score for t, score in lines["bridge"].items()}),
        "FMLM, number of calls": ("s-", {score.text.removesuffix(" steps"): score for score in student[:-1]}),
    }
    for i, (label, (style, points)) in enumerate(curves.items()):
        entropy, perplexity = np.array([(s.entropy, s.perplexity) for s in points.values()]).T
        axis.plot(entropy, perplexity, style, color=f"C{i}", label=label)
        for name, x, y in zip(points, entropy, perplexity, strict=True):
            away = dict(xytext=(-6, 4), ha="right") if i == 0 else dict(xytext=(7, -3))
            axis.annotate(name, (x, y), fontsize=8, color=f"C{i}", textcoords="offset points", **away)
    axis.plot([real.entropy], [real.perplexity], "k*", markersize=12, label=REAL)
    axis.set(xlabel="entropy of a sample's tokens (nats)", ylabel=f"perplexity ({real.judge})", yscale="log")
    axis.margins(0.08)
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(STORE / "frontier.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "judge", "frontier", "ablations", "time", "store", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--judge", default="ngram")
    parser.add_argument("--total-steps", type=int, default=1_000)
    args = parser.parse_args()
    if args.what == "run":
        run(args.seeds, args.judge)
    elif args.what == "judge":
        judge(args.seeds, args.judge)
    elif args.what == "ablations":
        ablations(args.total_steps)
    else:
        {"frontier": frontier, "time": time, "store": store, "report": report}[args.what]()


if __name__ == "__main__":
    main()
