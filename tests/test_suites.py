"""All suites but robosuite: the contract of every environment, and demonstrations without and with a network."""

import copy
import importlib
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import h5py
import numpy as np
import pytest

from common.demos import get_demos, save_demos
from common.envs import TASKS, make_env
from common.errors import UserError
from settings.tasks import METAWORLD
from tests.helpers import slow
from tests.test_bad_files import BROKEN
from tests.warm import run_script
from tools import doctor
from tools.policy_file import load_policy
from tools.recording import rollout
from tools.scripted import find_expert

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("metaworld", "adroit", "kitchen", "fetch")
QUICK = ("peg-insert-side", "pick-place", "metaworld-hammer", "mt10")  # of Meta-World's fifty
NAMES = [
    name if task.suite != "metaworld" or name in QUICK else slow(name)
    for name, task in TASKS.items()
    if task.suite in SUITES
]


@pytest.mark.parametrize("name", NAMES)
def test_make_env_episode_is_a_function_of_the_seed(name: str) -> None:
    """Within one environment, after other episodes, and in a fresh one."""
    task, rng = TASKS[name], np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (8, task.action_dim)).astype(np.float32)
    first, second = make_env(name), make_env(name)

    def rollout(env: object, seed: int) -> np.ndarray:
        obs, info = env.reset(seed=seed)
        assert info == {"success": False} and env.observation_space.contains(obs) and obs.dtype == np.float32
        assert obs.shape == (sum(width for _, width in task.obs),)
        steps = [env.step(action) for action in actions]
        assert all(step[2:] == (False, False, {"success": False}) for step in steps if not step[4]["success"])
        return np.stack([obs, *(step[0] for step in steps)])

    five, six = rollout(first, 5), rollout(first, 6)
    assert (five[0] != six[0]).any()
    np.testing.assert_array_equal(rollout(first, 5), five)
    np.testing.assert_array_equal(rollout(second, 5), five)
    for env in (first, second):
        env.close()


def test_metaworld_env_every_part_of_mt10_repeats_and_is_told() -> None:
    env = make_env("mt10")
    starts = [env.reset(seed=seed)[0] for seed in range(20)]
    for seed, start in enumerate(starts):
        assert start[39:].tolist() == np.eye(10)[seed % 10].tolist()
        np.testing.assert_array_equal(env.reset(seed=seed)[0], start)
        assert env.env is env._made[f"{TASKS['mt10'].tasks[seed % 10]}-v3"]
    drawn = []
    for _ in range(2):
        env.reset(seed=3)
        drawn.append([env.reset()[0] for _ in range(5)])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert len({start[39:].argmax() for start in drawn[0]}) > 1
    env.close()


@pytest.mark.parametrize("name", ["peg-insert-side", "mt10", "hand-insert"])
def test_metaworld_env_success_ends_and_the_horizon_truncates(name: str, tmp_path: Path) -> None:
    demos = get_demos(name, "scripted", 2, 0.0, tmp_path)
    env = make_env(name, horizon=10)
    env.reset(seed=2**31)
    steps = [env.step(np.zeros(4, np.float32)) for _ in range(10)]
    assert [step[3] for step in steps] == [False] * 9 + [True] and not any(step[2] for step in steps)
    with h5py.File(tmp_path / demos.name) as file:
        demo = file["data/demo_0"]
        assert demo["rewards"][()].tolist() == [0.0] * (demo.attrs["num_samples"] - 1) + [1.0]
        assert file["data"].attrs["total"] == len(demos.obs)
    assert demos.obs.shape[1] == env.observation_space.shape[0]
    env.close()
    with pytest.raises(UserError, match="--horizon 501"):
        make_env(name, horizon=501)


def test_tasks_are_all_of_metaworld_each_with_its_policy() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    assert {f"{name}-v3" for name in METAWORLD} == ALL_V3_ENVIRONMENTS.keys() == ENV_POLICY_MAP.keys()
    named = {task.env_name for task in TASKS.values() if task.suite == "metaworld" and not task.tasks}
    assert len(METAWORLD) == 50 and named == ENV_POLICY_MAP.keys()
    assert TASKS["hammer"].suite == "adroit" and TASKS["metaworld-hammer"].env_name == "hammer-v3"


@pytest.mark.parametrize("name", ["door-open", "metaworld-hammer", slow("push-back")])
def test_metaworld_expert_demonstrates_any_task(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    demos = get_demos(name, "scripted", 2, 0.2, tmp_path)
    assert demos.obs.shape[1] == 39 and demos.actions.shape[1] == 4 and len(demos.ends) == 2
    assert np.diff(demos.ends, prepend=0).max() <= TASKS[name].horizon
    assert not [w for w in recwarn if "Constant" in str(w.message)]


@pytest.mark.parametrize("name", ["fetch-reach", "fetch-push", "fetch-pick-and-place"])
def test_fetch_experts_succeed_within_the_cap(name: str, tmp_path: Path) -> None:
    task, expert = TASKS[name], find_expert(TASKS[name])
    env = make_env(name)
    for seed in range(5):
        succeeded, (obs, states, _, rewards) = rollout(env, expert, np.random.default_rng(seed), 0.3, seed)
        assert succeeded and len(obs) <= task.horizon and rewards.tolist() == [0.0] * (len(obs) - 1) + [1.0]
        assert obs.shape[1] == sum(width for _, width in task.obs) and len(states) == len(obs)
        assert (obs[:, -3:] == obs[0, -3:]).all()  # the goal
    core = env.env.unwrapped
    moved = obs[-1, :3] if name == "fetch-reach" else obs[-1, 3:6]
    assert np.linalg.norm(moved - core.goal) < 0.1  # a step before success, which is within 0.05
    np.testing.assert_allclose(core.data.site("target0").xpos, core.goal)  # in the picture
    env.close()
    assert get_demos(name, "scripted", 1, 0.0, tmp_path).obs.shape[1] == obs.shape[1]


def test_fetch_horizon_truncates() -> None:
    env = make_env("fetch-slide", horizon=3)
    env.reset(seed=0)
    steps = [env.step(np.zeros(4, np.float32)) for _ in range(3)]
    assert [step[1:4] for step in steps] == [(0.0, False, False)] * 2 + [(0.0, False, True)]
    env.close()


def test_pusht_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    monkeypatch.delitem(sys.modules, "common.envs.pusht_env", raising=False)
    with pytest.raises(UserError, match=r"pusht cannot be imported .* pip install --no-deps gym-pusht==") as caught:
        make_env("pusht")
    assert "\n" not in str(caught.value)


def test_pusht_meets_the_contract(tmp_path: Path) -> None:
    pytest.importorskip("gym_pusht")
    env = make_env("pusht")
    start, info = env.reset(seed=3)
    assert start.shape == (5,) and start.dtype == np.float32 and info == {"success": False}
    steps = [env.step(np.full(2, x, np.float32)) for x in (-1, 0, 1)]
    np.testing.assert_array_equal(env.reset(seed=3)[0], start)
    again = [env.step(np.full(2, x, np.float32)) for x in (-1, 0, 1)]
    for one, other in zip(steps, again, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:] == other[1:] == (0.0, False, False, {"success": False})
    block, goal = env.unwrapped.block, env.unwrapped.goal_pose
    block.angle, block.position = goal[2], goal[:2].tolist()
    assert env.step(np.full(2, -1, np.float32))[1:] == (1.0, True, False, {"success": True})
    obs = np.tile(start, (4, 1))
    save_demos(tmp_path / "mine.npz", [(obs, np.full((4, 2), 384.0))])  # in pixels
    np.testing.assert_allclose(get_demos("pusht", str(tmp_path / "mine.npz"), 1, 0.0, tmp_path).actions, 0.5)


def test_robotics_env_sparse_raw_and_dense_adroit_rewards() -> None:
    sparse, raw, dense = make_env("door"), make_env("door-raw"), make_env("door-dense")
    for env in (sparse, raw, dense):
        env.reset(seed=1)
    action = np.zeros(28, np.float32)
    assert sparse.step(action)[1] == 0.0 and raw.step(action)[1] == -0.1 and dense.step(action)[1] != 0.0
    for env in (sparse, raw, dense):  # the door opened by hand
        core = env.env.unwrapped
        core.data.qpos[core.door_hinge_addrs] = 1.5
    _, reward, terminated, truncated, info = sparse.step(action)
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"success": True})
    assert raw.step(action)[1:] == (10.0, False, False, {"success": True})
    _, reward, terminated, truncated, info = dense.step(action)
    assert reward > 15 and (terminated, truncated, info) == (False, False, {"success": True})


def test_robotics_env_kitchen_succeeds_when_all_goals_are_met() -> None:
    env = make_env("kitchen-partial")
    env.reset(seed=1)
    core = env.env.unwrapped
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES

    action = np.zeros(9, np.float32)
    assert env.step(action)[1] == 0.0
    for done, goal in enumerate(("microwave", "slide cabinet", "light switch"), 1):
        for other in ("microwave", "slide cabinet", "light switch")[:done]:
            core.data.qpos[OBS_ELEMENT_INDICES[other]] = OBS_ELEMENT_GOALS[other]
        _, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, info) == (done, False, {"success": False}), goal
    for goal in TASKS["kitchen-partial"].goals:
        core.data.qpos[OBS_ELEMENT_INDICES[goal]] = OBS_ELEMENT_GOALS[goal]
    core.data.qvel[:] = 0
    obs, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info) == (4.0, True, False, {"success": True})
    np.testing.assert_allclose(obs[59:70], obs[70:81], atol=0.3)  # achieved and desired, in the same order


def test_simulation_renders_every_suite() -> None:
    for name in ("peg-insert-side", "door", "kitchen-complete", "fetch-push"):
        env = make_env(name, render=True)
        env.reset(seed=1)
        try:
            image = env.render()
        except UserError as error:
            pytest.skip(str(error))
        assert image.shape == (256, 256, 3) and image.dtype == np.uint8 and image.std() > 10, name
        env.close()


# --- docs -------------------------------------------------------------------------------------------------------------


def test_tasks_page_names_every_task_and_its_own_task_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "tasks.md").read_text()
    for name in TASKS:
        suffix = "-" + name.partition("-")[2]
        assert f"`{name}`" in text or f"`{suffix}`" in text or suffix in ("-raw", "-dense"), name
    (tmp_path / "my_tasks.py").write_text(text.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    env = make_env("my_tasks:Line-v0")
    (x, goal), _ = env.reset(seed=3)
    steps = [env.step(np.array([goal], np.float32)) for _ in range(5)]
    assert x == 0 and [step[2] for step in steps] == [False] * 4 + [True] and steps[-1][4] == {"success": True}


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_attempt_finds_a_broken_package(tmp_path: Path) -> None:
    (tmp_path / "gymnasium_robotics.py").write_text("raise ImportError('no such assets')")
    works, line = doctor.attempt(doctor.STEP.format(task="door"), PYTHONPATH=str(tmp_path))
    assert not works and "no such assets" in line and "pip install gymnasium-robotics==1.4.2" in line
    assert doctor.attempt(doctor.STEP.format(task="door")) == (True, "39 28")


def test_main_of_doctor_names_a_remedy_for_what_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        doctor, "attempt", lambda code, **env: ("metaworld" not in code and "insert" not in code, "1 2")
    )
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line[0] != " "] == ["ok", "FAILS", "ok", "ok", "ok", "ok"]
    assert lines[2].endswith("-> pip install metaworld==3.1.1")
    monkeypatch.setattr(doctor, "attempt", lambda code, **env: ("MUJOCO_GL" not in env, "1 2"))
    assert doctor.main() == 0  # training needs no renderer
    assert "apt-get install libegl1" in capsys.readouterr().out


# --- demonstrations ---------------------------------------------------------------------------------------------------


def save_policy(path: Path, obs: int, action: int, **changes: object) -> Path:
    rng = np.random.default_rng(0)
    arrays = dict(w0=rng.normal(size=(8, obs)), b0=np.zeros(8), w1=rng.normal(size=(action, 8)), b1=np.ones(action))
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def test_load_policy_acts_as_its_formula(tmp_path: Path) -> None:
    path = save_policy(
        tmp_path / "p.npz", 39, 28, in_shift=np.ones(39), in_scale=2 * np.ones(39), out_scale=3 * np.ones(28)
    )
    expert = load_policy(path, TASKS["door"])
    obs, z = np.linspace(-1, 1, 39).astype(np.float32), np.load(path)
    policy = expert(None, obs, np.random.default_rng(0), 0.0)
    want = 3 * (z["w1"] @ np.tanh(z["w0"] @ ((obs - 1) / 2)) + 1)
    np.testing.assert_allclose(next(policy), np.clip(want, -1, 1), atol=1e-6)
    noisy = next(expert(None, obs, np.random.default_rng(0), 0.1)) - np.clip(want, -1, 1)
    assert 0 < np.abs(noisy).max() < 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w0": np.zeros((8, 5))}, r"no policy for door, which needs w0 \(h, 39\).*it holds w0 \(8, 5\)"),
        ({"w1": np.zeros((5, 8))}, r"\(28, h\)"),
        ({"w0": None, "w1": None}, "no policy for door"),
    ],
)
def test_load_policy_unfit_file_is_a_user_error(tmp_path: Path, changes: dict, words: str) -> None:
    path = save_policy(tmp_path / "p.npz", 39, 28, **changes)
    with pytest.raises(UserError, match=words):
        get_demos("door", str(path), 1, 0.0, tmp_path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        get_demos("door", str(path), 1, 0.0, tmp_path)


def test_find_expert_without_one_says_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"door has no scripted expert; name a trained policy with --demos POLICY\.npz"):
        get_demos("door", "scripted", 1, 0.0, tmp_path)
    for name in ("kitchen-mixed", "fetch-slide", "pusht"):
        with pytest.raises(UserError, match=f"{name} has no scripted expert; give demonstrations with --demos FILE"):
            get_demos(name, "scripted", 1, 0.0, tmp_path)


@pytest.mark.parametrize("name", ["door", "hammer", "pen", "relocate"])
def test_load_policy_trained_adroit_policies_demonstrate(name: str, tmp_path: Path) -> None:
    path = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "adroit" / f"pol_{name}.npz"
    if not path.exists():
        pytest.skip("no trained policies here")
    demos = get_demos(name, str(path), 2, 0.0, tmp_path)
    assert len(demos.ends) == 2 and demos.name.startswith(f"{name}_pol_{name}-")


@pytest.fixture
def minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The reader, with the package's folder of data sets moved to a new place."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return importlib.import_module("common.demos.minari")


def minari_dataset(name: str, env: str | None = None, goals: tuple[str, ...] = (), spoil: float = 0.0) -> Path:
    """Writes a data set of two episodes, 5 and 7 steps, with the package; `spoil` stands in its last observation."""
    import minari

    from common.demos.minari import dataset_name, get_dataset_path

    task, rng, buffers = TASKS[name], np.random.default_rng(0), []
    spec = copy.deepcopy(gym.spec(env or task.env_name.replace("Sparse", "")))
    spec.kwargs |= {"tasks_to_complete": list(goals or task.goals)} if task.goals else {}
    for length in (5, 7):
        obs = rng.normal(size=(length + 1, task.obs[0][1]))
        obs[-1, -1] += spoil
        if task.suite == "kitchen":
            widths = {"microwave": 1, "kettle": 7, "light switch": 2, "slide cabinet": 1, "bottom burner": 2}
            done = {part: np.full((length + 1, widths[part]), float(len(part))) for part in goals or task.goals}
            obs = {"observation": obs, "achieved_goal": done, "desired_goal": done}
        ends = np.arange(length) == length - 1
        actions = rng.uniform(-1, 1, (length, task.action_dim))
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                observations=obs, actions=actions, rewards=np.zeros(length), terminations=ends, truncations=~ends
            )
        )
    dataset = dataset_name(task, task.datasets[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the author and the like, which are missing
        minari.create_dataset_from_buffers(dataset, buffers, env=spec)
    return get_dataset_path(dataset) / "data" / "main_data.hdf5"


@pytest.mark.parametrize("name", ["door", "kitchen-complete"])
def test_read_dataset_of_minari(name: str, minari: ModuleType, tmp_path: Path) -> None:
    path = minari_dataset(name)
    demos = get_demos(name, "minari", 1, 0.0, tmp_path)
    assert demos.name == {"door": "D4RL/door/expert-v2", "kitchen-complete": "D4RL/kitchen/complete-v2"}[name]
    assert demos.ends.tolist() == [5, 12] and demos.obs.shape == (12, sum(width for _, width in TASKS[name].obs))
    assert demos.obs.dtype == demos.actions.dtype == np.float32
    with h5py.File(path) as file:
        raw = file["episode_1/observations"]
        raw = raw["observation"][()] if name != "door" else raw[()]
        np.testing.assert_array_equal(demos.obs[5:, : raw.shape[1]], raw[:-1].astype(np.float32))
        np.testing.assert_array_equal(demos.actions[5:], file["episode_1/actions"][()].astype(np.float32))
    if name != "door":  # kettle, light switch, microwave, slide cabinet: sorted, as the environment has them
        assert demos.obs[0, 59:70].tolist() == [6.0] * 7 + [12.0] * 2 + [9.0] + [13.0]
    with pytest.raises(UserError, match="--filter-key better"):
        get_demos(name, "minari", 1, 0.0, tmp_path, filter_key="better")
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="changed since its first use"):
        get_demos(name, "minari", 1, 0.0, tmp_path)


def test_read_dataset_written_under_an_older_gymnasium(minari: ModuleType, tmp_path: Path) -> None:
    metadata = minari_dataset("door").with_name("metadata.json")
    spec = dict(
        id="AdroitHandDoor-v1", entry_point="gymnasium_robotics.envs.adroit_hand.adroit_door:AdroitHandDoorEnv",
        reward_threshold=None, nondeterministic=False, max_episode_steps=200, order_enforce=True, autoreset=False,
        disable_env_checker=False, apply_api_compatibility=False, kwargs={}, additional_wrappers=[],
        vector_entry_point=None,
    )  # fmt: skip
    text = json.loads(metadata.read_text()) | {"env_spec": json.dumps(spec), "minari_version": "0.5.0"}
    metadata.write_text(json.dumps(text))
    assert len(get_demos("door", "minari", 1, 0.0, tmp_path).obs) == 12


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("door", {"env": "AdroitHandHammer-v1"}, "it is of AdroitHandHammer-v1, not of AdroitHandDoorSparse-v1"),
        ("kitchen-complete", {"goals": ("kettle",)}, r"it has the goals \['kettle'\]"),
        ("door", {"spoil": np.nan}, "episode 0 holds NaN or infinity"),
    ],
)
def test_read_dataset_that_cannot_serve_is_a_user_error(
    name: str, changes: dict, words: str, minari: ModuleType, tmp_path: Path
) -> None:
    minari_dataset(name, **changes)
    with pytest.raises(UserError, match=words) as caught:
        get_demos(name, "minari", 1, 0.0, tmp_path)
    assert "\n" not in str(caught.value) and "delete it to download it again" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>"])
def test_read_dataset_damaged_is_a_user_error(content: bytes, minari: ModuleType, tmp_path: Path) -> None:
    minari_dataset("door").write_bytes(content)
    with pytest.raises(UserError, match=r"D4RL/door/expert-v2 cannot be read .*delete it to download it again"):
        get_demos("door", "minari", 1, 0.0, tmp_path)


def test_read_dataset_broken_bytes_are_one_line_or_a_sound_load(
    minari: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minari.huggingface_hub, "get_hf_file_metadata", lambda url: pytest.fail("asked the hub"))
    path = minari_dataset("door")
    for file in (path, path.with_name("metadata.json")):
        sound = file.read_bytes()
        for name, edit in BROKEN:
            if name in ("missing", "a folder") and file == path:
                continue  # it is downloaded
            path.with_name(path.name + ".sha256").unlink(missing_ok=True)
            edit(file)
            try:
                demos = get_demos("door", "minari", 1, 0.0, tmp_path)
            except UserError as error:
                assert "\n" not in str(error) and str(path.parent.parent) in str(error), name
            else:
                assert demos.obs.shape == (demos.ends[-1], 39) and np.isfinite(demos.obs).all(), name
            if file.is_dir():
                file.rmdir()
            file.write_bytes(sound)


def test_read_dataset_downloads_what_is_missing(
    minari: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(minari.huggingface_hub, "get_hf_file_metadata", asked.append)
    monkeypatch.setattr(
        minari.minari, "download_dataset", lambda name, force_download: asked.append(name) or minari_dataset("door")
    )
    for _ in range(2):
        assert len(get_demos("door", "minari", 1, 0.0, tmp_path).ends) == 2
    assert asked[0].endswith("/datasets/farama-minari/D4RL/resolve/main/door/expert-v2/data/metadata.json")
    assert asked[1:] == ["D4RL/door/expert-v2"]  # once


@pytest.mark.parametrize(
    ("name", "source", "dataset"),
    [("kitchen-mixed", "minari", "D4RL/kitchen/mixed-v2"), ("pen-dense", "minari-human", "D4RL/pen/human-v2")],
)
def test_read_dataset_without_network_names_the_command(
    name: str, source: str, dataset: str, minari: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(minari.huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(UserError, match=rf"cannot download {dataset} \(no network\); run `minari download {dataset}`"):
        get_demos(name, source, 1, 0.0, tmp_path)


def test_tasks_page_has_the_settings_that_are_used() -> None:
    done = run_script([str(ROOT / "benchmarks" / "tasks.py"), "settings"], check=0)
    assert done.stdout.count("\n") > 10 and done.stdout in (ROOT / "docs" / "tasks.md").read_text()
