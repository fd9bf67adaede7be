"""Demonstrations as arrays and in LeRobot's format: what is read, and one line for what is not."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from common.demos import arrays, get_demos, save_demos
from common.demos.checks import ACTION_LIMIT, READS
from common.envs import Pixels
from common.errors import UserError
from tests.test_bad_files import BROKEN, IDS, Edit, one_line, saved

LENGTHS = (4, 7, 3)
OWN = "benchmarks.dense_toy:DenseToy-v0"  # observations of 6 numbers, actions of 2


def episodes(obs_dim: int = 6, act_dim: int = 2) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((n, obs_dim)), rng.uniform(-0.9, 0.9, (n, act_dim)), (np.arange(n) == n - 1).astype(float))
        for n in LENGTHS
    ]


def stacked() -> dict[str, np.ndarray]:
    """The episodes as a user has them: 64-bit numbers."""
    obs, actions, rewards = (np.concatenate(column) for column in zip(*episodes(), strict=True))
    return {"obs": obs, "actions": actions, "rewards": rewards}


def numbered() -> np.ndarray:
    return np.repeat([7, 3, 5], LENGTHS)  # in any order


def check_demos(path: Path, env: str = "toy") -> None:
    """What --demos reads there is `episodes()`."""
    demos = get_demos(env, str(path), 1, 0.0, path.parent)
    assert demos.obs.dtype == demos.actions.dtype == np.float32 and demos.ends.dtype == np.int64
    assert demos.ends.tolist() == np.cumsum(LENGTHS).tolist() and demos.name == path.name
    np.testing.assert_array_equal(demos.obs, stacked()["obs"].astype(np.float32))
    np.testing.assert_array_equal(demos.actions, stacked()["actions"].astype(np.float32))


def refused(path: Path, *words: object, env: str = "toy", **more: Any) -> str:
    """The one line that says so."""
    with pytest.raises(UserError) as caught:
        get_demos(env, str(path), 1, 0.0, path.parent / "data", **more)
    one_line(caught.value, path.name, *words)
    return str(caught.value)


# --- Arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["toy", OWN])
@pytest.mark.parametrize("parts", [2, 3])
def test_save_demos_is_read_as_it_was_written(tmp_path: Path, env: str, parts: int) -> None:
    save_demos(tmp_path / "mine.npz", (episode[:parts] for episode in episodes()))
    check_demos(tmp_path / "mine.npz", env)
    with np.load(tmp_path / "mine.npz") as file:
        assert set(file.files) == {"obs", "actions", "ends", "rewards"} - ({"rewards"} if parts == 2 else set())
        assert np.flatnonzero(file["ends"]).tolist() == [3, 10, 13]
    assert [file.name for file in tmp_path.iterdir()] == ["mine.npz"]  # no temporary files


@pytest.mark.parametrize(
    "marks",
    [
        {"ends": np.isin(np.arange(14), (3, 10, 13))},
        {"ends": np.isin(np.arange(14), (3, 10, 13)).astype(np.uint8)},
        {"episode": numbered()},
        {"episode": numbered().astype(np.uint8)},  # differences wrap around
    ],
)
def test_read_arrays_of_a_file_and_of_a_folder(tmp_path: Path, marks: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "mine.npz", **stacked(), **marks, log=np.ones(3))  # others are left alone
    check_demos(tmp_path / "mine.npz")
    (tmp_path / "mine").mkdir()
    for name, array in (stacked() | marks).items():
        np.save(tmp_path / "mine" / f"{name}.npy", array)
    np.save(tmp_path / "mine" / "others.npy", np.array([{}]), allow_pickle=True)
    check_demos(tmp_path / "mine")


def test_read_arrays_actions_are_those_of_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, (obs, actions, _) = tmp_path / "mine.npz", episodes()[0]
    box = np.array([-2.0, 0.0]), np.array([2.0, 10.0])
    save_demos(path, [(obs, (actions + 1) / 2 * (box[1] - box[0]) + box[0])])
    np.testing.assert_allclose(arrays.read_arrays(path, box)[1], actions, atol=1e-5)
    assert "own units, and rescaled" in capsys.readouterr().err
    assert "episode 0: actions reach" in refused(path, "they must be in [-1, 1]")
    save_demos(path, [(obs, np.sign(actions))])
    assert np.abs(get_demos("toy", str(path), 1, 0.0, tmp_path).actions).max() == np.float32(ACTION_LIMIT)


@pytest.mark.parametrize(
    ("units", "high", "given", "read"),
    [
        ("environment", 5.0, 1.0, -0.6),
        ("normalized", 5.0, 1.0, 1.0),
        ("", 5.0, 1.0, 1.0),  # [-1, 1] is narrower
        ("normalized", 0.5, 0.25, 0.25),
        ("environment", 0.5, 0.25, 0.0),
        ("", 0.5, 0.25, 0.0),  # the box is
    ],
)
def test_save_demos_units_are_what_the_file_says(
    tmp_path: Path, units: str, high: float, given: float, read: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path, box = tmp_path / "mine.npz", (np.zeros(2), np.full(2, high))
    save_demos(path, [(np.ones((3, 6)), np.full((3, 2), given))], units)
    np.testing.assert_allclose(arrays.read_arrays(path, box)[1], read, atol=2e-5)
    assert bool(capsys.readouterr().err) == (not units)  # a guess is told


@pytest.mark.parametrize(
    ("units", "given", "said"),
    [
        ("environment", 6.0, "episode 0: actions reach 6; they must be in the environment's own units, 0 to 5"),
        ("normalized", 2.0, "episode 0: actions reach 2; they must be in [-1, 1]: rescale"),
        ("", -2.0, "actions reach -2; they must be in [-1, 1], or in the environment's own units, 0 to 5: rescale"),
        ("degrees", 0.0, "units is 'degrees'; normalized or environment is needed"),
    ],
)
def test_read_arrays_actions_outside_their_units_are_one_line(
    tmp_path: Path, units: str, given: float, said: str
) -> None:
    path = tmp_path / "mine.npz"
    save_demos(path, [(np.ones((3, 6)), np.full((3, 2), given))], units)
    with pytest.raises(UserError) as caught:
        arrays.read_arrays(path, (np.zeros(2), np.full(2, 5.0)))
    one_line(caught.value, path.name, said)


def changed(**changes: Any) -> Edit:
    """A file with other arrays, or without some (None)."""
    content = stacked() | {"ends": np.isin(np.arange(14), (3, 10, 13))} | changes
    kept = {name: array for name, array in content.items() if array is not None}
    return lambda path: np.savez(path, **kept)


BAD_ARRAYS: dict[str, tuple[Edit, str]] = {
    "no obs": (changed(obs=None), "has no obs, only actions, rewards, ends; --demos reads"),
    "observations by another name": (changed(obs=None, observations=np.ones(3)), "has no obs"),
    "nothing": (lambda path: np.savez(path), "has no obs, only nothing; --demos reads"),
    "neither mark": (changed(ends=None), "neither ends nor episode, one is needed"),
    "both marks": (changed(episode=numbered()), "has ends and episode, one is needed"),
    "an end short": (changed(ends=np.ones(13, bool)), "ends is bool (13,); (14,) bool"),
    "ends as rows": (changed(ends=np.array([4, 11, 14])), "ends is int64 (3,); (14,) bool, True at"),
    "ends that count": (changed(ends=np.arange(14)), "ends must be True at"),
    "an episode without end": (changed(ends=np.arange(14) == 3), "also the last of all"),
    "ends as numbers with a point": (changed(ends=np.ones(14)), "ends is float64"),
    "an episode in two pieces": (changed(ends=None, episode=np.repeat([1, 0, 1], LENGTHS)), "steps are apart"),
    "an observation more": (changed(obs=np.ones((15, 6))), "obs has 15 rows, actions 14; every observation needs"),
    "flat actions": (changed(actions=np.ones(14)), "actions is float64 (14,); numbers of shape"),
    "no width": (changed(actions=np.ones((14, 0))), "actions is float64 (14, 0)"),
    "no steps": (changed(obs=np.ones((0, 6)), actions=np.ones((0, 2))), "obs is float64 (0, 6)"),
    "NaN": (changed(obs=np.full((14, 6), np.nan)), "obs holds NaN"),
    "above float32": (changed(actions=np.full((14, 2), 1e300)), "actions holds NaN or infinity"),
    "text": (changed(actions=np.full((14, 2), "1")), "actions is <U1"),
    "objects": (changed(obs=np.full((14, 6), None)), "Object arrays cannot be loaded"),
    "rewards of another length": (changed(rewards=np.ones(3)), "rewards has shape (3,); (14,)"),
    "an action out of range": (changed(actions=np.full((14, 2), 1.5)), "episode 0: actions reach 1.5"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_read_arrays_bad_file_is_one_line(tmp_path: Path, name: str) -> None:
    edit, words = BAD_ARRAYS[name]
    edit(tmp_path / "mine.npz")
    refused(tmp_path / "mine.npz", words)


@pytest.mark.parametrize(("name", "edit"), BROKEN, ids=IDS)
def test_read_arrays_broken_bytes_are_one_line_or_a_sound_load(tmp_path: Path, name: str, edit: Edit) -> None:
    path = tmp_path / "mine.npz"
    changed()(path)
    edit(path)
    try:
        demos = get_demos("toy", str(path), 1, 0.0, tmp_path / "data")
    except UserError as error:
        one_line(error, path.name)
    else:
        assert demos.obs.shape == (14, 6) and np.isfinite(demos.obs).all() and np.abs(demos.actions).max() < 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "there are no episodes"),
        (episodes()[0], "episode 0 has 4 parts; give (obs, actions)"),  # not in a list
        ([episodes()[0], episodes()[1][:2]], "rewards is missing in episode 1"),
        ([episodes()[0], episodes(5)[0]], "a step's obs is (5,) in episode 1, (6,) in episode 0"),
        ([(np.ones((5, 6)), np.ones((4, 2)))], "episode 0: obs has 5 rows, actions 4"),
        ([([[1.0], [1.0, 2.0]], [[1.0]])], "episode 0 cannot be read"),
        ([(np.full((4, 6), np.inf), np.ones((4, 2)))], "episode 0: obs holds NaN"),
    ],
)
def test_save_demos_refuses_in_one_line_and_writes_nothing(tmp_path: Path, given: list, words: str) -> None:
    with pytest.raises(UserError) as caught:
        save_demos(tmp_path / "mine.npz", given)
    one_line(caught.value, "mine.npz", words)
    with pytest.raises(UserError, match=r"written to \.npz"):
        save_demos(tmp_path / "mine.hdf5", episodes())
    assert not list(tmp_path.iterdir())


# --- LeRobot ----------------------------------------------------------------------------------------------------------


def lerobot_folder(folder: Path, version: str = "v3.0", obs_dim: int = 6, act_dim: int = 2, **columns: str) -> Path:
    """`episodes()` as LeRobot lays them out: a file per episode in v2, several episodes a file in v3.

    columns: further ones as name=kind, "_" for "."; their values are left out, as those of videos are.
    """
    obs, actions, _ = (np.concatenate(column).astype("f4") for column in zip(*episodes(obs_dim, act_dim), strict=True))

    def vectors(x: np.ndarray) -> pa.Array:
        flat = pa.array(x.ravel())
        return flat if x.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, x.shape[1])

    frame = np.concatenate([np.arange(n) for n in LENGTHS])
    numbers = {"frame_index": frame, "episode_index": np.repeat(np.arange(3), LENGTHS), "index": np.arange(14)}
    table = pa.table({"action": vectors(actions), "observation.state": vectors(obs), "timestamp": frame / 10} | numbers)
    ends = np.cumsum(LENGTHS).tolist()
    if version.startswith("v2"):
        files = {f"episode_{i:06d}": (end - n, n) for i, (n, end) in enumerate(zip(LENGTHS, ends, strict=True))}
        data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    else:
        files = {"file-000": (0, ends[1]), "file-001": (ends[1], LENGTHS[2])}
        data_path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    about_episodes = folder / "meta" / "episodes" / "chunk-000"
    about_episodes.mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for name, (start, length) in files.items():
        parquet.write_table(table.slice(start, length), folder / "data" / "chunk-000" / f"{name}.parquet")
    about = [{"episode_index": i, "length": n, "tasks": ["reach"]} for i, n in enumerate(LENGTHS)]
    if version.startswith("v2"):
        (folder / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, about)))
    else:
        parquet.write_table(pa.Table.from_pylist(about), about_episodes / "file-000.parquet")
    features = {
        "observation.state": {"dtype": "float32", "shape": [obs_dim], "names": None},
        "action": {"dtype": "float32", "shape": [act_dim], "names": None},
        **{name.replace("_", "."): {"dtype": kind, "shape": [3, 8, 8]} for name, kind in columns.items()},
        **{key: {"dtype": "int64", "shape": [1], "names": None} for key in numbers},
    }
    info = {
        "codebase_version": version, "robot_type": None, "total_episodes": 3, "total_frames": 14, "fps": 10,
        "chunks_size": 1000, "data_path": data_path, "features": features,
    }  # fmt: skip
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return folder


def tell(folder: Path, **changes: Any) -> None:
    """The data set's info.json with other entries."""
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_read_dataset_of_lerobot(tmp_path: Path, version: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lerobot_folder(tmp_path / "data_set", version)
    for env in ("toy", OWN):
        check_demos(folder, env)
    assert not capsys.readouterr().err


def test_read_dataset_takes_lists_scalars_and_files_in_any_order(tmp_path: Path) -> None:
    folder = lerobot_folder(tmp_path / "one", act_dim=1)
    one = get_demos("toy", str(folder), 1, 0.0, tmp_path)
    np.testing.assert_array_equal(one.actions, np.concatenate([x[1] for x in episodes(6, 1)]).astype(np.float32))
    folder = lerobot_folder(tmp_path / "mixed")
    (file,) = folder.glob("data/*/file-000.parquet")
    table = parquet.read_table(file)
    lists = pa.array(table["observation.state"].to_pylist(), pa.list_(pa.float64()))
    table = table.set_column(table.column_names.index("observation.state"), "observation.state", lists)
    parquet.write_table(table.take(pa.array(np.arange(len(table))[::-1])), file)  # steps backwards
    file.rename(file.with_name("file-002.parquet"))
    check_demos(folder)


def test_read_dataset_notes_observations_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lerobot_folder(tmp_path / "data_set", observation_images="video", observation_extra="float32")
    check_demos(folder)
    said = f"note: {folder}: observation.images, observation.extra left out: an observation is observation.state\n"
    assert capsys.readouterr().err == said


def without(*names: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        features = json.loads((folder / "meta" / "info.json").read_text())["features"]
        tell(folder, features={name: feature for name, feature in features.items() if name not in names})

    return edit


def first_file(folder: Path) -> Path:
    return min(folder.glob("data/*/*.parquet"))


def rewritten(edit: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """The first data file edited."""
    return lambda folder: parquet.write_table(edit(parquet.read_table(first_file(folder))), first_file(folder))


def first_column(name: str, values: Callable[[int], list]) -> Callable[[Path], None]:
    return rewritten(lambda table: table.drop_columns([name]).append_column(name, [values(len(table))]))


BAD_DATASETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "images only": (without("observation.state"), "its images are not read: record the state too; --demos reads"),
    "no action": (without("action"), "has no column action, only observation.state"),
    "another version": (lambda folder: tell(folder, codebase_version="v4.0"), "LeRobot's format v4.0, v2 and v3"),
    "no features": (lambda folder: tell(folder, features=None), "info.json cannot be read"),
    "info is text": (lambda folder: (folder / "meta" / "info.json").write_text("?"), "info.json cannot be read"),
    "a file is missing": (lambda folder: first_file(folder).unlink(), "has 3 of its 14 steps; get the data set again"),
    "no files": (lambda folder: [f.unlink() for f in folder.glob("data/*/*")], "has no files data/**/*.parquet"),
    "a pointer of git": (lambda folder: first_file(folder).write_text("version https://git-lfs"), "cannot be read ("),
    "a column is missing": (rewritten(lambda table: table.drop_columns(["action"])), "file-000.parquet cannot be read"),
    "a step has none": (first_column("action", lambda n: [None] + [[0.0] * 2] * (n - 1)), "cannot be read ("),
    "rows of unlike widths": (first_column("action", lambda n: [[0.0]] + [[0.0] * 2] * (n - 1)), "cannot be read ("),
    "files of unlike widths": (first_column("action", lambda n: [[0.0] * 3] * n), "its files have unlike columns"),
    "text": (first_column("action", lambda n: ["left"] * n), "its files have unlike columns"),
    "NaN": (first_column("action", lambda n: [[0.0, float("nan")]] * n), "action holds NaN"),
    "degrees": (first_column("action", lambda n: [[0.0, 90.0]] * n), "episode 0: actions reach 90"),
}


@pytest.mark.parametrize("name", BAD_DATASETS)
def test_read_dataset_of_lerobot_bad_folder_is_one_line(tmp_path: Path, name: str) -> None:
    folder = lerobot_folder(tmp_path / "data_set", observation_images="video")
    edit, words = BAD_DATASETS[name]
    edit(folder)
    refused(folder, words)


def test_read_dataset_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lerobot_folder(tmp_path / "data_set")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(folder, "pip install pyarrow")


# --- Any --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demos.pkl", "demos.csv", "demos.zarr/", "demos", "user/dataset", "minari-mine.npz"])
def test_get_demos_of_an_unknown_format_names_those_that_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    refused(path, f"does not exist; {READS}")
    path.parent.mkdir(exist_ok=True)
    if name.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(b"\x80\x04}\x94.")
    said = refused(path, READS)
    assert said.startswith(f"{path} {'cannot be read' if name.endswith('.npz') else 'is in none of the formats'}")


def test_get_demos_names_the_formats_for_an_hdf5_file_of_another_layout(tmp_path: Path) -> None:
    for name in ("d4rl.hdf5", "d4rl.dat"):
        with h5py.File(tmp_path / name, "w") as file:
            file["observations"] = np.ones((3, 6))
        refused(tmp_path / name, "has no groups data/demo_<i>", READS)


def test_get_demos_tells_a_policy_from_demonstrations(tmp_path: Path) -> None:
    saved(b1=np.zeros(3))(tmp_path / "policy.npz")
    refused(tmp_path / "policy.npz", "is no policy for toy")
    changed(w0=np.ones((2, 2)))(tmp_path / "demos.npz")
    check_demos(tmp_path / "demos.npz")


def test_get_demos_masks_and_images_are_those_of_hdf5_files(tmp_path: Path) -> None:
    save_demos(tmp_path / "mine.npz", episodes())
    for path in (tmp_path / "mine.npz", lerobot_folder(tmp_path / "data_set")):
        with pytest.raises(UserError, match=r"--filter-key train: only FILE\.hdf5 has masks"):
            get_demos("toy", str(path), 1, 0.0, tmp_path, filter_key="train")
        refused(path, "images are read from FILE.hdf5 only", pixels=Pixels(("agentview",), 16))
