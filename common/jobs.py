"""Runs of scripts as processes, several at a time: each is skipped, resumed or begun as its folder tells."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from common.files import hold

ROOT = Path(__file__).resolve().parent.parent
FINISHED = "wall_seconds"  # file in the folder of a finished run
STOPPED, BUSY = 130, 75  # exit codes of `execute`: told to stop, saved; another process has the run

_stops: set[Callable[[], object]] = set()  # what ends the runs in progress
_stopping = threading.Event()


def state(folder: Path) -> str:
    """What a run's folder says of it: finished, interrupted (it has a checkpoint) or new."""
    if (folder / FINISHED).exists():
        return "finished"
    return "interrupted" if any(folder.glob("checkpoint*.pt")) else "new"


def line(folder: Path, flags: Sequence[str], resume: Sequence[str] = ()) -> list[str]:
    """Flags that begin a run or, if it was interrupted, go on with it (with flags of its own)."""
    if state(folder) == "interrupted":
        return ["--resume", str(folder), *resume]
    return ["--run-name", folder.name, *flags]


def output(folder: Path) -> Path:
    """The file beside a run's folder that has what the run printed."""
    return folder.parent / f"{folder.name}.txt"


def execute(script: str, folder: Path, flags: Sequence[str], resume: Sequence[str] = (), cwd: Path = ROOT) -> int:
    """Exit code of one run, to its end: skipped if it is finished, resumed if it was interrupted.

    flags: of a new run, which put it into `folder` but for its name. Paths in them are relative to `cwd`.
    A run told to stop ends with 0, its checkpoint saved; here that is STOPPED.
    """
    if state(folder) == "finished":
        return 0
    if _stopping.is_set():
        return STOPPED
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(output(folder), "a+") as out, hold(folder.parent / f".{folder.name}.lock", wait=False) as problem:
        if isinstance(problem, Timeout):
            return BUSY
        started, start = time.time(), out.tell()
        if state(folder) == "new":
            shutil.rmtree(folder, ignore_errors=True)
        # In a session of its own, so that Ctrl-C reaches it once, from here: a second one would not let it save.
        command = [sys.executable, script, *line(folder, flags, resume)]
        process = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=out, start_new_session=True)
        with stoppable(process.terminate):
            try:
                code = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        out.seek(start)
        if code == 0 and "saved; go on with" in out.read():
            return STOPPED
    if code == 0:
        (folder / FINISHED).write_text(f"{time.time() - started:.0f}\n")
    return code


def execute_all(
    one: Callable[..., int],
    jobs: Sequence[tuple],
    workers: int,
    needs: Callable[[tuple], tuple | None] = lambda _: None,
) -> int:
    """Runs one(*job) for every job, `workers` at a time, and lists those that failed: 0 if none did, else 1.

    needs(job) is an earlier job without whose success this one cannot run, or None. Ctrl-C, SIGTERM and SIGHUP stop
    the runs, which save, and raise KeyboardInterrupt when they have.
    """
    _stopping.clear()
    with stopped_by_signals(), ThreadPoolExecutor(workers) as pool:
        started: dict[tuple, Future[int]] = {}

        def work(job: tuple, needed: Future[int] | None) -> int:
            return (needed.result() if needed else 0) or one(*job)

        try:
            for job in jobs:  # in this order, so that a worker only ever waits for a job that another one has
                started[job] = pool.submit(work, job, started.get(needs(job)))
            codes = [future.result() for future in started.values()]
        except KeyboardInterrupt:
            _stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            print("stopping the runs; the same command goes on with them", flush=True)
            for stop in list(_stops):
                stop()
            raise
    failed = [" ".join(map(str, job)) for job, code in zip(started, codes, strict=True) if code]
    print(f"{len(started) - len(failed)} finished, {len(failed)} failed: {', '.join(failed) or '-'}")
    return int(bool(failed))


@contextmanager
def stoppable(stop: Callable[[], object]) -> Iterator[None]:
    """stop() is called if `execute_all` is interrupted during this block."""
    _stops.add(stop)
    try:
        if _stopping.is_set():
            stop()
        yield
    finally:
        _stops.discard(stop)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP where it is not ignored, are Ctrl-C in this block, if it is of the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        which = [getattr(signal, name, signal.SIGTERM) for name in ("SIGTERM", "SIGHUP")]  # Windows has no SIGHUP
        which = [s for s in which if signal.getsignal(s) != signal.SIG_IGN]
        before = {s: signal.signal(s, signal.default_int_handler) for s in which}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
