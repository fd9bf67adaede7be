"""What holds OGPO up: variants of OGPO against one another, from one cloned policy per task and seed.

python benchmarks/study.py run --figure stabilizers --jobs 2   # resumable: finished runs are skipped
python benchmarks/study.py run --figure tasks --seeds 1        # figures: stabilizers, start, reference, extraction, ...
python benchmarks/study.py store                               # copy args.json and metrics.jsonl.gz of finished runs
python benchmarks/study.py report                              # study/results.md and study/FIGURE.png from study/
"""

import argparse
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from runs import ROOT, RUNS, arguments, execute, execute_all, keep, kept, last, metrics, series

STORE = ROOT / "benchmarks" / "study"
SEEDS = (1, 2, 3)
DRAWS = 10_000  # of the bootstrap
DIP_EPISODES = 50
STEPS = {"lift": 12_000, "can": 20_000, "peg-insert-side": 12_000}
EVERY = {"lift": 2_000, "can": 4_000, "peg-insert-side": 2_000}  # steps between evaluations
RELEASED_START = [
    *("--critic-warmup", "0", "--critic-successes", "0", "--choose-successes", "0", "--no-pessimistic-init"),
    "--bc-fallback",
]


@dataclass(frozen=True)
class Config:
    """One line of a figure: its title, its flags, and the script if that is not ogpo_state.py."""

    title: str
    flags: tuple[str, ...] = ()
    script: str = "ogpo_state.py"


def _extraction(title: str, kind: str) -> Config:
    return Config(title, ("--extraction", kind, "--advantage", "vanilla"), "variants/ogpo_extraction.py")


CONFIGS = {
    "ogpo+ca": Config("OGPO+CA"),
    "ogpo+": Config("OGPO+", ("--variant", "ogpo+")),
    "ogpo": Config("OGPO", ("--variant", "ogpo")),
    "ogpo_sb": Config("OGPO, success buffer", ("--variant", "ogpo", "--bc-coef", "1")),
    "ogpo_bon": Config("OGPO, best-of-N", ("--variant", "ogpo", "--best-of-n", "8")),
    "no_sb": Config("OGPO+CA - success buffer", ("--bc-coef", "0")),
    "no_bon": Config("OGPO+CA - best-of-N", ("--best-of-n", "1")),
    "success_critic": Config("OGPO+CA, success critic step", ("--success-critic",)),
    "grpo": Config("OGPO, GRPO std", ("--variant", "ogpo", "--advantage", "grpo")),
    "grpo+": Config("OGPO+, GRPO std", ("--variant", "ogpo+", "--advantage", "grpo")),
    "penultimate": Config("OGPO+, penultimate", ("--variant", "ogpo+", "--advantage", "penultimate")),
    "positive": Config("OGPO+, no negatives", ("--variant", "ogpo+", "--advantage", "positive")),
    "qvr_mean": Config("OGPO+CA, Q-VR mean of 8", ("--next-samples", "8")),
    "qvr_median": Config("OGPO+CA, Q-VR median", ("--next-samples", "8", "--next-reduce", "median")),
    "qvr_trimmed": Config("OGPO+CA, Q-VR trimmed", ("--next-samples", "8", "--next-reduce", "trimmed")),
    "start+ca": Config("OGPO+CA, released start", tuple(RELEASED_START)),
    "start+": Config("OGPO+, released start", ("--variant", "ogpo+", *RELEASED_START)),
    "wsrl": Config(
        "OGPO+CA, WSRL warm-up",
        ("--start-training", "4000", "--critic-warmup", "1000", "--critic-successes", "0", "--choose-successes", "0"),
    ),
    "lr_warmup": Config(
        "OGPO+CA, learning-rate warm-up",
        ("--actor-lr-min", "0", "--actor-lr-warmup", "100", "--actor-lr-period", "1000000"),
    ),
    "calql": Config(
        "OGPO+CA, Cal-QL start",
        ("--calql-steps", "2000", "--critic-warmup", "0", "--critic-successes", "0", "--choose-successes", "0"),
        "variants/ogpo_critic.py",
    ),
    "mc": Config("OGPO+CA, MC regression", ("--calql-steps", "0", "--mc-coef", "1"), "variants/ogpo_critic.py"),
    "chi2": Config("OGPO+, chi-square", ("--variant", "ogpo+"), "variants/ogpo_reference.py"),
    "kl": Config("OGPO+, reverse KL", ("--variant", "ogpo+", "--regularize", "kl"), "variants/ogpo_reference.py"),
    "forward_kl": Config(
        "OGPO+CA, forward KL", ("--regularize", "none", "--forward-kl", "0.1"), "variants/ogpo_reference.py"
    ),
    "bptt": Config("BPTT", ("--extraction", "bptt", "--group", "4"), "variants/ogpo_extraction.py"),
    "awr_fm": _extraction("AWR-FM", "awr_fm"),
    "aw_ogpo": _extraction("AW-OGPO", "aw_ogpo"),
    "aw_ogpo_nn": _extraction("AW-OGPO, no negatives", "aw_ogpo_nn"),
    "ofpo": _extraction("OFPO", "ofpo"),
    "ofpo++": _extraction("OFPO++", "ofpo++"),
    # cloned with the flow's learning rate it swings, and two of three seeds stopped at a policy of 0.03 and 0.09
    "diffusion": Config("OGPO+CA, diffusion", ("--bc-lr", "1e-4"), "variants/ogpo_diffusion.py"),
}
ALONE = ("diffusion",)  # its network predicts something else: it clones for itself
CORE = ("ogpo", "ogpo+", "ogpo+ca", "no_sb", "no_bon", "grpo+", "bptt")
FIGURES: dict[str, list[tuple[str, tuple[str, ...]]]] = {  # figure -> task and configurations of its panels
    "stabilizers": [
        (
            "lift",
            (
                *("ogpo", "ogpo_sb", "ogpo_bon", "ogpo+", "ogpo+ca", "no_sb", "no_bon", "success_critic", "grpo"),
                *("grpo+", "penultimate", "positive", "qvr_mean", "qvr_median", "qvr_trimmed"),
            ),
        )
    ],
    "start": [("lift", ("ogpo+", "ogpo+ca", "start+", "start+ca", "lr_warmup", "wsrl", "calql", "mc"))],
    "reference": [("lift", ("ogpo+", "ogpo+ca", "chi2", "kl", "forward_kl"))],
    "extraction": [("lift", ("ogpo+", "ogpo+ca", "bptt", "awr_fm", "aw_ogpo", "aw_ogpo_nn", "ofpo", "ofpo++"))],
    "tasks": [("can", CORE), ("peg-insert-side", CORE)],
    "diffusion": [(task, ("ogpo+ca", "diffusion")) for task in ("lift", "can")],
}


@dataclass(frozen=True)
class Claim:
    """`first` has more (sign 1), less (-1) or as much (0) of a measure than `second` has of it, or of `other`."""

    text: str
    first: str
    second: str
    measure: str
    sign: int
    other: str = ""


SAME = 0.1  # two success rates agree if the whole interval of their difference is within this
CLAIMS = (
    Claim("a dip without the gate, released start", "start+", "start+", "early", -1, "before"),
    Claim("the gate lessens the dip, released start", "start+ca", "start+", "early", 1),
    Claim("the gate lessens the dip, our start", "ogpo+ca", "ogpo+", "early", 1),
    Claim("our start lessens the dip, without the gate", "ogpo+", "start+", "early", 1),
    Claim("our start lessens the dip, with the gate", "ogpo+ca", "start+ca", "early", 1),
    Claim("a learning-rate warm-up lessens the dip", "lr_warmup", "ogpo+ca", "early", 1),
    Claim("the success buffer decides, in OGPO+CA", "ogpo+ca", "no_sb", "final", 1),
    Claim("the success buffer decides, in OGPO", "ogpo_sb", "ogpo", "final", 1),
    Claim("best-of-N decides, in OGPO+CA", "ogpo+ca", "no_bon", "final", 1),
    Claim("best-of-N decides, in OGPO", "ogpo_bon", "ogpo", "final", 1),
    Claim("best-of-N alone swings more than with the success buffer", "ogpo_bon", "ogpo+", "fall", 1),
    Claim("division by the group's std hurts OGPO", "grpo", "ogpo", "final", -1),
    Claim("division by the group's std hurts OGPO+", "grpo+", "ogpo+", "final", -1),
    Claim("BPTT falls below its cloned policy", "bptt", "bptt", "final", -1, "cloned"),
    Claim("BPTT ends below OGPO+CA", "bptt", "ogpo+ca", "final", -1),
    Claim("chains without advantage hurt nothing (OGPO+ without negatives)", "positive", "ogpo+", "final", 0),
    Claim("AW-OGPO ends below OGPO+", "aw_ogpo", "ogpo+", "final", -1),
    Claim("AW-OGPO without negatives ends as high as OGPO+", "aw_ogpo_nn", "ogpo+", "final", 0),
    Claim("AWR-FM ends below OGPO+", "awr_fm", "ogpo+", "final", -1),
    Claim("OFPO++ ends as high as OGPO+", "ofpo++", "ogpo+", "final", 0),
    Claim("chi-square pessimism does as well as the gate", "chi2", "ogpo+ca", "final", 0),
    Claim("reverse KL does worse than chi-square", "kl", "chi2", "final", -1),
    Claim("a mean of 8 targets does better than one", "qvr_mean", "ogpo+ca", "area", 1),
    Claim("flow and diffusion agree", "diffusion", "ogpo+ca", "final", 0),
)


def cloned(task: str, seed: int) -> Path:
    """Folder of the cloned policy of a task and seed: the stored one, so that later runs start from it too."""
    kept = STORE / f"{task}_clone_s{seed}"
    return kept if (kept / "cloned.pt").exists() else RUNS / f"study_{task}_clone_s{seed}"


def common_flags(task: str, seed: int) -> list[str]:
    return ["--env", task, "--preset", "cpu", "--seed", str(seed), "--no-video"]


def run_one(task: str, config: str, seed: int) -> int:
    """Exit code of one run; `clone` makes the policy from which the others of the task and seed start."""
    flags = common_flags(task, seed)
    if config == "clone":
        if cloned(task, seed).parent == STORE:
            return 0
        return execute("ogpo_state.py", f"study_{task}_clone_s{seed}", [*flags, "--total-steps", "0"])
    c = CONFIGS[config]
    flags += ["--total-steps", str(STEPS[task]), "--eval-every", str(EVERY[task]), *c.flags]
    if config not in ALONE:
        flags += ["--cloned", str(cloned(task, seed).relative_to(ROOT))]
    return execute(c.script, f"study_{task}_{config}_s{seed}", flags)


def run(
    figures: Sequence[str], seeds: Sequence[int], jobs: int, tasks: Sequence[str] = (), only: Sequence[str] = ()
) -> int:
    """Exit code of all runs of some figures, or only of some tasks and configurations of them."""
    panels = [
        (task, [c for c in configs if not only or c in only])
        for figure in figures
        for task, configs in FIGURES[figure]
        if not tasks or task in tasks
    ]
    others = [(task, config, seed) for seed in seeds for task, configs in panels for config in configs]
    others.sort(key=lambda job: job[1] not in ALONE)  # they need not wait for a clone
    clones = [(task, "clone", seed) for task, config, seed in others if config not in ALONE]
    needs = lambda job: None if job[1] in (*ALONE, "clone") else (job[0], "clone", job[2])  # noqa: E731
    return execute_all(run_one, list(dict.fromkeys(clones + others)), jobs, needs)


def store() -> None:
    for task in STEPS:
        for config in ("clone", *CONFIGS):
            for seed in SEEDS:
                source = RUNS / f"study_{task}_{config}_s{seed}"
                keep(source, STORE / f"{task}_{config}_s{seed}", [source / "cloned.pt"] if config == "clone" else [])


@cache
def stored(task: str, config: str) -> dict[int, list[dict]]:
    """{seed: lines of metrics.jsonl}"""
    return {seed: metrics(folder) for seed, folder in kept(STORE, f"{task}_{config}", SEEDS).items()}


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


def first_move(rows: list[dict]) -> float:
    """First logged step with an actor gradient, infinite if the actor never moved."""
    return min(series(rows, "ogpo/actor_grad")[0], default=math.inf)


def evaluations(rows: list[dict], start_training: int) -> dict[str, np.ndarray]:
    """Success rates of a run: `cloned` (1,), `ode`, `bon`, `final` (noise-free, acting).

    `ode`: noise-free, since the actor has moved (if it never did, `final` alone). `bon`: acting, after updates began.
    """
    (steps, ode), (bon_steps, bon) = series(rows, "eval/ode_success"), series(rows, "eval/bon_success")
    moved = steps >= first_move(rows)
    final = np.array([last(rows, f"final/{kind}_success") for kind in ("ode", "bon")])
    return {
        "cloned": ode[:1],
        "ode": ode[moved] if moved.any() else final[:1],
        "bon": bon[bon_steps > start_training],
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


def dip_file(task: str, config: str, seed: int) -> Path:
    """Where `diagnose.py dip` stores {updates of the actor: success rate}, at first of the cloned policy."""
    return STORE / "dip" / f"{task}_{config}_s{seed}.json"


@cache
def numbers(task: str, config: str) -> dict[int, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """{seed: its measures, and the same with all its success rates drawn from their posteriors (DRAWS,)}"""
    found = {}
    for seed, rows in stored(task, config).items():
        args = arguments(STORE / f"{task}_{config}_s{seed}")
        rng = np.random.default_rng([seed, *f"{task}_{config}".encode()])  # no two runs share their draws
        rates = evaluations(rows, args["start_training"])
        episodes = {k: args["eval_interval_episodes"] for k in ("ode", "bon")} | {"final": args["eval_episodes"]}
        episodes["cloned"] = args["eval_episodes"]
        if (file := dip_file(task, config, seed)).exists():
            rates["dip"], episodes["dip"] = np.array([*json.loads(file.read_text()).values()]), DIP_EPISODES
        again = {}
        for k, n in episodes.items():  # Jeffreys posterior: 100 of 100 does not mean certainty
            size = (DRAWS, len(rates[k]))
            again[k] = rng.beta(n * rates[k] + 0.5, n * (1 - rates[k]) + 0.5, size)
        found[seed] = measures(rates), measures(again)
    return found


def judge(claim: Claim, task: str) -> str | None:
    """A line of the table of claims: interquartile mean of first - second over the seeds of both, and its interval."""
    first = numbers(task, claim.first)
    second = numbers(task, claim.second)
    other = claim.other or claim.measure
    seeds = [s for s in sorted(first.keys() & second.keys()) if claim.measure in first[s][0] and other in second[s][0]]
    if not seeds:
        return None
    values = np.array([first[s][0][claim.measure] - second[s][0][other] for s in seeds])
    drawn = np.stack([first[s][1][claim.measure] - second[s][1][other] for s in seeds], -1)  # (DRAWS, seeds)
    middle, low, high = interval(values, drawn)
    if claim.sign:
        holds, fails = (low > 0, high < 0) if claim.sign > 0 else (high < 0, low > 0)
    else:
        holds, fails = -SAME <= low and high <= SAME, low > SAME or high < -SAME
    verdict = "holds" if holds else "does not hold" if fails else "undecided"
    if len(seeds) < len(SEEDS):
        verdict = "seeds missing"
    names = [CONFIGS[claim.first].title, CONFIGS[claim.second].title + (f" ({claim.other})" if claim.other else "")]
    values_text = " ".join(f"{v:+.2f}" for v in values)
    return (
        f"| {claim.text} | {task} | {' / '.join(names)} | {claim.measure} "
        f"| {middle:+.2f} [{low:+.2f}, {high:+.2f}] ({values_text}) | {verdict} |"
    )


@cache
def row(task: str, config: str) -> tuple[str, list[float], tuple[float, float, float]] | None:
    """A line of the table; final success of the acting policy by seed, and its interval."""
    runs = numbers(task, config)
    if not runs:
        return None
    moves = [f"{first_move(rows):.0f}".replace("inf", "never") for rows in stored(task, config).values()]
    cells = [CONFIGS[config].title, " ".join(moves)]
    for key in ("cloned", "lowest", "area", "fall"):
        cells.append(" ".join(f"{found[key]:.2f}" for found, _ in runs.values()))
    for key in ("ode", "final"):
        rates = [float(found[key]) for found, _ in runs.values()]
        drawn = np.stack([again[key] for _, again in runs.values()], -1)  # (DRAWS, seeds)
        middle, low, high = summary = interval(np.array(rates), drawn)
        cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}] ({' '.join(f'{v:.2f}' for v in rates)})")
    return "| " + " | ".join(cells) + " |", rates, summary


def machines() -> str:
    """What the stored runs were trained on, with how many of them, by seed."""
    runs = [json.loads(file.read_text()) for file in sorted(STORE.glob("*_s[0-9]/args.json"))]
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for run in runs:
        counts[run["gpu"] or f"{run['cpu']} without GPU"][run["args"]["seed"]] += 1
    return "; ".join(
        f"{machine} ({', '.join(f'{n} of seed {seed}' for seed, n in sorted(seeds.items()))})"
        for machine, seeds in counts.items()
    )


def report() -> None:
    STORE.mkdir(exist_ok=True)
    text = [
        "# What holds OGPO up: stored results",
        "",
        "Made by `python benchmarks/study.py report`. All methods of a task and seed start from one cloned policy "
        "(diffusion: its own). *Moves*: first logged step (every 500) with an actor gradient; most wait for ten "
        "successes. *Cloned*: success of the noise-free policy before the first update, 100 episodes. "
        "*Lowest*: the lowest of its evaluations since the actor moved (20 episodes each: chance alone puts the lowest "
        "of several below their mean). *Area*: mean of the acting policy's evaluations once updates began; *fall*: the "
        "largest of one from an earlier one. Final: 100 episodes, interquartile mean over seeds with 95 % interval "
        "(seeds in parentheses): a bootstrap over seeds, each rate drawn from its posterior given its episodes "
        "(Jeffreys). "
        f"Trained on: {machines()}.",
    ]
    for figure, panels in FIGURES.items():
        for task, configs in panels:
            lines = [r for config in configs if (r := row(task, config))]
            if not lines:
                continue
            text += ["", f"## {figure}: {task}, {STEPS[task]:,} steps", ""]
            text += [
                "| method | moves | cloned | lowest | area | fall | final, noise-free | final, acting |",
                "|---|---|---|---|---|---|---|---|",
            ]
            text += [line for line, *_ in lines]
        plot(figure)
    lines = [line for claim in CLAIMS for task in STEPS if (line := judge(claim, task))]
    if lines:
        text += ["", "## Claims", ""]
        text += [
            "First minus second of the measure, by seed (same cloned policy), its interquartile mean and interval; "
            "*final*, *fall*, *area* of the acting policy; *early*: the noise-free policy's lowest of "
            f"{DIP_EPISODES} episodes after 1 to 500 updates of the actor, *before*: ahead of them. A claim holds if "
            "the whole interval is on its side, does not if it is on the other; rates agree if it is within "
            f"{SAME} of zero.",
            "",
            "| claim | task | first / second | measure | difference | verdict |",
            "|---|---|---|---|---|---|",
        ]
        text += lines
    (STORE / "results.md").write_text("\n".join(text) + "\n")


def plot(figure: str) -> None:
    """Curves of the acting policy (mean, seeds thin) and final success of every method, beside the cloned policies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(task, [c for c in configs if stored(task, c)]) for task, configs in FIGURES[figure]]
    panels = [(task, configs) for task, configs in panels if configs]
    if not panels:
        return
    height = max(2.8, 0.32 * max(len(configs) for _, configs in panels) + 1.2)
    drawing, axes = plt.subplots(
        len(panels), 2, figsize=(11, height * len(panels)), layout="constrained", squeeze=False
    )  # fmt: skip
    for (task, configs), (left, right) in zip(panels, axes, strict=True):
        for i, config in enumerate(configs):
            colour = plt.get_cmap("tab20")(i % 20)
            curves = [series(rows, "eval/bon_success") for rows in stored(task, config).values()]
            n = min(len(steps) for steps, _ in curves)
            for steps, values in curves:
                left.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            left.plot(curves[0][0][:n], np.mean([v[:n] for _, v in curves], 0), color=colour, linewidth=2)
            line = row(task, config)
            assert line is not None
            _, rates, (middle, low, high) = line
            right.plot([low, high], [i, i], color=colour, linewidth=3, alpha=0.5)
            right.plot(rates, [i] * len(rates), "o", color=colour, markersize=4)
            right.plot([middle], [i], "|", color="black", markersize=12)
        left.set(title=task, xlabel="environment steps", ylabel="success, acting policy", ylim=(-0.03, 1.03))
        right.set(
            yticks=range(len(configs)), yticklabels=[CONFIGS[c].title for c in configs], xlim=(-0.03, 1.03),
            xlabel="final success, acting policy",
        )  # fmt: skip
        right.invert_yaxis()
        if bc := [series(rows, "eval/ode_success")[1][0] for rows in stored(task, "clone").values()]:
            left.axhline(np.mean(bc), color="gray", linestyle="--", label="BC (cloned flow policy, noise-free)")
            right.axvline(np.mean(bc), color="gray", linestyle="--")
            left.legend(loc="best", fontsize=8)
        left.locator_params(axis="x", nbins=7)
        for axis in (left, right):
            axis.grid(alpha=0.3)
    drawing.savefig(STORE / f"{figure}.png", dpi=110)
    plt.close(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "store", "report"))
    parser.add_argument("--figure", nargs="+", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--tasks", nargs="+", choices=list(STEPS), default=[], help="only these")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=[], help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.what == "run":
        sys.exit(run(args.figure, args.seeds, args.jobs, args.tasks, args.configs))
    {"store": store, "report": report}[args.what]()


if __name__ == "__main__":
    main()
