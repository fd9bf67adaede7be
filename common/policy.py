"""A trained policy to act with, in a program of one's own.

from common.policy import load_policy

policy = load_policy("runs/NAME")
obs, info = env.reset()
policy.reset()
action = policy(obs)  # one action, in [-1, 1]; asks the network once a chunk
"""

import importlib
import sys
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from common import checkpoint, cli, record
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


def load_policy(
    run: str | Path, which: Literal["acting", "noise-free"] = "acting", device: str = "auto", seed: int = 0
) -> LoadedPolicy:
    """The policy of a run from state: of ogpo_state.py, a variant or a baseline, by its newest checkpoint.

    which: the policy that collected (best-of-N where the method has it), or the noise-free one. seed: of its noise.
    Raises UserError on a folder that holds no such run, or one whose script has gone.
    """
    run = Path(run)
    module = script_of(run)
    made = (getattr(module, name, None) for name in record.read(run).get("definitions", ()))
    saved, known = load_run(run, list(filter(None, made)) or [module.Agent]), cli.flatten(module.Args())
    args = cli.override(module.Args(), {k: v for k, v in saved["args"].items() if k in known})
    if hasattr(args.task, "cameras"):
        raise UserError(f"{run} is a run from pixels; only policies from state are loaded")
    place, state = pick_device(device), saved["agent"]
    obs_dim, chunk_dim = widths(state)
    agent = module.Agent(args, obs_dim, chunk_dim // args.policy.chunk, place, None)
    checkpoint.unpack(agent, state)
    names = ("act_best_of_n", "act_residual", "act") if which == "acting" else ("act_ode", "act_mean")
    function = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if function is None:
        raise UserError(f"{Path(module.__file__).name} has no {which} policy")
    return LoadedPolicy(lambda obs, rng: function(agent, args, obs, rng), Rng(seed, place), obs_dim)


def script_of(run: Path) -> ModuleType:
    """The script that made a run, imported. Raises UserError if it is not one of this repository's robot scripts."""
    name = record.read(run).get("script", "")
    found = [folder for folder in FOLDERS if name and (ROOT / folder / name).is_file()]
    if not found:
        made = f"made by {name}, which is not here" if name else "without an args.json"
        raise UserError(f"{run}: {made}; give the folder of a run of ogpo_state.py, a variant or a baseline")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module = importlib.import_module(".".join(filter(None, (found[0], Path(name).stem))))
    if not hasattr(module, "Agent"):
        raise UserError(f"{run} is a run of {name}, which trains no robot policy; give one of ogpo_state.py")
    return module


def widths(state: dict[str, Any]) -> tuple[int, int]:
    """Numbers of an observation and of a chunk, from the weights of an agent's actor: a flow, or a Gaussian policy."""
    actor = state["actor"]
    out = len(actor["out.bias"])
    return len(actor["obs_mean"]), out if "freqs" in actor else out // 2  # a Gaussian's mean and deviation
