"""OGPO of a diffusion policy over action chunks: DDPM training, DDPM or DDIM chains with Gaussian likelihoods.

Paper: "OGPO: Sample Efficient Full-Finetuning of Generative Control Policies", arXiv 2605.03065 v3 (ICML 2026), whose
equations reach this file through the project page [S] and the released code [C], generation 3 of its run scripts.
Tags such as [S 1.4] or [C] name the source of a line; [deviation: why] marks where we differ. docs/ogpo_state.md
holds the whole list.

A variant of ogpo_state.py: `diff ogpo_state.py variants/ogpo_diffusion.py` shows all of it. The network predicts the
noise that DDPM training added in 20 steps of a cosine schedule; a chain makes --flow-steps steps over it (20: DDPM;
fewer: DDIM with eta 1), each a Gaussian no narrower than --noise-std; without noise (eta 0) it is the evaluated
policy. Objective, critics and stabilizers are those of ogpo_state.py. Chain, floor and clipping follow DPPO.

    python variants/ogpo_diffusion.py --env lift

Symbols
    paper            here                        shape
    s                obs                         (n, O)
    a, chunk of H    action                      (n, D), D = H * A, in [-1, 1]
    a_K ... a_0      chain[:, 0] ... chain[:, K] (n, K+1, D)   the paper counts down, the code counts up
    alpha-bar        signal                      (K+1,)        the chunk's share of the variance, rises to 1
    eps_theta        actor                       (n, D)        noise network
    theta-bar        actor_ema                                 acts, proposes chains, is the old policy of the ratio
    sigma_k          sigmas                      (K,)          noise of each denoising step
    Q_m, Q-bar_m     critic, critic_ema          (M, n)        ensemble of M heads
    omega            ratio                       (n,)          one per chain
    A                advantage                   (n,)          from G chains per state
    D_succ           success batches             marks in the replay buffer
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve small tensors

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for common/
from common import checkpoint, cli, settings
from common.errors import UserError
from common.machine import compile_functions
from common.replay import Batch, ReplayBuffer
from common.run import Policy, Run, RunArgs, TaskArgs
from common.start import start
from common.stopwatch import Stopwatch

# --- Arguments. Values are the `cpu` preset's; common/settings.py holds what other presets and tasks change. ----------


@dataclass
class PolicyArgs:
    """Flow policy over action chunks [S 1.1-1.3] and how it acts [S 1.8]."""

    chunk: int = 4  # H, environment steps per action chunk, all executed
    flow_steps: int = 4  # K, denoising steps
    actor_hidden: tuple[int, ...] = (256, 256, 256)  # widths of the velocity network
    normalize_obs: bool = True  # standardise observations with the demonstrations' statistics; released: no
    noise_std: float = 0.05  # least standard deviation of a step, drawn and scored [DPPO: 0.1]
    noise_clip: float = 3.0  # standard normal draws are clipped to this many deviations [C]
    clip_chain_end: bool = False  # released: the new policy scores the clipped last state; biases the ratio
    best_of_n: int = 8  # N, candidates per decision, the target critics pick one; 1 turns it off [S 1.8]
    best_of_n_heads: int = 2  # a candidate scores the minimum of this many random heads; 0: mean of all [C]
    actor_ema: float = 0.02  # step size of the target actor towards the actor


@dataclass
class PretrainArgs:
    """Behaviour cloning by flow matching [S 1.2], stopped while the policy is still mediocre."""

    cloned: str = ""  # run folder whose cloned policy to start from, instead of cloning again
    bc_steps: int = 20_000  # most gradient steps
    bc_lr: float = 3e-4  # learning rate
    bc_batch: int = 256  # chunks per step
    bc_stop_success: float = 0.5  # stop at the first evaluation above it, keep the last policy at or below it
    bc_eval_every: int = 100  # gradient steps between evaluations
    bc_eval_episodes: int = 32  # episodes of each of them


@dataclass
class ActorArgs:
    """Policy extraction [S 1.4-1.6] and success-buffer regularization [S 1.8]."""

    variant: Literal["ogpo", "ogpo+", "ogpo+ca"] = "ogpo+ca"  # plain; + success buffer, best-of-N; + conservative A
    advantage: Literal["conservative", "vanilla", "penultimate", "positive", "grpo"] = "conservative"  # [S 1.5]
    states: int = 64  # replay states per update
    group: int = 8  # G, chains per state
    clip: float = 0.01  # epsilon of the clipped objective, on the normalised ratio
    bc_coef: float = 1.0  # lambda, weight of the flow-matching loss on successful episodes; 0 turns it off
    bc_fallback: bool = False  # use any replay chunk for that loss until enough successes exist [C]
    success_batch: int = 256  # chunks per success batch, drawn with replacement
    success_min: int = 64  # none before this many chunk starts have succeeded; released: 256
    actor_lr: float = 3e-4  # peak learning rate
    actor_lr_min: float = 3e-4  # learning rate at the start and end of each period
    actor_lr_warmup: int = 0  # updates of the actor in the linear warm-up at the start of each period
    actor_lr_period: int = 0  # updates of the actor per warm-up and cosine decay, repeated; 0: constant
    actor_weight_decay: float = 0.0  # AdamW weight decay of the actor
    micro_batch: int = 1024  # chains processed at a time: bounds memory, changes nothing else
    skip_zero: bool = True  # leave chains with zero advantage out of the likelihood pass: exact, saves time


@dataclass
class CriticArgs:
    """Critic ensemble on chunked temporal-difference targets [S 1.7]."""

    reward_offset: float = -1.0  # added to every raw reward: -1 per step makes speed count [C]
    success_bonus: float = 5.0  # added on the step that succeeds [C]
    gamma: float = 0.99  # discount per environment step
    heads: int = 4  # M, independent critics
    critic_hidden: tuple[int, ...] = (256, 256, 256)  # widths of each critic
    critic_batch: int = 256  # chunks per update
    critic_lr: float = 1e-3  # learning rate; Adam moves a value by about this much an update, over a range of 100
    critic_weight_decay: float = 0.0  # AdamW weight decay of the critics
    critic_ema: float = 0.05  # step size of the target critics
    next_samples: int = 1  # G', next actions behind a target; several are Q-variance reduction [S 1.9]
    next_reduce: Literal["mean", "median", "trimmed"] = "mean"  # of their values, per head; trimmed: their middle half
    pessimistic_init: bool = True  # critics start at the value of never succeeding, not at 0 as released
    critic_warmup: int = 250  # updates of the critics alone
    choose_successes: int = 2  # successful episodes, and critic_warmup, before best-of-N acts
    critic_successes: int = 10  # successful episodes, and critic_warmup, before the actor moves
    success_critic: bool = False  # a second critic step on a success batch [C]


@dataclass
class LoopArgs:
    """Online loop."""

    total_steps: int = 20_000  # environment steps
    start_training: int = 2_000  # environment steps collected before the first update
    update_every: int = 4  # environment steps per update (one actor and one critic step)
    replay_size: int = 1_000_000  # replay rows
    max_grad_norm: float = 1_000.0  # gradient-norm clip [C], in practice inactive


@dataclass
class Args:
    run: RunArgs = field(default_factory=RunArgs)
    task: TaskArgs = field(default_factory=TaskArgs)
    policy: PolicyArgs = field(default_factory=PolicyArgs)
    pretrain: PretrainArgs = field(default_factory=PretrainArgs)
    actor: ActorArgs = field(default_factory=ActorArgs)
    critic: CriticArgs = field(default_factory=CriticArgs)
    loop: LoopArgs = field(default_factory=LoopArgs)


def default_args(env: str = "lift", preset: str = "auto", variant: str = "ogpo+ca") -> Args:
    """Defaults for an environment: dataclass < preset < task < variant. Raises UserError on an unknown name."""
    return settings.apply(Args(), env, preset, variant, without=("score_correction", "clip_mean"))


# --- Networks --------------------------------------------------------------------------------------------------------


class VelocityNet(nn.Module):
    """v_theta(s, x, t): MLP on [observation, noised chunk, time embedding] [C]. No layer norm in the actor."""

    def __init__(self, obs_dim: int, chunk_dim: int, hidden: tuple[int, ...], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("obs_mean", mean.clone())  # (O,)
        self.register_buffer("obs_std", std.clone())
        self.register_buffer("freqs", torch.exp(torch.arange(16) * (-math.log(10_000) / 15)))  # (16,) 1 ... 1e-4
        self.time = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        sizes = (obs_dim + chunk_dim + 32, *hidden)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], chunk_dim)
        for m in self.modules():
            if isinstance(m, nn.Linear):  # variance scaling (1, fan_avg, uniform), zero biases [C]
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def embed(self, t: Tensor) -> Tensor:
        """t (...,) in [0, 1] -> (..., 32)"""
        angle = t[..., None] * self.freqs
        return self.time(torch.cat([angle.sin(), angle.cos()], -1))

    def forward(self, obs: Tensor, x: Tensor, t_emb: Tensor) -> Tensor:
        """obs (..., O), x (..., D), t_emb (..., 32), broadcastable -> velocity (..., D)"""
        lead = torch.broadcast_shapes(obs.shape[:-1], x.shape[:-1], t_emb.shape[:-1])
        obs = (obs - self.obs_mean) / self.obs_std
        h = torch.cat([z.expand(*lead, -1) for z in (obs, x, t_emb)], -1)
        for layer in self.layers:
            h = F.gelu(layer(h))
        return self.out(h)


Params = Sequence[Tensor]


class CriticEnsemble(nn.Module):
    """M independent heads Q_m(s, chunk), linear -> layer norm -> GELU, as batched matrix products [C]."""

    def __init__(
        self, heads: int, obs_dim: int, chunk_dim: int, hidden: tuple[int, ...], mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        self.register_buffer("obs_mean", mean.clone())
        self.register_buffer("obs_std", std.clone())
        sizes = (obs_dim + chunk_dim, *hidden, 1)
        bounds = [math.sqrt(6 / (i + o)) for i, o in pairwise(sizes)]
        self.weights = nn.ParameterList(
            torch.empty(heads, i, o).uniform_(-b, b) for i, o, b in zip(sizes[:-1], sizes[1:], bounds, strict=True)
        )
        self.biases = nn.ParameterList(torch.zeros(heads, 1, o) for o in sizes[1:])
        self.scales = nn.ParameterList(torch.ones(heads, 1, o) for o in hidden)
        self.shifts = nn.ParameterList(torch.zeros(heads, 1, o) for o in hidden)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs (n, O), action (n, D) -> (M, n)"""
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, action], -1)
        layers = (self.weights, self.biases, self.scales, self.shifts)
        if x.is_cuda or torch.is_grad_enabled():  # all heads in batched products
            return self.heads(x.expand(len(self.weights[0]), -1, -1), *layers)
        heads = zip(*(zip(*(p.unbind() for p in ps), strict=True) for ps in layers), strict=True)
        return torch.stack([self.heads(x, *head) for head in heads])  # head by head: stays in the CPU's cache

    @staticmethod
    def heads(h: Tensor, weights: Params, biases: Params, scales: Params, shifts: Params) -> Tensor:
        """One head, h (n, O+D) -> (n,), or M heads with a leading dimension."""
        affine = torch.addmm if h.dim() == 2 else torch.baddbmm
        for w, b, scale, shift in zip(weights, biases, scales, shifts, strict=False):
            h = affine(b, h, w)
            h = F.gelu(torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), scale))
        return affine(biases[-1], h, weights[-1]).squeeze(-1)


# --- Samplers. Randomness comes in as tensors of standard normal draws, so that each is a pure function. -------------


DDPM_STEPS = 20  # T, steps of the training schedule [DPPO]


def signal_level(t: Tensor) -> Tensor:
    """alpha-bar of time j / T from 0 (the chunk) to 1 (noise), the cosine schedule [Nichol & Dhariwal 2021, eq. 17].

    Not below 1e-3 [deviation: instead of a bound on each beta], where the prediction of the chunk would explode.
    """
    offset = 0.008
    angle = (t + offset) / (1 + offset) * math.pi / 2
    return ((angle.cos() / math.cos(offset / (1 + offset) * math.pi / 2)) ** 2).clamp(1e-3, 1)


def chain_schedule(flow_steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """times j/T of the K steps (K,), and alpha-bar before and after each of them (K+1,)"""
    if flow_steps > DDPM_STEPS:
        raise UserError(
            f"--flow-steps {flow_steps}: a chain has at most the {DDPM_STEPS} steps of the training schedule"
        )
    times = torch.linspace(DDPM_STEPS, 0, flow_steps + 1, device=device).round() / DDPM_STEPS
    return times[:-1], signal_level(times)


def chain_step(x: Tensor, eps: Tensor, now: Tensor, later: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next chain state [Song et al. 2021, eq. 12 and 16; eta 1 and K = T: DDPM].

    x, eps (..., D); now, later: alpha-bar before and after. The predicted chunk is clipped to [-1, 1] [DPPO].
    """
    chunk = ((x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
    eps = (x - now.sqrt() * chunk) / (1 - now).sqrt()
    sigma = eta * ((1 - later) / (1 - now) * (1 - now / later)).sqrt()
    return later.sqrt() * chunk + (1 - later - sigma**2).clamp(min=0).sqrt() * eps, sigma


def normalise(log_prob: Tensor, chunk_dim: int, p: PolicyArgs) -> Tensor:
    """Per-chain log-probability divided by the number of Gaussian coordinates, (K+1) D [C]."""
    return log_prob / ((p.flow_steps + 1) * chunk_dim)


def sample_chain(net: VelocityNet, obs: Tensor, noise: Tensor, p: PolicyArgs) -> tuple[Tensor, Tensor]:
    """Stochastic denoising chain and its normalised log-probability, up to a constant [S 1.3, 1.4].

    obs (n, O), noise (n, K+1, D) standard normal -> chain (n, K+1, D), log_prob (n,). The action is the clipped last
    state; the last state itself is kept unclipped, so that old and new policy score the same number
    [deviation: the released code scores the clipped one under the new policy only, which biases the ratio above 1].
    """
    times, signal = chain_schedule(p.flow_steps, obs.device)
    t_emb = net.embed(times)  # (K, 32)
    z = noise[:, 1:].clamp(-p.noise_clip, p.noise_clip)  # (n, K, D)
    x = noise[:, 0]
    chain = [x]
    for k in range(p.flow_steps):
        mean, sigma = chain_step(x, net(obs, x, t_emb[k]), signal[k], signal[k + 1], 1.0)
        x = mean + sigma.clamp(min=p.noise_std) * z[:, k]
        chain.append(x)
    log_prob = -0.5 * (noise[:, 0].square().sum(-1) + z.square().sum((1, 2)))
    if p.clip_chain_end:
        chain[-1] = chain[-1].clamp(-1, 1)
    return torch.stack(chain, 1), normalise(log_prob, noise.shape[-1], p)


def chain_log_prob(net: VelocityNet, obs: Tensor, chain: Tensor, p: PolicyArgs) -> Tensor:
    """Normalised log-probability of stored chains, up to the same constant: obs (n, O), chain (n, K+1, D) -> (n,).

    Given the chain its steps are independent: one pass of the network over all n * K states [S 1.4].
    """
    times, signal = chain_schedule(p.flow_steps, obs.device)
    x, x_next = chain[:, :-1], chain[:, 1:]  # (n, K, D)
    eps = net(obs[:, None], x, net.embed(times))
    mean, sigma = chain_step(x, eps, signal[:-1, None], signal[1:, None], 1.0)
    z = (x_next - mean) / sigma.clamp(min=p.noise_std)
    log_prob = -0.5 * (chain[:, 0].square().sum(-1) + z.square().sum((1, 2)))
    return normalise(log_prob, chain.shape[-1], p)


def sample_ode(net: VelocityNet, obs: Tensor, x: Tensor, flow_steps: int) -> Tensor:
    """Noise-free policy, DDIM with eta 0: obs (n, O), x (n, D) normal -> action (n, D)."""
    times, signal = chain_schedule(flow_steps, obs.device)
    t_emb = net.embed(times)
    for k in range(flow_steps):
        x, _ = chain_step(x, net(obs, x, t_emb[k]), signal[k], signal[k + 1], 0.0)
    return x.clamp(-1, 1)


def best_of_n(q: Tensor, draws: Tensor, heads: int) -> Tensor:
    """Index of the best candidate: q (M, n, N), draws (M, n, N) uniform -> (n,) [S 1.8].

    A candidate's score is the minimum of `heads` heads drawn for it without replacement [C]; 0: the mean of all.
    """
    if heads == 0:
        return q.mean(0).argmax(-1)
    picked = draws.argsort(0)[: min(heads, len(q))]
    return q.gather(0, picked).amin(0).argmax(-1)


# --- Losses ----------------------------------------------------------------------------------------------------------


def bc_loss(net: VelocityNet, obs: Tensor, action: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """DDPM's noise prediction: obs (n, O), action (n, D), x0 (n, D) normal, t (n,) uniform -> scalar."""
    t = (t * DDPM_STEPS).ceil().clamp(min=1) / DDPM_STEPS  # one of the training steps
    signal = signal_level(t)[:, None]
    return (net(obs, signal.sqrt() * action + (1 - signal).sqrt() * x0, net.embed(t)) - x0).square().mean()


def group_advantage(q: Tensor, kind: str) -> Tensor:
    """q (M, B, G) of G chains per state -> advantage (B, G) [S 1.5].

    vanilla       mean over heads, minus its group mean
    conservative  per head minus its group mean; the smallest magnitude if all heads agree on the sign, else 0
    penultimate   the same gate, the second smallest magnitude
    positive      vanilla, negative values set to 0
    grpo          vanilla over its group's standard deviation; none of the others is divided by it
    """
    per_head = q - q.mean(-1, keepdim=True)
    mean = per_head.mean(0)
    if kind == "grpo":
        return mean / (mean.std(-1, keepdim=True) + 1e-6)
    if kind in ("vanilla", "positive"):
        return mean.clamp(min=0) if kind == "positive" else mean
    low, high = per_head.amin(0), per_head.amax(0)
    if kind == "penultimate" and len(q) > 1:
        ranked = per_head.sort(0).values
        return torch.where(low > 0, ranked[1], torch.where(high < 0, ranked[-2], 0.0))
    return torch.where(low > 0, low, torch.where(high < 0, high, 0.0))


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped objective with one ratio per chain [S 1.6]; all (n,). Returns the sum over chains, to be divided once."""
    ratio = (log_prob - old_log_prob).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).sum()
    with torch.no_grad():
        off = (ratio - 1).abs()
        info = {"ratio_off": off.sum(), "clipped": (off > clip).float().sum()}
    return loss, info


def reduce_samples(q: Tensor, how: str) -> Tensor:
    """Q-variance reduction [S 1.9]: values of G' next actions, head by head, q (M, n, G') -> (M, n)."""
    if how == "median":
        return q.quantile(0.5, -1)
    if how == "trimmed":  # the middle half
        cut = q.shape[-1] // 4
        q = q.sort(-1).values[..., cut : q.shape[-1] - cut]
    return q.mean(-1)


def td_target(rewards: Tensor, terminated: Tensor, q_next: Tensor, gamma: float) -> Tensor:
    """Chunked target [S 1.7]: rewards (n, H), terminated (n,), q_next (M, n) of target heads -> (n,).

    sum_i gamma^i r_i + gamma^H (1 - terminated) mean_m Q_m. A truncated episode bootstraps, a terminated one does not.
    """
    horizon = rewards.shape[1]
    powers = gamma ** torch.arange(horizon, device=rewards.device)
    return (rewards * powers).sum(-1) + gamma**horizon * (1 - terminated) * q_next.mean(0)


def critic_loss(
    critic: CriticEnsemble, obs: Tensor, action: Tensor, target: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every head regresses to the same target [S 1.7]: obs (n, O), action (n, D), target (n,)."""
    q = critic(obs, action)
    return (q - target).square().mean(), {"q": q.detach().mean(), "q_heads_std": q.detach().std(0).mean()}


def periodic_lr(step: int, peak: float, low: float, warmup: int, period: int) -> float:
    """Linear warm-up from low to peak, cosine back to low, repeated every `period` updates; constant if 0 [C]."""
    if period == 0:
        return peak
    step = step % period
    if step < warmup:
        return low + (peak - low) * step / warmup
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * (step - warmup) / (period - warmup)))


# --- Agent and updates -----------------------------------------------------------------------------------------------


@dataclass
class Agent:
    actor: VelocityNet
    actor_ema: VelocityNet
    critic: CriticEnsemble
    critic_ema: CriticEnsemble
    actor_opt: torch.optim.Optimizer
    critic_opt: torch.optim.Optimizer
    rng: torch.Generator  # every random draw of training; evaluation has its own
    updates: int = 0  # online updates so far
    actor_updates: int = 0  # those of them that moved the actor along the critics
    choosing: bool = False  # the critics have seen enough for best-of-N
    trusted: bool = False  # and for policy gradients
    bc_step: int = 0
    bc_done: bool = False

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.rng.device)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.rng, device=self.rng.device)


def adamw(net: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def make_agent(args: Args, obs_dim: int, act_dim: int, device: torch.device, stats: Sequence[Tensor] = ()) -> Agent:
    """stats: mean and deviation (O,) that standardise observations; a checkpoint brings its own."""
    torch.manual_seed(args.run.seed)
    p, dim = args.policy, args.policy.chunk * act_dim
    mean, std = torch.zeros(obs_dim), torch.ones(obs_dim)
    if p.normalize_obs and stats:
        mean, std = stats[0], stats[1] + 1e-2  # the floor keeps nearly constant entries from exploding
    actor = VelocityNet(obs_dim, dim, p.actor_hidden, mean, std).to(device)
    c = args.critic
    critic = CriticEnsemble(c.heads, obs_dim, dim, c.critic_hidden, mean, std).to(device)
    if c.pessimistic_init:
        nn.init.constant_(critic.biases[-1], c.reward_offset / max(1 - c.gamma, 1e-3))
    return Agent(
        actor=actor,
        actor_ema=copy.deepcopy(actor).requires_grad_(False),
        critic=critic,
        critic_ema=copy.deepcopy(critic).requires_grad_(False),
        actor_opt=adamw(actor, args.pretrain.bc_lr, args.actor.actor_weight_decay),
        critic_opt=adamw(critic, args.critic.critic_lr, args.critic.critic_weight_decay),
        rng=torch.Generator(device).manual_seed(args.run.seed),
        choosing=c.critic_warmup == 0 and c.choose_successes == 0,
        trusted=c.critic_warmup == 0 and c.critic_successes == 0,
    )


@torch.no_grad()
def ema(target: nn.Module, source: nn.Module, rate: float) -> None:
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


def update_bc(agent: Agent, obs: Tensor, action: Tensor, args: Args) -> Tensor:
    """One cloning step: obs (n, O), action (n, D)."""
    loss = bc_loss(agent.actor, obs, action, agent.randn(*action.shape), agent.rand(len(action)))
    agent.actor_opt.zero_grad()
    loss.backward()
    agent.actor_opt.step()
    ema(agent.actor_ema, agent.actor, args.policy.actor_ema)
    return loss.detach()


def update_actor(agent: Agent, obs: Tensor, clone: Batch | None, args: Args, watch: Stopwatch) -> dict[str, Tensor]:
    """One policy-extraction step [S 1.6] on states obs (B, O), with the BC floor on a batch to clone [S 1.8]."""
    p, a = args.policy, args.actor
    dim, chains = agent.actor.out.out_features, len(obs) * a.group
    for group in agent.actor_opt.param_groups:
        group["lr"] = periodic_lr(agent.actor_updates, a.actor_lr, a.actor_lr_min, a.actor_lr_warmup, a.actor_lr_period)
    agent.actor_opt.zero_grad()
    parts: list[dict[str, Tensor]] = []
    for states in obs.split(max(1, a.micro_batch // a.group)):
        with watch("sample chains"), torch.no_grad():
            rows = states.repeat_interleave(a.group, 0)  # (n, O), chains of one state side by side
            chain, old = sample_chain(agent.actor_ema, rows, agent.randn(len(rows), p.flow_steps + 1, dim), p)
            q = agent.critic_ema(rows, chain[:, -1].clamp(-1, 1))  # (M, n)
            advantage = group_advantage(q.unflatten(1, (-1, a.group)), a.advantage).flatten()  # (n,)
            info = {"nonzero": (advantage != 0).float().sum(), "advantage": advantage.abs().sum()}
            if a.skip_zero:  # a chain without advantage has no gradient
                keep = advantage.nonzero().squeeze(-1)
                rows, chain, old, advantage = rows[keep], chain[keep], old[keep], advantage[keep]
        with watch("actor"):
            if len(rows):
                loss, ppo_info = ppo_loss(chain_log_prob(agent.actor, rows, chain, p), old, advantage, a.clip)
                (loss / chains).backward()
                info |= {"pg_loss": loss.detach()} | ppo_info
        parts.append(info)
    out = {k: torch.stack([i[k] for i in parts if k in i]).sum() / chains for k in set().union(*parts)}
    with watch("actor"):
        if clone is not None:
            action = clone.actions.flatten(1)
            loss = bc_loss(agent.actor, clone.obs, action, agent.randn(*action.shape), agent.rand(len(action)))
            (a.bc_coef * loss).backward()
            out["bc_loss"] = loss.detach()
        out["actor_grad"] = nn.utils.clip_grad_norm_(agent.actor.parameters(), args.loop.max_grad_norm)
        agent.actor_opt.step()
        agent.actor_updates += 1
        ema(agent.actor_ema, agent.actor, p.actor_ema)
    return out


def update_critic(agent: Agent, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One critic step [S 1.7]: chains of the target actor at the next state, no best-of-N in the target."""
    p, c = args.policy, args.critic
    action = batch.actions.flatten(1)  # (n, D)
    with torch.no_grad():
        rows = batch.next_obs.repeat_interleave(c.next_samples, 0)  # (n G', O)
        noise = agent.randn(len(rows), p.flow_steps + 1, action.shape[1])
        next_action = sample_chain(agent.actor_ema, rows, noise, p)[0][:, -1].clamp(-1, 1)
        q_next = agent.critic_ema(rows, next_action).unflatten(1, (-1, c.next_samples))  # (M, n, G')
        q_next = reduce_samples(q_next, c.next_reduce)
        target = td_target(batch.rewards, batch.terminated, q_next, c.gamma)
    loss, info = critic_loss(agent.critic, batch.obs, action, target)
    agent.critic_opt.zero_grad()
    loss.backward()
    info["critic_grad"] = nn.utils.clip_grad_norm_(agent.critic.parameters(), args.loop.max_grad_norm)
    agent.critic_opt.step()
    ema(agent.critic_ema, agent.critic, c.critic_ema)
    return info | {"td_loss": loss.detach()}


def update(
    agent: Agent, buffer: ReplayBuffer, args: Args, rng: np.random.Generator, watch: Stopwatch
) -> dict[str, Tensor]:
    """Actor first, then critic, on the same states [C].

    Until the critics are trusted the actor has no policy gradient: Adam would turn the noise of their first opinions
    into full-sized steps [deviation: the released code trusts an untrained critic].
    """
    a, c, device = args.actor, args.critic, agent.rng.device
    batch = buffer.sample(max(c.critic_batch, a.states), rng, device)
    if not agent.trusted:
        agent.trusted = agent.updates >= c.critic_warmup and buffer.successes >= c.critic_successes
    enough = agent.trusted and buffer.success_starts.size >= a.success_min
    success = buffer.sample(a.success_batch, rng, device, success=True) if enough else None
    clone = None
    if a.bc_coef > 0:
        clone = success or (buffer.sample(a.success_batch, rng, device) if a.bc_fallback else None)
    info = {}
    if agent.trusted:
        info = update_actor(agent, batch.obs[: a.states], clone, args, watch)
    elif clone:
        info = {"bc_loss": update_bc(agent, clone.obs, clone.actions.flatten(1), args)}
    with watch("critic"):
        info |= update_critic(agent, batch, args)
        if c.success_critic and success:
            update_critic(agent, success, args)
    agent.updates += 1
    if not agent.choosing:
        agent.choosing = agent.updates >= c.critic_warmup and buffer.successes >= c.choose_successes
    return info


# --- Acting and evaluation -------------------------------------------------------------------------------------------


@torch.no_grad()
def act_ode(agent: Agent, obs: np.ndarray, args: Args, rng: torch.Generator) -> np.ndarray:
    """The noise-free policy of the online actor: obs (n, O) -> chunks (n, H, A)."""
    s = torch.from_numpy(obs).float().to(rng.device)
    noise = torch.randn((len(s), agent.actor.out.out_features), generator=rng, device=rng.device)
    action = sample_ode(agent.actor, s, noise, args.policy.flow_steps)
    return action.unflatten(1, (args.policy.chunk, -1)).cpu().numpy()


@torch.no_grad()
def act_best_of_n(agent: Agent, obs: np.ndarray, args: Args, rng: torch.Generator) -> np.ndarray:
    """The acting policy: N noisy chains of the target actor, the target critics pick one [S 1.8].

    A single chain until the critics can choose: what never saw a success ranks chains by nothing.
    """
    p, dim = args.policy, agent.actor.out.out_features
    n = p.best_of_n if agent.choosing else 1
    rows = torch.from_numpy(obs).float().to(rng.device).repeat_interleave(n, 0)  # (B * N, O)
    noise = torch.randn((len(rows), p.flow_steps + 1, dim), generator=rng, device=rng.device)
    action = sample_chain(agent.actor_ema, rows, noise, p)[0][:, -1].clamp(-1, 1)  # (B * N, D)
    if n > 1:
        q = agent.critic_ema(rows, action).unflatten(1, (-1, n))  # (M, B, N)
        best = best_of_n(q, torch.rand(q.shape, generator=rng, device=rng.device), p.best_of_n_heads)
        action = action.unflatten(0, (-1, n))[torch.arange(len(obs)), best]
    return action.unflatten(1, (p.chunk, -1)).cpu().numpy()


def policies(agent: Agent, args: Args) -> dict[str, Policy]:
    return {
        "ode": lambda obs, rng: act_ode(agent, obs, args, rng),
        "bon": lambda obs, rng: act_best_of_n(agent, obs, args, rng),
    }


# --- Training --------------------------------------------------------------------------------------------------------


def pretrain(run: Run, agent: Agent, args: Args) -> None:
    """Clone until the first evaluation above bc_stop_success, then go back to the last policy at or below it.

    The target actor starts RL as a copy [deviation: the released one lags by 1/rate steps, most of a short cloning].
    """
    c, state = args.pretrain, run.state
    ode = {"ode": policies(agent, args)["ode"]}
    obs, action = (torch.from_numpy(x).to(run.device) for x in run.demos.chunks(args.policy.chunk))
    if c.cloned:
        agent.actor.load_state_dict(checkpoint.load(Path(c.cloned) / "cloned.pt"))
    while not run.stop.requested and not c.cloned:
        rows = torch.randint(len(obs), (c.bc_batch,), generator=agent.rng, device=run.device)
        loss = update_bc(agent, obs[rows], action[rows], args)
        agent.bc_step += 1
        if agent.bc_step % c.bc_eval_every and agent.bc_step < c.bc_steps:
            continue
        run.check_finite({"bc_loss": loss.item()})
        result = run.evaluate(ode, "bc", c.bc_eval_episodes, log="")["ode"]
        run.log.log(0, {"bc/step": agent.bc_step, "bc/loss": loss.item(), "bc/success": result.rate})
        run.log.say(f"cloning step {agent.bc_step}: loss {loss.item():.3f}, {result}")
        if result.rate <= c.bc_stop_success:
            state["below"] = copy.deepcopy(agent.actor.state_dict())
        elif "below" in state:
            agent.actor.load_state_dict(state["below"])
        else:
            run.log.say("note: above --bc-stop-success at the first evaluation; a smaller --bc-eval-every stops lower")
        if result.rate > c.bc_stop_success or agent.bc_step >= c.bc_steps:
            break
        run.save()
    else:
        if run.stop.requested:
            return
    state.pop("below", None)
    checkpoint.save(run.dir / "cloned.pt", agent.actor.state_dict())
    agent.bc_done = True
    agent.actor_ema.load_state_dict(agent.actor.state_dict())
    agent.actor_opt = adamw(agent.actor, args.actor.actor_lr, args.actor.actor_weight_decay)  # starts afresh [C]
    run.log.say(f"cloned policy: {run.evaluate(ode, 'final', args.task.eval_episodes)['ode']}")
    run.video(ode["ode"], "before.mp4")
    run.collector.start()
    run.save()


def train_online(run: Run, agent: Agent, args: Args) -> None:
    """Collect with the best-of-N policy into an empty buffer; one update every `update_every` environment steps."""
    loop, state, watch = args.loop, run.state, run.watch

    def act(obs: np.ndarray) -> np.ndarray:
        with watch("acting"):
            return act_best_of_n(agent, obs, args, agent.rng)

    while state["step"] < loop.total_steps and not run.stop.requested:
        before = state["step"]
        with watch("env"):
            step = state["step"] = before + run.collector.step(act)
        if step >= loop.start_training and run.buffer.starts.size >= args.critic.critic_batch:
            for _ in range(step // loop.update_every - before // loop.update_every):
                run.averages.add(update(agent, run.buffer, args, run.rng, watch))
        due = run.tick(before, agent.updates)
        if "eval" in due:
            with watch("evaluation"):
                results = run.evaluate(policies(agent, args), "interval", args.task.eval_interval_episodes)
            run.log.say(f"step {step}: " + "; ".join(f"{k} {r}" for k, r in results.items()))
        if "save" in due:
            run.save()


def main(argv: list[str]) -> None:
    args, saved, run_dir = start(
        argv, default_args, chosen_by=("env", "preset", "variant"), description=__doc__,
        folder_name="{env}__{variant}__s{seed}", fixed=settings.FIXED, at_least=settings.AT_LEAST,
    )  # fmt: skip
    with checkpoint.StopSignal() as stop:
        c, training = args.critic, not args.run.eval
        reward = lambda raw, success: raw + c.reward_offset + c.success_bonus * success  # noqa: E731
        run = Run(cli.flatten(args), run_dir, stop, saved, reward, training)
        try:
            stats = run.demos.statistics() if run.demos else ()
            agent = make_agent(args, run.obs_dim, run.act_dim, run.device, stats)
            run.attach(agent)
            if args.run.compile:
                compile_functions(globals(), ("sample_chain", "chain_log_prob", "bc_loss", "critic_loss"))
            if training:
                if not agent.bc_done:
                    pretrain(run, agent, args)
                if agent.bc_done:
                    train_online(run, agent, args)
                run.save()
                if stop.requested:
                    run.log.say(f"saved; go on with: python {sys.argv[0]} --resume {run_dir}")
                    return
                run.video(policies(agent, args)["bon"], "after.mp4")
            results = run.evaluate(policies(agent, args), "final", args.task.eval_episodes, "final" if training else "")
            print(f"ODE policy:       {results['ode']}\nbest-of-N policy: {results['bon']}")
        finally:
            run.close()


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
