"""Demonstrations: experts, the robomimic schema, and one clear refusal for every way a file can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import huggingface_hub
import numpy as np
import pytest

from common import download
from common.demos import Demos, get_demos, robomimic
from common.demos.checks import ACTION_LIMIT
from common.demos.robomimic import obtain_release, read_demos
from common.envs import TASKS, TaskSpec, make_env, resolve, toy
from common.errors import UserError
from common.seeds import DEMOS
from tools import recording, scripted
from tools.recording import Episode, write_demos

LIFT = TASKS["lift"]
LENGTHS = (4, 7, 3)


def env_args(task: TaskSpec = LIFT, version: str = "1.5.1") -> str:
    return json.dumps({"env_name": task.env_name, "env_version": version, "type": 1, "env_kwargs": {}})


def episodes(task: TaskSpec = LIFT, lengths: tuple[int, ...] = LENGTHS) -> list[Episode]:
    rng = np.random.default_rng(0)
    return [
        Episode(
            {key: rng.standard_normal((n, width)).astype(np.float32) for key, width in task.obs},
            rng.standard_normal((n, 5)),
            rng.uniform(-1, 1, (n, task.action_dim)).astype(np.float32),
            np.zeros(n),
        )
        for n in lengths
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A valid file of three episodes for Lift."""
    write_demos(tmp_path / "lift.hdf5", episodes(), env_args())
    return tmp_path / "lift.hdf5"


def test_read_demos_returns_what_was_written(path: Path) -> None:
    written = episodes()
    obs, actions, ends = read_demos(path, LIFT)
    assert ends.tolist() == np.cumsum(LENGTHS).tolist() and ends.dtype == np.int64
    order = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    np.testing.assert_array_equal(obs[4:11], np.concatenate([written[1].obs[key] for key in order], axis=1))
    np.testing.assert_array_equal(actions, np.concatenate([episode.actions for episode in written]))
    assert obs.dtype == actions.dtype == np.float32
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary files


def test_write_demos_schema_is_robomimics(path: Path) -> None:
    with h5py.File(path) as file:
        assert file["data"].attrs["total"] == sum(LENGTHS)
        assert json.loads(file["data"].attrs["env_args"])["env_name"] == "Lift"
        demo = file["data/demo_1"]
        assert demo.attrs["num_samples"] == 7 and demo["dones"][()].tolist() == [0] * 6 + [1]
        assert {"actions", "rewards", "dones", "states", "obs"} == set(demo)
        assert file["mask/train"][()].tolist() == [b"demo_0", b"demo_1"]
        assert file["mask/valid"][()].tolist() == [b"demo_2"]


def test_read_demos_filter_key_chooses_episodes(path: Path) -> None:
    obs, _, ends = read_demos(path, LIFT, "valid")
    np.testing.assert_array_equal(obs, read_demos(path, LIFT)[0][11:])
    assert ends.tolist() == [3]
    with pytest.raises(UserError, match=r"no mask 'better'; it has train, valid"):
        read_demos(path, LIFT, "better")


def test_read_demos_episodes_are_in_numerical_order(tmp_path: Path) -> None:
    lengths = tuple(range(1, 13))
    write_demos(tmp_path / "many.hdf5", episodes(lengths=lengths), env_args())
    assert read_demos(tmp_path / "many.hdf5", LIFT)[2].tolist() == np.cumsum(lengths).tolist()


def test_read_demos_actions_stay_off_the_ends_of_the_range(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["data/demo_0/actions"][0] = [-1, 1, 0.5, 0, 0, 0, 1 + 5e-7]
    actions = read_demos(path, LIFT)[1]
    limit = np.float32(ACTION_LIMIT)
    np.testing.assert_array_equal(actions[0], np.array([-limit, limit, 0.5, 0, 0, 0, limit], np.float32))


def replace(key: str, value: np.ndarray) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[key]
        file[key] = value

    return edit


def set_args(text: str) -> Callable[[h5py.File], None]:
    return lambda file: file["data"].attrs.__setitem__("env_args", text)


def poke(key: str, value: float) -> Callable[[h5py.File], None]:
    return lambda file: file[key].__setitem__((0, 0), value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda file: file.__delitem__("data"), r"no groups data/demo_<i>"),
        (lambda file: [file.__delitem__(f"data/demo_{i}") for i in range(3)], r"no groups data/demo_<i>"),
        (lambda file: file.__delitem__("data/demo_1/obs/object"), r"demo_1 has no dataset obs/object.*robot0_eef_pos"),
        (lambda file: file.__delitem__("data/demo_1/actions"), r"demo_1 has no dataset actions.*found: dones, obs"),
        (replace("data/demo_0/obs/object", np.zeros((4, 14))), r"demo_0: obs/object is float64 \(4, 14\).*10"),
        (replace("data/demo_0/obs/object", np.zeros((5, 10))), r"obs/object has 5 rows for 4 actions"),
        (replace("data/demo_0/actions", np.zeros((4, 14))), r"demo_0: actions is float64 \(4, 14\)"),
        (replace("data/demo_0/actions", np.zeros((0, 7))), r"demo_0: actions is .*\(T > 0, 7\)"),
        (replace("data/demo_0/actions", np.zeros((4, 7), "S1")), r"demo_0: actions is \|S1"),
        (poke("data/demo_2/actions", 1.01), r"demo_2: actions reach 1.01"),
        (poke("data/demo_2/actions", np.nan), r"demo_2: actions holds NaN"),
        (poke("data/demo_2/obs/robot0_eef_pos", np.inf), r"demo_2: obs/robot0_eef_pos holds NaN or inf"),
        (set_args(env_args(TASKS["toy"])), r"is for toy, not for Lift"),
        (set_args(env_args(version="1.4.1")), r"robosuite 1.4.1, which orders the object observation"),
        (set_args("{}"), r"does not say what it was recorded in"),
        (set_args("?"), r"does not say what it was recorded in"),
        (lambda file: file["data"].attrs.__delitem__("env_args"), r"does not say what it was recorded in"),
    ],
)
def test_read_demos_unusable_file_is_a_user_error(path: Path, edit: Callable[[h5py.File], None], words: str) -> None:
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(UserError, match=words) as caught:
        read_demos(path, LIFT)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(("content", "words"), [(None, "does not exist"), (b"<html>", "no robomimic hdf5 file")])
def test_get_demos_missing_or_broken_file_is_a_user_error(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "demos.hdf5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        get_demos("lift", str(path), 1, 0.0, tmp_path)


@pytest.mark.parametrize(("names", "words"), [([b"demo_9"], "lists demo_9"), ([], "is empty")])
def test_read_demos_bad_mask_is_a_user_error(path: Path, names: list[bytes], words: str) -> None:
    with h5py.File(path, "r+") as file:
        replace("mask/train", np.array(names, "S8"))(file)
    with pytest.raises(UserError, match=words):
        read_demos(path, LIFT, "train")


def test_check_fit_notes_demonstrations_longer_than_an_episode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_demos(tmp_path / "long.hdf5", episodes(lengths=(301, 300)), env_args())
    demos = get_demos("lift", str(tmp_path / "long.hdf5"), 1, 0.0, tmp_path)
    assert len(demos.obs) == 601
    demos.check_fit("lift", 19, 7, 301)
    assert not capsys.readouterr().err
    demos.check_fit("lift", 19, 7, 300)
    said = "note: 1 of the 2 demonstrations are longer than an episode may be, 301 steps of 300: raise --horizon"
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1
    with pytest.raises(UserError, match="its observations have 19 numbers, lift has 20"):
        demos.check_fit("lift", 20, 7, 300)


def test_read_demos_of_a_users_environment(tmp_path: Path) -> None:
    task, path = resolve("package:Env-v0"), tmp_path / "own.hdf5"
    b, a = np.ones((3, 2), np.float32), np.zeros((3, 1), np.float32)
    with h5py.File(path, "w") as file:
        for i in range(2):
            file[f"data/demo_{i}/actions"] = np.zeros((3, 2))
            file[f"data/demo_{i}/obs/b"], file[f"data/demo_{i}/obs/a"] = b, a
    np.testing.assert_array_equal(read_demos(path, task)[0][:3], np.concatenate([a, b], axis=1))  # sorted keys
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"], file["data/demo_0/obs"] = np.zeros((3, 2)), b
    np.testing.assert_array_equal(read_demos(path, task)[0], b)
    with h5py.File(path, "r+") as file:
        file["data/demo_1/actions"], file["data/demo_1/obs"] = np.zeros((3, 2)), a
    with pytest.raises(UserError, match=r"demo_1: obs is float32 \(3, 1\); numbers of shape \(T > 0, 2\)"):
        read_demos(path, task)


def test_made_file_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    first = get_demos("toy", "scripted", 5, 0.1, tmp_path / "a", seed=3)
    assert len(first.ends) == 5 and first.ends[-1] == len(first.obs) == len(first.actions)
    assert first.name == "toy_scripted-v2_n5_noise0.1_seed3.hdf5" and (tmp_path / "a" / first.name).exists()
    again = get_demos("toy", "scripted", 5, 0.1, tmp_path / "b", seed=3)
    np.testing.assert_array_equal(first.obs, again.obs)
    np.testing.assert_array_equal(first.actions, again.actions)
    other = get_demos("toy", "scripted", 5, 0.1, tmp_path / "a", seed=4)
    assert other.obs.shape != first.obs.shape or (other.obs != first.obs).any()


def test_generate_episodes_replay_to_success(tmp_path: Path) -> None:
    demos = get_demos("toy", "scripted", 3, 0.1, tmp_path)
    with h5py.File(tmp_path / demos.name) as file:
        for i in range(3):
            rewards = file[f"data/demo_{i}/rewards"][()]
            assert rewards[-1] == 1 and not rewards[:-1].any()  # ends at the first success
    env, starts = make_env("toy"), [0, *demos.ends[:-1]]
    for seed in range(DEMOS, DEMOS + 10):
        obs, _ = env.reset(seed=seed)
        matches = [k for k, start in enumerate(starts) if (demos.obs[start] == obs).all()]
        for k in matches:
            *_, last = (env.step(action) for action in demos.actions[starts[k] : demos.ends[k]])
            assert last[4]["success"]
            starts[k] = -1
    assert starts == [-1, -1, -1]


def test_made_file_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_demos("toy", "scripted", 2, 0.1, tmp_path)
    monkeypatch.setattr(recording, "generate", lambda *args: pytest.fail("made twice"))
    assert len(get_demos("toy", "scripted", 2, 0.1, tmp_path).ends) == 2


def test_made_file_that_changed_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = get_demos("toy", "scripted", 2, 0.1, tmp_path)
    path = tmp_path / first.name
    assert not capsys.readouterr().err.count("note")
    with h5py.File(path, "r+") as file:
        file["data/demo_0/actions"][0] = 0.25
    again = get_demos("toy", "scripted", 2, 0.1, tmp_path)
    np.testing.assert_array_equal(again.actions, first.actions)
    assert capsys.readouterr().err.count(f"note: {path} has changed since it was made; making it again") == 1
    get_demos("toy", "scripted", 2, 0.1, tmp_path)
    assert "note" not in capsys.readouterr().err
    path.with_name(path.name + ".sha256").write_bytes(b"\xff\n")
    np.testing.assert_array_equal(get_demos("toy", "scripted", 2, 0.1, tmp_path).actions, first.actions)
    assert "making it again" in capsys.readouterr().err


def test_made_file_needs_no_writable_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").touch()  # no folder can be there
    first = get_demos("toy", "scripted", 2, 0.1, tmp_path / "data")
    assert len(first.ends) == 2
    assert capsys.readouterr().err.count("data cannot be written (") == 1
    get_demos("toy", "scripted", 2, 0.1, tmp_path / "cache")
    path = tmp_path / "cache" / first.name
    path.with_name(path.name + ".sha256").unlink()

    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(download, "write_atomic", refuse)
    monkeypatch.setattr(recording, "generate", lambda *args: pytest.fail("made twice"))
    assert len(get_demos("toy", "scripted", 2, 0.1, tmp_path / "cache").ends) == 2  # what is there is used
    write_demos(tmp_path / "lift_ph_low_dim_v15.hdf5", episodes(), env_args())
    assert len(get_demos("lift", "robomimic", 1, 0.0, tmp_path).ends) == 3


def test_lift_expert_lifts(tmp_path: Path) -> None:
    demos = get_demos("lift", "scripted", 3, 0.2, tmp_path)
    assert demos.obs.shape[1] == 19 and demos.actions.shape[1] == 7 and len(demos.ends) == 3
    last = demos.obs[demos.ends - 1]
    assert (last[:, 11] > 0.82).all()  # the cube is off the table
    with h5py.File(tmp_path / demos.name) as file:
        state = file["data/demo_0/states"][0]
        np.testing.assert_allclose(state[10:13], file["data/demo_0/obs/object"][0, :3], atol=1e-6)


@pytest.mark.parametrize(("name", "noise"), [("can", 0.3), ("square", 0.3)])
def test_find_expert_picks_and_places(tmp_path: Path, name: str, noise: float) -> None:
    demos = get_demos(name, "scripted", 1, noise, tmp_path)
    task = TASKS[name]
    assert demos.obs.shape[1] == 23 and demos.actions.shape[1] == 7 and len(demos.ends) == 1
    assert 80 < len(demos.obs) < scripted.MAX_STEPS[name] <= task.horizon
    spread = demos.obs[:, 16:19]
    assert np.linalg.norm(spread[-1, :2] - spread[0, :2]) > 0.1  # the object is elsewhere
    assert demos.actions[0, 6] < -0.9 and demos.actions[:, 6].max() > 0.9


def test_shares_of_several_tasks(tmp_path: Path) -> None:
    assert recording.shares(200, TASKS["mt10"].demo_weights) == [8, 48, 48, 8, 16, 4, 8, 52, 4, 4]
    assert recording.shares(5, (1, 2)) == [2, 3] and recording.shares(5, (1,)) == [5]
    demos = get_demos("mt10", "scripted", 5, 0.2, tmp_path)
    assert demos.tasks == 10
    first = demos.obs[[0, *demos.ends[:-1]], 39:].argmax(1)
    assert np.bincount(first, minlength=10).tolist() == [1, 2, 1, 0, 0, 0, 0, 1, 0, 0]


def test_demos_statistics_of_several_tasks_are_those_within_a_task() -> None:
    rng = np.random.default_rng(0)
    task = rng.integers(2, size=1_000)
    place = 100 * task + rng.standard_normal(1_000)  # tasks 100 apart, 1 wide
    obs = np.column_stack([place, np.eye(2)[task]]).astype(np.float32)
    demos = Demos(obs, obs, np.array([1_000]), "two tasks", tasks=2)
    mean, std = demos.statistics()
    assert std[0].item() == pytest.approx(1, rel=0.1) and std[1:] == pytest.approx(obs[:, 1:].std(0), rel=1e-2)
    np.testing.assert_allclose(mean, obs.mean(0), rtol=1e-4)
    demos.tasks = 0
    np.testing.assert_allclose(demos.statistics()[1], obs.std(0), rtol=1e-2)


def test_generate_hopeless_expert_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "TARGET_RADIUS", 0.0)
    with pytest.raises(UserError, match="toy expert fails with noise 50"):
        get_demos("toy", "scripted", 1, 50.0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_generate_no_episodes_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one"):
        get_demos("toy", "scripted", 0, 0.1, tmp_path)


def test_find_expert_of_a_users_environment_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no scripted expert; give demonstrations with --demos FILE, or record"):
        get_demos("package:Env-v0", "scripted", 1, 0.0, tmp_path)


def test_obtain_release_takes_the_file_in_the_cache_and_notices_changes(tmp_path: Path) -> None:
    path = tmp_path / "lift_ph_low_dim_v15.hdf5"
    write_demos(path, episodes(), env_args())
    for _ in range(2):
        demos = get_demos("lift", "robomimic", 1, 0.0, tmp_path)
        assert demos.name == path.name and len(demos.ends) == 3  # whole, whatever `num` says
    assert {file.name for file in tmp_path.iterdir()} == {path.name, path.name + ".sha256"}
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="has changed since its first use; delete it"):
        get_demos("lift", "robomimic", 1, 0.0, tmp_path)


def test_obtain_release_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    with pytest.raises(UserError, match=r"cannot download .*low_dim_v15.hdf5 .*put the file at .*--demos scripted"):
        obtain_release(LIFT, "ph", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def robomimic_args(task: TaskSpec, **changes: object) -> str:
    """env_args as the v1.5 releases have them."""
    arm = dict(
        type="OSC_POSE", input_max=1, input_min=-1, output_max=[0.05] * 3 + [0.5] * 3,
        output_min=[-0.05] * 3 + [-0.5] * 3, kp=150, damping=1, impedance_mode="fixed", uncouple_pos_ori=True,
        control_delta=True, input_ref_frame="world", gripper={"type": "GRIP"},
    )  # fmt: skip
    kwargs = dict(
        robots=["Panda"] * (task.action_dim // 7), control_freq=20, lite_physics=False, reward_shaping=False,
        controller_configs={"type": "BASIC", "body_parts": {"right": arm | changes}},
    )  # fmt: skip
    kwargs |= {key: changes[key] for key in ("robots", "control_freq") if key in changes}
    return json.dumps(dict(env_name=task.env_name, env_version="1.5.1", type=1, env_kwargs=kwargs))


ROBOSUITE = [name for name, task in TASKS.items() if task.suite == "robosuite"]


@pytest.mark.parametrize("name", ROBOSUITE)
def test_get_demos_robomimic_files_of_all_tasks_load_or_are_refused(tmp_path: Path, name: str) -> None:
    task, path = TASKS[name], tmp_path / "demos.hdf5"
    write_demos(path, episodes(task), robomimic_args(task))
    demos = get_demos(name, str(path), 1, 0.0, tmp_path)
    assert demos.obs.shape == (14, sum(width for _, width in task.obs)) and demos.actions.shape[1] == task.action_dim
    newer = json.loads(robomimic_args(task, input_max=[1] * 6))  # parts by kind, as robosuite's own files have them
    newer["env_kwargs"]["controller_configs"]["body_parts"] = {
        "arms": newer["env_kwargs"]["controller_configs"]["body_parts"]
    }
    write_demos(path, episodes(task), json.dumps(newer))
    assert len(get_demos(name, str(path), 1, 0.0, tmp_path).ends) == 3
    for args, words in (
        (env_args(task, "1.4.1"), "recorded with robosuite 1.4.1, which orders the object observation differently"),
        (robomimic_args(task, output_max=[1.0] * 6), r"recorded with output_max \[1.0"),
        (robomimic_args(task, control_freq=10), "control_freq 10"),
        (robomimic_args(task, robots=["Sawyer"]), r"robots \['Sawyer'\]"),
        (robomimic_args(task, input_ref_frame="base"), "input_ref_frame base"),
        (robomimic_args(TASKS["lift" if name != "lift" else "can"]), f"not for {task.env_name}"),
    ):
        write_demos(path, episodes(task), args)
        with pytest.raises(UserError, match=words):
            get_demos(name, str(path), 1, 0.0, tmp_path)


def test_get_demos_release_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def obtain(path: Path, url: str, otherwise: str) -> Path:
        task = resolve(path.name.split("_")[0])
        write_demos(path, episodes(task), env_args(task))
        asked.append(url.removeprefix("https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/"))
        return path

    monkeypatch.setattr(robomimic, "obtain", obtain)
    assert get_demos("square", "robomimic", 1, 0.0, tmp_path).name == "square_mh_low_dim_v15.hdf5"
    assert get_demos("lift", "robomimic-ph", 1, 0.0, tmp_path).name == "lift_ph_low_dim_v15.hdf5"
    assert asked == ["v1.5/square/mh/low_dim_v15.hdf5", "v1.5/lift/ph/low_dim_v15.hdf5"]
    with pytest.raises(UserError, match="--demos robomimic-mh: tool_hang has robomimic-ph"):
        get_demos("tool_hang", "robomimic-mh", 1, 0.0, tmp_path)
    with pytest.raises(UserError, match="door has minari-expert, minari-human, minari-cloned"):
        get_demos("door", "minari-best", 1, 0.0, tmp_path)


@pytest.mark.parametrize("name", ["toy", "mt10", "package:Env-v0", "door"])
def test_get_demos_unpublished_task_is_a_user_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"robomimic has no dataset for {name}; give demonstrations with --demos FILE"):
        get_demos(name, "robomimic", 1, 0.0, tmp_path)
    with pytest.raises(UserError, match="minari has no dataset for lift"):
        get_demos("lift", "minari", 1, 0.0, tmp_path)
