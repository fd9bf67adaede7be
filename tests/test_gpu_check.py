"""benchmarks/gpu_check.py: its commands are those of the scripts, and what comes of a case that works or fails."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common import cli
from common.errors import UserError

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_check


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", gpu_check.CASES)
def test_commands_parse_by_their_scripts(name: str, tiny: bool, tmp_path: Path) -> None:
    case = gpu_check.CASES[name]
    words = gpu_check.command(name, tmp_path, "cpu", tiny)
    script, flags = words[words.index(case.script)], words[words.index(case.script) + 1 :]
    module = importlib.import_module(script.removesuffix(".py"))
    chosen = cli.peek(flags, "env", "preset") if "env" in cli.flatten(module.Args()) else {}
    args = cli.flatten(cli.parse(module.default_args(**chosen), flags, ""))
    assert args["device"] == "cpu" and args["run_name"] == name and args["compile"] == ("compiled" in name)
    assert args["total_steps"] <= 3_000
    if case.teacher:
        assert args["teacher"] == str(tmp_path / case.teacher) and list(gpu_check.CASES).index(case.teacher) < list(
            gpu_check.CASES
        ).index(name)


def metrics(folder: Path, rows: list[dict[str, float]], args: dict[str, object]) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "args.json").write_text(json.dumps({"args": args}))


def test_measured_is_the_speed_at_the_end(tmp_path: Path) -> None:
    speed = {"time/tokens_per_second": 9e3, "time/mfu": 0.4, "time/memory_gib": 2.5}
    rows = [{"step": 50, **speed, "time/mfu": 0.1}, {"step": 100, **speed}, {"step": 100, "eval/perplexity_1": 7.0}]
    metrics(tmp_path / "text", rows, {})
    assert gpu_check.measured(tmp_path / "text") == {"tokens_per_second": 9e3, "mfu": 0.4, "memory_gib": 2.5}
    walls = {250: 9.0, 500: 20.0, 750: 22.0}
    rows = [{"step": n, "time/wall": wall} | ({"ogpo/q": 1.0} if n > 250 else {}) for n, wall in walls.items()]
    metrics(tmp_path / "robot", rows, {"update_every": 5})
    assert gpu_check.measured(tmp_path / "robot") == {"updates_per_second": 25.0}


@pytest.mark.parametrize(
    ("code", "seconds", "said"),
    [
        ("print('warming'); raise SystemExit('error: --device cuda: no GPU')", 60.0, "error: --device cuda: no GPU"),
        ("import time; time.sleep(60)", 0.2, "not at its end after 0 s, when the time was over"),
    ],
)
def test_check_says_why_a_case_failed(
    code: str, seconds: float, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "command", lambda *_: [sys.executable, "-c", code])
    found = {"flm-eager": gpu_check.check("flm-eager", tmp_path, "cuda", False, seconds)}
    assert found == {"flm-eager": {"failed": said}}
    machine = {"gpu": "a GPU", "versions": {"torch": "2"}}
    page = gpu_check.report(found | {"flm-fp32": {"tokens_per_second": 1e4, "mfu": 0.333}}, machine, [*found, "pixels"])
    assert f"| flm-eager | failed: {said} |" in page and "| flm-fp32 | 10,000 | 33% |" in page
    assert "a GPU, torch 2. Not run, for lack of time: pixels." in page


def test_main_leaves_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        ran.append(command)
        folder = Path(command[command.index("--run-dir") + 1]) / command[command.index("--run-name") + 1]
        metrics(folder, [{"step": 1, "time/tokens_per_second": 5.0}], {})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(
        gpu_check, "describe_machine", lambda: {"gpu": None, "cpu": "a CPU", "versions": {"torch": "2"}}
    )
    monkeypatch.setattr(subprocess, "run", run)
    words = ["gpu_check.py", "--device", "cpu", "--only", "flm-eager", "flm-fp32", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert not end.value.code and len(ran) == 2
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["cases"]) == {"flm-eager", "flm-fp32"}
    assert "All cases were run." in (tmp_path / "out" / "results.md").read_text()
    monkeypatch.setattr(sys, "argv", [*words, "--minutes", "-1"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert len(ran) == 2


def test_without_the_device_it_says_so_once_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "nonsense", "--out", str(tmp_path / "gpu")])
    with pytest.raises(UserError, match="--device nonsense: "):
        gpu_check.main()
    assert not (tmp_path / "gpu").exists()
