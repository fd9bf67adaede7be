"""OGPO held near a slow reference policy: chi-square pessimism, its reverse-KL version, and forward KL.

Paper: "OGPO: Sample Efficient Full-Finetuning of Generative Control Policies", arXiv 2605.03065 v4 (ICML 2026). Tags
name the source of a line: [S n.m] a section of docs/ogpo_state.md, [C] the released code where only it says so;
[deviation: why] marks where we differ.

A variant of ogpo_state.py: `diff ogpo_state.py variants/ogpo_reference.py` shows all of it. A slow copy of the
actor, pi_slow, begins as the cloned policy. --regularize chi2 or kl trusts the critics less where the actor has left
it: the more probable an action has become, the more its value is the heads' minimum instead of their mean, and a
penalty is subtracted; the critic's target is blended alike [S 1.9]. --forward-kl adds a flow-matching loss on samples
of pi_slow.

    python variants/ogpo_reference.py --env lift --regularize chi2

Symbols
    paper            here                        shape
    s                obs                         (n, O)
    a, chunk of H    action                      (n, D), D = H * A, in [-1, 1]
    a_K ... a_0      chain[:, 0] ... chain[:, K] (n, K+1, D)   the paper counts down, the code counts up
    t_k              times                       (K,) = 0, 1/K, ..., (K-1)/K
    v_theta          actor                       (n, D)        velocity network
    theta-bar        actor_ema                                 acts, proposes chains, is the old policy of the ratio
    sigma_k          sigmas                      (K,)          noise of each denoising step
    Q_m, Q-bar_m     critic, critic_ema          (M, n)        ensemble of M heads
    omega            ratio                       (n,)          one per chain
    A                advantage                   (n,)          from G chains per state
    D_succ           success                     batches of successful episodes, marked in the replay buffer
"""

import copy
import math
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for common/
from common import checkpoint, cli
from common.demos import Demos
from common.envs import make_vec_env
from common.episodes import Episodes
from common.machine import accelerate, adam, set_rate
from common.ranges import Count, Helpers, Natural, NonNegative, Positive, Real, Seed, Several, Size, Unit, Workers
from common.replay import Batch, ReplayBuffer
from common.rng import Rng
from common.run import Run, due, load_clone
from common.runlog import Averages
from common.start import pick_device, start
from settings import ogpo as settings

Info = dict[str, Tensor]  # scalars to log
COMPILED = ("sample_chain", "chain_log_prob", "bc_loss", "critic_loss")  # by --compile
RECORDED = ()
NOISE_CLIP = 3.0  # a chain's normal draws are clipped to this many deviations [C]
CALQL_COEF = 5.0  # weight of Cal-QL's term [C]
CALQL_ACTIONS = 4  # chunks of the policy in it, and as many random ones

# --- Arguments. Values are the `laptop` preset's; settings/ogpo.py holds what other presets and tasks change. ---------


@dataclass
class RunArgs:
    """What to run, for how long, and where its files go."""

    env: str = "lift"  # a task of docs/tasks.md, or your own Gymnasium environment as package.module:EnvId
    preset: Literal["laptop", "paper"] = "laptop"  # settings that learn on two CPU cores, or the paper's
    variant: Literal["ogpo", "ogpo+", "ogpo+ca"] = "ogpo+ca"  # plain; + success buffer, best-of-N; + conservative A
    seed: Seed = 1  # seeds networks, noise, batches and environments
    eval: str = ""  # run folder to evaluate: no training; prints success over --eval-episodes of both policies
    resume: str = ""  # run folder to continue from its newest checkpoint, exactly as if it had not stopped
    run_name: str = ""  # name of the run folder; default: env, variant, seed and time
    run_dir: str = "runs"  # folder of all run folders
    device: str = "auto"  # torch device; auto: cuda if there is one, else cpu. It changes the speed only
    threads: Helpers = 1  # torch threads on a CPU; networks this small run best with one
    compile: bool = False  # compile losses and sampler, on a GPU record updates as CUDA graphs
    video: bool = True  # write before.mp4 and after.mp4 of the best-of-N policy where a renderer exists
    wandb_project: str = ""  # also log to this Weights & Biases project
    tensorboard: bool = False  # also log to TensorBoard files in the run folder
    total_steps: Natural = 20_000  # environment steps
    stop_success: Unit = 0.0  # end when the acting policy reaches it in two evaluations in a row; 0: never
    start_training: Natural = 1_000  # environment steps collected before the first update
    update_every: Count = 2  # environment steps per update (one actor and one critic step)
    replay_size: Count = 1_000_000  # replay rows
    log_every: Count = 500  # environment steps between lines of metrics.jsonl
    checkpoint_every: Count = 5_000  # environment steps between checkpoints; the last two are kept


@dataclass
class TaskArgs:
    """Environment, demonstrations and evaluation protocol."""

    horizon: Count = 300  # episode cap in steps (a truncation: it bootstraps); default: the task's own
    collect_horizon: Natural = 0  # cap of training episodes: a shorter one wastes fewer steps on failures; 0: the same
    num_envs: Workers = 1  # environments collecting in parallel processes
    demos: str = "scripted"  # scripted, robomimic, minari, POLICY.npz, or a file or folder of episodes (docs/tasks.md)
    num_demos: Count = 60  # number of demonstrations made by an expert
    demo_noise: NonNegative = 0.5  # noise of that expert's actions, in units of the action range
    filter_key: str = ""  # only the demonstrations under mask/<key> of the file
    data_dir: str = "data"  # where demonstrations are cached
    eval_every: Count = 4_000  # environment steps between evaluations during training
    eval_interval_episodes: Count = 20  # episodes of each evaluation during training
    eval_episodes: Count = 100  # episodes of the first and last evaluation and of --eval
    eval_envs: Helpers = 2  # processes that evaluate beside the training, other noise for each number; 0: it waits


@dataclass
class PolicyArgs:
    """Flow policy over action chunks [S 1.1-1.3] and how it acts [S 1.8]."""

    chunk: Size = 4  # H, environment steps per action chunk, all executed
    flow_steps: Size = 4  # K, denoising steps
    actor_hidden: tuple[Size, ...] = (256, 256, 256)  # widths of the velocity network
    noise_std: Positive = 0.1  # c: step k of the chain has at least the noise c * sqrt(1 - t_k) [C]
    eta: Unit = 1.0  # and this share of ancestral sampling's noise, DDPM's on a flow [S 1.3]
    best_of_n: Size = 8  # N, candidates per decision, the target critics pick one; 1 turns it off [S 1.8]
    best_of_n_heads: Natural = 2  # a candidate scores the minimum of this many random heads [C]; 0: mean of all
    actor_ema: Unit = 0.02  # step size of the target actor towards the actor


@dataclass
class ReferenceArgs:
    """Regularization towards a slow reference policy [S 1.9]; values of the released code [C]."""

    regularize: Literal["chi2", "kl", "none"] = "chi2"  # penalise rho = pi / pi_slow, or log rho
    penalty: NonNegative = 0.1  # beta_0; beta = beta_0 * mean of the heads' standard deviation / penalty_sigma
    penalty_sigma: Positive = 1.0  # sigma_target
    sharpness: NonNegative = 5.0  # alpha of the weight w = sigmoid(alpha (rho - 1)) between mean and least of the heads
    r_max: Positive = 100.0  # the ratio's upper bound becomes min(1 + epsilon, 1 + r_max / beta)
    slow_rate: Unit = 5e-4  # step size of pi_slow towards the actor
    forward_kl: NonNegative = 0.0  # weight of the flow-matching loss on actions of pi_slow; released: 0.1 when used
    forward_kl_noise: bool = False  # those actions end noisy chains, as released


@dataclass
class PretrainArgs:
    """Behaviour cloning by flow matching [S 1.2], stopped while the policy is still mediocre."""

    cloned: str = ""  # run folder whose cloned policy to start from, instead of cloning again
    bc_steps: Natural = 20_000  # most gradient steps
    bc_lr: NonNegative = 3e-4  # learning rate
    bc_batch: Size = 256  # chunks per step
    bc_stop_success: Unit = 0.5  # stop at the first evaluation above it, keep the last policy at or below it
    bc_eval_every: Count = 100  # gradient steps between evaluations
    bc_eval_episodes: Count = 32  # episodes of each of them


@dataclass
class ActorArgs:
    """Policy extraction [S 1.4-1.6] and success-buffer regularization [S 1.8]."""

    advantage: Literal["conservative", "vanilla"] = "conservative"  # over the heads of the critic [S 1.5]
    states: Size = 64  # replay states per update
    group: Several = 8  # G, chains per state
    clip: NonNegative = 0.01  # epsilon of the clipped objective, on the normalised ratio
    bc_coef: NonNegative = 1.0  # lambda, weight of the flow-matching loss on successful episodes; 0 turns it off
    success_min: Natural = 64  # none before this many chunk starts have succeeded; paper: 256
    actor_lr: NonNegative = 3e-4  # peak learning rate
    actor_lr_min: NonNegative = 0.0  # learning rate at the start and end of each period
    actor_lr_warmup: Natural = 100  # updates of the actor in the linear warm-up at the start of each period
    actor_lr_period: Natural = 0  # updates of the actor per warm-up and cosine decay, repeated; 0: one, without decay


@dataclass
class CriticArgs:
    """Critic ensemble on chunked temporal-difference targets [S 1.7]."""

    reward_offset: Real = -1.0  # added to every raw reward: -1 per step makes speed count [C]
    success_bonus: Real = 5.0  # added on the step that succeeds [C]
    gamma: Unit = 0.99  # discount per environment step
    heads: Size = 4  # M, independent critics
    critic_hidden: tuple[Size, ...] = (256, 256, 256)  # widths of each critic
    critic_batch: Size = 256  # chunks per update
    critic_scale: Positive = 10.0  # a value is this times a head's output
    critic_lr: NonNegative = 1e-3  # learning rate; Adam moves an output by about this much, values have a range of 100
    critic_ema: Unit = 0.05  # step size of the target critics
    n_step: Size = 3  # chunks whose rewards a target sums before it bootstraps [S 1.7]
    next_samples: Size = 1  # G', next actions behind a target, averaged; several are Q-variance reduction [S 1.9]
    calql_steps: Natural = 0  # critics' updates on the demonstrations before RL; success is their only reward [S 1.9]
    critic_warmup: Natural = 250  # updates of the critics alone, if they did not start on demonstrations
    critic_successes: Natural = 10  # successes, and critic_warmup, before the actor moves; a quarter: before best-of-N


@dataclass
class Args:
    run: RunArgs = field(default_factory=RunArgs)
    task: TaskArgs = field(default_factory=TaskArgs)
    policy: PolicyArgs = field(default_factory=PolicyArgs)
    pretrain: PretrainArgs = field(default_factory=PretrainArgs)
    actor: ActorArgs = field(default_factory=ActorArgs)
    critic: CriticArgs = field(default_factory=CriticArgs)
    reference: ReferenceArgs = field(default_factory=ReferenceArgs)


def default_args(env: str = "lift", preset: str = "laptop", variant: str = "ogpo+ca") -> Args:
    """Defaults for an environment: dataclass < preset < task < variant. Raises UserError on an unknown name."""
    return settings.apply(Args(), env, preset, variant)


# --- Networks --------------------------------------------------------------------------------------------------------


class VelocityNet(nn.Module):
    """v_theta(s, x, t): MLP on [observation, noised chunk, time embedding] [C]. No layer norm in the actor."""

    def __init__(self, chunk_dim: int, hidden: tuple[int, ...], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("obs_mean", mean.clone())  # (O,)
        self.register_buffer("obs_std", std.clone())
        self.register_buffer("freqs", torch.exp(torch.arange(16) * (-math.log(10_000) / 15)))  # (16,) 1 ... 1e-4
        self.time = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        sizes = (len(mean) + chunk_dim + 32, *hidden)
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


class CriticEnsemble(nn.Module):
    """M independent heads Q_m(s, chunk), linear -> layer norm -> GELU, as batched matrix products [C]."""

    def __init__(self, chunk_dim: int, c: CriticArgs, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.output_scale = c.critic_scale
        self.register_buffer("obs_mean", mean.clone())
        self.register_buffer("obs_std", std.clone())
        sizes, heads = (len(mean) + chunk_dim, *c.critic_hidden, 1), c.heads
        bounds = [math.sqrt(6 / (i + o)) / (1 if o > 1 else self.output_scale) for i, o in pairwise(sizes)]
        self.weights = nn.ParameterList(
            torch.empty(heads, i, o).uniform_(-b, b) for (i, o), b in zip(pairwise(sizes), bounds, strict=True)
        )
        self.biases = nn.ParameterList(torch.zeros(heads, 1, o) for o in sizes[1:])
        self.scales = nn.ParameterList(torch.ones(heads, 1, o) for o in c.critic_hidden)
        self.shifts = nn.ParameterList(torch.zeros(heads, 1, o) for o in c.critic_hidden)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs (n, O), action (n, D) -> (M, n)"""
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, action], -1)  # (n, O+D)
        if x.is_cuda or torch.is_grad_enabled():
            return self.mlp(x.expand(len(self.weights[0]), -1, -1), slice(None))
        return torch.cat([self.mlp(x[None], slice(m, m + 1)) for m in range(len(self.weights[0]))])  # in a CPU's cache

    def mlp(self, x: Tensor, part: slice) -> Tensor:
        """Part of the heads, each on a row of x (heads, n, O+D) -> (heads, n)"""
        for i in range(len(self.scales)):
            x = torch.baddbmm(self.biases[i][part], x, self.weights[i][part])
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            x = F.gelu(torch.addcmul(self.shifts[i][part], x, self.scales[i][part]))
        return self.output_scale * torch.baddbmm(self.biases[-1][part], x, self.weights[-1][part]).squeeze(-1)


# --- Losses and samplers. Randomness comes in as tensors, so that each is a pure function. ---------------------------


def bc_loss(net: VelocityNet, obs: Tensor, action: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Flow matching [S 1.2]: obs (n, O), action (n, D), x0 (n, D) normal, t (n,) uniform -> scalar."""
    x_t = (1 - t[:, None]) * x0 + t[:, None] * action
    return (net(obs, x_t, net.embed(t)) - (action - x0)).square().mean()


def flow_schedule(p: PolicyArgs, device: torch.device) -> tuple[Tensor, Tensor]:
    """times t_k = k/K and sigmas, each (K,): c * sqrt(1 - t_k) [C], or eta of ancestral sampling's if more [S 1.3]."""
    times = torch.arange(p.flow_steps, device=device) / p.flow_steps
    later = times + 1 / p.flow_steps
    kept = times * (1 - later) / (later * (1 - times))  # share of the old noise that eta 1 keeps
    return times, torch.maximum(p.noise_std * (1 - times).sqrt(), p.eta * (1 - later) * (1 - kept.square()).sqrt())


def step_mean(x: Tensor, v: Tensor, t: Tensor, sigma: Tensor, p: PolicyArgs) -> Tensor:
    """Mean of the next chain state, which gets noise sigma [S 1.3]: x, v (..., D), t and sigma broadcastable.

    With eta: v splits x into chunk and noise of a straight path; the next state is later on it, with fresh noise for as
    much variance of the old. Else an Euler step plus the score's part [deviation: released adds a K-th of that].
    """
    later = t + 1 / p.flow_steps
    if p.eta == 0:
        mean = x + (v + 0.5 * p.noise_std**2 * p.flow_steps * (t * v - x)) / p.flow_steps
        return torch.where(later > 1 - 1e-6, mean.clamp(-1, 1), mean)
    chunk = (x + (1 - t) * v).clamp(-1, 1)
    return later * chunk + ((1 - later).square() - sigma.square()).clamp(min=0).sqrt() * (x - t * chunk) / (1 - t)


def sample_chain(net: VelocityNet, obs: Tensor, noise: Tensor, p: PolicyArgs) -> tuple[Tensor, Tensor]:
    """Stochastic denoising chain and its log-probability per Gaussian coordinate, up to a constant [S 1.3, 1.4].

    obs (n, O), noise (n, K+1, D) standard normal -> chain (n, K+1, D), log_prob (n,). The action is the clipped last
    state, which is kept unclipped here: both policies score the same number [deviation: released clips it under one].
    """
    times, sigmas = flow_schedule(p, obs.device)
    t_emb = net.embed(times)  # (K, 32)
    z = noise[:, 1:].clamp(-NOISE_CLIP, NOISE_CLIP)  # (n, K, D)
    chain = [noise[:, 0]]
    for k in range(p.flow_steps):
        mean = step_mean(chain[k], net(obs, chain[k], t_emb[k]), times[k], sigmas[k], p)
        chain.append(mean + sigmas[k] * z[:, k])
    log_prob = -0.5 * (noise[:, 0].square().sum(-1) + z.square().sum((1, 2)))
    return torch.stack(chain, 1), log_prob / noise[0].numel()


def chain_log_prob(net: VelocityNet, obs: Tensor, chain: Tensor, p: PolicyArgs) -> Tensor:
    """The same of stored chains: obs (n, O), chain (n, K+1, D) -> (n,). One pass over all n K states [S 1.4]."""
    times, sigmas = (s[:, None] for s in flow_schedule(p, obs.device))  # (K, 1)
    x, x_next = chain[:, :-1], chain[:, 1:]  # (n, K, D)
    mean = step_mean(x, net(obs[:, None], x, net.embed(times[:, 0])), times, sigmas, p)
    z = (x_next - mean) / sigmas
    return -0.5 * (chain[:, 0].square().sum(-1) + z.square().sum((1, 2))) / chain[0].numel()


def sample_ode(net: VelocityNet, obs: Tensor, x: Tensor, flow_steps: int) -> Tensor:
    """Noise-free policy [S 1.2]: obs (n, O), x (n, D) normal -> action (n, D) by K Euler steps and one final clip."""
    t_emb = net.embed(torch.arange(flow_steps, device=obs.device) / flow_steps)
    for k in range(flow_steps):
        x = x + net(obs, x, t_emb[k]) / flow_steps
    return x.clamp(-1, 1)


def best_of_n(q: Tensor, draws: Tensor, heads: int) -> Tensor:
    """q, draws (M, n, N) -> best (n,): least of `heads` heads [deviation: released with replacement]; 0: their mean."""
    score = q.gather(0, draws.argsort(0)[:heads]).amin(0) if heads else q.mean(0)  # (n, N)
    return score.argmax(-1)


def group_advantage(q: Tensor, kind: str) -> Tensor:
    """q (M, B, G) of G chains per state -> advantage (B, G) [S 1.5].

    vanilla       mean over heads, minus its group mean
    conservative  per head minus its group mean; the smallest magnitude if all heads agree on the sign, else 0
    """
    per_head = q - q.mean(-1, keepdim=True)
    if kind == "vanilla":
        return per_head.mean(0)
    low, high = per_head.amin(0), per_head.amax(0)
    return torch.where(low > 0, low, torch.where(high < 0, high, 0.0))


def blend(q: Tensor, log_rho: Tensor, r: ReferenceArgs) -> Tensor:
    """(1 - w) mean_m Q + w min_m Q: q (M, ...), log_rho (...) -> (...) [S 1.9]."""
    if r.regularize == "none":
        return q.mean(0)
    w = torch.sigmoid(r.sharpness * (log_rho.exp() - 1 if r.regularize == "chi2" else log_rho))
    return (1 - w) * q.mean(0) + w * q.amin(0)


def penalised_advantage(q: Tensor, log_rho: Tensor, r: ReferenceArgs) -> tuple[Tensor, Tensor]:
    """q (M, B, G), log_rho (B, G) -> advantage (B, G), beta () [S 1.9].

    The blended value minus beta rho (kl: beta log rho), minus its group mean. Beta has the heads' standard deviation
    over M, not M - 1 [C], and is one for the whole batch.
    """
    beta = r.penalty * q.std(0, correction=0).mean() / r.penalty_sigma
    q = blend(q, log_rho, r) - beta * (log_rho.exp() if r.regularize == "chi2" else log_rho)
    return q - q.mean(-1, keepdim=True), beta


def ppo_loss(
    log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float, chains: int, high: float | Tensor = math.inf
) -> tuple[Tensor, Info]:
    """Clipped objective, one ratio per chain [S 1.6], all (n,); a mean over `chains`, of which n have an advantage.

    high: a further upper bound of the ratio [S 1.9].
    """
    ratio = (log_prob - old).exp()
    bound = torch.as_tensor(1 + clip, device=ratio.device).clamp(max=high)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(min=1 - clip).minimum(bound) * advantage).sum() / chains
    off = (ratio.detach() - 1).abs() * (advantage != 0)
    return loss, {"ratio_off": off.sum() / chains, "clipped": (off > clip).float().sum() / chains}


def td_target(rewards: Tensor, steps: Tensor, terminated: Tensor, q_next: Tensor, gamma: float) -> Tensor:
    """Chunked target [S 1.7]: rewards (n, T), steps (n,) they took, terminated (n,), q_next (M, n) of target heads.

    sum_i gamma^i r_i + gamma^steps (1 - terminated) mean_m Q_m. A truncated episode bootstraps, a terminated does not.
    """
    powers = gamma ** torch.arange(rewards.shape[1], device=rewards.device)  # (T,)
    return (rewards * powers).sum(-1) + gamma**steps * (1 - terminated) * q_next.mean(0)


def critic_loss(critic: CriticEnsemble, obs: Tensor, action: Tensor, target: Tensor) -> tuple[Tensor, Info]:
    """Every head regresses to the same target [S 1.7]: obs (n, O), action (n, D), target (n,)."""
    q = critic(obs, action)
    spread = q.detach().std(0, correction=min(1, len(q) - 1))  # (n,) 0 of a single head
    return (q - target).square().mean(), {"q": q.detach().mean(), "q_heads_std": spread.mean()}


def calql_term(q_demo: Tensor, q_other: Tensor, returns: Tensor) -> Tensor:
    """Cal-QL's conservative term [S 1.9]: q_demo (M, n), q_other (M, n, C) of chunks at the same states, returns (n,).

    Pushes other chunks below the demonstrated one, but not below the return from its first step on.
    """
    return (torch.maximum(q_other, returns[:, None]).logsumexp(-1) - q_demo).mean()


def periodic_lr(step: int, a: ActorArgs) -> float:
    """Linear warm-up from the least rate to the peak, cosine back, repeated every period [C]; 0: constant after it."""
    period, warmup = a.actor_lr_period or math.inf, a.actor_lr_warmup
    step = step % period
    share = step / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (period - warmup))
    return a.actor_lr_min + (a.actor_lr - a.actor_lr_min) * share


# --- Agent and training ----------------------------------------------------------------------------------------------


class Agent:
    """Networks and their slow copies, optimizers, and how far training has come: what a checkpoint holds."""

    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device, demos: Demos | None) -> None:
        """demos: observations are standardised by their statistics; a checkpoint brings its own."""
        torch.manual_seed(args.run.seed)
        p, c, dim = args.policy, args.critic, args.policy.chunk * act_dim
        mean, std = demos.statistics() if demos else (torch.zeros(obs_dim), torch.ones(obs_dim))
        std = std + 1e-2  # keeps nearly constant entries from exploding
        self.actor = VelocityNet(dim, p.actor_hidden, mean, std).to(device)
        self.actor_ema = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = CriticEnsemble(dim, c, mean, std).to(device)
        # The value of never succeeding [deviation: released critics start near 0, above every value of a poor policy].
        nn.init.constant_(self.critic.biases[-1], c.reward_offset / max(1 - c.gamma, 1e-3) / c.critic_scale)
        self.critic_ema = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_opt = adam(self.actor.parameters(), args.pretrain.bc_lr, device)
        self.critic_opt = adam(self.critic.parameters(), c.critic_lr, device)
        self.actor_slow = copy.deepcopy(self.actor).requires_grad_(False)
        self.log_rho = torch.zeros((), device=device)  # mean of the latest actor step, for the critic's target
        self.rng = Rng(args.run.seed, device)  # of training; evaluation has its own
        self.bc_step = 0  # gradient steps of cloning so far
        self.bc_below: dict[str, Tensor] | None = None  # newest weights at or below --bc-stop-success
        self.bc_done = False
        self.calql_step = 0  # updates of the critics on demonstrations so far
        self.updates = 0  # online updates so far
        self.actor_updates = 0  # those of them that moved the actor along the critics
        self.best_of_n_on = c.calql_steps == c.critic_warmup == c.critic_successes == 0  # critics tell candidates apart
        self.policy_gradient_on = False  # and may move the actor


@torch.no_grad()
def act_ode(agent: Agent, args: Args, obs: Tensor, rng: Rng) -> Tensor:
    """The noise-free policy of the online actor: obs (n, O) -> chunks (n, H, A)."""
    noise = rng.randn(len(obs), agent.actor.out.out_features)
    return sample_ode(agent.actor, obs, noise, args.policy.flow_steps).unflatten(1, (args.policy.chunk, -1))


@torch.no_grad()
def draw_chains(agent: Agent, args: Args, obs: Tensor, n: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    """n chains of the target actor at each obs (B, O): rows (B n, O), chain (B n, K+1, D), log_prob (B n,)."""
    rows = obs.repeat_interleave(n, 0)
    noise = rng.randn(len(rows), args.policy.flow_steps + 1, agent.actor.out.out_features)
    return rows, *sample_chain(agent.actor_ema, rows, noise, args.policy)


@torch.no_grad()
def act_best_of_n(agent: Agent, args: Args, obs: Tensor, rng: Rng) -> Tensor:
    """The acting policy: the target critics pick one of N chains of the target actor, once they can tell [S 1.8]."""
    p, n = args.policy, args.policy.best_of_n if agent.best_of_n_on else 1
    rows, chain, _ = draw_chains(agent, args, obs, n, rng)
    action = chain[:, -1].clamp(-1, 1)  # (B N, D)
    if n > 1:
        q = agent.critic_ema(rows, action).unflatten(1, (-1, n))  # (M, B, N)
        best = best_of_n(q, rng.rand(*q.shape), p.best_of_n_heads)
        action = action.unflatten(0, (-1, n))[torch.arange(len(obs)), best]
    return action.unflatten(1, (p.chunk, -1))


@torch.no_grad()
def update_ema(target: nn.Module, source: nn.Module, rate: float) -> None:
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


def update_actor(agent: Agent, obs: Tensor, success: Batch | None, args: Args) -> Info:
    """One policy-extraction step [S 1.6] on states obs (B, O), with the BC floor on a success batch [S 1.8]."""
    p, a, r = args.policy, args.actor, args.reference
    high: float | Tensor = math.inf
    agent.actor_opt.zero_grad()
    rows, chain, old = draw_chains(agent, args, obs, a.group, agent.rng)  # chains of one state side by side
    with torch.no_grad():
        q = agent.critic_ema(rows, chain[:, -1].clamp(-1, 1))  # (M, B G)
        q = q.unflatten(1, (-1, a.group))  # (M, B, G)
        if r.regularize == "none":
            advantage = group_advantage(q, a.advantage).flatten()  # (B G,)
        else:
            log_rho = chain_log_prob(agent.actor, rows, chain, p) - chain_log_prob(agent.actor_slow, rows, chain, p)
            advantage, beta = penalised_advantage(q, log_rho.unflatten(0, (-1, a.group)), r)
            advantage, high = advantage.flatten(), 1 + r.r_max / beta
            agent.log_rho = log_rho.exp().mean().log() if r.regularize == "chi2" else log_rho.mean()
        # A chain without advantage has no gradient; a recorded step keeps it: its shapes must not depend on numbers.
        keep = torch.arange(len(rows), device=obs.device) if args.run.compile else advantage.nonzero().squeeze(-1)
    info = {"nonzero": (advantage != 0).float().mean(), "advantage": advantage.abs().mean()}
    if r.regularize != "none":
        info["rho"] = agent.log_rho.exp()
    if len(keep):
        log_prob = chain_log_prob(agent.actor, rows[keep], chain[keep], p)
        loss, ppo_info = ppo_loss(log_prob, old[keep], advantage[keep], a.clip, len(rows), high)
        loss.backward()
        info |= {"pg_loss": loss.detach()} | ppo_info
    if r.forward_kl > 0:
        if r.forward_kl_noise:
            noise = agent.rng.randn(len(obs), *chain.shape[1:])
            with torch.no_grad():
                action = sample_chain(agent.actor_slow, obs, noise, p)[0][:, -1].clamp(-1, 1)
        else:
            action = sample_ode(agent.actor_slow, obs, agent.rng.randn(len(obs), chain.shape[-1]), p.flow_steps)
        loss = bc_loss(agent.actor, obs, action, agent.rng.randn(*action.shape), agent.rng.rand(len(action)))
        (r.forward_kl * loss).backward()
        info["forward_kl"] = loss.detach()
    if success is not None:
        action = success.actions.flatten(1)  # (n, D)
        loss = bc_loss(agent.actor, success.obs, action, agent.rng.randn(*action.shape), agent.rng.rand(len(action)))
        (a.bc_coef * loss).backward()
        info["bc_loss"] = loss.detach()
    info["actor_grad"] = nn.utils.clip_grad_norm_(agent.actor.parameters(), math.inf)  # measured, not clipped
    agent.actor_opt.step()
    update_ema(agent.actor_ema, agent.actor, p.actor_ema)
    update_ema(agent.actor_slow, agent.actor, r.slow_rate)
    return info


def update_critic(agent: Agent, batch: Batch, args: Args, returns: Tensor | None = None) -> Info:
    """One critic step [S 1.7]: chains of the target actor at the next state, no best-of-N in the target.

    returns (n,) of a batch of demonstrations: with Cal-QL's term [S 1.9].
    """
    c, action = args.critic, batch.actions.flatten(1)  # (n, D)
    rows, chain, _ = draw_chains(agent, args, batch.next_obs, c.next_samples, agent.rng)  # (n G', ...)
    with torch.no_grad():
        q_next = agent.critic_ema(rows, chain[:, -1].clamp(-1, 1)).unflatten(1, (-1, c.next_samples)).mean(-1)  # (M, n)
        q_next = blend(q_next, agent.log_rho, args.reference)[None]  # (1, n)
        target = td_target(batch.rewards, batch.steps, batch.terminated, q_next, c.gamma)
    loss, info = critic_loss(agent.critic, batch.obs, action, target)
    info["td_loss"] = loss
    if returns is not None:
        rows, chain, _ = draw_chains(agent, args, batch.obs, CALQL_ACTIONS, agent.rng)  # (n C, ...)
        others = (chain[:, -1].clamp(-1, 1), 2 * agent.rng.rand(len(rows), action.shape[1]) - 1)
        q = [agent.critic(rows, other).unflatten(1, (-1, CALQL_ACTIONS)) for other in others]  # (M, n, C) each
        info["calql"] = calql_term(agent.critic(batch.obs, action), torch.cat(q, -1), returns)
        loss = loss + CALQL_COEF * info["calql"]
    agent.critic_opt.zero_grad()
    loss.backward()
    info["critic_grad"] = nn.utils.clip_grad_norm_(agent.critic.parameters(), math.inf)
    agent.critic_opt.step()
    update_ema(agent.critic_ema, agent.critic, c.critic_ema)
    return {name: value.detach() for name, value in info.items()}


def update(agent: Agent, buffer: ReplayBuffer, args: Args, rng: np.random.Generator) -> Info:
    """Actor first, then critic, on the same states [C]. The actor waits until the critics have seen enough: Adam would
    turn the noise of their first opinions into full-sized steps [deviation: the released code trusts them untrained].
    """
    a, c, device = args.actor, args.critic, agent.rng.device
    batch, success, info = buffer.sample(max(c.critic_batch, a.states), rng, device, chunks=c.n_step), None, {}
    agent.policy_gradient_on |= agent.updates >= c.critic_warmup and buffer.successes >= c.critic_successes
    if agent.policy_gradient_on:
        if buffer.success_starts.size >= a.success_min:
            success = buffer.sample(c.critic_batch, rng, device, success=True)
        set_rate(agent.actor_opt, periodic_lr(agent.actor_updates, a))
        info = update_actor(agent, batch.obs[: a.states], success if a.bc_coef > 0 else None, args)
        agent.actor_updates += 1
    info |= update_critic(agent, batch, args)
    agent.updates += 1
    agent.best_of_n_on |= agent.updates >= c.critic_warmup and buffer.successes >= c.critic_successes // 4
    return info


def pretrain(run: Run, agent: Agent, demos: Demos, args: Args) -> None:
    """Clone until the first evaluation above bc_stop_success, then go back to the last policy at or below it."""
    c, success = args.pretrain, 0.0
    obs, action = (torch.from_numpy(x).to(agent.rng.device) for x in demos.chunks(args.policy.chunk))  # (n, O), (n, D)
    while not c.cloned and agent.bc_step < c.bc_steps and success <= c.bc_stop_success:
        if run.stop.requested:
            return
        rows = agent.rng.randint(0, len(obs), c.bc_batch)
        x0, t = agent.rng.randn(c.bc_batch, action.shape[1]), agent.rng.rand(c.bc_batch)
        loss = bc_loss(agent.actor, obs[rows], action[rows], x0, t)
        agent.actor_opt.zero_grad()
        loss.backward()
        agent.actor_opt.step()
        agent.bc_step += 1
        if agent.bc_step % c.bc_eval_every == 0 or agent.bc_step == c.bc_steps:
            run.stop_if_not_finite({"bc_loss": loss.item()})
            label = f"cloning step {agent.bc_step}, loss {loss.item():.3f}"
            success = run.evaluate("bc", c.bc_eval_episodes, label, only="ode")["ode"].rate
            run.log.log(0, {"bc/step": agent.bc_step, "bc/loss": loss.item(), "bc/success": success})
            if success <= c.bc_stop_success:
                agent.bc_below = copy.deepcopy(agent.actor.state_dict())
                run.save()
    cloned = load_clone(Path(c.cloned), agent.actor, run.args) if c.cloned else agent.bc_below
    agent.actor.load_state_dict(cloned or agent.actor.state_dict())
    agent.actor_ema.load_state_dict(agent.actor.state_dict())  # [deviation: the released one lags behind]
    agent.actor_slow.load_state_dict(agent.actor.state_dict())
    agent.actor_opt = adam(agent.actor.parameters(), args.actor.actor_lr, agent.rng.device)  # afresh [C]
    agent.bc_done, agent.bc_below = True, None
    checkpoint.save(run.folder / "cloned.pt", agent.actor.state_dict())
    run.begin_evaluation("final", args.task.eval_episodes, "cloned policy", log="eval", only="ode")
    run.record_video("ode", "before.mp4", args.run.video)
    run.save()


def pretrain_critic(run: Run, agent: Agent, demos: Demos, args: Args) -> None:
    """Cal-QL on the demonstrations [S 1.9], so that the first episodes meet critics that know what success is worth."""
    c, h, device = args.critic, args.policy.chunk, agent.rng.device
    buffer = ReplayBuffer(len(demos.obs) + len(demos.ends) * (h + 1), run.obs_dim, run.act_dim, h)
    returns = torch.zeros(len(buffer.obs))
    for obs, actions in demos.episodes():
        powers = c.gamma ** torch.arange(len(actions))  # (T,)
        value = c.reward_offset * powers.cumsum(0) + (1 + c.success_bonus) * powers  # (T,) by steps before the last
        returns[buffer.row :][: len(actions)] = value.flip(0)
        rewards = np.full(len(actions), c.reward_offset)
        rewards[-1] += 1 + c.success_bonus  # success is the only reward
        buffer.add_episode(obs, actions, rewards, terminated=True, success=True)
    while agent.calql_step < c.calql_steps and not run.stop.requested:
        batch = buffer.sample(c.critic_batch, np.random.default_rng([args.run.seed, agent.calql_step]), device)
        info = update_critic(agent, batch, args, returns[batch.rows].to(device))
        agent.calql_step += 1
        if agent.calql_step % 100 == 0 or agent.calql_step == c.calql_steps:
            run.stop_if_not_finite({name: value.item() for name, value in info.items()})
            run.log.say(f"Cal-QL step {agent.calql_step}: its term {info['calql']:.2f}, TD loss {info['td_loss']:.2f}")
    agent.best_of_n_on = agent.policy_gradient_on = agent.calql_step == c.calql_steps  # nothing waits
    run.save()


def train(run: Run, agent: Agent, buffer: ReplayBuffer, args: Args) -> None:
    """Collect with the best-of-N policy into a buffer that starts empty; update; log, evaluate and save when due."""
    r, t, c = args.run, args.task, args.critic
    envs = run.closing(make_vec_env(r.env, t.num_envs, horizon=t.collect_horizon or t.horizon))
    episodes = Episodes(envs, r.seed)
    averages, rng = Averages(), np.random.default_rng(r.seed)  # metrics since the last log line; rows of the buffer
    run.track(buffer=buffer, episodes=episodes, averages=averages, rng=rng)
    while run.step < r.total_steps and not (run.stop.requested or run.good_enough(r.stop_success)):
        if (over := episodes.over()).any():
            obs, _ = envs.reset(seed=episodes.begin(over), options={"reset_mask": over})
            episodes.see(obs, over)
        actions = episodes.next_actions(partial(act_best_of_n, agent, args), agent.rng)  # (E, A), chunk after chunk
        obs, raw, terminated, truncated, info = envs.step(actions)
        reward = raw + c.reward_offset + c.success_bonus * info["success"]  # (E,) as trained
        episodes.append(actions, reward, obs, info["success"])
        before, run.step = run.step, run.step + envs.num_envs
        for i in np.flatnonzero(terminated | truncated):  # the first success terminates, the horizon truncates
            done = episodes.finish(i)
            buffer.add_episode(done.obs, done.actions, done.rewards, terminated[i], done.success)
        if run.step >= r.start_training and buffer.starts.size >= c.critic_batch:
            for _ in range(due(before, run.step, r.update_every)):
                averages.add(update(agent, buffer, args, rng))
        run.show_progress(episodes)
        if due(before, run.step, r.log_every):
            run.log_training(averages.take(), episodes)
        if due(before, run.step, t.eval_every):
            run.begin_evaluation("interval", t.eval_interval_episodes, f"step {run.step}", log="eval")
        if due(before, run.step, r.checkpoint_every):
            run.save()


def main(argv: list[str]) -> None:
    args, saved, folder = start(
        argv, default_args, chosen_by=("env", "preset", "variant"), weights=(VelocityNet, CriticEnsemble),
        folder_name="{env}__{variant}__s{seed}", fixed=settings.FIXED, check=settings.check,
    )  # fmt: skip
    r, t, device = args.run, args.task, pick_device(args.run.device, args.run.threads)
    with checkpoint.StopSignal() as stop, Run(folder, saved, stop, cli.flatten(args), r.env, t.horizon, device) as run:
        run.open_evaluation(t.eval_envs, args.policy.chunk)
        if not r.eval:
            buffer = ReplayBuffer(r.replay_size, run.obs_dim, run.act_dim, args.policy.chunk)
            run.check_disk(min(r.replay_size, 2 * r.total_steps) * buffer.row_bytes)  # an episode of one step has two
        taught = saved and saved["agent"]["bc_done"] and saved["agent"]["calql_step"] == args.critic.calql_steps
        demos = None
        if not (r.eval or taught):
            demos = run.get_demos(t.demos, t.num_demos, t.demo_noise, Path(t.data_dir), t.filter_key)
        agent = Agent(args, run.obs_dim, run.act_dim, device, demos)
        run.track(agent=agent)
        if r.compile:
            accelerate(globals(), COMPILED, RECORDED, agent.rng.generator)
        run.policies = {"ode": partial(act_ode, agent, args), "bon": partial(act_best_of_n, agent, args)}
        if not r.eval:
            run.open_log(r.total_steps, r.wandb_project, r.tensorboard)
            if not agent.bc_done:
                pretrain(run, agent, demos, args)
            if agent.bc_done and agent.calql_step < args.critic.calql_steps:
                pretrain_critic(run, agent, demos, args)
            if agent.bc_done:
                train(run, agent, buffer, args)
            run.save()
            run.record_video("bon", "after.mp4", r.video)
        run.evaluate("final", t.eval_episodes, "final", log="" if r.eval else "final")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
