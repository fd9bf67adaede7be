"""A user's own environment: observations of several parts, any box of actions, its own cap, and where its module is."""

from collections import OrderedDict
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, Graph, Tuple
from gymnasium.spaces import Dict as Parts

import ogpo_state
from common import cli
from common.demos import get_demos, save_demos
from common.envs import gymnasium_env, make_env, make_vec_env, own_horizon
from common.errors import UserError
from settings import ogpo
from tests.helpers import TINY, folders
from tests.warm import run_script

ROOT = Path(__file__).resolve().parent.parent
MODULE = '''
import gymnasium as gym
import numpy as np

class Mine(gym.Env):
    """Walks to the goal; says so by is_success alone."""
    observation_space = gym.spaces.Dict({"place": gym.spaces.Box(-9, 9, (2,)), "goal": gym.spaces.Box(-9, 9, (1,))})
    action_space = gym.spaces.Box(0, 5, (2,))
    def see(self):
        return {"place": np.array([self.x, 0.0], np.float32), "goal": np.array([self.goal], np.float32)}
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.goal = 0.0, float(self.np_random.choice([-1.0, 1.0]))
        return self.see(), {}
    def step(self, action):
        assert self.action_space.contains(action), action
        self.x += 0.1 * (action[0] - 2.5)
        return self.see(), 0.0, False, False, {"is_success": bool(abs(self.x - self.goal) < 0.15)}

def act(obs, env):
    return [np.clip(5 * (obs[0] - obs[1]), -1, 1), 0.0]

gym.register("Mine-v0", Mine, max_episode_steps=12)
'''


class Some(gym.Env):
    """Observes and acts in what it is given; keeps the last action."""

    def __init__(self, observes: gym.Space, acts: gym.Space) -> None:
        self.observation_space, self.action_space = observes, acts
        self.observation_space.seed(0)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[object, dict]:
        self.first = self.observation_space.sample()
        return self.first, {}

    def step(self, action: np.ndarray) -> tuple[object, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.last = action
        return self.first, 0.0, False, False, {"is_success": np.True_}


PLACE, GOAL, IMAGE = Box(-9, 9, (2,)), Box(-9, 9, (1,)), Box(0, 255, (8, 8, 3), np.uint8)
UNIT = Box(-1, 1, (2,))
KINDS = {
    "Dict": (Parts({"place": PLACE, "goal": GOAL}), UNIT),
    "Ordered": (Parts(OrderedDict(place=PLACE, goal=GOAL)), UNIT),
    "Nested": (Parts({"b": Parts({"y": GOAL, "x": PLACE}), "a": Discrete(3)}), UNIT),
    "Tuple": (Tuple((PLACE, GOAL)), UNIT),
    "Matrix": (Box(-9, 9, (3, 2)), UNIT),
    "Image": (Parts({"place": PLACE, "eye": IMAGE}), UNIT),
    "Graph": (Parts({"place": PLACE, "graph": Graph(GOAL, None)}), UNIT),
    "Boxes": (PLACE, Box(np.array([[0, -3], [-0.3, 100]]), np.array([[5, 0.1], [0.7, 102]]), dtype=np.float64)),
    "Single": (PLACE, Box(0.1, 0.7, (2,), np.float32)),
    "Integers": (PLACE, Box(0, 5, (2,), np.int32)),
    "Fixed": (PLACE, Box(np.array([0.0, 1.0], np.float32), np.array([1.0, 1.0], np.float32))),
}  # fmt: skip
for kind, (observes, acts) in KINDS.items():
    kwargs = dict(observes=observes, acts=acts)
    gym.register(f"Some{kind}-v0", Some, max_episode_steps=7, kwargs=kwargs, disable_env_checker=True)


@pytest.fixture(autouse=True)
def afresh() -> None:
    gymnasium_env._say_once.cache_clear()


def made(kind: str, horizon: int | None = None) -> gym.Env:
    return make_env(f"{__name__}:Some{kind}-v0", horizon=horizon)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Dict", "goal (1), place (2)"),
        ("Ordered", "goal (1), place (2)"),  # as the parts of files of demonstrations are read
        ("Nested", "a (3), b (3)"),
        ("Tuple", "0 (2), 1 (1)"),
        ("Matrix", "all (6)"),
    ],
)
def test_user_env_flattens_parts_in_the_order_that_a_note_tells(
    kind: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    env = made(kind)
    made(kind)
    want = f"note: {__name__}:Some{kind}-v0: an observation is {said}, flattened\n"
    assert capsys.readouterr().err == want  # once
    obs, _ = env.reset(seed=0)
    first = env.unwrapped.first
    parts = {
        "Dict": lambda: (first["goal"], first["place"]),
        "Ordered": lambda: (first["goal"], first["place"]),
        "Nested": lambda: (np.eye(3)[first["a"]], first["b"]["x"], first["b"]["y"]),
        "Tuple": lambda: first,
        "Matrix": lambda: (first.ravel(),),
    }[kind]()
    np.testing.assert_array_equal(obs, np.concatenate(parts).astype(np.float32))
    assert env.observation_space.contains(obs) and env.observation_space.contains(env.step(np.zeros(2))[0])


@pytest.mark.parametrize("kind", ["Boxes", "Single"])
def test_user_env_any_finite_box_is_reached_to_its_ends(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    env, box = made(kind), KINDS[kind][1]
    env.reset(seed=0)
    n = env.action_space.shape[0]
    assert n == box.low.size and not capsys.readouterr().err
    for action, want in ((-1, box.low), (1, box.high), (0, (box.low + box.high) / 2)):
        *_, info = env.step(np.full(n, action, np.float32))
        np.testing.assert_allclose(env.unwrapped.last, want, rtol=1e-6)
        assert info == {"success": True}  # of is_success
    assert [bound.shape for bound in env.get_wrapper_attr("action_bounds")] == [(n,), (n,)]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Image", r"observes Box\(0, 255, \(8, 8, 3\), uint8\) as eye; .* no images: leave it out, with .*Filter"),
        ("Graph", r"observes Graph\(.* as graph; numbers .* are needed"),
        ("Integers", r"acts in Box\(0, 5, \(2,\), int32\); a Box of floats with finite bounds, low < high, is needed"),
        ("Fixed", "a Box of floats with finite bounds, low < high, is needed"),
    ],
)
def test_user_env_that_cannot_serve_is_one_line(kind: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        made(kind)
    assert "\n" not in str(caught.value)


def test_user_env_cap_is_its_own_unless_a_flag_says_otherwise(here: Path) -> None:
    """A longer one too: what the id is registered with no longer cuts."""
    name = "capped_mine:Mine-v0"
    assert own_horizon(name) == 12
    for horizon, cap in ((None, 12), (5, 5), (30, 30)):
        env = make_env(name, horizon=horizon)
        env.reset(seed=0)
        steps = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(cap)]
        assert steps == [(False, False)] * (cap - 1) + [(False, True)]
    flat = cli.flatten(ogpo_state.default_args(name)) | dict(chunk=20, horizon=30)
    ogpo.check(flat)
    with pytest.raises(UserError, match="an episode of 12 steps"):
        ogpo.check(flat | dict(horizon=12))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's with modules, the current one and not on the path. What is imported from it is forgotten."""
    for name in ("mine", "capped_mine", "vector_mine"):
        (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # restores the path, to which the folder is added
    return tmp_path


def test_make_vec_env_finds_the_module_of_the_current_folder(here: Path) -> None:
    envs = make_vec_env("vector_mine:Mine-v0", 2)
    try:
        assert envs.reset(seed=[0, 1])[0].shape == (2, 3)
    finally:
        envs.close()


def test_read_demos_parts_of_a_dict_come_in_the_order_of_the_environment(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File("mine.hdf5", "w") as file:
        file["data/demo_0/obs/place"] = np.tile([1.0, 2.0], (3, 1))
        file["data/demo_0/obs/goal"] = np.full((3, 1), 9.0)
        file["data/demo_0/actions"] = np.full((3, 2), 5.0)
    demos = get_demos("capped_mine:Mine-v0", "mine.hdf5", 1, 0.0, here)
    assert demos.obs[0].tolist() == [9.0, 1.0, 2.0]
    np.testing.assert_allclose(demos.actions, 1.0, atol=2e-5)
    assert "own units, and rescaled" in capsys.readouterr().err


def test_main_clones_in_an_own_environment_from_another_folder(here: Path) -> None:
    """A module that no path names, a Dict, actions in [0, 5], is_success, and demonstrations above the cap."""
    name, steps = "mine:Mine-v0", np.arange(8.0)
    save_demos("mine.npz", [
        (np.stack([np.full(8, goal), 0.15 * goal * steps, 0 * steps], 1), np.tile([2.5 + 1.5 * goal, 2.5], (8, 1)))
        for goal in (-1.0, 1.0, -1.0)
    ], units="environment")  # fmt: skip
    flags = [*TINY, "--env", name, "--demos", "mine.npz", "--horizon", "7", "--bc-steps", "2", "--bc-eval-every", "2"]
    flags += ["--total-steps", "0", "--start-training", "0", *folders(here, "run")]
    done = run_script([str(ROOT / "ogpo_state.py"), *flags, "--eval-envs", "1"], here, 0)
    assert done.stderr.count(f"note: {name}: an observation is goal (1), place (2), flattened") == 1
    assert "3 of the 3 demonstrations are longer than an episode may be, 8 steps of 7: raise --horizon" in done.stderr
    assert "taken to be" not in done.stderr and "over 4 episodes" in done.stdout
