"""What a run was made with: versions, commit, command line, hardware; what that hardware is fast at."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

CPU_BF16 = any(torch.cpu.get_capabilities().get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to multiply in bf16. "auto": on a GPU, and on a CPU with units for it; without, it is far slower."""
    return (device.type != "cpu" or CPU_BF16) if precision == "auto" else precision == "bf16"


def describe_machine() -> dict[str, Any]:
    """Versions, commit, command line and hardware: what is needed to repeat a run."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in ("torch", "numpy", "mujoco", "gymnasium", "robosuite", "metaworld", "gymnasium-robotics"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "versions": versions,
        "git": _git(),
        "argv": sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git() -> dict[str, Any] | None:
    """Commit of this source tree and whether files differ from it; None outside a git checkout."""
    how = dict(cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], **how).strip()
        return {"commit": commit, "dirty": bool(subprocess.check_output(["git", "status", "--porcelain"], **how))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def compile_functions(module: dict[str, Any], names: Sequence[str]) -> None:
    """Replaces functions of a module (its globals()) by compiled ones; on a CPU it needs a C++ compiler.

    Not as CUDA graphs: they reuse the memory of what they return, and an actor step adds up the gradients of several.
    """
    for name in names:
        module[name] = torch.compile(module[name])
