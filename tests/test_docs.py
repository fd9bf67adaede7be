"""The docs: tags of scripts, links, flags and tables are those of the code and of the stored results."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import tables

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((*ROOT.glob("*.py"), *ROOT.glob("variants/*.py"), *ROOT.glob("baselines/*.py")))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
LIVE = [page for page in PAGES if page.name != "log.md"]  # the log keeps the names and numbers of its time


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- Tags -------------------------------------------------------------------------------------------------------------

TAG = re.compile(r"\[([SPB]) (\d[0-9., -]*)\]")


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
    pages = re.findall(r"docs/(\w+\.md)", ast.get_docstring(ast.parse(text)) or "")
    assert pages, "the docstring names no page"
    said = "\n".join((ROOT / "docs" / page).read_text() for page in pages)
    headings = set(re.findall(r"^#+ ([SPB] [\d.]+) ", said, re.MULTILINE))
    named = sections(text)
    assert len(named) >= 3
    assert named <= headings, f"{', '.join(pages)} lack {sorted(named - headings)}"
    assert not re.findall(r"\bdocs \d\S*", text), "a section is named by its tag, as [P 1.6]"


@pytest.mark.parametrize(
    ("script", "lines"), [("ogpo_state", 650), ("ogpo_pixels", 750), ("flm_train", 690), ("fmlm_distill", 710)]
)
def test_script_is_short_and_its_losses_stand_in_its_first_half(script: str, lines: int) -> None:
    text = (ROOT / f"{script}.py").read_text()
    first = next(node.lineno for node in ast.parse(text).body if getattr(node, "name", "").endswith("_loss"))
    assert len(text.splitlines()) <= lines and first < 330


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
    for target in re.findall(r"(?:\]\(|^\[[^]]+\]: )([^)\s]+)", without_code(page.read_text()), re.MULTILINE):
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
SETTINGS = {("docs/baselines.md", ""), ("docs/tasks.md", "task"),
            ("docs/tasks.md", "`--env`"), ("docs/flm_train.md", "`--data`"),
            ("docs/fmlm_distill.md", "`--data`")}  # fmt: skip


STORED = tables.tables()  # {name: Markdown table} of all stored results


def tables_of(page: Path) -> list[str]:
    return re.findall(r"(?:^\|.*\|\n)+", without_code(page.read_text()) + "\n", re.MULTILINE)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def is_of_numbers(table: str) -> bool:
    """Whether most cells but those of the first column begin with a number."""
    body = [cell for line in table.splitlines()[2:] for cell in cells(line)[1:]]
    return sum(bool(re.match(r"[-+\u2212]?\d", cell)) for cell in body) > len(body) / 2


@pytest.mark.parametrize("page", LIVE, ids=name)
def test_page_tables_are_those_of_stored_results(page: Path) -> None:
    heads, wrong = {table.splitlines()[0] for table in STORED.values()}, []
    for table in map(str.rstrip, tables_of(page)):
        head = table.splitlines()[0]
        a_setting = (name(page), cells(head)[0]) in SETTINGS and head not in heads
        if (head in heads or is_of_numbers(table)) and not a_setting and table not in STORED.values():
            wrong.append(head)
    assert not wrong


def test_pages_show_each_benchmark() -> None:
    shown = "\n".join(page.read_text() for page in LIVE)
    for key in (
        "lift/summary",
        "tasks/summary",
        "pixels/seeds",
        "flm/calls",
        "fmlm/calls",
        "study/verdicts",
        "peers/toy",
    ):
        assert STORED[key] in shown, key


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
