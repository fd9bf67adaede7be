"""FLM and FMLM on the embedded corpus: runs, ablations, judges' tables, figures.

python benchmarks/flm.py run                # resumable: finished runs are skipped; about an hour a seed on two cores
python benchmarks/flm.py judge --judge smollm2   # the same runs under another judge, about ten minutes a seed
python benchmarks/flm.py frontier           # seed 1: bridge sampling at several temperatures
python benchmarks/flm.py ablations          # equal budget, one seed: what the paper's choices bring
python benchmarks/flm.py store              # copy args, metrics, tables and samples of finished runs to flm/
python benchmarks/flm.py report             # flm/results.md, flm/steps_JUDGE.png, flm/frontier.png from flm/ alone
"""

import argparse
import subprocess
import sys

import numpy as np

from runs import ROOT, RUNS, arguments, execute, keep, last, metrics, minutes

sys.path.insert(0, str(ROOT))
from common.judge.metrics import REAL, TextScore
from common.textplots import plot_scores, read_scores

STORE = ROOT / "benchmarks" / "flm"
SEEDS = (1, 2, 3)
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FRONTIER_STEPS = 32
ABLATIONS: dict[str, list[str]] = {
    "softmax_ce": [],
    "softmax_mse": ["--loss", "mse"],
    "raw_mse": ["--loss", "mse", "--no-softmax"],
    "velocity_mse": ["--loss", "mse", "--predict", "velocity", "--space", "onehot"],
    "no_reparam": ["--no-reparam"],
    "onehot_noise": ["--space", "onehot"],
}


def run_one(script: str, name: str, flags: list[str]) -> None:
    if execute(script, name, flags):
        raise SystemExit(f"{name} failed: see {RUNS / name}.txt")


def run(seeds: list[int], judge: str) -> None:
    for seed in seeds:
        common = ["--seed", str(seed), "--judge", judge]
        run_one("flm_train.py", f"flm_s{seed}", common)
        run_one("fmlm_distill.py", f"fmlm_s{seed}", [*common, "--teacher", f"runs/flm_s{seed}"])


def evaluate(script: str, run: str, *flags: str) -> None:
    subprocess.run([sys.executable, script, "--eval", str(RUNS / run), *flags], cwd=ROOT, check=True)


def judge(seeds: list[int], name: str) -> None:
    """Few of the step counts, under another judge. The samples are the same; making them again is what takes time."""
    for seed in seeds:
        for script, run in (("flm_train.py", f"flm_s{seed}"), ("fmlm_distill.py", f"fmlm_s{seed}")):
            if not (RUNS / run / f"evaluation_{name}.json").exists():
                evaluate(script, run, "--judge", name, "--steps", "1", "4", "16", "32")


def ablations(steps: int) -> None:
    for name, flags in ABLATIONS.items():
        budget = ["--total-steps", str(steps), "--steps", "32", "128", "--seed", "1"]
        run_one("flm_train.py", f"flm_ablation_{name}", [*budget, *flags])


def frontier() -> None:
    """Evaluations of the first seed's FLM: bridge sampling over temperature, and FMLM over gamma."""
    for t in TEMPERATURES:
        flags = ("--sampler=bridge", f"--temperature={t}", f"--steps={FRONTIER_STEPS}")
        evaluate("flm_train.py", f"flm_s{SEEDS[0]}", *flags)
    for gamma in ("0.5", "0.8", "1"):
        evaluate("fmlm_distill.py", f"fmlm_s{SEEDS[0]}", "--gamma", gamma, "--steps", "2", "4", "8")


def store() -> None:
    """Keeps what the docs quote of every finished run."""
    for folder in sorted(RUNS.glob("f*lm_*")):
        target = STORE / folder.name
        if folder.is_dir() and keep(folder, target, folder.glob("evaluation*.json")):
            for file in (*folder.glob("samples_*_steps*.txt"), folder / "samples_real_text.txt"):
                (target / file.name).write_text("\n----\n".join(file.read_text().split("\n----\n")[:8]) + "\n")


def stored(prefix: str, judge: str) -> dict[int, list[TextScore]]:
    """{seed: lines of the table} of the stored runs."""
    paths = {seed: STORE / f"{prefix}_s{seed}" / f"evaluation_{judge}.json" for seed in SEEDS}
    return {seed: read_scores(path) for seed, path in paths.items() if path.exists()}


def rows_of(label: str, runs: dict[int, list[TextScore]]) -> list[str]:
    """One line of the table per number of steps that all seeds have: mean, and each seed's perplexity."""
    lines = []
    for first in next(iter(runs.values())):
        scores = [score for scores in runs.values() for score in scores if score.text == first.text]
        if len(scores) < len(runs):
            continue
        mean = lambda key: float(np.mean([getattr(s, key) for s in scores]))  # noqa: B023, E731
        js = np.mean([s.distances for s in scores], 0)
        each = ", ".join(f"{s.perplexity:.1f}" for s in scores)
        name = first.text if first.text == REAL else f"{label}, {first.text}"
        lines.append(
            f"| {name} | {mean('perplexity'):.1f} ({each}) | {mean('entropy'):.3f} | {mean('self_bleu'):.3f} | "
            f"{' / '.join(f'{x:.3f}' for x in js)} | {mean('copied'):.2%} |"
        )
    return lines


def report() -> None:
    text = [
        "# FLM and FMLM on the embedded corpus: stored results",
        "",
        "Made by `python benchmarks/flm.py report`. Mean over the seeds, each seed's perplexity in brackets. JS: "
        "Jensen-Shannon divergence of 1-, 2- and 3-grams from held-out text, bits. Copied: share of 8-grams that "
        "occur in the training rows. 256 samples a line.",
    ]
    for judge in ("ngram", "smollm2"):
        flm, fmlm = stored("flm", judge), stored("fmlm", judge)
        if not flm or not fmlm:
            continue
        unit = next(iter(flm.values()))[0].unit
        text += ["", f"## Judge {judge}, perplexity per {unit}", ""]
        text += ["| text | perplexity (seeds) | entropy | self-BLEU-4 | JS | copied |", "|---|---|---:|---:|---|---:|"]
        text += rows_of("FLM", flm)[:-1] + rows_of("FMLM", fmlm)
        both = {f"FLM, seed {s}": v for s, v in flm.items()} | {f"FMLM, seed {s}": v for s, v in fmlm.items()}
        plot_scores(both, STORE / f"steps_{judge}.png", "embedded corpus, 256 samples a point")
    times = {p: [minutes(STORE / f"{p}_s{seed}") for seed in stored(p, "ngram")] for p in ("flm", "fmlm")}
    text += [
        "",
        "Seed 3 was timed alone on two cores; the other seeds ran side by side with one thread each, and their FMLM "
        "times lack what came before an interruption. Wall time, minutes, training and evaluation: ",
    ]
    text[-1] += "; ".join(f"{p} {', '.join(f'{m:.1f}' for m in ms)}" for p, ms in times.items()) + "."
    text += frontier_report() + ablation_report()
    (STORE / "results.md").write_text("\n".join(text) + "\n")


def frontier_report() -> list[str]:
    """Table and figure of the temperatures; empty if they are not stored."""
    folder = STORE / f"flm_s{SEEDS[0]}"
    files = {t: folder / f"evaluation_ngram_bridge_t{t:g}_p1.json" for t in TEMPERATURES}
    points = {t: read_scores(path) for t, path in files.items() if path.exists()}
    if not points:
        return []
    lines = ["", f"## Bridge sampling, {FRONTIER_STEPS} calls, seed {SEEDS[0]}: temperature", ""]
    lines += ["| temperature | perplexity | entropy | self-BLEU-4 |", "|---|---:|---:|---:|"]
    lines += [
        f"| {t:g} | {s[0].perplexity:.1f} | {s[0].entropy:.3f} | {s[0].self_bleu:.3f} |" for t, s in points.items()
    ]
    real = next(iter(points.values()))[-1]
    lines += [f"| {REAL} | {real.perplexity:.1f} | {real.entropy:.3f} | {real.self_bleu:.3f} |"]
    fmlm = {g: STORE / f"fmlm_s{SEEDS[0]}" / f"evaluation_ngram_gamma{g}.json" for g in ("0.5", "0.8", "1")}
    series = {f"FMLM, gamma {g}": read_scores(path) for g, path in fmlm.items() if path.exists()}
    if series:
        lines += ["", "| FMLM | perplexity | entropy | self-BLEU-4 |", "|---|---:|---:|---:|"]
        lines += [
            f"| {name[6:]}, {s.text} | {s.perplexity:.1f} | {s.entropy:.3f} | {s.self_bleu:.3f} |"
            for name, scores in series.items()
            for s in scores[:-1]
        ]
    plot_frontier({t: scores[0] for t, scores in points.items()}, stored("flm", "ngram"), real)
    return lines


def plot_frontier(bridge: dict[float, TextScore], flm: dict[int, list[TextScore]], real: TextScore) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot([s.entropy for s in bridge.values()], [s.perplexity for s in bridge.values()], "o-", label="FLM, bridge")
    for t, s in bridge.items():
        axis.annotate(f"T {t:g}", (s.entropy, s.perplexity), fontsize=8, xytext=(4, -8), textcoords="offset points")
    euler = flm[SEEDS[0]][:-1]
    axis.plot([s.entropy for s in euler], [s.perplexity for s in euler], "s-", label="FLM, Euler, 1 to 128 calls")
    axis.plot([real.entropy], [real.perplexity], "k*", markersize=12, label=REAL)
    axis.set(xlabel="entropy of a sample's tokens (nats)", ylabel=f"perplexity ({real.judge})", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(STORE / "frontier.png", dpi=150)


def ablation_report() -> list[str]:
    """Table of the ablations; empty if they are not stored."""
    lines = ["", "## Ablations: equal steps, seed 1", ""]
    lines += ["| what | validation CE | perplexity, entropy in 32 calls | in 128 calls |", "|---|---:|---:|---:|"]
    head = len(lines)
    for name in ABLATIONS:
        folder = STORE / f"flm_ablation_{name}"
        if (folder / "evaluation_ngram.json").exists():
            few, many = read_scores(folder / "evaluation_ngram.json")[:2]
            cells = [f"{s.perplexity:.1f}, {s.entropy:.2f}" for s in (few, many)]
            args = arguments(folder)
            proper = args["softmax"] and args["predict"] == "denoiser"  # else no cross entropy
            ce = f"{last(metrics(folder), 'valid/ce'):.3f}" if proper else "-"
            lines.append(f"| {name} | {ce} | {cells[0]} | {cells[1]} |")
    return lines if len(lines) > head else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "judge", "frontier", "ablations", "store", "report"))
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
        {"frontier": frontier, "store": store, "report": report}[args.what]()
