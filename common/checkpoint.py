"""Checkpoints that survive a kill at any instant, random-number state, stop signals and a disk check."""

import os
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from common.errors import RunError, UserError, first_line

_PLAIN = (torch.Tensor, str, int, float, bool, bytes, type(None))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a kill or power cut at any instant leaves a loadable file.

    The file that was at `path` becomes `<stem>.prev<suffix>`: the last two checkpoints are kept.
    `state` may nest dicts, lists and tuples of tensors and plain Python values: what `load` accepts.

    Raises TypeError naming a value that `load` would refuse, RunError if the disk is full or not writable; the
    checkpoints already there stay intact.
    """
    _require_plain(state, "state")
    tmp = _tmp(path)
    try:
        with open(tmp, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, _prev(path))  # from here to the next line, `load` finds the previous file
        os.replace(tmp, path)
        _fsync_dir(path.parent)
    except (OSError, RuntimeError) as error:
        tmp.unlink(missing_ok=True)
        raise RunError(
            f"cannot write the checkpoint {path}: {first_line(error)}; earlier checkpoints are intact; "
            "free some disk space, then continue with --resume"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read the checkpoint at `path` onto the CPU, with checksums verified and no code executed.

    If the newest file is missing or damaged, the previous one is used and a one-line note is printed.
    Raises UserError if there is no checkpoint, or none of the files kept can be read.
    """
    problems: list[str] = []
    # A complete temporary file is the newest state when the kill fell between the two renames of `save`.
    for candidate in (path, _prev(path), _tmp(path)):
        if not candidate.exists():
            continue
        try:
            with zipfile.ZipFile(candidate) as archive:
                if (member := archive.testzip()) is not None:  # torch.load checks no checksum itself
                    raise ValueError(f"bad checksum in {member}")
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            if bad := not_finite(state):
                raise ValueError(f"{bad[0]} is not finite")
        except Exception as error:  # whatever a damaged file provokes, the next candidate may be sound
            problems.append(f"{candidate.name}: {first_line(error)}")
            continue
        if candidate != path:
            why = problems[0] if problems else f"{path.name} is missing"
            print(f"note: using {candidate.name} instead of the newest checkpoint ({why})", flush=True)
        return state
    if problems:
        raise UserError(f"no readable checkpoint at {path} ({'; '.join(problems)}); start a new run")
    raise UserError(f"no checkpoint at {path}; give the folder of a run")


def not_finite(state: Any, name: str = "") -> list[str]:
    """Names of the tensors in nested dicts, lists and tuples that hold a NaN or an infinity."""
    if isinstance(state, torch.Tensor):
        return [] if not state.is_floating_point() or state.isfinite().all() else [name]
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return [bad for key, value in items for bad in not_finite(value, f"{name}.{key}" if name else str(key))]


class Stopped(BaseException):
    """A stop signal came where nothing has to be finished first. No Exception: foreign code must not catch it."""


class StopSignal:
    """Context manager: the first SIGTERM, SIGHUP or SIGINT (Ctrl-C) asks for a stop, the second aborts at once.

    Poll `requested` where it is safe to save and leave; the abort is a KeyboardInterrupt with the signal's number. Main
    thread only. A SIGHUP that is ignored (nohup) stays ignored. Under torchrun nothing aborts but its own SIGKILL: it
    sends a signal again that the processes may have had already.
    """

    def __init__(self) -> None:
        self.requested: int = 0  # the signal's number
        self._at_once = False

    def __enter__(self) -> "StopSignal":
        which = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
            which.append(signal.SIGHUP)
        self._previous = {s: signal.signal(s, self._handle) for s in which}
        return self

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raises Stopped inside as soon as a signal arrives or if one has: for what leaves nothing half done."""
        self._at_once = True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        if self.requested and launched:
            return
        if self.requested:
            raise KeyboardInterrupt(signum)
        self.requested = signum
        name = signal.Signals(signum).name
        again = "" if launched else "; once more aborts at once"
        with suppress(OSError):  # nobody reads any more
            # Not print: the signal may have interrupted one, and print is not re-entrant.
            os.write(1, f"\nnote: {name} received: saving, then stopping{again}\n".encode())
        if self._at_once:
            raise Stopped


def check_run_dir(directory: Path, need_bytes: int) -> None:
    """Create `directory` and prove, before any training, that `need_bytes` can be written there.

    Raises UserError if it cannot be created or written, or the disk has less than `need_bytes` free.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {directory}: {first_line(error)}; choose a writable folder"
        ) from error
    if free < need_bytes:
        raise UserError(
            f"the disk of {directory} has {free / 2**20:.0f} MiB free, the checkpoints of this run need "
            f"{need_bytes / 2**20:.0f} MiB; free some space or choose another folder"
        )


def _prev(path: Path) -> Path:
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def _tmp(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _fsync_dir(directory: Path) -> None:
    """Make renames in `directory` durable. Windows opens no directory, and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_plain(value: object, name: str) -> None:
    """Refuse at save time what weights_only loading would refuse only at resume time."""
    if isinstance(value, dict):
        for key, item in value.items():
            _require_plain(key, f"a key of {name}")
            _require_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _require_plain(item, f"{name}[{index}]")
    elif type(value) not in _PLAIN and not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load its state; whether it can be recorded as a CUDA graph is for this machine to say."""
    own = [(group["lr"], group.get("capturable")) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, (lr, capturable) in zip(optimizer.param_groups, own, strict=True):
        rate = float(group["lr"])
        group["lr"] = lr.fill_(rate) if isinstance(lr, torch.Tensor) else rate
        if capturable is not None:
            group["capturable"] = capturable


def pack(part: object) -> Any:
    """State of a module, optimizer, generator or plain value; of another object {attribute: state}, for `save`."""
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    if hasattr(part, "state_dict"):
        return part.state_dict()
    if isinstance(part, torch.Tensor):
        return part
    if isinstance(part, dict):  # a plain one: that of a module's state has attributes of its own
        return dict(part)
    return {name: pack(value) for name, value in vars(part).items()} if hasattr(part, "__dict__") else part


def unpack(part: object, state: Any) -> Any:
    """`part` with the state that `pack` returned, loaded into it if it is no plain value."""
    if isinstance(part, np.random.Generator):
        part.bit_generator.state = state
    elif isinstance(part, torch.optim.Optimizer):
        if state:  # a shared copy has none
            _load_optimizer(part, state)
    elif hasattr(part, "load_state_dict"):
        part.load_state_dict(state)
    elif isinstance(part, torch.Tensor):
        return state.to(part.device)
    elif hasattr(part, "__dict__") and not isinstance(part, dict):
        if odd := sorted(state.keys() ^ vars(part).keys()):
            raise KeyError(f"{', '.join(odd)} only on one side")
        for name, saved in state.items():
            setattr(part, name, unpack(getattr(part, name), saved))
    else:
        return state
    return part
