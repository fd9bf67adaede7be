"""DPPO and ReinFlow from state: on-policy policy gradient over the denoising steps of a flow policy of action chunks.

Papers: "Diffusion Policy Policy Optimization", arXiv 2409.00588; "ReinFlow", arXiv 2505.22094. [C]: the authors' code,
irom-princeton/dppo cc7234a and ReinFlow/ReinFlow aed2819 ([C, ReinFlow]); [B n], [S n.m]: sections of docs/baselines.md
and docs/ogpo_state.md; [deviation: why] marks where we differ.

A weak policy is cloned from demonstrations. Then several environments act with its noisy denoising chains, a value
network V(s) turns the rewards of that rollout into advantages, and a clipped objective trains all denoising steps of
every chunk with the advantage of the chunk. The rollout is forgotten after a few passes: there is no replay, and no
critic of actions. Cloned policy, chunks, rewards and evaluation are those of ogpo_state.py.

    python baselines/dppo.py --env toy                                   # no simulator, about a minute on one core
    python baselines/dppo.py --env toy --noise learned --ratio chain     # ReinFlow
    python baselines/dppo.py --env lift --cloned runs/NAME               # from the clone of another run of the task
    python baselines/dppo.py --env lift --reward raw                     # the task's own reward, scaled as by DPPO
    python baselines/dppo.py --eval runs/NAME                            # --resume runs/NAME continues it exactly

Symbols
    paper            here                        shape
    s                obs                         (T, E, O), (n, O)  T chunks of E environments, n of them
    a, chunk of H    action                      (n, D), D = H * A, in [-1, 1]
    x_0 ... x_K      chain[:, 0] ... chain[:, K] (n, K+1, D)   from noise to the chunk; DPPO counts down
    t_k              times                       (K,) = 0, 1/K, ..., (K-1)/K
    v_theta          actor                       (n, D)        velocity network, trained in all K steps
    sigma_k          sigmas, noise_net           (K,), (n, D)  deviation of each denoising step, fixed or learned
    rho_k, rho       log_ratio                   (n, K), (n, 1)  of each step, or one of the chain
    V                critic                      (n,)          value of a state
    A                advantage                   (n,)          generalized advantage estimate of a chunk
    gamma_d          denoising_gamma                           earlier denoising steps have less of it
"""

import copy
import math
import signal
import sys
import time
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
from common.machine import accelerate, adam
from common.ranges import Count, Helpers, Natural, NonNegative, Positive, Real, Seed, Size, Unit, Workers
from common.rng import Rng
from common.run import Run, due, load_clone
from common.runlog import Averages
from common.start import pick_device, start
from settings import baselines
from settings import ogpo as settings

Info = dict[str, Tensor]  # scalars to log
COMPILED = ("sample_chain", "chain_log_prob", "bc_loss")  # by --compile
RECORDED = ("update_minibatch",)
NOISE_CLIP = 3.0  # a chain's normal draws are clipped to this many deviations [C]
CLIP_GROWTH = 3.0  # exponent of the growth of the clip range over the denoising steps [C]
REWARD_CLIP = 10.0  # of scaled rewards [C]

# --- Arguments. Values are the `laptop` preset's; settings/ogpo.py and baselines.py hold the rest. ----------------


@dataclass
class RunArgs:
    """What to run, for how long, and where its files go."""

    env: str = "lift"  # a task of docs/tasks.md, or your own Gymnasium environment as package.module:EnvId
    preset: Literal["laptop", "paper"] = "laptop"  # settings that learn on two CPU cores, or the paper's
    seed: Seed = 1  # seeds networks, noise, batches and environments
    eval: str = ""  # run folder to evaluate: no training; prints success over --eval-episodes of both policies
    resume: str = ""  # run folder to continue from its newest checkpoint, exactly as if it had not stopped
    run_name: str = ""  # name of the run folder; default: env, dppo, seed and time
    run_dir: str = "runs"  # folder of all run folders
    device: str = "auto"  # torch device; auto: cuda if there is one, else cpu. It changes the speed only
    threads: Helpers = 1  # torch threads on a CPU; networks this small run best with one
    compile: bool = False  # compile losses and sampler, on a GPU record updates as CUDA graphs
    video: bool = True  # write before.mp4 and after.mp4 of the acting policy where a renderer exists
    wandb_project: str = ""  # also log to this Weights & Biases project
    tensorboard: bool = False  # also log to TensorBoard files in the run folder
    total_steps: Natural = 20_000  # environment steps
    stop_success: Unit = 0.0  # end when the acting policy reaches it in two evaluations in a row; 0: never
    rollout: Size = 50  # chunks of every environment between updates
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
    """Flow policy over action chunks [S 1.1-1.3] and the noise of its denoising steps."""

    chunk: Size = 4  # H, environment steps per action chunk, all executed
    flow_steps: Size = 4  # K, denoising steps
    actor_hidden: tuple[Size, ...] = (256, 256, 256)  # widths of the velocity network
    noise: Literal["fixed", "learned"] = "fixed"  # as OGPO's chains; or deviations from a network (ReinFlow)
    noise_std: Positive = 0.2  # c, fixed: step k has at least the noise c sqrt(1 - t_k), the last of 4 DPPO's 0.1 [C]
    eta: Unit = 1.0  # fixed: and this share of ancestral sampling's noise, DDPM's on a flow [S 1.3]
    noise_low: Positive = 0.05  # learned: least deviation
    noise_high: Positive = 0.2  # learned: largest [ReinFlow: 0.08 to 0.24 by task]


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
    """Policy gradient over the denoising steps [B 5]."""

    ratio: Literal["step", "chain"] = "step"  # of every denoising step (DPPO); or one of the whole chain (ReinFlow)
    epochs: Count = 10  # passes over a rollout [C]
    minibatch: Size = 250  # chains per step, each with its K denoising steps; DPPO: 750, with 10
    clip: NonNegative = 0.01  # epsilon, range of the ratio: of the last denoising step, or of the chain [C]
    clip_first: NonNegative = 0.001  # of the first denoising step [C]
    denoising_gamma: Unit = 0.99  # gamma_d: the advantage counts this much less with every step before the last [C]
    entropy_coef: NonNegative = 0.01  # weight of the entropy of learned noise [C, ReinFlow: 0.01-0.03]
    kl_stop: Positive = 0.01  # no further pass above this divergence from the acting policy [C, ReinFlow; DPPO: 1]
    actor_lr: NonNegative = 1e-4  # learning rate [C]


@dataclass
class CriticArgs:
    """Rewards, value network and advantages."""

    reward: Literal["contract", "raw"] = "contract"  # OGPO's; or the task's own over the deviation of returns (DPPO)
    reward_offset: Real = -1.0  # contract: added to every raw reward: -1 per step makes speed count
    success_bonus: Real = 5.0  # contract: added on the step that succeeds
    gamma: Unit = 0.99  # discount per environment step [deviation: as in OGPO; DPPO: 0.999 per chunk]
    gae_lambda: Unit = 0.95  # lambda per chunk [C]
    critic_hidden: tuple[Size, ...] = (256, 256, 256)  # widths of the value network [C]
    critic_scale: Positive = 10.0  # a value is this times the network's output
    critic_lr: NonNegative = 1e-3  # learning rate [C]
    value_iterations: Natural = 2  # first updates that train the value network alone [C]


@dataclass
class Args:
    run: RunArgs = field(default_factory=RunArgs)
    task: TaskArgs = field(default_factory=TaskArgs)
    policy: PolicyArgs = field(default_factory=PolicyArgs)
    pretrain: PretrainArgs = field(default_factory=PretrainArgs)
    actor: ActorArgs = field(default_factory=ActorArgs)
    critic: CriticArgs = field(default_factory=CriticArgs)


# What the tables of OGPO set and this method does not have.
WITHOUT = (
    *("variant", "start_training", "update_every", "replay_size", "best_of_n", "best_of_n_heads", "actor_ema"),
    *("advantage", "states", "group", "bc_coef", "success_min", "actor_lr_min", "actor_lr_warmup", "actor_lr_period"),
    *("heads", "critic_batch", "critic_ema", "n_step", "calql_steps", "critic_warmup", "critic_successes"),
)


def default_args(env: str = "lift", preset: str = "laptop") -> Args:
    """Defaults for an environment: dataclass < OGPO's preset < task < this method's. Raises UserError if unknown."""
    tables = (settings.SETTINGS, baselines.DPPO)
    return settings.apply(Args(), env, preset, "ogpo+ca", without=WITHOUT, tables=tables)


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


class NoiseNet(nn.Module):
    """sigma(s, t) between two bounds, for learned noise: MLP on [observation, time embedding] [C, ReinFlow]."""

    def __init__(self, chunk_dim: int, p: PolicyArgs, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.middle = (math.log(p.noise_high) + math.log(p.noise_low)) / 2
        self.reach = (math.log(p.noise_high) - math.log(p.noise_low)) / 2
        self.register_buffer("obs_mean", mean.clone())
        self.register_buffer("obs_std", std.clone())
        self.layers = nn.Sequential(nn.Linear(len(mean) + 32, 64), nn.Tanh(), nn.Linear(64, chunk_dim))

    def forward(self, obs: Tensor, t_emb: Tensor) -> Tensor:
        """obs (..., O), t_emb (..., 32), broadcastable -> deviation of every coordinate (..., D)"""
        lead = torch.broadcast_shapes(obs.shape[:-1], t_emb.shape[:-1])
        obs = (obs - self.obs_mean) / self.obs_std
        h = torch.cat([z.expand(*lead, -1) for z in (obs, t_emb.detach())], -1)  # velocities own the embedding
        return (self.middle + self.reach * self.layers(h).tanh()).exp()


class ValueNet(nn.Module):
    """V(s): MLP on the observation."""

    def __init__(self, c: CriticArgs, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.output_scale = c.critic_scale
        self.register_buffer("obs_mean", mean.clone())
        self.register_buffer("obs_std", std.clone())
        sizes = (len(mean), *c.critic_hidden)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], 1)
        with torch.no_grad():
            self.out.weight /= self.output_scale
            # The value of never succeeding, as OGPO's critics start.
            never = c.reward_offset / max(1 - c.gamma, 1e-3) if c.reward == "contract" else 0.0
            self.out.bias.fill_(never / self.output_scale)

    def forward(self, obs: Tensor) -> Tensor:
        """obs (..., O) -> (...)"""
        h = (obs - self.obs_mean) / self.obs_std
        for layer in self.layers:
            h = F.gelu(layer(h))
        return self.output_scale * self.out(h).squeeze(-1)


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


def transition(
    net: VelocityNet, noise_net: NoiseNet | None, obs: Tensor, x: Tensor, t: Tensor, sigma: Tensor, p: PolicyArgs
) -> tuple[Tensor, Tensor]:
    """Mean and deviation (..., D) of the next chain state: obs (..., O), x (..., D), t and sigma (...,), broadcastable.

    sigma counts with fixed noise only. Acting and training call this with the same t_k [deviation: ReinFlow acts at
    other times than those at which it computes the likelihood, and its ratio is not 1 at equal parameters].
    """
    t_emb = net.embed(t)  # (..., 32)
    v = net(obs, x, t_emb)
    if noise_net:
        return (x + v / p.flow_steps).clamp(-1, 1), noise_net(obs, t_emb)
    t, sigma = t[..., None], sigma[..., None]
    return step_mean(x, v, t, sigma, p), sigma.expand_as(v)


def sample_chain(
    net: VelocityNet, noise_net: NoiseNet | None, obs: Tensor, noise: Tensor, p: PolicyArgs
) -> tuple[Tensor, Tensor]:
    """Stochastic denoising chain and the log-density of its steps, a mean over coordinates, up to a constant.

    obs (n, O), noise (n, K+1, D) standard normal -> chain (n, K+1, D), log_prob (n, K). The action is the clipped last
    state, which is kept unclipped here.
    """
    times, sigmas = flow_schedule(p, obs.device)
    z = noise[:, 1:].clamp(-NOISE_CLIP, NOISE_CLIP)  # (n, K, D)
    chain, log_prob = [noise[:, 0]], []
    for k in range(p.flow_steps):
        mean, sigma = transition(net, noise_net, obs, chain[k], times[k], sigmas[k], p)
        chain.append(mean + sigma * z[:, k])
        log_prob.append((-0.5 * z[:, k].square() - sigma.log()).mean(-1))
    return torch.stack(chain, 1), torch.stack(log_prob, 1)


def chain_log_prob(
    net: VelocityNet, noise_net: NoiseNet | None, obs: Tensor, chain: Tensor, p: PolicyArgs
) -> tuple[Tensor, Tensor]:
    """The same of stored chains, and the steps' entropies: obs (n, O), chain (n, K+1, D) -> (n, K) each."""
    x, x_next = chain[:, :-1], chain[:, 1:]  # (n, K, D)
    mean, sigma = transition(net, noise_net, obs[:, None], x, *flow_schedule(p, obs.device), p)
    entropy = sigma.log().mean(-1)
    return -0.5 * ((x_next - mean) / sigma).square().mean(-1) - entropy, entropy


def sample_ode(net: VelocityNet, obs: Tensor, x: Tensor, flow_steps: int) -> Tensor:
    """Noise-free policy [S 1.2]: obs (n, O), x (n, D) normal -> action (n, D) by K Euler steps and one final clip."""
    t_emb = net.embed(torch.arange(flow_steps, device=obs.device) / flow_steps)
    for k in range(flow_steps):
        x = x + net(obs, x, t_emb[k]) / flow_steps
    return x.clamp(-1, 1)


def gae(
    reward: Tensor, discount: Tensor, terminated: Tensor, over: Tensor, value: Tensor, next_value: Tensor, lam: float
) -> Tensor:
    """Generalized advantage estimate of chunks, all (T, E): discount is gamma^steps, over ends an episode.

    A truncated episode bootstraps by the value of its own last observation, and nothing crosses its end
    [deviation: DPPO cuts at terminations only, and takes the value of the next episode's first observation].
    """
    delta = reward + discount * (1 - terminated) * next_value - value
    advantage = torch.zeros_like(delta)
    last = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        last = advantage[t] = delta[t] + discount[t] * lam * (1 - over[t]) * last
    return advantage


def compare(log_prob: Tensor, old: Tensor, ratio: str) -> Tensor:
    """Log-ratios from log-densities of the steps (n, K): (n, K) of each step, or (n, 1) of the chain [B 5].

    A chain has K+1 states; the first, pure noise, has the same density under both policies.
    """
    log_ratio = log_prob - old
    return log_ratio if ratio == "step" else log_ratio.sum(-1, keepdim=True) / (log_ratio.shape[1] + 1)


def step_weights(steps: int, a: ActorArgs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight of the advantage and clip range of each ratio, the noisiest step first: (K,), or (1,) of a chain [C]."""
    if a.ratio == "chain" or steps == 1:
        return torch.ones(1, device=device), torch.full((1,), a.clip, device=device)
    k = torch.arange(steps, device=device)
    growth = torch.expm1(CLIP_GROWTH * k / (steps - 1)) / math.expm1(CLIP_GROWTH)  # from 0 to 1
    return a.denoising_gamma ** (steps - 1 - k), a.clip_first + (a.clip - a.clip_first) * growth


def ppo_loss(log_ratio: Tensor, advantage: Tensor, weight: Tensor, clip: Tensor) -> tuple[Tensor, Info]:
    """Clipped objective: log_ratio (n, J), advantage (n,), weight and clip (J,); a mean over all n J ratios."""
    ratio, advantage = log_ratio.exp(), advantage[:, None] * weight
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    off = (ratio.detach() - 1).abs()
    kl = (ratio - 1 - log_ratio).detach().mean()  # from the old policy, an estimate that is never negative
    return loss, {"ratio_off": off.mean(), "clipped": (off > clip).float().mean(), "kl": kl}


# --- Agent and training ----------------------------------------------------------------------------------------------


class Agent:
    """Networks, optimizers, and how far training has come: what a checkpoint holds."""

    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device, demos: Demos | None) -> None:
        """demos: observations are standardised by their statistics; a checkpoint brings its own."""
        torch.manual_seed(args.run.seed)
        p, c, dim = args.policy, args.critic, args.policy.chunk * act_dim
        mean, std = demos.statistics() if demos else (torch.zeros(obs_dim), torch.ones(obs_dim))
        std = std + 1e-2  # keeps nearly constant entries from exploding
        self.actor = VelocityNet(dim, p.actor_hidden, mean, std).to(device)
        self.noise_net = NoiseNet(dim, p, mean, std).to(device) if p.noise == "learned" else None
        self.critic = ValueNet(c, mean, std).to(device)
        self.actor_opt = adam(self.actor.parameters(), args.pretrain.bc_lr, device)
        self.critic_opt = adam(self.critic.parameters(), c.critic_lr, device)
        self.noise_opt = adam(self.noise_net.parameters(), args.actor.actor_lr, device) if self.noise_net else None
        self.rng = Rng(args.run.seed, device)  # of training; evaluation has its own
        self.bc_step = 0  # gradient steps of cloning so far
        self.bc_below: dict[str, Tensor] | None = None  # newest weights at or below --bc-stop-success
        self.bc_done = False
        self.iterations = 0  # rollouts learnt from so far


class Rollout:
    """What E environments did in the last chunks, T of them for an update."""

    def __init__(self, args: Args, obs_dim: int, chunk_dim: int, device: torch.device) -> None:
        p, envs, at = args.policy, args.task.num_envs, dict(device=device)
        shape = (args.run.rollout, envs)  # (T, E)
        self.row = 0  # next to be written
        self.obs, self.next_obs = torch.zeros(2, *shape, obs_dim, **at).unbind()
        self.chain = torch.zeros(*shape, p.flow_steps + 1, chunk_dim, **at)
        self.log_prob = torch.zeros(*shape, p.flow_steps, **at)  # of the denoising steps, under the policy that acted
        self.reward = torch.zeros(*shape, **at)  # discounted sum over the steps of the chunk
        self.discount = torch.zeros(*shape, **at)  # gamma^steps
        self.terminated, self.over = torch.zeros(2, *shape, **at).unbind()  # for good; or truncated too
        self.returns = torch.zeros(envs, **at)  # discounted sum of an episode's rewards so far
        self.moments = torch.zeros(3, dtype=torch.float64, **at)  # number, sum and sum of squares of all those

    def add(self, **row: Tensor) -> None:
        """One chunk of every environment, (E, ...) by name."""
        for name, value in row.items():
            getattr(self, name)[self.row] = value
        self.row += 1

    def scaled_reward(self) -> Tensor:
        """(T, E) rewards over the deviation of the discounted sums of rewards so far [C]; once for every rollout."""
        for t in range(len(self.reward)):
            self.returns = self.returns * self.discount[t] + self.reward[t]
            self.moments += torch.stack([self.returns**n for n in range(3)]).double().sum(1)
            self.returns = self.returns * (1 - self.over[t])
        _, mean, square = self.moments / self.moments[0]
        return (self.reward / (square - mean**2).clamp(min=1e-8).sqrt().float()).clamp(-REWARD_CLIP, REWARD_CLIP)


@torch.no_grad()
def act_ode(agent: Agent, args: Args, obs: Tensor, rng: Rng) -> Tensor:
    """The noise-free policy of the online actor: obs (n, O) -> chunks (n, H, A)."""
    noise = rng.randn(len(obs), agent.actor.out.out_features)
    return sample_ode(agent.actor, obs, noise, args.policy.flow_steps).unflatten(1, (args.policy.chunk, -1))


@torch.no_grad()
def draw_chains(agent: Agent, args: Args, obs: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """A chain of the actor at each obs (n, O): chain (n, K+1, D), log_prob (n, K)."""
    noise = rng.randn(len(obs), args.policy.flow_steps + 1, agent.actor.out.out_features)
    return sample_chain(agent.actor, agent.noise_net, obs, noise, args.policy)


def executed(chain: Tensor, chunk: int) -> Tensor:
    """The chunks (n, H, A) that chains (n, K+1, D) end in."""
    return chain[:, -1].clamp(-1, 1).unflatten(1, (chunk, -1))


def act(agent: Agent, args: Args, obs: Tensor, rng: Rng) -> Tensor:
    """The acting policy, a noisy chain: obs (n, O) -> chunks (n, H, A)."""
    return executed(draw_chains(agent, args, obs, rng)[0], args.policy.chunk)


def update_minibatch(
    agent: Agent, obs: Tensor, chain: Tensor, old: Tensor, advantage: Tensor, target: Tensor, args: Args, move: bool
) -> Info:
    """A step of the value network and, if `move`, one of the actor: (n, ...) each, old (n, K), target (n,) of V."""
    a = args.actor
    loss = 0.5 * (agent.critic(obs) - target).square().mean()
    agent.critic_opt.zero_grad()
    loss.backward()
    info = {"value_loss": loss.detach()}
    info["critic_grad"] = nn.utils.clip_grad_norm_(agent.critic.parameters(), math.inf)  # measured, not clipped
    agent.critic_opt.step()
    if not move:
        return info
    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    log_prob, entropy = chain_log_prob(agent.actor, agent.noise_net, obs, chain, args.policy)
    weight, clip = step_weights(args.policy.flow_steps, a, obs.device)
    loss, ppo_info = ppo_loss(compare(log_prob, old, a.ratio), advantage, weight, clip)
    optimizers = [agent.actor_opt] + ([agent.noise_opt] if agent.noise_net else [])
    for optimizer in optimizers:
        optimizer.zero_grad()
    (loss - a.entropy_coef * entropy.mean()).backward()
    info |= {"pg_loss": loss.detach(), "log_sigma": entropy.detach().mean()} | ppo_info
    info["actor_grad"] = nn.utils.clip_grad_norm_(agent.actor.parameters(), math.inf)
    for optimizer in optimizers:
        optimizer.step()
    return info


def update(agent: Agent, rollout: Rollout, args: Args) -> list[Info]:
    """Advantages of a rollout, then some passes over it in minibatches. The value network goes ahead of the actor."""
    a, c = args.actor, args.critic
    with torch.no_grad():
        value, next_value = agent.critic(rollout.obs), agent.critic(rollout.next_obs)  # (T, E)
    reward = rollout.reward if c.reward == "contract" else rollout.scaled_reward()
    ends = (rollout.terminated, rollout.over)
    advantage = gae(reward, rollout.discount, *ends, value, next_value, c.gae_lambda)
    target = advantage + value
    parts = (rollout.obs, rollout.chain, rollout.log_prob, advantage, target)
    batch = [x.flatten(0, 1) for x in parts]  # (T E, ...)
    size = min(a.minibatch, len(batch[0]))
    move, infos = agent.iterations >= c.value_iterations, []
    for _ in range(a.epochs):
        order = agent.rng.rand(len(batch[0])).argsort()
        steps = [rows for rows in order.split(size) if len(rows) == size]
        infos += [update_minibatch(agent, *(x[rows] for x in batch), args, move) for rows in steps]
        if move and torch.stack([info["kl"] for info in infos[-len(steps) :]]).mean() > a.kl_stop:
            break
    share = 1 - (target - value).var(correction=0) / target.var(correction=0).clamp(min=1e-8)
    agent.iterations += 1
    rollout.row = 0
    return [*infos, {"value": value.mean(), "explained": share, "passes": torch.tensor(len(infos) / len(steps))}]


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
    agent.actor_opt = adam(agent.actor.parameters(), args.actor.actor_lr, agent.rng.device)  # afresh [C]
    agent.bc_done, agent.bc_below = True, None
    checkpoint.save(run.folder / "cloned.pt", agent.actor.state_dict())
    run.begin_evaluation("final", args.task.eval_episodes, "cloned policy", log="eval", only="ode")
    run.record_video("ode", "before.mp4", args.run.video)
    run.save()


def train(run: Run, agent: Agent, rollout: Rollout, args: Args) -> None:
    """Collect --rollout chunks in every environment, learn from them, forget them; log, evaluate and save when due."""
    r, t, c, h = args.run, args.task, args.critic, args.policy.chunk
    envs = run.closing(make_vec_env(r.env, t.num_envs, horizon=t.collect_horizon or t.horizon, chunk=h))
    episodes, averages = Episodes(envs, r.seed), Averages()  # metrics since the last log line
    run.track(rollout=rollout, episodes=episodes, averages=averages)
    offset, bonus = (c.reward_offset, c.success_bonus) if c.reward == "contract" else (0.0, 0.0)
    while run.step < r.total_steps and not (run.stop.requested or run.good_enough(r.stop_success)):
        if (over := episodes.over()).any():
            obs, _ = envs.reset(seed=episodes.begin(over), options={"reset_mask": over})
            episodes.see(obs, over)
            rollout.over[rollout.row - 1, over] = 1.0  # also of an environment that failed, after a resume
        obs = torch.from_numpy(episodes.obs()).float()  # (E, O)
        chain, log_prob = draw_chains(agent, args, obs.to(agent.rng.device), agent.rng)
        actions = executed(chain, h).cpu().numpy()  # (E, H, A)
        next_obs, _, terminated, truncated, info = envs.step(actions)  # a chunk in each, or less where an episode ends
        reward = info["made"] * (info["rewards"] + offset + bonus * info["successes"])  # (E, H) as trained
        episodes.append(actions, reward, next_obs, info["success"], info["steps"])
        before, run.step = run.step, run.step + int(info["steps"].sum())
        ended = terminated | truncated  # the first success terminates, the horizon truncates
        arrays = dict(
            obs=obs, next_obs=next_obs, reward=reward @ c.gamma ** np.arange(h), discount=c.gamma ** info["steps"],
            terminated=terminated, over=ended,
        )  # fmt: skip
        rollout.add(chain=chain, log_prob=log_prob, **{name: torch.as_tensor(x) for name, x in arrays.items()})
        for i in np.flatnonzero(ended):
            episodes.finish(i)
        if rollout.row == r.rollout:
            for metrics in update(agent, rollout, args):
                averages.add(metrics)
        run.show_progress(episodes)
        if due(before, run.step, r.log_every):
            metrics = averages.take()
            run.stop_if_not_finite(metrics)
            line = {f"ogpo/{k}": v for k, v in metrics.items()}
            line |= {f"train/{k}": v for k, v in episodes.recent().items()} | {"train/episodes": episodes.finished}
            run.log.log(run.step, line | {"time/wall": time.perf_counter() - run.started})
        if due(before, run.step, t.eval_every):
            run.begin_evaluation("interval", t.eval_interval_episodes, f"step {run.step}", log="eval")
        if due(before, run.step, r.checkpoint_every):
            run.save()


def main(argv: list[str]) -> None:
    args, saved, folder = start(
        argv, default_args, chosen_by=("env", "preset"), weights=(VelocityNet, NoiseNet, ValueNet),
        folder_name="{env}__dppo__s{seed}", fixed=(*settings.FIXED, "noise", "reward", "rollout"), check=settings.check,
    )  # fmt: skip
    r, t, device = args.run, args.task, pick_device(args.run.device, args.run.threads)
    with checkpoint.StopSignal() as stop, Run(folder, saved, stop, cli.flatten(args), r.env, t.horizon, device) as run:
        run.open_evaluation(t.eval_envs, args.policy.chunk)
        if not r.eval:
            rollout = Rollout(args, run.obs_dim, args.policy.chunk * run.act_dim, device)
            run.check_disk(sum(x.nbytes for x in vars(rollout).values() if isinstance(x, Tensor)))
        demos = None
        if not (r.eval or (saved and saved["agent"]["bc_done"])):
            demos = run.get_demos(t.demos, t.num_demos, t.demo_noise, Path(t.data_dir), t.filter_key)
        agent = Agent(args, run.obs_dim, run.act_dim, device, demos)
        run.track(agent=agent)
        if r.compile:
            accelerate(globals(), COMPILED, RECORDED, agent.rng.generator)
        run.policies = {"ode": partial(act_ode, agent, args), "act": partial(act, agent, args)}
        if not r.eval:
            run.open_log(r.total_steps, r.wandb_project, r.tensorboard)
            if not agent.bc_done:
                pretrain(run, agent, demos, args)
            if agent.bc_done:
                train(run, agent, rollout, args)
            run.save()
            run.record_video("act", "after.mp4", r.video)
        run.evaluate("final", t.eval_episodes, "final", log="" if r.eval else "final")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
