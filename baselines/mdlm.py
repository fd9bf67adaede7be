"""MDLM, SDTT and IMDM: language models that fill in masked tokens, a few positions or all of them at a call.

Papers: "Simple and Effective Masked Diffusion Language Models" (MDLM), arXiv 2406.07524; "Beyond Autoregression: Fast
LLMs via Self-Distillation Through Time" (SDTT), arXiv 2410.21035; "Infinite Mask Diffusion for Few-Step Distillation"
(IMDM), arXiv 2605.10518. [C]: the authors' code, kuleshov-group/mdlm c112c52, jdeschena/sdtt 9172b86 and Ugness/IMDM
168e9d4; [B n], [P n]: sections of docs/baselines.md and docs/flm_train.md; [deviation: why] marks where we differ.

A text loses its tokens to a mask, one after the other in random order, and a transformer predicts what stood there.
Sampling goes back: from masks alone, every call fills in some. Tokens filled in by the same call are independent of
each other, which costs few-call samples their sense. SDTT (--distill) teaches a student to predict in one call what its
teacher does in two, again and again; IMDM (--random-mask) makes masks random, so that those of one call can agree.

    python baselines/mdlm.py                                # six novels of Jane Austen, shipped with the repository
    python baselines/mdlm.py --data toy                     # synthetic language with a known distribution, a minute
    python baselines/mdlm.py --loss elbo                    # the authors' weights over time
    python baselines/mdlm.py --distill runs/NAME            # SDTT of a run of this script
    python baselines/mdlm.py --distill runs/NAME --random-mask      # IMDM made from it, with SDTT
    torchrun --nproc_per_node 8 baselines/mdlm.py --data openwebtext
    python baselines/mdlm.py --eval runs/NAME --steps 1 4 16 64     # perplexity, entropy, samples at these call counts
    python baselines/mdlm.py --resume runs/NAME

Symbols
    papers              here                 shape
    x                   tokens               (B, L)       token ids below V
    x_t                 x                    (B, L)       tokens and masks; the mask is V
    t                   t                    (B,)         time; t = 0 data, t = 1 masks, unlike in flm_train.py
    alpha_t             alpha(t)             (B,)         probability that a token is still there, 1 - (1 - EPS) t
    p_theta(x | x_t)    log_probs            (B, L, V)    prediction of all tokens, one-hot where x_t has the token
    E, E_M              net.embed, net.mask  (V, d), (d,)
    eps                 eps                  (B, L, n)    what a random mask depends on, in [0, 1]; n = 0: nothing
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
from common import checkpoint, cli
from common.batches import Ranks, micro_batches, mixed_seed, row_noise, rows_at_once, token_ids
from common.errors import UserError
from common.machine import use_bf16
from common.meter import Meter
from common.ranges import Count, Fraction, Helpers, Natural, NonNegative, Positive, RowLength, Seed, Several, Size, Unit
from common.runlog import Averages, write_json
from common.start import CHECKPOINT, load_run, pick_device, start
from common.tensors import flex_attention, sum_by_rows
from common.text_run import TextRun, check_fit, load_averaged, load_judge, open_text

EPS = 1e-3  # share of the tokens that is left at t = 1, and the least t of a training step [C]

# --- Arguments. Values below are those of the embedded corpus; SETTINGS holds what other data change. ----------------


@dataclass
class RunArgs:
    """What to run, and where its files go."""

    distill: str = ""  # run folder of this script: its network is the teacher (SDTT), and the start of the student
    data: str = "austen"  # the teacher's; else austen, captions, toy, lm1b, openwebtext, a file, folder or hub name
    seed: Seed = 1  # seeds weights, row order, times and masks
    eval: str = ""  # run folder to evaluate: no training
    resume: str = ""  # run folder to continue from its newest checkpoint, exactly as if it had not stopped
    run_name: str = ""  # name of the run folder; default: mdlm, data, seed and time
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
    self_condition: Unit = 0.0  # share of the steps in which it also reads its first prediction
    dropout: Fraction = 0.0  # on both residual branches; paper: 0.1
    logit_cap: NonNegative = 30.0  # logits become cap * tanh(logits / cap); 0: off
    attention_cap: NonNegative = 50.0  # the same for attention scores; 0: off
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of blocks and output layer; auto: bf16 where it is fast


@dataclass
class MaskArgs:
    """Loss [B 11.1], distillation [B 11.3] and random masks [B 11.4]."""

    loss: Literal["ce", "elbo"] = "ce"  # over masked tokens: cross entropy, or weighted by 1 / t; paper: elbo
    random_mask: bool = False  # IMDM: a mask's embedding depends on random numbers of its own
    noise_width: Size = 256  # n, how many; paper: 768 to 2048, of d = 768
    calls: Size = 64  # --distill: the teacher's in the first round, about L; every round halves them; paper: 1024
    rounds: Size = 6  # of as many steps each; after one the student is the next teacher; paper: 7


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
    """Sampling and evaluation [B 11.2]."""

    steps: tuple[Size, ...] = (1, 2, 4, 8, 16, 32, 128)  # numbers of network calls to evaluate
    samples: Size = 256  # texts per number of steps
    temperature: Positive = 1.0  # of the predictions; below 1: likelier tokens, less entropy
    top_p: Unit = 1.0  # only the likeliest tokens that have this much probability together
    keep_noise: bool = False  # IMDM: a mask keeps its eps to the end, instead of drawing a new one now and then
    judge: str = "ngram"  # ngram, smollm2, gpt2, gpt2-medium, gpt2-large, gpt2-xl
    judge_path: str = ""  # file or folder of the judge's weights, instead of fetching them
    show: Natural = 3  # samples printed


@dataclass
class Args:
    run: RunArgs = field(default_factory=RunArgs)
    model: ModelArgs = field(default_factory=ModelArgs)
    mask: MaskArgs = field(default_factory=MaskArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    sample: SampleArgs = field(default_factory=SampleArgs)


PAPER = dict(
    layers=12, width=768, heads=12, dropout=0.1, loss="elbo", total_steps=1_000_000, batch=512, micro_batch=0, lr=3e-4,
    warmup=2_500, decay=0.0, beta2=0.999, ema=0.9999, eval_every=5_000, checkpoint_every=5_000, samples=1024,
    judge="gpt2-large", steps=(8, 32, 128, 1024), conv=0,
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # data -> changes to the defaults
    "lm1b": PAPER | dict(length=128, loss_rows=32, noise_width=768),
    "openwebtext": PAPER | dict(length=1024, loss_rows=4, noise_width=2048),
    "captions": dict(
        length=32, dropout=0.1, batch=32, micro_batch=32, total_steps=1_000, steps=(1, 2, 4, 8, 32)
    ),
    "toy": dict(  # with convolutions: nothing else shows where a token stands in a row of masks alone [B 11.2]
        length=8, layers=2, width=128, heads=4, batch=128, micro_batch=0, total_steps=500, lr=1.5e-3, warmup=50,
        eval_every=250, checkpoint_every=250, samples=2_048, steps=(1, 2, 4, 8, 32), precision="fp32",
        noise_width=128,
    ),
}  # fmt: skip
SDTT = dict(calls=1024, rounds=7, total_steps=70_000, steps=(1, 2, 4, 8, 32, 128))
OURS = dict(lr=3e-4, beta2=0.95, eval_every=500)
DISTILLED: dict[str, dict[str, Any]] = {  # data -> further changes with --distill; OURS for data without a row
    "lm1b": SDTT | dict(batch=32, lr=6e-5, warmup=500),  # IMDM's
    "openwebtext": SDTT | dict(batch=128),
    "captions": OURS | dict(calls=32, rounds=5, eval_every=200),
    "toy": OURS | dict(calls=8, rounds=3, total_steps=600, lr=1e-3, eval_every=200),
}


def default_args(distill: str = "", data: str = "austen") -> Args:
    """Defaults for some data: the dataclasses, then its row of SETTINGS; data and network are the teacher's."""
    taken = load_run(Path(distill), (MaskedDiT,))["args"] if distill else {}
    taken = {k: taken[k] for k in ("data", "random_mask", "noise_width", *vars(ModelArgs())) if k in taken}
    data = taken.get("data", data)
    name = data.split(":")[0]
    changes = SETTINGS.get(name, {}) | (DISTILLED.get(name, OURS) if distill else {})
    return cli.override(Args(), dict(data=data) | changes | dict(distill=distill) | taken)


# --- Loss ------------------------------------------------------------------------------------------------------------


def alpha(t: Tensor) -> Tensor:
    """Share of the tokens that are not masked at time t, any shape [B 11.1]."""
    return 1 - (1 - EPS) * t


def uniform_draws(step: int, places: range, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Uniform in [0, 1], (len(places), *shape) float64: a function of seed, step and place in the global batch."""
    return torch.special.ndtr(row_noise(step, places, shape, seed, device).double())


def mask_tokens(tokens: Tensor, t: Tensor, uniform: Tensor, mask: int) -> Tensor:
    """x_t [B 11.1]: every token is masked with probability 1 - alpha_t; (B, L), t (B,), uniform (B, L) -> (B, L)."""
    return torch.where(uniform < 1 - alpha(t)[:, None], mask, tokens)


def mdlm_loss(
    net: MaskedDiT, tokens: Tensor, t: Tensor, uniform: Tensor, eps: Tensor, loss: str, rows: int = 0,
    twice: bool = False,
) -> Tensor:  # fmt: skip
    """-log p_theta(x | x_t) of masked tokens: their sum over B L / 2 ("ce"), or weighted by 1/t over B L ("elbo").

    tokens (B, L), t (B,), uniform (B, L) for the masks, eps (B, L, n) -> scalar [B 11.1]. Half of the tokens are masked
    on average, so "ce" is a mean over masked ones, but one that pieces of a batch add up to. rows: whose logits exist
    at a time; 0: all. twice: the network also reads its own prediction, made without gradient [P 3].
    """
    x = mask_tokens(tokens, t, uniform, len(net.embed))
    with torch.no_grad():
        last = predict(net, x, eps).exp() if twice else None
    h, cond = net.trunk(recalled(net, net.read(x, eps), last))
    weight = (x != tokens) * (2.0 if loss == "ce" else (1 / t.float())[:, None])  # (B, L)

    def cross_entropy(h: Tensor, cond: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return (
            weight.flatten() * F.cross_entropy(net.head(h, cond).flatten(0, 1), y.flatten(), reduction="none")
        ).sum()

    return sum_by_rows(cross_entropy, rows, h, cond, tokens, weight) / tokens.numel()


def sdtt_loss(
    student: MaskedDiT, teacher: MaskedDiT, tokens: Tensor, t: Tensor, dt: float, uniform: Tensor, eps: Tensor,
    twice: bool = False,
) -> Tensor:  # fmt: skip
    """KL(student || target) summed over masked tokens, over B L / 2 [B 11.3]: one call learns what two predict.

    tokens (B, L), t (B,), uniform (3, B, L) for masks and the teacher's step, eps (B, L, n) of all calls -> scalar.
    """
    x = mask_tokens(tokens, t, uniform[0], len(student.embed))
    with torch.no_grad():
        target = sdtt_target(teacher, x, eps, t, dt, uniform[1:])
        last = predict(student, x, eps).exp() if twice else None
    masked = x != tokens
    p, q = predict(student, x, eps, last)[masked], target[masked]  # (masks, V), logarithms; elsewhere they have log 0
    return 2 * (p.exp() * (p - q)).sum() / tokens.numel()


def sdtt_target(teacher: MaskedDiT, x: Tensor, eps: Tensor, t: Tensor, dt: float, uniform: Tensor) -> Tensor:
    """log p (B, L, V) by which the teacher fills in each mask, in two equal steps from t to max(t - 2 dt, 0) [B 11.3].

    x (B, L), eps (B, L, n), t (B,), uniform (2, B, L). What the first call does not fill in, the second predicts.
    """
    middle = (t + (t - 2 * dt).clamp(min=0)) / 2
    first = predict(teacher, x, eps)
    y = fill_in(x, first.exp(), middle / t, uniform)
    second = predict(teacher, y, eps, first.exp())
    return torch.where((y == len(teacher.embed))[..., None], second, first)


def round_of(step: int, k: MaskArgs, a: TrainArgs) -> int:
    """Round 0, 1, ... of a distillation that a step belongs to; its dt is 2^round / calls [B 11.3]."""
    return min(step * k.rounds // a.total_steps, k.rounds - 1)


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


def predict(net: MaskedDiT, x: Tensor, eps: Tensor, last: Tensor | None = None) -> Tensor:
    """log p_theta (B, L, V), a network call: x (B, L), eps (B, L, n), last (B, L, V): its last p_theta, if any."""
    return copy_over(net(recalled(net, net.read(x, eps), last)), x)


def copy_over(logits: Tensor, x: Tensor) -> Tensor:
    """log p_theta (B, L, V) [B 11.1]: softmax of the logits for a mask; a token of x (B, L) predicts itself."""
    vocab = logits.shape[-1]
    known = F.one_hot(x.clamp(max=vocab - 1), vocab).to(logits.dtype).log()
    return torch.where((x == vocab)[..., None], logits.log_softmax(-1), known)


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


def fill_in(
    x: Tensor, probs: Tensor, stay: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:  # fmt: skip
    """Ancestral step [B 11.2]: a mask stays with probability `stay`, else a token is drawn; tokens stay as they are.

    x (B, L), probs (B, L, V) of the clean tokens, stay = (1 - alpha_s) / (1 - alpha_t) = s / t, (B,) or scalar,
    uniform (2, B, L): whether a mask stays, which token it becomes.
    """
    turn = (x == probs.shape[-1]) & (uniform[0] >= stay.reshape(-1, 1))
    x = x.clone()
    p = (probs[turn].double().clamp(min=1e-30).log() / temperature).softmax(-1)
    x[turn] = draw(p, uniform[1][turn], top_p)
    return x


def sample_ancestral(
    net: MaskedDiT, x: Tensor, steps: int, temperature: float, top_p: float, keep_noise: bool,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Ancestral steps on a uniform grid from t = 1 to 0, a call each [B 11.2, 11.4]: x (B, L) of masks -> (B, L)."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=x.device, dtype=torch.float64)

    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=x.device)
    eps, probs = uniform(*x.shape, net.noise_width), None
    for i in range(steps):
        probs = predict(net, x, eps, probs).exp()
        x = fill_in(x, probs, t[i + 1] / t[i], uniform(2, *x.shape), temperature, top_p)
        if net.noise_width and not keep_noise:
            new = uniform(*x.shape, 1) >= alpha(t[i]) / alpha(t[i + 1])  # of the masks that stay
            eps = torch.where(new, uniform(*eps.shape), eps)
    return x


@torch.no_grad()
def generate(net: MaskedDiT, args: Args, samples: int, steps: int) -> Tensor:
    """`samples` texts (samples, L) in `steps` network calls each; a function of the weights and the seed."""
    net.eval()
    sample, device, texts = args.sample, net.embed.device, []
    generator = torch.Generator(device).manual_seed(args.run.seed)
    rows = rows_at_once(device, args.model.length)
    for done in range(0, samples, rows):
        shape = (min(rows, samples - done), args.model.length)
        x = torch.full(shape, len(net.embed), device=device)
        texts.append(sample_ancestral(net, x, steps, sample.temperature, sample.top_p, sample.keep_noise, generator))
    return torch.cat(texts)


def sampler_tag(sample: SampleArgs) -> str:
    """Part of the names of the files of an evaluation; empty for the papers' sampler."""
    own = (sample.temperature, sample.top_p, sample.keep_noise) != (1, 1, False)
    return f"_t{sample.temperature:g}_p{sample.top_p:g}" + "_kept" * sample.keep_noise if own else ""


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


class MaskedDiT(DiT):
    """DiT that reads tokens and masks, at the constant time 0: net(net.read(x, eps)) -> logits (B, L, V) [B 11.1].

    [C: no time conditioning; the weights for it are kept, so that sizes are those of flm_train.py and one vector]
    """

    def __init__(self, m: ModelArgs, vocab: int, noise_width: int = 0) -> None:
        super().__init__(m, vocab)
        bound = 1 / math.sqrt(m.width)
        self.mask = nn.Parameter(torch.empty(m.width).uniform_(-bound, bound))  # E_M (d,)
        self.noise_width = noise_width  # n
        if noise_width:
            wide = 4 * m.width
            self.mask_noise = nn.Sequential(nn.Linear(noise_width, wide), nn.GELU(), zero(nn.Linear(wide, m.width)))

    def read(self, x: Tensor, eps: Tensor) -> Tensor:
        """E of tokens, E_M + MLP(2 eps - 1) of masks, E_M if n = 0 [B 11.4]: x (B, L), eps (B, L, n) -> (B, L, d)"""
        mask = self.mask + self.mask_noise((2 * eps - 1).to(self.mask.dtype)) if self.noise_width else self.mask
        known = self.embed[x.clamp(max=len(self.embed) - 1)]
        return torch.where((x == len(self.embed))[..., None], mask, known)

    def trunk(self, h: Tensor, *tau: Tensor) -> tuple[Tensor, Tensor]:
        return super().trunk(h, h.new_zeros(len(h)))


# --- Training --------------------------------------------------------------------------------------------------------


def learning_rate(step: int, a: TrainArgs) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last share `decay` of the steps."""
    left = (a.total_steps - step) / (a.decay * a.total_steps) if a.decay else 1.0
    return a.lr * min(1.0, (step + 1) / max(a.warmup, 1), left)


@torch.no_grad()
def validate(net: MaskedDiT, rows: np.ndarray, args: Args, count: int = 256, times: int = 1) -> dict[str, float]:
    """Cross entropy per masked token and bound per token of held-out rows, at fixed times and masks [B 11.1].

    At most `count` rows, each at `times` times, one in each of as many equal intervals.
    """
    net.eval()
    length, device, count = args.model.length, net.embed.device, min(len(rows), count)
    at_once, total = rows_at_once(device, length), torch.zeros(3, dtype=torch.float64, device=device)
    for first in range(0, count * times, at_once):
        places = range(first, min(first + at_once, count * times))
        row, part = np.divmod(places, times)
        t = EPS + (1 - EPS) * torch.from_numpy((part + (row + 0.5) / count) / times).to(device)
        tokens = token_ids(rows[row], device)
        uniform = uniform_draws(0, places, (length, 1 + net.noise_width), 0, device)
        x = mask_tokens(tokens, t, uniform[..., 0], len(net.embed))
        log_probs = predict(net, x, uniform[..., 1:])
        loss = -log_probs.gather(-1, tokens[..., None])[..., 0].double()  # (B, L), 0 of what is not masked
        total += torch.stack([loss.sum(), (x != tokens).sum(), (loss / t[:, None]).sum()])
    ce, masks, bound = total.tolist()
    return {"valid/ce": ce / masks, "valid/elbo": bound / (count * times * length)}


def train(run: TextRun, net: MaskedDiT, args: Args) -> MaskedDiT:
    """Optimize; log, evaluate and save when due. Draws are functions of seed and step. Returns the averaged net."""
    r, m, k, a, ranks, device = args.run, args.model, args.mask, args.train, run.ranks, run.device
    ema = copy.deepcopy(net).requires_grad_(False)
    teacher = copy.deepcopy(net).requires_grad_(False).eval() if r.distill else None
    optimizer = torch.optim.AdamW(net.parameters(), lr=a.lr, betas=(0.9, a.beta2), weight_decay=0.0, fused=True)
    averages = Averages()  # metrics since the last line of the log
    run.open_log(a.total_steps, sum(p.numel() for p in net.parameters()), r.wandb_project, r.tensorboard)
    run.track(averages=averages, net=net, ema=ema, optimizer=optimizer, teacher=teacher)
    meter = Meter(
        net, batch=a.batch, layers=m.layers, length=m.length, width=m.width, processes=ranks.world,
        bf16=use_bf16(m.precision, device), step=run.step, forwards=m.self_condition + (2 if teacher else 0),
    )  # fmt: skip
    if r.compile:
        net.trunk = torch.compile(net.trunk)
    calls, few = (1, 2, 4, 8, 16, 32) if teacher else (1, 32), min(32, args.sample.samples)
    net.train()
    while not run.stop_requested() and run.step < a.total_steps:
        torch.manual_seed(mixed_seed(r.seed, 3, run.step, ranks.rank))  # dropout
        batch_t = EPS + (1 - EPS) * stratified_times(run.step, a.batch, r.seed).to(device)  # (batch,)
        dt = 2 ** round_of(run.step, k, a) / k.calls
        twice = makes_two_passes(run.step, m.self_condition, r.seed)
        losses = []
        optimizer.zero_grad()
        for places, tokens in micro_batches(run.data.train, run.step, a.batch, a.micro_batch, r.seed, ranks, device):
            t = batch_t[places]
            uniform = uniform_draws(run.step, places, (m.length, 3 + net.noise_width), r.seed, device)
            masks, eps = uniform[..., :3].movedim(-1, 0), uniform[..., 3:]  # (3, B, L), (B, L, n)
            if teacher:
                loss = sdtt_loss(net, teacher, tokens, t, dt, masks, eps, twice)
            else:
                loss = mdlm_loss(net, tokens, t, masks[0], eps, k.loss, a.loss_rows, twice)
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
        if teacher and round_of(run.step, k, a) > round_of(run.step - 1, k, a):
            teacher.load_state_dict(net.state_dict())

        if run.due(r.log_every):
            metrics = averages.take()
            run.stop_if_not_finite(metrics)
            run.log_training(metrics, meter.take(run.step))
        if run.due(r.eval_every) and ranks.chief:
            run.log_validation(validate(ema, run.data.valid, args))
            run.log_samples(functools.partial(generate, ema, args, few), calls)
        if run.due(r.checkpoint_every):
            run.save()
    run.save()
    return ema


# What a checkpoint's weights fit.
FIXED = (
    *("distill", "data", "length", "layers", "width", "heads", "cond_width", "conv", "self_condition"),
    *("random_mask", "noise_width", "calls", "rounds", "seed", "batch"),
)


def main(argv: list[str]) -> None:
    args, saved, folder = start(
        argv, default_args, chosen_by=("distill", "data"), weights=(MaskedDiT,),
        folder_name="mdlm__{data}__s{seed}", fixed=FIXED,
    )  # fmt: skip
    r, m, k, sample = args.run, args.model, args.mask, args.sample
    if 2**k.rounds > k.calls:
        raise UserError(f"--rounds {k.rounds}: the teacher's --calls {k.calls} cannot be halved so often; give fewer")
    ranks, data_dir = Ranks.of_torchrun(), Path(r.data_dir)
    device = pick_device(r.device, r.threads, float64=True)
    torch.set_float32_matmul_precision("high")  # TF32 for the fp32 products of a GPU
    data = open_text(r.data, m.length, data_dir, m.tokenizer, m.tokenizer_path, ranks)
    vocab = data.tokenizer.vocab_size
    check_fit("onehot", vocab, m.width, m.heads, args.train.batch, ranks.world, sample.steps)  # any vocabulary
    judge = load_judge(sample.judge, sample.judge_path, data, data_dir, device) if ranks.chief else None
    torch.manual_seed(r.seed)
    net = MaskedDiT(m, vocab, k.noise_width if k.random_mask else 0).to(device)
    if r.distill and not saved:  # random masks of a run that had none start equal to its mask
        new = {name: value for name, value in net.state_dict().items() if name.startswith("mask_noise.")}
        start_of = checkpoint.load(Path(r.distill) / CHECKPOINT)
        load_averaged(net, start_of | {"ema": new | start_of.get("ema", {})}, data, r.distill)
    run = TextRun(folder, saved, args=cli.flatten(args), ranks=ranks, device=device, data=data, judge=judge)
    with ranks, run:
        if r.eval:
            load_averaged(net, saved, data, r.eval)
        else:
            with run.stop:  # only here a signal has to wait
                net = train(run, net, args)
        if run.stop_requested():
            run.say(run.how_to_go_on())
        elif ranks.chief:
            make = functools.partial(generate, net, args, sample.samples)
            run.evaluate(make, sample.steps, sample.samples, sample.show, sampler_tag(sample))
            if not (r.eval and (folder / "likelihood.json").exists()):
                bound = validate(net, data.valid, args, count=1_024, times=16)
                write_json(folder / "likelihood.json", bound)
                print(", ".join(f"{name} {value:.4f}" for name, value in bound.items()), flush=True)


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
