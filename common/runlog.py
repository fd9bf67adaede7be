"""Run folder: metrics.jsonl, what a run says, TensorBoard and W&B doors, learning curves."""

import importlib
import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import Timeout

from common.errors import UserError, first_line
from common.files import hold, replacing, write_atomic

LOCK = ".lock"  # in a run folder: of who makes its record, then of who writes its log
_LIVE_PERIOD = 0.2  # seconds between refreshes of the live line on a terminal
_PLAIN_PERIOD = 15.0  # seconds between progress lines in a file or pipe
_RATE_WINDOW = 60.0  # seconds over which the speed is averaged


class Averages:
    """Means of scalar tensors since they were last taken; they stay on their device until then.

    Rows that a checkpoint brings back are on the CPU, and join the others on their device when taken.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, torch.Tensor]] = []

    def add(self, row: dict[str, torch.Tensor]) -> None:
        self.rows.append(row)

    def take(self) -> dict[str, float]:
        """{name: mean over the rows that have it}; forgets the rows."""
        rows, self.rows = self.rows, []
        means = {}
        for name in sorted({name for row in rows for name in row}):
            column = [row[name] for row in rows if name in row]
            means[name] = torch.stack([value.to(column[-1].device) for value in column]).mean().item()
        return means

    def state_dict(self) -> list[dict[str, torch.Tensor]]:
        return self.rows

    def load_state_dict(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = rows


class RunLog:
    """Writes one JSON line per `log` call to `metrics.jsonl`, and prints progress.

    Wall-clock metrics carry the prefix "time/": all other keys of a run that was killed and resumed are
    the same, line by line, as those of an uninterrupted run.
    """

    def __init__(
        self, run_dir: Path, *, total_steps: int, args: dict[str, Any], wandb_project: str = "",
        tensorboard: bool = False, resume_bytes: int | None = None,
    ) -> None:  # fmt: skip
        """Open the log of a new run, or of one that goes on from a checkpoint.

        total_steps: step at which the run ends, for percentage and ETA; resume_bytes: the `position()` kept in the
        checkpoint, behind which lines are dropped. Scalars go to a W&B project and `run_dir/tensorboard` too, if asked.

        Raises UserError if a package for that is not installed, or another process writes this run.
        """
        # First of all, so that a missing package leaves no half-made run folder behind.
        events = _import("torch.utils.tensorboard", "tensorboard", "--tensorboard") if tensorboard else None
        wandb = _import("wandb", "wandb", "--wandb-project") if wandb_project else None
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._total_steps = total_steps
        self._marks: deque[tuple[float, int]] = deque()  # times and steps of the last progress lines
        self._live = sys.stdout.isatty()
        path = self.run_dir / "metrics.jsonl"
        self._lock = ExitStack()  # until `close`, or the end of the process
        if isinstance(self._lock.enter_context(hold(self.run_dir / LOCK, wait=False)), Timeout):
            raise UserError(f"another process still writes {run_dir}; stop it, or wait for its end")
        self._file = open(path, "ab")
        self._truncate(resume_bytes or 0)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if events is not None:
            # Viewers drop the events of steps that the resumed run repeats.
            rows = read_metrics(self.run_dir)
            purge_step = rows[-1]["step"] + 1 if rows else None
            self._tensorboard = events.SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge_step)
        if wandb is not None:
            self._start_wandb(wandb, wandb_project, args)

    def _truncate(self, size: int) -> None:
        """Cut the file to `size` bytes; one that is shorter keeps its complete lines."""
        if self._file.tell() < size:
            size = (self.run_dir / "metrics.jsonl").read_bytes().rfind(b"\n") + 1
            self.say("note: metrics.jsonl is shorter than the checkpoint remembers; the missing lines are lost")
        self._file.truncate(size)
        self._file.seek(size)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Append the scalars of environment step `step`; a NaN or infinity is written as null."""
        values = {key: float(value) for key, value in scalars.items()}
        clean = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step} | clean).encode() + b"\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            with self._or_without_wandb():
                self._wandb.log({"step": step} | values)

    def position(self) -> int:
        """Length of metrics.jsonl in bytes, made durable: belongs in the checkpoint."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def progress(self, step: int, text_fields: dict[str, str]) -> None:
        """Show step, percentage, speed, ETA and what fits of `text_fields`; call it as often as you like.

        On a terminal one line is refreshed in place (5 Hz at most), elsewhere a line is added every 15 s.
        """
        now = time.monotonic()
        if self._marks and now - self._marks[-1][0] < (_LIVE_PERIOD if self._live else _PLAIN_PERIOD):
            return
        self._marks.append((now, step))
        while now - self._marks[0][0] > _RATE_WINDOW and len(self._marks) > 2:
            self._marks.popleft()
        since, first = self._marks[0]
        rate = (step - first) / (now - since) if now > since else 0.0
        eta = str(timedelta(seconds=int((self._total_steps - step) / rate))) if rate > 0 else "?"
        percent = 100 * step / max(self._total_steps, 1)
        speed = f"{rate:.0f} steps/s" if rate >= 9.5 or not rate else f"{rate:.2g} steps/s"
        line = "  ".join([f"step {step}/{self._total_steps} ({percent:.0f} %)", speed, f"ETA {eta}"])
        width = shutil.get_terminal_size().columns - 1 if self._live else 80
        for key, value in text_fields.items():
            longer = f"{line}  {key} {value}"
            if len(longer) > width:
                break
            line = longer
        if self._live:
            print(f"\r\x1b[K{line[:width]}", end="", flush=True)
        else:
            print(line, flush=True)

    def say(self, text: str) -> None:
        """Print a lasting line without disturbing the live one."""
        print(f"\r\x1b[K{text}" if self._live else text, flush=True)

    def close(self) -> None:
        """Finish the live line and close every door; safe to call twice."""
        if self._file.closed:
            return
        if self._live and self._marks:
            print(flush=True)
        self._file.close()
        self._lock.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            with self._or_without_wandb():
                self._wandb.finish()

    def _start_wandb(self, wandb: ModuleType, project: str, args: dict[str, Any]) -> None:
        """Open a W&B run, or go on with the one this run folder began."""
        id_file = self.run_dir / "wandb_id.json"
        with self._or_without_wandb():
            begun = json.loads(id_file.read_text()) if id_file.exists() else None
            self._wandb = wandb.init(
                project=project, name=self.run_dir.name, dir=self.run_dir, config=args, id=begun, resume="allow"
            )
            self._wandb.define_metric("*", step_metric="step")
            write_json(id_file, self._wandb.id)

    @contextmanager
    def _or_without_wandb(self) -> Iterator[None]:
        """An account or network problem must not cost the run."""
        try:
            yield
        except Exception as error:
            self._wandb = None
            self.say(f"note: W&B is off for the rest of this run ({first_line(error)}); metrics.jsonl has every number")


def counted(n: int, thing: str) -> str:
    """1 step, 2,000 steps."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def aligned(texts: Mapping[str, str], width: int = 80) -> str:
    """A line "name: text" each, wrapped at `width` columns (a longer word stays whole); without the empty texts."""
    indent = max(map(len, texts)) + 2
    return "\n".join(
        textwrap.fill(
            text, width, initial_indent=f"{name}:".ljust(indent), subsequent_indent=" " * indent,
            break_long_words=False, break_on_hyphens=False,
        )
        for name, text in texts.items() if text
    )  # fmt: skip


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` atomically; what JSON lacks (paths, ...) becomes a string."""
    write_atomic(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; an unfinished last line (of a killed run) is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def plot_curves(run_dir: Path) -> Path:
    """Draw success and episode length over environment steps to `learning_curve.png`; returns its path.

    Raises UserError if `run_dir` holds no metrics.
    """
    rows = read_metrics(run_dir)
    if not rows:
        raise UserError(f"nothing to draw: {run_dir} holds no metrics.jsonl with lines; give the folder of a run")
    from matplotlib.figure import Figure  # takes a while to import

    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    dots: dict[str, Any] = {"marker": "o", "markersize": 3}
    star = {"marker": "*", "markersize": 12, "linestyle": "none", "markeredgecolor": "black", "clip_on": False}
    for prefix, label, style in (
        ("train/", "training episodes", {"color": "tab:gray", "linewidth": 1, "alpha": 0.7}),
        ("eval/ode_", "evaluation, ODE", {"color": "tab:blue"} | dots),
        ("eval/bon_", "evaluation, best of N", {"color": "tab:orange"} | dots),
        ("eval/act_", "evaluation, acting policy", {"color": "tab:orange"} | dots),
        ("final/ode_", "final evaluation, ODE", {"color": "tab:blue"} | star),
        ("final/bon_", "final evaluation, best of N", {"color": "tab:orange"} | star),
        ("final/act_", "final evaluation, acting policy", {"color": "tab:orange"} | star),
    ):
        for axis, key in ((top, f"{prefix}success"), (bottom, f"{prefix}length")):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **style)
                axis.legend(loc="best")
    top.set(ylabel="success rate", ylim=(-0.03, 1.03), title=Path(run_dir).resolve().name)
    bottom.set(ylabel="episode length (steps)", xlabel="environment steps")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    path = Path(run_dir) / "learning_curve.png"
    with replacing(path) as temp:
        figure.savefig(temp, dpi=150)
    return path


def _import(module: str, package: str, wanted_by: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{wanted_by} needs {package}, not installed; run: pip install {package}") from error
