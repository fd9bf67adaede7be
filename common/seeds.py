"""Seeds of episodes. Demonstrations, training and each kind of evaluation have ranges of their own in 32 bits.

Evaluations lie below 2^29, in blocks that take turns, training from there to 2^31, demonstrations above.
"""

TRAIN, DEMOS = 2**29, 2**31  # first seeds of training and of demonstrations
USES = ("final", "bc", "interval")  # kinds of evaluations: the final episodes never decided anything
BLOCK = 100_000
PERIOD = TRAIN // (len(USES) * BLOCK) * BLOCK  # episodes of one kind
ENV = 1_000_000  # seeds of one environment before its neighbour's


def eval_seeds(use: str, episodes: int) -> list[int]:
    """Of the first episodes of one of the USES; they repeat after PERIOD."""
    turn = USES.index(use)
    at = (i % PERIOD for i in range(episodes))
    return [(i // BLOCK * len(USES) + turn) * BLOCK + i % BLOCK for i in at]


def train_seed(seed: int, env: int, episode: int) -> int:
    """Of an episode of one environment of the run with this --seed."""
    return TRAIN + (seed * 1_000 * ENV % DEMOS + env * ENV + episode - TRAIN) % (DEMOS - TRAIN)


def demo_seed(seed: int, attempt: int) -> int:
    """Of an attempt at a demonstration."""
    return DEMOS + (BLOCK * seed + attempt) % DEMOS
