"""What a run was made with: versions, commit, command line, hardware; what that hardware is fast at."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import is_dataclass, replace
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


def accelerate(
    module: dict[str, Any], compiled: Sequence[str], recorded: Sequence[str], generator: torch.Generator
) -> None:
    """Replaces functions of a module (its globals()) by compiled and, on a GPU, by recorded ones (see `Recorded`).

    On a CPU compiling needs a C++ compiler. generator: what the recorded ones draw from.
    """
    for name in compiled:
        module[name] = torch.compile(module[name])
    for name in recorded if generator.device.type == "cuda" else ():
        module[name] = Recorded(module[name], generator)


class Recorded:
    """A function whose work on a GPU is recorded as a CUDA graph: then its many small kernels are launched at once.

    fn(*args) -> {name: tensor} may change networks and optimizers (`capturable` ones) in place and draw from the
    generator. Its tensors, also those in dataclasses, have the same shapes at every call of a kind: with the same other
    arguments, which are not looked at again.
    """

    WARMUP = 3  # calls of a kind that run as they are: they choose kernels and make the optimizer's state

    def __init__(self, fn: Callable[..., dict[str, torch.Tensor]], generator: torch.Generator) -> None:
        self.fn, self.generator = fn, generator
        self.calls: Counter[tuple[int, ...]] = Counter()  # by kind
        self.graphs: dict[tuple[int, ...], tuple[Any, tuple[Any, ...], dict[str, torch.Tensor]]] = {}

    def __call__(self, *args: Any) -> dict[str, torch.Tensor]:
        kind = tuple(0 if _tensors(arg) else id(arg) for arg in args)
        self.calls[kind] += 1
        if self.calls[kind] <= self.WARMUP:
            side = torch.cuda.Stream()  # capturing wants the warm-up on another stream than the default one
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = self.fn(*args)
            torch.cuda.current_stream().wait_stream(side)
            return result
        if kind not in self.graphs:
            own = tuple(map(_copy, args))
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph):
                self.graphs[kind] = (graph, own, self.fn(*own))
        graph, own, result = self.graphs[kind]
        for mine, new in zip(own, args, strict=True):
            for here, there in zip(_tensors(mine), _tensors(new), strict=True):
                here.copy_(there)
        graph.replay()
        return {name: value.clone() for name, value in result.items()}


def _tensors(arg: Any) -> list[torch.Tensor]:
    parts = vars(arg).values() if is_dataclass(arg) else [arg]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _copy(arg: Any) -> Any:
    """`arg` with tensors of its own."""
    if isinstance(arg, torch.Tensor):
        return arg.clone()
    if is_dataclass(arg) and _tensors(arg):
        return replace(arg, **{k: v.clone() for k, v in vars(arg).items() if isinstance(v, torch.Tensor)})
    return arg


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate, in place where it is a tensor: a recorded step reads it there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def adam(parameters: Iterable[torch.nn.Parameter], rate: float, device: torch.device) -> torch.optim.Adam:
    """Fused Adam; on a GPU one that can be recorded."""
    gpu = device.type == "cuda"
    lr = torch.tensor(rate, device=device) if gpu else rate
    return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=gpu)
