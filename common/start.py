"""How a script starts: its arguments, its run folder, its device."""

import os
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from common import checkpoint, cli, record
from common.download import obtain_run
from common.errors import UserError
from common.ranges import check_ranges

CHECKPOINT = "checkpoint.pt"
T = TypeVar("T")


def start(
    argv: Sequence[str], default_args: Callable[..., T], *, chosen_by: Sequence[str], weights: record.Weights,
    folder_name: str, fixed: Collection[str], check: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[T, dict[str, Any] | None, Path]:  # fmt: skip
    """Arguments, the checkpoint to go on from (None: a new run) and the run folder, with the run's record in it.

    A new run takes its defaults from default_args(**{the flags `chosen_by`}), --eval and --resume from the saved run.
    `folder_name` is a format string of argument names, used if no name was given; the time is added. `weights`: the
    script's definitions that a checkpoint's weights depend on.
    Raises UserError on a run folder without checkpoint or of another kind of script, one that already exists, a changed
    argument among the `fixed` ones and those that chose the defaults, a value outside the range that stands beside the
    argument, an environment of somebody's module that the command line does not name, and what `check` raises on all
    arguments.
    """
    script, argv = sys.modules[default_args.__module__], with_folders(argv)
    chief = os.environ.get("RANK", "0") == "0"
    flags = cli.peek(argv, *chosen_by, "eval", "resume")
    if empty := [name for name, value in flags.items() if not value]:
        raise UserError(f"--{empty[0]} is empty; give a value or leave the flag out")
    if "eval" in flags and "resume" in flags:
        raise UserError("--eval and --resume exclude each other: one only evaluates, the other trains on")
    saved, chosen = None, {name: flags[name] for name in chosen_by if name in flags}
    if old := flags.get("eval") or flags.get("resume"):
        run_dir, saved = Path(old), load_run(Path(old), weights)
        if "resume" in flags and saved.get("shared"):
            raise UserError(
                f"--resume {old}: a shared copy holds the weights alone; its optimizers and replay buffer are missing; "
                "--eval it, or start a new run from it (--cloned, --teacher)"
            )
        env = saved["args"].get("env", "")
        if ":" in env and flags.get("env") != env:
            raise UserError(f"{old} runs code of the module in its --env {env}; if you trust it, add --env {env}")
        args = cli.parse_saved(default_args(), saved["args"], argv, script.__doc__, {*fixed, *chosen_by})
    else:
        args = cli.parse(default_args(**chosen), argv, script.__doc__)
    flat = cli.flatten(args)
    check_ranges(type(args), flat)
    if check:
        check(flat)
    if "resume" in flags:
        if flat["total_steps"] < min(saved["step"], saved["args"]["total_steps"]):  # a last chunk may go beyond it
            raise UserError(f"--total-steps {flat['total_steps']}: the run has made {saved['step']} already; give more")
        if chief:
            record.add_changes(run_dir, saved["step"], saved["args"], flat)
    elif not saved:
        name = f"{folder_name.format(**flat)}__{time.strftime('%Y%m%d-%H%M%S')}"
        name, root = flat["run_name"] or re.sub(r"[:/\\]+", "-", name), Path(flat["run_dir"])
        run_dir = record.reserve(root, name, not flat["run_name"], weights, flat) if chief else root / name
    return args, saved, run_dir


def with_folders(argv: Sequence[str]) -> list[str]:
    """argv with runs on the hub, hf://owner/name[@revision], replaced by the folders of their copies in --data-dir."""
    data_dir = Path(cli.peek(argv, "data-dir").get("data_dir", "data"))
    hub = re.compile(r"(--[\w-]+=)?(hf://.*)")
    found = ((arg, hub.fullmatch(arg)) for arg in argv)
    return [f"{at[1] or ''}{obtain_run(at[2], data_dir)}" if at else arg for arg, at in found]


def load_run(folder: Path, weights: record.Weights) -> dict[str, Any]:
    """The checkpoint of a run folder. Raises UserError if it has none, or its networks are not `weights`."""
    record.check_kind(folder, weights)
    return checkpoint.load(folder / CHECKPOINT)


def describe_device(device: torch.device, asked: str) -> str:
    """The device and why it is this one; asked: what `pick_device` was."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device}: {'no CUDA device found' if asked == 'auto' else 'asked for'}"


def pick_device(name: str, threads: int = 0, float64: bool = False) -> torch.device:
    """auto: cuda if there is a GPU, else cpu. threads: torch's on a CPU, 0 leaves them as they are.

    Raises UserError on a device this machine does not have, and on Apple's GPU if float64 is needed.
    """
    if float64 and name.startswith("mps"):
        raise UserError(f"--device {name}: it has no float64, which times and samples need; use cpu")
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # a device that holds no numbers is none
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; use auto, cpu or cuda") from error
    return torch.device(name)
