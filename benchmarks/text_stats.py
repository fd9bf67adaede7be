"""Statistics of samples for text_peers.py: simple models to beat, the law of the toy language, errors and intervals."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.judge.frontier import perplexity_at
from common.judge.metrics import Judge, unigram_entropy
from common.judge.ngram import words
from common.text import toy_probabilities
from common.text.toy import WORDS
from runs import Run

DRAWS = 200  # of the bootstrap


def seconds_a_step(run: Run) -> float:
    """Median over the lines of the log: without evaluations and what else a machine does now and then."""
    return run.args["batch"] * run.args["length"] / float(np.median(run.series("time/tokens_per_second")[1]))


def ngram_nats(train: NDArray[Any], held_out: NDArray[Any], vocab: int) -> dict[str, float]:
    """-log p per token of held-out rows (m, L), in nats, by two models of the training rows (n, L).

    Unigram: counts plus one. Bigram: Witten-Bell, p(y | x) = (c(x y) + k(x) p(y)) / (c(x) + k(x)) with k(x) different
    tokens seen behind x; every row has a start before its first token.
    """
    counts = np.bincount(train.ravel(), minlength=vocab) + 1
    p = counts / counts.sum()

    def pairs(rows: NDArray[Any]) -> NDArray[np.int64]:
        before = np.pad(rows.astype(np.int64), ((0, 0), (1, 0)), constant_values=vocab)[:, :-1]
        return (before * vocab + rows).ravel()

    seen, times = np.unique(pairs(train), return_counts=True)
    total, kinds = np.bincount(seen // vocab, times, vocab + 1), np.bincount(seen // vocab, minlength=vocab + 1)
    wanted = pairs(held_out)
    x, at = wanted // vocab, np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)
    count, alone = np.where(seen[at] == wanted, times[at], 0), p[wanted % vocab]
    together = np.where(total[x] > 0, (count + kinds[x] * alone) / np.maximum(total[x] + kinds[x], 1), alone)
    return {"unigram": float(-np.log(alone).mean()), "bigram": float(-np.log(together).mean())}


def language(texts: Sequence[str]) -> dict[str, float]:
    """Of toy texts: total variation distance from the language, share of its sentences, KL of their law from its own.

    The full stop at the end is no part of a text; one in the middle parts it into lines, which no sentence has.
    """
    law = {" ".join(WORDS[i] for i in ids[:-1]): p for ids, p in toy_probabilities().items()}
    counts = Counter(text for text in texts if text in law)
    n, valid = len(texts), counts.total()
    distance = 0.5 * (sum(abs(counts[s] / n - p) for s, p in law.items()) + 1 - valid / n)
    kl = sum(c / valid * math.log(c / valid / law[s]) for s, c in counts.items())
    return {"distance": distance, "valid": valid / n, "kl": kl}


def perfect_distances(samples: int) -> NDArray[np.float64]:
    """(2000,) distances of as many draws from the toy language itself: what chance makes of them."""
    p = np.array(list(toy_probabilities().values()))
    return 0.5 * abs(np.random.default_rng(0).multinomial(samples, p, size=2_000) / samples - p).sum(1)


def sampling_error(texts: Sequence[str], tokens: Sequence[Sequence[int]], judge: Judge) -> list[list[float]]:
    """Covariance (2, 2) of the mean entropy and of the log perplexity of n texts, from their spread.

    Log perplexity is a ratio of means, nats over words, whose error is that of (nats - log P words) / mean of words.
    """
    count = np.array([len(words(text)) for text in texts])
    nats = count * np.log([judge.perplexity([text], 10**9) if k else 1.0 for text, k in zip(texts, count, strict=True)])
    error = (nats - count * nats.sum() / count.sum()) / count.mean()
    return (np.cov([unigram_entropy([row]) for row in tokens], error) / len(texts)).tolist()


class Value(NamedTuple):
    """One number of a method at some calls: over the seeds, with an interval."""

    mean: float
    low: float
    high: float
    each: tuple[float, ...]  # by seed
    mark: str = ""  # of `perplexity_at`, where an end of the frontier stands for at least one seed


def at_entropy(seeds: Sequence[Sequence[dict[str, Any]]], entropy: float) -> Value | None:
    """Perplexity at this entropy on each seed's own frontier, geometric mean and 95 % interval; None without points.

    The interval draws seeds anew, and every point by its sampling error, where that is known.
    """
    rng, each, drawn = np.random.default_rng(0), [], []
    for rows in seeds:
        rows = [row for row in rows if math.isfinite(row["perplexity"])]
        if not rows:
            return None
        points = np.array([(row["entropy"], math.log(row["perplexity"])) for row in rows])  # (points, 2)
        covariance = np.array([row.get("error", np.zeros((2, 2))) for row in rows]) + 1e-12 * np.eye(2)
        noise = rng.standard_normal((DRAWS, len(rows), 1, 2)) @ np.linalg.cholesky(covariance).mT
        each.append(perplexity_at(zip(points[:, 0], np.exp(points[:, 1]), strict=True), entropy))
        h, log_p = np.moveaxis(points + noise[:, :, 0], -1, 0)  # (DRAWS, points) each
        drawn.append([perplexity_at(zip(*one, strict=True), entropy)[0] for one in zip(h, np.exp(log_p), strict=True)])
    chosen = rng.integers(len(each), size=(DRAWS, len(each)))
    means = np.log(drawn)[chosen, np.arange(DRAWS)[:, None]].mean(1)
    low, high = np.exp(np.quantile(means, (0.025, 0.975))).tolist()
    values, marks = zip(*each, strict=True)
    return Value(math.exp(np.log(values).mean()), low, high, values, "".join(sorted(set(marks))))
