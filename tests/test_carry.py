"""tools/carry.py in a small repository of its own: what is carried, what conflicts, and that twice is harmless."""

import subprocess
from pathlib import Path

import pytest

from tools import carry

SCRIPT = "\n".join(f"line {i}" for i in range(30)) + "\n"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """script.py, its twin and the twin's variant: the twin has line 20 its own way, the variant also line 25."""
    texts = {"script.py": SCRIPT, "twin.py": SCRIPT.replace("line 20\n", "the twin's\n")}
    texts["variant.py"] = texts["twin.py"].replace("line 25\n", "the variant's\n")
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(carry, "ROOT", tmp_path)
    monkeypatch.setattr(carry, "COPIES", {"script.py": ("twin.py",), "twin.py": ("variant.py",)})
    return tmp_path


def test_main_carries_a_change_to_copies_and_their_copies_and_twice_is_harmless(repository: Path) -> None:
    (repository / "script.py").write_text(SCRIPT.replace("line 3\n", "changed\n"))
    for _ in range(2):
        assert carry.main(["script.py"]) == 0
        twin, variant = ((repository / name).read_text() for name in ("twin.py", "variant.py"))
        assert twin == SCRIPT.replace("line 3\n", "changed\n").replace("line 20\n", "the twin's\n")
        assert variant == twin.replace("line 25\n", "the variant's\n")


def test_main_reports_a_conflict_and_stops_there(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "script.py").write_text(SCRIPT.replace("line 20\n", "changed\n"))
    before = (repository / "variant.py").read_text()
    assert carry.main(["script.py"]) == 1
    assert "twin.py: 1 conflicts" in capsys.readouterr().out
    assert "<<<<<<<" in (repository / "twin.py").read_text()
    assert (repository / "variant.py").read_text() == before


def test_at_an_unknown_revision_is_one_line(repository: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: git has no script\.py at nowhere"):
        carry.main(["script.py", "--base", "nowhere"])


def test_copies_are_files_of_this_repository() -> None:
    names = {name for script, copies in carry.COPIES.items() for name in (script, *copies)}
    assert all((carry.ROOT / name).exists() for name in names)
