"""What the benchmarks share: runs that can be interrupted, and what is kept of them."""

import gzip
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
STOPPED = 130


def execute(script: str, name: str, flags: Sequence[str], resume: Sequence[str] = ()) -> int:
    """Exit code of one run, to its end: skipped if it is finished, resumed (with flags of its own) if interrupted.

    A run told to stop ends with 0, its checkpoint saved; here that is STOPPED.
    """
    folder = RUNS / name
    if (folder / "wall_seconds").exists():
        return 0
    started = time.time()
    if (folder / "checkpoint.pt").exists():
        flags = ["--resume", str(folder), *resume]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--run-name", name, *flags]
    RUNS.mkdir(exist_ok=True)
    with open(RUNS / f"{name}.txt", "a+") as out:
        start = out.tell()
        code = subprocess.run(
            [sys.executable, script, *flags], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        ).returncode
        out.seek(start)
        if code == 0 and "saved; go on with" in out.read():
            return STOPPED
    if code == 0:
        (folder / "wall_seconds").write_text(f"{time.time() - started:.0f}\n")
    return code


def execute_all(
    one: Callable[..., int],
    jobs: Sequence[tuple],
    workers: int,
    needs: Callable[[tuple], tuple | None] = lambda _: None,
) -> int:
    """Runs one(*job) for every job, `workers` at a time, and lists those that failed: 0 if none did, else 1.

    needs(job) is an earlier job without whose success this one cannot run, or None.
    """
    with ThreadPoolExecutor(workers) as pool:
        started: dict[tuple, Future[int]] = {}

        def work(job: tuple, needed: Future[int] | None) -> int:
            return (needed.result() if needed else 0) or one(*job)

        for job in jobs:  # in this order, so that a worker only ever waits for a job that another one has
            started[job] = pool.submit(work, job, started.get(needs(job)))
        codes = [future.result() for future in started.values()]
    failed = [job for job, code in zip(started, codes, strict=True) if code]
    print(f"{len(started) - len(failed)} finished, {len(failed)} failed: {failed or '-'}")
    return int(bool(failed))


def kept(store: Path, name: str, seeds: Iterable[int]) -> dict[int, Path]:
    """{seed: folder} of what `keep` has stored of the runs called `name`."""
    folders = {seed: store / f"{name}_s{seed}" for seed in seeds}
    return {seed: folder for seed, folder in folders.items() if folder.exists()}


def keep(source: Path, target: Path, more: Iterable[Path] = ()) -> bool:
    """Copies arguments, wall time, `more` files and the metrics, compressed, of a run if it is finished."""
    if not (source / "wall_seconds").exists():
        return False
    target.mkdir(parents=True, exist_ok=True)
    for file in (source / "args.json", source / "wall_seconds", *more):
        shutil.copy(file, target / file.name)
    with gzip.GzipFile(target / "metrics.jsonl.gz", "wb", mtime=0) as out:
        out.write((source / "metrics.jsonl").read_bytes())
    return True


def metrics(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl of a kept run."""
    return [json.loads(line) for line in gzip.decompress((folder / "metrics.jsonl.gz").read_bytes()).splitlines()]


def minutes(folder: Path) -> float:
    """Wall time of a kept run, the parts before an interruption included (up to the checkpoint it went on from)."""
    walls = series(metrics(folder), "time/wall")[1]  # seconds, from 0 again after a resume
    return (int((folder / "wall_seconds").read_text()) + walls[:-1][np.diff(walls) < 0].sum()) / 60


def arguments(folder: Path) -> dict:
    return json.loads((folder / "args.json").read_text())["args"]


def series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points])


def last(rows: list[dict], key: str) -> float:
    """Newest value of a metric, NaN if it never was."""
    values = series(rows, key)[1]
    return float(values[-1]) if len(values) else math.nan
