"""What the study compares, as data: its configurations, the figures that show them, and the claims it judges."""

from dataclasses import dataclass

SEEDS = (1, 2, 3)
STEPS = {"lift": 12_000, "can": 20_000, "peg-insert-side": 12_000}
EVERY = {"lift": 2_000, "can": 4_000, "peg-insert-side": 2_000}  # steps between evaluations


@dataclass(frozen=True)
class Config:
    """One line of a table: its title, its flags, and the script if that is not ogpo_state.py."""

    title: str
    flags: tuple[str, ...] = ()
    script: str = "ogpo_state.py"


EARLIER = "\N{DAGGER}"  # behind the title: the stored runs predate a correction of the method (docs/log.md, 2026-11-29)


EXTRACTION, CRITIC, REFERENCE, RELEASED, DIFFUSION = (
    f"variants/ogpo_{name}.py" for name in ("extraction", "critic", "reference", "released", "diffusion")
)

# What all runs have, whatever the scripts' defaults become; a configuration's own flags come later and win.
_SETTINGS = (
    *("--critic-scale", "1", "--actor-lr-warmup", "0", "--n-step", "1", "--calql-steps", "0", "--critic-warmup", "250"),
    *("--critic-successes", "10", "--start-training", "2000", "--update-every", "4"),
)
_LIFT = (
    *("--bc-stop-success", "0.5", "--bc-lr", "3e-4", "--bc-steps", "20000", "--bc-eval-every", "100"),
    *("--bc-eval-episodes", "32", "--collect-horizon", "150"),
)
_FLOW = ("--eta", "0")


def settings(task: str, script: str) -> tuple[str, ...]:
    """Flags of the settings that all runs of a task and a script share."""
    return (*_SETTINGS, *(_FLOW if script != DIFFUSION else ()), *(_LIFT if task == "lift" else ()))


# Habits of the released code on our settings, all others off: critics from around 0 that act, and an actor that moves,
# from the first update on, with replay cloning until there are successes; a second critic step on successes.
CORRECTED = (
    *("--normalize-obs", "--score-correction", "matched", "--clip-mean", "last", "--no-clip-chain-end"),
    *("--critic-weight-decay", "0", "--success-min", "64", "--distinct-heads", "--no-target-before-actor"),
    *("--bc-stop-policy", "ode", "--no-ema-lag"),
)
_START = (
    *(*CORRECTED, "--critic-warmup", "0", "--critic-successes", "0"),
    *("--no-pessimistic-init", "--bc-fallback", "--no-success-critic"),
)
_SUCCESS_CRITIC = (
    *(*CORRECTED, "--critic-warmup", "250", "--critic-successes", "10"),
    *("--pessimistic-init", "--no-bc-fallback", "--success-critic"),
)
RELEASED_START: dict[str, Config] = {
    "success_critic": Config("OGPO+CA, success critic step", _SUCCESS_CRITIC, RELEASED),
    "start+ca": Config("OGPO+CA, released start", _START, RELEASED),
    "start+": Config("OGPO+, released start", ("--variant", "ogpo+", *_START), RELEASED),
}

CONFIGS: dict[str, Config] = {
    "ogpo+ca": Config("OGPO+CA"),
    "ogpo+": Config("OGPO+", ("--variant", "ogpo+")),
    "ogpo": Config("OGPO", ("--variant", "ogpo")),
    "ogpo_sb": Config("OGPO, success buffer", ("--variant", "ogpo", "--bc-coef", "1")),
    "ogpo_bon": Config("OGPO, best-of-N", ("--variant", "ogpo", "--best-of-n", "8")),
    "no_sb": Config("OGPO+CA - success buffer", ("--bc-coef", "0")),
    "no_bon": Config("OGPO+CA - best-of-N", ("--best-of-n", "1")),
    "grpo": Config(
        f"OGPO, GRPO std{EARLIER}", ("--variant", "ogpo", "--extraction", "ogpo", "--advantage", "grpo"), EXTRACTION
    ),
    "grpo+": Config(
        f"OGPO+, GRPO std{EARLIER}", ("--variant", "ogpo+", "--extraction", "ogpo", "--advantage", "grpo"), EXTRACTION
    ),
    "penultimate": Config(
        "OGPO+, penultimate", ("--variant", "ogpo+", "--extraction", "ogpo", "--advantage", "penultimate"), EXTRACTION
    ),
    "positive": Config(
        "OGPO+, no negatives", ("--variant", "ogpo+", "--extraction", "ogpo", "--advantage", "positive"), EXTRACTION
    ),
    "qvr_mean": Config("OGPO+CA, Q-VR mean of 8", ("--next-samples", "8")),
    "qvr_median": Config(
        "OGPO+CA, Q-VR median", ("--calql-steps", "0", "--next-samples", "8", "--next-reduce", "median"), CRITIC
    ),
    "qvr_trimmed": Config(
        "OGPO+CA, Q-VR trimmed", ("--calql-steps", "0", "--next-samples", "8", "--next-reduce", "trimmed"), CRITIC
    ),
    **RELEASED_START,
    "wsrl": Config(
        "OGPO+CA, WSRL warm-up",
        ("--start-training", "4000", "--critic-warmup", "1000", "--critic-successes", "0"),
    ),
    "lr_warmup": Config(
        "OGPO+CA, learning-rate warm-up",
        ("--actor-lr-min", "0", "--actor-lr-warmup", "100", "--actor-lr-period", "1000000"),
    ),
    "calql": Config(
        "OGPO+CA, Cal-QL start",
        ("--calql-steps", "2000", "--critic-warmup", "0", "--critic-successes", "0"),
        CRITIC,
    ),
    "mc": Config("OGPO+CA, MC regression", ("--calql-steps", "0", "--mc-coef", "1"), CRITIC),
    "chi2": Config(f"OGPO+, chi-square{EARLIER}", ("--variant", "ogpo+"), REFERENCE),
    "kl": Config(f"OGPO+, reverse KL{EARLIER}", ("--variant", "ogpo+", "--regularize", "kl"), REFERENCE),
    "forward_kl": Config("OGPO+CA, forward KL", ("--regularize", "none", "--forward-kl", "0.1"), REFERENCE),
    "bptt": Config("BPTT", ("--extraction", "bptt", "--group", "4"), EXTRACTION),
    "awr_fm": Config("AWR-FM", ("--extraction", "awr_fm", "--advantage", "vanilla"), EXTRACTION),
    "aw_ogpo": Config("AW-OGPO", ("--extraction", "aw_ogpo", "--advantage", "vanilla"), EXTRACTION),
    "aw_ogpo_nn": Config(  # named when this was thought to be the paper's "no negatives", which is aw_ogpo_nn now
        "AW-OGPO, asymmetric", ("--extraction", "aw_ogpo_asymmetric", "--advantage", "vanilla"), EXTRACTION
    ),
    "ofpo": Config("OFPO", ("--extraction", "ofpo", "--advantage", "vanilla"), EXTRACTION),
    "ofpo++": Config("OFPO++", ("--extraction", "ofpo++", "--advantage", "vanilla"), EXTRACTION),
    # cloned with the flow's learning rate it swings, and two of three seeds stopped at a policy of 0.03 and 0.09
    "diffusion": Config("OGPO+CA, diffusion", ("--bc-lr", "1e-4"), DIFFUSION),
}
ALONE = ("diffusion",)  # its network predicts something else: it clones for itself


@dataclass(frozen=True)
class Panel:
    """A question, and the configurations whose curves answer it."""

    question: str
    configs: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """Configurations that are trained and tabulated together, on each of some tasks, and the panels that show them."""

    tasks: tuple[str, ...]
    configs: tuple[str, ...]
    panels: tuple[Panel, ...]


FIGURES: dict[str, Figure] = {
    "stabilizers": Figure(
        ("lift",),
        (
            *("ogpo", "ogpo_sb", "ogpo_bon", "ogpo+", "ogpo+ca", "no_sb", "no_bon", "success_critic", "grpo"),
            *("grpo+", "penultimate", "positive", "qvr_mean", "qvr_median", "qvr_trimmed"),
        ),
        (
            Panel("Cloning from the success buffer?", ("ogpo", "ogpo_sb", "no_sb", "ogpo+ca")),
            Panel("Best-of-N while acting?", ("ogpo", "ogpo_bon", "no_bon", "ogpo+ca")),
            Panel("Which chains count?", ("ogpo+", "ogpo+ca", "penultimate", "positive")),
            Panel("Division by the group's std?", ("ogpo", "grpo", "ogpo+", "grpo+")),
            Panel("Several next actions (Q-VR)?", ("ogpo+ca", "qvr_mean", "qvr_median", "qvr_trimmed")),
            Panel("A critic step on successes?", ("ogpo+ca", "success_critic")),
        ),
    ),
    "start": Figure(
        ("lift",),
        ("ogpo+", "ogpo+ca", "start+", "start+ca", "lr_warmup", "wsrl", "calql", "mc"),
        (
            Panel("Our start, or the released one?", ("ogpo+", "start+", "ogpo+ca", "start+ca")),
            Panel("A warm-up?", ("ogpo+ca", "lr_warmup", "wsrl")),
            Panel("Critics that know returns?", ("ogpo+ca", "calql", "mc")),
        ),
    ),
    "reference": Figure(
        ("lift",),
        ("ogpo+", "ogpo+ca", "chi2", "kl", "forward_kl"),
        (
            Panel("The gate, or pessimism off the reference?", ("ogpo+", "ogpo+ca", "chi2", "kl")),
            Panel("Forward KL to the reference?", ("ogpo+ca", "forward_kl")),
        ),
    ),
    "extraction": Figure(
        ("lift",),
        ("ogpo+", "ogpo+ca", "bptt", "awr_fm", "aw_ogpo", "aw_ogpo_nn", "ofpo", "ofpo++"),
        (
            Panel("The gradient of Q through the chain?", ("ogpo+ca", "bptt")),
            Panel("Weighted regression?", ("ogpo+", "awr_fm", "aw_ogpo", "aw_ogpo_nn")),
            Panel("PPO on the flow-matching loss?", ("ogpo+", "ofpo", "ofpo++")),
        ),
    ),
    "tasks": Figure(
        ("can", "peg-insert-side"),
        ("ogpo", "ogpo+", "ogpo+ca", "no_sb", "no_bon", "grpo+", "bptt"),
        (
            Panel("Which method?", ("ogpo", "ogpo+", "ogpo+ca", "bptt")),
            Panel("What does OGPO+CA need?", ("ogpo+ca", "no_sb", "no_bon")),
            Panel("Division by the group's std?", ("ogpo+", "grpo+")),
        ),
    ),
    "diffusion": Figure(
        ("lift", "can"), ("ogpo+ca", "diffusion"), (Panel("Flow or diffusion?", ("ogpo+ca", "diffusion")),)
    ),
}


@dataclass(frozen=True)
class Claim:
    """`first` has more (sign 1), less (-1) or as much (0) of a measure than `second` has of it, or of `other`."""

    text: str
    first: str
    second: str
    measure: str
    sign: int
    other: str = ""


SAME = 0.1  # two success rates agree if the whole interval of their difference is within this
CLAIMS: tuple[Claim, ...] = (
    Claim("a dip without the gate, released start", "start+", "start+", "early", -1, "before"),
    Claim("the gate lessens the dip, released start", "start+ca", "start+", "early", 1),
    Claim("the gate lessens the dip, our start", "ogpo+ca", "ogpo+", "early", 1),
    Claim("our start lessens the dip, without the gate", "ogpo+", "start+", "early", 1),
    Claim("our start lessens the dip, with the gate", "ogpo+ca", "start+ca", "early", 1),
    Claim("a learning-rate warm-up lessens the dip", "lr_warmup", "ogpo+ca", "early", 1),
    Claim("the success buffer decides, in OGPO+CA", "ogpo+ca", "no_sb", "final", 1),
    Claim("the success buffer decides, in OGPO", "ogpo_sb", "ogpo", "final", 1),
    Claim("best-of-N decides, in OGPO+CA", "ogpo+ca", "no_bon", "final", 1),
    Claim("best-of-N decides, in OGPO", "ogpo_bon", "ogpo", "final", 1),
    Claim("best-of-N alone swings more than with the success buffer", "ogpo_bon", "ogpo+", "fall", 1),
    Claim("division by the group's std hurts OGPO", "grpo", "ogpo", "final", -1),
    Claim("division by the group's std hurts OGPO+", "grpo+", "ogpo+", "final", -1),
    Claim("BPTT falls below its cloned policy", "bptt", "bptt", "final", -1, "cloned"),
    Claim("BPTT ends below OGPO+CA", "bptt", "ogpo+ca", "final", -1),
    Claim("chains without advantage hurt nothing (OGPO+ without negatives)", "positive", "ogpo+", "final", 0),
    Claim("AW-OGPO ends below OGPO+", "aw_ogpo", "ogpo+", "final", -1),
    Claim("AW-OGPO, asymmetric, ends as high as OGPO+", "aw_ogpo_nn", "ogpo+", "final", 0),
    Claim("AWR-FM ends below OGPO+", "awr_fm", "ogpo+", "final", -1),
    Claim("OFPO++ ends as high as OGPO+", "ofpo++", "ogpo+", "final", 0),
    Claim("chi-square pessimism does as well as the gate", "chi2", "ogpo+ca", "final", 0),
    Claim("reverse KL does worse than chi-square", "kl", "chi2", "final", -1),
    Claim("a mean of 8 targets does better than one", "qvr_mean", "ogpo+ca", "area", 1),
    Claim("flow and diffusion agree", "diffusion", "ogpo+ca", "final", 0),
)
