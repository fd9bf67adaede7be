"""Numbers in the sentences of README and docs are those of stored runs, tables, tests and settings, and no others.

A page's checks are sentences with a hole for every number, and what belongs into the holes. What still looks measured
when they are taken out is an error: check it, or say it without the number and put the number into docs/log.md.
"""

import lzma
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import flm
import flm_train
import fmlm_distill
import lift
import ogpo_state
import pixel_speed
import probes
import runs
import study_configs
import study_stats
import tasks
import toy
from common import cli
from common.text.corpora import AUSTEN_HELD_OUT, AUSTEN_TEXT, austen_sentences
from tests.test_docs import LIVE, ROOT, SETTINGS, STORED, cells, name, tables_of, without_code
from variants import ogpo_reference

Said = Iterator[tuple[str, Sequence[object]]]
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")

# --- What is stored ---------------------------------------------------------------------------------------------------


def column(table: str, head: str) -> list[str]:
    first, _, *rows = map(cells, STORED[table].splitlines())
    return [row[first.index(head)] for row in rows]


def numbers(table: str, head: str) -> list[float]:
    """The first number of each cell of a column."""
    return [float(re.search(r"-?[\d.]+", cell.replace(",", ""))[0]) for cell in column(table, head)]


def ends(values: Sequence[float], digits: int = 0) -> tuple[str, str]:
    """The lowest and the highest."""
    return f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"


def short(x: float) -> str:
    """0.0005 as 5e-4."""
    return f"{x:.0e}".replace("e-0", "e-")


def texts(method: str, measure: str) -> dict[str, np.ndarray]:
    """{network calls: value of every seed} of FLM's or FMLM's samples, judge ngram."""
    tables = flm.stored(method, "ngram").values()
    return {
        line[0].text.removesuffix(" steps"): np.array([getattr(score, measure) for score in line])
        for line in zip(*tables, strict=True)
    }


def text_minutes(method: str) -> str:
    """Of training alone on two cores."""
    return dict(zip(column("flm/minutes", "method"), column("flm/minutes", "minutes"), strict=True))[method]


def toy_minutes(name: str) -> str:
    """In words."""
    minutes = round(toy.stored()[name].minutes)
    return "a minute" if minutes == 1 else f"{WORDS[minutes]} minutes"


def toy_distances(run: str, *steps: int) -> list[str]:
    """In so many steps; in 0: of real text."""
    found = toy.stored()[run].files["distances"]
    return [f"{found[f'{n} steps' if n else 'real text']:.3f}" for n in steps]


def differences(claim: str) -> list[float]:
    """Sizes of the differences of a claim of the study, all tasks."""
    found = zip(column("study/verdicts", "claim"), numbers("study/verdicts", "difference"), strict=True)
    return [abs(x) for text, x in found if text == claim]


def critic(run: str, step: str) -> list[float]:
    """success, mean Q, mean return, correlation, variance along and across, ..."""
    rows = map(cells, STORED["diagnostics/critics"].splitlines())
    return next([float(x) for x in row[2:]] for row in rows if row[:2] == [run, step])


def in_test(file: str, pattern: str) -> str:
    """A number as a test states it."""
    return re.search(pattern, (ROOT / "tests" / file).read_text(), re.DOTALL)[1]


def hermite_error(vocab: int) -> float:
    """What 100 Gauss-Hermite nodes in place of the trapezoid rule do to tau."""
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(100))
    t, tau = flm_train.accuracy_table(vocab)[:, :-1:50]
    q = torch.exp((vocab - 1) * torch.special.log_ndtr(nodes + (t / (1 - t))[:, None])) @ (weights / weights.sum())
    return ((vocab * q - 1) / (vocab - 1) - tau).abs().max().item()


# --- What the pages say -----------------------------------------------------------------------------------------------


def readme() -> Said:
    cloned, final = (numbers("lift/summary", head)[0] for head in ("BC (no RL update)", "ODE policy"))
    minutes, steps = numbers("lift/ogpo+ca", "minutes"), lift.stored("ogpo+ca")[1].args["total_steps"]
    yield (
        "Lift goes from {:.0f} % to {:.0f} % success in {:,} steps: {:.0f} minutes on two",
        (100 * cloned, 100 * final, steps, np.mean(minutes)),
    )
    yield "at {} after {} to {} steps", (0.9, *ends(numbers("lift/ogpo+ca", "steps to 0.9")))
    flow, jumps = texts("flm", "perplexity"), texts("fmlm", "perplexity")
    beaten = max(int(n) for n, x in list(flow.items())[:-1] if x.mean() > jumps["1"].mean())
    yield "in one network call a lower perplexity than FLM (blue) in {}", [beaten]
    set_up = [numbers("measured/set_up", head)[0] for head in ("minutes", "GiB")]
    yield "{:.0f} minutes and {:.0f} GiB is what the set-up took", set_up
    first = column("lift/ogpo+ca", "BC")[0], column("lift/ogpo+ca", "ODE")[0]
    yield (
        "Expect {} for the cloned policy of seed 1 and {} at the end, after {} to {} minutes",
        (*first, *ends(minutes)),
    )
    yield "`--env toy` needs no simulator and takes {}.", [toy_minutes("toy_state")]
    yield "# {} minutes on two cores # {} minutes; FLM_RUN is", [text_minutes("FLM"), text_minutes("FMLM")]
    yield "perplexity of {} to {} in 32 calls of the first", ends(np.round(flow["32"], -1))
    yield "of {} to {} in one call of the second", ends(np.round(jumps["1"], -1))
    yield "that gives real text {:.0f}.", [flow["real text"][0]]
    longest = max(("toy_flm", "toy_fmlm", "toy_fmlm_teacher"), key=lambda name: toy.stored()[name].minutes)
    yield "`--data toy` takes {} each", [toy_minutes(longest)]
    laptop, paper = numbers("measured/update_gpu", "an update")
    yield "an update takes {:.0f} ms with `laptop` and {:.0f} ms with `paper`", (laptop, paper)
    steps = ogpo_state.default_args("square", "paper", "ogpo+ca").run.total_steps
    yield "the paper's sizes and schedule: {:,} steps", [steps]
    yield "the second command is {} days of updates", [WORDS[round(steps * paper / 86_400_000)]]
    yield "success {:.2f} → {:.2f}, five seeds | {}-{} min", (cloned, final, *ends(minutes))
    pixels = [numbers("pixels/short", head)[0] for head in ("cloned", "fine-tuned", "minutes")]
    yield "{:.2f} → {:.2f}, three seeds | {:.0f} min", pixels
    yield "perplexity {:,.0f} in 32 calls | {} min", (flow["32"].mean(), text_minutes("FLM"))
    yield "perplexity {:,.0f} in one call | {} min", (jumps["1"].mean(), text_minutes("FMLM"))
    yield "{} more tasks", [WORDS[len(column("tasks/short", "task"))]]
    ranges = [ends(numbers("tasks/short", head), n) for head, n in (("cloned", 2), ("fine-tuned", 2), ("minutes", 0))]
    yield "cloned policies of {} to {} to {} to {} in {} to {} minutes", sum(ranges, ())
    yield "{} methods on three seeds", [len(study_configs.CONFIGS)]


def flm_page() -> Said:
    yield "shipped: {} minutes on two cores", [text_minutes("FLM")]
    yield "with a known distribution: {} #", [toy_minutes("toy_flm")]
    yield "two against one, {} over 20 steps", [in_test("test_text_training.py", r"approx\(two, abs=(\S+)\)")]
    text, sentences = lzma.decompress(AUSTEN_TEXT.read_bytes()), sum(map(len, austen_sentences()))
    chapters = len(text.split(b"\n\n")[AUSTEN_HELD_OUT])
    yield "Austen is {:.1f} MB, {:,} sentences; {} whole chapters", (len(text) / 1e6, sentences, chapters)
    yield "nodes, up to {} off", [f"1e{math.ceil(math.log10(hermite_error(50_258)))}"]
    yield "three seeds, {} samples a column", [runs.read(flm.STORE)["flm_s1"].args["samples"]]
    ablation = runs.read(flm.STORE)["flm_ablation_softmax_ce"].args
    yield "of the paper, {:,} steps of {} rows", (ablation["total_steps"], ablation["batch"])
    yield "seed 1, {:,} samples: total", [toy.stored()["toy_flm"].args["samples"]]
    yield "distance {} from the language in 32 steps of the bridge, {} in one", toy_distances("toy_flm", 32, 1)
    yield "held-out sentences have {}", toy_distances("toy_flm", 0)


def fmlm_page() -> Said:
    yield "cross entropy: {} minutes on two cores", [text_minutes("FMLM")]
    yield "flow and map together, {} #", [toy_minutes("toy_fmlm")]
    exact = [
        in_test("test_fmlm_distill.py", rf"def test_{target}.*?(?:atol=|item\(\) < )(1e-\d)")
        for target in ("semigroup", "lagrangian", "residual")
    ]
    yield "semigroup {}, Lagrangian and Eulerian {}, residual {}", exact
    flow, jumps = texts("flm", "perplexity"), texts("fmlm", "perplexity")
    beaten = [int(n) for n in list(flow)[:-1] if (jumps["1"] < flow[n]).all()]
    yield "One call of FMLM has a lower perplexity than {} to {} calls of its teacher", ends(beaten)
    entropy = texts("fmlm", "entropy")
    yield "at {} to {} % of the entropy of its own 32 calls", ends(100 * entropy["1"] / entropy["32"])
    yield "distance {} from the language in one call, {} in four", toy_distances("toy_fmlm_teacher", 1, 4)
    yield "the teacher has {} in 32 steps of the bridge", toy_distances("toy_flm", 32)
    yield "Without a teacher: {} and {}", toy_distances("toy_fmlm", 1, 4)


def pixels_page() -> Said:
    minutes = numbers("pixels/short", "minutes")[0]
    yield "The toy task takes {} of one core; Lift about {:.0f} minutes", (toy_minutes("toy_pixels"), minutes)
    gib = {what: size * 1e6 / 2**30 for what, size in pixel_speed.memory().items()}
    yield "features only: {:.2f} GiB for a million environment steps", [gib["features"]]
    yield "With the images of every step it would be {:.0f} GiB", [gib["images of every step"]]


def state_page() -> Said:
    args = ogpo_state.default_args("lift", "laptop", "ogpo+ca")
    yield "with ε = {} the plain product", [args.actor.clip]
    yield "follows the actor with step {}.", [short(ogpo_reference.ReferenceArgs().slow_rate)]
    paper, laptop = (ogpo_state.default_args("lift", preset, "ogpo+ca").critic for preset in ("paper", "laptop"))
    rates = f"{paper.critic_lr * 1e5:g}e-5", short(laptop.critic_lr)
    yield "critic learning rate | {} (the script says 3e-4) | {} (3)", rates
    x = torch.linspace(-6, 6, 10_001, dtype=torch.float64)
    gelu = torch.nn.functional.gelu
    yield "differs by < {}", [short((gelu(x) - gelu(x, approximate="tanh")).abs().max().item())]
    default, hard = (lift.stored(config)[1].args for config in ("ogpo+ca", "hard_0.2"))
    yield "{} on Lift, evaluation {} (2)", (default["collect_horizon"], default["horizon"])
    yield "Lift, {:,} environment steps, success over {} episodes", (default["total_steps"], default["eval_episodes"])
    yield "is the hard start, {:,} steps", [hard["total_steps"]]
    kept = np.mean([run.series("ogpo/nonzero")[1].mean() for run in lift.stored("ogpo+ca").values()])
    yield "on Lift {:.0f} % of the chains have an advantage", [100 * kept]
    yield "agree to {} in double precision", [in_test("test_training.py", r"allclose\(a, b, rtol=(\S+),")]


def study_page() -> Said:
    yield "Lift {:,} steps, Can {:,}, peg-insert-side {:,}", list(study_configs.STEPS.values())
    yield "diffusion ends {} to {} higher", ends(differences("flow and diffusion agree"), 2)
    pessimism = differences("chi-square pessimism does as well as the gate")[0]
    yield "it ends {:.2f} higher, and {} was the limit", (pessimism, study_configs.SAME)
    yield "over {} episodes of the acting policy", [probes.EPISODES]
    yield "over {} chains in each of {} visited states", (probes.CHAINS, probes.STATES)
    *_, along, across, _, _ = np.array(critic("lift_ogpo+ca_s1", "12,000")) / critic("lift_ogpo+ca_s1", "6,000")
    yield "Both fall by more than {} once", ["half" if max(along, across) < 0.5 else f"{min(along, across):.2f}"]
    _, q, earned, *_ = critic("lift_bptt_s1", "8,000")
    yield "a mean Q of \u2212{:.0f} and earns \u2212{:.0f}", (-q, -earned)
    yield "the same {} episodes before", [study_stats.DIP_EPISODES]


def tasks_page() -> Said:
    rates = zip(column("tasks/seeds", "task"), numbers("tasks/seeds", "best-of-N policy"), strict=True)
    yield "one seed stays at {:.2f}", [min(rate for task, rate in rates if task == "square")]
    lowest = [min(map(float, row)) for row in (cells(line)[1:] for line in STORED["tasks/mt10"].splitlines()[2:])]
    good = [x for x in lowest if x >= 0.9]
    yield "the other {} tasks are at {:.1f} to {:.1f}", (WORDS[len(good)], min(good), max(good))
    resets = [numbers("measured/env_speed", head) for head in ("reset, new model ms", "reset ms")]
    yield "costs more than a {} times a plain reset", ["hundred" if np.divide(*resets).min() > 100 else "?"]


CHECKS: dict[str, Callable[[], Said]] = {
    "README.md": readme,
    "docs/flm_train.md": flm_page,
    "docs/fmlm_distill.md": fmlm_page,
    "docs/ogpo_pixels.md": pixels_page,
    "docs/ogpo_state.md": state_page,
    "docs/ogpo_study.md": study_page,
    "docs/tasks.md": tasks_page,
}

# --- What may stand unchecked -----------------------------------------------------------------------------------------

ALLOWED = {  # kind -> what it looks like
    "licence": r"CC BY 4\.0",
    "code": r"`[^`]*`|\]\([^)]*\)",
    "equation": r"\$\$.*?\$\$|\$[^$]*\$",
    "heading of a page": r"\b[SP] \d[\d., -]*",
    "version": r"(?:Python |MuJoCo |torch |\bv)\d+\.\d+|\b\d+\.\d+\.\d+",
    "citation": r"arXiv \d{4}\.\d{5}",
    "level of an interval": r"95 %",
    "level that a table names": r"[Ss]teps to 0\.\d(?: and 0\.\d)?|episodes at 0\.9",
    "number of a paper": r"the paper: 0\.8 for LM1B|48 to 53 % is one of 14 to 27 % .* 0\.27, 0\.20, 0\.14 on Square",
    "setting of the released code": r"\(the script says 3e-4\)|at 3e-4 a short run|plus 1e-8"
    r"|cosine, (?:peak 3e-4|1e-8 to 4\.5e-5)|1e-6 on ToolHang"
    r"|\| least of two random heads; noise 0\.01|3e-4 to 4\.5e-5|1e-5 \(Square\), 1e-6 \(ToolHang"
    r"|10(?: or|.* else) \u22120\.1|noise of 0\.01 .* 3e-4; the scripts run 0\.05 .* 4\.5e-5",
    "bound in the code": r"kept above 1e-3|not fall below 1e-3|at least 1e-6|decay of the critics \| 1e-5",
    "setting of a benchmark": r"starts 1e-15 faster|below 0\.9 it trades .* 0\.7 to 0\.8 reads best",
    "interval of actions": r"\[\u22121, 1\]",
    "reward as trained": r"\u22121 a step",
    "part of a thing": r"half the width|two half jumps|by quarters|a quarter of # episodes",
}
UNIT = r"(?:minutes?|min|seconds|hours?|days?|ms|GiB|GB|MB|%|times|tokens/s|steps/s)(?!\w)"
MEASURED = re.compile(  # a decimal, a negative number, a number with a unit, k of n, a part of a thing, a perplexity
    rf"""\d\.\d | \de-\d | \u2212\d | \d\s?{UNIT} | \b(?:an?|{"|".join(WORDS)}|hundreds?|thousands?)\ (?:of\ )?{UNIT}
    | \d\ of\ \d | \bhalf\b | \b(?:third|quarter|fifth|sixth|tenth)s?\ of | one\ time\ in\ \w
    | perplexity\ (?:of\ )?\d""",
    re.VERBOSE,
)


def prose(page: Path) -> str:
    """A page on one line, of its code the comments, without samples and tables of stored results or of settings."""
    text = re.sub(
        r"^```bash\n.*?^```", lambda m: "\n".join(re.findall("# .*", m[0])), page.read_text(), flags=re.M | re.S
    )
    for table in tables_of(page):
        if table.rstrip() in STORED.values() or (name(page), cells(table.splitlines()[0])[0]) in SETTINGS:
            text = text.replace(table, "")
    return " ".join(without_code(text).split())


def pattern(sentence: str, values: Sequence[object]) -> str:
    """Matches the sentence with its numbers, and not with longer ones that hold them."""
    return rf"(?<![\w.]){re.escape(sentence.format(*values))}(?!\w|\.\d)"


@pytest.mark.parametrize("page", CHECKS)
def test_page_numbers_are_those_of_stored_results(page: str) -> None:
    text = prose(ROOT / page)
    assert not [said[0].format(*said[1]) for said in CHECKS[page]() if not re.search(pattern(*said), text)]


def unchecked(text: str, page: str) -> list[str]:
    """What looks measured beside the checked sentences of the page and what is allowed, with some context."""
    for sentence, values in CHECKS.get(page, lambda: ())():
        text = re.sub(pattern(sentence, values), re.sub("{.*?}", "#", sentence), text)
    for allowed in ALLOWED.values():
        text = re.sub(allowed, "#", text)
    return [text[max(0, m.start() - 40) : m.end() + 20] for m in MEASURED.finditer(text)]


# It quotes values of papers and settings on every line; what was measured stands in a stored table, or in the log.
QUOTES = ROOT / "docs" / "baselines.md"


@pytest.mark.parametrize("page", [page for page in LIVE if page != QUOTES], ids=name)
def test_page_has_no_unchecked_number(page: Path) -> None:
    assert not unchecked(prose(page), name(page))


def test_page_of_quotes_tells_no_results_in_its_sentences() -> None:
    results = r"\b(?:ends?|ended|reach\w*|success|seeds? \d[\d, ]*:?|cloned) (?:at |of |to )?[01]\.\d"
    assert not re.findall(results, prose(QUOTES))


def test_unchecked_finds_numbers() -> None:
    measured = (
        "success 0.93", "a rate of 3e-4", "it earns \u221299", "12 minutes", "takes a minute", "two days of it", "39 %",
        "2,900 tokens/s", "12 of 20 episodes", "half of the chains", "one time in eight", "perplexity of 410",
    )  # fmt: skip
    assert all(unchecked(f"There {text}.", "") for text in measured)
    assert not unchecked("It has 20 episodes of 300 steps [S 1.4], seeds 1 to 3 and MuJoCo 3.10.", "")


# --- Settings and samples ---------------------------------------------------------------------------------------------


def test_tasks_page_has_the_tables_of_settings() -> None:
    tables = tasks.settings_tables().split("\n\n")
    assert len(tables) == 3 and all(f"{table}\n" in (ROOT / "docs" / "tasks.md").read_text() for table in tables)


def in_numbers(cell: str) -> float:
    """2e-3, 1,000, 1/32, "last 30 %", none."""
    found = re.search(r"[\d,]+/\d+|[\d.,]+(e-\d)?", cell)
    value = 0.0 if cell == "none" else float(Fraction(found[0].replace(",", "")))
    return value / 100 if cell.endswith("%") else value


@pytest.mark.parametrize(
    ("page", "script", "fields"),
    [
        ("flm_train", flm_train, ("batch", "total_steps", "lr", "beta2", "decay", "ema", "dropout")),
        ("fmlm_distill", fmlm_distill, ("batch", "total_steps", "lr", "beta2", "boundary")),
    ],
)
def test_language_pages_settings_are_those_of_the_script(page: str, script: Any, fields: tuple[str, ...]) -> None:
    table = next(t for t in tables_of(ROOT / "docs" / f"{page}.md") if "| rate |" in t)
    for first, *line in map(cells, table.splitlines()[2:]):
        for data in re.findall(r"`(\w+)`", first):
            args = cli.flatten(script.default_args(data=data))
            if script is flm_train:
                assert line[0] == f"{args['layers']}x{args['width']}"
            assert [in_numbers(cell) for cell in line[-len(fields) :]] == [args[field] for field in fields], data


@pytest.mark.parametrize(("page", "run", "calls"), [("flm_train", "flm_s1", 128), ("fmlm_distill", "fmlm_s1", 1)])
def test_language_pages_show_the_first_stored_samples(page: str, run: str, calls: int) -> None:
    texts = runs.read(flm.STORE)[run].files[f"samples_{calls}_steps.txt"].split("\n----\n")
    samples = "\n----\n".join(texts[:3])
    assert f"```\n{samples}\n```" in (ROOT / "docs" / f"{page}.md").read_text()
