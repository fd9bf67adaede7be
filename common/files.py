"""Files that are written whole or not at all, and locks."""

import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from common.errors import first_line

note = functools.cache(functools.partial(print, flush=True))  # says a thing once in a process


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, in the same folder and with the same suffix, that becomes `path` when the block succeeds.

    A kill at any instant leaves the old file or the new one; what fails leaves nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temp
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, as `replacing` does."""
    with replacing(path) as temp:
        temp.write_bytes(content)


@contextmanager
def hold(path: Path, wait: bool = True) -> Iterator[OSError | None]:
    """Holds the lock file `path`; gives what stands in the way, and goes on: Timeout if another process has it and this
    one does not wait, another OSError on a file system without locks.
    """
    lock, problem = FileLock(path, timeout=-1 if wait else 0), None
    try:
        lock.acquire()  # the system lifts it when the process ends, however it ends
    except OSError as error:
        problem = error
    try:
        yield problem
    finally:
        lock.release()


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Waits for the lock file `path`, however long, and holds it. False, and a note, on a file system without locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(path) as problem:
        if problem:
            note(f"note: {path.parent} has no file locks ({first_line(problem)}); every process works for itself")
        yield not problem


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
