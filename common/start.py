"""How a script starts: its arguments, its run folder, its device."""

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from common import checkpoint, cli
from common.errors import UserError
from common.runlog import new_run_dir

CHECKPOINT = "checkpoint.pt"
T = TypeVar("T")


def start(
    argv: Sequence[str], default_args: Callable[..., T], *, chosen_by: Sequence[str], description: str,
    folder_name: str, fixed: Collection[str], at_least: Mapping[str, float],
) -> tuple[T, dict[str, Any] | None, Path]:  # fmt: skip
    """Arguments, the checkpoint to go on from (None: a new run) and the run folder.

    A new run takes its defaults from default_args(**{the flags `chosen_by`}), --eval and --resume from the saved run.
    `folder_name` is a format string of argument names, used if no name was given; the time is added.
    Raises UserError on a run folder without checkpoint, one that already exists, a changed argument among the
    `fixed` ones, a value below `at_least`.
    """
    flags = cli.peek(argv, *chosen_by, "eval", "resume")
    if old := flags.get("eval") or flags.get("resume"):
        run_dir, saved = Path(old), checkpoint.load(Path(old) / CHECKPOINT)
        args = cli.parse_saved(default_args(), saved["args"], argv, description, fixed)
    else:
        chosen = {name: flags[name] for name in chosen_by if name in flags}
        args, saved = cli.parse(default_args(**chosen), argv, description), None
        flat = cli.flatten(args)
        made = f"{folder_name.format(**flat)}__{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir = new_run_dir(Path(flat["run_dir"]), flat["run_name"] or re.sub(r"[:/\\]+", "-", made))
    cli.check_at_least(cli.flatten(args), at_least)
    return args, saved, run_dir


def pick_device(name: str, threads: int = 0) -> torch.device:
    """auto: cuda if there is a GPU, else cpu. threads: torch's on a CPU, 0 leaves them as they are.

    Raises UserError on a device this machine does not have.
    """
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; use auto, cpu or cuda") from error
    return torch.device(name)
