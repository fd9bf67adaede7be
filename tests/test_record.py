"""args.json: whose run it is, its arguments and their changes; folders that no two runs share."""

import importlib.util
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import flm_train
import fmlm_distill
import ogpo_pixels
import ogpo_state
from common import checkpoint, record
from common.errors import UserError
from common.tracked_run import VERSION

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = (ogpo_state.VelocityNet, ogpo_state.CriticEnsemble)
FLOW = (flm_train.DiT, flm_train.Clock, flm_train.EmbeddingSpace, flm_train.OneHotSpace, flm_train.interpolant)
TOY_TEXT = ["--data", "toy", "--threads", "1", "--total-steps", "4", "--eval-every", "4", "--samples", "8"]


def changed_copy(path: Path, script: str, old: str, new: str) -> ModuleType:
    """The module of a copy of a script with other text in it."""
    text = (ROOT / f"{script}.py").read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reserve_tells_how_to_repeat_the_run(tmp_path: Path) -> None:
    folder = record.reserve(tmp_path, "a", False, WEIGHTS, {"seed": 3, "path": Path("a/b"), "lr": 1e-3})
    kept = record.read(folder)
    assert kept["args"] == {"seed": 3, "path": "a/b", "lr": 1e-3}
    assert kept["script"] == "ogpo_state.py" and kept["definitions"] == record.definitions(WEIGHTS)
    assert {"python", "torch", "numpy", "mujoco", "gymnasium"} <= kept["versions"].keys()
    assert kept["versions"]["numpy"] == np.__version__
    assert kept["argv"] == sys.argv and kept["cpu"] and {"git", "gpu", "started"} <= kept.keys()


@pytest.mark.parametrize("numbered", [True, False])
def test_reserve_gives_a_folder_to_one_of_many(numbered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "definitions", lambda _: {})
    monkeypatch.setattr(record, "describe_machine", dict)
    verdict = record._abandoned
    monkeypatch.setattr(record, "_abandoned", lambda path: (verdict(path), time.sleep(0.2))[0])  # time for a race
    context = multiprocessing.get_context("fork")
    begin, got = context.Barrier(8), context.SimpleQueue()

    def take() -> None:
        begin.wait()
        try:
            got.put(record.reserve(tmp_path, "a", numbered, WEIGHTS, {}).name)
        except UserError:
            got.put("")
        begin.wait()  # none has ended while another looks for it

    many = [context.Process(target=take) for _ in range(8)]
    for process in many:
        process.start()
    for process in many:
        process.join()
    names = sorted(filter(None, (got.get() for _ in many)))
    assert names == (["a", *(f"a-{n}" for n in range(2, 9))] if numbered else ["a"])


def test_reserve_refuses_what_is_in_use_and_takes_what_was_abandoned(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        folder = record.reserve(tmp_path, "run", False, WEIGHTS, {"seed": 1})
        kept = record.read(folder)
        (folder / "args.json").write_text(json.dumps(kept | {"pid": other.pid}))
        for name in ("file", "notes", "run"):
            with pytest.raises(UserError, match="already exists; choose another --run-name, or remove it"):
                record.reserve(tmp_path, name, False, WEIGHTS, {})
        other.communicate(b"\n")
    for name in ("metrics.jsonl", "cloned.pt", "cloned.pt.tmp", "before.mp4", "checkpoint.pt.tmp"):  # killed early
        (folder / name).write_text("")
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "cloned.pt").write_text("")  # of no run: somebody keeps it there
    with pytest.raises(UserError, match="already exists"):
        record.reserve(tmp_path, "clone", False, WEIGHTS, {})
    record.reserve(tmp_path, "run", False, WEIGHTS, {"seed": 2})  # its process has ended and left no checkpoint
    assert record.read(folder)["args"] == {"seed": 2}
    (folder / "checkpoint.pt").write_text("")
    with pytest.raises(UserError, match=f"already exists; .* --resume {folder}"):
        record.reserve(tmp_path, "run", False, WEIGHTS, {})
    with pytest.raises(UserError, match="cannot make the run folder"):
        record.reserve(tmp_path, "x" * 300, False, WEIGHTS, {})


def test_add_changes_keeps_the_first_arguments(tmp_path: Path) -> None:
    folder = record.reserve(tmp_path, "a", False, WEIGHTS, {"lr": 1e-3, "hidden": (2, 3), "resume": ""})
    record.add_changes(folder, 5, {"lr": 1e-3, "hidden": [2, 3]}, {"lr": 1e-3, "hidden": (2, 3), "resume": "a"})
    assert "changes" not in record.read(folder)
    record.add_changes(folder, 5, {"lr": 1e-3}, {"lr": 1e-4})
    record.add_changes(folder, 9, {"lr": 1e-4}, {"lr": 1e-5})
    kept = record.read(folder)
    assert kept["args"]["lr"] == 1e-3
    assert kept["changes"] == [{"from_step": 5, "args": {"lr": 1e-4}}, {"from_step": 9, "args": {"lr": 1e-5}}]


def test_definitions_are_of_the_code_and_of_what_it_uses(tmp_path: Path) -> None:
    whole = record.definitions(FLOW)
    assert {"DiT", "Block", "attention", "rotate", "Clock", "EmbeddingSpace", "GramNoise"} <= whole.keys()
    assert record.definitions(fmlm_distill.FLOW) == whole  # so that a teacher fits
    told = changed_copy(tmp_path / "told.py", "flm_train", "halves rotated", "both halves rotated")
    other = changed_copy(tmp_path / "other.py", "flm_train", "b * cos + a * sin", "b * cos - a * sin")
    same, changed = (
        record.definitions((m.DiT, m.Clock, m.EmbeddingSpace, m.OneHotSpace, m.interpolant)) for m in (told, other)
    )
    assert same == whole
    assert [name for name in whole if changed[name] != whole[name]] == ["rotate"]


@pytest.fixture(scope="module")
def toy_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    flm_train.main([*TOY_TEXT, "--run-dir", str(folder), "--run-name", "flow"])
    return folder / "flow"


@pytest.mark.parametrize(
    ("module", "flag"),
    [(fmlm_distill, "eval"), (fmlm_distill, "resume"), (ogpo_state, "eval"), (ogpo_pixels, "resume")],
)
def test_start_refuses_a_run_of_another_kind(toy_flow: Path, module: ModuleType, flag: str) -> None:
    with pytest.raises(UserError, match=r"is a run of flm_train\.py, whose networks are others than those of"):
        module.main([f"--{flag}", str(toy_flow)])


@pytest.mark.slow
def test_main_of_the_student_refuses_a_student_and_tells_of_a_changed_teacher(
    toy_flow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*TOY_TEXT, "--run-dir", str(tmp_path)]
    fmlm_distill.main([*line, "--teacher", str(toy_flow), "--run-name", "student"])
    assert "differ from those of" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is a run of fmlm_distill\.py, whose networks are others"):
        fmlm_distill.main([*line, "--teacher", str(tmp_path / "student"), "--run-name", "second"])
    kept = record.read(toy_flow)
    kept["definitions"]["Clock"] = "0"
    copy = tmp_path / "flow"
    copy.mkdir()
    (copy / "args.json").write_text(json.dumps(kept | {"script": "mine.py"}))
    (copy / "checkpoint.pt").write_bytes((toy_flow / "checkpoint.pt").read_bytes())
    fmlm_distill.main([*line, "--teacher", str(copy), "--run-name", "third"])
    assert "note: Clock of fmlm_distill.py differ from those of mine.py" in capsys.readouterr().out


def test_start_refuses_fewer_steps_than_were_made(toy_flow: Path) -> None:
    with pytest.raises(UserError, match="--total-steps 2: the run has made 4 already"):
        flm_train.main(["--resume", str(toy_flow), "--total-steps", "2"])


def test_start_resumes_a_run_whose_last_chunk_went_beyond_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--env", "toy", "--run-dir", str(tmp_path), "--run-name", "a", "--no-video", "--eval-episodes", "2"]
    ogpo_pixels.main([*line, "--total-steps", "61", "--start-training", "60", "--bc-steps", "2"])
    assert checkpoint.load(tmp_path / "a" / "checkpoint.pt")["step"] > 61
    ogpo_pixels.main(["--resume", str(tmp_path / "a")])
    assert capsys.readouterr().out.count("final, ODE policy") == 2


def test_start_runs_no_module_that_the_command_line_does_not_name(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "checkpoint.pt", {"args": {"env": "evil:Env-v0"}, "step": 1, "log": 0})
    with pytest.raises(UserError, match="runs code of the module in its --env evil:Env-v0; if you trust it, add"):
        ogpo_state.main(["--eval", str(tmp_path / "run")])


def test_load_run_of_an_earlier_version_says_what_does_not_fit(tmp_path: Path) -> None:
    line = ["--env", "toy", "--run-dir", str(tmp_path), "--run-name", "a", "--no-video", "--eval-episodes", "2"]
    ogpo_state.main([*line, "--total-steps", "60", "--start-training", "60", "--bc-steps", "5"])
    path = tmp_path / "a" / "checkpoint.pt"
    state = checkpoint.load(path)
    assert state["version"] == VERSION
    del state["agent"]["critic"]
    checkpoint.save(path, state)
    with pytest.raises(UserError, match="the checkpoint's agent does not fit this script"):
        ogpo_state.main(["--eval", str(tmp_path / "a")])
