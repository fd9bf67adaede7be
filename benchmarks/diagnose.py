"""Inside a run of the study: are the critics right, and where does the policy still vary?

python benchmarks/diagnose.py run --env lift --configs ogpo+ca bptt  # after `study.py run` has made the cloned policy
python benchmarks/diagnose.py dip --env lift --configs start+ start+ca ogpo+ ogpo+ca lr_warmup --seeds 1 2 3
python benchmarks/diagnose.py report          # study/diagnostics.md, diagnostics.png and dip.png from the stored JSON

A run is stopped at several step counts, and its checkpoint is asked at each (20 episodes of the acting policy):

Q against return     Q of every decision (mean over the target heads) beside the discounted reward that followed; an
                     episode cut by the time limit goes on with the value of never succeeding, a bound from below
variance of actions  64 chains at each of 200 visited states: variance along the gradient of Q with respect to the
                     action, and per direction across it; consensus is the mean cosine between the heads' gradients

`dip` stops a run 500 updates after its actor first moved, and asks the actor before that and on the way: success of the
noise-free policy over 50 episodes, always the same. `study.py report` judges the lowest (measure *early*).
"""

import argparse
import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from runs import ROOT, RUNS, execute, keep
from study import ALONE, CONFIGS, DIP_EPISODES, SEEDS, STORE, cloned, common_flags, dip_file

sys.path.insert(0, str(ROOT))
from common import checkpoint, cli
from common.collect import Collector
from common.envs import make_env, make_vec_env
from common.evaluate import evaluate
from common.replay import ReplayBuffer
from variants.ogpo_critic import returns_to_go

STEPS = {"lift": (0, 3_000, 4_000, 6_000, 8_000, 12_000), "can": (0, 4_000, 8_000, 12_000, 20_000)}
EPISODES, STATES, CHAINS, SEED = 20, 200, 64, 99  # SEED: no run of the study has its episodes
AFTER, DIP_SEED = (1, 4, 16, 64, 250, 500), 300_000  # updates of the actor; not an episode of any run


class Enough(Exception):
    """A run has told all that is asked of it."""


def module(config: str) -> ModuleType:
    return importlib.import_module(CONFIGS[config].script.removesuffix(".py").replace("/", "."))


def run_flags(env: str, config: str, seed: int) -> list[str]:
    start = str(cloned(env, seed).relative_to(ROOT))
    return [*common_flags(env, seed), *CONFIGS[config].flags, "--eval-episodes", "20", "--cloned", start]


def load(config: str, folder: Path) -> tuple[ModuleType, Any, Any]:
    """The script's module, the agent and the arguments of a run."""
    script = module(config)
    saved = checkpoint.load(folder / "checkpoint.pt")
    args = cli.override(script.Args(), saved["args"])
    env = make_env(args.run.env, horizon=args.task.horizon)
    agent = script.make_agent(args, env.observation_space.shape[0], env.action_space.shape[0], torch.device("cpu"))
    checkpoint.unpack(agent, saved["agent"])
    env.close()
    return script, agent, args


def rollouts(script: ModuleType, agent: Any, args: Any) -> dict[str, np.ndarray]:
    """Observation, Q and return-to-go of every decision of the acting policy, and success by episode."""
    c, horizon, chunk = args.critic, args.task.horizon, args.policy.chunk
    rng = torch.Generator().manual_seed(0)
    envs = make_vec_env(args.run.env, 1, horizon=horizon)
    (obs_dim,), (act_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    buffer = ReplayBuffer(EPISODES * (horizon + 1), obs_dim, act_dim, chunk)
    reward = lambda raw, success: raw + c.reward_offset + c.success_bonus * success  # noqa: E731
    collector = Collector(envs, buffer, reward, SEED, window=EPISODES)
    seen, q = [], []

    def act(obs: np.ndarray) -> np.ndarray:
        action = script.act_best_of_n(agent, obs, args, rng)  # (1, H, A)
        seen.append(obs[0])
        with torch.no_grad():
            q.append(agent.critic_ema(torch.from_numpy(obs), torch.from_numpy(action).flatten(1)).mean().item())
        return action

    collector.start()
    while collector.finished < EPISODES:
        collector.step(act)
    envs.close()
    decisions = np.concatenate([np.arange(lo, hi - 1, chunk) for lo, hi, _ in buffer.episodes])
    returns = returns_to_go(buffer, decisions, c.gamma, c.reward_offset / (1 - c.gamma))
    return {"obs": np.array(seen), "q": np.array(q), "return": returns, "success": np.array(collector.successes)}


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


def run(env: str, config: str, seed: int) -> int:
    name = f"diagnose_{env}_{config}_s{seed}"
    folder, points = RUNS / name, []
    c = CONFIGS[config]
    shutil.rmtree(folder, ignore_errors=True)  # its early checkpoints are gone: always from the start
    for steps in STEPS[env]:
        flags = [*run_flags(env, config, seed), "--eval-every", "2000", "--total-steps", str(steps)]
        (folder / "wall_seconds").unlink(missing_ok=True)
        if code := execute(c.script, name, flags, resume=["--total-steps", str(steps)]):
            return code
        script, agent, args = load(config, folder)
        found = rollouts(script, agent, args)
        point = {"step": steps, "q": found["q"].tolist(), "return": found["return"].tolist()}
        points.append(point | {"success": float(found["success"].mean())} | spread(script, agent, args, found["obs"]))
        print(f"{name} at {steps}: success {points[-1]['success']:.2f}", flush=True)
    target = STORE / name
    keep(folder, target)
    (target / "diagnostics.json").write_text(json.dumps(points, separators=(",", ":")))
    return 0


def success(script: ModuleType, agent: Any, args: Any) -> float:
    """Of the noise-free policy, with noise of its own: the same weights give the same number."""
    envs, rng = make_vec_env(args.run.env, 1, horizon=args.task.horizon, chunk=args.policy.chunk), torch.Generator()
    rng.manual_seed(0)
    rate = evaluate(envs, lambda obs: script.act_ode(agent, obs, args, rng), DIP_EPISODES, DIP_SEED).rate
    envs.close()
    return rate


def dip(env: str, config: str, seed: int) -> int:
    """Trains until the last of AFTER and stores {updates of the actor: success}, 0 being the policy as cloned."""
    name, script, found = f"dip_{env}_{config}_s{seed}", module(config), {}
    update = script.update

    def watched(agent: Any, buffer: ReplayBuffer, args: Any, *more: Any) -> dict[str, torch.Tensor]:
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
        script.main([*run_flags(env, config, seed), "--run-name", name, "--eval-every", "1000000"])
    except Enough:
        pass
    finally:
        script.update = update
    if AFTER[-1] not in found:
        return 1
    file = dip_file(env, config, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found) + "\n")
    return 0


def report() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folders = sorted(STORE.glob("diagnose_*"))
    text = [
        "# Diagnostics: stored results",
        "",
        "Made by `python benchmarks/diagnose.py report`. Q against return: over all decisions of 20 episodes. "
        "Variance: mean over states, in squared units of the action range, per direction.",
        "",
        "| run | step | success | mean Q | mean return | correlation | variance along | across | ratio | consensus |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    figure, axes = plt.subplots(
        2, max(1, len(folders)), figsize=(4 * max(1, len(folders)), 6.4), layout="constrained", squeeze=False
    )  # fmt: skip
    for folder, (top, bottom) in zip(folders, axes.T, strict=False):
        name, points = folder.name.removeprefix("diagnose_"), json.loads((folder / "diagnostics.json").read_text())
        for i, p in enumerate(points):
            q, returns = np.array(p["q"]), np.array(p["return"])
            along, across = np.mean(p["along"]), np.mean(p["across"])
            corr = np.corrcoef(q, returns)[0, 1] if q.std() > 0 and returns.std() > 0 else float("nan")
            text.append(
                f"| {name} | {p['step']:,} | {p['success']:.2f} | {q.mean():.1f} | {returns.mean():.1f} | {corr:.2f} "
                f"| {along:.2e} | {across:.2e} | {along / across:.2f} | {np.mean(p['consensus']):.2f} |"
            )
            top.plot(
                returns, q, ".", color=plt.get_cmap("viridis")(i / len(points)), markersize=3, label=f"{p['step']:,}"
            )
        low = min(min(p["return"] + p["q"]) for p in points)
        top.plot([low, 5], [low, 5], "k:", linewidth=1)
        top.set(title=name, xlabel="return that followed", ylabel="Q")
        top.legend(fontsize=7, markerscale=3)
        steps = [p["step"] for p in points]
        bottom.plot(steps, [np.mean(p["along"]) for p in points], "o-", label="along grad Q")
        bottom.plot(steps, [np.mean(p["across"]) for p in points], "s-", label="across, per direction")
        bottom.set(xlabel="environment steps", ylabel="variance of the action", yscale="log")
        bottom.legend(fontsize=7)
    figure.savefig(STORE / "diagnostics.png", dpi=110)
    text += report_dip(plt)
    (STORE / "diagnostics.md").write_text("\n".join(text) + "\n")


def report_dip(plt: ModuleType) -> list[str]:
    """Table of the actor's first updates, and study/dip.png."""
    stored = {
        (env, config): [json.loads(f.read_text()) for seed in SEEDS if (f := dip_file(env, config, seed)).exists()]
        for env in STEPS
        for config in CONFIGS
    }
    stored = {key: runs for key, runs in stored.items() if runs}
    if not stored:
        return []
    text = [
        "",
        f"Success of the noise-free policy over {DIP_EPISODES} episodes after so many updates of the actor, by seed "
        "(0: the cloned policy):",
        "",
        "| first updates | " + " | ".join(map(str, (0, *AFTER))) + " |",
        "|---|" + "---|" * (1 + len(AFTER)),
    ]
    figure, axes = plt.subplots(1, len(stored), figsize=(3.4 * len(stored), 3), layout="constrained", squeeze=False)
    for axis, ((env, config), runs) in zip(axes[0], stored.items(), strict=True):
        cells = [" ".join(f"{run[str(n)]:.2f}" for run in runs) for n in (0, *AFTER)]
        text.append(f"| {env}: {CONFIGS[config].title} | " + " | ".join(cells) + " |")
        for run in runs:
            axis.plot(range(1 + len(AFTER)), list(run.values()), "o-", markersize=3)
        axis.set_title(f"{env}: {CONFIGS[config].title}", fontsize=9)
        axis.set(ylim=(-0.03, 1.03), xlabel="updates of the actor")
        axis.set_xticks(range(1 + len(AFTER)), ["cloned", *AFTER])
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="success, noise-free")
    figure.savefig(STORE / "dip.png", dpi=110)
    plt.close(figure)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "dip", "report"))
    parser.add_argument("--env", choices=list(STEPS), default="lift")
    parser.add_argument("--configs", nargs="+", choices=[c for c in CONFIGS if c not in ALONE], default=["ogpo+ca"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS[:1]))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.what == "report":
        report()
        return
    one = {"run": run, "dip": dip}[args.what]
    failed = [(c, s) for s in args.seeds for c in args.configs if one(args.env, c, s)]
    print(f"failed: {failed or '-'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
