"""A toy language with a known distribution: 64 sentences of eight words such as "some old dogs near the house run ."

Number is agreed on by determiner, noun and verb, up to six words apart, so a sampler that draws words independently
writes sentences of probability zero. The verb also depends on the animal and the place on the adjective.
"""

import hashlib
from itertools import product

import numpy as np
from numpy.typing import NDArray

from common.text.tokenizers import Tokenizer

LENGTH = 8
DETERMINERS = ("one", "some")
ADJECTIVES = ("old", "small")
NOUNS = (("cat", "cats"), ("dog", "dogs"))  # singular, plural
PREPOSITIONS = ("near", "behind")
PLACES = ("house", "tree")
VERBS = (("sleeps", "sleep"), ("runs", "run"))
WORDS = (*DETERMINERS, *ADJECTIVES, *NOUNS[0], *NOUNS[1], *PREPOSITIONS, "the", *PLACES, *VERBS[0], *VERBS[1], ".")


def toy_probabilities() -> dict[tuple[int, ...], float]:
    """{sentence as eight ids: probability} of all 64 sentences; they sum to 1."""
    table = {}
    for plural, small, dog, behind, tree, run in product((0, 1), repeat=6):
        words = (
            *(DETERMINERS[plural], ADJECTIVES[small], NOUNS[dog][plural], PREPOSITIONS[behind], "the"),
            *(PLACES[tree], VERBS[run][plural], "."),
        )
        p_tree, p_run = (0.25, 0.6)[small], (0.2, 0.75)[dog]
        chances = ((0.4, plural), (0.3, small), (0.45, dog), (0.35, behind), (p_tree, tree), (p_run, run))
        table[tuple(map(WORDS.index, words))] = float(np.prod([p if yes else 1 - p for p, yes in chances]))
    return table


def toy_rows(n: int, seed: int) -> NDArray[np.uint16]:
    """(n, 8) independent sentences, read-only; a function of n and seed."""
    table = toy_probabilities()
    rows = np.array(list(table), np.uint16)[np.random.default_rng(seed).choice(len(table), n, p=list(table.values()))]
    rows.flags.writeable = False
    return rows


def toy_tokenizer() -> Tokenizer:
    """Words are tokens, V = 18. The full stop is the separator; it ends every row but does not begin one."""
    return Tokenizer(
        name="toy",
        vocab_size=len(WORDS),
        separator=WORDS.index("."),
        sha256=hashlib.sha256(" ".join(WORDS).encode()).hexdigest(),
        encode_batch=lambda texts: [[WORDS.index(word) for word in text.split()] for text in texts],
        literal=lambda ids: " ".join(WORDS[i] for i in ids),
    )
