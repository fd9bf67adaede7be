"""The docs: tags of scripts, links, flags, tables and numbers are those of the code and of the stored results."""

import ast
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(p for p in (*ROOT.glob("*.py"), *ROOT.glob("variants/*.py")))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
LIVE = [page for page in PAGES if page.name != "log.md"]  # the log keeps the names and numbers of its time


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- Tags -------------------------------------------------------------------------------------------------------------

TAG = re.compile(r"\[([SP]) (\d[0-9., -]*)\]")


def sections(text: str) -> set[str]:
    """Sections that the tags of a text name, as "S 1.4"; a range names all of its own."""
    found = set()
    for letter, numbers in TAG.findall(text):
        for part in numbers.split(","):
            first, _, last = part.strip().partition("-")
            head, _, low = first.rpartition(".")
            high = last.rpartition(".")[2] or low
            found |= {f"{letter} {head}.{n}" if head else f"{letter} {n}" for n in range(int(low), int(high) + 1)}
    return found


def test_sections_expands_lists_and_ranges() -> None:
    assert sections("[S 1.9-1.11] [P 1.4, 5] [C]") == {"S 1.9", "S 1.10", "S 1.11", "P 1.4", "P 5"}


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_script_tags_are_headings_of_its_page(script: Path) -> None:
    text = script.read_text()
    page = re.search(r"docs/(\w+\.md)", ast.get_docstring(ast.parse(text)) or "")
    assert page, "the docstring names no page"
    headings = set(re.findall(r"^#+ ([SP] [\d.]+) ", (ROOT / "docs" / page[1]).read_text(), re.MULTILINE))
    named = sections(text)
    assert len(named) > 5
    assert named <= headings, f"{page[1]} lacks {sorted(named - headings)}"
    assert not re.findall(r"\bdocs \d\S*", text), "a section is named by its tag, as [P 1.6]"


# --- Links ------------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(h) for h in re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)}


def test_slug_is_that_of_github() -> None:
    assert slug("S 1.4 Likelihood and `ratio`") == "s-14-likelihood-and-ratio"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name)
def test_page_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


# --- Flags ------------------------------------------------------------------------------------------------------------

OTHERS = {"help", "index-url", "no-deps", "nproc_per_node"}  # of every script, pip and torchrun


@cache
def flags(script: str) -> frozenset[str]:
    """Flags of a script: fields of its argument dataclasses, or what it adds to argparse."""
    text = (ROOT / script).read_text()
    found = set(re.findall(r'add_argument\("--([\w-]+)"', text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Args") and node.name != "Args":
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    flag = field.target.id.replace("_", "-")
                    found |= {flag, f"no-{flag}"} if ast.unparse(field.annotation) == "bool" else {flag}
    return frozenset(found)


def every_flag() -> set[str]:
    files = [*SCRIPTS, *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")]
    return set().union(*(flags(name(file)) for file in files))


@pytest.mark.parametrize("page", LIVE, ids=name)
def test_page_flags_exist(page: Path) -> None:
    """A flag behind a script on one line is that script's; elsewhere it is a flag of some script."""
    unknown, some = [], every_flag()
    for line in page.read_text().splitlines():
        script = re.search(r"(?:python|torchrun[^`]*?) ((?:\w+/)?\w+\.py)", line)
        known = flags(script[1]) if script and (ROOT / script[1]).exists() else some
        unknown += [
            f"--{flag}: {line}" for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", line) if flag not in known | OTHERS
        ]
    assert not unknown


@pytest.mark.parametrize("page", LIVE, ids=name)
def test_page_scripts_exist(page: Path) -> None:
    named = set(re.findall(r"\bpython ((?:\w+/)*\w+\.py)", page.read_text()))
    assert not {script for script in named if not (ROOT / script).exists()}


# --- Tables -----------------------------------------------------------------------------------------------------------

# Tables of numbers that are settings, sizes or limits, by page and first column's head; no run measures them.
SETTINGS = {("docs/tasks.md", "task"), ("docs/tasks.md", "`--env`"), ("docs/flm_train.md", "`--data`"),
            ("docs/fmlm_distill.md", "`--data`")}  # fmt: skip


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """{name: Markdown table} of all stored results."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    return tables.tables()


def tables_of(page: Path) -> list[str]:
    return re.findall(r"(?:^\|.*\|\n)+", without_code(page.read_text()) + "\n", re.MULTILINE)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def is_of_numbers(table: str) -> bool:
    """Whether most cells but those of the first column begin with a number."""
    body = [cell for line in table.splitlines()[2:] for cell in cells(line)[1:]]
    return sum(bool(re.match(r"[-+\u2212]?\d", cell)) for cell in body) > len(body) / 2


@pytest.mark.parametrize("page", LIVE, ids=name)
def test_page_tables_are_those_of_stored_results(page: Path, stored: dict[str, str]) -> None:
    heads, wrong = {table.splitlines()[0] for table in stored.values()}, []
    for table in map(str.rstrip, tables_of(page)):
        head = table.splitlines()[0]
        a_setting = (name(page), cells(head)[0]) in SETTINGS and head not in heads
        if (head in heads or is_of_numbers(table)) and not a_setting and table not in stored.values():
            wrong.append(head)
    assert not wrong


def test_pages_show_each_benchmark(stored: dict[str, str]) -> None:
    shown = "\n".join(page.read_text() for page in LIVE)
    for key in ("lift/summary", "tasks/summary", "pixels/seeds", "flm/calls", "fmlm/calls", "study/verdicts"):
        assert stored[key] in shown, key


# --- Numbers in sentences ---------------------------------------------------------------------------------------------

Tables = dict[str, str]


def column(table: str, head: str) -> list[str]:
    first, _, *rows = map(cells, table.splitlines())
    return [row[first.index(head)] for row in rows]


def numbers(values: list[str]) -> list[float]:
    """The first number of each cell."""
    return [float(re.search(r"-?[\d.]+", value.replace(",", ""))[0]) for value in values]


def mean_minutes(t: Tables) -> list[str]:
    minutes = numbers(column(t["lift/ogpo+ca"], "minutes"))
    return [f"{sum(minutes) / len(minutes):.0f}"]


def lift(t: Tables) -> list[str]:
    before, after = (numbers(column(t["lift/summary"], head))[2] for head in ("BC (no RL update)", "ODE policy"))
    return [f"{before:.2f}", f"{after:.2f}"]


def lift_percent(t: Tables) -> list[str]:
    return [f"{100 * float(x):.0f}" for x in lift(t)]


def lift_seed(t: Tables) -> list[str]:
    minutes = numbers(column(t["lift/ogpo+ca"], "minutes"))
    return [column(t["lift/ogpo+ca"], head)[0] for head in ("BC", "ODE")] + [
        f"{f(minutes):.0f}" for f in (min, max)
    ]  # fmt: skip


def suite(t: Tables) -> list[str]:
    """Ranges over the tasks: cloned, fine-tuned, minutes."""
    ranges = [numbers(column(t["tasks/short"], head)) for head in ("cloned", "fine-tuned", "minutes")]
    return [f"{f(x):.{d}f}" for x, d in zip(ranges, (2, 2, 0), strict=True) for f in (min, max)]


def pixels(t: Tables) -> list[str]:
    return [f"{numbers(column(t['pixels/short'], head))[0]:.2f}" for head in ("cloned", "fine-tuned")] + [
        column(t["pixels/short"], "minutes")[0]
    ]


def score(t: Tables, text: str) -> list[str]:
    """Mean perplexity of a line of the n-gram judge's table."""
    row = column(t["flm/ngram"], "text").index(text)
    return [f"{numbers(column(t['flm/ngram'], 'perplexity (seeds)'))[row]:,.0f}"]


def text_ranges(t: Tables) -> list[str]:
    """Lowest and highest perplexity: FLM in 16 calls, to hundreds, FMLM in one, to tens; real text."""
    seeds = [row for row in t["flm/calls"].splitlines()[2:]]
    first = numbers([cells(row)[5] for row in seeds])
    second = numbers([cells(row)[1] for row in t["fmlm/calls"].splitlines()[2:]])
    real = numbers([cells(seeds[0])[-1]])
    return [f"{round(f(first), -2):,.0f}" for f in (min, max)] + [
        *(f"{round(f(second), -1):,.0f}" for f in (min, max)), f"{real[0]:.0f}"
    ]  # fmt: skip


def gpu(t: Tables) -> list[str]:
    return [f"{x:.0f}" for x in numbers(column(t["measured/update_gpu"], "an update"))]


def verdict(t: Tables, claim: str) -> list[str]:
    """Sizes of the differences of a claim, all tasks."""
    claims, found = column(t["study/verdicts"], "claim"), column(t["study/verdicts"], "difference")
    return [f"{abs(x):.2f}" for x in numbers([d for c, d in zip(claims, found, strict=True) if c == claim])]


CHI_SQUARE = "chi-square pessimism does as well as the gate"


def worst_square(t: Tables) -> list[str]:
    """Lowest final success of the acting policy on Square."""
    rates = numbers(column(t["tasks/seeds"], "best-of-N policy"))
    square = [r for r, task in zip(rates, column(t["tasks/seeds"], "task"), strict=True) if task == "square"]
    return [f"{min(square):.2f}"]


def critic(t: Tables) -> list[str]:
    """Mean Q and return of BPTT 2,000 steps after its first gradient."""
    table = t["diagnostics/critics"]
    row = next(row for row in map(cells, table.splitlines()) if row[:2] == ["lift_bptt_s1", "8,000"])
    return [f"{abs(float(row[i])):.0f}" for i in (3, 4)]


def entropy_shares(t: Tables) -> list[str]:
    """Entropy of FMLM's one call over that of its 32 calls, lowest and highest seed, in percent."""
    rows = [[float(cell.split("/")[1]) for cell in cells(row)[1:]] for row in t["fmlm/calls"].splitlines()[2:]]
    shares = [100 * row[0] / row[4] for row in rows]
    return [f"{f(shares):.0f}" for f in (min, max)]


# (page, pattern, what its groups must be); a blank in a pattern stands for any space, also a line's end
NUMBERS: list[tuple[str, str, Callable[[Tables], list[str]]]] = [
    ("README.md", r"Lift goes from (\d+) % to (\d+) % success", lift_percent),
    ("README.md", r"in 20,000 steps: (\d+) minutes on two CPU cores", mean_minutes),
    (
        "README.md",
        r"Expect (\S+) for the cloned policy of seed 1 and (\S+) at the end, after (\d+) to (\d+) min",
        lift_seed,
    ),
    ("README.md", r"Lift, from state \| success (\S+) → (\d\.\d+)", lift),
    ("README.md", r"five seeds \| (\d+)-(\d+) min", lambda t: lift_seed(t)[2:]),
    ("README.md", r"two cameras \| (\S+) → (0\.\d+), three seeds \| (\d+) min", pixels),
    ("README.md", r"perplexity ([\d,]+) in 16 calls", lambda t: score(t, "FLM, 16 steps")),
    ("README.md", r"perplexity (\d+) in one call", lambda t: score(t, "FMLM, 1 steps")),
    (
        "README.md",
        r"perplexity of (\S+) to (\S+) in 16 calls .* of (\d+) to (\d+) in one .* real text (\d+)",
        text_ranges,
    ),
    ("README.md", r"policies of (\S+) to (\S+) to (\S+) to (\S+) in (\d+) to (\d+) minutes", suite),
    ("README.md", r"takes (\d+) ms with `laptop` and (\d+) ms with `paper`", gpu),
    ("docs/ogpo_pixels.md", r"Lift about (\d+) minutes on two", lambda t: pixels(t)[2:]),
    ("docs/ogpo_study.md", r"diffusion ends (\S+) to (\S+) higher", lambda t: verdict(t, "flow and diffusion agree")),
    ("docs/ogpo_study.md", r"it ends (\S+) higher, and 0\.1", lambda t: verdict(t, CHI_SQUARE)),
    ("docs/ogpo_study.md", r"a mean Q of \u2212(\d+) and earns \u2212(\d+)", critic),
    ("docs/tasks.md", r"one seed stays at (\d\.\d+)", worst_square),
    ("docs/fmlm_distill.md", r"at (\d+) to (\d+) % of the entropy of its own 32 calls", entropy_shares),
]


@pytest.mark.parametrize(("page", "pattern", "expected"), NUMBERS, ids=[f"{p}: {r[:30]}" for p, r, _ in NUMBERS])
def test_page_numbers_are_those_of_stored_results(
    page: str, pattern: str, expected: Callable[[Tables], list[str]], stored: Tables
) -> None:
    found = re.search(pattern, " ".join((ROOT / page).read_text().split()))
    assert found, "the sentence has changed: change its pattern too"
    assert list(found.groups()) == expected(stored)


def test_readme_counts(monkeypatch: pytest.MonkeyPatch, stored: Tables) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from study_configs import CONFIGS

    readme = (ROOT / "README.md").read_text()
    assert f"{len(CONFIGS)} methods on three seeds" in readme
    assert len(column(stored["tasks/short"], "task")) == 11 and "eleven more tasks" in readme
    hard = numbers(column(stored["lift/hard"], "ODE"))
    assert sum(rate >= 0.9 for rate in hard) == 4 and len(hard) == 5 and "four of five seeds learn, one fails" in readme


# --- Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", LIVE, ids=name)
def test_page_has_no_more_than_a_screen_of_prose_in_a_row(page: Path) -> None:
    prose, longest = 0, 0
    for line in re.sub(
        r"^(```.*?^```|\$\$.*?\$\$)", "|", page.read_text(), flags=re.MULTILINE | re.DOTALL
    ).splitlines():
        prose = 0 if line.startswith(("|", "#", "!")) else prose + bool(line.strip())
        longest = max(longest, prose)
    assert longest <= 25


def test_changelog_and_citation_name_the_same_version() -> None:
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    date = re.search(r"^date-released: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version and date
    assert f"## [{version[1]}] - {date[1]}" in (ROOT / "CHANGELOG.md").read_text()
