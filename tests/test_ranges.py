"""Wrong command lines, generated from the arguments of every script: each gets one line and exit code 2."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import pytest

from common import cli, ranges
from common.errors import UserError
from tests.helpers import TEXT_BASELINES, slow
from tests.warm import run_script

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("ogpo_state", "ogpo_pixels", "flm_train", "fmlm_distill")
VARIANTS = sorted(f"{kind}.{path.stem}" for kind in ("variants", "baselines") for path in ROOT.glob(f"{kind}/*.py"))
QUICK = {"ogpo": ["--env", "toy"]} | {name: ["--data", "toy"] for name in ("flm", "fmlm", *TEXT_BASELINES)}


def outside(allowed: ranges.Range) -> Iterator[float]:
    """Numbers just outside a range, and what is no number."""
    step = 1 if float(allowed.low).is_integer() and allowed.low > -math.inf else 0.5
    if allowed.low > -math.inf:
        yield allowed.low if allowed.open_low else allowed.low - step
        yield -1e30
    if allowed.high < math.inf:
        yield allowed.high if allowed.open_high else allowed.high + step
    yield from (math.nan, math.inf, -math.inf)


def wrong_values(name: str, kind: Any, allowed: ranges.Range | None) -> Iterator[list[str]]:
    """What must not follow the flag `name`."""
    if allowed:
        whole = int in (kind, *get_args(kind)) or "int" in str(kind)
        yield from ([str(int(x)) if whole and math.isfinite(x) else str(x)] for x in outside(allowed))
        yield from (["x"], [""], [])
        if whole:
            yield from (["1.5"], [str(2**70)])
        if get_args(kind)[1:] == (...,):
            yield ["1", "-1"]
    elif get_origin(kind) is Literal:
        yield from (["nonsense"], [""], [])
    elif kind is str:
        yield []
    elif kind is bool:
        yield ["3"]


def wrong_lines(module: ModuleType, only: set[str] | None = None) -> list[list[str]]:
    """Command lines, each with one wrong value, for every argument, or those in `only`."""
    start = QUICK.get(module.__name__.split(".")[-1].split("_")[0], QUICK["ogpo"])
    return [
        [*start, f"--{name.replace('_', '-')}", *values]
        for name, kind, allowed in ranges.ranges(module.Args)
        if only is None or name in only
        for values in wrong_values(name, kind, allowed)
    ]


class Accepted(Exception):
    pass


def complaint(module: ModuleType, line: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """What the script's main says to a wrong line; fails if it goes on to work."""

    def accepted(*_: object) -> None:
        raise Accepted

    monkeypatch.setattr(module, "pick_device", accepted)
    try:
        module.main([*line, "--run-dir", str(folder)])
    except UserError as error:
        return str(error)
    except Accepted:
        pytest.fail(f"accepted: {line}")
    raise AssertionError("main returned")


@pytest.mark.parametrize("name", [*SCRIPTS, *VARIANTS])
def test_ranges_every_number_has_one(name: str) -> None:
    for argument, kind, allowed in ranges.ranges(importlib.import_module(name).Args):
        assert allowed or not any(word in str(kind) for word in ("int", "float")), argument


@pytest.mark.parametrize("name", [*SCRIPTS, *VARIANTS])
def test_check_ranges_defaults_lie_inside(name: str) -> None:
    module = importlib.import_module(name)
    ranges.check_ranges(module.Args, cli.flatten(module.Args()))


@pytest.mark.parametrize(("name", "every"), [("ogpo_state", 4), *(slow(name, 1) for name in SCRIPTS)])
def test_main_refuses_wrong_lines(name: str, every: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = importlib.import_module(name)
    lines = wrong_lines(module)
    assert len(lines) > 150
    for line in lines[::every]:
        said = complaint(module, line, monkeypatch, tmp_path)
        assert "\n" not in said and (line[2] in said or line[-1] in said), (line, said)
    assert not list(tmp_path.iterdir())  # nothing was made


@pytest.mark.parametrize("name", [slow(name) for name in VARIANTS])
def test_main_of_variants_refuses_wrong_lines(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = importlib.import_module(name)
    known = {argument for base in SCRIPTS for argument, *_ in ranges.ranges(importlib.import_module(base).Args)}
    own = {argument for argument, *_ in ranges.ranges(module.Args)} - known
    for line in wrong_lines(module, own):
        said = complaint(module, line, monkeypatch, tmp_path)
        assert "\n" not in said and (line[2] in said or line[-1] in said), (line, said)


@pytest.mark.parametrize(
    ("script", "line", "said"),
    [
        ("ogpo_state", "--gama 3", "--gama, 3; perhaps --gamma"),
        ("ogpo_state", "--gamma nan", "--gamma nan: must be at least 0 and at most 1"),
        ("ogpo_pixels", "--eval a --resume b", "exclude each other"),
        ("flm_train", "--steps", "give at least one value"),
        ("fmlm_distill", "--data toy --device meta", "--device meta"),
    ],
)
def test_script_says_it_in_one_line(script: str, line: str, said: str, tmp_path: Path) -> None:
    done = run_script([str(ROOT / f"{script}.py"), *line.split(), "--run-dir", str(tmp_path)])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--env lift --chunk 201", "longer than an episode of 200 steps"),
        ("--env lift --collect-horizon 3", "longer than an episode of 3 steps"),
        ("--env lift --cloned nowhere", "--cloned nowhere: it has no cloned.pt"),  # before demonstrations are made
        ("--env lift --best-of-n-heads 9", "there are 4 --heads"),
        ("--env lift --start-training 4000 --total-steps 100", "after the last step"),
        ("--env lift --replay-size 150", "must be above --horizon 300"),
    ],
)
def test_check_refuses_arguments_that_do_not_fit_each_other(
    line: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert said in complaint(importlib.import_module("ogpo_state"), line.split(), monkeypatch, tmp_path)


@pytest.mark.parametrize("flag", ["eval", "resume"])
def test_start_refuses_an_empty_run_folder(flag: str) -> None:
    with pytest.raises(UserError, match=f"--{flag} is empty"):
        importlib.import_module("ogpo_state").main([f"--{flag}", ""])
