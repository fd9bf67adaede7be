"""args.json of a run folder: the script that made the run, its arguments from which step on, the machine."""

import ast
import atexit
import hashlib
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from common.errors import UserError, first_line
from common.files import hold
from common.machine import describe_machine
from common.runlog import LOCK, write_json

RECORD = "args.json"
FIRST = {RECORD, "metrics.jsonl", "tensorboard", "wandb", "wandb_id.json", "cloned.pt", "before.mp4"}  # before it saves
FIRST |= {"cloned.pt.tmp", "checkpoint.pt.tmp"}

Weights = Sequence[Callable[..., Any]]  # classes and functions of a script that its checkpoints depend on


def script_of(weights: Weights) -> str:
    return Path(inspect.getfile(weights[0])).name


def definitions(weights: Weights) -> dict[str, str]:
    """{name: hash of its code} of these classes and functions of a script, and of those that they use.

    Comments, docstrings and layout do not count.
    """
    scope, left, found = inspect.getmodule(weights[0]).__dict__, list(weights), {}
    while left:
        thing = left.pop()
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                del node.body[0]
            used = scope.get(node.id) if isinstance(node, ast.Name) else None
            if callable(used) and getattr(used, "__module__", None) == thing.__module__:
                if used.__name__ not in found and not used.__name__.endswith("Args"):
                    left.append(used)
        found[thing.__name__] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]
    return found


def reserve(root: Path, name: str, numbered: bool, weights: Weights, args: Mapping[str, Any]) -> Path:
    """The folder root/name of a new run, which no other process gets, with its record in it.

    numbered: take name-2, name-3, ... if there is one. Else a folder in which an ended run left no checkpoint is taken
    again. Raises UserError if the folder exists otherwise, or cannot be made.
    """
    record = {"script": script_of(weights), "definitions": definitions(weights), "pid": os.getpid(), "args": dict(args)}
    content = (json.dumps(record | describe_machine(), indent=2, default=str) + "\n").encode()
    for n in count(1):
        path = root / (name if n == 1 else f"{name}-{n}")
        try:
            path.mkdir(parents=True, exist_ok=not numbered)
            with hold(path / LOCK):  # as far as the file system has locks
                if not _abandoned(path):
                    raise FileExistsError
                (path / RECORD).unlink(missing_ok=True)
                with open(path / RECORD, "xb") as file:
                    file.write(content)
        except FileExistsError as error:
            if numbered:
                continue
            way = f", or go on with --resume {path}" if (path / "checkpoint.pt").exists() else ", or remove it"
            raise UserError(f"{path} already exists; choose another --run-name{way}") from error
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {first_line(error)}; see --run-dir") from error
        atexit.register(_remove_unused, path)
        return path
    raise AssertionError


def _abandoned(path: Path) -> bool:
    """Whether the folder is empty, or the run that made it has ended before it saved anything."""
    files = {file.name for file in path.iterdir()} - {LOCK}
    if files - FIRST or (files and RECORD not in files):
        return False
    try:
        pid = json.loads((path / RECORD).read_bytes())["pid"]
        return pid == os.getpid() or not psutil.pid_exists(pid)
    except (OSError, ValueError, KeyError, TypeError):  # half a record
        return True


def _remove_unused(path: Path) -> None:
    """A run that ended before it began leaves no folder."""
    with suppress(OSError):
        if {file.name for file in path.iterdir()} <= {RECORD, LOCK}:
            (path / RECORD).unlink()
            (path / LOCK).unlink(missing_ok=True)
            path.rmdir()


def read(folder: Path) -> dict[str, Any]:
    """The record of a run folder; of one that has none, {}."""
    try:
        return json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}


def check_kind(folder: Path, weights: Weights) -> None:
    """Raises UserError if the weights in `folder` are of another kind than `weights` of this script.

    Of code that has changed since, or in a copy, it prints a note.
    """
    record, here, script = read(folder), definitions(weights), script_of(weights)
    made = record.get("definitions")
    if made is None:
        return  # of a version that did not record it
    if made.keys() != here.keys():
        raise UserError(f"{folder} is a run of {record['script']}, whose networks are others than those of {script}")
    if changed := sorted(name for name in here if made[name] != here[name]):
        print(
            f"note: {', '.join(changed)} of {script} differ from those of {record['script']} that made {folder}: "
            "its weights may not fit",
            flush=True,
        )


def add_changes(folder: Path, step: int, before: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    """Record the arguments with which a run goes on from `step`; those that it had until then stay in the record."""
    before, now = (json.loads(json.dumps(x, default=str)) for x in (before, args))
    changes = {k: v for k, v in now.items() if before.get(k, v) != v and k not in ("eval", "resume")}
    if changes:
        record = read(folder)
        record["changes"] = [*record.get("changes", []), {"from_step": step, "args": changes}]
        write_json(folder / RECORD, record)
