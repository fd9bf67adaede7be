"""What the baselines of OGPO share: the text of ogpo_state.py but for the method, one text of every block, sizes."""

import ast
import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import ogpo_state as og
from common import cli
from tests.helpers import TEXT_BASELINES, definitions, differing

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted({path.stem for path in (ROOT / "baselines").glob("*.py")} - {*TEXT_BASELINES})
MODULES = {name: importlib.import_module(f"baselines.{name}") for name in NAMES}
BLOCKS = ("TanhGaussian", "squash", "temperature_loss")  # [B 0]


@pytest.mark.parametrize("name", NAMES)
def test_script_is_short_and_shares_most_definitions_with_the_main_script(name: str) -> None:
    """The environment's side, cloning, networks and critics are the same text; what differs is the method."""
    module = MODULES[name]
    assert len(Path(module.__file__).read_text().splitlines()) <= 650
    own, same = definitions(module).keys(), definitions(og).keys() - differing(og, module)
    shared = {
        "TaskArgs",
        "VelocityNet",
        "bc_loss",
        "flow_schedule",
        "step_mean",
        "sample_ode",
        "update_ema",
        "CriticEnsemble",
    }
    assert same >= shared & own and "TaskArgs" in same
    assert same >= {"td_target", "critic_loss"} & own


def test_shared_blocks_are_one_text() -> None:
    for block in BLOCKS:
        texts = {definitions(module)[block] for module in MODULES.values() if block in definitions(module)}
        assert len(texts) == 1, f"{block} differs between the scripts"


@pytest.mark.parametrize("name", NAMES)
def test_args_are_documented_and_read(name: str) -> None:
    """Every flag has its comment, and is read in the script, in common/ or by name where a run starts."""
    module, text = MODULES[name], Path(MODULES[name].__file__).read_text()
    tree, shared = ast.parse(text), "".join(p.read_text() for p in (ROOT / "common").rglob("*.py"))
    reads = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert [f for f in cli.flatten(module.Args()) if f not in reads and f'"{f}"' not in shared + text] == []
    lines = text.splitlines()
    fields = [
        n for c in tree.body if isinstance(c, ast.ClassDef) and c.name.endswith("Args")
        for n in c.body if c.name != "Args" and isinstance(n, ast.AnnAssign)
    ]  # fmt: skip
    assert [n.target.id for n in fields if "  # " not in lines[n.end_lineno - 1]] == []


@pytest.mark.parametrize("name", NAMES)
def test_docstring_names_paper_code_and_commit(name: str) -> None:
    said = MODULES[name].__doc__
    assert re.search(r"arXiv \d{4}\.\d{5}", said) and f"python baselines/{name}.py --env" in said
    assert "Symbols" in said and "docs/baselines.md" in said


@pytest.mark.parametrize("preset", ["laptop", "paper"])
@pytest.mark.parametrize("env", ["toy", "lift", "can", "square", "peg-insert-side", "door"])
@pytest.mark.parametrize("name", NAMES)
def test_default_args_of_every_task_take_ogpos_row(name: str, env: str, preset: str) -> None:
    args, ours = cli.flatten(MODULES[name].default_args(env, preset)), cli.flatten(og.default_args(env, preset))
    equal = ("env", "preset", "horizon", "chunk", "gamma", "demos", "num_demos", "reward_offset", "success_bonus")
    assert {k: args[k] for k in equal if k in args} == {k: ours[k] for k in equal if k in args}


# --- Shared blocks ----------------------------------------------------------------------------------------------------

BLOCK = next((module for module in MODULES.values() if hasattr(module, "squash")), og)


def test_squash_has_the_density_of_a_tanh_normal() -> None:
    mean, log_std = torch.randn(50, 3).double(), torch.randn(50, 3).double() * 0.3
    eps = torch.randn(50, 3).double()
    y, log_prob = BLOCK.squash(mean, log_std, eps)
    law = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(log_prob, law.log_prob(y).sum(-1))
    far = BLOCK.squash(torch.full((1, 1), 40.0), torch.zeros(1, 1), torch.zeros(1, 1))[1]  # where tanh is 1
    assert math.isfinite(far.item()) and far.item() == pytest.approx(80 - 2 * math.log(2) - 0.919, abs=1e-2)


def test_tanh_gaussian_starts_near_zero_with_the_given_width() -> None:
    torch.manual_seed(0)
    net = BLOCK.TanhGaussian(0, 4, (32, 32), -1.0, torch.zeros(5), torch.ones(5))
    mean, log_std = net(torch.randn(100, 5))
    assert mean.shape == log_std.shape == (100, 4)
    assert mean.abs().max() < 0.1 and (log_std + 1).abs().max() < 0.1


def test_temperature_rises_while_the_entropy_is_below_its_target() -> None:
    log_alpha = nn.Parameter(torch.zeros(()))
    for log_prob, sign in ((3.0, -1.0), (-3.0, 1.0), (1.0, 0.0)):  # entropies -3, 3, -1 against -1
        log_alpha.grad = None
        BLOCK.temperature_loss(log_alpha, torch.full((8,), log_prob), -1.0).backward()
        assert math.copysign(1, log_alpha.grad.item()) * (log_alpha.grad != 0).item() == sign
