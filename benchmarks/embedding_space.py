"""Noise in embedding space against noise on the one-hots: same model, same step, time and memory.

    python benchmarks/embedding_space.py              # all sizes, each in a process of its own; about 20 minutes
    python benchmarks/embedding_space.py 30522 embedding   # one line

Training: seconds of an optimizer step without the optimizer (loss, gradients), tokens per second, peak memory of the
process. Input: noise, interpolant and x E with its gradient, alone. Sampling: seconds per network call of the Euler
sampler. CPU seconds of one thread, so that a busy neighbour does not count; median of several, after a warm-up.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import flm_train as flm
from common import cli
from common.meter import memory

SIZES: dict[int, dict] = {  # vocabulary -> network and rows
    4_096: dict(layers=4, width=256, heads=4, length=64, batch=16),
    30_522: dict(layers=12, width=768, heads=12, length=128, batch=16, loss_rows=4),
    50_258: dict(layers=12, width=768, heads=12, length=1024, batch=4, loss_rows=1),
}


def cpu_seconds(f: Callable[[], object], repeats: int) -> float:
    f()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return float(np.median(times))


def measure(vocab: int, space_name: str, repeats: int = 3) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args = cli.override(flm.Args(), SIZES[vocab] | dict(space=space_name))
    m, a = args.model, args.train
    net = flm.DiT(m, vocab)
    width = flm.make_space(net, space_name).width
    tokens, t = torch.randint(0, vocab, (a.batch, m.length)), torch.rand(a.batch)

    def step() -> None:
        net.zero_grad()
        xi = torch.randn(a.batch, m.length, width)
        flm.flm_loss(net, tokens, t, t, xi, args.flow, a.loss_rows).backward()

    def read() -> None:
        net.zero_grad()
        space, s = flm.make_space(net, space_name), t[:, None, None]
        noise = space.noise(torch.randn(a.batch, m.length, width))
        space.read((1 - s) * noise + s * space.tokens(tokens)).sum().backward()

    whole, peak = cpu_seconds(step, repeats), memory(torch.device("cpu")) / 2**30
    part = cpu_seconds(read, repeats)
    net.zero_grad()
    clock, calls = flm.Clock(flm.accuracy_table(vocab)), 3
    rows = min(a.batch, 16)
    with torch.no_grad():
        space = flm.make_space(net.eval(), space_name)
        x = space.noise(torch.randn(rows, m.length, width))
        call = cpu_seconds(lambda: flm.sample_euler(net, x, calls, clock, space), repeats) / calls
    print(
        f"| {vocab:,} | {m.layers}x{m.width}, L {m.length}, {a.batch} rows | {space_name} | {whole:.2f} | "
        f"{a.batch * m.length / whole:,.0f} | {part:.3f} | {part / whole:.1%} | {peak:.2f} | "
        f"{call * 1e3 / rows:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), sys.argv[2])
    else:
        print("| V | network | space | step (s) | tokens/s | input (s) | share | peak GiB | ms per row and call |")
        print("|---:|---|---|---:|---:|---:|---:|---:|---:|")
        for vocab in SIZES:
            for name in ("onehot", "embedding"):
                subprocess.run([sys.executable, __file__, str(vocab), name], check=True)
