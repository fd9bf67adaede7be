"""Runs side by side: a table and a figure with a curve per setting, runs that differ in their seed taken together.

python -m tools.compare runs/A runs/B ...                       # comparison.png, and a table on the terminal
python -m tools.compare runs/A runs/B --metric train/length --out lengths.png

Runs of one script are told apart by the arguments in which they differ; others also by the script.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import cli, record
from common.errors import UserError
from common.runlog import read_metrics

METRICS = ("eval/bon_success", "eval/act_success", "eval/ode_success", "valid/ce", "train/loss")  # the first it has
PLACES = {
    "seed",
    "run_name",
    "run_dir",
    "data_dir",
    "eval",
    "resume",
    "wandb_project",
    "tensorboard",
    "threads",
    "video",
}
PLACES |= {"cloned", "teacher", "device", "eval_envs", "log_every", "checkpoint_every", "show", "judge_path"}
LEVELS = (0.8, 0.9)
POINTS = 1_000  # of a curve, at most: more cannot be seen


@dataclass(frozen=True)
class Loaded:
    """A run folder: its script, arguments and metrics."""

    folder: Path
    script: str
    args: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) and values (n,) of a metric; of a step that was logged twice the last value."""
        points = {row["step"]: row[metric] for row in self.rows if row.get(metric) is not None}
        return np.array([*points], float), np.array([*points.values()], float)

    @property
    def minutes(self) -> float:
        """Wall time, NaN if it was not logged. After a resume the logged seconds begin at 0 again."""
        walls = self.series("time/wall")[1]
        return float((walls[-1] + walls[:-1][np.diff(walls) < 0].sum()) / 60) if len(walls) else math.nan


def load(folder: Path) -> Loaded:
    """Raises UserError if the folder holds no run with metrics."""
    try:
        made, rows = record.read(folder), read_metrics(folder)
        loaded = Loaded(folder, made["script"], dict(made["args"]), rows)
        if not all("step" in row for row in rows):
            raise ValueError("a line without its step")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no run folder: it needs args.json and metrics.jsonl; give runs/NAME") from error
    if not rows:
        raise UserError(f"{folder} has no metrics yet; wait for its first line, or leave it out")
    return loaded


def grouped(runs: Sequence[Loaded]) -> dict[str, list[Loaded]]:
    """{label: runs} of equal arguments but for the seed and where files go; the label says what differs."""
    scripts, found = {run.script for run in runs}, defaultdict(list)
    for run in runs:
        others = [other for other in runs if other.script == run.script]
        values = [f"{name} {shown(run.args.get(name, '-'))}" for name in differing(others)]
        found[", ".join([run.script.removesuffix(".py")] * (len(scripts) > 1) + values) or "runs"].append(run)
    return dict(found)


def differing(runs: Sequence[Loaded]) -> list[str]:
    """Names of the arguments that are not equal in all runs, but for the seed and where files go."""
    names = sorted({name for run in runs for name in run.args} - PLACES)
    return [name for name in names if len({json.dumps(run.args.get(name, "-")) for run in runs}) > 1]


def shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def pick_metric(runs: Sequence[Loaded], names: Sequence[str] = METRICS) -> dict[str, str]:
    """{folder: the first of these that it has, or ""}: the acting policy has another name in OGPO and in a baseline."""
    return {str(run.folder): next((m for m in names if len(run.series(m)[0])), "") for run in runs}


def steps_to(run: Loaded, metric: str, level: float) -> str:
    steps, values = run.series(metric)
    reached = steps[values >= level]
    return f"{reached[0]:,.0f}" if len(reached) else "never"


def table(groups: Mapping[str, Sequence[Loaded]], metrics: Mapping[str, str]) -> str:
    """Markdown: a line per setting with its runs, steps to the levels (of a success rate), last values, minutes."""
    success = all(metric.endswith("_success") for metric in metrics.values())
    head = ["setting", "runs", *(f"steps to {level}" for level in LEVELS if success), "last", "mean", "minutes"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for label, runs in groups.items():
        last = [run.series(metrics[str(run.folder)])[1][-1] for run in runs]
        minutes = ["-" if math.isnan(run.minutes) else f"{run.minutes:.1f}" for run in runs]
        reached = [" ".join(steps_to(run, metrics[str(run.folder)], level) for run in runs) for level in LEVELS]
        spread = f"{np.mean(last):.3f}" + (f" ± {np.std(last, ddof=1):.3f}" if len(last) > 1 else "")
        cells = [label, str(len(runs)), *(reached if success else ()), " ".join(f"{v:.3f}" for v in last), spread]
        lines.append(f"| {' | '.join([*cells, ' '.join(minutes)])} |")
    return "\n".join(lines)


def draw_curves(axis: Axes, groups: Mapping[str, Sequence[Loaded]], metrics: Mapping[str, str]) -> None:
    """A curve per setting: mean of its runs, and between their lowest and highest; every run where there are two.

    The i-th setting has the i-th colour also where others have no run with the metric.
    """
    for style, (label, runs) in zip(cycle(rcParams["axes.prop_cycle"]), groups.items(), strict=False):
        curves = [run.series(metrics[str(run.folder)]) for run in runs if metrics[str(run.folder)]]
        if not curves:
            continue
        grid = np.unique(np.concatenate([steps for steps, _ in curves]))
        grid = grid[(grid >= max(s[0] for s, _ in curves)) & (grid <= min(s[-1] for s, _ in curves))]
        grid = grid[np.unique(np.linspace(0, len(grid) - 1, POINTS).astype(int))] if len(grid) else grid
        values = np.stack([np.interp(grid, *curve) for curve in curves])  # (runs, n)
        marker = "o" if len(grid) == 1 else ""  # a line of one point does not show
        axis.plot(grid, values.mean(0), linewidth=2, marker=marker, label=f"{label} ({len(runs)})", **style)
        axis.fill_between(grid, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
    axis.set(xlabel="steps")
    axis.xaxis.set_major_formatter(lambda steps, _: f"{steps:,.0f}")
    axis.grid(alpha=0.3)


def draw(groups: Mapping[str, Sequence[Loaded]], metrics: Mapping[str, str], out: Path) -> None:
    """Writes a figure of `draw_curves` with a legend."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    draw_curves(axis, groups, metrics)
    axis.set(ylabel=" / ".join(sorted(set(metrics.values()))))
    axis.legend(fontsize=8, title="mean of runs; band: lowest to highest", title_fontsize=8)
    figure.savefig(out, dpi=120)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--metric", default="", help="of metrics.jsonl; default: success of the acting policy, or loss")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="the figure")
    args = parser.parse_args(argv)
    runs = [load(folder) for folder in dict.fromkeys(args.runs)]
    metrics = {str(run.folder): args.metric for run in runs} if args.metric else pick_metric(runs)
    for run in runs:
        if not len(run.series(metrics[str(run.folder)])[0]):
            names = sorted({name for row in run.rows for name in row if isinstance(row[name], float)})
            raise UserError(f"{run.folder} has no metric {args.metric or METRICS[0]}; it has {', '.join(names)}")
    groups = grouped(runs)
    print(table(groups, metrics))
    try:
        draw(groups, metrics, args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {args.out} ({error}); give --out NAME.png in a folder that exists") from error
    print(f"figure: {args.out}")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
