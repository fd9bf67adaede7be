"""Demonstrations for Adroit and Kitchen: D4RL's data sets in Minari's format, downloaded and read by its package."""

import huggingface_hub
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from common.demos.checks import ACTION_LIMIT, Floats, joined
from common.download import check_digest
from common.envs import TaskSpec
from common.envs.robotics_env import flat_observation
from common.errors import UserError, first_line, reading

try:
    import minari
    from minari import EpisodeData
    from minari.storage.datasets_root_dir import get_dataset_path
except ImportError as error:
    raise UserError(f"minari cannot be imported ({error}); run: pip install minari==0.5.4") from error


def dataset_name(task: TaskSpec, release: str) -> str:
    """Minari's name of the task's data set; `release` is one of `TaskSpec.datasets`."""
    return f"D4RL/{'kitchen' if task.suite == 'kitchen' else task.name.partition('-')[0]}/{release}-v2"


def read_dataset(name: str, task: TaskSpec) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """A data set from where `minari download` puts it, downloaded on first use; returns what `read_demos` does.

    Raises UserError without a network, or if the data are of another environment or cannot serve.
    """
    folder = get_dataset_path(name)
    path = folder / "data" / "main_data.hdf5"
    if not path.is_file():
        _download(name)
    check_digest(path)
    with reading(folder, "choose the matching task, or delete it to download it again"):
        dataset = minari.load_dataset(name)
        _check_origin(dataset.env_spec, task)
        obs, actions, ends = joined([_read_episode(episode, task) for episode in dataset])
    return obs, np.clip(actions, -ACTION_LIMIT, ACTION_LIMIT), ends  # as these environments do


def _download(name: str) -> None:
    """Downloads a data set, going on after an interruption. Raises UserError without a network."""
    file = huggingface_hub.hf_hub_url("farama-minari/D4RL", f"{name[5:]}/data/metadata.json", repo_type="dataset")
    try:
        huggingface_hub.get_hf_file_metadata(file)  # without a network this fails at once; minari tries for long
        minari.download_dataset(name, force_download=True)
    except Exception as error:  # hub, network and disk each have exceptions of their own
        raise UserError(
            f"cannot download {name} ({first_line(error)}); run `minari download {name}` where there is a network and "
            f"copy the data set to {get_dataset_path(name)}"
        ) from error


def _check_origin(spec: EnvSpec | None, task: TaskSpec) -> None:
    """Raises ValueError for data of another environment, or of other Kitchen goals."""
    env = spec.id if spec else "no named environment"
    if env.replace("Sparse", "") != task.env_name.replace("Sparse", ""):
        raise ValueError(f"it is of {env}, not of {task.env_name}")
    goals = set(spec.kwargs.get("tasks_to_complete", task.goals))
    if goals != set(task.goals):
        raise ValueError(f"it has the goals {sorted(goals)}, {task.name} has {sorted(task.goals)}")


def _read_episode(episode: EpisodeData, task: TaskSpec) -> tuple[Floats, Floats]:
    """Observations (T, O), those before an action, and actions (T, A). Raises ValueError for others."""
    obs, actions = flat_observation(episode.observations, task), episode.actions.astype(np.float32)
    width = sum(width for _, width in task.obs)
    if obs.shape != (len(actions) + 1, width) or actions.shape[1:] != (task.action_dim,):
        raise ValueError(
            f"episode {episode.id} has observations {obs.shape} and actions {actions.shape}; "
            f"(T + 1, {width}) and (T, {task.action_dim}) are needed"
        )
    if not (np.isfinite(obs).all() and np.isfinite(actions).all()):
        raise ValueError(f"episode {episode.id} holds NaN or infinity")
    return obs[:-1], actions
