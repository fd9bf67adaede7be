"""What the runs of all scripts share: a folder with a log and checkpoints of what they are told to track."""

import math
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from common import checkpoint
from common.errors import EnvError, RunError, UserError, first_line
from common.runlog import RunLog, aligned, counted
from common.start import CHECKPOINT, describe_device

VERSION = 2  # of what a run's checkpoints hold; 1 did not say so


class TrackedRun(ExitStack):
    """Writes log and checkpoints to its folder, and goes on from a checkpoint. Without a log it writes nothing.

    What the run has opened is closed with it, newest first: the end of its `with` block.
    """

    def __init__(
        self, folder: Path, saved: dict[str, Any] | None, stop: checkpoint.StopSignal, args: Mapping[str, Any]
    ) -> None:
        """saved: the checkpoint to go on from; args: all arguments, to be recorded."""
        super().__init__()
        self.folder, self.saved, self.stop, self.args = folder, saved, stop, dict(args)
        self.step = saved["step"] if saved else 0  # steps made so far
        self.log: RunLog | None = None
        self.parts: dict[str, Any] = {}

    def open_log(self, total_steps: int, wandb_project: str, tensorboard: bool) -> None:
        """Open the log of a new run, or go on with that of the checkpoint. Errors are those of `RunLog`."""
        self.log = RunLog(
            self.folder, total_steps=total_steps, wandb_project=wandb_project, tensorboard=tensorboard,
            resume_bytes=self.saved["log"] if self.saved else None, args=self.args,
        )  # fmt: skip
        self.callback(self.log.close)

    def introduce(self, device: torch.device, about: Mapping[str, str], total_steps: int, rest: str) -> None:
        """Print what this run is, before its first step. about: {name: text}; rest: of the budget beside the steps."""
        steps = counted(total_steps, "step") + (f", {self.step:,} of them made" if self.step else "")
        head = {"run": str(self.folder), "device": describe_device(device, self.args["device"])}
        self.log.say(aligned(head | about | {"budget": f"{steps}; {rest}"}))

    def track(self, **parts: object) -> None:
        """What a checkpoint holds, by name; what the run's checkpoint has of it is restored here, once.

        Raises UserError if it does not fit.
        """
        for name, part in parts.items():
            if self.saved and name in self.saved:
                try:
                    part = checkpoint.unpack(part, self.saved[name])
                except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                    version = self.saved.get("version", 1)
                    raise UserError(
                        f"{self.folder}: the checkpoint's {name} does not fit this script ({first_line(error)}); it "
                        f"has version {version}, this code writes {VERSION}: use the code that made it"
                    ) from error
                del self.saved[name]
            self.parts[name] = part

    def save(self) -> None:
        """Write a checkpoint of everything that is tracked; if it is not finite, it ends the process."""
        if self.log:
            state = self._state()
            self._stop_on(checkpoint.not_finite(state))
            checkpoint.save(self.folder / CHECKPOINT, state)

    def stop_if_not_finite(self, metrics: Mapping[str, float]) -> None:
        """End the process with exit code 1, and a dump beside the last good checkpoint, if a value is not finite."""
        self._stop_on([k for k, v in metrics.items() if not math.isfinite(v)])

    def _state(self) -> dict[str, Any]:
        parts = {name: checkpoint.pack(part) for name, part in self.parts.items()}
        args = {k: list(v) if isinstance(v, tuple) else v for k, v in self.args.items()}
        header = {"version": VERSION, "args": args, "step": self.step, "log": self.log.position()}
        return (self.saved or {}) | header | parts  # of a resumed run also what it has not restored yet

    def _stop_on(self, bad: list[str]) -> None:
        if bad:
            if self.log:
                checkpoint.save(self.folder / "nonfinite.pt", self._state())
            raise RunError(
                f"stopped at step {self.step}: {', '.join(bad[:3])} not finite; state dumped to "
                f"{self.folder / 'nonfinite.pt'}, last good state in {CHECKPOINT}"
            )

    def how_to_go_on(self) -> str:
        """The command that goes on from the checkpoint, for a saved and stopped run."""
        env = self.args.get("env", "")
        own = ["--env", env] if ":" in env else []  # its module's code runs only if the command line names it
        return f"saved; go on with: {shlex.join(['python', sys.argv[0], '--resume', str(self.folder), *own])}"

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        """Close what was opened. A stop and a failed environment end the process, with a line on how to go on."""
        handled = super().__exit__(kind, error, trace)
        if not isinstance(error, (checkpoint.Stopped, EnvError)):
            return handled
        saved = not self.args.get("eval") and (self.folder / CHECKPOINT).exists()
        then = self.how_to_go_on() if saved else "nothing was saved; the same command starts again"
        if isinstance(error, EnvError):
            sys.exit(f"stopped at step {self.step}: {error}; {then}")
        print(then, flush=True)
        if not saved:
            sys.exit(128 + self.stop.requested)
        return True
