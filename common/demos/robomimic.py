"""Demonstrations in robomimic's low-dimensional hdf5 schema: reading with checks, and the published files.

A file holds groups data/demo_<i> with datasets actions (T, A) and obs/<key> (T, width), and lists of episode
names in mask/<filter key>. An observation is the concatenation of the task's keys in the order of `TaskSpec`.
For a user's own environment it is all keys in sorted order, the same in every episode, or obs (T, O) itself where
that is a dataset; its actions are in [-1, 1], as the environment made by `make_env` takes them, or in its own units.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from common.demos.checks import READS, Bounds, Floats, in_range, joined, matrix, note
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
EPISODE = re.compile(r"demo_\d+")


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
        raise UserError(f"{path} does not exist; {READS}")
    if not h5py.is_hdf5(path):
        raise UserError(f"{path} cannot be read: {GET_AGAIN}; {READS}")
    with reading(path, GET_AGAIN), h5py.File(path) as file:
        yield file


def read_demos(
    path: Path, task: TaskSpec, filter_key: str = "", box: Bounds | None = None
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Reads and checks a file; for a built-in task its name, version and widths must be those of the task.

    filter_key: name of the mask that chooses the episodes; empty takes all. box: actions of a user's own environment in
    its own units; actions that are in them are brought to [-1, 1].

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
    return obs, in_range(actions, ends, names, path, box), ends


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
        raise UserError(f"{path} has no groups data/demo_<i>, as robomimic's files have; {READS}")
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
    """The dataset `key` of an episode, see `matrix`."""
    item = demo.get(key)
    if not isinstance(item, h5py.Dataset):
        group = demo.get("obs") if key.startswith("obs/") else demo
        found = ", ".join(sorted(group)) if isinstance(group, h5py.Group) else "nothing"
        raise UserError(f"{where} has no dataset {key}; a low-dimensional file is needed, found: {found}")
    return matrix(item, f"{where}: {key}", width)
