"""An interpolated modified Kneser-Ney n-gram model of words, trained on the corpus itself: the judge without files.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 3. With c_n
the counts of n-grams, and for k < n c_k(g) the number of words that were seen before g,

    p_k(w | h) = (c_k(h w) - D(c_k(h w))) / c_k(h) + gamma(h) p_{k-1}(w | h'),    p_0 = 1 / V,

where c_k(h) is the sum over w, h' is h without its first word, D takes one of three values by the count, and
gamma(h) is what the discounts took: every p_k(. | h) sums to one. An unseen h leaves p_k = p_{k-1}.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

MAX_VOCABULARY = 50_000
UNKNOWN = 0  # id of every word outside the vocabulary
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks.

    Spaces around punctuation do not matter ("don't" and "don ' t" are the same three words), so models with
    different tokenizers compare.
    """
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class _Level:
    """p_k as sorted tables: k-grams seen, what is left of their share, their contexts, and gamma."""

    grams: NDArray[np.int64]  # (G,) words of the k-gram as digits in base V, first word first
    share: NDArray[np.float64]  # (G,)
    contexts: NDArray[np.int64]  # (C,)
    gamma: NDArray[np.float64]  # (C,)


def discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """D for counts 0, 1, 2 and 3 or more, shape (4,), from the numbers of counts 1 to 4 (Chen and Goodman, eq. 26).

    Where the formula has no value or leaves (0, count], as in tiny or artificial texts, D is half the count: so
    every context keeps something for the words not seen after it.
    """
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    half = np.array([0.0, 0.5, 1.0, 1.5])
    if 0 in (n1, n2, n3):
        return half
    y = n1 / (n1 + 2 * n2)
    d = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.where((d > 0) & (d <= [0, 1, 2, 3]), d, half)


class NgramJudge:
    """Scores texts by word; see `Judge`. It has read the training text: copies of that are cheap, which only the
    column "copied" of the table shows.

    The vocabulary is closed: the training words seen at least twice, at most MAX_VOCABULARY, and one class for
    all others. A word of that class costs the class and its spelling under a model of the characters of the rare
    training words, so the probabilities of all strings together stay below one and no text becomes cheaper by
    being garbled. A word cut by the edge of a window is scored as it stands, in samples and in real text alike.

    Args:
        train_texts: the training split, joined in order into one stream, as packed training rows are. Texts
            should be whole documents or sentences: a text cut inside a word leaves two fragments.
        order: n, the longest n-gram; a key of n words must fit into 64 bits.
        max_words: words of the stream that are used; 10 million take about 1.5 GB.
    """

    name = "ngram"
    unit = "word"

    def __init__(self, train_texts: Iterable[str], order: int = 4, max_words: int = 10_000_000) -> None:
        if MAX_VOCABULARY**order >= 2**63:
            raise ValueError(f"n-grams of order {order} over {MAX_VOCABULARY} words do not fit into 64 bits")
        stream: list[str] = []
        for text in train_texts:
            stream += words(text)
            if len(stream) >= max_words:
                break
        del stream[max_words:]
        if len(stream) < order:
            raise UserError(f"the judge ngram needs at least {order} words of training text, got {len(stream)}")
        ranked = sorted(Counter(stream).items(), key=lambda item: (-item[1], item[0]))
        known = [word for word, count in ranked[: MAX_VOCABULARY - 1] if count > 1]
        self._ids = {word: i for i, word in enumerate(known, start=UNKNOWN + 1)}
        self.vocabulary = len(known) + 1
        self._levels = self._train(np.array([self._ids.get(word, UNKNOWN) for word in stream]), order)
        # Log probabilities of each character, of the end of a word, and of each character not seen in the rare words.
        rare = [word for word, _ in ranked if word not in self._ids]
        count = Counter(character for word in rare for character in word)
        total = count.total() + len(rare) + len(count) + 2  # add one to each character, to the end and to the rest
        self._character = {character: math.log((n + 1) / total) for character, n in count.items()}
        self._end = math.log((len(rare) + 1) / total)
        self._other = math.log(1 / total / 0x110000)  # the rest is shared by all of Unicode

    def _spelling(self, word: str) -> float:
        return self._end + sum(self._character.get(character, self._other) for character in word)

    def _train(self, ids: NDArray[np.int64], order: int) -> list[_Level]:
        """Levels 1 to `order` from the word ids (N,) of the stream."""
        size, levels = self.vocabulary, []
        grams = sum(ids[i : len(ids) - order + 1 + i] * size ** (order - 1 - i) for i in range(order))
        for k in range(order, 0, -1):
            grams, counts = np.unique(grams % size**k, return_counts=True)  # below the order: without the first word
            contexts, start = np.unique(grams // size, return_index=True)
            total = np.add.reduceat(counts, start)  # sorted k-grams of one context lie together
            taken = discounts(counts)[np.minimum(counts, 3)]
            share = (counts - taken) / np.repeat(total, np.diff(start, append=len(grams)))
            levels.append(_Level(grams, share, contexts, np.add.reduceat(taken, start) / total))
        return levels[::-1]

    def log_probs(self, ids: NDArray[np.int64], history: NDArray[np.int64]) -> NDArray[np.float64]:
        """Natural log probability (N,) of each word id in `ids` (N,) after the `history` (N,) ids before it.

        A history longer than the order's context is cut; ids are in [0, vocabulary), UNKNOWN included.
        """
        probability = np.full(len(ids), 1 / self.vocabulary)
        keys = np.zeros(len(ids), np.int64)
        for k, level in enumerate(self._levels):
            at = np.flatnonzero(history >= k)
            keys[at] += ids[at - k] * self.vocabulary**k
            share = _look_up(level.grams, level.share, keys[at], 0.0)
            gamma = _look_up(level.contexts, level.gamma, keys[at] // self.vocabulary, 1.0)
            probability[at] = share + gamma * probability[at]
        return np.log(probability)

    def perplexity(self, texts: list[str], max_length: int) -> float:
        """Perplexity per word of all texts together; `max_length` is in words. Each text starts without context."""
        rows = [words(text)[:max_length] for text in texts]
        stream = [word for row in rows for word in row]
        if not stream:
            return math.nan
        ids = np.array([self._ids.get(word, UNKNOWN) for word in stream])
        history = np.concatenate([np.arange(len(row)) for row in rows])
        spellings = sum(self._spelling(stream[i]) for i in np.flatnonzero(ids == UNKNOWN))
        total = self.log_probs(ids, history).sum() + spellings
        with np.errstate(over="ignore"):  # one endless word is infinitely perplexing
            return float(np.exp(-total / len(stream)))


def _look_up(
    table: NDArray[np.int64], values: NDArray[np.float64], keys: NDArray[np.int64], default: float
) -> NDArray[np.float64]:
    """values[i] where table[i] is the key, else `default`; `table` is sorted."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[at] == keys, values[at], default)
