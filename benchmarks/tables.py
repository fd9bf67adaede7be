"""Every table that is made from stored results, by name: what the numbers of the docs are checked against.

python benchmarks/tables.py                       # prints all of them
python benchmarks/tables.py lift/summary tasks/short
"""

import sys

import captions
import diagnose
import flm
import lift
import peers
import pixels
import study
import tasks
import text_report
import toy
from runs import ROOT


def measured() -> dict[str, str]:
    """The table below each heading of measured.md."""
    found = {}
    for section in (ROOT / "benchmarks" / "measured.md").read_text().split("\n## ")[1:]:
        name, *lines = section.splitlines()
        found[f"measured/{name}"] = "\n".join(line for line in lines if line.startswith("|"))
    return found


def tables() -> dict[str, str]:
    """{name: Markdown table}, without a newline at the end."""
    found: dict[str, str] = {}
    for benchmark in (lift, tasks, pixels, flm, study, diagnose, toy, peers, captions, text_report):
        found |= benchmark.tables()
    return found | measured()


def main() -> None:
    found = tables()
    names = sys.argv[1:] or list(found)
    if unknown := [name for name in names if name not in found]:
        sys.exit(f"no table {', '.join(unknown)}; there are {', '.join(found)}")
    print("\n\n".join(f"{name}\n\n{found[name]}" for name in names))


if __name__ == "__main__":
    main()
