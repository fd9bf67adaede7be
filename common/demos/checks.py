"""What readers of demonstrations share: numbers that are checked, actions in [-1, 1], and the formats by name."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

Floats = NDArray[np.float32]
Bounds = tuple[NDArray[Any], NDArray[Any]]  # least and largest action, each (A,)
TOP = 1 + 1e-6  # largest action of a file, with room for rounding
ACTION_LIMIT = 1 - 1e-5  # the ends of the range are unreachable for squashed policies
UNITS = ("normalized", "environment")  # of actions, where a file says so: in [-1, 1], or as the environment takes them
# The end of a refusal of what is in none of the formats.
READS = (
    "--demos reads FILE.hdf5 in robomimic's layout, FILE.npz or a folder of .npy files with obs, actions and ends, and "
    "LeRobot folders; to convert others: "
    "from common.demos import save_demos; save_demos('demos.npz', [(obs, actions), ...])"
)


def note(text: str) -> None:
    """One line on what a user may not expect."""
    print(f"note: {text}", file=sys.stderr)


def matrix(item: h5py.Dataset | NDArray[Any], what: str, width: int | None = None) -> Floats:
    """`item` as a finite array (T, width), neither of them 0; a width of None takes any. Raises UserError."""
    shape_ok = item.ndim == 2 and 0 not in item.shape and width in (None, item.shape[1])
    if not shape_ok or item.dtype.kind not in "fiu":
        raise UserError(
            f"{what} is {item.dtype} {item.shape}; "
            f"numbers of shape (T > 0, {width or 'width'}) are needed: re-export the file"
        )
    with np.errstate(over="ignore"):  # becomes infinity
        values = item[()].astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{what} holds NaN or infinity; leave the episode out or repair the file")
    return values


def joined(episodes: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Observations (N, O), actions (N, A) and exclusive ends (E,) of E episodes, one after the other."""
    obs, actions = (np.concatenate(column) for column in zip(*episodes, strict=True))
    return obs, actions, np.cumsum([len(actions) for _, actions in episodes])


def in_range(
    actions: Floats, ends: NDArray[np.int64], names: Sequence[str], path: Path, box: Bounds | None = None,
    units: str = "",
) -> Floats:  # fmt: skip
    """Actions (N, A) within +-ACTION_LIMIT; those in the units of the `box` are brought to [-1, 1].

    units: one of UNITS, or empty: what the range of the actions suggests, with a note.
    Raises UserError if they are in neither, naming the episode: `ends` (E,) are exclusive, `names` those of E episodes.
    """
    taken, judged, ranges = actions, actions, [] if box and units == "environment" else ["[-1, 1]"]
    if box and units != "normalized" and actions.shape[1:] == box[0].shape:
        low, high = (np.asarray(bound, np.float64) for bound in box)
        judged = ((2 * actions - low - high) / (high - low)).astype(np.float32)
        if units or _in_units_of(box, actions, path):
            taken = judged
    if np.abs(taken).max() > TOP:
        row, column = np.unravel_index(np.abs(judged).argmax(), judged.shape)
        if judged is not actions:
            ranges.append(f"the environment's own units, {low[column]:g} to {high[column]:g}")
        raise UserError(
            f"{path}: {names[int(np.searchsorted(ends, row, side='right'))]}: actions reach {actions[row, column]:g}; "
            f"they must be in {', or in '.join(ranges)}: rescale them"
        )
    return np.clip(taken, -ACTION_LIMIT, ACTION_LIMIT)


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
