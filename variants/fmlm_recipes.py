"""FMLM by the paper's other identities: the Lagrangian and the Eulerian one, with derivatives of the student.

Paper: "Flow Map Language Models: One-step Language Modeling via Continuous Denoising", arXiv 2602.16813 (v3; settings
of its later released code [C], whose differences to v1 docs/fmlm_distill.md lists). [P n] are our section numbers
there; [deviation: why] marks where we differ.

A variant of fmlm_distill.py: `diff fmlm_distill.py variants/fmlm_recipes.py` shows all of it. Both targets contain the
derivative of delta_{s,t} in a time, by forward-mode differentiation of the student [P 2.3, 2.4].

    python variants/fmlm_recipes.py --teacher runs/FLM_RUN --recipe lagrangian
    python variants/fmlm_recipes.py --teacher runs/FLM_RUN --recipe eulerian

Symbols
    paper               here                      shape
    y                   tokens                    (B, L)       token ids below V
    x_1 = onehot(y)     space.tokens(y)           (B, L, W)    W = V in one-hot space, d in embedding space
    x_s                 x                         (B, L, W)    (1 - s) x_0 + s x_1, x_0 ~ N(0, I)
    s <= u <= t         s, u, t                   (B,)         times; tau_s, tau_u, tau_t in decoding accuracy
    delta_{s,t}(x)      probs                     (B, L, V)    two-time denoiser, softmax of student(x, tau_s, tau_t)
    X_{s,t}(x)          jump(x, probs, s, t)      (B, L, W)    flow map
    D_t(x)              teacher(x, tau_t)         (B, L, V)    denoiser; delta_{t,t}
    E                   net.embed                 (V, d)       the network reads x only through x E
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for common/
from common import checkpoint, cli
from common.batches import Ranks, micro_batches, mixed_seed, row_noise, rows_at_once
from common.machine import use_bf16
from common.meter import Meter
from common.ranges import Count, Fraction, Helpers, Natural, NonNegative, Positive, RowLength, Seed, Several, Size, Unit
from common.released import load_released
from common.runlog import Averages
from common.start import CHECKPOINT, load_run, pick_device, start
from common.tensors import flex_attention, interpolate
from common.text_run import TextRun, check_fit, load_averaged, load_judge, open_text, saved_args

# --- Arguments. With a teacher its data and network are taken over; SETTINGS holds what other data change. -----------


@dataclass
class RunArgs:
    """What to run, and where its files go."""

    teacher: str = ""  # run folder of flm_train.py or official .ckpt; empty: the diagonal learns from the data
    data: str = "austen"  # the teacher's; else austen, captions, toy, lm1b, openwebtext, a file, folder or hub name
    seed: Seed = 1  # seeds weights, row order, times and noise
    eval: str = ""  # run folder to evaluate: no training
    released: str = ""  # official Lightning checkpoint (.ckpt) to evaluate: no training; give its --data
    resume: str = ""  # run folder to continue from its newest checkpoint, exactly as if it had not stopped
    run_name: str = ""  # name of the run folder; default: fmlm, data, recipe, seed and time
    run_dir: str = "runs"  # folder of all run folders
    data_dir: str = "data"  # where tokenized data, tokenizers and judges are cached
    device: str = "auto"  # torch device; auto: cuda if there is one, else cpu
    threads: Helpers = 0  # torch threads on a CPU; 0: torch's default
    compile: bool = False  # torch.compile the network; on a CPU it needs a C++ compiler and pays after minutes
    wandb_project: str = ""  # also log to this Weights & Biases project
    tensorboard: bool = False  # also log to TensorBoard files in the run folder
    log_every: Count = 50  # steps between lines of metrics.jsonl
    eval_every: Count = 500  # steps between samples in one, two and four calls
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
class DistillArgs:
    """Flow-map distillation [P 2]."""

    recipe: Literal["lagrangian", "eulerian"] = "lagrangian"  # identity the student learns
    space: Literal["embedding", "onehot"] = "embedding"  # where noise and states live: (d,) or (V,) numbers a token
    reparam: bool = True  # times are measured in decoding accuracy; as the teacher
    diagonal: Unit = 0.5  # share of the rows with s = t
    teacher_temperature: Positive = 0.55  # of the teacher's last predictions, that of the first is 1; paper: 1
    boundary: Unit = 1 / 4  # share of the other rows with the whole jump, from 0 to 1; paper: 1/32, of a batch of 512
    lagrangian_teacher: bool = False  # D_t of the Lagrangian recipe from the teacher; released: from the student


@dataclass
class TrainArgs:
    """Optimization [P 4]."""

    total_steps: Count = 3_000  # optimizer steps
    batch: Size = 16  # rows per optimizer step, over all processes
    micro_batch: Natural = 16  # rows per forward pass of one process (gradient accumulation); 0: all, best on a GPU
    lr: NonNegative = 1e-3  # peak learning rate
    warmup: Natural = 100  # steps of linear warm-up
    decay: Unit = 0.3  # last share of the steps, over which the learning rate falls linearly to 0; paper: 0
    beta2: Fraction = 0.95  # AdamW
    clip: Positive = 1.0  # gradient-norm clip
    ema: Fraction = 0.99  # decay of the averaged weights, min(ema, (1 + n) / (10 + n)); they are what samples


@dataclass
class SampleArgs:
    """Sampling and evaluation [P 2.6, 5]."""

    steps: tuple[Size, ...] = (1, 2, 4, 8, 32, 128)  # numbers of network calls to evaluate
    samples: Size = 256  # texts per number of steps
    temperature: Positive = 1.0  # of the predictions; below 1: likelier tokens, less entropy
    gamma: Unit = 0.0  # renoising after every jump: 0 none, 1 all; the paper evaluates LM1B at 0.8, OWT at 1
    judge: str = "ngram"  # ngram, smollm2, gpt2, gpt2-medium, gpt2-large, gpt2-xl
    judge_path: str = ""  # file or folder of the judge's weights, instead of fetching them
    show: Natural = 3  # samples printed


@dataclass
class Args:
    run: RunArgs = field(default_factory=RunArgs)
    model: ModelArgs = field(default_factory=ModelArgs)
    distill: DistillArgs = field(default_factory=DistillArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    sample: SampleArgs = field(default_factory=SampleArgs)


PAPER = dict(
    layers=12, width=768, heads=12, dropout=0.1, embed_init="uniform", total_steps=550_000, batch=512, micro_batch=0,
    boundary=1 / 32, lr=3e-4, warmup=2_500, decay=0.0, beta2=0.95, ema=0.9999, eval_every=10_000,
    checkpoint_every=5_000, samples=1024, judge="gpt2-large", conv=0, self_condition=0.0, teacher_temperature=1.0,
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # data -> changes to the defaults
    "lm1b": PAPER | dict(length=128, gamma=0.8),
    "openwebtext": PAPER | dict(length=1024, batch=128, gamma=1.0),
    "captions": dict(length=32, dropout=0.1, batch=32, micro_batch=32, total_steps=1_000, steps=(1, 2, 4, 8)),
    "toy": dict(
        length=8, layers=2, width=128, heads=4, embed_init="uniform", space="onehot", batch=128, micro_batch=0,
        boundary=1 / 32, total_steps=400, lr=2e-3, warmup=50, eval_every=200, checkpoint_every=200, samples=2_048,
        steps=(1, 4), precision="fp32", conv=0, self_condition=0.0, teacher_temperature=1.0,
    ),
}  # fmt: skip


def default_args(teacher: str = "", data: str = "austen") -> Args:
    """Defaults for some data: the dataclasses, then its row of SETTINGS; data and network are the teacher's."""
    taken = {}
    if teacher and not teacher.endswith(".ckpt"):
        flow = {"predict": "denoiser", "softmax": True}  # what variants/flm_ablations.py changes
        names = ("data", "space", "reparam", *vars(ModelArgs()))
        taken = saved_args(load_run(Path(teacher), FLOW), teacher, names, flow)
    data = taken.get("data", data)
    return cli.override(Args(), dict(data=data) | SETTINGS.get(data.split(":")[0], {}) | dict(teacher=teacher) | taken)


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

Net = Callable[..., Tensor]  # (x E, *tau) -> logits


def distill_loss(
    student: Net, teacher: Net | None, space: Space, tokens: Tensor, tau_s: Tensor, tau_t: Tensor, xi: Tensor,
    clock: Clock, d: DistillArgs,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Cross entropy of delta_{s,t} with its target, mean over tokens [P 2.2]; rows with s = t lie on the diagonal.

    tokens (B, L), tau_s and tau_t (B,), xi (B, L, W) standard normal. Diagonal target: the teacher's softmax, or the
    data if there is no teacher. The Eulerian target is off the simplex: squared error summed over V.
    """
    x = interpolant(space, tokens, xi, clock.t(tau_s))
    log_probs = student(space.read(x), tau_s, tau_t).log_softmax(-1)  # (B, L, V)
    same, off = tau_s == tau_t, tau_s != tau_t
    with torch.no_grad():
        target = torch.empty_like(log_probs)
        if teacher:
            target[same] = teacher(space.read(x[same]), tau_s[same]).softmax(-1)
        else:
            target[same] = F.one_hot(tokens[same], target.shape[-1]).to(target.dtype)
        if off.any():
            target[off] = map_target(student, teacher, space, x[off], tau_s[off], tau_t[off], clock, d)
    loss = -(target * log_probs).sum(-1).mean(-1)  # (B,)
    if d.recipe == "eulerian":
        loss = torch.where(off, (log_probs.exp() - target).square().sum(-1).mean(-1), loss)
    info = {"loss": loss.mean(), "diagonal": loss[same].sum() / len(loss), "off_diagonal": loss[off].sum() / len(loss)}
    return loss.mean(), {k: v.detach() for k, v in info.items()}


def map_target(
    student: Net, teacher: Net | None, space: Space, x: Tensor, tau_s: Tensor, tau_t: Tensor, clock: Clock,
    d: DistillArgs,
) -> Tensor:  # fmt: skip
    """Target of the rows off the diagonal by the recipe: x (n, L, W), tau_s < tau_t (n,) -> (n, L, V)."""

    def own(h: Tensor, tau: Tensor) -> Tensor:
        return student(h, tau, tau)  # the student's denoiser

    if d.recipe == "lagrangian":
        denoiser = teacher if d.lagrangian_teacher and teacher else own
        return lagrangian_target(student, denoiser, space, x, tau_s, tau_t, clock)
    return eulerian_target(student, teacher or own, space, x, tau_s, tau_t, clock)


def jump(space: Space, x: Tensor, probs: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """X_{s,t}(x) = ((1 - t) x + (t - s) delta) / (1 - s) [P 2.1]: x (B, L, W), probs (B, L, V), s < 1 and t (B,)."""
    s, t = s[:, None, None], t[:, None, None]
    return ((1 - t) * x + (t - s) * space.mean(probs)) / (1 - s)


def two_times(step: int, batch: int, seed: int, d: DistillArgs) -> tuple[Tensor, Tensor]:
    """tau_s <= tau_t (batch,) [P 2.2]: exact shares of diagonal, whole-jump and other rows, in random order.

    Diagonal rows: stratified. Others: length dt and place both stratified, tau_s = place (1 - dt).
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, 1, step))

    def stratified(n: int) -> Tensor:
        place = torch.randperm(n, generator=generator)
        return (place + torch.rand(n, generator=generator, dtype=torch.float64)) / max(n, 1)

    same = round(batch * d.diagonal)
    whole = round((batch - same) * d.boundary)
    diagonal, dt, place = stratified(same), stratified(batch - same).clamp(min=1e-6), stratified(batch - same)
    dt[:whole], place[:whole] = 1.0, 0.0
    tau_s = place * (1 - dt)
    order = torch.randperm(batch, generator=generator)
    return torch.cat([diagonal, tau_s])[order], torch.cat([diagonal, tau_s + dt])[order].clamp(max=1.0)


def col(x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1)"""
    return x[:, None, None]


def tau_rate(t: Tensor, clock: Clock) -> Tensor:
    """d tau / d t"""
    if clock.table is None:
        return torch.ones_like(t)
    i = torch.searchsorted(clock.table[0], t.double().contiguous()).clamp(1, clock.table.shape[1] - 1)
    step = clock.table[:, i] - clock.table[:, i - 1]
    return (step[1] / step[0]).to(t.dtype)


def lagrangian_target(
    student: Net, denoiser: Net, space: Space, x: Tensor, tau_s: Tensor, tau_t: Tensor, clock: Clock
) -> Tensor:
    """delta_{s,t} = D_t(X_{s,t}(x)) - (t - s)(1 - t) / (1 - s) d/dt delta_{s,t}, back on the simplex [P 2.3]."""
    s, t = clock.t(tau_s), clock.t(tau_t)
    log_probs, rate = torch.func.jvp(
        lambda tau: student(space.read(x), tau_s, tau).log_softmax(-1), (tau_t,), (tau_rate(t, clock),)
    )
    probs = log_probs.exp()
    end = denoiser(space.read(jump(space, x, probs, s, t)), tau_t).softmax(-1)
    return project_to_simplex(end - col((t - s) * (1 - t) / (1 - s)) * probs * rate)


def eulerian_target(
    student: Net, denoiser: Net, space: Space, x: Tensor, tau_s: Tensor, tau_t: Tensor, clock: Clock
) -> Tensor:
    """delta_{s,t} = D_s(x) + (1 - s)(t - s) / (1 - t) d/ds delta_{s,t}, total derivative along the flow [P 2.4].

    Not on the simplex; at t = 1 the factor has no finite value, so t is kept below 1 - 1e-3.
    """
    s, t = clock.t(tau_s), clock.t(tau_t)
    start_probs = denoiser(space.read(x), tau_s).softmax(-1)
    velocity = (space.mean(start_probs) - x) / col(1 - s)
    log_probs, rate = torch.func.jvp(
        lambda x, tau: student(space.read(x), tau, tau_t).log_softmax(-1), (x, tau_s), (velocity, tau_rate(s, clock))
    )
    return start_probs + col((1 - s) * (t - s) / (1 - t).clamp(min=1e-3)) * log_probs.exp() * rate


def project_to_simplex(v: Tensor) -> Tensor:
    """Euclidean projection of (..., V), the sparsemax."""
    ranked = v.sort(-1, descending=True).values
    excess = ranked.cumsum(-1) - 1
    count = torch.arange(1, v.shape[-1] + 1, device=v.device)
    support = (ranked * count > excess).sum(-1, keepdim=True).clamp(min=1)  # 0 of NaN only
    return (v - excess.gather(-1, support - 1) / support).clamp(min=0)


# --- Sampler ---------------------------------------------------------------------------------------------------------


def tau_at(t: Tensor, clock: Clock) -> Tensor:
    """tau(t), the inverse of clock.t."""
    return t if clock.table is None else interpolate(t, clock.table[0], clock.table[1])


def sample_flow_map(
    net: Net, space: Space, x: Tensor, steps: int, clock: Clock, gamma: float, generator: torch.Generator,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """Jumps on a uniform grid in tau, argmax at the end [P 2.6]: x (B, L, W) noise -> tokens (B, L).

    With gamma > 0 every jump but the last goes past the next time, to noise level sqrt(1 - gamma^2) of that time's,
    and comes back with fresh noise; at 1 that is a jump to the end and noise anew.
    """
    tau = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=x.device)
    t, one = clock.t(tau), torch.ones(len(x), dtype=torch.float64, device=x.device)
    for i in range(steps):
        level = 1 - t[i + 1]
        kept = level * math.sqrt(1 - gamma**2)
        logits = net(space.read(x), tau[i] * one, tau_at(1 - kept, clock) * one)
        probs = (logits / temperature).softmax(-1)
        if i < steps - 1:
            x = jump(space, x, probs, (t[i] * one).to(x.dtype), ((1 - kept) * one).to(x.dtype))
        if i < steps - 1 and gamma:
            fresh = space.noise(torch.randn(x.shape, generator=generator, device=x.device))
            x = x + (kept - level).to(x.dtype) * space.mean(probs) + (gamma * level).to(x.dtype) * fresh
    return probs.argmax(-1)


@torch.no_grad()
def generate(net: DiT, args: Args, clock: Clock, samples: int, steps: int) -> Tensor:
    """`samples` texts (samples, L) in `steps` network calls each; a function of the weights and the seed."""
    net.eval()
    sample, device, space, texts = args.sample, net.embed.device, make_space(net, args.distill.space), []
    generator = torch.Generator(device).manual_seed(args.run.seed)
    rows = rows_at_once(device, args.model.length)
    for done in range(0, samples, rows):
        shape = (min(rows, samples - done), args.model.length, space.width)
        x = space.noise(torch.randn(shape, generator=generator, device=device))
        texts.append(sample_flow_map(net, space, x, steps, clock, sample.gamma, generator, sample.temperature))
    return torch.cat(texts)


def sampler_tag(sample: SampleArgs) -> str:
    """Part of the names of the files of an evaluation; empty for the paper's sampler."""
    gamma = f"_gamma{sample.gamma:g}" if sample.gamma else ""
    return gamma + (f"_t{sample.temperature:g}" if sample.temperature != 1 else "")


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


def make_student(teacher: DiT | None, m: ModelArgs, vocab: int) -> DiT:
    """Two-time network that starts as the teacher: its second time embedding is zero [P 2.2].

    E stays the teacher's, so that both read one noise [deviation: released students train theirs].
    """
    student = DiT(m, vocab, times=2)
    if teacher is not None:
        student.load_state_dict(student.state_dict() | teacher.state_dict())
        student.embed.requires_grad_(False)
    zero(student.times[1].mlp[2])
    return student


def second_pass(teacher: DiT, temperature: float, h: Tensor, tau: Tensor) -> Tensor:
    """Logits of a teacher that also reads the prediction of its first pass, if it has learnt to [P 3]."""
    if teacher.recall is not None:
        h = h + teacher.recall(cooled(teacher(h, tau), tau, temperature).softmax(-1) @ teacher.embed)
    return cooled(teacher(h, tau), tau, temperature)


def cooled(logits: Tensor, tau: Tensor, temperature: float) -> Tensor:
    """Logits (B, L, V) at a temperature that falls evenly from 1 at tau = 0 to `temperature` at 1; tau (B,) or ()."""
    return logits / (1 - (1 - temperature) * tau.to(logits.dtype))[..., None, None]


def learning_rate(step: int, a: TrainArgs) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last share `decay` of the steps."""
    left = (a.total_steps - step) / (a.decay * a.total_steps) if a.decay else 1.0
    return a.lr * min(1.0, (step + 1) / max(a.warmup, 1), left)


def train(run: TextRun, student: DiT, teacher: DiT | None, clock: Clock, args: Args) -> DiT:
    """Optimize; log, evaluate and save when due. Draws are functions of seed and step. Returns the averaged student."""
    r, m, d, a, ranks, device = args.run, args.model, args.distill, args.train, run.ranks, run.device
    ema = copy.deepcopy(student).requires_grad_(False)
    trained = nn.ModuleDict({"student": student})
    weights = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=a.lr, betas=(0.9, a.beta2), weight_decay=0.0, fused=True)
    averages = Averages()  # metrics since the last line of the log
    run.open_log(a.total_steps, sum(p.numel() for p in student.parameters()), r.wandb_project, r.tensorboard)
    run.track(averages=averages, objective=trained, ema=ema, optimizer=optimizer)
    meter = Meter(
        student, batch=a.batch, layers=m.layers, length=m.length, width=m.width, processes=ranks.world,
        bf16=use_bf16(m.precision, device), step=run.step, forwards=3 * (1 - d.diagonal) + d.diagonal,
    )  # fmt: skip
    if r.compile:
        student.trunk = torch.compile(student.trunk)
    denoiser = teacher and functools.partial(second_pass, teacher, d.teacher_temperature)
    space, few = make_space(student, d.space), min(32, args.sample.samples)
    trained.train()
    while not run.stop_requested() and run.step < a.total_steps:
        torch.manual_seed(mixed_seed(r.seed, 3, run.step, ranks.rank))  # dropout
        batch_tau_s, batch_tau_t = (tau.to(device) for tau in two_times(run.step, a.batch, r.seed, d))  # (batch,)
        infos = []
        optimizer.zero_grad()
        for places, tokens in micro_batches(run.data.train, run.step, a.batch, a.micro_batch, r.seed, ranks, device):
            tau_s, tau_t = batch_tau_s[places].float(), batch_tau_t[places].float()
            xi = row_noise(run.step, places, (m.length, space.width), r.seed, device)  # (B, L, W)
            loss, info = distill_loss(student, denoiser, space, tokens, tau_s, tau_t, xi, clock, d)
            share = len(places) / (a.batch // ranks.world)
            (share * loss).backward()
            infos.append({k: share * v for k, v in info.items()})
        ranks.average_gradients(weights)
        grad_norm = nn.utils.clip_grad_norm_(weights, a.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, a)
        optimizer.step()
        decay = min(a.ema, (1 + run.step) / (10 + run.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - decay)
        means = {k: torch.stack([info[k] for info in infos]).sum() for k in info}
        averages.add(ranks.mean(means | {"grad_norm": grad_norm}))
        run.step += 1

        if run.due(r.log_every):
            metrics = averages.take()
            run.stop_if_not_finite(metrics)
            run.log_training(metrics, meter.take(run.step))
        if run.due(r.eval_every) and ranks.chief:
            run.log_samples(functools.partial(generate, ema, args, clock, few), (1, 2, 4, 8))
        if run.due(r.checkpoint_every):
            run.save()
    run.save()
    return ema


# What a checkpoint's weights fit: these arguments and definitions; a teacher's fit those of FLOW.
FIXED = (
    *("teacher", "data", "length", "layers", "width", "heads", "cond_width", "conv", "self_condition"),
    *("recipe", "seed", "batch"),
)
FLOW = (DiT, Clock, EmbeddingSpace, OneHotSpace, interpolant)


def main(argv: list[str]) -> None:
    args, saved, folder = start(
        argv, default_args, chosen_by=("teacher", "data"), weights=(*FLOW, make_student, jump),
        folder_name="fmlm__{data}__{recipe}__s{seed}", fixed=FIXED,
    )  # fmt: skip
    r, m, d, sample = args.run, args.model, args.distill, args.sample
    ranks, data_dir = Ranks.of_torchrun(), Path(r.data_dir)
    device = pick_device(r.device, r.threads, float64=True)
    torch.set_float32_matmul_precision("high")  # TF32 for the fp32 products of a GPU
    data = open_text(r.data, m.length, data_dir, m.tokenizer, m.tokenizer_path, ranks)
    vocab = data.tokenizer.vocab_size
    check_fit(d.space, vocab, m.width, m.heads, args.train.batch, ranks.world, sample.steps)
    judge = load_judge(sample.judge, sample.judge_path, data, data_dir, device) if ranks.chief else None
    torch.manual_seed(r.seed)
    teacher = None
    if r.teacher and not (r.eval or r.released):
        teacher = DiT(m, vocab).to(device).requires_grad_(False).eval()
        if r.teacher.endswith(".ckpt"):
            load_released(Path(r.teacher), teacher)
        else:
            load_averaged(teacher, checkpoint.load(Path(r.teacher) / CHECKPOINT), data, r.teacher)
    net = make_student(teacher, m, vocab).to(device)
    if teacher is None and m.embed_init == "frequency":
        net.scale_rows(torch.from_numpy(data.counts()).to(device))
    clock = Clock(accuracy_table(vocab).to(device) if d.reparam else None)
    run = TextRun(folder, saved, args=cli.flatten(args), ranks=ranks, device=device, data=data, judge=judge)
    with ranks, run:
        if r.eval:
            load_averaged(net, saved, data, r.eval)
        elif r.released:
            load_released(Path(r.released), net)
        else:
            with run.stop:  # only here a signal has to wait
                net = train(run, net, teacher, clock, args)
        if run.stop_requested():
            run.say(run.how_to_go_on())
        elif ranks.chief:
            make = functools.partial(generate, net, args, clock, sample.samples)
            run.evaluate(make, sample.steps, sample.samples, sample.show, sampler_tag(sample))


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
