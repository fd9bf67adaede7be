"""Meta-World, Adroit and Kitchen: the contract of every environment, and demonstrations without and with a network."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from common import doctor
from common.demos import get_demos, minari
from common.envs import TASKS, make_env
from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("metaworld", "adroit", "kitchen")
NAMES = [name for name, task in TASKS.items() if task.suite in SUITES]


@pytest.mark.parametrize("name", NAMES)
def test_episode_is_a_function_of_the_seed(name: str) -> None:
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


def test_every_part_of_mt10_repeats_and_is_told() -> None:
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
def test_success_ends_and_the_horizon_truncates(name: str, tmp_path: Path) -> None:
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


def test_sparse_and_dense_adroit_rewards() -> None:
    sparse, dense = make_env("door"), make_env("door-dense")
    for env in (sparse, dense):
        env.reset(seed=1)
    action = np.zeros(28, np.float32)
    assert sparse.step(action)[1] == 0.0 and dense.step(action)[1] != 0.0
    for env in (sparse, dense):  # the door opened by hand
        hinge = env.unwrapped.door_hinge_addrs
        env.unwrapped.data.qpos[hinge] = 1.5
    _, reward, terminated, truncated, info = sparse.step(action)
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"success": True})
    _, reward, terminated, truncated, info = dense.step(action)
    assert reward > 15 and (terminated, truncated, info) == (False, False, {"success": True})


def test_kitchen_succeeds_when_all_goals_are_met() -> None:
    env = make_env("kitchen-partial")
    env.reset(seed=1)
    core = env.unwrapped
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


def test_mujoco_renders_every_suite() -> None:
    for name in ("peg-insert-side", "door", "kitchen-complete"):
        env = make_env(name, render=True)
        env.reset(seed=1)
        try:
            image = env.render()
        except UserError as error:
            pytest.skip(str(error))
        assert image.shape == (256, 256, 3) and image.dtype == np.uint8 and image.std() > 10, name
        env.close()


# --- docs -------------------------------------------------------------------------------------------------------------


def test_docs_name_every_task_and_their_own_task_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "tasks.md").read_text()
    for name in TASKS:
        assert f"`{name}`" in text or f"`{'-' + name.partition('-')[2]}`" in text or name.endswith("-dense"), name
    (tmp_path / "my_tasks.py").write_text(text.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    env = make_env("my_tasks:Line-v0")
    (x, goal), _ = env.reset(seed=3)
    steps = [env.step(np.array([goal], np.float32)) for _ in range(5)]
    assert x == 0 and [step[2] for step in steps] == [False] * 4 + [True] and steps[-1][4] == {"success": True}


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_finds_a_broken_package(tmp_path: Path) -> None:
    (tmp_path / "gymnasium_robotics.py").write_text("raise ImportError('no such assets')")
    works, line = doctor.attempt(doctor.STEP.format(task="door"), PYTHONPATH=str(tmp_path))
    assert not works and "no such assets" in line and "pip install gymnasium-robotics==1.4.2" in line
    assert doctor.attempt(doctor.STEP.format(task="door")) == (True, "39 28")


def test_doctor_names_a_remedy_for_what_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
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


def test_policy_file_acts_as_its_formula(tmp_path: Path) -> None:
    from common.demos.policy_file import load_policy

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
def test_unfit_policy_file_is_a_user_error(tmp_path: Path, changes: dict, words: str) -> None:
    path = save_policy(tmp_path / "p.npz", 39, 28, **changes)
    with pytest.raises(UserError, match=words):
        get_demos("door", str(path), 1, 0.0, tmp_path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        get_demos("door", str(path), 1, 0.0, tmp_path)


def test_no_expert_says_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"door has no scripted expert; name a trained policy with --demos POLICY\.npz"):
        get_demos("door", "scripted", 1, 0.0, tmp_path)
    with pytest.raises(UserError, match="kitchen-mixed has no scripted expert"):
        get_demos("kitchen-mixed", "scripted", 1, 0.0, tmp_path)


@pytest.mark.parametrize("name", ["door", "hammer", "pen", "relocate"])
def test_trained_adroit_policies_are_demonstrators(name: str, tmp_path: Path) -> None:
    path = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "adroit" / f"pol_{name}.npz"
    if not path.exists():
        pytest.skip("no trained policies here")
    demos = get_demos(name, str(path), 2, 0.0, tmp_path)
    assert len(demos.ends) == 2 and demos.name.startswith(f"{name}_pol_{name}-")


def minari_dataset(root: Path, name: str, changes: dict | None = None) -> Path:
    """A data set of two episodes, 5 and 7 steps, in Minari's schema."""
    task, rng = TASKS[name], np.random.default_rng(0)
    folder = minari_folder(root, name)
    (folder / "data").mkdir(parents=True)
    spec = dict(
        id=task.env_name.replace("Sparse", ""), kwargs={"tasks_to_complete": list(task.goals)} if task.goals else {}
    )
    (folder / "data" / "metadata.json").write_text(json.dumps({"env_spec": json.dumps(spec | (changes or {}))}))
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for i, length in enumerate((5, 7)):
            episode = file.create_group(f"episode_{i}")
            episode["actions"] = rng.uniform(-1, 1, (length, task.action_dim))
            if task.suite == "adroit":
                episode["observations"] = rng.normal(size=(length + 1, task.obs[0][1]))
                continue
            episode["observations/observation"] = rng.normal(size=(length + 1, 59))
            for kind in ("achieved_goal", "desired_goal"):
                for part, width in {"microwave": 1, "kettle": 7, "light switch": 2, "slide cabinet": 1}.items():
                    episode[f"observations/{kind}/{part}"] = np.full((length + 1, width), float(len(part)))
    return folder


def minari_folder(root: Path, name: str) -> Path:
    task = TASKS[name]
    return root / "D4RL" / name.removeprefix("kitchen-").replace(task.datasets[0], "kitchen") / f"{task.datasets[0]}-v2"


@pytest.mark.parametrize("name", ["door", "kitchen-complete"])
def test_minari_data_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    folder = minari_dataset(tmp_path, name)
    demos = get_demos(name, "minari", 1, 0.0, tmp_path / "cache")
    assert demos.ends.tolist() == [5, 12] and demos.obs.shape == (12, sum(width for _, width in TASKS[name].obs))
    with h5py.File(folder / "data" / "main_data.hdf5") as file:
        raw = file["episode_1/observations"]
        raw = raw["observation"][()] if name != "door" else raw[()]
        np.testing.assert_array_equal(demos.obs[5:, : raw.shape[1]], raw[:-1].astype(np.float32))
    if name != "door":  # kettle, light switch, microwave, slide cabinet: sorted, as the environment has them
        assert demos.obs[0, 59:70].tolist() == [6.0] * 7 + [12.0] * 2 + [9.0] + [13.0]
    with pytest.raises(UserError, match="--filter-key better"):
        get_demos(name, "minari", 1, 0.0, tmp_path / "cache", filter_key="better")
    with open(folder / "data" / "main_data.hdf5", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="changed since its first use"):
        get_demos(name, "minari", 1, 0.0, tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": "AdroitHandPen-v1"}, "is of AdroitHandPen-v1, not of FrankaKitchen-v1"),
        ({"kwargs": {"tasks_to_complete": ["kettle"]}}, r"has the goals \['kettle'\]"),
    ],
)
def test_minari_data_of_another_environment_are_refused(
    changes: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    minari_dataset(tmp_path, "kitchen-complete", changes)
    with pytest.raises(UserError, match=words):
        get_demos("kitchen-complete", "minari", 1, 0.0, tmp_path)


def test_missing_minari_data_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"pip install .*minari.*minari download D4RL/kitchen/mixed-v2"):
        get_demos("kitchen-mixed", "minari", 1, 0.0, tmp_path)
    with pytest.raises(UserError, match="minari download D4RL/pen/human-v2"):
        get_demos("pen-dense", "minari-human", 1, 0.0, tmp_path)
    with pytest.raises(UserError, match="door has minari-expert, minari-human, minari-cloned"):
        minari.find_dataset(TASKS["door"], "best")
    with pytest.raises(UserError, match="Minari has no data set for lift"):
        get_demos("lift", "minari", 1, 0.0, tmp_path)


def test_the_docs_have_the_settings_that_are_used() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tasks.py"), "settings"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") > 10 and done.stdout in (ROOT / "docs" / "tasks.md").read_text()


@pytest.mark.parametrize(
    ("file", "head", "lines", "pages"),
    [
        ("tasks/results.md", "| task | aim", 10, ("README.md", "docs/tasks.md")),
        ("pixels/results.md", "| task | seed", 1, ("docs/ogpo_pixels.md",)),
        ("study/results.md", "| claim", 5, ("docs/ogpo_study.md",)),
        ("study/diagnostics.md", "| run", 5, ("docs/ogpo_study.md",)),
        ("study/diagnostics.md", "| first updates", 3, ("docs/ogpo_study.md",)),
    ],
)
def test_the_docs_have_the_results_that_are_stored(file: str, head: str, lines: int, pages: tuple[str, ...]) -> None:
    stored = (ROOT / "benchmarks" / file).read_text()
    table = stored[stored.index(head) :].split("\n\n")[0].rstrip()
    assert table.count("\n") > lines
    for page in pages:
        assert table in (ROOT / page).read_text()
