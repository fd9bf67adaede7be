"""What the figures of the benchmarks share."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runs import Run

VARIANTS = {"ogpo": "tab:gray", "ogpo+": "tab:blue", "ogpo+ca": "tab:orange"}  # their colours in all figures
OTHERS = ("tab:green", "tab:red", "tab:purple")
PALETTE = (
    *("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray"),
    *("tab:olive", "tab:cyan", "black"),
)


def panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, np.ndarray]:
    """A figure of panels of width x height inches, and its axes (rows, columns); shared: sharex, sharey."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def sequential(i: int, n: int) -> Any:
    """Colour of the i-th of n in a row that has an order."""
    return colormaps["viridis"](i / n)


def draw_seeds(axis: Axes, runs: Iterable[Run], key: str, colour: Any, label: str) -> None:
    """A metric over environment steps: every run thin, their mean thick, as far as all of them go."""
    curves = [run.series(key) for run in runs]
    for steps, values in curves:
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    shortest = min(len(steps) for steps, _ in curves)
    mean = np.mean([values[:shortest] for _, values in curves], 0)
    axis.plot(curves[0][0][:shortest], mean, color=colour, linewidth=2.5, label=label)


def draw_runs(axis: Axes, runs: Iterable[Run], noise_free: bool = False) -> None:
    """Success of the training episodes and in the evaluations, of every run."""
    for run in runs:
        axis.plot(
            *run.series("train/success"), color="tab:orange", alpha=0.4, linewidth=1, label="last 20 training episodes"
        )
        if noise_free:
            steps, values = run.series("eval/ode_success")
            axis.plot(steps, values, "o--", color="tab:green", alpha=0.7, markersize=3, label="evaluation, noise-free")
        steps, values = run.series("eval/bon_success")
        axis.plot(steps, values, "o-", color="tab:blue", alpha=0.7, markersize=3, label="evaluation, best-of-N")


def one_label_each(axis: Axes) -> tuple[list[Any], list[str]]:
    """Handles and labels of a legend in which what several runs share stands once."""
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    return list(once.values()), list(once)


def step_axes(axes: Sequence[Axes]) -> None:
    """Ticks and grid of panels over environment steps."""
    for axis in axes:
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter(lambda steps, _: f"{steps:,.0f}")
        axis.grid(alpha=0.3)


def success_axes(axes: Sequence[Axes]) -> None:
    """Scale, ticks and grid of panels that show success over environment steps."""
    step_axes(axes)
    for axis in axes:
        axis.set(ylim=(-0.03, 1.03))
