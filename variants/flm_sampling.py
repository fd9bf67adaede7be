"""FLM sampled with autoguidance: away from the same network weakened by dropout. Beyond the paper.

Paper: "Flow Map Language Models: One-step Language Modeling via Continuous Denoising", arXiv 2602.16813 (v3; settings
of its later released code [C], whose differences to v1 docs/flm_train.md lists). [P n] are our section numbers there;
[deviation: why] marks where we differ.

A variant of flm_train.py: `diff flm_train.py variants/flm_sampling.py` shows all of it.

    python variants/flm_sampling.py --eval runs/FLM_RUN --guidance 1.5 --steps 32
    python variants/flm_sampling.py --eval runs/FLM_RUN --sampler euler --guidance 1.5

Symbols
    paper               here                 shape
    y                   tokens               (B, L)       token ids below V
    x_1 = onehot(y)     space.tokens(y)      (B, L, W)    W = V in one-hot space, d in embedding space
    x_0 ~ N(0, I)       space.noise(xi)      (B, L, W)    xi standard normal draws
    x_t                 x                    (B, L, W)    (1 - t) x_0 + t x_1; t = 0 noise, t = 1 data
    t, tau(t)           t, tau               (B,)         time, and time measured in decoding accuracy
    D_t(x)              probs                (B, L, V)    denoiser: softmax of the capped logits
    E                   net.embed            (V, d)       the network reads x only through x E
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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for common/
from common import cli
from common.batches import Ranks, micro_batches, mixed_seed, row_noise, rows_at_once, token_ids
from common.machine import use_bf16
from common.meter import Meter
from common.ranges import Count, Fraction, Helpers, Natural, NonNegative, Positive, RowLength, Seed, Several, Size, Unit
from common.released import load_released
from common.runlog import Averages
from common.start import pick_device, start
from common.tensors import flex_attention, interpolate, sum_by_rows
from common.text_run import TextRun, check_fit, load_averaged, load_judge, open_text

# --- Arguments. Values below are those of the embedded corpus; SETTINGS holds what other data change. ----------------


@dataclass
class RunArgs:
    """What to run, and where its files go."""

    data: str = "austen"  # austen, captions, toy, lm1b, openwebtext, a text file or folder, or a Hugging Face name
    seed: Seed = 1  # seeds weights, row order, times and noise
    eval: str = ""  # run folder to evaluate: no training
    released: str = ""  # official Lightning checkpoint (.ckpt) to evaluate: no training; give its --data
    resume: str = ""  # run folder to continue from its newest checkpoint, exactly as if it had not stopped
    run_name: str = ""  # name of the run folder; default: flm, data, seed and time
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
    self_condition: Unit = 0.5  # share of the steps in which it also reads its first prediction; paper: 0
    dropout: Fraction = 0.0  # on both residual branches; paper: 0.1
    embed_init: Literal["frequency", "uniform"] = "frequency"  # sizes of E's rows at the start; paper: uniform
    logit_cap: NonNegative = 30.0  # logits become cap * tanh(logits / cap); 0: off
    attention_cap: NonNegative = 50.0  # the same for attention scores; 0: off
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of blocks and output layer; auto: bf16 where it is fast


@dataclass
class FlowArgs:
    """Noise and time [P 1]; other losses of the paper: variants/flm_ablations.py."""

    space: Literal["embedding", "onehot"] = "embedding"  # where noise and states live: (d,) or (V,) numbers a token
    reparam: bool = True  # tau is uniform: equal steps in decoding accuracy; else t is uniform


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
    """Sampling and evaluation [P 1.4, 1.5, 5]."""

    steps: tuple[Size, ...] = (1, 2, 4, 8, 16, 32, 128)  # numbers of network calls to evaluate
    samples: Size = 256  # texts per number of steps
    sampler: Literal["euler", "bridge"] = "euler"  # steps of the flow (paper), or draw a text and noise it again
    temperature: Positive = 0.55  # of the last predictions, that of the first is 1; paper: 1
    top_p: Unit = 1.0  # bridge: only the likeliest tokens that have this much probability together
    guidance: NonNegative = 1.0  # autoguidance: weak + guidance * (strong - weak), weak = with dropout; 1: off
    guidance_dropout: Fraction = 0.1  # dropout of the weak network
    judge: str = "ngram"  # ngram, smollm2, gpt2, gpt2-medium, gpt2-large, gpt2-xl
    judge_path: str = ""  # file or folder of the judge's weights, instead of fetching them
    show: Natural = 3  # samples printed


@dataclass
class Args:
    run: RunArgs = field(default_factory=RunArgs)
    model: ModelArgs = field(default_factory=ModelArgs)
    flow: FlowArgs = field(default_factory=FlowArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    sample: SampleArgs = field(default_factory=SampleArgs)


PAPER = dict(
    layers=12, width=768, heads=12, dropout=0.1, embed_init="uniform", total_steps=1_000_000, batch=512, micro_batch=0,
    lr=3e-4, warmup=2_500, decay=0.0, beta2=0.999, ema=0.9999, eval_every=5_000, checkpoint_every=5_000, samples=1024,
    judge="gpt2-large", steps=(8, 32, 128, 1024), conv=0, self_condition=0.0, temperature=1.0,
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # data -> changes to the defaults
    "lm1b": PAPER | dict(length=128, loss_rows=32),
    "openwebtext": PAPER | dict(length=1024, loss_rows=4),
    "captions": dict(length=32, dropout=0.1, batch=32, micro_batch=32, total_steps=1_000, steps=(1, 4, 8, 32)),
    "toy": dict(
        length=8, layers=2, width=128, heads=4, embed_init="uniform", space="onehot", batch=128, micro_batch=0,
        total_steps=500, lr=1.5e-3, warmup=50, eval_every=250, checkpoint_every=250, samples=2_048, steps=(32,),
        precision="fp32", conv=0, self_condition=0.0, sampler="bridge", temperature=1.0,
    ),
}  # fmt: skip


def default_args(data: str = "austen") -> Args:
    """Defaults for some data: the dataclasses, then its row of SETTINGS ("lm1b:PATH" takes that of lm1b)."""
    return cli.override(Args(), dict(data=data) | SETTINGS.get(data.split(":")[0], {}))


# --- Where noise and states live -------------------------------------------------------------------------------------


class GramNoise(torch.autograd.Function):
    """xi (..., d) standard normal -> noise of law N(0, E^T E) per token, the law of eps E for eps ~ N(0, I_V).

    Backward to E: the expectation, given the noise, of the gradient eps^T g that eps E would have. Same mean, less
    variance: with L L^T = E^T E and noise = xi L^T it is E L^-T (xi^T g).
    """

    @staticmethod
    def forward(ctx: Any, embed: Tensor, xi: Tensor) -> Tensor:
        chol, failed = torch.linalg.cholesky_ex(embed.mT @ embed)  # (d, d)
        chol = chol.masked_fill(failed > 0, math.nan)  # E has diverged: so does the loss, which ends the run
        ctx.save_for_backward(embed, chol, xi)
        return xi @ chol.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        embed, chol, xi = ctx.saved_tensors
        outer = xi.flatten(0, -2).mT @ grad.flatten(0, -2)  # (d, d)
        return embed @ torch.linalg.solve_triangular(chol.mT, outer, upper=True), None


@dataclass(frozen=True)
class EmbeddingSpace:
    """States are x E, (.., d): exact, because the network reads x only through x E and every update is linear in x.

    noise has the law of x_0 E, tokens and probabilities enter through E. [deviation: not in the paper; P 1.6]
    """

    embed: Tensor  # E (V, d)

    @property
    def width(self) -> int:
        return self.embed.shape[1]

    def tokens(self, y: Tensor) -> Tensor:
        return self.embed[y]

    def noise(self, xi: Tensor) -> Tensor:
        return GramNoise.apply(self.embed, xi)

    def mean(self, probs: Tensor) -> Tensor:
        return probs @ self.embed

    def read(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class OneHotSpace:
    """States are x itself, (.., V): the paper's words, and the reference for EmbeddingSpace."""

    embed: Tensor  # E (V, d)

    @property
    def width(self) -> int:
        return self.embed.shape[0]

    def tokens(self, y: Tensor) -> Tensor:
        return F.one_hot(y, len(self.embed)).to(self.embed.dtype)

    def noise(self, xi: Tensor) -> Tensor:
        return xi

    def mean(self, probs: Tensor) -> Tensor:
        return probs

    def read(self, x: Tensor) -> Tensor:
        return x @ self.embed


Space = EmbeddingSpace | OneHotSpace


def make_space(net: DiT, name: str) -> Space:
    return {"embedding": EmbeddingSpace, "onehot": OneHotSpace}[name](net.embed)


def interpolant(space: Space, tokens: Tensor, xi: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t x_1 [P 1.1]: tokens (B, L), xi (B, L, W) standard normal, t (B,) -> (B, L, W)."""
    t = t[:, None, None]
    return (1 - t) * space.noise(xi) + t * space.tokens(tokens)


# --- Time: measured in decoding accuracy -----------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Clock:
    """t(tau) by linear interpolation in the table; without one they are equal."""

    table: Tensor | None

    def t(self, tau: Tensor) -> Tensor:
        return tau if self.table is None else interpolate(tau, self.table[1], self.table[0])


# --- Loss ------------------------------------------------------------------------------------------------------------


def flm_loss(
    net: DiT, tokens: Tensor, tau: Tensor, t: Tensor, xi: Tensor, flow: FlowArgs, rows: int = 0, twice: bool = False
) -> Tensor:  # fmt: skip
    """Cross entropy of the clean tokens given x_t, -log D_t(x_t)[y], mean over tokens; no weight over time [P 1.2].

    tokens (B, L), tau and t (B,), xi (B, L, W) standard normal -> scalar. rows: whose logits exist at a time; 0: all.
    twice: the network also reads its own prediction, made without gradient [P 3].
    """
    space = make_space(net, flow.space)
    h = space.read(interpolant(space, tokens, xi, t))
    if twice:
        with torch.no_grad():
            parts = zip(h.split(rows or len(h)), tau.split(rows or len(h)), strict=True)
            mean = torch.cat([net(*part).softmax(-1) @ net.embed for part in parts])
        h = h + net.recall(mean)
    h, cond = net.trunk(h, tau)

    def cross_entropy(h: Tensor, cond: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net.head(h, cond).flatten(0, 1), y.flatten(), reduction="sum")

    return sum_by_rows(cross_entropy, rows, h, cond, tokens) / tokens.numel()


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


def guided(net: DiT, h: Tensor, tau: Tensor, sample: SampleArgs) -> Tensor:
    """Logits (B, L, V) of D_t(x), moved away from the same network weakened by dropout: h (B, L, d), tau (B,)."""
    strong = net(h, tau)
    if sample.guidance == 1:
        return strong
    for block in net.blocks:
        block.dropout, kept = sample.guidance_dropout, block.dropout
        block.training = True
    weak = net(h, tau).softmax(-1)
    for block in net.blocks:
        block.dropout, block.training = kept, False
    return (weak + sample.guidance * (strong.softmax(-1) - weak)).clamp(min=1e-30).log()


def sample_euler(net: DiT, x: Tensor, steps: int, clock: Clock, space: Space, sample: SampleArgs) -> Tensor:
    """Euler steps of the flow on a uniform grid in tau, argmax at the end [P 1.4]: x (B, L, W) noise -> (B, L)."""
    tau = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=x.device)
    t, probs = clock.t(tau), None
    for i in range(steps):
        h = recalled(net, space.read(x), probs)
        logits = guided(net, h, tau[i].expand(len(x)), sample)
        probs = cooled(logits, tau[i], sample.temperature).softmax(-1)  # D_t(x) (B, L, V)
        if i < steps - 1:
            x = x + ((t[i + 1] - t[i]) / (1 - t[i])).to(x.dtype) * (space.mean(probs) - x)
    return probs.argmax(-1)


def cooled(logits: Tensor, tau: Tensor, temperature: float) -> Tensor:
    """Logits (B, L, V) at a temperature that falls evenly from 1 at tau = 0 to `temperature` at 1; tau (B,) or ()."""
    return logits / (1 - (1 - temperature) * tau.to(logits.dtype))[..., None, None]


def recalled(net: DiT, h: Tensor, probs: Tensor | None) -> Tensor:
    """x E (B, L, d) and what the network has learnt to read of its last prediction (B, L, V) [P 3]."""
    return h if net.recall is None or probs is None else h + net.recall(probs @ net.embed)


def draw(probs: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Token ids from probs (..., V), restricted to the nucleus top_p, at uniform (...,); in double precision."""
    p = probs.double()
    if top_p < 1:
        high, order = p.sort(-1, descending=True)
        p = p.scatter(-1, order, torch.where(high.cumsum(-1) - high <= top_p, high, 0.0))  # the likeliest always stays
    total = p.cumsum(-1)
    token = torch.searchsorted(total, uniform[..., None].double() * total[..., -1:], right=True)
    return token.clamp(max=p.shape[-1] - 1).squeeze(-1)


def bridge_coefficients(t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x at t_next, given x_t and the clean token, is a x_t + b x_1 + sqrt(v) noise; 0 <= t < t_next < 1 [P 1.5]."""
    a = t * (1 - t_next) ** 2 / (t_next * (1 - t) ** 2)
    b = (t_next - t) * (t_next + t - 2 * t_next * t) / (t_next * (1 - t) ** 2)
    v = (1 - t_next) ** 2 * (t_next - t) * (t_next + t - 2 * t_next * t) / (t_next**2 * (1 - t) ** 2)
    return a, b, v


def sample_bridge(
    net: DiT, x: Tensor, steps: int, clock: Clock, space: Space, sample: SampleArgs, generator: torch.Generator
) -> Tensor:
    """Draw a clean text, go to the next time conditioned on it [P 1.5]: x (B, L, W) noise -> (B, L)."""
    tau = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=x.device)
    t, probs = clock.t(tau), None
    for i in range(steps):
        h = recalled(net, space.read(x), probs)
        logits = guided(net, h, tau[i].expand(len(x)), sample)
        probs = cooled(logits, tau[i], sample.temperature).softmax(-1)  # D_t(x) (B, L, V)
        uniform = torch.rand(x.shape[:2], generator=generator, device=x.device)  # (B, L)
        y = draw(probs, uniform, sample.top_p)
        if i < steps - 1:
            a, b, v = (c.to(x.dtype) for c in bridge_coefficients(t[i], t[i + 1]))
            xi = torch.randn(x.shape, generator=generator, device=x.device)
            x = a * x + b * space.tokens(y) + v.sqrt() * space.noise(xi)
    return y


@torch.no_grad()
def generate(net: DiT, args: Args, clock: Clock, samples: int, steps: int) -> Tensor:
    """`samples` texts (samples, L) in `steps` network calls each; a function of the weights and the seed."""
    net.eval()
    sample, device, space, texts = args.sample, net.embed.device, make_space(net, args.flow.space), []
    generator = torch.Generator(device).manual_seed(args.run.seed)
    rows = rows_at_once(device, args.model.length)
    for done in range(0, samples, rows):
        shape = (min(rows, samples - done), args.model.length, space.width)
        x = space.noise(torch.randn(shape, generator=generator, device=device))
        if sample.sampler == "euler":
            texts.append(sample_euler(net, x, steps, clock, space, sample))
        else:
            texts.append(sample_bridge(net, x, steps, clock, space, sample, generator))
    return torch.cat(texts)


def sampler_tag(sample: SampleArgs, usual: SampleArgs) -> str:
    """Part of the names of the files of an evaluation; empty for the usual sampler of the data."""
    how = f"_{sample.sampler}_t{sample.temperature:g}" + (f"_p{sample.top_p:g}" if sample.sampler == "bridge" else "")
    own = (sample.sampler, sample.temperature, sample.top_p) != (usual.sampler, usual.temperature, usual.top_p)
    return (how if own else "") + (f"_g{sample.guidance:g}" if sample.guidance != 1 else "")


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

    @torch.no_grad()
    def scale_rows(self, count: Tensor) -> None:
        """E's rows times sqrt(frequency), the sum of their squares kept; count (V,): tokens in the training text.

        [deviation: x E has d numbers for V tokens, so noise covers a token of random rows sqrt(V / d) times more than
        in x itself. Trained rows are large for frequent tokens; starting so saves half of a short training, P 1.6]
        """
        share = (count + 1) / (count + 1).sum()
        self.embed *= (len(share) * share)[:, None].sqrt()

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
def validate(net: DiT, rows: np.ndarray, clock: Clock, args: Args) -> dict[str, float]:
    """Cross entropy of held-out rows at fixed times and noise, mean and in quarters of tau."""
    net.eval()
    space, device, count = make_space(net, args.flow.space), net.embed.device, min(len(rows), 256)
    losses = []
    at_once = rows_at_once(device, args.model.length)
    for first in range(0, count, at_once):
        places = range(first, min(first + at_once, count))
        tau = (torch.tensor(places, dtype=torch.float64, device=device) + 0.5) / count
        tokens = token_ids(rows[places.start : places.stop], device)
        xi = row_noise(0, places, (tokens.shape[1], space.width), 0, device)
        x = interpolant(space, tokens, xi, clock.t(tau).float())
        probs = net(space.read(x), tau).softmax(-1)
        losses.append(-probs.gather(-1, tokens[..., None]).clamp(min=1e-9).log().mean((1, 2)))  # (B,)
    loss = torch.cat(losses)
    quarters = {f"valid/ce_quarter{i + 1}": q.mean().item() for i, q in enumerate(loss.chunk(4))}
    return {"valid/ce": loss.mean().item()} | quarters


def train(run: TextRun, net: DiT, clock: Clock, args: Args) -> DiT:
    """Optimize; log, evaluate and save when due. Draws are functions of seed and step. Returns the averaged net."""
    r, m, a, ranks, device = args.run, args.model, args.train, run.ranks, run.device
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=a.lr, betas=(0.9, a.beta2), weight_decay=0.0, fused=True)
    averages = Averages()  # metrics since the last line of the log
    run.open_log(a.total_steps, sum(p.numel() for p in net.parameters()), r.wandb_project, r.tensorboard)
    run.track(averages=averages, net=net, ema=ema, optimizer=optimizer)
    meter = Meter(
        net, batch=a.batch, layers=m.layers, length=m.length, width=m.width, processes=ranks.world,
        bf16=use_bf16(m.precision, device), step=run.step, forwards=m.self_condition,
    )  # fmt: skip
    if r.compile:
        net.trunk = torch.compile(net.trunk)
    width, few = make_space(net, args.flow.space).width, min(32, args.sample.samples)
    net.train()
    while not run.stop_requested() and run.step < a.total_steps:
        torch.manual_seed(mixed_seed(r.seed, 3, run.step, ranks.rank))  # dropout
        batch_tau = stratified_times(run.step, a.batch, r.seed).to(device)  # (batch,)
        twice = makes_two_passes(run.step, m.self_condition, r.seed)
        losses = []
        optimizer.zero_grad()
        for places, tokens in micro_batches(run.data.train, run.step, a.batch, a.micro_batch, r.seed, ranks, device):
            tau = batch_tau[places]
            xi = row_noise(run.step, places, (m.length, width), r.seed, device)  # (B, L, W)
            loss = flm_loss(net, tokens, tau.float(), clock.t(tau).float(), xi, args.flow, a.loss_rows, twice)
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
            run.log_validation(validate(ema, run.data.valid, clock, args))
            run.log_samples(functools.partial(generate, ema, args, clock, few), (1, 32))
        if run.due(r.checkpoint_every):
            run.save()
    run.save()
    return ema


# What a checkpoint's weights fit.
FIXED = ("data", "length", "layers", "width", "heads", "cond_width", "conv", "self_condition", "seed", "batch")


def main(argv: list[str]) -> None:
    args, saved, folder = start(
        argv, default_args, chosen_by=("data",), weights=(DiT, Clock, EmbeddingSpace, OneHotSpace, interpolant),
        folder_name="flm__{data}__s{seed}", fixed=FIXED,
    )  # fmt: skip
    r, m, sample = args.run, args.model, args.sample
    ranks, data_dir = Ranks.of_torchrun(), Path(r.data_dir)
    device = pick_device(r.device, r.threads, float64=True)
    torch.set_float32_matmul_precision("high")  # TF32 for the fp32 products of a GPU
    data = open_text(r.data, m.length, data_dir, m.tokenizer, m.tokenizer_path, ranks)
    vocab = data.tokenizer.vocab_size
    check_fit(args.flow.space, vocab, m.width, m.heads, args.train.batch, ranks.world, sample.steps)
    judge = load_judge(sample.judge, sample.judge_path, data, data_dir, device) if ranks.chief else None
    torch.manual_seed(r.seed)
    net = DiT(m, vocab).to(device)
    if m.embed_init == "frequency":
        net.scale_rows(torch.from_numpy(data.counts()).to(device))
    clock = Clock(accuracy_table(vocab).to(device) if args.flow.reparam else None)
    run = TextRun(folder, saved, args=cli.flatten(args), ranks=ranks, device=device, data=data, judge=judge)
    with ranks, run:
        if r.eval:
            load_averaged(net, saved, data, r.eval)
        elif r.released:
            load_released(Path(r.released), net)
        else:
            with run.stop:  # only here a signal has to wait
                net = train(run, net, clock, args)
        if run.stop_requested():
            run.say(run.how_to_go_on())
        elif ranks.chief:
            make = functools.partial(generate, net, args, clock, sample.samples)
            tag = sampler_tag(sample, default_args(r.data).sample)
            run.evaluate(make, sample.steps, sample.samples, sample.show, tag)


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
