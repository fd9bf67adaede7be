"""Figures of generated text: perplexity over the number of network calls, and against entropy."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import replacing
from common.judge.metrics import REAL, TextScore

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # takes a while to import


def draw_scores(series: Mapping[str, Sequence[TextScore]], title: str = "") -> "Figure":
    """Two panels: perplexity over network calls; perplexity against per-sample entropy.

    series: {label: lines of one table}. Lines named "N steps" are joined in that order; that of real text, the same in
    all tables of one corpus, is drawn once, as a dashed line and a star. Lines without a perplexity are left out: those
    of empty texts, which an untrained network writes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shown: dict[int, list[tuple[float, float]]] = {}  # network calls: points in the right panel
    for label, scores in series.items():
        made = [score for score in scores if score.text != REAL and math.isfinite(score.perplexity)]
        calls, entropy = [int(score.text.split()[0]) for score in made], [score.entropy for score in made]
        perplexity = [score.perplexity for score in made]
        (line,) = left.plot(calls, perplexity, "o-", markersize=4, label=label)
        right.plot(entropy, perplexity, "o-", markersize=4, color=line.get_color())
        for n, *place in zip(calls, entropy, perplexity, strict=True):
            shown.setdefault(n, []).append(tuple(place))
    real = next(score for scores in series.values() for score in scores if score.text == REAL)
    left.axhline(real.perplexity, color="black", linestyle="--", linewidth=1, label=REAL)
    right.plot([real.entropy], [real.perplexity], "k*", markersize=10)
    left.set_xscale("log", base=2)
    left.set_xticks(sorted(shown), sorted(shown))
    left.minorticks_off()
    left.set_xlim(min(shown, default=1) / 1.5, max(shown, default=1) * 1.5)
    left.set(yscale="log", xlabel="network calls", ylabel=f"perplexity ({real.judge}, per {real.unit})")
    left.yaxis.set_major_formatter(LogFormatter())
    left.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))  # labels few, and only within a decade
    right.set(xlabel="entropy of a sample's tokens (nats); numbers: network calls")
    for axis in (left, right):
        axis.margins(0.12)
        axis.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.draw_without_rendering()  # places the panels, hence the points
    taken = [right.transData.transform((real.entropy, real.perplexity))]
    for n, places in shown.items():
        for place in places:
            spot = right.transData.transform(place)
            if all(np.abs(spot - other).max() > 12 for other in taken):  # else the numbers would cover each other
                right.annotate(str(n), place, fontsize=8, xytext=(4, 4), textcoords="offset points")
                taken.append(spot)
    return figure


def plot_scores(series: Mapping[str, Sequence[TextScore]], path: Path, title: str = "") -> None:
    """Writes the figure of `draw_scores` atomically."""
    figure = draw_scores(series, title)
    with replacing(path) as temp:
        figure.savefig(temp, dpi=150)
