"""QC, QC-FQL and FQL from state: Q-learning on action chunks around a flow policy that only imitates.

Papers: "Reinforcement Learning with Action Chunking" (QC), arXiv 2507.07969, and "Flow Q-Learning" (FQL), arXiv
2502.02538. [C]: the authors' code, ColinQiyangLi/qc 48283b4 and seohongpark/fql 719d044; [B n], [S n.m]: sections of
docs/baselines.md and docs/ogpo_state.md; [deviation: why] marks where we differ.

A flow policy imitates what the replay buffer holds, without a gradient from the critics. Either they choose among N of
its chunks, when acting and in their targets (best-of-n: QC), or a second network makes a chunk from noise at once, near
the flow's and worth more (one-step: QC-FQL, with chunks of one step FQL). All else is as in ogpo_state.py.

    python baselines/qc.py --env toy                                # no simulator, a minute or two on one core
    python baselines/qc.py --env lift --cloned runs/NAME            # from another run's clone, also of ogpo_state.py
    python baselines/qc.py --env lift --clone-data frozen           # the clone stays as it is: selection alone
    python baselines/qc.py --env lift --policy one-step --chunk 1   # FQL; without --chunk QC-FQL
    python baselines/qc.py --eval runs/NAME                         # --resume runs/NAME continues it exactly

Symbols
    papers           here                        shape
    s, a             obs, action                 (n, O), (n, D)   D = H * A: a chunk of H steps, in [-1, 1]
    z                noise                       (n, D)           standard normal
    v_theta          actor                       (n, D)           velocity of the flow that imitates
    F(s, z)          sample_ode                  (n, D)           its chunk, by K noise-free steps
    mu(s, z)         one_step                    (n, D)           one-step policy
    Q_m, Q-bar_m     critic, critic_ema          (M, n)           ensemble of M heads
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
from common.machine import accelerate, adam
from common.ranges import Count, Helpers, Natural, NonNegative, Positive, Real, Seed, Size, Unit, Workers
from common.replay import Batch, ReplayBuffer
from common.rng import Rng
from common.run import Run, due, load_clone
from common.runlog import Averages
from common.start import pick_device, start
from settings import baselines
from settings import ogpo as settings

Info = dict[str, Tensor]  # scalars to log
COMPILED = ("sample_chain", "sample_ode", "bc_loss", "one_step_loss", "critic_loss")  # by --compile
RECORDED = ("update_actor", "update_critic")
NOISE_CLIP = 3.0  # a chain's normal draws are clipped to this many deviations [C]
CALQL_COEF = 5.0  # weight of Cal-QL's term [C]
CALQL_ACTIONS = 4  # chunks of the policy in it, and as many random ones

# --- Arguments. Values are the `laptop` preset's; settings/ holds what other presets and tasks change. ----------------


@dataclass
class RunArgs:
    """What to run, for how long, and where its files go."""

    env: str = "lift"  # a task of docs/tasks.md, or your own Gymnasium environment as package.module:EnvId
    preset: Literal["laptop", "paper"] = "laptop"  # settings that learn on two CPU cores, or the paper's
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
    """Flow policy over action chunks [S 1.1-1.3], and how the critics improve on it [B 1]."""

    policy: Literal["best-of-n", "one-step"] = "best-of-n"  # they choose, or give another network a gradient
    chunk: Size = 4  # H, environment steps per action chunk, all executed
    flow_steps: Size = 4  # K, denoising steps
    actor_hidden: tuple[Size, ...] = (256, 256, 256)  # widths of the velocity network
    noise_std: Positive = 0.1  # c: step k of a noisy chain, which acts first, has at least the noise c * sqrt(1 - t_k)
    eta: Unit = 1.0  # and this share of ancestral sampling's noise, DDPM's on a flow [S 1.3]
    best_of_n: Size = 8  # N, candidates per decision and target, the critics' mean picks one [C: 32]; 1 for one-step


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
    """Imitation of the replay buffer, and the one-step policy [B 1]."""

    clone_data: Literal["all", "success", "frozen"] = "all"  # what the flow imitates; all [C]
    success_min: Natural = 64  # success: nothing before this many chunk starts have succeeded
    actor_lr: NonNegative = 3e-4  # learning rate of flow and one-step policy [C]
    alpha: NonNegative = 1.0  # one-step: weight of staying near the flow's chunk, against Q over its mean size
    distill_steps: Natural = 4_000  # one-step: updates towards the clone's chunks, at the demonstrations, before RL


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


def default_args(env: str = "lift", preset: str = "laptop", policy: str = "best-of-n") -> Args:
    """Defaults for an environment: dataclass < preset < task < QC's own. Raises UserError on an unknown name."""
    cli.check_choice("policy", policy, ("best-of-n", "one-step"))
    without = ("variant", "actor_ema", "best_of_n_heads", "advantage", "states", "group", "clip", "bc_coef")
    without += ("actor_lr_min", "actor_lr_warmup", "actor_lr_period")
    args = settings.apply(Args(), env, preset, "ogpo+ca", without=without, tables=(settings.SETTINGS, baselines.QC))
    return cli.override(args, {"policy": policy} | ({"best_of_n": 1} if policy == "one-step" else {}))


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


class OneStepNet(VelocityNet):
    """mu(s, z), a chunk at once: VelocityNet with its time features held at 0, that is without time [C]."""

    def forward(self, obs: Tensor, z: Tensor) -> Tensor:
        """obs (n, O), z (n, D) -> chunk (n, D), not clipped"""
        return super().forward(obs, z, z.new_zeros(32))


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


def one_step_loss(action: Tensor, flow: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, Info]:
    """The one-step policy stays near the flow and raises Q [B 1]: action = mu(s, z) and flow = F(s, z), both (n, D).

    alpha MSE(mu, F) - mean Q / mean |Q|, Q the mean of the heads q (M, n) at clip mu; |Q| is a constant [C].
    """
    distill, q = (action - flow).square().mean(), q.mean(0)
    loss = alpha * distill - q.mean() / q.detach().abs().mean()
    return loss, {"distill_loss": distill.detach(), "q_policy": q.detach().mean()}


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
        self.critic = CriticEnsemble(dim, c, mean, std).to(device)
        # The value of never succeeding [deviation: released critics start near 0, above every value of a poor policy].
        nn.init.constant_(self.critic.biases[-1], c.reward_offset / max(1 - c.gamma, 1e-3) / c.critic_scale)
        self.critic_ema = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_opt = adam(self.actor.parameters(), args.pretrain.bc_lr, device)
        self.critic_opt = adam(self.critic.parameters(), c.critic_lr, device)
        one_step = p.policy == "one-step"
        self.one_step = OneStepNet(dim, p.actor_hidden, mean, std).to(device) if one_step else None
        self.one_step_opt = adam(self.one_step.parameters(), args.actor.actor_lr, device) if one_step else None
        self.rng = Rng(args.run.seed, device)  # of training; evaluation has its own
        self.distill_rng = Rng(args.run.seed, device)  # of distillation before RL, which moves no other draws
        self.bc_step = 0  # gradient steps of cloning so far
        self.bc_below: dict[str, Tensor] | None = None  # newest weights at or below --bc-stop-success
        self.bc_done = False
        self.calql_step = 0  # updates of the critics on demonstrations so far
        self.distill_step = 0 if one_step else args.actor.distill_steps  # updates of the one-step policy before RL
        self.updates = 0  # online updates so far
        self.best_of_n_on = c.calql_steps == c.critic_warmup == c.critic_successes == 0  # critics tell candidates apart
        self.policy_gradient_on = False  # and may move the one-step policy, while the flow imitates


def decode(agent: Agent, args: Args, obs: Tensor, noise: Tensor) -> Tensor:
    """The method's chunk of obs (n, O) and noise (n, D), by the online networks [C]: there is no slow copy."""
    if agent.one_step and agent.best_of_n_on:
        return agent.one_step(obs, noise).clamp(-1, 1)
    return sample_ode(agent.actor, obs, noise, args.policy.flow_steps)


@torch.no_grad()
def act_ode(agent: Agent, args: Args, obs: Tensor, rng: Rng) -> Tensor:
    """One draw, without choice: the one-step policy once it acts, else the flow. obs (n, O) -> chunks (n, H, A)."""
    noise = rng.randn(len(obs), agent.actor.out.out_features)
    return decode(agent, args, obs, noise).unflatten(1, (args.policy.chunk, -1))


@torch.no_grad()
def draw_chains(agent: Agent, args: Args, obs: Tensor, n: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    """n chains of the clone at each obs (B, O): rows (B n, O), chain (B n, K+1, D), log_prob (B n,)."""
    rows = obs.repeat_interleave(n, 0)
    noise = rng.randn(len(rows), args.policy.flow_steps + 1, agent.actor.out.out_features)
    return rows, *sample_chain(agent.actor, rows, noise, args.policy)


@torch.no_grad()
def draw_action(agent: Agent, args: Args, obs: Tensor, rng: Rng, own: bool) -> Tensor:
    """obs (B, O) -> action (B, D): the method's own, best of N by the online critics' mean [C], or a chain's end."""
    if not own:
        _, chain, _ = draw_chains(agent, args, obs, 1, rng)
        return chain[:, -1].clamp(-1, 1)
    n = args.policy.best_of_n
    rows = obs.repeat_interleave(n, 0)  # (B N, O)
    action = decode(agent, args, rows, rng.randn(len(rows), agent.actor.out.out_features))  # (B N, D)
    if n > 1:
        q = agent.critic(rows, action).unflatten(1, (-1, n))  # (M, B, N)
        action = action.unflatten(0, (-1, n))[torch.arange(len(obs), device=obs.device), best_of_n(q, q, 0)]
    return action


def act_best_of_n(agent: Agent, args: Args, obs: Tensor, rng: Rng) -> Tensor:
    """The acting policy, one noisy chain of the clone until the critics can tell: obs (n, O) -> chunks (n, H, A)."""
    return draw_action(agent, args, obs, rng, agent.best_of_n_on).unflatten(1, (args.policy.chunk, -1))


@torch.no_grad()
def update_ema(target: nn.Module, source: nn.Module, rate: float) -> None:
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


def update_actor(agent: Agent, batch: Batch, lessons: Batch | None, args: Args) -> Info:
    """One step of the one-step policy at the states of a batch, and one of imitation on `lessons` [B 1]."""
    info = {}
    if agent.one_step:
        noise = agent.rng.randn(len(batch.obs), agent.actor.out.out_features)
        with torch.no_grad():
            flow = sample_ode(agent.actor, batch.obs, noise, args.policy.flow_steps)  # (n, D)
        action = agent.one_step(batch.obs, noise)
        loss, info = one_step_loss(action, flow, agent.critic(batch.obs, action.clamp(-1, 1)), args.actor.alpha)
        agent.one_step_opt.zero_grad()
        loss.backward(inputs=list(agent.one_step.parameters()))
        agent.one_step_opt.step()
    if lessons is not None:
        action = lessons.actions.flatten(1)  # (n, D)
        loss = bc_loss(agent.actor, lessons.obs, action, agent.rng.randn(*action.shape), agent.rng.rand(len(action)))
        agent.actor_opt.zero_grad()
        loss.backward()
        grad = nn.utils.clip_grad_norm_(agent.actor.parameters(), math.inf)  # measured, not clipped
        agent.actor_opt.step()
        info |= {"bc_loss": loss.detach(), "actor_grad": grad}
    return info


def update_critic(agent: Agent, batch: Batch, args: Args, returns: Tensor | None = None, own: bool = False) -> Info:
    """One critic step [S 1.7]: at the next state the acting policy's action, best-of-N included [C].

    returns (n,) of a batch of demonstrations: with Cal-QL's term [S 1.9]. own: the method acts, no longer chains.
    """
    c, action = args.critic, batch.actions.flatten(1)  # (n, D)
    next_action = draw_action(agent, args, batch.next_obs, agent.rng, own)  # (n, D)
    with torch.no_grad():
        q_next = agent.critic_ema(batch.next_obs, next_action)  # (M, n)
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
    """Policies, then critics, on one batch. As OGPO's actor they wait for the critics: imitation makes early failures
    likelier [deviation: authors' demonstrations stay in the buffer]."""
    a, c, device = args.actor, args.critic, agent.rng.device
    batch, info = buffer.sample(c.critic_batch, rng, device, chunks=c.n_step), {}
    agent.policy_gradient_on |= agent.updates >= c.critic_warmup and buffer.successes >= c.critic_successes
    if agent.policy_gradient_on:
        lessons = batch if a.clone_data == "all" else None  # none is cut by an episode's end: no weights of 0 [C]
        if a.clone_data == "success" and buffer.success_starts.size >= a.success_min:
            lessons = buffer.sample(c.critic_batch, rng, device, success=True)
        info = update_actor(agent, batch, lessons, args)
    info |= update_critic(agent, batch, args, None, agent.best_of_n_on)
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
    agent.actor_opt = adam(agent.actor.parameters(), args.actor.actor_lr, agent.rng.device)  # afresh [C]
    agent.bc_done, agent.bc_below = True, None
    checkpoint.save(run.folder / "cloned.pt", agent.actor.state_dict())
    run.begin_evaluation("final", args.task.eval_episodes, "cloned policy", log="eval", only="ode")
    run.record_video("ode", "before.mp4", args.run.video)
    run.save()


def pretrain_one_step(run: Run, agent: Agent, demos: Demos, args: Args) -> None:
    """Distil the clone at the demonstrations [deviation: authors train all losses offline, the demonstrations stay]."""
    obs = torch.from_numpy(demos.chunks(args.policy.chunk)[0]).to(agent.rng.device)  # (n, O)
    rng, batch, last = agent.distill_rng, args.pretrain.bc_batch, args.actor.distill_steps
    while agent.distill_step < last and not run.stop.requested:
        rows, noise = obs[rng.randint(0, len(obs), batch)], rng.randn(batch, agent.actor.out.out_features)
        with torch.no_grad():
            flow = sample_ode(agent.actor, rows, noise, args.policy.flow_steps)  # (n, D)
        agent.one_step_opt.zero_grad()
        loss = (agent.one_step(rows, noise) - flow).square().mean()
        loss.backward()
        agent.one_step_opt.step()
        agent.distill_step += 1
        if agent.distill_step == last:
            run.stop_if_not_finite({"distill_loss": loss.item()})
            run.log.say(f"one-step policy, step {last}: distillation loss {loss.item():.4f}")
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
        argv, default_args, chosen_by=("env", "preset", "policy"), weights=(VelocityNet, OneStepNet, CriticEnsemble),
        folder_name="{env}__qc__s{seed}", fixed=(*settings.FIXED, "distill_steps"), check=settings.check,
    )  # fmt: skip
    r, t, device = args.run, args.task, pick_device(args.run.device, args.run.threads)
    with checkpoint.StopSignal() as stop, Run(folder, saved, stop, cli.flatten(args), r.env, t.horizon, device) as run:
        run.open_evaluation(t.eval_envs, args.policy.chunk)
        if not r.eval:
            buffer = ReplayBuffer(r.replay_size, run.obs_dim, run.act_dim, args.policy.chunk)
            run.check_disk(min(r.replay_size, 2 * r.total_steps) * buffer.row_bytes)  # an episode of one step has two
        taught = saved and saved["agent"]["bc_done"] and saved["agent"]["calql_step"] == args.critic.calql_steps
        taught = taught and saved["agent"]["distill_step"] == args.actor.distill_steps
        demos = None
        if not (r.eval or taught):
            demos = run.get_demos(t.demos, t.num_demos, t.demo_noise, Path(t.data_dir), t.filter_key)
        agent = Agent(args, run.obs_dim, run.act_dim, device, demos)
        run.track(agent=agent)
        if r.compile:
            accelerate(globals(), COMPILED, RECORDED, agent.rng.generator)
        run.policies = {"ode": partial(act_ode, agent, args), "act": partial(act_best_of_n, agent, args)}
        if not r.eval:
            run.open_log(r.total_steps, r.wandb_project, r.tensorboard)
            if not agent.bc_done:
                pretrain(run, agent, demos, args)
            if agent.bc_done and agent.distill_step < args.actor.distill_steps:
                pretrain_one_step(run, agent, demos, args)
            if agent.bc_done and agent.calql_step < args.critic.calql_steps:
                pretrain_critic(run, agent, demos, args)
            if agent.bc_done:
                train(run, agent, buffer, args)
            run.save()
            run.record_video("act", "after.mp4", r.video)
        run.evaluate("final", t.eval_episodes, "final", log="" if r.eval else "final")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
