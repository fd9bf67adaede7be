"""What the runs of all scripts share: a folder with a log and checkpoints of what they are told to track."""

import math
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import checkpoint
from common.errors import EnvError
from common.runlog import RunLog
from common.start import CHECKPOINT


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

    def track(self, **parts: object) -> None:
        """What a checkpoint holds, by name; what the run's checkpoint has of it is restored here, once."""
        for name, part in parts.items():
            known = self.saved and name in self.saved
            self.parts[name] = checkpoint.unpack(part, self.saved.pop(name)) if known else part

    def save(self, name: str = CHECKPOINT) -> None:
        """Write a checkpoint of everything that is tracked."""
        if self.log:
            parts = {name: checkpoint.pack(part) for name, part in self.parts.items()}
            args = {k: list(v) if isinstance(v, tuple) else v for k, v in self.args.items()}
            checkpoint.save(self.folder / name, {"args": args, "step": self.step, "log": self.log.position()} | parts)

    def stop_if_not_finite(self, metrics: Mapping[str, float]) -> None:
        """End the process with exit code 1, and a dump beside the last good checkpoint, if a value is not finite."""
        if bad := [k for k, v in metrics.items() if not math.isfinite(v)]:
            self.save("nonfinite.pt")
            sys.exit(
                f"stopped at step {self.step}: {', '.join(bad)} not finite; state dumped to "
                f"{self.folder / 'nonfinite.pt'}, last good state in {CHECKPOINT}"
            )

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        """Close what was opened. A stop and a failed environment end the process, with a line on how to go on."""
        handled = super().__exit__(kind, error, trace)
        if not isinstance(error, (checkpoint.Stopped, EnvError)):
            return handled
        saved = not self.args.get("eval") and (self.folder / CHECKPOINT).exists()
        again = shlex.join(["python", sys.argv[0], "--resume", str(self.folder)])
        then = f"saved; go on with: {again}" if saved else "nothing was saved; the same command starts again"
        if isinstance(error, EnvError):
            sys.exit(f"stopped at step {self.step}: {error}; {then}")
        print(then, flush=True)
        if not saved:
            sys.exit(128 + self.stop.requested)
        return True
