"""The study's statistics: measures of a run, their intervals over seeds and episodes, and the verdict on a claim.

Every success rate is drawn from its posterior given its episodes (Jeffreys), and the seeds are drawn with replacement:
an interval covers both.
"""

import json
import math
from dataclasses import dataclass
from functools import cache

import numpy as np

import runs
from runs import ROOT, Run
from study_configs import SAME, SEEDS, Claim

STORE = ROOT / "benchmarks" / "study"
DRAWS = 10_000  # of the bootstrap
DIP_EPISODES = 50


@cache
def stored(task: str, config: str) -> dict[int, Run]:
    """{seed: run}"""
    return runs.read_seeds(STORE, f"{task}_{config}", SEEDS)


def read_dips() -> dict[str, dict[str, float]]:
    """{TASK_CONFIG_sSEED: {updates of the actor: success rate}} of `diagnose.py dip`, at first the cloned policy's."""
    file = STORE / "dip.json"
    return json.loads(file.read_text()) if file.exists() else {}


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half of values (..., n), the outer ones of it weighted [Agarwal et al. 2021]."""
    values = np.sort(values, -1)
    n = values.shape[-1]
    edges = np.clip(np.arange(n + 1) / n, 0.25, 0.75)
    return (values * np.diff(edges)).sum(-1) / 0.5


def interval(values: np.ndarray, drawn: np.ndarray) -> tuple[float, float, float]:
    """Interquartile mean of values (seeds,) and its 95 % bootstrap interval, over seeds and over their episodes.

    drawn (DRAWS, seeds): the same values from rates drawn from their posteriors.
    """
    rng = np.random.default_rng(0)
    seeds, redraws = rng.integers(len(values), size=drawn.shape), rng.integers(len(drawn), size=drawn.shape)
    low, high = np.quantile(interquartile_mean(drawn[redraws, seeds]), (0.025, 0.975))
    return float(interquartile_mean(values)), float(low), float(high)


def first_move(run: Run) -> float:
    """First logged step with an actor gradient, infinite if the actor never moved."""
    return min(run.series("ogpo/actor_grad")[0], default=math.inf)


def evaluations(run: Run) -> dict[str, np.ndarray]:
    """Success rates of a run: `cloned` (1,), `ode`, `bon`, `final` (noise-free, acting).

    `ode`: noise-free, since the actor has moved (if it never did, `final` alone). `bon`: acting, after updates began.
    """
    (steps, ode), (bon_steps, bon) = run.series("eval/ode_success"), run.series("eval/bon_success")
    moved = steps >= first_move(run)
    final = np.array([run.last(f"final/{kind}_success") for kind in ("ode", "bon")])
    return {
        "cloned": ode[:1],
        "ode": ode[moved] if moved.any() else final[:1],
        "bon": bon[bon_steps > run.args["start_training"]],
        "final": final,
    }


def measures(rates: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Numbers of a run from its `evaluations`, along the last axis (in front of it: draws of a bootstrap)."""
    bon = rates["bon"]
    found = {
        "cloned": rates["cloned"][..., 0],
        "lowest": rates["ode"].min(-1),
        "area": bon.mean(-1),
        "fall": (np.maximum.accumulate(bon, -1) - bon).max(-1),
        "ode": rates["final"][..., 0],
        "final": rates["final"][..., 1],
    }
    if "dip" in rates:
        found |= {"before": rates["dip"][..., 0], "early": rates["dip"][..., 1:].min(-1)}
    return found


@dataclass(frozen=True)
class Measured:
    """The measures of a run, and the same with all its success rates drawn from their posteriors (DRAWS,)."""

    values: dict[str, float]
    drawn: dict[str, np.ndarray]


@cache
def numbers(task: str, config: str) -> dict[int, Measured]:
    """{seed: measures}"""
    found, dips = {}, read_dips()
    for seed, run in stored(task, config).items():
        name = f"{task}_{config}"
        rng = np.random.default_rng([seed, *name.encode()])  # no two runs share their draws
        rates = evaluations(run)
        episodes = {kind: run.args["eval_interval_episodes"] for kind in ("ode", "bon")}
        episodes |= {kind: run.args["eval_episodes"] for kind in ("final", "cloned")}
        if (dip := dips.get(f"{name}_s{seed}")) is not None:
            rates["dip"], episodes["dip"] = np.array([*dip.values()]), DIP_EPISODES
        drawn = {}
        for kind, n in episodes.items():  # Jeffreys posterior: 100 of 100 does not mean certainty
            size = (DRAWS, len(rates[kind]))
            drawn[kind] = rng.beta(n * rates[kind] + 0.5, n * (1 - rates[kind]) + 0.5, size)
        values = {measure: float(value) for measure, value in measures(rates).items()}
        found[seed] = Measured(values, measures(drawn))
    return found


def summary(task: str, config: str, measure: str) -> tuple[float, float, float]:
    """Interquartile mean of a measure over the seeds, and its interval."""
    found = numbers(task, config).values()
    drawn = np.stack([run.drawn[measure] for run in found], -1)  # (DRAWS, seeds)
    return interval(np.array([run.values[measure] for run in found]), drawn)


@dataclass(frozen=True)
class Judgement:
    """First minus second of a claim's measure: by seed, its interquartile mean and interval, and what that says."""

    by_seed: tuple[float, ...]
    middle: float
    low: float
    high: float
    verdict: str


def judge(claim: Claim, task: str) -> Judgement | None:
    """What the runs of a task say of a claim; None if no seed has both of its methods."""
    first, second = numbers(task, claim.first), numbers(task, claim.second)
    own, other = claim.measure, claim.other or claim.measure
    pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    pairs = [(one, two) for one, two in pairs if own in one.values and other in two.values]
    if not pairs:
        return None
    values = np.array([one.values[own] - two.values[other] for one, two in pairs])
    drawn = np.stack([one.drawn[own] - two.drawn[other] for one, two in pairs], -1)  # (DRAWS, seeds)
    middle, low, high = interval(values, drawn)
    if claim.sign:
        holds, fails = (low > 0, high < 0) if claim.sign > 0 else (high < 0, low > 0)
    else:
        holds, fails = -SAME <= low and high <= SAME, low > SAME or high < -SAME
    verdict = "holds" if holds else "does not hold" if fails else "undecided"
    if len(pairs) < len(SEEDS):
        verdict = "seeds missing"
    return Judgement(tuple(values), middle, low, high, verdict)
