"""Records what a policy does in an environment as demonstrations: an .npz file that --demos reads.

python -m tools.record --env toy --policy my_module:act --episodes 50 --out demos.npz   # act(obs, env) -> action
python -m tools.record --env toy --policy runs/NAME --episodes 50 --out demos.npz       # a policy trained here

The module is in the current folder. obs (O,) is float32, the action (A,) in [-1, 1], also where the environment has
units of its own; env.unwrapped is the environment itself, env.get_wrapper_attr("steps") is 0 where an episode begins.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common import cli
from common.demos import save_demos
from common.demos.checks import TOP
from common.envs import make_env, own_horizon
from common.envs.wrappers import Guard
from common.errors import UserError, blame
from common.evaluate import EvalResult
from common.policy import load_policy
from common.seeds import demo_seed
from tools.recording import rollout
from tools.scripted import Expert

Act = Callable[[NDArray[np.float32], gym.Env[Any, Any]], Any]
HORIZON = 300  # of an own environment that is registered without max_episode_steps, as in the scripts


def find_policy(name: str, seed: int) -> tuple[Act, Callable[[], None]]:
    """The policy called `name`, module:function or the folder of a run, and what to call where an episode begins.

    seed: of the noise of a run's policy. Raises UserError if there is none.
    """
    if Path(name).is_dir() or name.startswith("hf://"):
        policy = load_policy(name, seed=seed)
        return lambda obs, env: policy(obs), policy.reset
    module, _, function = name.partition(":")
    if not (module and function):
        raise UserError(f"--policy {name}: there is no such folder; give runs/NAME, or module:function")
    try:
        return getattr(importlib.import_module(module), function), lambda: None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--policy {name} cannot be imported ({blame(error)}); run this where the module is, or set PYTHONPATH"
        ) from error


def as_expert(name: str, act: Act, reset: Callable[[], None]) -> Callable[..., Expert]:
    """The policy as an expert without noise, for `rollout`. Raises UserError on what it raises, and on no action."""

    def expert(env: gym.Env[Any, Any], obs: NDArray[np.float32], rng: np.random.Generator, noise: float) -> Expert:
        reset()
        while True:
            try:
                action = np.array(act(obs.copy(), env), np.float32)
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"--policy {name} fails ({blame(error)}); it is called with (obs, env)") from error
            shape = env.action_space.shape
            if action.shape != shape or not np.abs(action).max() <= TOP:
                raise UserError(
                    f"--policy {name} gave an action {action.ravel()[:8].tolist()} of shape {action.shape}; {shape} "
                    "numbers in [-1, 1] are needed, to which an environment's own units are rescaled: see numpy.clip"
                )
            obs = yield action

    return expert


def record(
    env_id: str, expert: Callable[..., Expert], num: int, seed: int = 0, failures: bool = False
) -> tuple[list[tuple[NDArray[Any], ...]], EvalResult]:
    """`num` episodes (obs, actions, rewards), successes unless `failures`; how all that were run went.

    Fewer if more than 20 are needed for a success. Raises UserError if none succeeds, EnvError for the environment's.
    """
    kept, success, length = [], [], []
    env = Guard(make_env(env_id, horizon=own_horizon(env_id) or HORIZON))
    with closing(env), tqdm(total=num, desc=f"{env_id} episodes", leave=False, mininterval=1) as bar:
        while len(kept) < num and len(success) < (num if failures else 20 * num + 20):
            start = demo_seed(seed, len(success))
            succeeded, (obs, _, actions, rewards) = rollout(env, expert, np.random.default_rng(start), 0.0, start)
            success.append(succeeded)
            length.append(len(actions))
            if succeeded or failures:
                kept.append((obs, actions, rewards))
                bar.update()
            bar.set_postfix(success=f"{np.mean(success):.2f}", refresh=False)
    if not kept:
        raise UserError(f"none of {len(success)} episodes of {env_id} succeeded; mend the policy, or record with --all")
    return kept, EvalResult(np.array(success), np.array(length))


def check_out(path: Path) -> None:
    """Raises UserError, before an hour is spent, if the file cannot be written or is there already."""
    if path.suffix != ".npz":
        raise UserError(f"--out {path}: demonstrations are written to .npz; give a name that ends so")
    if path.exists():
        raise UserError(f"--out {path} is there already; delete it, or give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error}); give a file in a folder of yours") from error


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="a task of docs/tasks.md, or package.module:EnvId")
    parser.add_argument("--policy", required=True, help="module:function, or runs/NAME")
    parser.add_argument("--episodes", type=int, default=50, help="to record; default: 50")
    parser.add_argument("--out", type=Path, default=Path("demos.npz"), help="the file; default: demos.npz")
    parser.add_argument("--all", action="store_true", help="keep failures too; default: successes only")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes, which no training or evaluation meets")
    args = parser.parse_args(argv)
    if args.episodes < 1:
        raise UserError(f"--episodes {args.episodes}: give at least one")
    check_out(args.out)
    expert = as_expert(args.policy, *find_policy(args.policy, args.seed))
    kept, result = record(args.env, expert, args.episodes, args.seed, args.all)
    save_demos(args.out, kept, units="normalized")
    print(result)
    obs, actions, _ = kept[0]
    steps = sum(len(actions) for _, actions, _ in kept)
    print(f"{args.out}: {len(kept)} episodes, {steps} steps, {obs.shape[1]} observations, {actions.shape[1]} actions")
    if len(kept) < args.episodes:
        print(f"note: fewer than --episodes {args.episodes}: it gave up after {len(result.success)}")
    if failed := len(kept) - int(result.success.sum()):
        print(f"note: {failed} of them are failures, which --demos would clone too")
    print(f"train on them: python ogpo_state.py --env {args.env} --demos {args.out}")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
