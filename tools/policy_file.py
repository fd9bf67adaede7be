"""A trained policy in a file as demonstrator: a small MLP saved with numpy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.errors import UserError
from tools.scripted import Expert


def load_policy(path: Path, task: TaskSpec) -> Callable[..., Expert]:
    """The policy in an .npz file as an expert: called with environment, first observation, generator and noise.

    Arrays w0 (h, O), b0 (h,), w1, b1, ...: layers with tanh between them; in_shift, in_scale (O,) and out_shift,
    out_scale (A,), both optional: (x - in_shift) / in_scale goes in, y out_scale + out_shift comes out. `noise` is the
    standard deviation of what is added to the action. Raises UserError if the file is none such, or of another task.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            z = {key: file[key].astype(np.float64) for key in file.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give --demos an .npz file of w0, b0, w1, b1, ...") from error
    layers = [(z[f"w{i}"], z[f"b{i}"]) for i in range(sum(key.startswith("w") for key in z)) if f"b{i}" in z]
    wide = sum(width for _, width in task.obs)
    if not layers or layers[0][0].shape[1:] != (wide,) or layers[-1][0].shape[:1] != (task.action_dim,):
        shapes = ", ".join(f"{key} {value.shape}" for key, value in z.items()) or "nothing"
        raise UserError(
            f"{path} is no policy for {task.name}, which needs w0 (h, {wide}), b0 (h,), ... and last "
            f"({task.action_dim}, h); it holds {shapes}"
        )

    def expert(env: Any, obs: NDArray[np.float32], rng: np.random.Generator, noise: float) -> Expert:
        while True:
            x = (obs - z.get("in_shift", 0.0)) / (z.get("in_scale", 1.0) + 1e-8)
            for i, (weight, bias) in enumerate(layers):
                x = weight @ (np.tanh(x) if i else x) + bias
            action = x * z.get("out_scale", 1.0) + z.get("out_shift", 0.0) + noise * rng.standard_normal(x.shape)
            obs = yield np.clip(action, -1, 1).astype(np.float32)

    return expert
