"""What `diagnose.py` asks of an agent: how it does, whether its critics are right, where its actions still vary.

It reads the scripts as a module each, with these names: Args, Agent, act_best_of_n, act_ode, sample_chain, update and
main; of an agent, actor, actor_ema, critic_ema and actor_updates.
"""

import importlib
import shutil
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from common import checkpoint, cli
from common.envs import make_env, make_vec_env
from common.evaluate import act_on_arrays, evaluate
from common.rng import Rng
from runs import RUNS
from study_configs import CONFIGS
from study_stats import DIP_EPISODES

CPU = torch.device("cpu")
EPISODES, STATES, CHAINS = 20, 200, 64
SEED = 99 * 10**9 % 2**31  # first of episodes that no run of the study had
AFTER, DIP_SEED = (1, 4, 16, 64, 250, 500), 300_000  # updates of the actor; not an episode of any run


class Enough(Exception):
    """A run has told all that is asked of it."""


def module(config: str) -> ModuleType:
    return importlib.import_module(CONFIGS[config].script.removesuffix(".py").replace("/", "."))


def load(script: ModuleType, folder: Path) -> tuple[Any, Any]:
    """Agent and arguments of a run's checkpoint."""
    saved = checkpoint.load(folder / "checkpoint.pt")
    args = cli.override(script.Args(), saved["args"])
    env = make_env(args.run.env, horizon=args.task.horizon)
    agent = script.Agent(args, env.observation_space.shape[0], env.action_space.shape[0], CPU, None)
    checkpoint.unpack(agent, saved["agent"])
    env.close()
    return agent, args


def rollouts(script: ModuleType, agent: Any, args: Any) -> dict[str, np.ndarray]:
    """Observation, Q and return of every decision of the acting policy, and success by episode.

    A return is the discounted reward that followed; an episode that the time limit cut goes on with the value of never
    succeeding, a bound from below.
    """
    c, rng, act = args.critic, Rng(0, CPU), partial(script.act_best_of_n, agent, args)
    env = make_env(args.run.env, horizon=args.task.horizon)
    found: dict[str, list] = {"obs": [], "q": [], "return": [], "success": []}
    for episode in range(EPISODES):
        obs, _ = env.reset(seed=SEED + episode)
        rewards, decisions, succeeded, done, terminated = [], [], False, False, False
        while not done:
            chunk = act_on_arrays(act, obs[None], rng)  # (1, H, A)
            decisions.append(len(rewards))
            found["obs"].append(obs)
            with torch.no_grad():
                q = agent.critic_ema(torch.from_numpy(obs[None]), torch.from_numpy(chunk).flatten(1))  # (M, 1)
            found["q"].append(q.mean().item())
            for action in chunk[0]:
                obs, raw, terminated, truncated, info = env.step(action)
                rewards.append(float(raw) + c.reward_offset + c.success_bonus * bool(info["success"]))
                succeeded |= bool(info["success"])
                done = terminated or truncated
                if done:
                    break
        value = 0.0 if terminated else c.reward_offset / (1 - c.gamma)
        returns = []
        for reward in reversed(rewards):
            value = reward + c.gamma * value
            returns.append(value)
        found["return"] += [returns[-1 - step] for step in decisions]
        found["success"].append(succeeded)
    env.close()
    return {name: np.array(values) for name, values in found.items()}


def spread(script: ModuleType, agent: Any, args: Any, obs: np.ndarray) -> dict[str, list[float]]:
    """By state: variance of the action along grad_a Q, per direction across it, consensus of the heads' gradients."""
    picked = np.random.default_rng(0).permutation(len(obs))[:STATES]
    states = torch.from_numpy(obs[picked])
    rows = states.repeat_interleave(CHAINS, 0)
    noise = torch.randn(
        len(rows), args.policy.flow_steps + 1, agent.actor.out.out_features, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        action = script.sample_chain(agent.actor_ema, rows, noise, args.policy)[0][:, -1].clamp(-1, 1)
    action = action.unflatten(0, (-1, CHAINS))  # (S, G, D)
    centre = action.mean(1).requires_grad_()
    q = agent.critic_ema(states, centre)  # (M, S)
    grads = torch.stack([torch.autograd.grad(head.sum(), centre, retain_graph=True)[0] for head in q])  # (M, S, D)
    along = grads.mean(0)
    along = along / along.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    with torch.no_grad():
        away = action - centre[:, None]
        variance = away.square().mean(1)  # (S, D)
        on = (away * along[:, None]).sum(-1).square().mean(1)  # (S,)
        off = (variance.sum(-1) - on) / (variance.shape[-1] - 1)
        unit = grads / grads.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        heads = len(grads)
        consensus = (unit.sum(0).square().sum(-1) - heads) / (heads * (heads - 1))
    return {"along": on.tolist(), "across": off.tolist(), "consensus": consensus.tolist()}


def success(script: ModuleType, agent: Any, args: Any) -> float:
    """Of the noise-free policy, with noise of its own: the same weights give the same number."""
    act, rng = partial(script.act_ode, agent, args), Rng(0, CPU)
    envs = make_vec_env(args.run.env, 1, horizon=args.task.horizon, chunk=args.policy.chunk)
    rate = evaluate(envs, lambda obs: act_on_arrays(act, obs, rng), range(DIP_SEED, DIP_SEED + DIP_EPISODES)).rate
    envs.close()
    return rate


def dip(script: ModuleType, name: str, flags: list[str]) -> dict[int, float]:
    """Trains until the last of AFTER; {updates of the actor: success}, 0 being the policy as cloned."""
    found: dict[int, float] = {}
    update = script.update

    def watched(agent: Any, buffer: Any, args: Any, *more: Any) -> dict[str, torch.Tensor]:
        if not found:
            found[0] = success(script, agent, args)
        info = update(agent, buffer, args, *more)
        moves = agent.actor_updates
        if moves in AFTER and moves not in found:
            found[moves] = success(script, agent, args)
            print(f"{name}: {found}", flush=True)
        if moves == AFTER[-1]:
            raise Enough
        return info

    shutil.rmtree(RUNS / name, ignore_errors=True)
    script.update = watched
    try:
        script.main([*flags, "--run-name", name])
    except Enough:
        pass
    finally:
        script.update = update
    return found
