"""What tests of several scripts need: small agents of any of them, and the text of their definitions."""

import ast
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from common import cli
from common.replay import ReplayBuffer

TINY = [  # flags of a run of seconds
    *("--env", "toy", "--preset", "laptop", "--no-video", "--num-demos", "10", "--bc-steps", "20"),
    *("--bc-eval-every", "20", "--bc-eval-episodes", "4", "--eval-episodes", "4", "--eval-interval-episodes", "4"),
    *("--actor-hidden", "16", "16", "--critic-hidden", "16", "16"),
]
TEXT_BASELINES = ("ar", "duo", "mdlm")  # of baselines/: peers of FLM, the others are OGPO's
OPEN = ["--start-training", "200", "--critic-successes", "0", "--critic-warmup", "5"]  # the gates, after five updates


def folders(tmp_path: Path, name: str) -> list[str]:
    """Flags of a run that keeps everything in a folder."""
    return ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name", name]


def slow(*values: object) -> Any:
    """A case for pytest.mark.parametrize that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def new_agent(
    module: ModuleType, *chosen: str, obs_dim: int = 5, act_dim: int = 2, **values: object
) -> tuple[Any, Any]:
    """Agent and arguments of a robot script on the toy task: small networks, chunks of 4, and these values.

    chosen: what chooses the defaults beside task and preset, such as a variant.
    """
    values = dict(actor_hidden=(32, 32), critic_hidden=(32, 32), chunk=4) | values
    args = cli.override(module.default_args("toy", "laptop", *chosen), values)
    return module.Agent(args, obs_dim, act_dim, torch.device("cpu"), None), args


def small_agent(module: ModuleType, seed: int = 1, **changes: object) -> tuple[Any, Any]:
    """Agent and arguments of ogpo_state.py or a variant: observations of 5 numbers, actions of 2, chunks of 4."""
    return new_agent(module, "ogpo+ca", **dict(states=8, group=4, heads=3, seed=seed) | changes)


def weights(net: torch.nn.Module) -> torch.Tensor:
    """A copy of all of them, flat."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradients(net: torch.nn.Module) -> torch.Tensor:
    """A copy of all of them, flat."""
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def demonstrated() -> ReplayBuffer:
    """Ten episodes of 20 steps for a `small_agent`: actions around 0.5, success at the end."""
    buffer, rng = ReplayBuffer(1_000, 5, 2, 4), np.random.default_rng(0)
    for _ in range(10):
        actions = np.full((20, 2), 0.5) + 0.05 * rng.standard_normal((20, 2))
        rewards = np.append(-np.ones(19), 4.0)
        buffer.add_episode(rng.standard_normal((21, 5)), actions, rewards, True, True)
    return buffer


def perturbed(net: torch.nn.Module, scale: float, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))


def definitions(module: ModuleType) -> dict[str, str]:
    """{name: text} of the functions, classes and constants at the top level of a script."""
    text = Path(module.__file__).read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(text, node)
    return found


def differing(one: ModuleType, two: ModuleType) -> set[str]:
    """Names whose definitions are not the same text in both scripts."""
    a, b = definitions(one), definitions(two)
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def hub_in_a_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Downloads from any repository of the Hugging Face hub are copies of the files in `folder`."""

    def download(repository: str, name: str, *, local_dir: str, **_: str) -> str:
        return shutil.copy(folder / name, local_dir)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
