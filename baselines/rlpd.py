"""RLPD on action chunks from state: soft actor-critic from nothing, with demonstrations in half of every batch.

Papers: "Efficient Online Reinforcement Learning with Offline Data" (RLPD), arXiv 2302.02948, on chunks as RLPD-AC of
"Reinforcement Learning with Action Chunking", arXiv 2507.07969. [C]: the latter's code, ColinQiyangLi/qc 48283b4,
agents/acrlpd.py; [B n], [S n.m]: sections of docs/baselines.md and docs/ogpo_state.md; [deviation: why] marks where we
differ.

A Gaussian policy, squashed into the action range, makes a whole chunk from the observation. It is not cloned: critics,
with the demonstrations' rewards in half of every batch, pull it there, and an entropy bonus keeps it exploring. It is
the control of all the others: is the clone needed at all? Environment, critics and schedule are those of ogpo_state.py.

    python baselines/rlpd.py --env toy                   # no simulator, under a minute on one core
    python baselines/rlpd.py --env lift --demo-share 0   # plain SAC on chunks, which never sees a demonstration
    python baselines/rlpd.py --env lift --chunk 1        # RLPD on single steps
    python baselines/rlpd.py --eval runs/NAME            # --resume runs/NAME continues it exactly

Symbols
    paper            here                        shape
    s, a             obs, action                 (n, O), (n, D)   D = H * A: a chunk of H steps, in [-1, 1]
    pi(a|s)          actor, squash               (n, D)           mean and deviation of u, a = tanh(u)
    Q_m, Q-bar_m     critic, critic_ema          (M, n)           ensemble of M heads
    log alpha        temperature["log"]                           alpha weighs the entropy of a
    D                taught                                       replay buffer of the demonstrations
"""

import copy
import math
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

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
from common.errors import UserError
from common.machine import accelerate, adam
from common.ranges import Count, Helpers, Natural, NonNegative, Positive, Range, Real, Seed, Size, Unit, Workers
from common.replay import Batch, ReplayBuffer
from common.rng import Rng
from common.run import Run, due
from common.runlog import Averages
from common.start import pick_device, start
from settings import baselines
from settings import ogpo as settings

Info = dict[str, Tensor]  # scalars to log
COMPILED = ("squash", "critic_loss")  # by --compile
RECORDED = ("update_actor", "update_critic")
MIXED = ("kitchen-*", "*-raw", "*-dense")  # tasks whose reward is not success alone: demonstrations do not have it

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
    """Gaussian policy over action chunks and how it acts [B 8]."""

    chunk: Size = 4  # H, environment steps per action chunk, all executed
    actor_hidden: tuple[Size, ...] = (256, 256, 256)  # widths of the policy network
    best_of_n: Size = 1  # N, candidates per decision, the target critics' mean picks one; 1: the policy as it is [C]


@dataclass
class ActorArgs:
    """Soft policy improvement and demonstrations [B 8]."""

    demo_share: Unit = 0.5  # share of demonstrations in each batch [RLPD]; 0: plain SAC, demonstrations are not read
    actor_lr: NonNegative = 3e-4  # learning rate of the policy [C]
    target_entropy: Annotated[float, Range(high=math.log(2), open_high=True)] = -0.5  # of a, per number of D [C]
    alpha: Positive = 0.1  # temperature at the start [deviation: C's 1 would last for all of our few updates]
    alpha_lr: NonNegative = 1e-3  # learning rate of its logarithm [deviation: C has 3e-4 and more updates]


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
    backup_entropy: bool = False  # add the entropy bonus of the next chunk to the target, as SAC does; no: [C]


@dataclass
class Args:
    run: RunArgs = field(default_factory=RunArgs)
    task: TaskArgs = field(default_factory=TaskArgs)
    policy: PolicyArgs = field(default_factory=PolicyArgs)
    actor: ActorArgs = field(default_factory=ActorArgs)
    critic: CriticArgs = field(default_factory=CriticArgs)


def default_args(env: str = "lift", preset: str = "laptop") -> Args:
    """Defaults for an environment: dataclass < preset < task < RLPD's own. Raises UserError on an unknown name."""
    without = ("variant", "flow_steps", "noise_std", "eta", "actor_ema", "best_of_n_heads", "advantage", "states")
    without += ("group", "clip", "bc_coef", "success_min", "actor_lr_min", "actor_lr_warmup", "actor_lr_period")
    without += ("calql_steps", "critic_warmup", "critic_successes", "bc_steps", "bc_lr", "bc_batch", "bc_stop_success")
    without += ("bc_eval_every", "bc_eval_episodes")
    tables = (settings.SETTINGS, baselines.RLPD)
    return settings.apply(Args(), env, preset, "ogpo+ca", without=without, tables=tables)


def check(flat: Mapping[str, Any]) -> None:
    """Raises UserError on arguments that do not fit each other."""
    settings.check(flat)
    if flat["demo_share"] > 0 and any(fnmatch(flat["env"], pattern) for pattern in MIXED):
        raise UserError(f"--demo-share: success is not the only reward of {flat['env']}; give --demo-share 0")


# --- Networks --------------------------------------------------------------------------------------------------------


class TanhGaussian(nn.Module):
    """Squashed Gaussian over chunks, y = tanh(u), u ~ N(mean, e^log_std): MLP on the observation and more [B 0]."""

    def __init__(
        self, more_dim: int, chunk_dim: int, hidden: tuple[int, ...], log_std: float, mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        self.register_buffer("obs_mean", mean.clone())
        self.register_buffer("obs_std", std.clone())
        sizes = (len(mean) + more_dim, *hidden)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], 2 * chunk_dim)
        with torch.no_grad():  # starts near 0, with one width everywhere
            self.out.weight *= 0.01
            self.out.bias.zero_()
            self.out.bias[chunk_dim:] = log_std

    def forward(self, obs: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """obs (n, O), more (n, ...) -> mean and log_std of u (n, D)"""
        h = torch.cat([(obs - self.obs_mean) / self.obs_std, *more], -1)
        for layer in self.layers:
            h = F.gelu(layer(h))
        mean, log_std = self.out(h).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


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


def squash(mean: Tensor, log_std: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(mean + e^log_std eps) and its log density [B 0]: all (n, D), eps standard normal -> (n, D), (n,)."""
    u = mean + log_std.exp() * eps
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log of tanh's derivative, exact far from 0 too
    return u.tanh(), (-0.5 * (eps.square() + math.log(2 * math.pi)) - log_std - log_slope).sum(-1)


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Raises alpha while the entropy, minus the mean of log_prob (n,), is below its target [B 0]."""
    return log_alpha.exp() * (-log_prob.detach().mean() - target_entropy)


def best_of_n(q: Tensor, draws: Tensor, heads: int) -> Tensor:
    """q, draws (M, n, N) -> best (n,): least of `heads` heads [deviation: released with replacement]; 0: their mean."""
    score = q.gather(0, draws.argsort(0)[:heads]).amin(0) if heads else q.mean(0)  # (n, N)
    return score.argmax(-1)


def policy_loss(q: Tensor, log_prob: Tensor, log_alpha: Tensor) -> Tensor:
    """Mean of the heads q (M, n) and entropy bonus of the policy's chunks, log_prob (n,), to be raised [B 8] [C]."""
    return (log_alpha.detach().exp() * log_prob - q.mean(0)).mean()


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


# --- Agent and training ----------------------------------------------------------------------------------------------


class Agent:
    """Networks and their slow copies, optimizers, and how far training has come: what a checkpoint holds."""

    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device, demos: Demos | None) -> None:
        """demos: observations are standardised by their statistics; a checkpoint brings its own."""
        torch.manual_seed(args.run.seed)
        p, c, dim = args.policy, args.critic, args.policy.chunk * act_dim
        mean, std = demos.statistics() if demos else (torch.zeros(obs_dim), torch.ones(obs_dim))
        std = std + 1e-2  # keeps nearly constant entries from exploding
        self.actor = TanhGaussian(0, dim, p.actor_hidden, 0.0, mean, std).to(device)  # nearly uniform at first
        self.temperature = nn.ParameterDict({"log": torch.tensor(math.log(args.actor.alpha))}).to(device)
        self.critic = CriticEnsemble(dim, c, mean, std).to(device)
        # The value of never succeeding [deviation: released critics start near 0, above every value of a poor policy].
        nn.init.constant_(self.critic.biases[-1], c.reward_offset / max(1 - c.gamma, 1e-3) / c.critic_scale)
        self.critic_ema = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_opt = adam(self.actor.parameters(), args.actor.actor_lr, device)
        self.temperature_opt = adam(self.temperature.parameters(), args.actor.alpha_lr, device)
        self.critic_opt = adam(self.critic.parameters(), c.critic_lr, device)
        self.rng = Rng(args.run.seed, device)  # of training; evaluation has its own
        self.updates = 0  # online updates so far


@torch.no_grad()
def act_mean(agent: Agent, args: Args, obs: Tensor, rng: Rng) -> Tensor:
    """The noise-free policy, tanh of its mean; it draws nothing from rng. obs (n, O) -> chunks (n, H, A)."""
    return agent.actor(obs)[0].tanh().unflatten(1, (args.policy.chunk, -1))


def draw_actions(agent: Agent, obs: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """A chunk of the policy at each obs (n, O): action (n, D) and its log_prob (n,)."""
    mean, log_std = agent.actor(obs)
    return squash(mean, log_std, rng.randn(*mean.shape))


@torch.no_grad()
def act_best_of_n(agent: Agent, args: Args, obs: Tensor, rng: Rng) -> Tensor:
    """The acting policy, with several candidates the target critics' choice: obs (B, O) -> chunks (B, H, A)."""
    n = args.policy.best_of_n
    rows = obs.repeat_interleave(n, 0)  # (B N, O)
    action, _ = draw_actions(agent, rows, rng)  # (B N, D)
    if n > 1:
        q = agent.critic_ema(rows, action).unflatten(1, (-1, n))  # (M, B, N)
        action = action.unflatten(0, (-1, n))[torch.arange(len(obs), device=obs.device), best_of_n(q, q, 0)]
    return action.unflatten(1, (args.policy.chunk, -1))


@torch.no_grad()
def update_ema(target: nn.Module, source: nn.Module, rate: float) -> None:
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


def update_actor(agent: Agent, obs: Tensor, args: Args) -> Info:
    """One step of the policy along the critics at obs (n, O), and of alpha towards the wanted entropy [B 8]."""
    action, log_prob = draw_actions(agent, obs, agent.rng)  # (n, D), (n,)
    log_alpha, target = agent.temperature["log"], action.shape[1] * args.actor.target_entropy
    loss = policy_loss(agent.critic(obs, action), log_prob, log_alpha)
    agent.actor_opt.zero_grad()
    loss.backward(inputs=list(agent.actor.parameters()))
    grad = nn.utils.clip_grad_norm_(agent.actor.parameters(), math.inf)  # measured, not clipped
    agent.actor_opt.step()
    agent.temperature_opt.zero_grad()
    temperature_loss(log_alpha, log_prob, target).backward()
    agent.temperature_opt.step()
    gap = -log_prob.detach().mean() - target
    return {"actor_loss": loss.detach(), "actor_grad": grad, "alpha": log_alpha.detach().exp(), "entropy_gap": gap}


def update_critic(agent: Agent, batch: Batch, args: Args) -> Info:
    """One critic step [S 1.7]: at the next state a chunk of the policy, valued by the target heads' mean [C]."""
    c, action = args.critic, batch.actions.flatten(1)  # (n, D)
    with torch.no_grad():
        next_action, log_prob = draw_actions(agent, batch.next_obs, agent.rng)  # (n, D), (n,)
        q_next = agent.critic_ema(batch.next_obs, next_action)  # (M, n)
        if c.backup_entropy:
            q_next = q_next - agent.temperature["log"].exp() * log_prob
        target = td_target(batch.rewards, batch.steps, batch.terminated, q_next, c.gamma)  # (n,)
    loss, info = critic_loss(agent.critic, batch.obs, action, target)
    agent.critic_opt.zero_grad()
    loss.backward()
    info |= {"td_loss": loss, "critic_grad": nn.utils.clip_grad_norm_(agent.critic.parameters(), math.inf)}
    agent.critic_opt.step()
    update_ema(agent.critic_ema, agent.critic, c.critic_ema)
    return {name: value.detach() for name, value in info.items()}


def sample_both(
    buffer: ReplayBuffer, taught: ReplayBuffer | None, args: Args, rng: np.random.Generator, device: torch.device
) -> Batch:
    """A batch of which demo_share are demonstrations, first in it [RLPD]."""
    n, chunks = args.critic.critic_batch, args.critic.n_step
    share = round(n * args.actor.demo_share) if taught else 0
    counts = [(source, count) for source, count in ((taught, share), (buffer, n - share)) if count]
    parts = [vars(source.sample(count, rng, device, chunks=chunks)) for source, count in counts]
    join = {k: np.concatenate if k == "rows" else torch.cat for k in parts[0]}
    return Batch(**{k: join[k]([part[k] for part in parts]) for k in join})


def update(
    agent: Agent, buffer: ReplayBuffer, taught: ReplayBuffer | None, args: Args, rng: np.random.Generator
) -> Info:
    """Critics first, then policy and temperature, on the same batch; nothing waits [RLPD]."""
    batch = sample_both(buffer, taught, args, rng, agent.rng.device)
    info = update_critic(agent, batch, args) | update_actor(agent, batch.obs, args)
    agent.updates += 1
    return info


def read_demos(demos: Demos, args: Args, obs_dim: int, act_dim: int) -> ReplayBuffer:
    """The demonstrations as replay, with the rewards of an episode that ends in success."""
    c, h = args.critic, args.policy.chunk
    taught = ReplayBuffer(len(demos.obs) + len(demos.ends) * (h + 1), obs_dim, act_dim, h)
    for obs, actions in demos.episodes():
        rewards = np.full(len(actions), c.reward_offset)
        rewards[-1] += 1 + c.success_bonus  # success is the only reward
        taught.add_episode(obs, actions, rewards, terminated=True, success=True)
    return taught


def train(run: Run, agent: Agent, buffer: ReplayBuffer, taught: ReplayBuffer | None, args: Args) -> None:
    """Collect with the acting policy into a buffer that starts empty; update; log, evaluate and save when due."""
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
                averages.add(update(agent, buffer, taught, args, rng))
        run.show_progress(episodes)
        if due(before, run.step, r.log_every):
            run.log_training(averages.take(), episodes)
        if due(before, run.step, t.eval_every):
            run.begin_evaluation("interval", t.eval_interval_episodes, f"step {run.step}", log="eval")
        if due(before, run.step, r.checkpoint_every):
            run.save()


def main(argv: list[str]) -> None:
    args, saved, folder = start(
        argv, default_args, chosen_by=("env", "preset"), weights=(TanhGaussian, CriticEnsemble),
        folder_name="{env}__rlpd__s{seed}", fixed=settings.FIXED, check=check,
    )  # fmt: skip
    r, t, device = args.run, args.task, pick_device(args.run.device, args.run.threads)
    with checkpoint.StopSignal() as stop, Run(folder, saved, stop, cli.flatten(args), r.env, t.horizon, device) as run:
        run.open_evaluation(t.eval_envs, args.policy.chunk)
        if not r.eval:
            buffer = ReplayBuffer(r.replay_size, run.obs_dim, run.act_dim, args.policy.chunk)
            run.check_disk(min(r.replay_size, 2 * r.total_steps) * buffer.row_bytes)  # an episode of one step has two
        demos = None
        if not r.eval and args.actor.demo_share > 0:
            demos = run.get_demos(t.demos, t.num_demos, t.demo_noise, Path(t.data_dir), t.filter_key)
        agent = Agent(args, run.obs_dim, run.act_dim, device, demos)
        run.track(agent=agent)
        if r.compile:
            accelerate(globals(), COMPILED, RECORDED, agent.rng.generator)
        run.policies = {"ode": partial(act_mean, agent, args), "act": partial(act_best_of_n, agent, args)}
        if not r.eval:
            run.open_log(r.total_steps, r.wandb_project, r.tensorboard)
            taught = read_demos(demos, args, run.obs_dim, run.act_dim) if demos else None
            train(run, agent, buffer, taught, args)
            run.save()
            run.record_video("act", "after.mp4", r.video)
        run.evaluate("final", t.eval_episodes, "final", log="" if r.eval else "final")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
