"""How much of its neighbours a trained FLM denoiser uses, beside the same network trained for that alone.

    python benchmarks/masked.py runs/flm_s1 --steps 3000    # a quarter of an hour; writes benchmarks/flm/masked.json

Three instruments on held-out rows, cross entropy in nats per token:

- *masked alone*: the network of the run, 30 % of the tokens replaced by one learnt vector and the others clean, trained
  for those tokens alone, on the same rows with the same optimizer. After every 300 steps.
- *clean neighbours*: the trained denoiser, its 30 % with noise only (or noise around the mean token), the others
  without any, at several tau. No row of its training looks so: there all tokens of a row have the same noise.
- *in law*: all tokens noised as in training. Beside the cross entropy of the network that of a token's own evidence,
  softmax(log pi + log N(x; t E_v, (1 - t)^2 E^T E)): what is left is what the neighbours bring.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flm_train as flm
from common import cli
from common.batches import row_order
from common.runlog import write_json
from common.start import load_run
from common.text import load_text
from runs import ROOT

SHARE = 0.3  # of the tokens, masked
ROWS = 256  # held-out rows
EVERY = 300  # steps between evaluations of the network trained for masked tokens alone
TAUS = (0.02, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
WEIGHTS = (flm.DiT, flm.Clock, flm.EmbeddingSpace, flm.OneHotSpace, flm.interpolant)


def cross_entropy(logits: Tensor, tokens: Tensor, where: Tensor | None = None) -> float:
    """Mean nats of logits (B, L, V) at tokens (B, L), over the places of a mask (B, L)."""
    nats = F.cross_entropy(logits.mT.double(), tokens, reduction="none")  # (B, L)
    return float((nats if where is None else nats[where]).mean())


def masked_alone(args: flm.Args, train: np.ndarray, held: Tensor, mask: Tensor, vocab: int) -> dict[int, float]:
    """{steps: cross entropy of the masked tokens} of a network trained for them."""
    torch.manual_seed(args.run.seed)
    a, net = args.train, flm.DiT(args.model, vocab)
    vector = nn.Parameter(0.06 * torch.randn(args.model.width))  # as long as a row of E at the start
    params = [*net.parameters(), vector]
    opt = torch.optim.AdamW(params, lr=a.lr, betas=(0.9, a.beta2), weight_decay=0)

    def predict(tokens: Tensor, where: Tensor) -> Tensor:
        return net(torch.where(where[..., None], vector, net.embed[tokens]), torch.zeros(len(tokens)))

    found = {}
    for step in range(a.total_steps):
        rows = row_order(step, a.batch, len(train), args.run.seed)
        tokens = torch.from_numpy(train[rows].astype(np.int64))  # (B, L)
        where = torch.rand(tokens.shape) < SHARE
        for group in opt.param_groups:
            group["lr"] = flm.learning_rate(step, a)
        loss = F.cross_entropy(predict(tokens, where)[where], tokens[where])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, a.clip)
        opt.step()
        if (step + 1) % EVERY == 0 or step + 1 == a.total_steps:
            with torch.no_grad():
                logits = torch.cat([predict(*part) for part in zip(held.split(32), mask.split(32), strict=True)])
            found[step + 1] = cross_entropy(logits, held, mask)
            print(f"masked alone, step {step + 1}: {found[step + 1]:.3f}", flush=True)
    return found


@torch.no_grad()
def denoiser(net: flm.DiT, held: Tensor, mask: Tensor, pi: Tensor) -> dict[str, list[float]]:
    """Cross entropy by tau: with clean neighbours at masked tokens, in law, and of the own evidence in law."""
    space, clock = flm.EmbeddingSpace(net.embed), flm.Clock(flm.accuracy_table(len(pi)))
    precise = net.embed.double()
    white = precise @ torch.linalg.inv(precise.mT @ precise)  # (V, d), E (E^T E)^-1
    norm = (white * precise).sum(-1)  # (V,)
    clean, mean = space.tokens(held), pi.float() @ net.embed
    found: dict[str, list[float]] = {name: [] for name in ("noise", "mean", "network", "own")}
    for tau in TAUS:
        t = float(clock.t(torch.tensor([tau], dtype=torch.float64)))
        noise = (1 - t) * space.noise(torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)))

        def predict(x: Tensor, tau: float = tau) -> Tensor:
            """Logits after two passes, the second with the first's prediction, in parts."""
            out = []
            for part in x.split(32):
                at = torch.full((len(part),), tau, dtype=torch.float64)
                first = net(part, at)
                out.append(net(flm.recalled(net, part, first.softmax(-1)), at))
            return torch.cat(out)

        for name, fill in (("noise", torch.zeros_like(mean)), ("mean", mean)):
            x = torch.where(mask[..., None], noise + t * fill, t * clean)
            found[name].append(cross_entropy(predict(x), held, mask))
        x = noise + t * clean
        evidence = (t * x.double() @ white.mT - t * t * norm / 2) / (1 - t) ** 2  # (B, L, V)
        found["network"].append(cross_entropy(predict(x), held))
        found["own"].append(cross_entropy(pi.log() + evidence, held))
        print(f"tau {tau}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of flm_train.py")
    parser.add_argument("--steps", type=int, default=3_000, help="of the network trained for masked tokens alone")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    saved = load_run(asked.run, WEIGHTS)
    args = cli.override(flm.Args(), saved["args"])
    args.train.total_steps = asked.steps
    data = load_text(args.run.data, length=args.model.length, data_dir=ROOT / "data", tokenizer=args.model.tokenizer)
    vocab = data.tokenizer.vocab_size
    held = torch.from_numpy(data.valid[:ROWS].astype(np.int64))
    mask = torch.rand(held.shape, generator=torch.Generator().manual_seed(0)) < SHARE
    counts = torch.from_numpy(data.counts()).double() + 1
    pi = counts / counts.sum()
    net = flm.DiT(args.model, vocab)
    net.load_state_dict(saved["ema"])
    found = {
        "unigram": cross_entropy(pi.log().expand(*held.shape, -1), held, mask),
        "tau": list(TAUS),
        **denoiser(net.eval(), held, mask, pi),
        "masked alone": masked_alone(args, data.train, held, mask, vocab),
    }
    write_json(ROOT / "benchmarks" / "flm" / "masked.json", found)


if __name__ == "__main__":
    main()
