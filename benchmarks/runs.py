"""What the benchmarks share: runs that can be interrupted, and the stored results of finished ones.

A benchmark stores its runs in one file, benchmarks/NAME/runs.jsonl.gz: a line of JSON a run, sorted by name, with the
fields of `Run`. `execute` makes a run, `keep` stores finished ones, `read` gives them back. To look at one by hand:

    zcat benchmarks/lift/runs.jsonl.gz | head -1 | python -m json.tool
"""

import gzip
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import jobs
from common.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"


def execute(script: str, name: str, flags: Sequence[str], resume: Sequence[str] = ()) -> int:
    """Exit code of one run in runs/NAME, as `jobs.execute`; SIGTERM stops it like Ctrl-C."""
    with jobs.stopped_by_signals():
        return jobs.execute(script, RUNS / name, flags, resume)


@dataclass(frozen=True)
class Run:
    """A finished run as it is stored.

    Attributes:
        name: unique in its benchmark, usually CONFIGURATION_sSEED.
        args: the script's arguments, by the names they had when it ran.
        machine: package versions, git commit, command line, start and hardware, as in args.json.
        wall_seconds: of the command since its last resume; 0 if it was not recorded.
        metrics: lines of metrics.jsonl.
        files: further results by file name, as JSON values or text.
    """

    name: str
    args: dict[str, Any]
    machine: dict[str, Any]
    wall_seconds: int
    metrics: list[dict[str, Any]]
    files: dict[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) and values (n,) of a metric."""
        points = [(row["step"], row[key]) for row in self.metrics if row.get(key) is not None]
        return np.array([step for step, _ in points]), np.array([value for _, value in points])

    def first(self, key: str) -> float:
        """Oldest value of a metric."""
        return float(self.series(key)[1][0])

    def last(self, key: str) -> float:
        """Newest value of a metric, NaN if it never was."""
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else math.nan

    @property
    def minutes(self) -> float:
        """Wall time, the parts before an interruption included (up to the checkpoint it went on from)."""
        walls = self.series("time/wall")[1]  # seconds, from 0 again after a resume
        return (self.wall_seconds + walls[:-1][np.diff(walls) < 0].sum()) / 60


@cache
def read(store: Path) -> Mapping[str, Run]:
    """{name: run} of what `keep` has stored in a benchmark's folder, sorted by name; empty if it has nothing yet."""
    file = store / "runs.jsonl.gz"
    if not file.exists():
        return {}
    runs = (Run(**json.loads(line)) for line in gzip.decompress(file.read_bytes()).splitlines())
    return {run.name: run for run in runs}


def read_seeds(store: Path, config: str, seeds: Iterable[int]) -> dict[int, Run]:
    """{seed: run} of the stored runs CONFIG_sSEED."""
    runs = read(store)
    return {seed: runs[name] for seed in seeds if (name := f"{config}_s{seed}") in runs}


def write(store: Path, runs: Iterable[Run]) -> None:
    """Makes `runs` all that is stored in the folder; the same runs give the same bytes."""
    lines = [json.dumps(vars(run), separators=(",", ":")) for run in sorted(runs, key=lambda run: run.name)]
    write_atomic(store / "runs.jsonl.gz", gzip.compress("".join(f"{line}\n" for line in lines).encode(), 9, mtime=0))
    read.cache_clear()


def is_finished(folder: Path) -> bool:
    """Whether `execute` has made this run to its end."""
    return jobs.state(folder) == "finished"


def load(name: str, folder: Path, files: Mapping[str, Any] | None = None) -> Run:
    """A finished run from its folder, under this name."""
    recorded = json.loads((folder / "args.json").read_text())
    args = recorded.pop("args")
    wall_seconds = int((folder / jobs.FINISHED).read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(name, args, recorded, wall_seconds, metrics, dict(files or {}))


def keep(store: Path, folders: Mapping[str, Path], files: Callable[[Path], dict[str, Any]] = lambda _: {}) -> list[str]:
    """Stores those of the runs {name: folder} that are finished, beside what is stored; returns their names.

    files(folder) are the results to keep beside arguments, wall time and metrics.
    """
    found = {name: load(name, folder, files(folder)) for name, folder in folders.items() if is_finished(folder)}
    if found:
        write(store, ({**read(store), **found}).values())
    return list(found)


def table(head: str, align: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; head and align are its first two lines."""
    return "\n".join([head, align, *(f"| {' | '.join(map(str, cells))} |" for cells in rows)])
