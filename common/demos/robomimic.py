"""Demonstrations in robomimic's low-dimensional hdf5 schema: reading with checks, and the published files.

A file holds groups data/demo_<i> with datasets actions (T, A) and obs/<key> (T, width), and lists of episode
names in mask/<filter key>. An observation is the concatenation of the task's keys in the order of `TaskSpec`.
For a user's own environment it is all keys in sorted order, or obs (T, O) itself where that is a dataset; its
actions are in [-1, 1], as the environment made by `make_env` takes them.
"""

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from common.download import obtain
from common.envs import Pixels, TaskSpec
from common.errors import UserError

HUB = "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/"
# What gives an action its meaning; robomimic's v1.5 files name the same values.
CONTROL = ("type", "input_max", "input_min", "output_max", "output_min", "input_type", "input_ref_frame", "kp")
Floats = NDArray[np.float32]
ACTION_LIMIT = 1 - 1e-5  # the ends of the range are unreachable for squashed policies


def obtain_release(task: TaskSpec, release: str, cache_dir: Path) -> Path:
    """Path of a published file for the task in `cache_dir`, downloaded on first use.

    release: one of `TaskSpec.datasets`. The publisher gives no checksums: see `common.download`.
    Raises UserError without a network, or if the file has changed.
    """
    name = f"{task.name}/{release}/low_dim_v15.hdf5"
    return obtain(cache_dir / name.replace("/", "_"), f"{HUB}v1.5/{name}", "use --demos scripted")


def read_demos(path: Path, task: TaskSpec, filter_key: str = "") -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Reads and checks a file; for a built-in task its name, version and widths must be those of the task.

    filter_key: name of the mask that chooses the episodes; empty takes all.

    Returns observations (N, O), actions (N, A) within +-ACTION_LIMIT and exclusive episode ends (E,).
    Raises UserError if the file cannot serve, naming the first fault.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give --demos an existing FILE.hdf5, robomimic or scripted")
    try:
        file = h5py.File(path)
    except OSError as error:
        raise UserError(f"{path} is not a readable hdf5 file ({error}); it may be incomplete: get it again") from error
    with file:
        names = episode_names(file, path, filter_key)
        if task.suite != "gymnasium":
            _check_origin(file["data"], path, task)
        episodes = [_read_episode(file["data"][name], f"{path}: {name}", task) for name in names]
    for name, (obs, actions) in zip(names, episodes, strict=True):
        if obs.shape[1] != episodes[0][0].shape[1] or actions.shape[1] != episodes[0][1].shape[1]:
            raise UserError(f"{path}: {name} is not as wide as {names[0]}; all episodes must be of one task")
    return joined(episodes)


def joined(episodes: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Observations (T, O) and actions (T, A) of E episodes, one after the other, as `read_demos` returns them."""
    obs, actions = (np.concatenate(column) for column in zip(*episodes, strict=True))
    ends = np.cumsum([len(actions) for _, actions in episodes])
    return obs, np.clip(actions, -ACTION_LIMIT, ACTION_LIMIT), ends


def image_key(camera: str) -> str:
    """Name of a camera's images under obs/, as robomimic names them."""
    return f"{camera}_image"


def has_images(path: Path) -> bool:
    """Whether any episode of a readable file holds images."""
    with h5py.File(path) as file:
        return any(key.endswith("_image") for demo in file["data"].values() for key in demo["obs"])


def read_images(path: Path, pixels: Pixels, filter_key: str = "") -> NDArray[np.uint8]:
    """Images (N, cameras, S, S, 3) of the steps that `read_demos` returns. Raises UserError if the file has others."""
    episodes = []
    with h5py.File(path) as file:
        for name in episode_names(file, path, filter_key):
            demo = file["data"][name]
            shape = (len(demo["actions"]), pixels.size, pixels.size, 3)
            images = [demo.get(f"obs/{image_key(camera)}") for camera in pixels.cameras]
            for camera, found in zip(pixels.cameras, images, strict=True):
                if found is None or found.shape != shape or found.dtype != np.uint8:
                    what = "no images" if found is None else f"images {found.shape} {found.dtype}"
                    raise UserError(
                        f"{path}: {name} has {what} of camera {camera}, {shape} uint8 are needed; choose --cameras and "
                        "--image-size as recorded, or a file with simulator states, from which they can be drawn"
                    )
            episodes.append(np.stack(images, 1))
    return np.concatenate(episodes)


def episode_names(file: h5py.File, path: Path, filter_key: str = "") -> list[str]:
    """Names of the chosen episodes of a file, in numerical order; `path` is for messages. Raises UserError."""
    data = file.get("data")
    names = [name for name in data if re.fullmatch(r"demo_\d+", name)] if isinstance(data, h5py.Group) else []
    if not names:
        raise UserError(f"{path} has no groups data/demo_<i>; a low-dimensional robomimic file is expected")
    if filter_key:
        masks = sorted(file.get("mask", ()))
        if filter_key not in masks:
            raise UserError(f"{path} has no mask {filter_key!r}; it has {', '.join(masks) or 'none'}")
        chosen = set(file["mask"][filter_key].asstr()[()])
        if missing := chosen.difference(names):
            raise UserError(f"{path}: mask {filter_key!r} lists {min(missing)}, which is not in the file; get it again")
        if not chosen:
            raise UserError(f"{path}: mask {filter_key!r} is empty; choose another filter key")
        names = list(chosen)
    return sorted(names, key=lambda name: int(name.removeprefix("demo_")))


def _check_origin(data: h5py.Group, path: Path, task: TaskSpec) -> None:
    """Refuses files of another task, and of robosuite versions whose observations differ."""
    try:
        origin = json.loads(data.attrs["env_args"])
        env_name, version = origin["env_name"], str(origin["env_version"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not say what it was recorded in (data attribute env_args); "
            f"a file for {task.env_name} with env_name and env_version is needed"
        ) from error
    if env_name != task.env_name:
        raise UserError(f"{path} is for {env_name}, not for {task.env_name}; choose the matching task or file")
    if task.suite == "robosuite":
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (1, 5):
            raise UserError(
                f"{path} was recorded with robosuite {version}, which orders the object observation differently; "
                "use the v1.5 release of the dataset"
            )
        _check_control(origin.get("env_kwargs", {}), path, task)


def _check_control(found: dict[str, Any], path: Path, task: TaskSpec) -> None:
    """Refuses actions that mean something else here: other robots, control rate, controller or units."""
    from common.envs.robosuite_env import ARM_ACTIONS, env_kwargs

    def control(kwargs: dict[str, Any]) -> dict[str, Any]:
        arm = kwargs.get("controller_configs", {}).get("body_parts", {}).get("right", {})
        robots = kwargs.get("robots")
        shared = {"robots": [robots] if isinstance(robots, str) else robots, "control_freq": kwargs.get("control_freq")}
        return shared | {key: arm.get(key) for key in CONTROL}

    recorded = control(found)
    for key, ours in control(env_kwargs(task.action_dim // ARM_ACTIONS)).items():
        if recorded[key] not in (None, ours):
            raise UserError(
                f"{path} was recorded with {key} {recorded[key]}, {task.name} has {ours}; use the v1.5 release"
            )


def _read_episode(demo: h5py.Group, where: str, task: TaskSpec) -> tuple[Floats, Floats]:
    """Observations (T, O) and actions (T, A) of one episode."""
    actions = _read_matrix(demo, "actions", where, task.action_dim or None)
    if (worst := np.abs(actions).max()) > 1 + 1e-6:
        raise UserError(f"{where}: actions reach {worst:g}; they must be in [-1, 1], as the environment takes them")
    own = sorted(demo["obs"]) if isinstance(demo.get("obs"), h5py.Group) else ()
    widths = [(f"obs/{key}", width) for key, width in task.obs or dict.fromkeys(own).items()] or [("obs", None)]
    parts = []
    for key, width in widths:
        parts.append(_read_matrix(demo, key, where, width))
        if len(parts[-1]) != len(actions):
            raise UserError(f"{where}: {key} has {len(parts[-1])} rows for {len(actions)} actions; get the file again")
    return np.concatenate(parts, axis=1), actions


def _read_matrix(demo: h5py.Group, key: str, where: str, width: int | None) -> Floats:
    """The dataset `key` as a finite (T, width) array with T > 0; a width of None takes any."""
    item = demo.get(key)
    if not isinstance(item, h5py.Dataset):
        group = demo.get("obs") if key.startswith("obs/") else demo
        found = ", ".join(sorted(group)) if isinstance(group, h5py.Group) else "nothing"
        raise UserError(f"{where} has no dataset {key}; a low-dimensional file is needed, found: {found}")
    shape_ok = item.ndim == 2 and len(item) > 0 and width in (None, item.shape[1])
    if not shape_ok or item.dtype.kind not in "fiu":
        raise UserError(
            f"{where}: {key} is {item.dtype} {item.shape}; "
            f"numbers of shape (T > 0, {width or 'width'}) are needed: re-export the file"
        )
    values = item[()].astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{where}: {key} holds NaN or infinity; leave the episode out or repair the file")
    return values
