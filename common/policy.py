"""A trained policy to act with, in a program of one's own.

from common.policy import load_policy

policy = load_policy("runs/NAME")  # or "hf://owner/name", a run on the Hugging Face hub
obs, info = env.reset()
policy.reset()
action = policy(obs)  # one action, in [-1, 1]; asks the network once a chunk
"""

import importlib
import sys
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from common import checkpoint, cli, record
from common.download import obtain_run
from common.errors import UserError
from common.evaluate import Policy, act_on_arrays
from common.rng import Rng
from common.start import load_run, pick_device

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("", "variants", "baselines")  # of scripts


class LoadedPolicy:
    """Acts from observations as the run's environment gives them: flat vectors (O,), or rows of them (n, O)."""

    def __init__(self, policy: Policy, rng: Rng, obs_dim: int) -> None:
        self.policy, self.rng, self.obs_dim = policy, rng, obs_dim
        self.queue: deque[np.ndarray] = deque()  # actions of the last chunk that are still to execute

    def reset(self) -> None:
        """At the start of an episode: what is left of the last chunk is not executed."""
        self.queue.clear()

    def chunks(self, obs: np.ndarray) -> np.ndarray:
        """obs (n, O) -> chunks of actions (n, H, A) in [-1, 1]. Raises UserError on another width."""
        obs = np.asarray(obs, np.float32)
        if obs.shape[-1] != self.obs_dim:
            raise UserError(f"the policy takes observations of {self.obs_dim} numbers, got {obs.shape[-1]}")
        return act_on_arrays(self.policy, obs, self.rng)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """obs (O,) -> the next action (A,) of the chunk in progress, of a new one where that has ended."""
        if not self.queue:
            self.queue.extend(self.chunks(np.asarray(obs)[None])[0])
        return self.queue.popleft()


@dataclass(frozen=True)
class Acting:
    """The agent of a run, and how it acts: observations (n, obs_dim), source of noise -> chunks (n, chunk, act_dim)."""

    agent: Any
    act: Policy
    script: str
    env: str
    obs_dim: int
    chunk: int
    act_dim: int


Which = Literal["acting", "noise-free"]


def load_policy(run: str | Path, which: Which = "acting", device: str = "auto", seed: int = 0) -> LoadedPolicy:
    """The policy of a run from state: of ogpo_state.py, a variant or a baseline, by its newest checkpoint.

    run: its folder, or hf://owner/name[@revision], downloaded once to data/hub. which: the policy that collected
    (best-of-N where the method has it), or the noise-free one. seed: of its noise.
    Raises UserError on a folder that holds no such run, or one whose script has gone.
    """
    place = pick_device(device)
    made = load_acting(obtain_run(str(run), Path("data")), which, place)
    return LoadedPolicy(made.act, Rng(seed, place), made.obs_dim)


def load_acting(run: Path, which: Which, device: torch.device) -> Acting:
    """A policy of a run from state, and what it was made for. Errors are those of `load_policy`."""
    module = script_of(run)
    if not hasattr(module, "Agent"):
        raise UserError(f"{run} is a run of {file_of(module)}, which trains no robot policy; give one of ogpo_state.py")
    made = (getattr(module, name, None) for name in record.read(run).get("definitions", ()))
    saved, known = load_run(run, list(filter(None, made)) or [module.Agent]), cli.flatten(module.Args())
    args = cli.override(module.Args(), {k: v for k, v in saved["args"].items() if k in known})
    if hasattr(args.task, "cameras"):
        raise UserError(f"{run} is a run from pixels; only policies from state are loaded")
    names = ("act_best_of_n", "act_residual", "act") if which == "acting" else ("act_ode", "act_mean")
    function = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if function is None:
        raise UserError(f"{file_of(module)} has no {which} policy")
    obs_dim, chunk_dim = widths(saved["agent"])
    chunk, act_dim = args.policy.chunk, chunk_dim // args.policy.chunk
    agent = module.Agent(args, obs_dim, act_dim, device, None)
    checkpoint.unpack(agent, saved["agent"])
    return Acting(agent, partial(function, agent, args), file_of(module), args.run.env, obs_dim, chunk, act_dim)


@torch.no_grad()
def networks(made: Acting) -> dict[str, nn.Module]:
    """{name: network} of those of the agent's that its policy calls: here and now, by the flags that training set."""
    found, called = {k: part for k, part in vars(made.agent).items() if isinstance(part, nn.Module)}, set()
    hooks = [net.register_forward_pre_hook(lambda net, _: called.add(net)) for net in found.values()]
    device = made.agent.rng.device
    made.act(torch.zeros(1, made.obs_dim, device=device), Rng(0, device))
    for hook in hooks:
        hook.remove()
    return {name: net for name, net in found.items() if net in called}


def script_of(run: Path) -> ModuleType:
    """The script that made a run, imported. Raises UserError if it is not one of this repository."""
    name = Path(record.read(run).get("script", "")).name  # no path: a record from elsewhere imports nothing else
    found = [folder for folder in FOLDERS if name and (ROOT / folder / name).is_file()]
    if not found:
        made = f"made by {name}, which is not here" if name else "without an args.json"
        made = made if run.is_dir() else "there is no such folder"
        raise UserError(f"{run}: {made}; give the folder of a run of ogpo_state.py, a variant or a baseline")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(".".join(filter(None, (found[0], Path(name).stem))))


def file_of(module: ModuleType) -> str:
    """A script's path in this repository."""
    return str(Path(module.__file__).relative_to(ROOT))


def widths(state: dict[str, Any]) -> tuple[int, int]:
    """Numbers of an observation and of a chunk, from the weights of an agent's actor: a flow, or a Gaussian policy."""
    actor = state["actor"]
    out = len(actor["out.bias"])
    return len(actor["obs_mean"]), out if "freqs" in actor else out // 2  # a Gaussian's mean and deviation
