"""Demonstrations as plain arrays: an .npz file, or a folder of .npy files of the same names.

obs (N, O) and actions (N, A) are the steps of all episodes, one episode after the other; obs[t] is what was seen when
actions[t] was chosen. Either ends (N,) is True at the last step of every episode, or episode (N,) is the number of each
step's episode. rewards (N,) may be there; cloning does not need them. units may be there, a word of UNITS: what actions
are in, which their range does not always tell.
"""

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.demos.checks import READS, UNITS, Bounds, Floats, in_range, matrix
from common.errors import UserError, reading
from common.files import replacing

NAMES = ("obs", "actions", "ends", "episode", "rewards", "units")


def read_arrays(path: Path, box: Bounds | None = None) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Reads and checks a file or folder; arguments, result and errors are those of `robomimic.read_demos`."""
    arrays, found = _load(path)
    if missing := [name for name in NAMES[:2] if name not in arrays]:
        raise UserError(f"{path} has no {missing[0]}, only {', '.join(found) or 'nothing'}; {READS}")
    steps = _checked(arrays, str(path))
    ends = _ends(arrays, len(steps["obs"]), path)
    names = [f"episode {i}" for i in range(len(ends))]
    units = str(arrays.get("units", ""))
    if units not in ("", *UNITS):
        raise UserError(f"{path}: units is {units[:40]!r}; {' or '.join(UNITS)} is needed, or leave it out")
    return steps["obs"], in_range(steps["actions"], ends, names, path, box, units), ends


def save_demos(
    path: str | Path, episodes: Iterable[Sequence[ArrayLike]], units: Literal["", "normalized", "environment"] = ""
) -> None:
    """Writes episodes, all of them successes, to an .npz file that --demos reads; atomically.

    An episode of T steps is (obs (T, O), actions (T, A)) or (obs, actions, rewards (T,)); obs[t] is what was seen when
    actions[t] was chosen. units: "normalized" for actions in [-1, 1], "environment" for those in the units of the
    environment; empty leaves it to the reader, by their range.
    Raises UserError, and writes nothing, if they have other shapes or are not finite.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: demonstrations are written to .npz; give a name that ends so")
    parts = [_episode(episode, f"{path}: episode {i}") for i, episode in enumerate(episodes)]
    if not parts:
        raise UserError(f"{path}: there are no episodes; give at least one")
    for i, part in enumerate(parts):
        for name in parts[0].keys() | part.keys():
            shapes = [p[name].shape[1:] if name in p else "missing" for p in (parts[0], part)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{path}: a step's {name} is {shapes[1]} in episode {i}, {shapes[0]} in episode 0; "
                    "give all episodes the same"
                )
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    ends = np.concatenate([np.arange(len(part["obs"])) == len(part["obs"]) - 1 for part in parts])
    with replacing(path) as temp:
        np.savez(temp, **columns, ends=ends, **({"units": np.array(units)} if units else {}))


def _episode(episode: Sequence[ArrayLike], where: str) -> dict[str, Floats]:
    """{obs, actions and perhaps rewards} of one episode, checked."""
    if len(episode) not in (2, 3):
        raise UserError(f"{where} has {len(episode)} parts; give (obs, actions) or (obs, actions, rewards)")
    names = ("obs", "actions", "rewards")[: len(episode)]
    with reading(where, "give arrays of numbers"):
        return _checked({name: np.asarray(part) for name, part in zip(names, episode, strict=True)}, where)


def _load(path: Path) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The arrays that have our names, and the names of all. Nothing is unpickled."""
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.glob("*.npy"))}
        arrays = {}
        for name in files.keys() & set(NAMES):
            with reading(files[name], "write it with numpy.save, of numbers"), open(files[name], "rb") as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        return arrays, list(files)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} cannot be read: it is cut, damaged or no .npz file: get it again; {READS}")
    with reading(path, "write it with numpy.savez, of numbers"), np.load(path, allow_pickle=False) as file:
        return {name: np.asarray(file[name]) for name in NAMES if name in file.files}, file.files


def _checked(arrays: Mapping[str, NDArray[Any]], where: str) -> dict[str, Floats]:
    """obs, actions and, if there are such, rewards, with a row for every step."""
    steps = {name: matrix(arrays[name], f"{where}: {name}") for name in ("obs", "actions")}
    rows = len(steps["obs"])
    if len(steps["actions"]) != rows:
        raise UserError(
            f"{where}: obs has {rows} rows, actions {len(steps['actions'])}; every observation needs its action: "
            "leave out the one after an episode's last action"
        )
    if "rewards" in arrays:
        rewards = arrays["rewards"]
        if rewards.shape != (rows,):
            raise UserError(f"{where}: rewards has shape {rewards.shape}; ({rows},) is needed, a number a step")
        steps["rewards"] = matrix(rewards[:, None], f"{where}: rewards")[:, 0]
    return steps


def _ends(arrays: Mapping[str, NDArray[Any]], rows: int, path: Path) -> NDArray[np.int64]:
    """The row after each episode's last, (E,)."""
    given = [name for name in ("ends", "episode") if name in arrays]
    if len(given) != 1:
        raise UserError(
            f"{path} has {' and '.join(given) or 'neither ends nor episode'}, one is needed: ends (N,) bool, True at "
            f"every episode's last step, or episode (N,) int, the number of each step's; {READS}"
        )
    name, marks = given[0], arrays[given[0]]
    if marks.shape != (rows,) or marks.dtype.kind not in "biu":
        kind = "bool, True at every episode's last step" if name == "ends" else "int"
        raise UserError(f"{path}: {name} is {marks.dtype} {marks.shape}; ({rows},) {kind} is needed")
    if name == "ends":
        if not np.isin(marks, (0, 1)).all() or not marks[-1]:
            raise UserError(f"{path}: ends must be True at every episode's last step, also the last of all, else False")
        return np.flatnonzero(marks) + 1
    ends = np.append(np.flatnonzero(marks[1:] != marks[:-1]) + 1, rows)
    if len(np.unique(marks)) != len(ends):
        raise UserError(f"{path}: an episode's steps are apart; sort all by episode, or give each its own number")
    return ends
