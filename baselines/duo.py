"""Duo: a language model that undoes random replacements of its tokens; DCD distils it to few network calls.

Paper: "The Diffusion Duality", arXiv 2506.10892; [C]: the authors' code, s-sahoo/duo 7c9b498. [B n], [P n]: sections of
docs/baselines.md and docs/flm_train.md; [deviation: why] marks where we differ.

Noise redraws tokens from the whole vocabulary. A transformer predicts the clean ones from all the noised ones, and the
posterior of a lower noise level makes a sampler of it. The argmax of FLM's noisy one-hots has this very law: half of
the training reads their softmax instead, which is easier. Along the Gaussian path a student learns to predict from
noisier tokens what its teacher does from cleaner ones: discrete consistency distillation, DCD.

    python baselines/duo.py                             # six novels of Jane Austen, shipped with the repository
    python baselines/duo.py --data toy                  # synthetic language with a known distribution, a minute
    python baselines/duo.py --loss ce                   # cross entropy of replaced tokens instead of the bound
    python baselines/duo.py --distill runs/DUO_RUN      # DCD: a student for few calls
    python baselines/duo.py --eval runs/NAME --steps 1 4 16 64 --greedy-tail    # --resume, torchrun as flm_train.py

Symbols
    paper               here                 shape
    x                   tokens               (B, L)       clean token ids below V
    z_t                 x                    (B, L)       noised token ids
    t                   u                    (B,)         time; 0: data, 1: noise
    alpha_t             alpha                (B,)         chance that a token is kept; the network reads it as its tau
    -d alpha / dt       rate                 (B,)
    w_t                 w, gamma             (B, L, V)    sqrt(sigmoid(-gamma)) onehot(x) + sqrt(sigmoid(gamma)) xi
    x_theta             probs                (B, L, V)    prediction: softmax of the capped logits
    E                   net.embed            (V, d)       input embedding
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch: waiting threads spin a little, and starve no other

import copy
import functools
import math
import sys
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for common/
from common import checkpoint, cli
from common.batches import Ranks, micro_batches, mixed_seed, row_noise, rows_at_once, token_ids
from common.machine import use_bf16
from common.meter import Meter
from common.ranges import Count, Fraction, Helpers, Natural, NonNegative, Positive, RowLength, Seed, Several, Size, Unit
from common.runlog import Averages, write_json
from common.start import CHECKPOINT, load_run, pick_device, start
from common.tensors import flex_attention, interpolate, sum_by_rows
from common.text_run import TextRun, check_fit, load_averaged, load_judge, open_text, saved_args

# --- Arguments. Values below are those of the embedded corpus; SETTINGS holds what other data change. ----------------


@dataclass
class RunArgs:
    """What to run, and where its files go."""

    distill: str = ""  # run folder of this script to distil (DCD); empty: learn from the data
    data: str = "austen"  # the teacher's; else austen, captions, toy, lm1b, openwebtext, a file, a folder or a hub name
    seed: Seed = 1  # seeds weights, row order, times and noise
    eval: str = ""  # run folder to evaluate: no training
    resume: str = ""  # run folder to continue from its newest checkpoint, exactly as if it had not stopped
    run_name: str = ""  # name of the run folder; default: duo, data, seed and time
    run_dir: str = "runs"  # folder of all run folders
    data_dir: str = "data"  # where tokenized data, tokenizers and judges are cached
    device: str = "auto"  # torch device; auto: cuda if there is one, else cpu
    threads: Helpers = 0  # torch threads on a CPU; 0: torch's default
    compile: bool = False  # torch.compile the network; on a CPU it needs a C++ compiler and pays after minutes
    wandb_project: str = ""  # also log to this Weights & Biases project
    tensorboard: bool = False  # also log to TensorBoard files in the run folder
    log_every: Count = 50  # steps between lines of metrics.jsonl
    eval_every: Count = 1_000  # steps between validations, each with a few samples
    checkpoint_every: Count = 500  # steps between checkpoints; the last two are kept


@dataclass
class ModelArgs:
    """DiT denoiser [P 3]."""

    length: RowLength = 64  # L, tokens per row
    tokenizer: str = ""  # austen, gpt2, bert-base-uncased, own (trained on the text); default: the data's usual one
    tokenizer_path: str = ""  # file or folder of the tokenizer's files, instead of fetching them
    layers: Size = 4  # transformer blocks
    width: Several = 256  # d
    heads: Size = 4  # attention heads
    cond_width: Size = 128  # width of the time embedding
    conv: Natural = 3  # width of a depthwise convolution in front of attention and of the MLP; paper: 0, none
    self_condition: Unit = 0.0  # share of the steps in which it also reads its first prediction; paper: 0
    dropout: Fraction = 0.0  # on both residual branches; paper: 0.1
    logit_cap: NonNegative = 30.0  # logits become cap * tanh(logits / cap); 0: off
    attention_cap: NonNegative = 50.0  # the same for attention scores; 0: off
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of blocks and output layer; auto: bf16 where it is fast


@dataclass
class DuoArgs:
    """Noise, loss and distillation [B 10.1-10.3]."""

    loss: Literal["bound", "ce"] = "bound"  # bound of the likelihood (paper), or cross entropy of replaced tokens
    curriculum: Unit = 0.5  # share of the steps, the first ones, that read Gaussian states
    soft: Positive = 1e-3  # temperature of the softmax of Gaussian states
    grid: Several = 64  # DCD: the teacher's tokens are 1 / grid of the time cleaner, in every further stage twice that
    stages: Size = 6  # DCD: equal parts of the training; at the start of each the student becomes the teacher


@dataclass
class TrainArgs:
    """Optimization [P 4]."""

    total_steps: Count = 3_000  # optimizer steps
    batch: Size = 16  # rows per optimizer step, over all processes
    micro_batch: Natural = 16  # rows per forward pass of one process (gradient accumulation); 0: all, best on a GPU
    loss_rows: Natural = 0  # rows whose logits exist at a time, the rest is recomputed: bounds memory; 0: all
    lr: NonNegative = 2e-3  # peak learning rate
    warmup: Natural = 100  # steps of linear warm-up
    decay: Unit = 0.3  # last share of the steps, over which the learning rate falls linearly to 0; paper: 0
    beta2: Fraction = 0.98  # AdamW
    clip: Positive = 1.0  # gradient-norm clip
    ema: Fraction = 0.99  # decay of the averaged weights, min(ema, (1 + n) / (10 + n)); they are what samples


@dataclass
class SampleArgs:
    """Sampling and evaluation [B 10.4]."""

    steps: tuple[Size, ...] = (1, 2, 4, 8, 16, 32, 128)  # numbers of network calls to evaluate
    samples: Size = 256  # texts per number of steps
    temperature: Positive = 1.0  # of the predictions; below 1: likelier tokens, less entropy
    top_p: Unit = 1.0  # of a prediction only the likeliest tokens that have this much probability together
    greedy_tail: bool = False  # the last call gives its likeliest tokens, not a draw: less entropy at few calls
    judge: str = "ngram"  # ngram, smollm2, gpt2, gpt2-medium, gpt2-large, gpt2-xl
    judge_path: str = ""  # file or folder of the judge's weights, instead of fetching them
    show: Natural = 3  # samples printed


@dataclass
class Args:
    run: RunArgs = field(default_factory=RunArgs)
    model: ModelArgs = field(default_factory=ModelArgs)
    duo: DuoArgs = field(default_factory=DuoArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    sample: SampleArgs = field(default_factory=SampleArgs)


PAPER = dict(
    layers=12, width=768, heads=12, dropout=0.1, total_steps=1_000_000, batch=512, micro_batch=0, lr=3e-4, warmup=2_500,
    decay=0.0, beta2=0.999, ema=0.9999, eval_every=5_000, checkpoint_every=5_000, samples=1024, judge="gpt2-large",
    steps=(8, 32, 128, 1024), conv=0,
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # data -> changes to the defaults
    "lm1b": PAPER | dict(length=128, loss_rows=32),
    "openwebtext": PAPER | dict(length=1024, loss_rows=4),
    "captions": dict(
        length=32, dropout=0.1, batch=32, micro_batch=32, total_steps=1_000, steps=(1, 4, 8, 32),
    ),
    "toy": dict(
        length=8, layers=2, width=128, heads=4, batch=128, micro_batch=0, total_steps=500, lr=3e-3, warmup=50,
        eval_every=250, checkpoint_every=250, samples=2_048, steps=(32,), precision="fp32", conv=0,
    ),
}  # fmt: skip
PAPER_DCD = dict(grid=512, stages=5, total_steps=50_000, batch=128, lr=6e-5, warmup=500, ema=0.999, steps=(1, 2, 4, 8))
DISTILL: dict[str, dict[str, Any]] = {  # the same of distillation, on top of them
    "lm1b": PAPER_DCD,
    "openwebtext": PAPER_DCD,
    "toy": dict(lr=1e-3, beta2=0.95, total_steps=600, eval_every=300, checkpoint_every=300, steps=(1, 4, 32)),
}  # fmt: skip


def default_args(distill: str = "", data: str = "austen") -> Args:
    """Defaults for some data: the dataclasses, then its rows of the tables; data and network are the teacher's."""
    taken = saved_args(load_run(Path(distill), WEIGHTS), distill, ("data", *vars(ModelArgs())), {}) if distill else {}
    data = taken.get("data", data)
    name = data.split(":")[0]  # "lm1b:PATH" takes the rows of lm1b
    values = SETTINGS.get(name, {}) | (DISTILL.get(name, dict(lr=3e-4, beta2=0.95)) if distill else {})
    return cli.override(Args(), dict(data=data) | values | dict(distill=distill) | taken)


# --- Noise levels: of replaced tokens, and of the Gaussian states whose argmax they are ------------------------------


def accuracy_table(vocab: int, points: int = 10_000) -> Tensor:
    """(2, n) float64, rows t and tau(t), both strictly increasing from 0 to 1 [P 1.3].

    The argmax of a noised one-hot t e_y + (1 - t) eps is y with probability q = E_z[Phi(z + t / (1 - t))^(V - 1)];
    tau rescales q from [1/V, 1] to [0, 1]. Trapezoid rule in z, exact to rounding [deviation: the released code takes
    100 Gauss-Hermite nodes, up to 1e-4 off].
    """
    t = torch.arange(points, dtype=torch.float64) / points
    z = torch.linspace(-9, 9, 1_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z**2)
    weight /= weight.sum()
    q = torch.cat([
        torch.exp((vocab - 1) * torch.special.log_ndtr(z + (part / (1 - part))[:, None])) @ weight
        for part in t.split(1_000)
    ])  # fmt: skip
    tau = (vocab * q - 1) / (vocab - 1)
    tau[0] = 0
    keep = torch.cat([torch.tensor([True]), tau[1:] > torch.cummax(tau, 0).values[:-1]]) & (tau < 1)
    return torch.stack([torch.cat([row[keep], torch.ones(1, dtype=torch.float64)]) for row in (t, tau)])


EPS = 1e-3  # alpha ends this far from 0 and 1 in training [C]
CURRICULUM = (0.945, 0.049)  # alpha at u = 0 and 1: what the authors' windows of gamma are for their vocabularies
DCD = (0.9987, 0.0062)  # the same of distillation


def linear(u: Tensor) -> tuple[Tensor, Tensor]:
    """Time u (B,) -> alpha, rate (B,): alpha falls from 1 - EPS to EPS."""
    return 1 - EPS - (1 - 2 * EPS) * u, torch.full_like(u, 1 - 2 * EPS)


def gaussian(u: Tensor, window: tuple[float, float], table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Time u (B,) float64 -> gamma, alpha, rate (B,): gamma goes linearly between the alphas of the window [B 10.2].

    The states are FLM's up to scale: exp(-gamma / 2) = t / (1 - t) is signal over noise, and alpha its tau(t), rows of
    the accuracy table. The rate is a central difference [C].
    """
    t, tau, h = *table, 5e-3
    low, high = (-2 * torch.special.logit(interpolate(tau.new_tensor(window), tau, t))).tolist()
    gamma = low + (high - low) * torch.stack([u - h, u, u + h])
    alpha = interpolate(torch.sigmoid(-gamma / 2), t, tau)
    return gamma[1], alpha[1], (alpha[0] - alpha[2]) / (2 * h)


def replace_tokens(tokens: Tensor, alpha: Tensor, xi: Tensor, vocab: int) -> Tensor:
    """tokens (B, L), each kept with chance alpha (B,) or drawn from all V; xi (B, 2, L) standard normal."""
    keep, which = torch.special.ndtr(xi.double()).unbind(1)
    return torch.where(keep < alpha[:, None], tokens, (vocab * which).long().clamp(max=vocab - 1))


def soft_tokens(tokens: Tensor, gamma: Tensor, xi: Tensor, soft: float) -> tuple[Tensor, Tensor]:
    """softmax(w / soft) (B, L, V) of Gaussian states w, and their argmax (B, L) [B 10.2].

    tokens (B, L), gamma (B,), xi (B, L, V) standard normal.
    """
    signal, noise = (torch.sigmoid(g).sqrt()[:, None, None] / soft for g in (-gamma, gamma))
    w = (noise * xi).scatter_add_(-1, tokens[..., None], signal.expand_as(tokens[..., None]))  # w / soft
    return w.softmax(-1), w.argmax(-1)


def path_tokens(tokens: Tensor, gammas: list[Tensor], xi: Tensor, vocab: int) -> list[Tensor]:
    """Argmax (B, L) of the Gaussian states at each gamma (B,), all with the same V normal draws per token [B 10.3].

    xi (B, 3, L) standard normal: the token's own draw, and the largest of the V - 1 others and whose it is. No more
    matters to the argmax: the same law without V draws.
    """
    own, largest, whose = xi.double().unbind(1)
    top = -torch.special.ndtri(-torch.expm1(torch.special.log_ndtr(largest) / (vocab - 1)))  # P(top < x) = Phi(x)^(V-1)
    other = (torch.special.ndtr(whose) * (vocab - 1)).long().clamp(max=vocab - 2)
    other = other + (other >= tokens)
    return [torch.where((-g / 2).exp()[:, None] + own > top, tokens, other) for g in gammas]


# --- Loss ------------------------------------------------------------------------------------------------------------


def bound(probs: Tensor, tokens: Tensor, x: Tensor, alpha: Tensor, rate: Tensor) -> Tensor:
    """Bound of -log p(tokens) per token, at a time drawn uniformly: (B, L) >= 0, 0 where probs = e_token [B 10.1].

    It is the limit s -> t of KL(q(x_s | x, e_token) || q(x_s | x, probs)) / (t - s). probs (B, L, V); tokens, x (B, L);
    alpha, rate (B,). With k = V alpha / (1 - alpha), c = 1 + k e_token, b = 1 + k probs and z = c_x / b_x it is
    rate / (V alpha c_x) (sum_j c_j log(c_j / b_j) + (V + k) (z - 1 - log z)); c has two values: one sum over V a token.
    """
    vocab, alpha, rate = probs.shape[-1], alpha[:, None], rate[:, None]
    k = vocab * alpha / (1 - alpha)  # (B, 1)
    log_b = torch.log1p(k[..., None] * probs)  # (B, L, V)
    at_token, at_x = (log_b.gather(-1, y[..., None]).squeeze(-1) for y in (tokens, x))
    same = (x == tokens).to(probs.dtype)
    log_c = same * torch.log1p(k)  # of c_x
    off = k * (same - probs.gather(-1, x[..., None]).squeeze(-1)) * (-at_x).exp()  # z - 1
    total = (1 + k) * torch.log1p(k) - k * at_token - log_b.sum(-1) + (vocab + k) * (off - log_c + at_x)
    return rate / (vocab * alpha) * (-log_c).exp() * total


def second_reading(net: DiT, h: Tensor, alpha: Tensor, rows: int) -> Tensor:
    """Input h (B, L, d) and the network's own prediction from it, made without gradient [P 3]."""
    with torch.no_grad():
        parts = zip(h.split(rows or len(h)), alpha.split(rows or len(h)), strict=True)
        mean = torch.cat([net(*part).softmax(-1) @ net.embed for part in parts])
    return h + net.recall(mean)


def duo_loss(
    net: DiT, h: Tensor, tokens: Tensor, x: Tensor, alpha: Tensor, rate: Tensor, kind: str, rows: int = 0,
    twice: bool = False,
) -> Tensor:  # fmt: skip
    """Mean over tokens of the bound, or of the cross entropy of replaced tokens, unweighted over time [B 10.1].

    h (B, L, d) is what the network reads of x; tokens and x (B, L), alpha and rate (B,) -> scalar. rows: whose logits
    exist at a time; 0: all. Both losses have one optimum, the law of a token given all *other* noised ones.
    [deviation: SDDLM, arXiv 2510.22926, has the indicator of a replaced token, not its chance, and a contrastive term]
    """
    h, cond = net.trunk(second_reading(net, h, alpha, rows) if twice else h, alpha)

    def of_rows(h: Tensor, cond: Tensor, tokens: Tensor, x: Tensor, alpha: Tensor, rate: Tensor) -> Tensor:
        logits = net.head(h, cond)
        if kind == "bound":
            return bound(logits.softmax(-1), tokens, x, alpha, rate).sum()
        equal = (1 - alpha) / (len(net.embed) * alpha + 1 - alpha)  # chance that an equal token was drawn anew
        ce = F.cross_entropy(logits.mT, tokens, reduction="none")  # (B, L)
        return (torch.where(x == tokens, equal[:, None], 1.0) * ce).sum()

    return sum_by_rows(of_rows, rows, h, cond, tokens, x, alpha, rate) / tokens.numel()


def dcd_loss(
    net: DiT, teacher: DiT, x: Tensor, x_s: Tensor, alpha: Tensor, alpha_s: Tensor, rows: int = 0, twice: bool = False
) -> Tensor:  # fmt: skip
    """KL(student at x || teacher at x_s, less noisy on the same path), mean over tokens [B 10.3].

    x and x_s (B, L), alpha and alpha_s (B,) -> scalar. rows, twice: as in duo_loss; the teacher reads twice if it can.
    """
    h, h_s = net.embed[x], teacher.embed[x_s]
    h, cond = net.trunk(second_reading(net, h, alpha, rows) if twice else h, alpha)
    with torch.no_grad():
        target = teacher.trunk(second_reading(teacher, h_s, alpha_s, rows) if teacher.recall else h_s, alpha_s)

    def kl(h: Tensor, cond: Tensor, *target: Tensor) -> Tensor:
        p, q = net.head(h, cond).log_softmax(-1), teacher.head(*target).log_softmax(-1)
        return (p.exp() * (p - q)).sum()

    return sum_by_rows(kl, rows, h, cond, *target) / x.numel()


def stratified_times(step: int, batch: int, seed: int) -> Tensor:
    """(batch,) uniform in [0, 1], one in each of `batch` equal intervals, in random order [P 1.2]."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, 1, step))
    place = torch.randperm(batch, generator=generator)
    return (place + torch.rand(batch, generator=generator, dtype=torch.float64)) / batch


def makes_two_passes(step: int, share: float, seed: int) -> bool:
    """Whether a training step is one of `share` of them, drawn at random."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, 4, step))
    return torch.rand((), generator=generator).item() < share


# --- Sampler ---------------------------------------------------------------------------------------------------------


def posterior(p: Tensor, x: Tensor, alpha: Tensor, alpha_s: Tensor) -> Tensor:
    """q(x_s | x, p) (B, L, V) at alpha_s > alpha, scalars, of a clean token of law p (B, L, V); x (B, L) [B 10.1]."""
    vocab, kept = p.shape[-1], alpha / alpha_s
    own = vocab * alpha * p.gather(-1, x[..., None])  # (B, L, 1)
    q = ((alpha_s - alpha) * p).add_((1 - kept) * (1 - alpha_s) / vocab)
    return q.scatter_add_(-1, x[..., None], own + kept - alpha).div_(own + 1 - alpha)


def tempered(probs: Tensor, temperature: float, top_p: float) -> Tensor:
    """probs^(1 / temperature) (..., V), restricted to the nucleus top_p, in float64; sums to 1."""
    p = probs.double()
    if temperature != 1:
        p = (p.clamp(min=1e-30).log() / temperature).softmax(-1)
    if top_p < 1:
        high, order = p.sort(-1, descending=True)
        high = torch.where(high.cumsum(-1) - high <= top_p, high, 0.0)  # the most probable token always stays
        p = torch.zeros_like(p).scatter_(-1, order, high)
    return p / p.sum(-1, keepdim=True)


def pick(p: Tensor, uniform: Tensor) -> Tensor:
    """Token ids (...,) of law p (..., V) at uniform (...,), both float64: rounding must not lose rare tokens."""
    total = p.cumsum(-1)
    place = torch.searchsorted(total, uniform[..., None] * total[..., -1:], right=True)
    return place.clamp(max=p.shape[-1] - 1).squeeze(-1)


def recalled(net: DiT, h: Tensor, probs: Tensor | None) -> Tensor:
    """x E (B, L, d) and what the network has learnt to read of its last prediction (B, L, V) [P 3]."""
    return h if net.recall is None or probs is None else h + net.recall(probs @ net.embed)


def sample_ancestral(net: DiT, x: Tensor, steps: int, sample: SampleArgs, generator: torch.Generator) -> Tensor:
    """Draws from the posteriors at alpha = 0, 1/N, ..., 1 in N calls: x (B, L) uniform tokens -> (B, L) [B 10.4].

    [deviation: the authors go to t = 1e-5 in N calls and clean up with one more, by a draw or the argmax]
    """
    alphas, probs = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=x.device), None
    for alpha, alpha_s in pairwise(alphas):
        probs = net(recalled(net, net.embed[x], probs), alpha.expand(len(x))).softmax(-1)  # (B, L, V)
        p = tempered(probs, sample.temperature, sample.top_p)
        uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
        x = pick(posterior(p, x, alpha, alpha_s), uniform)
    return p.argmax(-1) if sample.greedy_tail else x


@torch.no_grad()
def generate(net: DiT, args: Args, samples: int, steps: int) -> Tensor:
    """`samples` texts (samples, L) in `steps` network calls each; a function of the weights and the seed."""
    net.eval()
    device, texts = net.embed.device, []
    generator = torch.Generator(device).manual_seed(args.run.seed)
    rows = rows_at_once(device, args.model.length)
    for done in range(0, samples, rows):
        shape = (min(rows, samples - done), args.model.length)
        x = torch.randint(len(net.embed), shape, generator=generator, device=device)
        texts.append(sample_ancestral(net, x, steps, args.sample, generator))
    return torch.cat(texts)


def sampler_tag(sample: SampleArgs, usual: SampleArgs) -> str:
    """Part of the names of the files of an evaluation; empty for the usual sampler of the data."""
    how = f"_t{sample.temperature:g}_p{sample.top_p:g}" + ("_greedy" if sample.greedy_tail else "")
    own = (sample.temperature, sample.top_p, sample.greedy_tail) != (usual.temperature, usual.top_p, usual.greedy_tail)
    return how if own else ""


# --- Network ---------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """Bidirectional attention, scores softly capped, (B, heads, L, d / heads) each [P 3].

    Written out: at short length faster than the fused kernels on a CPU, and those have no cap.
    """
    if q.is_cuda and cap and q.shape[2] >= 256:
        return flex_attention()(q, k, v, score_mod=lambda score, b, h, i, j: cap * torch.tanh(score / cap))
    if not cap and (q.is_cuda or q.shape[2] >= 256):
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if cap:
        scores = cap * torch.tanh(scores / cap)
    return scores.softmax(-1).to(v.dtype) @ v


class TimeEmbedding(nn.Module):
    """Sinusoids of tau, then a small MLP: (B,) -> (B, cond_width)."""

    def __init__(self, cond_width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond_width), nn.SiLU(), nn.Linear(cond_width, cond_width))

    def forward(self, tau: Tensor) -> Tensor:
        frequency = torch.exp(torch.arange(128, device=tau.device) * (-math.log(10_000) / 128))
        angle = tau.to(self.mlp[0].weight.dtype)[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))


class ShortConv(nn.Module):
    """x plus a depthwise convolution of it over neighbouring tokens, (B, L, d) -> (B, L, d) [P 3].

    Written out as sums of shifted rows: on a CPU twice as fast as conv1d.
    """

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(width, d).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        width, length = len(self.weight), x.shape[1]
        padded, y = F.pad(x, (0, 0, width // 2, (width - 1) // 2)), x + self.bias
        for place, weight in enumerate(self.weight):
            y = y + weight * padded[:, place : place + length]
        return y


class Block(nn.Module):
    """Attention and MLP, each with layer norm, shift, scale and gate from the time (adaLN, zero at the start)."""

    def __init__(self, m: ModelArgs) -> None:
        super().__init__()
        self.heads, self.cap, self.dropout, d = m.heads, m.attention_cap, m.dropout, m.width
        self.norm1, self.norm2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.conv1, self.conv2 = (ShortConv(d, m.conv) if m.conv else nn.Identity() for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.modulation = zero(nn.Linear(m.cond_width, 6 * d))

    def forward(self, x: Tensor, cond: Tensor, rope: Tensor) -> Tensor:
        """x (B, L, d), cond (B, cond_width), rope (2, L, d / heads / 2) -> (B, L, d)"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)[:, None].chunk(6, -1)
        x = self.conv1(x)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, d / heads)
        y = attention(rotate(q, rope), rotate(k, rope), v, self.cap).transpose(1, 2).flatten(2)
        x = self.conv2(x + gate1 * F.dropout(self.out(y), self.dropout, self.training))
        return x + gate2 * F.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2), self.dropout, self.training)


def zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary position embedding, halves rotated against each other."""
    a, b = x.chunk(2, -1)
    cos, sin = rope[0].to(x.dtype), rope[1].to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class DiT(nn.Module):
    """Bidirectional diffusion transformer: x E (B, L, d) and one or two times (B,) -> logits (B, L, V) [P 3].

    At the start all logits are 0. `trunk` and `head` are separate so that a loss can make logits a few rows at a time.
    """

    rope: Tensor

    def __init__(self, m: ModelArgs, vocab: int, times: int = 1) -> None:
        super().__init__()
        self.cap, self.precision = m.logit_cap, m.precision
        bound = 1 / math.sqrt(m.width)
        self.embed = nn.Parameter(torch.empty(vocab, m.width).uniform_(-bound, bound))  # E (V, d)
        self.times = nn.ModuleList(TimeEmbedding(m.cond_width) for _ in range(times))
        self.blocks = nn.ModuleList(Block(m) for _ in range(m.layers))
        self.recall = nn.Linear(m.width, m.width, bias=False) if m.self_condition else None  # of the last prediction
        if self.recall is not None:
            nn.init.eye_(self.recall.weight)
        self.norm = nn.LayerNorm(m.width, bias=False)
        self.modulation = zero(nn.Linear(m.cond_width, 2 * m.width))
        self.output = zero(nn.Linear(m.width, vocab))
        half = m.width // m.heads // 2
        angle = torch.arange(m.length)[:, None] * torch.exp(torch.arange(half) * (-math.log(10_000) / half))
        self.register_buffer("rope", torch.stack([angle.cos(), angle.sin()]), persistent=False)  # (2, L, half)

    def trunk(self, h: Tensor, *tau: Tensor) -> tuple[Tensor, Tensor]:
        """-> features (B, L, d), cond (B, cond_width)"""
        cond = F.silu(sum(embed(t) for embed, t in zip(self.times, tau, strict=True)))
        with torch.autocast(h.device.type, torch.bfloat16, enabled=use_bf16(self.precision, h.device)):
            for block in self.blocks:
                h = block(h, cond, self.rope)
        return h, cond

    def head(self, h: Tensor, cond: Tensor) -> Tensor:
        """features (B, L, d), cond (B, cond_width) -> capped logits (B, L, V), float32"""
        with torch.autocast(h.device.type, torch.bfloat16, enabled=use_bf16(self.precision, h.device)):
            shift, scale = self.modulation(cond)[:, None].chunk(2, -1)
            logits = self.output(self.norm(h) * (1 + scale) + shift)
        logits = logits.to(self.output.weight.dtype)
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def forward(self, h: Tensor, *tau: Tensor) -> Tensor:
        return self.head(*self.trunk(h, *tau))


# --- Training --------------------------------------------------------------------------------------------------------


def learning_rate(step: int, a: TrainArgs) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last share `decay` of the steps."""
    left = (a.total_steps - step) / (a.decay * a.total_steps) if a.decay else 1.0
    return a.lr * min(1.0, (step + 1) / max(a.warmup, 1), left)


@torch.no_grad()
def validate(net: DiT, rows: np.ndarray, times: int) -> dict[str, float]:
    """Bound per token of rows (n, L) at `times` times each, with fixed noise: mean, its error, quarters of the time."""
    net.eval()
    device, count = net.embed.device, len(rows)
    at_once, bounds = rows_at_once(device, rows.shape[1]), []
    for k, first in product(range(times), range(0, count, at_once)):  # in the order of the times
        places = range(first, min(first + at_once, count))
        u = (k + (torch.tensor(places, dtype=torch.float64, device=device) + 0.5) / count) / times
        alpha, rate = (value.float() for value in linear(u))
        tokens = token_ids(rows[places.start : places.stop], device)
        x = replace_tokens(tokens, alpha, row_noise(k, places, (2, tokens.shape[1]), 0, device), len(net.embed))
        bounds.append(bound(net(net.embed[x], alpha).softmax(-1), tokens, x, alpha, rate).mean(1))
    loss = torch.cat(bounds).double()  # (times n,)
    error = loss.view(times, count).mean(0).std().item() / math.sqrt(count)
    quarters = {f"valid/bound_quarter{i + 1}": q.mean().item() for i, q in enumerate(loss.chunk(4))}
    return {"valid/bound": loss.mean().item(), "valid/bound_error": error} | quarters


def train(run: TextRun, net: DiT, table: Tensor, args: Args) -> DiT:
    """Optimize; log, evaluate and save when due. Draws are functions of seed and step. Returns the averaged net."""
    r, m, duo, a, ranks, device = args.run, args.model, args.duo, args.train, run.ranks, run.device
    ema = copy.deepcopy(net).requires_grad_(False)
    teacher = copy.deepcopy(net).requires_grad_(False).eval() if r.distill else None
    optimizer = torch.optim.AdamW(net.parameters(), lr=a.lr, betas=(0.9, a.beta2), weight_decay=0.0, fused=True)
    averages = Averages()  # metrics since the last line of the log
    run.open_log(a.total_steps, sum(p.numel() for p in net.parameters()), r.wandb_project, r.tensorboard)
    run.track(averages=averages, net=net, ema=ema, optimizer=optimizer, **({"teacher": teacher} if teacher else {}))
    meter = Meter(
        net, batch=a.batch, layers=m.layers, length=m.length, width=m.width, processes=ranks.world,
        bf16=use_bf16(m.precision, device), step=run.step,
        forwards=m.self_condition + (1 + (m.self_condition > 0) if teacher else 0),
    )  # fmt: skip
    if r.compile:
        net.trunk = torch.compile(net.trunk)
    vocab, few = len(net.embed), min(32, args.sample.samples)
    net.train()
    while not run.stop_requested() and run.step < a.total_steps:
        torch.manual_seed(mixed_seed(r.seed, 3, run.step, ranks.rank))  # dropout
        batch_u = stratified_times(run.step, a.batch, r.seed).to(device)  # (batch,)
        twice = makes_two_passes(run.step, m.self_condition, r.seed)
        stage = run.step * duo.stages // a.total_steps
        if teacher and stage != (run.step - 1) * duo.stages // a.total_steps:
            teacher.load_state_dict(net.state_dict())
        losses = []
        optimizer.zero_grad()
        for places, tokens in micro_batches(run.data.train, run.step, a.batch, a.micro_batch, r.seed, ranks, device):
            u = batch_u[places]
            draws = functools.partial(row_noise, run.step, seed=r.seed, device=device)
            if teacher:
                ahead = min(2**stage / duo.grid, 1)
                u = (u + ahead).clamp(max=1)
                (gamma, alpha, _), (gamma_s, alpha_s, _) = (gaussian(v, DCD, table) for v in (u, u - ahead))
                x, x_s = path_tokens(tokens, [gamma, gamma_s], draws(places, (3, m.length)), vocab)
                loss = dcd_loss(net, teacher, x, x_s, alpha.float(), alpha_s.float(), a.loss_rows, twice)
            else:
                if run.step < duo.curriculum * a.total_steps:
                    gamma, alpha, rate = gaussian(u, CURRICULUM, table)
                    rows = (range(p, p + 1) for p in places)  # one at a time, in a CPU's cache: V draws a token
                    read = [
                        soft_tokens(y, g.float(), draws(row, (m.length, vocab)), duo.soft)
                        for y, g, row in zip(tokens.split(1), gamma.split(1), rows, strict=True)
                    ]
                    mean, x = map(torch.cat, zip(*read, strict=True))
                    h = mean @ net.embed
                else:
                    alpha, rate = linear(u)
                    x = replace_tokens(tokens, alpha, draws(places, (2, m.length)), vocab)
                    h = net.embed[x]
                loss = duo_loss(net, h, tokens, x, alpha.float(), rate.float(), duo.loss, a.loss_rows, twice)
            loss = len(places) / (a.batch // ranks.world) * loss
            loss.backward()
            losses.append(loss.detach())
        ranks.average_gradients(net.parameters())
        grad_norm = nn.utils.clip_grad_norm_(net.parameters(), a.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, a)
        optimizer.step()
        decay = min(a.ema, (1 + run.step) / (10 + run.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        averages.add(ranks.mean({"loss": torch.stack(losses).sum(), "grad_norm": grad_norm}))
        run.step += 1

        if run.due(r.log_every):
            metrics = averages.take()
            run.stop_if_not_finite(metrics)
            run.log_training(metrics, meter.take(run.step))
        if run.due(r.eval_every) and ranks.chief:
            run.log_validation(validate(ema, run.data.valid[:256], 1))
            run.log_samples(functools.partial(generate, ema, args, few), (1, 32))
        if run.due(r.checkpoint_every):
            run.save()
    run.save()
    return ema


# What a checkpoint's weights fit: these arguments and definitions.
FIXED = (
    "distill",
    "data",
    "length",
    "layers",
    "width",
    "heads",
    "cond_width",
    "conv",
    "self_condition",
    "seed",
    "batch",
)
WEIGHTS = (DiT, posterior)


def main(argv: list[str]) -> None:
    args, saved, folder = start(
        argv, default_args, chosen_by=("distill", "data"), weights=WEIGHTS, folder_name="duo__{data}__s{seed}",
        fixed=FIXED,
    )  # fmt: skip
    r, m, sample = args.run, args.model, args.sample
    ranks, data_dir = Ranks.of_torchrun(), Path(r.data_dir)
    device = pick_device(r.device, r.threads, float64=True)
    torch.set_float32_matmul_precision("high")  # TF32 for the fp32 products of a GPU
    data = open_text(r.data, m.length, data_dir, m.tokenizer, m.tokenizer_path, ranks)
    vocab = data.tokenizer.vocab_size
    check_fit("onehot", vocab, m.width, m.heads, args.train.batch, ranks.world, sample.steps)
    judge = load_judge(sample.judge, sample.judge_path, data, data_dir, device) if ranks.chief else None
    torch.manual_seed(r.seed)
    net = DiT(m, vocab).to(device)
    if r.distill and not saved:
        load_averaged(net, checkpoint.load(Path(r.distill) / CHECKPOINT), data, r.distill)
    table = accuracy_table(vocab).to(device)
    run = TextRun(folder, saved, args=cli.flatten(args), ranks=ranks, device=device, data=data, judge=judge)
    with ranks, run:
        if r.eval:
            load_averaged(net, saved, data, r.eval)
        else:
            with run.stop:  # only here a signal has to wait
                net = train(run, net, table, args)
        if run.stop_requested():
            run.say(run.how_to_go_on())
        elif ranks.chief:
            if not (r.eval and (folder / "bound.json").exists()):
                held_out = validate(net, data.valid[:1024], 16)
                write_json(folder / "bound.json", held_out)
                print("held-out rows: bound per token {valid/bound:.3f} +- {valid/bound_error:.3f}".format(**held_out))
            make = functools.partial(generate, net, args, sample.samples)
            tag = sampler_tag(sample, default_args(data=r.data).sample)
            run.evaluate(make, sample.steps, sample.samples, sample.show, tag)


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
