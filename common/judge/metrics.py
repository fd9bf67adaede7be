"""Numbers about generated text that a perplexity hides, and the table that prints them together.

Rows are lists of tokens: ids of the evaluated model, (S, L) arrays or lists of any length, or words.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Rows = Sequence[Sequence[Hashable]] | NDArray[Any]
Gram = tuple[Hashable, ...]
COPY_LENGTH = 8
REAL = "real text"


class Judge(Protocol):
    """A language model that scores texts."""

    name: str
    unit: str  # what its perplexity is per, such as "word"; perplexities of different units do not compare

    def perplexity(self, texts: list[str], max_length: int) -> float:
        """exp(negative log likelihood per unit) of all texts, each cut to its first `max_length` units; NaN of none."""


@dataclass(frozen=True)
class TextScore:
    """One line of the table."""

    text: str  # what was scored, such as "4 steps"
    judge: str
    unit: str
    perplexity: float  # per unit of the judge
    entropy: float  # nats
    self_bleu: float  # in [0, 1]
    distances: tuple[float, ...]  # bits in [0, 1], for n = 1, 2, 3
    copied: float  # share in [0, 1]
    samples: int


def score_texts(
    text: str, rows: Rows, texts: list[str], judge: Judge, *, reference_rows: Rows, train_rows: Rows
) -> TextScore:
    """All numbers of one set of samples, in a line named `text`.

    Args:
        rows: samples as tokens of the evaluated model, all of its length (S, L).
        texts: the same samples as text (S), for the judge, which reads at most L of its units of each.
        reference_rows: held-out rows that are not themselves scored; see `split_real`.
        train_rows: the training rows, for `copied_fraction`.
    """
    return TextScore(
        text=text,
        judge=judge.name,
        unit=judge.unit,
        perplexity=judge.perplexity(texts, max_length=max(map(len, rows))),
        entropy=unigram_entropy(rows),
        self_bleu=self_bleu(rows),
        distances=tuple(ngram_distance(rows, reference_rows, n) for n in (1, 2, 3)),
        copied=copied_fraction(rows, train_rows),
        samples=len(rows),
    )


def split_real(rows: NDArray[Any], samples: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two disjoint random sets of held-out rows: one to score as the line "real text", one as the reference.

    Both have `samples` rows, or half of what there is; always the same. Scored like samples, the first set shows what
    every number would be for perfect samples: its distance from the second is the floor.
    """
    order = np.random.default_rng(0).permutation(len(rows))
    size = min(samples, len(rows) // 2)
    return rows[np.sort(order[:size])], rows[np.sort(order[size : 2 * size])]


def unigram_entropy(rows: Rows) -> float:
    """Entropy in nats of the token frequencies within one row, averaged over rows.

    A row of L different tokens has log L, a row of one repeated token 0.
    """
    shares = (np.array(list(Counter(row).values())) / len(row) for row in _lists(rows))
    return float(np.mean([-(share * np.log(share)).sum() for share in shares]))


def self_bleu(rows: Rows, n: int = 4) -> float:
    """Mean BLEU-n in [0, 1] of each row against all others: near 1 if the samples resemble each other.

    BLEU of Papineni et al. (2002) as Texygen (arXiv 1802.01886) uses it: geometric mean over k = 1 to n of the
    share of k-grams that another row has, each counted at most as often as in the one row that has most of it;
    times exp(1 - r / c) if the row is shorter (c) than the row closest to it in length (r, the shorter of two).
    A k without any match counts as 0.1 matches, but without a common token BLEU is 0 ("method 1" of Chen and
    Cherry, 2014). Every row is compared with every other, nothing is drawn. The value grows with the number of
    rows: compare equal numbers. NaN for a single row.
    """
    tokens = list(_lists(rows))
    if len(tokens) < 2:
        return math.nan
    log_precision, brevity = np.zeros((2, len(tokens)))
    for k in range(1, n + 1):
        counts = [Counter(_grams(row, k)) for row in tokens]
        top: dict[Gram, int] = defaultdict(int)  # largest count of a k-gram in any row
        second: dict[Gram, int] = defaultdict(int)  # in any row but that one: what two rows may share
        for count in counts:
            for gram, m in count.items():
                second[gram] = max(second[gram], min(top[gram], m))
                top[gram] = max(top[gram], m)
        for i, count in enumerate(counts):
            log_precision[i] += _log_precision(count, second, k)
    lengths = Counter(map(len, tokens))
    for i, c in enumerate(map(len, tokens)):
        r = c if lengths[c] > 1 else min(lengths.keys() - {c}, key=lambda other: (abs(other - c), other))
        brevity[i] = min(0.0, 1 - r / c)
    return float(np.mean(np.exp(log_precision / n + brevity)))


def bleu(rows: Rows, references: Rows, n: int = 4) -> float:
    """Mean BLEU-n in [0, 1] of each row against all references at once; as in `self_bleu`."""
    tokens, others = list(_lists(rows)), list(_lists(references))
    log_precision, lengths = np.zeros(len(tokens)), {len(row) for row in others}
    for k in range(1, n + 1):
        top: dict[Gram, int] = defaultdict(int)  # largest count of a k-gram in any reference
        for row in others:
            for gram, m in Counter(_grams(row, k)).items():
                top[gram] = max(top[gram], m)
        log_precision += [_log_precision(Counter(_grams(row, k)), top, k) for row in tokens]
    closest = (min((abs(r - len(row)), r) for r in lengths)[1] for row in tokens)
    brevity = [min(0.0, 1 - r / max(1, len(row))) for r, row in zip(closest, tokens, strict=True)]
    return float(np.mean(np.exp(log_precision / n + brevity)))


def _log_precision(count: Counter[Gram], most: Mapping[Gram, int], k: int) -> float:
    """Log share of a row's k-grams that are elsewhere, each counted at most `most` times; "method 1" without any."""
    matches = sum(min(m, most.get(gram, 0)) for gram, m in count.items()) or (0.1 if k > 1 else 0.0)
    return math.log(matches / max(1, count.total())) if matches else -math.inf


def ngram_distance(rows: Rows, reference_rows: Rows, n: int) -> float:
    """Jensen-Shannon divergence in bits between the n-gram frequencies of two sets of rows.

    0: the same frequencies; 1: no common n-gram. It is what one n-gram tells about which set it came from. Unlike
    the total variation it counts a missing frequent n-gram for more than noise among rare ones.

    Two finite sets of the same text differ too, and the more the smaller they are; so both are cut to the same
    number of rows, and the value is read beside that of real text (`split_real`).
    """
    size = min(len(rows), len(reference_rows))
    counts = [Counter(g for row in _lists(part[:size]) for g in _grams(row, n)) for part in (rows, reference_rows)]
    if not all(counts):
        raise ValueError(f"no row is as long as {n} tokens")
    grams = counts[0].keys() | counts[1].keys()
    p, q = (np.array([count[gram] for gram in grams]) / count.total() for count in counts)
    return float(sum((x[x > 0] * np.log2(2 * x[x > 0] / (p + q)[x > 0])).sum() / 2 for x in (p, q)))


def copied_fraction(rows: Rows, train_rows: Rows, n: int = COPY_LENGTH) -> float:
    """Share of the rows' n-grams that occur in the training rows: memorisation, where it exceeds real text's."""
    grams = [gram for row in _lists(rows) for gram in _grams(row, n)]
    wanted = set(grams)
    found: set[Gram] = set()
    for row in _lists(train_rows):
        found.update(wanted.intersection(_grams(row, n)))
    return sum(gram in found for gram in grams) / max(1, len(grams))


def format_table(scores: Sequence[TextScore]) -> str:
    """Markdown: one line a score, the last of which is that of real text, to read every column against.

    One table has one judge, because perplexities of different judges do not compare.
    """
    if not scores or scores[-1].text != REAL:
        raise ValueError(f"the last line of the table must be {REAL!r}")
    if len({(score.judge, score.unit) for score in scores}) > 1:
        raise ValueError("a table has one judge; make a table for each")
    judge = f"{scores[0].judge}, per {scores[0].unit}"
    lines = [
        f"| text | perplexity ({judge}) | entropy (nats) | self-BLEU-4 | JS 1-gram (bits) | JS 2 | JS 3 "
        f"| copied {COPY_LENGTH}-grams | samples |",
        "| --- |" + " ---: |" * 8,
    ]
    for s in scores:
        distances = " | ".join(f"{distance:.3f}" for distance in s.distances)
        numbers = f"{s.perplexity:.2f} | {s.entropy:.3f} | {s.self_bleu:.3f} | {distances} | {s.copied:.2%}"
        lines.append(f"| {s.text} | {numbers} | {s.samples} |")
    return "\n".join(lines)


def _lists(rows: Rows) -> Iterator[list[Hashable]]:
    return (row.tolist() if hasattr(row, "tolist") else list(row) for row in rows)  # numpy scalars are slow keys


def _grams(row: list[Hashable], n: int) -> Iterator[Gram]:
    return zip(*(row[i:] for i in range(n)), strict=False)
