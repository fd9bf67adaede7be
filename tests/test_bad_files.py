"""Files that are read, broken in every way at hand: one line that names the file, or a correct load, never a traceback.

Each generator yields (name, edit): `edit` breaks a sound file at its path.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import ogpo_state
from common.demos import get_demos
from common.demos.robomimic import read_demos, read_images
from common.envs import TASKS, Pixels, TaskSpec
from common.errors import UserError
from common.run import load_clone
from tests.helpers import small_agent
from tests.test_demos import LIFT, env_args, episodes
from tools.policy_file import load_policy
from tools.recording import write_demos
from variants import ogpo_diffusion

Edit = Callable[[Path], None]
PIXELS = Pixels(("agentview",), 16)


def one_line(error: UserError, *words: object) -> None:
    """The message is one line that names the words and says what to do."""
    assert "\n" not in str(error) and len(str(error)) < 600
    assert all(str(word) in str(error) for word in words), str(error)
    assert ";" in str(error) or ":" in str(error).removeprefix(str(words[0]))


# --- Bytes: any kind of file ------------------------------------------------------------------------------------------


def cut(share: float) -> Edit:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flipped(seed: int, bits: int) -> Edit:
    """Some bits of the file turned over; where, the seed says."""

    def edit(path: Path) -> None:
        content, draw = bytearray(path.read_bytes()), random.Random(seed)
        for _ in range(bits):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

    return edit


def broken_bytes() -> Iterator[tuple[str, Edit]]:
    for share in (0.0, 0.001, 0.1, 0.5, 0.9, 0.999):
        yield f"cut at {share}", cut(share)
    for seed in range(8):
        yield f"{4 << seed} bits flipped", flipped(seed, 4 << seed)
    yield "text", lambda path: path.write_text("<html>404</html>\n")
    yield "zeros", lambda path: path.write_bytes(bytes(4096))
    yield "a folder", lambda path: (path.unlink(), path.mkdir())
    yield "missing", lambda path: path.unlink()


BROKEN = list(broken_bytes())
IDS = [name for name, _ in BROKEN]


# --- Demonstrations ---------------------------------------------------------------------------------------------------


def edited(edit: Callable[[h5py.File], object]) -> Edit:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            edit(file)

    return apply


def instead(key: str, value: Any) -> Edit:
    """The file with another value, or nothing (None), at `key`."""

    def edit(file: h5py.File) -> None:
        if key in file:
            del file[key]
        if value is not None:
            file[key] = value

    return edited(edit)


def args(text: Any) -> Edit:
    return edited(lambda file: file["data"].attrs.__setitem__("env_args", text))


def controlled(config: Any, **more: Any) -> Edit:
    kwargs = {"controller_configs": config} | more
    return args(json.dumps({"env_name": "Lift", "env_version": "1.5.1", "env_kwargs": kwargs}))


def with_value(key: str, value: float) -> Edit:
    return edited(lambda file: file[key].__setitem__((0, 0), value))


OTHER = {"type": "OSC_POSE", "input_ref_frame": "base"}
BAD_DEMOS: dict[str, Edit] = {
    "no data": instead("data", None),
    "data is a dataset": instead("data", np.zeros(3)),
    "data is empty": edited(lambda file: [file["data"].__delitem__(f"demo_{i}") for i in range(3)]),
    "episodes by other names": edited(lambda file: [file.move(f"data/demo_{i}", f"data/ep_{i}") for i in range(3)]),
    "an episode is a dataset": instead("data/demo_1", np.zeros((3, 7))),
    "an episode is empty": edited(lambda file: file["data/demo_1"].clear()),
    "an episode leads nowhere": instead("data/demo_1", h5py.SoftLink("/gone")),
    "an episode is in a missing file": instead("data/demo_1", h5py.ExternalLink("gone.hdf5", "/")),
    "actions are a group": edited(
        lambda file: (file.__delitem__("data/demo_0/actions"), file.create_group("data/demo_0/actions"))
    ),
    "obs is a dataset": instead("data/demo_2/obs", np.zeros((3, 19))),
    "obs is empty": edited(lambda file: file["data/demo_2/obs"].clear()),
    "a key is missing": instead("data/demo_2/obs/object", None),
    **{
        f"{key} {what}": instead(f"data/demo_0/{key}", value)
        for key, width in (("actions", 7), ("obs/object", 10), ("obs/robot0_eef_pos", 3))
        for what, value in {
            "missing": None,
            "null": h5py.Empty("f4"),
            "scalar": 1.0,
            "flat": np.zeros(4 * width),
            "3-d": np.zeros((4, width, 1)),
            "narrow": np.zeros((4, width - 1)),
            "wide": np.zeros((4, width + 1)),
            "transposed": np.zeros((width, 4)),
            "short": np.zeros((3, width)),
            "long": np.zeros((5, width)),
            "without rows": np.zeros((0, width)),
            "bool": np.zeros((4, width), bool),
            "complex": np.zeros((4, width), complex),
            "bytes": np.zeros((4, width), "S3"),
            "text": np.full((4, width), "1.0", h5py.string_dtype()),
            "compound": np.zeros((4, width), [("x", "f4")]),
            "above float32": np.full((4, width), 1e300),
            "NaN": np.full((4, width), np.nan),
            "minus infinity": np.full((4, width), -np.inf),
        }.items()
    },
    "an action above the range": with_value("data/demo_2/actions", 1.5),
    "an action below the range": with_value("data/demo_2/actions", -40.0),
    "no env_args": edited(lambda file: file["data"].attrs.__delitem__("env_args")),
    **{
        f"env_args {text!r}": args(text)
        for text in ("", "?", "[]", "3", "null", '{"env_name": "Lift"}', '{"env_version": "1.5.1"}', 7, [1.0, 2.0])
    },
    "another task": args(env_args(TASKS["can"])),
    "an old version": args(env_args(version="1.4.1")),
    "a version without numbers": args(env_args(version="newest")),
    "env_kwargs no dictionary": args('{"env_name": "Lift", "env_version": "1.5.1", "env_kwargs": [1]}'),
    "another controller, parts by arm": controlled({"type": "BASIC", "body_parts": {"right": OTHER}}),
    "another controller, parts by kind": controlled({"type": "BASIC", "body_parts": {"arms": {"right": OTHER}}}),
    "another controller of the other arm": controlled({"type": "BASIC", "body_parts": {"arms": {"left": OTHER}}}),
    "another controller, as before 1.5": controlled(OTHER),
    "another controller, one for each robot": controlled([OTHER, OTHER]),
    "another composite controller": controlled({"type": "WHOLE_BODY_IK", "body_parts": {"right": {"kp": 150}}}),
    "other limits": controlled({"body_parts": {"right": {"output_max": [0.05] * 3}}}),
    "controllers as text": controlled("OSC_POSE"),
    "body parts as text": controlled({"body_parts": "right"}),
    "a part as text": controlled({"body_parts": {"arms": {"right": "OSC_POSE"}}}),
    "another robot": controlled({}, robots="Sawyer"),
}
BAD_MASKS: dict[str, Edit] = {
    "no masks": instead("mask", None),
    "masks are a dataset": instead("mask", np.zeros(3)),
    "no such mask": instead("mask/train", None),
    "absent episodes": instead("mask/train", np.array([b"demo_0", b"demo_77"])),
    "an episode by another name": instead("mask/train", np.array([b"demo_0_aug"])),
    "empty": instead("mask/train", np.array([], "S8")),
    "numbers": instead("mask/train", np.arange(3)),
    "null": instead("mask/train", h5py.Empty("S8")),
    "no text": instead("mask/train", np.array([b"\xff\xfe"])),
    "a group": edited(lambda file: (file.__delitem__("mask/train"), file.create_group("mask/train"))),
    "one name": instead("mask/train", b"demo_9"),
}


@pytest.fixture
def demos(tmp_path: Path) -> Path:
    write_demos(tmp_path / "lift.hdf5", episodes(), env_args())
    return tmp_path / "lift.hdf5"


@pytest.mark.parametrize("name", BAD_DEMOS)
def test_read_demos_bad_file_is_one_line(demos: Path, name: str) -> None:
    BAD_DEMOS[name](demos)
    with pytest.raises(UserError) as caught:
        read_demos(demos, LIFT)
    one_line(caught.value, demos)


@pytest.mark.parametrize("name", BAD_MASKS)
def test_read_demos_bad_mask_is_one_line(demos: Path, name: str) -> None:
    BAD_MASKS[name](demos)
    with pytest.raises(UserError) as caught:
        read_demos(demos, LIFT, "train")
    one_line(caught.value, demos, "mask 'train'")


@pytest.mark.parametrize(("name", "edit"), BROKEN, ids=IDS)
def test_read_demos_broken_bytes_are_one_line_or_a_sound_load(demos: Path, name: str, edit: Edit) -> None:
    edit(demos)
    try:
        obs, actions, ends = read_demos(demos, LIFT)
    except UserError as error:
        one_line(error, demos)
    else:
        assert obs.shape == (ends[-1], 19) and actions.shape == (ends[-1], 7)
        assert np.isfinite(obs).all() and np.abs(actions).max() < 1


@pytest.mark.parametrize("value", [None, h5py.Empty("u1"), np.zeros((4, 16, 16, 3)), np.zeros((4, 9, 9, 3), np.uint8)])
def test_read_images_bad_images_are_one_line(demos: Path, value: Any) -> None:
    for i, length in enumerate((4, 7, 3)):
        instead(f"data/demo_{i}/obs/agentview_image", np.zeros((length, 16, 16, 3), np.uint8))(demos)
    assert read_images(demos, PIXELS).shape == (14, 1, 16, 16, 3)
    instead("data/demo_0/obs/agentview_image", value)(demos)
    with pytest.raises(UserError) as caught:
        read_images(demos, PIXELS)
    one_line(caught.value, demos, "demo_0")


@pytest.mark.parametrize("value", [b"<mujoco/>", np.zeros(3), b"\xff"])
def test_drawn_file_bad_model_is_one_line(demos: Path, tmp_path: Path, value: Any) -> None:
    edited(lambda file: file["data/demo_0"].attrs.__setitem__("model_file", value))(demos)
    with pytest.raises(UserError) as caught:
        get_demos("lift", str(demos), 1, 0.0, tmp_path / "data", pixels=PIXELS)
    one_line(caught.value, demos, "demo_0")


# --- A user's own environment -----------------------------------------------------------------------------------------

OWN = TaskSpec("package:Env-v0", "gymnasium", "package:Env-v0")


def own_file(path: Path, *obs: dict[str, int] | int, actions: np.ndarray | None = None) -> Path:
    """Episodes of 3 steps with obs/<key> of the given widths, or with obs itself of the given width."""
    with h5py.File(path, "w") as file:
        for i, widths in enumerate(obs):
            file[f"data/demo_{i}/actions"] = np.zeros((3, 2)) if actions is None else actions
            for key, width in widths.items() if isinstance(widths, dict) else [("", widths)]:
                file[f"data/demo_{i}/obs/{key}".rstrip("/")] = np.full((3, width), float(width))
    return path


def test_read_demos_own_observations_are_the_same_in_every_episode(tmp_path: Path) -> None:
    assert read_demos(own_file(tmp_path / "a.hdf5", {"b": 2, "a": 1}, {"a": 1, "b": 2}), OWN)[0][0].tolist() == [
        1,
        2,
        2,
    ]
    for k, (first, second, word) in enumerate(
        [
            ({"a": 1, "b": 2}, {"a": 2, "b": 1}, "obs/a"),  # as wide together, columns swapped
            ({"a": 1, "b": 2}, {"a": 1, "c": 2}, "obs/c"),
            ({"a": 1, "b": 2}, {"a": 1}, "obs/b"),
            ({"a": 1}, {"a": 1, "b": 2}, "obs/b"),
            ({"a": 3}, 3, "obs/a"),
            (3, {"a": 3}, "obs/a"),
            (3, 2, "obs"),
        ]
    ):
        with pytest.raises(UserError) as caught:
            read_demos(own_file(tmp_path / f"{k}.hdf5", first, second), OWN)
        one_line(caught.value, tmp_path, "demo_1", word)


@pytest.mark.parametrize(
    ("low", "high", "given", "read", "said"),
    [
        (-2.0, 2.0, [1.5, -2.0], [0.75, -1.0], "own units, and rescaled"),  # cannot be in [-1, 1]
        (-2.0, 2.0, [0.5, -1.0], [0.5, -1.0], "in [-1, 1], not in"),  # may be either
        (-0.1, 0.1, [0.05, -0.1], [0.5, -1.0], "own units, and rescaled"),  # nobody uses a tenth of the range
        (-0.1, 0.1, [0.5, -0.1], [0.5, -0.1], ""),  # cannot be in its own units
        (0.0, 10.0, [2.5, 10.0], [-0.5, 1.0], "own units, and rescaled"),
        (0.0, 1.0, [0.25, 0.0], [-0.5, -1.0], "own units, and rescaled"),
        (-1.0, 1.0, [0.25, -1.0], [0.25, -1.0], ""),
    ],
)
def test_read_demos_own_units_of_actions_are_told_by_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], low: float, high: float, given: list, read: list, said: str
) -> None:
    path = own_file(tmp_path / "own.hdf5", 1, actions=np.array([given] * 3))
    box = np.full(2, low, np.float32), np.full(2, high, np.float32)
    np.testing.assert_allclose(read_demos(path, OWN, box=box)[1][0], read, atol=2e-5)
    notes = capsys.readouterr().err
    assert notes.count("\n") == bool(said) and said in notes


def test_read_demos_own_actions_in_no_range_are_one_line(tmp_path: Path) -> None:
    path = own_file(tmp_path / "own.hdf5", 1, actions=np.full((3, 2), 3.0))
    with pytest.raises(
        UserError, match=r"demo_0: actions reach 3; .* in the environment's own units, -2 to 2"
    ) as caught:
        read_demos(path, OWN, box=(np.full(2, -2), np.full(2, 2)))
    one_line(caught.value, path)


def test_get_demos_of_an_own_environment_knows_its_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_file(tmp_path / "own.hdf5", 3, actions=np.full((3, 2), 1.0))
    get_demos("benchmarks.dense_toy:DenseToy-v0", str(path), 1, 0.0, tmp_path)  # acts in [-1, 1]
    assert not capsys.readouterr().err
    saved()(tmp_path / "p.npz")
    with pytest.raises(UserError, match=r"only built-in tasks roll out a policy; record it with python -m"):
        get_demos("benchmarks.dense_toy:DenseToy-v0", str(tmp_path / "p.npz"), 1, 0.0, tmp_path)


def test_read_demos_names_the_groups_it_leaves_out(demos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited(lambda file: [file.copy("data/demo_1", f"data/{name}") for name in ("demo_6_aug", "backup")])(demos)
    assert len(read_demos(demos, LIFT)[2]) == 3
    assert capsys.readouterr().err.splitlines() == [
        f"note: {demos}: backup, demo_6_aug left out: episodes are called demo_<number>"
    ]


# --- Policies in .npz -------------------------------------------------------------------------------------------------

# Other arrays are left alone: trained policies bring log_std.
SOUND = {"w0": (8, 6), "b0": (8,), "w1": (2, 8), "b1": (2,), "in_shift": (6,), "out_scale": (2,)}
EXTRA = {"log_std": np.ones(2)}


def saved(**changes: Any) -> Edit:
    """A policy for the toy task with other arrays, or without some (None)."""
    arrays = {key: np.ones(shape) for key, shape in SOUND.items()} | EXTRA | changes
    kept = {key: value for key, value in arrays.items() if value is not None}
    return lambda path: np.savez(path, **kept)


BAD_POLICIES: dict[str, Edit] = {
    **{f"no {key}": saved(**{key: None}) for key in ("w0", "b0", "w1", "b1")},
    **{
        f"{key} {what}": saved(**{key: value(np.ones(shape))})
        for key, shape in SOUND.items()
        for what, value in {
            "scalar": lambda x: np.float64(1),
            "empty": lambda x: np.zeros(0),
            "one longer": lambda x: np.ones((len(x) + 1, *x.shape[1:])),
            "3-d": lambda x: x.reshape(1, 1, -1),
            "NaN": lambda x: x * np.nan,
            "complex": lambda x: x * 1j,
            "text": lambda x: x.astype("U3"),
            "objects": lambda x: x.astype(object),
        }.items()
    },
    "an unknown array": saved(w3=np.ones((2, 2))),
    "nothing": lambda path: np.savez(path),
    "one array": lambda path: np.save(path.open("wb"), np.ones(3)),
}


def test_load_policy_sound_file_acts(tmp_path: Path) -> None:
    saved()(tmp_path / "p.npz")
    action = next(load_policy(tmp_path / "p.npz", TASKS["toy"])(None, np.zeros(6), np.random.default_rng(0), 0.0))
    assert action.shape == (2,) and action.dtype == np.float32


@pytest.mark.parametrize("name", BAD_POLICIES)
def test_load_policy_bad_file_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.npz"
    BAD_POLICIES[name](path)
    with pytest.raises(UserError) as caught:
        load_policy(path, TASKS["toy"])
    one_line(caught.value, path)


@pytest.mark.parametrize(("name", "edit"), BROKEN, ids=IDS)
def test_load_policy_broken_bytes_are_one_line_or_a_sound_load(tmp_path: Path, name: str, edit: Edit) -> None:
    path = tmp_path / "p.npz"
    saved()(path)
    edit(path)
    try:
        expert = load_policy(path, TASKS["toy"])
    except UserError as error:
        one_line(error, path)
    else:
        assert np.abs(next(expert(None, np.zeros(6), np.random.default_rng(0), 0.0))).max() <= 1


# --- Cloned policies --------------------------------------------------------------------------------------------------


def clone_of(**changes: Any) -> Edit:
    return lambda path: torch.save(torch.nn.Linear(3, 2).state_dict() | changes, path)


BAD_CLONES: dict[str, Edit] = {
    "another size": clone_of(weight=torch.ones(2, 4)),
    "another kind": clone_of(scale=torch.ones(2)),
    "a part missing": lambda path: torch.save({"weight": torch.ones(2, 3)}, path),
    "NaN": clone_of(bias=torch.full((2,), torch.nan)),
    "numbers for tensors": clone_of(bias=3.0),
    "a list": lambda path: torch.save([1, 2], path),
    "one tensor": lambda path: torch.save(torch.ones(3), path),
    "a checkpoint": lambda path: torch.save({"args": {}, "step": 0, "agent": {}}, path),
    "code": lambda path: torch.save(SimpleNamespace(), path),
}


@pytest.mark.parametrize("name", BAD_CLONES)
def test_load_clone_bad_file_is_one_line(tmp_path: Path, name: str) -> None:
    BAD_CLONES[name](tmp_path / "cloned.pt")
    with pytest.raises(UserError) as caught:
        load_clone(tmp_path, torch.nn.Linear(3, 2), {"env": "lift"})
    one_line(caught.value, tmp_path / "cloned.pt")


@pytest.mark.parametrize(("name", "edit"), BROKEN, ids=IDS)
def test_load_clone_broken_bytes_are_one_line_or_a_sound_load(tmp_path: Path, name: str, edit: Edit) -> None:
    path, net = tmp_path / "cloned.pt", torch.nn.Linear(3, 2)
    clone_of()(path)
    sound = torch.load(path)
    edit(path)
    try:
        found = load_clone(tmp_path, net, {"env": "lift"})
    except UserError as error:
        one_line(error, tmp_path, path.name)
    else:
        assert all(torch.equal(found[key], sound[key]) for key in sound)


@pytest.mark.parametrize(
    "args", [{"env": "can"}, {"env": ""}, {"env": 3}, {}, [], None, {"env": "lift", "cameras": "x"}]
)
def test_load_clone_is_of_the_same_task_and_cameras(tmp_path: Path, args: Any) -> None:
    clone_of()(tmp_path / "cloned.pt")
    here = {"env": "lift", "cameras": ("agentview",)}
    for env in ("lift", "lift-dense"):
        (tmp_path / "args.json").write_text(json.dumps({"args": here | {"env": env}}))
        assert load_clone(tmp_path, torch.nn.Linear(3, 2), here).keys() == {"weight", "bias"}
    (tmp_path / "args.json").write_text("?" if args is None else json.dumps({"args": args}))
    with pytest.raises(UserError) as caught:
        load_clone(tmp_path, torch.nn.Linear(3, 2), here)
    one_line(caught.value, tmp_path)


def test_load_clone_takes_no_diffusion_for_a_flow(tmp_path: Path) -> None:
    flow, diffusion = (small_agent(module)[0].actor for module in (ogpo_state, ogpo_diffusion))
    for one, other in ((flow, diffusion), (diffusion, flow)):
        torch.save(one.state_dict(), tmp_path / "cloned.pt")
        assert load_clone(tmp_path, one, {}).keys() == one.state_dict().keys()
        with pytest.raises(UserError, match=r"cloned.pt does not fit: ddpm_steps is .*; give a run of the same script"):
            load_clone(tmp_path, other, {})
