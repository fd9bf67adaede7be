"""tools/sweep.py and common/jobs.py: which runs, their names; failed, finished, interrupted and stopped ones."""

import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from common import jobs
from common.errors import UserError
from tools import sweep

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = '''
"""Stands for a training script; as a program it needs no torch."""
import json, signal, sys, time
from dataclasses import dataclass, field
from pathlib import Path

@dataclass
class RunArgs:
    seed: int = 1
    widths: tuple[int, ...] = (8,)
    video: bool = True
    fail: str = "no"  # or diverges, waits
    run_name: str = ""
    run_dir: str = "runs"
    threads: int = 1

@dataclass
class Args:
    run: RunArgs = field(default_factory=RunArgs)

def main(argv):
    from common import cli, record
    r = cli.parse(Args(), argv, "").run
    record.reserve(Path(r.run_dir), r.run_name, False, (), vars(r))

if __name__ == "__main__":
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    folder = Path(flags.get("--resume") or f"{flags['--run-dir']}/{flags['--run-name']}")
    folder.mkdir(exist_ok=True)
    with open(folder / "calls", "a") as file:
        print(*sys.argv[1:], file=file)
    if "--resume" in flags:
        sys.exit()
    args = {"seed": int(flags["--seed"]), "fail": flags.get("--fail", "no")}
    (folder / "args.json").write_text(json.dumps({"args": args}))
    (folder / "checkpoint.pt").touch()
    if args["fail"] == "diverges":
        sys.exit("error: not finite")
    if args["fail"] == "waits":
        def save(*_):
            print("saved; go on with: --resume")
            sys.exit()
        signal.signal(signal.SIGTERM, save)
        (folder / "ready").touch()
        time.sleep(60)
'''


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "fake.py"
    path.write_text(SCRIPT)
    return str(path)


def go(*words: object) -> object:
    """Exit code of the sweep."""
    with pytest.raises(SystemExit) as end:
        sweep.main([*map(str, words)])
    return end.value.code


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("", ["fake"]),
        ("--seed 3", ["fake"]),
        ("--seed 1 2 1 --no-video", ["fake__seed-1", "fake__seed-2"]),
        ("--seed 1 --seed=2", ["fake__seed-1", "fake__seed-2"]),
        ("--widths 8 8 --seed 1", ["fake"]),
        ("--widths 8 8 --widths 4", ["fake__widths-8-8", "fake__widths-4"]),
        ("--video --no-video", ["fake__video", "fake__no-video"]),
        ("--fail a/b c", ["fake__fail-a-b", "fake__fail-c"]),
        ("--seed 1 -2 --threads 1 2", [f"fake__seed-{s}__threads-{t}" for s in ("1", "-2") for t in (1, 2)]),
    ],
)
def test_plan_runs_and_their_names(script: str, tmp_path: Path, words: str, names: list[str]) -> None:
    found = sweep.plan(script, [*words.split(), "--run-dir", str(tmp_path)])
    assert list(found) == [tmp_path / name for name in names]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seed 1 2 --gamma 0.9 1.5", "--gamma 1.5: must be at least 0 and at most 1"),
        ("--seed 1 2 --gama 3", "perhaps --gamma"),
        ("--start-training 9 --total-steps 10 5", "after the last step"),
        ("--seed 1 2 --eval runs/x", "--eval: a sweep names its runs"),
        ("1 2", "1: expected a flag"),
    ],
)
def test_plan_refuses_what_the_script_refuses(tmp_path: Path, words: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        sweep.plan(str(ROOT / "ogpo_state.py"), [*words.split(), "--env", "toy", "--run-dir", str(tmp_path / "runs")])
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_plan_refuses_runs_that_would_be_one_and_what_is_no_script(script: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs would be fake__fail-a-b"):
        sweep.plan(script, ["--fail", "a/b", "a:b"])
    with pytest.raises(UserError, match="is no script"):
        sweep.plan("--seed", [])
    with pytest.raises(UserError, match="is no training script"):
        sweep.plan(str(ROOT / "common" / "jobs.py"), [])


def test_main_skips_finished_runs_and_goes_on_with_failed_ones(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (script, "--seed", 1, 2, "--fail", "no", "diverges", "--run-dir", tmp_path)
    fine, bad = ([tmp_path / f"fake__seed-{s}__fail-{how}" for s in (1, 2)] for how in ("no", "diverges"))
    assert go(*words, "--jobs", 2) == 1
    out = capsys.readouterr().out
    assert "4 runs: 4 new" in out and out.count("exit code 1: error: not finite") == 2
    assert out.splitlines()[-1] == "2 finished, 2 failed: " + ", ".join(map(os.path.relpath, bad))
    sweep.main([*map(str, words), "--dry-run"])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [c[:2] for c in commands[::2]] == [["#", "finished:"]] * 2
    assert [c[2:] for c in commands[1::2]] == [["--resume", str(folder)] for folder in bad]
    assert go(*words, "--threads", 4) == 0  # may be another one
    assert "4 runs: 2 finished, 2 interrupted" in capsys.readouterr().out
    assert [len(calls(folder)) for folder in (*fine, *bad)] == [1, 1, 2, 2]
    with pytest.raises(UserError, match=r"fake__seed-1 was made with --fail no, not other; give another --run-dir"):
        os.rename(fine[0], tmp_path / "fake__seed-1")
        sweep.plan(script, ["--seed", "1", "2", "--fail", "other", "--run-dir", str(tmp_path)])


def test_main_runs_in_the_current_folder(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the user's module and demonstrations are, as without a sweep."""
    monkeypatch.chdir(tmp_path)
    assert go(script, "--seed", 1, 2, "--run-dir", ".") == 0
    assert "2 new; what a run prints is in NAME.txt" in capsys.readouterr().out
    assert [len(calls(tmp_path / f"fake__seed-{seed}")) for seed in (1, 2)] == [1, 1]


def test_main_on_submitit_runs_the_same(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit", reason="submitit is optional")
    words = (script, "--seed", 1, "--fail", "no", "diverges", "--run-dir", tmp_path, "--engine", "local", "--jobs", 2)
    assert go(*words) == 1
    assert "exit code 1: error: not finite" in capsys.readouterr().out
    assert (tmp_path / "fake__fail-no" / jobs.FINISHED).exists()
    assert go(*words) == 0
    assert [len(calls(tmp_path / f"fake__fail-{how}")) for how in ("no", "diverges")] == [1, 2]


def test_submitter_without_submitit_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        sweep.submitter("local", tmp_path, {})


def test_execute_all_stopped_by_a_signal_lets_runs_save_and_begins_no_other(script: str, tmp_path: Path) -> None:
    """The same jobs afterwards: the interrupted one is resumed, the other begun."""
    folders = [tmp_path / name for name in ("one", "two")]
    flags = ["--run-dir", str(tmp_path), "--fail", "waits", "--seed", "1"]

    def stop() -> None:
        while not (folders[0] / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before, stopper = signal.getsignal(signal.SIGTERM), threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        jobs.execute_all(lambda folder: jobs.execute(script, folder, flags), [(f,) for f in folders], 1)
    stopper.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert [jobs.state(folder) for folder in folders] == ["interrupted", "new"] and not folders[1].exists()
    assert "saved; go on with" in jobs.output(folders[0]).read_text()
    flags[3] = "no"
    assert jobs.execute_all(lambda folder: jobs.execute(script, folder, flags), [(f,) for f in folders], 1) == 0
    assert calls(folders[0])[1:] == [f"--resume {folders[0]}"] and len(calls(folders[1])) == 1


def test_execute_leaves_a_run_alone_that_another_process_has(script: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(tmp_path / ".run.lock", is_singleton=False):
        assert jobs.execute(script, folder, ["--run-dir", str(tmp_path), "--seed", "1"]) == jobs.BUSY
    assert folder.exists() and not (folder / "calls").exists()
