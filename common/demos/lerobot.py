"""Demonstrations in LeRobot's format, its versions 2 and 3, from a local folder. Its own package is not needed.

meta/info.json describes the columns. The parquet files under data/ hold a row for every step, in version 2 a file for
every episode, in version 3 several in one; both have the columns episode_index and frame_index, which say what belongs
where. Images, in videos or columns, are left alone.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.demos.checks import READS, Bounds, Floats, in_range, matrix, note
from common.errors import UserError, reading

INFO = "meta/info.json"
STATE, ACTION = "observation.state", "action"
AGAIN = "get the data set again, all of data/ and meta/ (hf download --repo-type dataset NAME --local-dir FOLDER)"


def read_dataset(folder: Path, box: Bounds | None = None) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Reads and checks a data set; observations are its observation.state, actions its action.

    Arguments, result and errors are those of `robomimic.read_demos`. Prints a note on observations left out.
    """
    with reading(folder / INFO, AGAIN):
        info = json.loads((folder / INFO).read_text())
        version, total = str(info["codebase_version"]), info["total_frames"]
        kinds = {name: feature["dtype"] for name, feature in info["features"].items()}
    if not version.startswith(("v2.", "v3.")):
        raise UserError(f"{folder} is of LeRobot's format {version}, v2 and v3 are read; convert it with its tools")
    images = [name for name, kind in kinds.items() if kind in ("image", "video")]
    for name in (STATE, ACTION):
        if name not in kinds:
            why = "; its images are not read: record the state too" if images and name == STATE else ""
            raise UserError(f"{folder} has no column {name}, only {', '.join(kinds)}{why}; {READS}")
    if others := [name for name in kinds if name.startswith("observation.") and name != STATE]:
        note(f"{folder}: {', '.join(others)} left out: an observation is {STATE}")
    columns = _read_columns(folder)
    obs, actions = (matrix(columns[name], f"{folder}: {name}") for name in (STATE, ACTION))
    if len(obs) != total:
        raise UserError(f"{folder} has {len(obs)} of its {total} steps; {AGAIN}")
    order = np.lexsort((columns["frame_index"], columns["episode_index"]))
    numbers, starts = np.unique(columns["episode_index"][order], return_index=True)
    ends = np.append(starts[1:], total)
    actions = in_range(actions[order], ends, [f"episode {number}" for number in numbers], folder, box)
    return obs[order], actions, ends


def _read_columns(folder: Path) -> dict[str, NDArray]:
    """{column: (N,) or (N, width)} of all files, in any order of steps."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{folder} is read by pyarrow, which fails ({error}); run: pip install pyarrow") from error
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise UserError(f"{folder} has no files data/**/*.parquet; {AGAIN}")
    parts: dict[str, list[NDArray]] = {name: [] for name in (STATE, ACTION, "episode_index", "frame_index")}
    for file in files:
        with reading(file, AGAIN):
            with parquet.ParquetFile(file) as opened:
                table = opened.read(columns=list(parts))
            for name, part in parts.items():
                values = table[name].to_numpy()  # of vectors: an array of arrays
                part.append(np.stack(values) if values.dtype == object else values)
    with reading(folder, "its files have unlike columns: export it again"):
        columns = {name: np.concatenate(part) for name, part in parts.items()}
    # One number is not stored as a vector.
    return {name: x[:, None] if name in (STATE, ACTION) and x.ndim == 1 else x for name, x in columns.items()}
