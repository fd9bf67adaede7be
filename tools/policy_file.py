"""A trained policy in a file as demonstrator: a small MLP saved with numpy."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.errors import UserError, reading
from tools.scripted import Expert


def is_policy(path: Path) -> bool:
    """Whether an .npz file holds layers of a policy, and no episodes."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with reading(path, "it is damaged: get it again"), zipfile.ZipFile(path) as file:
        names = {Path(name).stem for name in file.namelist()}
    return any(re.fullmatch(r"[wb]\d+", name) for name in names) and not names & {"obs", "actions"}


def load_policy(path: Path, task: TaskSpec) -> Callable[..., Expert]:
    """The policy in an .npz file as an expert: called with environment, first observation, generator and noise.

    Arrays w0 (h, O), b0 (h,), w1, b1, ...: layers with tanh between them; in_shift, in_scale (O,) and out_shift,
    out_scale (A,), both optional: (x - in_shift) / in_scale goes in, y out_scale + out_shift comes out. Arrays by other
    names are left alone. `noise` is the standard deviation of what is added to the action. Raises UserError if the file
    is none such, or of another task.
    """
    remedy = "give --demos an .npz file of w0, b0, w1, b1, ... and nothing but numbers"
    with reading(path, remedy), np.load(path, allow_pickle=False) as file:
        z = {key: file[key].astype(np.float64, casting="same_kind") for key in file.files}
    for key, value in z.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {key} holds NaN or infinity; save the policy again")
    shapes = {key: value.shape for key, value in z.items()}
    layered = {key: shape for key, shape in shapes.items() if re.fullmatch(r"[wb]\d+", key)}
    depth = sum(key[0] == "w" for key in layered)
    hidden = [z[f"b{i}"].size if f"b{i}" in z else 0 for i in range(depth - 1)]
    wide = sum(width for _, width in task.obs)
    sizes = [wide, *hidden, task.action_dim]
    needed = {f"w{i}": (sizes[i + 1], sizes[i]) for i in range(depth)}
    needed |= {f"b{i}": (sizes[i + 1],) for i in range(depth)}
    optional = {f"in_{what}": (wide,) for what in ("shift", "scale")}
    optional |= {f"out_{what}": (task.action_dim,) for what in ("shift", "scale")}
    if not depth or layered != needed or any(shapes[key] != optional[key] for key in optional.keys() & shapes.keys()):
        found = ", ".join(f"{key} {shape}" for key, shape in shapes.items()) or "nothing"
        raise UserError(
            f"{path} is no policy for {task.name}, which needs w0 (h, {wide}), b0 (h,), ... and last "
            f"({task.action_dim}, h); it holds {found}"
        )
    layers = [(z[f"w{i}"], z[f"b{i}"]) for i in range(depth)]

    def expert(env: Any, obs: NDArray[np.float32], rng: np.random.Generator, noise: float) -> Expert:
        while True:
            x = (obs - z.get("in_shift", 0.0)) / (z.get("in_scale", 1.0) + 1e-8)
            for i, (weight, bias) in enumerate(layers):
                x = weight @ (np.tanh(x) if i else x) + bias
            action = x * z.get("out_scale", 1.0) + z.get("out_shift", 0.0) + noise * rng.standard_normal(x.shape)
            obs = yield np.clip(action, -1, 1).astype(np.float32)

    return expert
