"""Cost of one actor-and-critic update against the machine's own matrix-multiplication rate, on one thread.

    python benchmarks/update_speed.py                     # laptop and paper preset at Square's sizes, random data
    python benchmarks/update_speed.py --run runs/NAME     # the same update on a real run's networks and replay buffer
    python benchmarks/update_speed.py --device cuda --compile

Chains without advantage are left out of the likelihood pass. With the vanilla advantage all have one, with the
conservative advantage only those on which the critics agree: the two updates take turns.
Work counts the operations of matrix products only (2 per weight and row forward, 4 more with gradients, 2 fewer in the
first layer); activations, optimizer and copies are overhead. Times are CPU seconds of the one thread, so that a busy
neighbour does not count, on a GPU wall seconds until it is done; GEMM and update alternate.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import ogpo_state as og
from common import checkpoint, cli
from common.machine import accelerate
from common.replay import ReplayBuffer

OBS, ACT = 23, 7  # robomimic's Square
GEMM = 2048  # rows and columns of the matrices
EAGER = {name: vars(og)[name] for name in og.COMPILED + og.RECORDED}
WARMUP = 5  # rounds; on a GPU the fourth is recorded


def seconds(f: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        f()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def mlp_flops(sizes: Sequence[int], grad: bool) -> float:
    """Per row; gradients of weights and inputs, but none of the network's input."""
    pairs = [2 * i * o for i, o in pairwise(sizes)]
    return sum(pairs) * (3 if grad else 1) - (pairs[0] if grad else 0)


def update_flops(args: og.Args, obs: int, act: int, kept: float, cloning: bool) -> float:
    """One update in which a share `kept` of the chains enters the likelihood pass."""
    dim, k = args.policy.chunk * act, args.policy.flow_steps
    actor = (obs + dim + 32, *args.policy.actor_hidden, dim)
    critic = (obs + dim, *args.critic.critic_hidden, 1)
    chains, rows, heads = args.actor.states * args.actor.group, args.critic.critic_batch, args.critic.heads
    total = chains * (k * mlp_flops(actor, False) + heads * mlp_flops(critic, False))
    total += kept * chains * k * mlp_flops(actor, True)
    total += cloning * args.critic.critic_batch * mlp_flops(actor, True)
    td = rows * (k * mlp_flops(actor, False) + heads * (mlp_flops(critic, False) + mlp_flops(critic, True)))
    return total + td


def random_buffer(args: og.Args) -> ReplayBuffer:
    buffer, rng = ReplayBuffer(20_000, OBS, ACT, args.policy.chunk), np.random.default_rng(0)
    for _ in range(100):
        actions = rng.uniform(-1, 1, (100, ACT)).astype(np.float32)
        buffer.add_episode(rng.normal(size=(101, OBS)).astype(np.float32), actions, -np.ones(100), True, True)
    return buffer


def measure(name: str, agent: og.Agent, buffer: ReplayBuffer, args: og.Args, repeats: int) -> None:
    """Prints the cost of an update with either advantage."""
    device = agent.rng.device
    rng, a = np.random.default_rng(0), torch.randn(GEMM, GEMM, device=device)
    rows: dict[str, list[tuple[float, float]]] = {"vanilla": [], "conservative": []}
    gemm, info = [], {}
    agent.policy_gradient_on = True
    if args.run.compile:
        vars(og).update(EAGER)
        accelerate(vars(og), og.COMPILED, og.RECORDED, agent.rng.generator)
    changed = {advantage: cli.override(args, {"advantage": advantage}) for advantage in rows}
    for i in range(repeats + WARMUP):
        for advantage in rows:
            spent = seconds(lambda c=changed[advantage]: info.update(og.update(agent, buffer, c, rng)), device)
            if i >= WARMUP:
                rows[advantage].append((spent, info["nonzero"].item()))
        gemm.append(2 * GEMM**3 / seconds(lambda: a @ a, device))
    peak = float(np.median(gemm))
    obs, act = buffer.obs.shape[1], buffer.actions.shape[1]
    print(f"{name}: GEMM {peak / 1e9:.1f} GFLOP/s")
    for advantage, values in rows.items():
        spent, share = np.median(np.array(values), 0)
        work = update_flops(args, obs, act, share, args.actor.bc_coef > 0)
        print(
            f"  {advantage:12s} {spent:7.4f} s  {work / 1e9:7.1f} GFLOP  {work / spent / 1e9:5.1f} GFLOP/s"
            f"  {work / spent / peak:4.0%} of GEMM  (share of chains with an advantage {share:.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder with a checkpoint")
    parser.add_argument("--presets", nargs="+", default=["laptop", "paper"], choices=["laptop", "paper"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(flags.device)
    if flags.run:
        saved = checkpoint.load(flags.run / "checkpoint.pt")
        args = cli.override(og.Args(), saved["args"] | {"compile": flags.compile})
        buffer = ReplayBuffer(
            args.run.replay_size, *(saved["buffer"][k].shape[1] for k in ("obs", "actions")), args.policy.chunk
        )
        buffer.load_state_dict(saved["buffer"])
        agent = og.Agent(args, buffer.obs.shape[1], buffer.actions.shape[1], device, None)
        checkpoint.unpack(agent, saved["agent"])
        measure(str(flags.run), agent, buffer, args, 4 * flags.repeats)
    else:
        for preset in flags.presets:
            args = cli.override(og.default_args("lift", preset, "ogpo+ca"), {"compile": flags.compile})
            agent = og.Agent(args, OBS, ACT, device, None)
            measure(f"preset {preset}, Square's sizes", agent, random_buffer(args), args, flags.repeats)
            print(f"  peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
