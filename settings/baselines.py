"""Settings of the baselines by preset and task, as data: what differs from OGPO's, in the form of settings/ogpo.py.

A baseline takes OGPO's row of a task (environment, cloning, sizes, critics, schedule: what is equal for all), then its
own row here, with the few values that belong to its method.
"""

from settings.ogpo import ALL_HANDS

Table = dict[tuple[str, str], dict]

QC: Table = {("*", "*"): dict(actor_lr=3e-4)}  # the authors' on every task
DSRL: Table = {("*", "*"): dict(best_of_n=1, actor_lr=3e-4)}  # the authors' on every task
EXPO: Table = {("*", "*"): dict(best_of_n=8, actor_lr=3e-4)}  # the authors' on every task
RESIDUAL: Table = {  # the decorator
    ("*", "*"): dict(best_of_n=1, states=256, group=1, actor_lr=3e-4),
    ("*", "toy"): dict(states=128, scale=0.3),
}
RESIDUAL_DICE: Table = {
    ("*", "*"): dict(method="dice", best_of_n=8, states=64, group=8, next_samples=2, actor_lr=3e-4, ramp=0.0),
    ("paper", "*"): dict(best_of_n=16, states=256, group=16, next_samples=4),
    ("*", "toy"): dict(bc_weight=3.0),
}
DPPO: Table = {  # rates, least noise and, under `paper`, sizes of the authors; the steps that an on-policy method needs
    ("*", "*"): dict(
        eta=1.0, noise_std=0.2, num_envs=20, rollout=50, minibatch=250, actor_lr=1e-4, critic_lr=1e-3,
        critic_scale=10.0, log_every=4_000, eval_every=40_000, checkpoint_every=100_000, total_steps=1_000_000,
    ),
    ("paper", "*"): dict(
        noise_std=0.3, num_envs=50, rollout=300, minibatch=750, eval_every=600_000, checkpoint_every=600_000,
        total_steps=5_000_000,
    ),
    **{("paper", name): dict(noise_std=0.2) for name in ALL_HANDS},  # K = 3
    ("paper", "can"): dict(total_steps=9_000_000),
    ("paper", "square"): dict(rollout=400, minibatch=1_000, total_steps=16_000_000),
    ("paper", "transport"): dict(rollout=400, minibatch=1_000, epochs=5, total_steps=32_000_000),
    ("laptop", "toy"): dict(  # a chunk of 8 numbers: ranges of the ratio, a mean over them, as wide in all as on Lift
        num_envs=10, rollout=30, minibatch=100, clip=0.04, clip_first=0.004, actor_lr=3e-4, log_every=2_000,
        eval_every=20_000, total_steps=100_000,
    ),
}  # fmt: skip
QAM: Table = {("*", "*"): dict(best_of_n=1, actor_lr=3e-4)}  # the authors' on every task
QF3: Table = {  # the authors' on Square and ToolHang; 20k and 100k steps of the critics alone
    ("*", "*"): dict(bc_coef=100.0),
    ("*", "transport"): dict(velocity_clip=0.02),
    ("paper", "*"): dict(critic_warmup=20_000),
    ("paper", "transport"): dict(critic_warmup=100_000),
}
RLPD: Table = {  # without demonstrations where success is not the only reward: they do not have the others
    ("*", "*"): dict(best_of_n=1, actor_lr=3e-4),
    **{("*", task): dict(demo_share=0.0) for task in ("kitchen-*", "*-raw", "*-dense")},
}
