"""Demonstrations by source: scripted experts, published data sets, or recorded files of several formats."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from common.demos import arrays, lerobot
from common.demos.arrays import save_demos
from common.demos.checks import READS, Bounds, Floats, note
from common.demos.robomimic import has_images, obtain_release, read_demos, read_images
from common.envs import Pixels, TaskSpec, make_env, resolve
from common.errors import UserError

__all__ = ["Demos", "get_demos", "save_demos"]
PUBLISHERS = {"robosuite": "robomimic", "adroit": "minari", "kitchen": "minari"}  # of `TaskSpec.datasets`, by suite


@dataclass
class Demos:
    """N steps of E successful episodes, one after the other.

    obs (N, O) and actions (N, A) are float32, actions within (-1, 1); ends (E,) int64 is the row after each
    episode's last; name says where they come from. images (N, cameras, S, S, 3) uint8 only if they were asked for; obs
    is then what the robot feels itself. tasks: if there are several, how many; their one-hot ends each observation.
    """

    obs: NDArray[np.float32]
    actions: NDArray[np.float32]
    ends: NDArray[np.int64]
    name: str
    images: NDArray[np.uint8] | None = None
    tasks: int = 0

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (O,) of the observations; of several tasks the deviation within a task.

        Tasks stand half a metre apart, which would make the few centimetres between their goals look like nothing.
        """
        obs = torch.from_numpy(self.obs)
        std = obs.std(0)
        if self.tasks:
            task = obs[:, -self.tasks :].argmax(1)  # (N,)
            centres = torch.stack([obs[task == k].mean(0) for k in range(self.tasks)])
            std[: -self.tasks] = (obs - centres[task]).std(0)[: -self.tasks]
        return obs.mean(0), std

    def check_fit(self, env_id: str, obs_dim: int, act_dim: int, horizon: int) -> None:
        """Raises UserError if observations or actions have other widths than those of the environment.

        Prints a note if the cap of an episode, `horizon`, is shorter than a demonstration.
        """
        for what, have, want in (("observations", self.obs, obs_dim), ("actions", self.actions, act_dim)):
            if have.shape[1] != want:
                raise UserError(
                    f"--demos {self.name}: its {what} have {have.shape[1]} numbers, {env_id} has {want}; give "
                    "demonstrations of this environment"
                )
        lengths = np.diff(self.ends, prepend=0)
        if long := int((lengths > horizon).sum()):
            note(
                f"{long} of the {len(lengths)} demonstrations are longer than an episode may be, {lengths.max()} steps "
                f"of {horizon}: raise --horizon if the task takes as long"
            )

    def episodes(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Each episode: obs (T+1, O), the last one twice as the final one is not recorded, and actions (T, A)."""
        for first, end in pairwise([0, *self.ends.tolist()]):
            yield np.concatenate([self.obs[first:end], self.obs[end - 1 : end]]), self.actions[first:end]

    def chunks(self, horizon: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Every step of every episode as a chunk start: obs (N, O), actions (N, horizon * A).

        Past an episode's end the last action is repeated [deviation: released code weights these steps 0; repeated,
        they teach the policy to finish what it is doing, and a loss needs no mask].
        """
        starts = np.arange(len(self.obs))
        end = self.ends[np.searchsorted(self.ends, starts, side="right")]  # (N,)
        rows = np.minimum(starts[:, None] + np.arange(horizon), end[:, None] - 1)  # (N, horizon)
        return self.obs, self.actions[rows].reshape(len(rows), -1)


def get_demos(
    env_id: str, source: str, num: int, noise: float, cache: Path, *,
    filter_key: str = "", seed: int = 0, pixels: Pixels | None = None,
) -> Demos:  # fmt: skip
    """Loads demonstrations for a task; what is made or downloaded for it is kept in the folder `cache`.

    source: "scripted"; "robomimic", the release for the task that the paper uses, "robomimic-ph" (one expert),
    "robomimic-mh" (six people); "minari", the same for Adroit and Kitchen, "minari-human", "minari-cloned"; a trained
    policy POLICY.npz to roll out; or recorded episodes: FILE.hdf5 (`robomimic`), FILE.npz or a folder of .npy files
    (`arrays`), a LeRobot folder (`lerobot`). num, noise, seed: episodes, noise and seed of "scripted" and POLICY.npz.
    filter_key: take the episodes that the mask of this name lists in FILE.hdf5, e.g. "train"; empty: all. pixels: give
    images too, from FILE.hdf5; files of simulator states have them drawn on first use.

    Raises UserError with the remedy if there are none for the task, or the file is unusable.
    """
    from tools import policy_file, recording  # the makers are a room of their own, which needs this one

    task = resolve(env_id)
    publisher, _, release = ("" if Path(source).suffix else source).partition("-")  # a suffix: a file of that name
    if publisher == "minari":
        from common.demos import minari  # its package takes a while to import

        if pixels:
            raise UserError("--demos minari: these data have no images; use --demos scripted or FILE.hdf5")
        if filter_key:
            raise UserError(f"--filter-key {filter_key}: Minari's data have no masks; leave the flag out")
        name = minari.dataset_name(task, _find_release(task, publisher, release))
        return Demos(*minari.read_dataset(name, task), name)
    with TemporaryDirectory() as spare:
        if source == "scripted" or policy_file.is_policy(Path(source)):
            path = recording.made_file(task, source, num, noise, seed, cache, Path(spare), pixels)
        elif publisher == "robomimic":
            path = obtain_release(task, _find_release(task, publisher, release), cache)
        else:
            path = Path(source)
        box = None
        if task.suite in ("gymnasium", "pusht"):
            with closing(make_env(env_id)) as env:
                box = env.get_wrapper_attr("action_bounds")
        obs, actions, ends = _read(path, task, filter_key, box, pixels)
        if not pixels:
            return Demos(obs, actions, ends, path.name, tasks=len(task.tasks))
        if not has_images(path) and task.suite == "robosuite":
            path = recording.drawn_file(path, task, pixels, cache, Path(spare))
        images = read_images(path, pixels, filter_key)
    return Demos(np.ascontiguousarray(obs[:, list(task.proprio)]), actions, ends, path.name, images)


def _read(
    path: Path, task: TaskSpec, filter_key: str, box: Bounds | None, pixels: Pixels | None
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """What `read_demos` returns, of a file or folder of any format. Raises UserError for one of none."""
    if not path.exists():
        raise UserError(f"{path} does not exist; {READS}")
    if path.suffix in (".hdf5", ".h5") or (path.is_file() and h5py.is_hdf5(path)):
        return read_demos(path, task, filter_key, box)
    of_lerobot = (path / lerobot.INFO).is_file()
    if not (of_lerobot or path.suffix == ".npz" or (path.is_dir() and any(path.glob("*.npy")))):
        raise UserError(f"{path} is in none of the formats that are read; {READS}")
    if pixels:
        raise UserError(f"--demos {path}: images are read from FILE.hdf5 only; use one, or --demos scripted")
    if filter_key:
        raise UserError(f"--filter-key {filter_key}: only FILE.hdf5 has masks; leave the flag out")
    return lerobot.read_dataset(path, box) if of_lerobot else arrays.read_arrays(path, box)


def _find_release(task: TaskSpec, publisher: str, release: str) -> str:
    """The release asked for, or the task's first one. Raises UserError if the publisher has none such."""
    releases = task.datasets if PUBLISHERS.get(task.suite) == publisher else ()
    if not releases:
        raise UserError(f"{publisher} has no dataset for {task.name}; give demonstrations with --demos FILE")
    if release and release not in releases:
        names = ", ".join(f"{publisher}-{name}" for name in releases)
        raise UserError(f"--demos {publisher}-{release}: {task.name} has {names}")
    return release or releases[0]
