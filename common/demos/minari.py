"""Demonstrations in Minari's hdf5 schema, for Adroit and Kitchen: where `minari download` puts them, read with checks.

A data set is a folder with data/main_data.hdf5, groups episode_<i> of observations (T + 1, O) (or a group of such),
actions (T, A), and data/metadata.json, which names the environment.
"""

import json
import os
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from common.demos.robomimic import ACTION_LIMIT
from common.download import check_digest
from common.envs import TaskSpec
from common.errors import UserError


def find_dataset(task: TaskSpec, release: str) -> Path:
    """Folder of the task's data set; `release` as in `TaskSpec.datasets`, "" for the first. Raises UserError."""
    if task.suite not in ("adroit", "kitchen"):
        raise UserError(f"Minari has no data set for {task.name}; give demonstrations with --demos FILE.hdf5")
    release = release or task.datasets[0]
    if release not in task.datasets:
        names = ", ".join(f"minari-{name}" for name in task.datasets)
        raise UserError(f"--demos minari-{release}: {task.name} has {names}")
    family = "kitchen" if task.suite == "kitchen" else task.name.removesuffix("-dense")
    name = f"D4RL/{family}/{release}-v2"
    root = Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))
    if not (root / name / "data" / "main_data.hdf5").is_file():
        raise UserError(
            f"no Minari data in {root / name}; run: pip install 'minari[hf,hdf5]==0.5.4' && minari download {name}"
        )
    return root / name


def read_dataset(folder: Path, task: TaskSpec) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Observations (N, O), actions (N, A) within +-ACTION_LIMIT, exclusive episode ends (E,).

    Raises UserError if the data are of another environment or cannot serve, naming the first fault.
    """
    path = check_digest(folder / "data" / "main_data.hdf5")
    _check_origin(folder / "data" / "metadata.json", task)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} is not a readable hdf5 file ({error}); delete it and download it again") from error
    episodes = []
    with file:
        for name in sorted(file, key=lambda name: int(name.rpartition("_")[2])):
            episodes.append(_read_episode(file[name], f"{path}: {name}", task))
    if not episodes:
        raise UserError(f"{path} holds no episodes; delete it and download it again")
    obs, actions = (np.concatenate(column) for column in zip(*episodes, strict=True))
    ends = np.cumsum([len(actions) for _, actions in episodes])
    return obs, np.clip(actions, -ACTION_LIMIT, ACTION_LIMIT), ends


def _check_origin(path: Path, task: TaskSpec) -> None:
    """Refuses data of another environment, or of other Kitchen goals."""
    try:
        spec = json.loads(path.read_text())["env_spec"]
        spec = json.loads(spec) if isinstance(spec, str) else spec
        env, kwargs = spec["id"], spec.get("kwargs", {})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not say what environment the data are of ({error}); download them again"
        ) from error
    if env.replace("Sparse", "") != task.env_name.replace("Sparse", ""):
        raise UserError(f"{path} is of {env}, not of {task.env_name}; choose the matching task or data")
    goals = set(kwargs.get("tasks_to_complete", task.goals))
    if goals != set(task.goals):
        raise UserError(f"{path} has the goals {sorted(goals)}, {task.name} has {sorted(task.goals)}")


def _read_episode(episode: h5py.Group, where: str, task: TaskSpec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Observations (T, O), those before an action, and actions (T, A)."""
    try:
        actions = episode["actions"][()].astype(np.float32)
        group = episode["observations"]
        if task.suite == "kitchen":
            goals = [group[kind][name] for kind in ("achieved_goal", "desired_goal") for name in sorted(task.goals)]
            group = np.concatenate([part[()] for part in (group["observation"], *goals)], axis=-1)
        obs = np.asarray(group[()], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is not in Minari's schema ({error}); download the data again") from error
    width = sum(width for _, width in task.obs)
    if obs.shape != (len(actions) + 1, width) or actions.shape[1:] != (task.action_dim,):
        raise UserError(
            f"{where}: observations {obs.shape} and actions {actions.shape}; "
            f"(T + 1, {width}) and (T, {task.action_dim}) are needed"
        )
    if not (np.isfinite(obs).all() and np.isfinite(actions).all()):
        raise UserError(f"{where} holds NaN or infinity; download the data again")
    return obs[:-1], actions
