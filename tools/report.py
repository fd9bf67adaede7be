"""Runs as one web page that needs nothing else: curves, final numbers, arguments, commands, videos or texts.

python -m tools.report runs/A runs/B ...                        # report.html; robot runs, or language runs
python -m tools.report runs/A runs/B --out lift.html

Runs are taken together as by tools/compare.py: those of equal arguments but for the seed.
"""

import argparse
import base64
import json
import math
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from common import cli, record
from common.errors import UserError, reading
from common.evaluate import wilson
from common.files import write_atomic
from common.judge.metrics import COPY_LENGTH, TextScore, format_table
from common.textplots import draw_scores
from tools.compare import LEVELS, PLACES, Loaded, differing, draw_curves, grouped, load, pick_metric, shown, steps_to
from tools.webpage import Html, bullets, document, folded, grid, svg, table

Groups = Mapping[str, Sequence[Loaded]]
Scores = Sequence[TextScore]

VIDEO_MB = 20  # of mp4 files in a page, at most; the others are named
TEXTS = 3  # shown of every file of samples
LABEL = 60  # characters of a setting's name, at most: settings that differ in more are numbered
NONE = "-"
CURVES = {  # the first of the metrics that a run has
    "success, acting policy": ("eval/bon_success", "eval/act_success"),
    "success, noise-free policy": ("eval/ode_success",),
    "success, training episodes": ("train/success",),
    "steps of an episode, acting policy": ("eval/bon_length", "eval/act_length"),
    "held-out cross entropy (nats per token)": ("valid/ce",),
    "training loss": ("train/loss",),
}
LAST = {  # metrics, digits, largest possible value; of a success rate the argument with the number of episodes
    "final success, acting policy": (("final/bon_success", "final/act_success"), 3, 1.0, "eval_episodes"),
    "final success, noise-free policy": (("final/ode_success",), 3, 1.0, "eval_episodes"),
    "final steps of an episode, acting policy": (("final/bon_length", "final/act_length"), 1, math.inf, ""),
    "last success while training, acting policy": (CURVES["success, acting policy"], 3, 1.0, "eval_interval_episodes"),
    "held-out cross entropy (nats per token)": (("valid/ce",), 3, math.inf, ""),
}
SCORES: dict[str, tuple[Callable[[TextScore], float], int, float]] = {  # value, digits, largest possible value
    "perplexity": (lambda s: s.perplexity, 2, math.inf),
    "entropy (nats)": (lambda s: s.entropy, 3, math.inf),
    "self-BLEU-4": (lambda s: s.self_bleu, 3, 1.0),
    "JS 1-gram (bits)": (lambda s: s.distances[0], 3, 1.0),
    "JS 2": (lambda s: s.distances[1], 3, 1.0),
    "JS 3": (lambda s: s.distances[2], 3, 1.0),
    f"copied {COPY_LENGTH}-grams": (lambda s: s.copied, 4, 1.0),
    "samples": (lambda s: s.samples, 0, math.inf),
}
POLICIES = {"bon": "acting (best of N)", "act": "acting", "ode": "noise-free"}
LINES = {"-": "solid", "--": "dashed", ":": "dotted"}  # matplotlib's name: CSS's
LOOKS = [(colour, line) for line in LINES for colour in TABLEAU_COLORS.values()]  # these show on light and on dark
RC = {  # figures without a background, text as text
    "svg.fonttype": "none", "text.parse_math": False, "legend.facecolor": "none", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def keyed(groups: Groups, label: str) -> Html:
    """The label of a group of runs, behind the line that its curves have."""
    colour, line = LOOKS[list(groups).index(label) % len(LOOKS)]
    return Html(f'<span class="key" style="border-top: 3px {LINES[line]} {colour}"></span>{escape(label)}')


def number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else NONE


def spread(values: Sequence[float], digits: int, largest: float, episodes: int = 0) -> str:
    """Mean of the finite values and its 95 % interval: Student's t over two or more, within 0 and `largest`.

    episodes: of each of the values, if they are success rates. The interval then is no narrower than Wilson's over all
    episodes: few runs often have the very same rate.
    """
    from scipy.stats import t  # takes a second to import

    x = np.array([v for v in values if math.isfinite(v)])
    if not len(x):
        return NONE
    ends = []
    if len(x) > 1:
        reach = t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
        ends += [max(x.mean() - reach, 0.0), min(x.mean() + reach, largest)]
    if episodes:
        ends += wilson(round(x.sum() * episodes), episodes * len(x))
    interval = f" [{number(min(ends), digits)}, {number(max(ends), digits)}]" if ends else ""
    return f"{number(x.mean(), digits)}{interval}"


def style(groups: Groups, chosen: Iterable[str]) -> Any:
    """A context in which figures give these groups their lines."""
    looks = [LOOKS[list(groups).index(label) % len(LOOKS)] for label in chosen]
    colours, lines = zip(*looks, strict=True)
    return rc_context(RC | {"axes.prop_cycle": cycler(color=colours, linestyle=lines)})


def curves(groups: Groups) -> str:
    """A panel for everything of `CURVES` that a run has, and for the samples of language runs while training."""
    runs = [run for group in groups.values() for run in group]
    panels = dict(CURVES)
    found = {name for run in runs for row in run.rows for name in row if name.startswith("eval/perplexity_")}
    for calls in sorted(int(name.rpartition("_")[2]) for name in found):
        unit = "call" if calls == 1 else "calls"
        panels |= {f"{what}, {calls} {unit}": (f"eval/{what}_{calls}",) for what in ("perplexity", "entropy")}
    drawn = []
    for title, names in panels.items():
        metrics = pick_metric(runs, names)
        if not any(metrics.values()):
            continue
        with style(groups, groups):
            figure = Figure(figsize=(4.6, 2.9), layout="constrained")
            axis = figure.subplots()
            draw_curves(axis, groups, metrics)
            axis.locator_params(axis="x", nbins=5)
            if title.startswith("success"):
                axis.set(ylim=(-0.03, 1.03))
            elif title.startswith("perplexity"):
                axis.set(yscale="log")
                axis.yaxis.set_major_formatter(LogFormatter())
                axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
            drawn.append(f"<figure><figcaption>{title}</figcaption>{svg(figure, title)}</figure>")
    if not drawn:
        first = runs[0].folder
        raise UserError(f"{first} has no curve to show yet; wait for its first evaluation, or leave it out")
    return grid(drawn)


def last(run: Loaded, names: Sequence[str]) -> float:
    """Newest value of the first of these metrics that the run has, else NaN."""
    return next((float(values[-1]) for name in names if len(values := run.series(name)[1])), math.nan)


def finals(groups: Groups) -> str:
    """The last numbers of every group, with intervals over its runs."""
    head, rows = ["setting", "runs", *LAST], []
    for label, runs in groups.items():
        args = args_at_end(runs[0])
        values = [([last(run, names) for run in runs], *form, args.get(key, 0)) for names, *form, key in LAST.values()]
        rows.append([keyed(groups, label), len(runs), *(spread(*value) for value in values)])
    some = [i for i in range(len(head)) if any(row[i] != NONE for row in rows)]
    return table([head[i] for i in some], [[row[i] for i in some] for row in rows])


def args_at_end(run: Loaded) -> dict[str, Any]:
    """The arguments of a run since its last resume."""
    args = dict(run.args)
    for change in record.read(run.folder).get("changes", []):
        args |= change["args"]
    return args


def episodes(runs: Sequence[Loaded]) -> str:
    """The final evaluation of robot runs: every policy and, where it serves several tasks, every task."""
    rows = []
    for run in runs:
        for name in sorted({name for row in run.rows for name in row}):
            if not (found := re.fullmatch(r"final/(\w+?)_success(/.+)?", name)):
                continue
            policy, part = found.groups("")
            n = 0 if part else args_at_end(run).get("eval_episodes", 0)
            length = math.nan if part else last(run, [f"final/{policy}_length"])
            acts = POLICIES.get(policy, policy) + part.replace("/", ": ", 1)
            rows.append([run.folder, acts, spread([last(run, [name])], 3, 1.0, n), n or NONE, number(length, 1)])
    head = ["run", "policy", "success [Wilson 95 % interval]", "episodes", "steps of an episode"]
    return table(head, rows) if rows else "<p>No run has made its final evaluation yet.</p>"


def places(run: Loaded) -> list[Path]:
    """The run folder and those of later evaluations, oldest first."""
    return [run.folder, *sorted(run.folder.glob("evaluation-*/"), key=lambda path: (len(path.name), path.name))]


def evaluations(run: Loaded) -> dict[str, Scores]:
    """{judge, and in what a later evaluation differs from the run's arguments: lines of its table}, of a language run.

    Raises UserError on a file that is no such table.
    """
    found, own = {}, args_at_end(run)
    for folder in places(run):
        args = record.read(folder) if folder != run.folder else {}
        other = [f"{k} {shown(v)}" for k, v in args.items() if own.get(k) != v and k not in PLACES | {"judge"}]
        for file in sorted(folder.glob("evaluation_*.json")):
            with reading(file, "evaluate the run again, or leave it out"):
                scores = [TextScore(**line) for line in json.loads(file.read_bytes())]
                format_table(scores)  # raises if it is no whole table
            found[", ".join([file.stem.removeprefix("evaluation_"), *other])] = scores
    return found


def texts(groups: Groups) -> str:
    """The evaluations of language runs: means of groups with their figure, and every run's table."""
    found = {run.folder: evaluations(run) for runs in groups.values() for run in runs}
    together: dict[tuple[str, str], dict[str, list[Scores]]] = defaultdict(lambda: defaultdict(list))
    for label, runs in groups.items():
        for run in runs:
            for name, scores in found[run.folder].items():  # perplexities of different corpora do not compare
                together[f"{name}, on {run.args.get('data', '?')}", scores[0].unit][label].append(scores)
    parts = []
    for (name, unit), tables in together.items():
        means, rows = defaultdict(list), []
        for label, scored in tables.items():
            for text in dict.fromkeys(score.text for scores in scored for score in scores):
                lines = [score for scores in scored for score in scores if score.text == text]
                rows.append([keyed(groups, label), text, len(lines)])
                rows[-1] += [spread([value(s) for s in lines], *form) for value, *form in SCORES.values()]
                mean = {k: float(np.mean([getattr(s, k) for s in lines])) for k in ("perplexity", "entropy")}
                means[label].append(TextScore(**vars(lines[0]) | mean))
        parts.append(f"<h3>Judge {escape(name)}, perplexity per {escape(unit)}</h3>")
        if max(map(len, means.values())) > 2:  # more than one number of calls, and real text
            with style(groups, tables):
                parts.append(f'<div class="wide">{svg(draw_scores(means), name)}</div>')
        parts.append(table(["setting", "text", "runs", *SCORES], rows))
    for folder, tables in found.items():
        for name, scores in tables.items():
            lines = [line.strip("| ").split(" | ") for line in format_table(scores).splitlines()]
            parts.append(folded(f"{folder}: {name}", table(lines[0], lines[2:])))
    return "\n".join(parts) or "<p>No run has been evaluated yet.</p>"


def samples(runs: Sequence[Loaded]) -> str:
    """The first texts of every file of samples."""
    parts = []
    for run in runs:
        for folder in places(run):
            for file in sorted(folder.glob("samples_*.txt"), key=lambda file: (len(file.name), file.name)):
                said = file.read_text(errors="replace").removesuffix("\n").split("\n----\n")
                parts.append(folded(str(file), "\n".join(f"<pre>{escape(text)}</pre>" for text in said[:TEXTS])))
    return "\n".join(parts) or "<p>There are no samples yet.</p>"


def videos(runs: Sequence[Loaded]) -> str:
    """Videos of the run folders: the first `VIDEO_MB` in the page, of others the path."""
    left, figures, named = VIDEO_MB * 10**6, [], []
    for run in runs:
        for file in sorted(run.folder.glob("*.mp4"), key=lambda file: (file.stem != "before", file.name)):
            if (size := file.stat().st_size) > left:
                named.append(f"{file} ({size / 1e6:.1f} MB)")
                continue
            left -= size
            source = f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
            video = f'<video controls muted playsinline preload="metadata" src="{source}"></video>'
            figures.append(f"<figure><figcaption>{escape(str(file))}</figcaption>{video}</figure>")
    parts = [grid(figures)] if figures else []
    if named:
        parts += [f"<p>Not in this page, which holds {VIDEO_MB} MB of videos at most:</p>", bullets(named)]
    return "\n".join(parts) or "<p>The run folders hold no videos.</p>"


def arguments(groups: Groups) -> str:
    """Arguments in which the groups differ, and folded those that are the same."""
    runs = [run for group in groups.values() for run in group]
    differ = differing(runs)
    same = sorted({name for run in runs for name in run.args} - PLACES - {*differ})
    rows = [[name, *(shown(group[0].args.get(name, NONE)) for group in groups.values())] for name in differ]
    heads = [keyed(groups, label) for label in groups]
    parts = [table(["argument", *heads], rows)] if rows else []
    common = table(["argument", "value"], [[name, shown(runs[0].args[name])] for name in same])
    return "\n".join([*parts, folded(f"{len(same)} arguments that all runs have in common", common)])


def made(groups: Groups) -> str:
    """Every run with its times and command, and what it was made with."""
    rows, commands, changed, machines = [], [], [], defaultdict(list)
    robots = any("env" in run.args for runs in groups.values() for run in runs)
    for label, runs in groups.items():
        for run in runs:
            kept = record.read(run.folder)
            metric = pick_metric([run])[str(run.folder)]
            reached = [steps_to(run, metric, level) for level in LEVELS if robots]
            steps, minutes = number(max(row["step"] for row in run.rows), 0), number(run.minutes, 1)
            when = kept.get("started", NONE)[:16].replace("T", " ")
            rows.append([run.folder, keyed(groups, label), run.args.get("seed", NONE), steps, *reached, minutes, when])
            argv = kept.get("argv")
            commands.append(shlex.join(["python", *argv]) if argv else f"{run.folder}: not recorded")
            for change in kept.get("changes", []):
                values = ", ".join(f"{name} {shown(value)}" for name, value in change["args"].items())
                changed.append(f"{run.folder}, from step {change['from_step']:,}: {values}")
            git, versions = kept.get("git") or {}, kept.get("versions", {})
            commit = f"commit {git.get('commit', NONE)[:12]}" + (", files differed" if git.get("dirty") else "")
            packages = ", ".join(f"{name} {version}" for name, version in versions.items()) or NONE
            machines[commit, kept.get("gpu") or kept.get("cpu", NONE), packages].append(str(run.folder))
    head = ["run", "setting", "seed", "steps", *(f"steps to {x}" for x in LEVELS if robots), "minutes", "started"]
    parts = [table(head, rows), "<h3>Commands</h3>", *(f"<pre>{escape(command)}</pre>" for command in commands)]
    if changed:
        parts += ["<h3>Changed on a resume</h3>", bullets(changed)]
    sources = [
        f"{', '.join(names) if len(machines) > 1 else 'all runs'}: {'; '.join(machine)}"
        for machine, names in machines.items()
    ]
    return "\n".join([*parts, "<h3>Made with</h3>", bullets(sources)])


def page(runs: Sequence[Loaded]) -> str:
    """The report of runs of one kind as HTML. Raises UserError on runs without anything to show, or a broken file."""
    groups, robots = grouped(runs), "env" in runs[0].args
    if max(map(len, groups)) > LABEL:  # the table of arguments says what differs
        groups = {f"setting {i}": group for i, group in enumerate(groups.values(), 1)}
    scripts = dict.fromkeys(run.script.removesuffix(".py") for run in runs)
    tasks = dict.fromkeys(str(run.args.get("env" if robots else "data", "?")) for run in runs)
    title = f"{', '.join(scripts)} on {', '.join(tasks)}"
    legend = [
        Html(f"{keyed(groups, label)}: {escape(', '.join(str(run.folder) for run in group))}")
        for label, group in groups.items()
    ]
    said = "Mean of the runs of a setting [95 % interval of the mean, by Student's t over two or more runs"
    said += "; of a success at least Wilson's over all their episodes]." if robots else "]."
    parts = [
        f"<p>{len(runs)} run{'s' * (len(runs) > 1)}, {len(groups)} setting{'s' * (len(groups) > 1)}.</p>",
        bullets(legend),
        "<h2>Curves</h2>",
        "<p>Mean of the runs of a setting; band: lowest to highest. Horizontal: "
        f"{'environment' if robots else 'optimizer'} steps.</p>",
        curves(groups),
        f"<h2>Final numbers</h2>\n<p>{said}</p>",
        finals(groups),
        "<h2>Arguments</h2>",
        arguments(groups),
        "<h2>Evaluations</h2>",
        *([episodes(runs), "<h2>Videos</h2>", videos(runs)] if robots else []),
        *([texts(groups), "<h2>Samples</h2>", samples(runs)] if not robots else []),
        "<h2>Runs</h2>",
        made(groups),
    ]
    return document(title, parts)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: the report is a web page; give --out NAME.html")
    runs = [load(folder) for folder in dict.fromkeys(args.runs)]
    robots, others = ([run for run in runs if ("env" in run.args) == robot] for robot in (True, False))
    if robots and others:
        raise UserError(
            f"{robots[0].folder} is of a robot and {others[0].folder} of a language model: they have no number in "
            "common; make a report of each"
        )
    content = page(runs)
    try:
        write_atomic(args.out, content.encode())
    except OSError as error:
        raise UserError(f"cannot write {args.out} ({error}); give --out NAME.html in a folder of yours") from error
    print(f"report: {args.out} ({len(content) / 1e6:.1f} MB)")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
