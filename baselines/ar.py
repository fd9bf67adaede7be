"""AR: the autoregressive transformer that diffusion language models are measured against.

It writes a text from left to right, each token drawn given all before it. The comparison is that of "Simple and
Effective Masked Diffusion Language Models" (MDLM), arXiv 2406.07524, and "The Diffusion Duality" (Duo), arXiv
2506.10892. [C]: the authors' code, s-sahoo/duo 7c9b498; docs/baselines.md [B 9] has the method; [P n]:
sections of docs/flm_train.md, whose network, data and evaluation these are; [deviation: why] marks where we differ.

The network is the one of flm_train.py with a causal mask, convolutions that look back only, and a time that is always
0. Every row begins with a learnt start, so that all of its L tokens are predicted, whether the data's rows begin with
a separator or not: a text takes L network calls. Its likelihood is exact, and so is the entropy of its samples.

    python baselines/ar.py                                 # six novels of Jane Austen, shipped with the repository
    python baselines/ar.py --data toy                      # synthetic language with a known distribution, a minute
    python baselines/ar.py --data lm1b                     # the authors' LM1B setting, for GPUs
    python baselines/ar.py --data my_texts/                # a text file, a folder, or a Hugging Face name
    torchrun --nproc_per_node 8 baselines/ar.py --data openwebtext
    python baselines/ar.py --eval runs/NAME --temperature 0.9 --top-p 0.95    # perplexity, entropy, samples
    python baselines/ar.py --resume runs/NAME

Symbols
    papers              here                 shape
    x                   tokens, y            (B, L)       token ids below V; id V is the start
    x_<i                before(net, tokens)  (B, L)       at place i the newest token that is known there
    p(x_i | x_<i)       softmax of net(..)   (B, L, V)    net of `before`, all places at once
    E                   net.embed            (V + 1, d)   its last row is the start
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
from common.batches import Ranks, micro_batches, mixed_seed, rows_at_once, token_ids
from common.judge.metrics import unigram_entropy
from common.machine import use_bf16
from common.meter import Meter
from common.ranges import Count, Fraction, Helpers, Natural, NonNegative, Positive, RowLength, Seed, Several, Size, Unit
from common.runlog import Averages, write_json
from common.start import pick_device, start
from common.tensors import flex_attention, sum_by_rows
from common.text_run import TextRun, check_fit, load_averaged, load_judge, open_text

# --- Arguments. Values below are those of the embedded corpus; SETTINGS holds what other data change. ----------------


@dataclass
class RunArgs:
    """What to run, and where its files go."""

    data: str = "austen"  # austen, captions, toy, lm1b, openwebtext, a text file or folder, or a Hugging Face name
    seed: Seed = 1  # seeds weights, row order, dropout and samples
    eval: str = ""  # run folder to evaluate: no training
    resume: str = ""  # run folder to continue from its newest checkpoint, exactly as if it had not stopped
    run_name: str = ""  # name of the run folder; default: ar, data, seed and time
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
    """Causal transformer [P 3]."""

    length: RowLength = 64  # L, tokens per row
    tokenizer: str = ""  # austen, gpt2, bert-base-uncased, own (trained on the text); default: the data's usual one
    tokenizer_path: str = ""  # file or folder of the tokenizer's files, instead of fetching them
    layers: Size = 4  # transformer blocks
    width: Several = 256  # d
    heads: Size = 4  # attention heads
    cond_width: Size = 128  # width of the time embedding
    conv: Natural = 3  # width of a convolution over the last tokens, before attention and MLP; authors: 0, none
    dropout: Fraction = 0.0  # on both residual branches; authors: 0.1
    logit_cap: NonNegative = 30.0  # logits become cap * tanh(logits / cap); 0: off
    attention_cap: NonNegative = 50.0  # the same for attention scores; 0: off
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of blocks and output layer; auto: bf16 where it is fast


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
    """Sampling and evaluation [P 5]; a text takes a network call for each of its L tokens."""

    samples: Size = 256  # texts
    temperature: Positive = 1.0  # of the predictions; below 1: likelier tokens, less entropy
    top_p: Unit = 1.0  # only the likeliest tokens that have this much probability together
    judge: str = "ngram"  # ngram, smollm2, gpt2, gpt2-medium, gpt2-large, gpt2-xl
    judge_path: str = ""  # file or folder of the judge's weights, instead of fetching them
    show: Natural = 3  # samples printed


@dataclass
class Args:
    run: RunArgs = field(default_factory=RunArgs)
    model: ModelArgs = field(default_factory=ModelArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    sample: SampleArgs = field(default_factory=SampleArgs)


PAPER = dict(
    layers=12, width=768, heads=12, dropout=0.1, total_steps=1_000_000, batch=512, micro_batch=0, lr=3e-4, warmup=2_500,
    decay=0.0, beta2=0.999, ema=0.9999, eval_every=5_000, checkpoint_every=5_000, samples=1024, judge="gpt2-large",
    conv=0,
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # data -> changes to the defaults
    "lm1b": PAPER | dict(length=128, loss_rows=32),
    "openwebtext": PAPER | dict(length=1024, loss_rows=4),
    "captions": dict(length=32, dropout=0.1, batch=32, micro_batch=32, total_steps=1_000),
    "toy": dict(
        length=8, layers=2, width=128, heads=4, batch=128, micro_batch=0, total_steps=500, lr=3e-3, warmup=50,
        eval_every=250, checkpoint_every=250, samples=2_048, precision="fp32", conv=0,
    ),
}  # fmt: skip


def default_args(data: str = "austen") -> Args:
    """Defaults for some data: the dataclasses, then its row of SETTINGS ("lm1b:PATH" takes that of lm1b)."""
    return cli.override(Args(), dict(data=data) | SETTINGS.get(data.split(":")[0], {}))


# --- Loss and likelihood ---------------------------------------------------------------------------------------------


def before(net: DiT, tokens: Tensor) -> Tensor:
    """The token before each, (B, L) -> (B, L); before the first stands the start.

    [deviation: the authors give the first token, a separator, and predict L - 1. Rows of the toy language begin with
    a word; so one rule for all data, and the loss is a mean over the L tokens that other methods predict too]
    """
    return F.pad(tokens, (1, -1), value=len(net.embed) - 1)


def ar_loss(net: DiT, tokens: Tensor, rows: int = 0) -> Tensor:
    """Cross entropy of every token given those before it, -log p(x_i | x_<i), mean over tokens.

    tokens (B, L) -> scalar. rows: whose logits exist at a time; 0: all.
    """
    h, cond = net.trunk(before(net, tokens))

    def cross_entropy(h: Tensor, cond: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net.head(h, cond).flatten(0, 1), y.flatten(), reduction="sum")

    return sum_by_rows(cross_entropy, rows, h, cond, tokens) / tokens.numel()


def log_prob_drawn(logits: Tensor, y: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log of the probability with which `draw` gives y (...,), in its nucleus, from softmax(logits) (..., V)."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    log_prob = log_p.gather(-1, y[..., None]).squeeze(-1)
    if top_p == 1:
        return log_prob
    p = log_p.exp().sort(-1, descending=True).values
    return log_prob - torch.where(p.cumsum(-1) - p <= top_p, p, 0.0).sum(-1).log()


@torch.no_grad()
def log_likelihood(net: DiT, texts: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Log probability of every token of texts (n, L) given those before it, as it is drawn -> (n, L), float64."""
    net.eval()
    parts = texts.split(rows_at_once(texts.device, texts.shape[1]))
    return torch.cat([log_prob_drawn(net(before(net, part)), part, temperature, top_p) for part in parts])


# --- Sampler ---------------------------------------------------------------------------------------------------------


def draw(probs: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Token ids from probs (..., V), restricted to the nucleus top_p, at uniform (...,); in double precision."""
    p = probs.double()
    if top_p < 1:
        high, order = p.sort(-1, descending=True)
        p = p.scatter(-1, order, torch.where(high.cumsum(-1) - high <= top_p, high, 0.0))  # the likeliest always stays
    total = p.cumsum(-1)
    token = torch.searchsorted(total, uniform[..., None].double() * total[..., -1:], right=True)
    return token.clamp(max=p.shape[-1] - 1).squeeze(-1)


def sample_ar(
    net: DiT, rows: int, length: int, temperature: float, top_p: float, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """Draw token after token, each given all before it: `length` network calls -> (rows, length).

    A call reads the newest token alone: what the layers need of those before it is in `memory`.
    """
    y = torch.full((rows, 1), len(net.embed) - 1, device=net.embed.device)  # the start
    memory: Memory = {}
    texts = []
    for place in range(length):
        probs = (net(y, place, memory).double() / temperature).softmax(-1)  # (rows, 1, V)
        uniform = torch.rand(y.shape, generator=generator, device=y.device, dtype=torch.float64)
        y = draw(probs, uniform, top_p)
        texts.append(y)
    return torch.cat(texts, 1)


@torch.no_grad()
def generate(net: DiT, args: Args, samples: int, calls: int) -> Tensor:
    """`samples` texts of as many tokens as calls, (samples, calls); a function of the weights and the seed."""
    net.eval()
    sample, device, texts = args.sample, net.embed.device, []
    generator = torch.Generator(device).manual_seed(args.run.seed)
    at_once = rows_at_once(device, calls)
    for done in range(0, samples, at_once):
        rows = min(at_once, samples - done)
        texts.append(sample_ar(net, rows, calls, sample.temperature, sample.top_p, generator))
    return torch.cat(texts)


def sampler_tag(sample: SampleArgs, usual: SampleArgs) -> str:
    """Part of the names of the files of an evaluation; empty for the usual sampler of the data."""
    own = (sample.temperature, sample.top_p) != (usual.temperature, usual.top_p)
    return f"_t{sample.temperature:g}_p{sample.top_p:g}" if own else ""


# --- Network ---------------------------------------------------------------------------------------------------------


Memory = dict[Any, Tensor]  # layer and name -> what it has read so far


def attention(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """Causal attention, scores softly capped: q (B, heads, n, d / heads) belongs to the last n of the L tokens of k
    and v (B, heads, L, d / heads); n is 1 or L [P 3].

    Written out: at short length faster than the fused kernels on a CPU, and those have no cap.
    """
    n, length = q.shape[2], k.shape[2]
    if q.is_cuda and cap and n >= 256:

        def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, cap * torch.tanh(score / cap), -math.inf)

        return flex_attention()(q, k, v, score_mod=capped)
    if not cap and (q.is_cuda or n >= 256):
        return F.scaled_dot_product_attention(q, k, v, is_causal=n == length)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if cap:
        scores = cap * torch.tanh(scores / cap)
    later = torch.ones(n, length, dtype=torch.bool, device=q.device).triu(length - n + 1)
    return scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype) @ v


def remembered(x: Tensor, memory: Memory | None, *key: Any) -> Tensor:
    """x (..., n, d) behind what `memory` has under this key, and kept there; without a memory x itself."""
    if memory is None:
        return x
    memory[key] = torch.cat([memory[key], x], -2) if key in memory else x
    return memory[key]


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
    """x plus a depthwise convolution of it over the last `width` tokens, (B, L, d) -> (B, L, d) [P 3].

    Written out as sums of shifted rows: on a CPU twice as fast as conv1d.
    """

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(width, d).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        width, length = len(self.weight), x.shape[1]
        padded, y = F.pad(x, (0, 0, width - 1, 0)), x + self.bias
        for place, weight in enumerate(self.weight):
            y = y + weight * padded[:, place : place + length]
        return y


class Block(nn.Module):
    """Attention and MLP, each with layer norm, shift, scale and gate from the condition (adaLN, zero at the start)."""

    def __init__(self, m: ModelArgs) -> None:
        super().__init__()
        self.heads, self.cap, self.dropout, d = m.heads, m.attention_cap, m.dropout, m.width
        self.back = max(m.conv - 1, 0)  # tokens that a convolution looks back
        self.norm1, self.norm2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.conv1, self.conv2 = (ShortConv(d, m.conv) if m.conv else nn.Identity() for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.modulation = zero(nn.Linear(m.cond_width, 6 * d))

    def forward(self, x: Tensor, cond: Tensor, rope: Tensor, memory: Memory | None) -> Tensor:
        """x (B, n, d) behind the tokens in memory, cond (B, cond_width), rope (2, n, d / heads / 2) -> (B, n, d)"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)[:, None].chunk(6, -1)
        x = self.convolve(self.conv1, x, memory)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, n, d / heads)
        k, v = remembered(rotate(k, rope), memory, self, "k"), remembered(v, memory, self, "v")  # (B, heads, L, ..)
        y = attention(rotate(q, rope), k, v, self.cap).transpose(1, 2).flatten(2)
        x = self.convolve(self.conv2, x + gate1 * F.dropout(self.out(y), self.dropout, self.training), memory)
        return x + gate2 * F.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2), self.dropout, self.training)

    def convolve(self, conv: nn.Module, x: Tensor, memory: Memory | None) -> Tensor:
        n = x.shape[1]
        return conv(remembered(x, memory, conv)[:, -(n + self.back) :])[:, -n:]


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
    """Causal transformer: token ids (B, n) -> logits (B, n, V) of the tokens that follow them [P 3].

    At the start all logits are 0. `trunk` and `head` are separate so that a loss can make logits a few rows at a time.
    The condition is that of time 0 [deviation: the authors' causal blocks have none; so all models have equal weights].
    """

    rope: Tensor

    def __init__(self, m: ModelArgs, vocab: int) -> None:
        super().__init__()
        self.cap, self.precision = m.logit_cap, m.precision
        bound = 1 / math.sqrt(m.width)
        self.embed = nn.Parameter(torch.empty(vocab + 1, m.width).uniform_(-bound, bound))  # E (V + 1, d)
        self.time = TimeEmbedding(m.cond_width)
        self.blocks = nn.ModuleList(Block(m) for _ in range(m.layers))
        self.norm = nn.LayerNorm(m.width, bias=False)
        self.modulation = zero(nn.Linear(m.cond_width, 2 * m.width))
        self.output = zero(nn.Linear(m.width, vocab))
        half = m.width // m.heads // 2
        angle = torch.arange(m.length)[:, None] * torch.exp(torch.arange(half) * (-math.log(10_000) / half))
        self.register_buffer("rope", torch.stack([angle.cos(), angle.sin()]), persistent=False)  # (2, L, half)

    def trunk(self, y: Tensor, place: int = 0, memory: Memory | None = None) -> tuple[Tensor, Tensor]:
        """-> features (B, n, d), cond (B, cond_width); place: of the first of the n, those before it are in memory"""
        h = self.embed[y]
        cond = F.silu(self.time(h.new_zeros(len(h))))
        rope = self.rope[:, place : place + y.shape[1]]
        with torch.autocast(h.device.type, torch.bfloat16, enabled=use_bf16(self.precision, h.device)):
            for block in self.blocks:
                h = block(h, cond, rope, memory)
        return h, cond

    def head(self, h: Tensor, cond: Tensor) -> Tensor:
        """features (B, L, d), cond (B, cond_width) -> capped logits (B, L, V), float32"""
        with torch.autocast(h.device.type, torch.bfloat16, enabled=use_bf16(self.precision, h.device)):
            shift, scale = self.modulation(cond)[:, None].chunk(2, -1)
            logits = self.output(self.norm(h) * (1 + scale) + shift)
        logits = logits.to(self.output.weight.dtype)
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def forward(self, y: Tensor, place: int = 0, memory: Memory | None = None) -> Tensor:
        return self.head(*self.trunk(y, place, memory))


# --- Training --------------------------------------------------------------------------------------------------------


def learning_rate(step: int, a: TrainArgs) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last share `decay` of the steps."""
    left = (a.total_steps - step) / (a.decay * a.total_steps) if a.decay else 1.0
    return a.lr * min(1.0, (step + 1) / max(a.warmup, 1), left)


def validate(net: DiT, rows: np.ndarray) -> dict[str, float]:
    """-log p of held-out rows in nats per token: exact, no bound."""
    return {"valid/ce": -log_likelihood(net, token_ids(rows[:1_024], net.embed.device)).mean().item()}


def train(run: TextRun, net: DiT, args: Args) -> DiT:
    """Optimize; log, evaluate and save when due. Draws are functions of seed and step. Returns the averaged net."""
    r, m, a, ranks, device = args.run, args.model, args.train, run.ranks, run.device
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=a.lr, betas=(0.9, a.beta2), weight_decay=0.0, fused=True)
    averages = Averages()  # metrics since the last line of the log
    run.open_log(a.total_steps, sum(p.numel() for p in net.parameters()), r.wandb_project, r.tensorboard)
    run.track(averages=averages, net=net, ema=ema, optimizer=optimizer)
    meter = Meter(
        net, batch=a.batch, layers=m.layers, length=m.length, width=m.width, processes=ranks.world,
        bf16=use_bf16(m.precision, device), step=run.step,
    )  # fmt: skip
    if r.compile:
        net.trunk = torch.compile(net.trunk)
    few = min(32, args.sample.samples)
    net.train()
    while not run.stop_requested() and run.step < a.total_steps:
        torch.manual_seed(mixed_seed(r.seed, 3, run.step, ranks.rank))  # dropout
        losses = []
        optimizer.zero_grad()
        for places, tokens in micro_batches(run.data.train, run.step, a.batch, a.micro_batch, r.seed, ranks, device):
            loss = len(places) / (a.batch // ranks.world) * ar_loss(net, tokens, a.loss_rows)
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
            run.log_validation(validate(ema, run.data.valid))
            run.log_samples(functools.partial(generate, ema, args, few), (m.length,))
        if run.due(r.checkpoint_every):
            run.save()
    run.save()
    return ema


def report_entropy(run: TextRun, net: DiT, texts: Tensor, sample: SampleArgs, tag: str) -> None:
    """Print and store the entropy of the law that these texts (n, L) are drawn from, in nats per token.

    It is exact up to the number of texts; the entropy of token frequencies in the table is its stand-in for models that
    have no likelihood. What a judge pays beyond it is the divergence of this law from the judge's.
    """
    nats = -log_likelihood(net, texts, sample.temperature, sample.top_p).mean(1)  # (n,)
    found = {
        "entropy": nats.mean().item(),
        "standard_error": nats.std(correction=0).item() / math.sqrt(len(nats)),
        "unigram_entropy": unigram_entropy(texts.cpu().numpy()),
        "held_out_nll": validate(net, run.data.valid)["valid/ce"],
    }
    how = {"step": run.step, "samples": len(texts), "temperature": sample.temperature, "top_p": sample.top_p}
    write_json(run.folder / f"entropy{tag}.json", how | found)
    run.say(
        f"entropy of these samples, -mean log p: {found['entropy']:.3f} +- {found['standard_error']:.3f} nats a token; "
        f"of their token frequencies {found['unigram_entropy']:.3f}; -log p of real text {found['held_out_nll']:.3f}"
    )


# What a checkpoint's weights fit.
FIXED = ("data", "length", "layers", "width", "heads", "cond_width", "conv", "seed", "batch")


def main(argv: list[str]) -> None:
    args, saved, folder = start(
        argv, default_args, chosen_by=("data",), weights=(DiT, before), folder_name="ar__{data}__s{seed}", fixed=FIXED
    )  # fmt: skip
    r, m, sample = args.run, args.model, args.sample
    ranks, data_dir = Ranks.of_torchrun(), Path(r.data_dir)
    device = pick_device(r.device, r.threads, float64=True)
    torch.set_float32_matmul_precision("high")  # TF32 for the fp32 products of a GPU
    data = open_text(r.data, m.length, data_dir, m.tokenizer, m.tokenizer_path, ranks)
    vocab = data.tokenizer.vocab_size
    check_fit("onehot", vocab, m.width, m.heads, args.train.batch, ranks.world, (m.length,))
    judge = load_judge(sample.judge, sample.judge_path, data, data_dir, device) if ranks.chief else None
    torch.manual_seed(r.seed)
    net = DiT(m, vocab).to(device)
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
            texts = generate(net, args, sample.samples, m.length)
            tag = sampler_tag(sample, default_args(r.data).sample)
            run.evaluate(lambda calls: texts, (m.length,), sample.samples, sample.show, tag)
            report_entropy(run, net, texts, sample, tag)


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
