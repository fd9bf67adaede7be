"""Tables and figures of text_peers.py, from what it has stored alone."""

from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

import plots
import runs
import text_stats as stats
from common.errors import UserError
from common.judge import JUDGES
from common.judge.frontier import frontier
from common.judge.metrics import REAL
from runs import ROOT, Run
from text_configs import CALLS, COLOURS, DATA, METHODS, SEEDS, SHOWN, STORE, TEACHERS, TIMED, TUNED, TUNED_AT, TUNED_ON
from text_stats import Value

Curves = dict[tuple[str, str], dict[int, Value]]  # (method, kind) -> number of calls -> value


def stored(data: str, method: str, kind: str = "") -> list[Run]:
    """By seed."""
    return list(runs.read_seeds(STORE, f"{data}_{method}{kind and f'_{kind}'}", SEEDS).values())


def points(run: Run, judge: str, calls: int) -> list[dict[str, Any]]:
    """Lines of a run's evaluations in this number of calls, one a sampler; calls 0: real text."""
    return [point for point in run.files["points"] if (point["judge"], point["calls"]) == (judge, calls)]


def measures(point: dict[str, Any]) -> list[float]:
    """Entropy, perplexity, self-BLEU, copied, JS 1, 2, 3."""
    return [point["entropy"], point["perplexity"], point["self_bleu"], point["copied"], *point["distances"]]


def real_text(data: str, judge: str) -> list[float]:
    """Measures of held-out text, the same in every run."""
    return next(measures(p) for method in METHODS for run in stored(data, method) for p in points(run, judge, 0))


def means(data: str, method: str, judge: str, calls: int) -> dict[str, np.ndarray]:
    """{tag: measures}, mean of the seeds, of the samplers that all of them have."""
    found: dict[str, list[list[float]]] = {}
    for run in (some := stored(data, method)):
        for p in points(run, judge, run.args["length"] if method == "ar" else calls):
            found.setdefault(p["tag"], []).append(measures(p))
    return {tag: np.mean(seeds, 0) for tag, seeds in found.items() if len(seeds) == len(some)}


def title(method: str, kind: str) -> str:
    return METHODS[method].title + (f", FLM's {kind}" if kind else "")


def judges(data: str) -> list[str]:
    """Those of stored evaluations; of the toy language one, as its law judges it."""
    found = {p["judge"] for method in METHODS for run in stored(data, method) for p in run.files["points"]}
    return [judge for judge in JUDGES if judge in found and (data != "toy" or judge == "ngram")]


def curves(data: str, judge: str, entropy: float = 0.0) -> Curves:
    """Perplexity at an entropy, by default that of held-out text; of the toy language the distance from it."""
    found: Curves = {}
    for method, kind in product(METHODS, ("", "seconds")):
        some = stored(data, method, kind)
        for n in sorted({p["calls"] for run in some for p in run.files["points"]} - {0}):
            seeds = [points(run, judge, n) for run in some]
            if data == "toy":
                each = tuple(point["distance"] for (point,) in seeds)
                value = Value(float(np.mean(each)), min(each), max(each), each)
            else:
                value = stats.at_entropy(seeds, entropy or real_text(data, judge)[0])
            if value:
                found.setdefault((method, kind), {})[n] = value
    return found


def calls_table(data: str, judge: str, found: Curves) -> str:
    """A line a method, a column a number of calls."""
    columns, lines = sorted({n for line in found.values() for n in line}), []
    for (method, kind), line in found.items():
        cells = {n: f"{v.mark}{v.mean:,.0f} [{v.low:,.0f}, {v.high:,.0f}]" for n, v in line.items()}
        for n, v in line.items() if data == "toy" else ():
            some = [points(run, judge, n)[0] for run in stored(data, method, kind)]
            cells[n] = (
                f"{v.mean:.3f} ({np.mean([p['valid'] for p in some]):.2f}, {np.mean([p['kl'] for p in some]):.3f})"
            )
        lines.append((title(method, kind), *(cells.get(n, "-") for n in columns)))
    head = f"| network calls | {' | '.join(map(str, columns))} |"
    return runs.table(head, "|---|" + "---|" * len(columns), lines)


def beside_table(data: str, judge: str) -> str:
    """What perplexity does not see, with the sampler whose entropy is nearest to that of held-out text."""
    lines = []
    for method, calls in product(METHODS, SHOWN):
        if found := means(data, method, judge, calls) if method != "ar" or calls == 1 else {}:
            real = real_text(data, judge)
            tag = min(found, key=lambda tag: abs(found[tag][0] - real[0]))
            name = (METHODS[method].title, "L" if method == "ar" else calls, f"`{tag[1:] or 'as trained'}`")
            lines.append((*name, found[tag]))
    lines += [(REAL, "-", "-", real)] if lines else []
    cells = [
        (*name, f"{p:,.0f}", f"{h:.3f}", f"{bleu:.3f}", " / ".join(f"{x:.2f}" for x in js), f"{copied:.2%}")
        for *name, (h, p, bleu, copied, *js) in lines
    ]
    head = "| method | calls | sampler | perplexity | entropy | self-BLEU-4 | JS 1 / 2 / 3 | copied |"
    return runs.table(head, "|---|---|---|---:|---:|---:|---|---:|", cells)


def passes(run: Run) -> float:
    """Passes of a network over a row in a step of training: one with gradient, and those without."""
    a = run.args
    share = a.get("self_condition", 0)  # of the steps in which a network reads its own prediction
    if "teacher" in a:  # two jumps off the diagonal, the teacher on it
        return 1 + 2 * (1 - a["diagonal"]) + a["diagonal"] * (2 if share else 1)
    return 1 + share + (2 if "rounds" in a else 1 + (share > 0)) * bool(a.get("distill"))


def cost_table(data: str) -> str:
    """Work of the training, and the gate in front of all else: held-out nats beside those of the simplest models."""
    lines, total = [], {}
    for method, kind in product(METHODS, ("", "seconds")):
        if some := stored(data, method, kind):
            steps, each = np.mean([run.args["total_steps"] for run in some]), passes(some[0])
            total[method, kind] = steps * each + total.get((METHODS[method].teacher, ""), 0)
            seconds = np.mean([stats.seconds_a_step(run) for run in some])
            nats = " ".join(f"{run.files['nats']['model']:.3f}" for run in some if method in TIMED)
            numbers = (f"{steps:,.0f}", f"{each:g}", f"{total[method, kind]:,.0f}", f"{seconds:.3f}")
            lines.append((title(method, kind), *numbers, f"{steps * seconds / 60:.1f}", nats or "-"))
            simple = some[0].files["nats"]
    if lines:
        names = [name for name in ("unigram", "bigram", "true") if name in simple]
        lines += [(f"{name} model", *"-----", f"{simple[name]:.3f}") for name in names]
    head = "| method | steps | passes a step | passes, its teacher's too | seconds a step | minutes | held-out nats |"
    return runs.table(head, "|---|---:|---:|---:|---:|---:|---|", lines)


def tuning_table(data: str) -> str:
    """What a rate is chosen by: held-out nats; of FLM, in 32 calls, perplexity at equal entropy or toy's distance."""

    def measure(run: Run) -> float:
        some, (real,) = points(run, "ngram", TUNED_AT), points(run, "ngram", 0)[:1]
        if nats := run.files["nats"].get("model"):
            return nats
        return some[0]["distance"] if data == "toy" else stats.at_entropy([some], real["entropy"]).mean

    lines, found = [], runs.read(STORE)
    for method in TEACHERS:
        trials = {rate: found.get(f"{data}_{method}_{rate}_s{TUNED_ON}") for rate in DATA[data]}
        if cells := [f"{rate}: {measure(run):.4g}" for rate, run in trials.items() if run]:
            lines.append((METHODS[method].title, ", ".join(cells), TUNED.get((data, method), "the default")))
    return runs.table("| method | by rate | taken |", "|---|---|---|", lines)


def tables() -> dict[str, str]:
    """Those that have lines, in the order of the page."""
    found = {}
    for data in DATA:
        page = f"text_peers/{data}"
        found |= {f"{page}/cost": cost_table(data), f"{page}/tuning": tuning_table(data)}
        for judge in judges(data):
            found[f"{page}/{judge}"] = calls_table(data, judge, curves(data, judge))
            if data != "toy":
                found[f"{page}/{judge}/beside"] = beside_table(data, judge)
                if (own := means(data, "fmlm", judge, 1).get("")) is not None:  # the one that it cannot choose there
                    found[f"{page}/{judge}/one_call"] = calls_table(data, judge, curves(data, judge, own[0]))
    return {name: table for name, table in found.items() if table.count("\n") > 1}


def draw_curves(axis: Axes, found: Curves) -> None:
    """Values over calls: means with intervals, seeds thin; hollow where an end of the frontier stands for the value."""
    for (method, kind), line in found.items():
        colour, label = COLOURS[method], METHODS[method].title
        if method == "ar":
            for calls, value in line.items() if not kind else ():
                axis.axhline(value.mean, color=colour, linestyle=":", label=f"{label} ({calls} calls)")
        elif not kind:
            calls, (mean, low, high, each, marks) = list(line), zip(*line.values(), strict=True)
            axis.plot(calls, each, color=colour, alpha=0.25, linewidth=1)
            axis.plot(calls, mean, "--" if METHODS[method].teacher else "-", color=colour, label=label)
            axis.vlines(calls, low, high, color=colour, linewidth=1)
            axis.scatter(calls, mean, 25, ["white" if mark else colour for mark in marks], edgecolors=colour, zorder=3)
    axis.set_xscale("log", base=2)
    axis.set_xticks(CALLS, CALLS)
    axis.set(xlabel="network calls (thin: seeds)")
    log_scale(axis)


def log_scale(axis: Axes) -> None:
    """Of y, with plain numbers at 1, 2, 5, 10, ...; and the grid."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def draw_frontiers(axis: Axes, data: str, judge: str, calls: int) -> None:
    """Samplers of every method at one number of calls, means of the seeds, and their frontiers."""
    for method, m in METHODS.items():
        if dots := [(h, p) for h, p, *_ in means(data, method, judge, calls).values()]:
            axis.plot(*np.transpose(dots), "o", color=COLOURS[method], alpha=0.3, markersize=4)
            style, label = ("o:", f"{m.title} (L calls)") if method == "ar" else ("o--" if m.teacher else "o-", m.title)
            axis.plot(*np.transpose(frontier(dots)), style, color=COLOURS[method], markersize=4, label=label)
    h, p, *_ = real_text(data, judge)
    axis.axvline(h, color="gray", linewidth=1)
    axis.plot(h, p, "k*", markersize=12, label=REAL)
    axis.set(xlabel="entropy of a sample's tokens (nats)", title=f"{calls} call{'s' * (calls > 1)}")
    log_scale(axis)


def report() -> None:
    """Raises UserError if nothing is stored."""
    if not runs.read(STORE):
        raise UserError(
            f"{STORE.relative_to(ROOT)} has no stored runs; make some: python benchmarks/text_peers.py run --data toy, "
            "then evaluate and store"
        )
    text = [
        "# FLM and FMLM beside their peers: stored results",
        "",
        "Made by `python benchmarks/text_peers.py report`. Perplexity at the entropy of held-out text, on each run's "
        "own frontier: geometric mean of the seeds with a 95 % interval, a bootstrap over seeds and samples (judges "
        "but ngram: seeds alone). <: all of the frontier has more entropy, >: all of it has less; the number is that "
        "of its end. Toy: total variation distance from the language (share of valid sentences, KL of their law in "
        "nats). Held-out nats: exact for AR, bounds for MDLM and Duo; no ranking of families. Beside: what perplexity "
        "does not see, with the sampler nearest to that entropy; L: a call a token. One call: all read at the entropy "
        "that FMLM has in one call, where its answer is one point.",
    ]
    for name, table in tables().items():
        text += ["", f"## {name.removeprefix('text_peers/').replace('/', ', ').replace('_', ' ')}", "", table]
    (STORE / "results.md").write_text("\n".join(text) + "\n")
    pairs = [(data, judge) for data in DATA if data != "toy" for judge in judges(data)]
    if pairs:
        figure, axes = plots.panels(1, len(pairs), 5, 4)
        for axis, (data, judge) in zip(axes[0], pairs, strict=True):
            draw_curves(axis, curves(data, judge))
            axis.set(title=data, ylabel=f"perplexity ({judge}) at held-out entropy")
        figure.legend(*plots.one_label_each(axes[0, 0]), loc="outside upper center", ncols=8, fontsize=8)
        figure.savefig(STORE / "headline.png", dpi=120)
    for data, judge in pairs:
        figure, axes = plots.panels(1, len(SHOWN), 4.5, 4, sharey=True)
        for axis, calls in zip(axes[0], SHOWN, strict=True):
            draw_frontiers(axis, data, judge, calls)
        axes[0, 0].set(ylabel=f"perplexity ({judge})")
        figure.legend(*plots.one_label_each(axes[0, 0]), loc="outside upper center", ncols=9, fontsize=8)
        figure.savefig(STORE / f"frontiers_{data}_{judge}.png", dpi=120)
    if some := [run for method in METHODS for run in stored("toy", method)]:
        figure, axes = plots.panels(1, 1, 6, 4.5)
        draw_curves(axes[0, 0], curves("toy", "ngram"))
        low, middle, high = np.quantile(stats.perfect_distances(some[0].args["samples"]), (0.025, 0.5, 0.975))
        axes[0, 0].axhspan(low, high, color="gray", alpha=0.3)
        axes[0, 0].axhline(middle, color="gray", label="a perfect sampler, 95 %")
        axes[0, 0].set(ylabel="total variation distance from the toy language")
        figure.legend(*plots.one_label_each(axes[0, 0]), loc="outside right upper", fontsize=8)
        figure.savefig(STORE / "toy.png", dpi=120)
