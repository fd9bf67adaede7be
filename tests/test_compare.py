"""tools/compare.py: runs grouped by what differs, levels reached, one line for what cannot be compared."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from tools import compare


def make_run(
    folder: Path, success: list[float], script: str = "ogpo_state.py", key: str = "bon", **args: object
) -> Path:
    folder.mkdir()
    record = {"script": script, "args": {"env": "toy", "chunk": 4, "seed": 1, "run_name": folder.name} | args}
    (folder / "args.json").write_text(json.dumps(record))
    rows = [{"step": 100 * i, f"eval/{key}_success": x, "time/wall": 60.0 * i} for i, x in enumerate(success)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_main_groups_seeds_and_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        make_run(tmp_path / "a1", [0.4, 0.8, 0.9], seed=1),
        make_run(tmp_path / "a2", [0.2, 0.6, 0.7], seed=2),
        make_run(tmp_path / "b1", [0.4, 0.9, 1.0], chunk=8),
        make_run(tmp_path / "q1", [0.4, 0.5, 0.85], "qc.py", "act"),
    ]
    compare.main([*map(str, runs), "--out", str(tmp_path / "out.png")])
    printed = capsys.readouterr().out
    assert "| ogpo_state, chunk 4 | 2 | 100 never | 200 never | 0.900 0.700 | 0.800 ± 0.141 | 2.0 2.0 |" in printed
    assert "| ogpo_state, chunk 8 | 1 | 100 | 100 | 1.000 | 1.000 | 2.0 |" in printed
    assert "| qc | 1 | 200 | never | 0.850 | 0.850 | 2.0 |" in printed
    assert (tmp_path / "out.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nowhere"], "nowhere is no run folder"),
        (["a", "--metric", "eval/x"], "has no metric eval/x; it has eval/bon_success"),
        (["a", "--out", "no/such/folder/x.png"], "give --out"),
        (["a", "--out", "x.nonsense"], "give --out"),
        (["empty"], "has no metrics yet"),
    ],
)
def test_main_refuses_in_one_line(flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "a", [0.1, 0.2])
    make_run(tmp_path / "empty", [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        compare.main(flags)
    assert "\n" not in str(caught.value)
