"""Demonstrations in robomimic's low-dimensional hdf5 schema: reading with checks, and the published files.

A file holds groups data/demo_<i> with datasets actions (T, A) and obs/<key> (T, width), and lists of episode
names in mask/<filter key>. An observation is the concatenation of the task's keys in the order of `TaskSpec`.
For a user's own environment it is all keys in sorted order, the same in every episode, or obs (T, O) itself where
that is a dataset; its actions are in [-1, 1], as the environment made by `make_env` takes them, or in its own units.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from common.download import obtain
from common.envs import Pixels, TaskSpec
from common.errors import UserError, reading

HUB = "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/"
# What gives an action its meaning; robomimic's v1.5 files name the same values.
CONTROL = (
    "type", "input_max", "input_min", "output_max", "output_min", "input_type", "input_ref_frame", "kp",
    "damping_ratio", "impedance_mode", "uncouple_pos_ori",
)  # fmt: skip
GET_AGAIN = "it is cut, damaged or no robomimic hdf5 file: get it again"
Floats = NDArray[np.float32]
Bounds = tuple[NDArray[Any], NDArray[Any]]  # least and largest action, each (A,)
EPISODE = re.compile(r"demo_\d+")
TOP = 1 + 1e-6  # largest action of a file, with room for rounding
ACTION_LIMIT = 1 - 1e-5  # the ends of the range are unreachable for squashed policies


def obtain_release(task: TaskSpec, release: str, cache_dir: Path) -> Path:
    """Path of a published file for the task in `cache_dir`, downloaded on first use.

    release: one of `TaskSpec.datasets`. The publisher gives no checksums: see `common.download`.
    Raises UserError without a network, or if the file has changed.
    """
    name = f"{task.name}/{release}/low_dim_v15.hdf5"
    return obtain(cache_dir / name.replace("/", "_"), f"{HUB}v1.5/{name}", "use --demos scripted")


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file, to read. Raises UserError for whatever fails in it."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give --demos an existing FILE.hdf5, robomimic or scripted")
    with reading(path, GET_AGAIN), h5py.File(path) as file:
        yield file


def read_demos(
    path: Path, task: TaskSpec, filter_key: str = "", box: Bounds | None = None
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Reads and checks a file; for a built-in task its name, version and widths must be those of the task.

    filter_key: name of the mask that chooses the episodes; empty takes all. box: actions of a user's own environment in
    its own units; actions that are in them (see `_in_units_of`) are brought to [-1, 1].

    Returns observations (N, O), actions (N, A) within +-ACTION_LIMIT and exclusive episode ends (E,).
    Raises UserError if the file cannot serve, naming the first fault. Prints a note on what is read otherwise than a
    user may think: groups left out, actions rescaled.
    """
    with opened(path) as file:
        names = episode_names(file, path, filter_key)
        if others := [name for name in file["data"] if not EPISODE.fullmatch(name)]:
            note(f"{path}: {', '.join(others[:5])} left out: episodes are called demo_<number>")
        if task.suite != "gymnasium":
            _check_origin(file["data"], path, task)
        layout = _layout(file["data"][names[0]], task)
        episodes = []
        for name in names:
            with reading(f"{path}: {name}", GET_AGAIN):
                episodes.append(_read_episode(file["data"][name], f"{path}: {name}", task, layout))
    obs, actions, ends = joined(episodes)
    if box and _in_units_of(box, actions, path):
        actions = (2 * (actions - box[0]) / (box[1] - box[0]) - 1).astype(np.float32)
    if (largest := np.abs(actions).max(1)).max() > TOP:
        name = names[int(np.searchsorted(ends, largest.argmax(), side="right"))]
        own = f", or in the environment's own units, {box[0].min():g} to {box[1].max():g}" if box else ""
        raise UserError(
            f"{path}: {name}: actions reach {largest.max():g}; they must be in [-1, 1], as the environment takes "
            f"them{own}: rescale them"
        )
    return obs, np.clip(actions, -ACTION_LIMIT, ACTION_LIMIT), ends


def note(text: str) -> None:
    """One line on what a user may not expect."""
    print(f"note: {text}", file=sys.stderr)


def _in_units_of(box: Bounds, actions: Floats, path: Path) -> bool:
    """Whether actions (N, A) are in the units of the box, and a note of it: [-1, 1] and the box may both hold them.

    Of the ranges that hold all actions it is the narrower one: nobody demonstrates in a tenth of the range only.
    """
    low, high = (np.asarray(bound, np.float64) for bound in box)
    if actions.shape[1:] != low.shape or ((low == -1) & (high == 1)).all():
        return False
    slack = 1e-6 * (high - low)
    if not ((actions >= low - slack) & (actions <= high + slack)).all():
        return False
    own = bool(np.abs(actions).max() > TOP or np.log((high - low) / 2).sum() < 0)
    units = "the environment's own units, and rescaled" if own else "[-1, 1], not in the environment's own units"
    note(f"{path}: actions from {actions.min():g} to {actions.max():g} are taken to be in {units}")
    return own


def joined(episodes: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Observations (N, O), actions (N, A) and exclusive ends (E,) of E episodes, one after the other."""
    obs, actions = (np.concatenate(column) for column in zip(*episodes, strict=True))
    return obs, actions, np.cumsum([len(actions) for _, actions in episodes])


def image_key(camera: str) -> str:
    """Name of a camera's images under obs/, as robomimic names them."""
    return f"{camera}_image"


def has_images(path: Path) -> bool:
    """Whether any episode of a file that `read_demos` takes holds images."""
    with opened(path) as file:
        names = episode_names(file, path)
        return any(key.endswith("_image") for name in names for key in file["data"][name].get("obs", ()))


def read_images(path: Path, pixels: Pixels, filter_key: str = "") -> NDArray[np.uint8]:
    """Images (N, cameras, S, S, 3) of the steps that `read_demos` returns. Raises UserError if the file has others."""
    episodes = []
    with opened(path) as file:
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
    names = [name for name in data if EPISODE.fullmatch(name)] if isinstance(data, h5py.Group) else []
    if not names:
        raise UserError(f"{path} has no groups data/demo_<i>; a low-dimensional robomimic file is expected")
    if filter_key:
        masks = file.get("mask")
        found = sorted(masks) if isinstance(masks, h5py.Group) else []
        if filter_key not in found:
            raise UserError(f"{path} has no mask {filter_key!r}; it has {', '.join(found) or 'none'}")
        with reading(f"{path}: mask {filter_key!r}", "a mask is a list of episode names; choose another filter key"):
            chosen = set(masks[filter_key].asstr()[()].ravel().tolist())
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

    def control(kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        robots = kwargs.get("robots")
        shared = {"robots": [robots] if isinstance(robots, str) else robots, "control_freq": kwargs.get("control_freq")}
        arms = _arms(kwargs.get("controller_configs") or {})
        return [shared | {key: arm.get(key) for key in CONTROL} for arm in arms or [{}]]

    (ours,) = control(env_kwargs(task.action_dim // ARM_ACTIONS))
    for recorded in control(found):
        for key, value in ours.items():
            if recorded[key] is not None and not _same(recorded[key], value):
                raise UserError(
                    f"{path} was recorded with {key} {recorded[key]}, {task.name} has {value}; use the v1.5 release"
                )


def _arms(config: Any) -> list[dict[str, Any]]:
    """Settings of each arm's controller, in any form of robosuite's: one, several, by body part, by kind of part."""
    if isinstance(config, list):
        return [arm for one in config for arm in _arms(one)]
    parts = config.get("body_parts")
    if parts is None:
        return [config] if config else []
    composite = {} if config.get("type", "BASIC") == "BASIC" else {"type": config["type"]}
    return [arm | composite for name, arm in (parts | parts.get("arms", {})).items() if name in ("right", "left")]


def _same(one: Any, other: Any) -> bool:
    """Whether two settings mean the same: a number may stand for a list of such."""
    try:
        return bool(np.allclose(one, other))
    except (TypeError, ValueError):  # not numbers; lists of other lengths
        return bool(one == other)


def _layout(demo: h5py.Group, task: TaskSpec) -> dict[str, int | None]:
    """{dataset: width} of the actions and of the observation's parts, in order; a user's own are those of `demo`."""
    own = {f"obs/{key}": None for key in _own_keys(demo)} or {"obs": None}
    return {"actions": task.action_dim or None} | ({f"obs/{key}": width for key, width in task.obs} or own)


def _own_keys(demo: h5py.Group) -> list[str]:
    obs = demo.get("obs") if isinstance(demo, h5py.Group) else None
    return sorted(obs) if isinstance(obs, h5py.Group) else []


def _read_episode(demo: h5py.Group, where: str, task: TaskSpec, layout: dict[str, int | None]) -> tuple[Floats, Floats]:
    """Observations (T, O) and actions (T, A) of one episode; what it has must be alike in the later ones."""
    if not task.obs and (extra := {f"obs/{key}" for key in _own_keys(demo)} - layout.keys()):
        raise UserError(f"{where} has {min(extra)}, the first episode has not; all need the same observations")
    parts = []
    for key, width in layout.items():
        parts.append(_read_matrix(demo, key, where, width))
        layout[key] = parts[-1].shape[1]
        if len(parts[-1]) != len(parts[0]):
            raise UserError(f"{where}: {key} has {len(parts[-1])} rows for {len(parts[0])} actions; get the file again")
    return np.concatenate(parts[1:], axis=1), parts[0]


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
    with np.errstate(over="ignore"):  # becomes infinity
        values = item[()].astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{where}: {key} holds NaN or infinity; leave the episode out or repair the file")
    return values
