"""The notebooks: short, stored without outputs, with flags that exist, and they run."""

import re
import shutil
from pathlib import Path

import pytest

from tests.test_docs import ROOT, flags, name

nbformat = pytest.importorskip("nbformat", reason="nbclient is for developers")

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_short_explained_and_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code"] * 5
    assert not [cell.id for cell in notebook.cells[1::2] if cell.outputs or cell.execution_count is not None]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_commands_have_flags_of_their_script(path: Path) -> None:
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    commands = re.findall(r'^!"{sys\.executable}" (\S+)((?:.*\\\n)*.*)', code, re.MULTILINE)
    assert commands
    for script, rest in commands:
        assert set(re.findall(r"--([a-z-]+)", rest)) <= flags(script)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "pictures", "said"),
    [("ogpo", 2, r"success after \d+ steps"), ("flm", 1, r"samples_32_steps\n  \w+ \w+ ")],
)
def test_notebook_runs_as_stored(notebook: str, pictures: int, said: str, tmp_path: Path) -> None:
    """In a copy of what it needs, where it leaves its run."""
    nbclient = pytest.importorskip("nbclient")
    for folder in ("common", "settings", "tools", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for script in ("ogpo_state.py", "flm_train.py"):
        shutil.copy(ROOT / script, tmp_path)
    run = nbformat.read(tmp_path / "notebooks" / f"{notebook}.ipynb", as_version=4)
    nbclient.NotebookClient(run, timeout=3_600, resources={"metadata": {"path": tmp_path / "notebooks"}}).execute()
    outputs = [output for cell in run.cells[1::2] for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    assert re.search(said, "".join(output.get("text", "") for output in outputs))
    assert len(list((tmp_path / "runs").iterdir())) == 1
