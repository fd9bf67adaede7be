"""What the baselines of FLM share: the text of flm_train.py but for the method, its defaults, sizes."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import flm_train as flm
from common import cli
from tests.helpers import TEXT_BASELINES, definitions, differing

ROOT = Path(__file__).resolve().parents[1]
MODULES = {name: importlib.import_module(f"baselines.{name}") for name in TEXT_BASELINES}
LIMITS = {"ar": 620, "duo": 720, "mdlm": 680}  # lines; three methods in the last


@pytest.mark.parametrize("name", TEXT_BASELINES)
def test_script_is_short_and_shares_its_text_with_the_main_script(name: str) -> None:
    module = MODULES[name]
    assert len(Path(module.__file__).read_text().splitlines()) <= LIMITS[name]
    same = definitions(flm).keys() - differing(flm, module)
    assert same >= {"TimeEmbedding", "learning_rate", "rotate", "zero"}
    if name != "ar":  # causal
        assert same >= {"attention", "ShortConv", "Block", "stratified_times", "makes_two_passes", "recalled"}


@pytest.mark.parametrize("name", TEXT_BASELINES)
def test_args_are_documented_and_read(name: str) -> None:
    """Every flag has its comment, and is read in the script or by name where a run starts."""
    text = Path(MODULES[name].__file__).read_text()
    tree, start = ast.parse(text), ast.parse((ROOT / "common" / "start.py").read_text())
    reads = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    reads |= {n.value for n in ast.walk(start) if isinstance(n, ast.Constant)}
    flags, lines = cli.flatten(MODULES[name].Args()), text.splitlines()
    assert [flag for flag in flags if flag not in reads] == []
    fields = [
        n for c in tree.body if isinstance(c, ast.ClassDef) and c.name.endswith("Args")
        for n in c.body if c.name != "Args" and isinstance(n, ast.AnnAssign)
    ]  # fmt: skip
    assert {n.target.id for n in fields} == set(flags)
    assert [n.target.id for n in fields if "  # " not in lines[n.end_lineno - 1]] == []


@pytest.mark.parametrize("name", TEXT_BASELINES)
def test_docstring_names_paper_code_and_page(name: str) -> None:
    said = MODULES[name].__doc__
    assert re.search(r"arXiv\s\d{4}\.\d{5}", said) and f"python baselines/{name}.py" in said
    assert re.search(r"\b[0-9a-f]{7}\b", said), "the authors' commit"
    assert "Symbols" in said and "docs/baselines.md" in said


@pytest.mark.parametrize("data", ["austen", "captions", "toy"])
@pytest.mark.parametrize("name", TEXT_BASELINES)
def test_defaults_are_those_of_flm(name: str, data: str) -> None:
    """Data, network, batch and schedule; not the rate and the sampler, which are a method's own."""
    ours, theirs = (cli.flatten(module.default_args(data=data)) for module in (MODULES[name], flm))
    equal = ("length", "layers", "width", "heads", "cond_width", "dropout", "total_steps", "batch", "warmup", "ema")
    assert {key: ours[key] for key in equal} == {key: theirs[key] for key in equal}
