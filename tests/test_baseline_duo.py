"""baselines/duo.py against closed forms: the process of one token, and the exact denoiser of the toy language."""

import functools
import json
import math
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flm_train as flm
from baselines import duo
from common import checkpoint, cli, record
from common.batches import row_noise
from common.errors import UserError
from common.meter import Meter
from common.runlog import read_metrics
from common.tensors import interpolate
from common.text.toy import LENGTH, WORDS, toy_probabilities, toy_rows
from common.text_run import TextRun, toy_distance
from tests.helpers import definitions, perturbed

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
LANGUAGE = toy_probabilities()
SENTENCES, LAW = torch.tensor(list(LANGUAGE)), torch.tensor(list(LANGUAGE.values()), dtype=torch.float64)
V = len(WORDS)
WORDS_OF = F.one_hot(SENTENCES, V).double()  # (64, L, V)


class Oracle(nn.Module):
    """Exact denoiser of the toy language as a network: logits from the noised tokens' embeddings and alpha.

    The law of a token given the *other* noised tokens, or all of them (`own`): p(sentence) prod_l q(x_l | sentence_l).
    """

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.eye(V, dtype=torch.float64))
        self.recall, self.own, self.calls = None, own, 0

    def forward(self, h: Tensor, alpha: Tensor) -> Tensor:
        self.calls += 1
        same = h.argmax(-1)[:, None] == SENTENCES  # (B, 64, L)
        alpha = alpha.double()[:, None, None]
        log_q = torch.where(same, alpha + (1 - alpha) / V, (1 - alpha) / V).log()
        log_w = LAW.log()[:, None] + log_q.sum(-1, keepdim=True) - (0 if self.own else log_q)
        w = log_w.softmax(1).expand(-1, -1, LENGTH)  # (B, 64, L)
        return torch.einsum("bsl,slv->blv", w, WORDS_OF).clamp(min=1e-300).log()


def small(**changes: object) -> duo.Args:
    values = dict(layers=2, width=32, heads=2, cond_width=16, length=6, precision="fp32", batch=16)
    return cli.override(duo.Args(), values | changes)


def random_probs(*shape: int, seed: int = 0) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(-1)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def process(alpha: float, vocab: int) -> Tensor:
    """q(x | token) of a noise level, (V, V)."""
    return alpha * torch.eye(vocab, dtype=torch.float64) + (1 - alpha) / vocab


# --- posterior --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "alpha_s"), [(0.0, 0.3), (0.2, 0.21), (0.6, 0.9), (0.5, 1.0), (0.0, 1.0)])
def test_posterior_is_bayes_rule_and_sums_to_one(alpha: float, alpha_s: float) -> None:
    p, x = random_probs(3, 4, 7), torch.randint(0, 7, (3, 4))
    q = duo.posterior(p, x, scalar(alpha), scalar(alpha_s))
    step = process(alpha / alpha_s, 7)  # q(x | x_s) (V, V)
    joint = (p @ process(alpha_s, 7)) * step[:, x].permute(1, 2, 0)
    torch.testing.assert_close(q, joint / joint.sum(-1, keepdim=True))
    torch.testing.assert_close(q.sum(-1), torch.ones(3, 4, dtype=torch.float64))


def test_posterior_of_a_known_token_at_the_end_is_that_token() -> None:
    tokens, x = torch.randint(0, 7, (2, 30)), torch.randint(0, 7, (2, 30))
    onehot = F.one_hot(tokens, 7).double()
    for alpha in (0.0, 0.4, 0.99):
        torch.testing.assert_close(duo.posterior(onehot, x, scalar(alpha), scalar(1.0)), onehot)


# --- bound ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [2, 5, 40])
@pytest.mark.parametrize("alpha", [0.02, 0.3, 0.9])
def test_bound_is_the_limit_of_the_divergence_of_posteriors(vocab: int, alpha: float) -> None:
    """KL(q(x_s | x, token) || q(x_s | x, probs)) / (t - s) for s -> t at rate 1, also where x is the token."""
    tokens = torch.randint(0, vocab, (1, 12))
    x = torch.where(torch.arange(12) < 4, tokens, torch.randint(0, vocab, (1, 12)))
    probs, ahead = random_probs(1, 12, vocab), 1e-7
    real, model = (
        duo.posterior(p, x, scalar(alpha), scalar(alpha + ahead)) for p in (F.one_hot(tokens, vocab).double(), probs)
    )
    off = model / real - 1  # KL = sum real (off - log(1 + off)), whose terms keep their digits
    limit = (real * (off - torch.log1p(off))).sum(-1) / ahead
    got = duo.bound(probs, tokens, x, torch.full((1,), alpha).double(), torch.ones(1).double())
    torch.testing.assert_close(got, limit, rtol=1e-4, atol=1e-7)


def test_bound_is_the_sum_written_out_and_zero_only_at_the_token() -> None:
    vocab, alpha, rate = 11, torch.tensor([0.2, 0.97]).double(), torch.tensor([1.0, 3.0]).double()
    tokens, probs = torch.randint(0, vocab, (2, 20)), random_probs(2, 20, vocab)
    x = torch.where(torch.arange(20) < 7, tokens, torch.randint(0, vocab, (2, 20)))
    a = alpha[:, None, None]
    bar, bar_p = (vocab * a * p + 1 - a for p in (F.one_hot(tokens, vocab).double(), probs))
    r, r_p = (b / b.gather(-1, x[..., None]) for b in (bar, bar_p))
    want = rate[:, None] / (vocab * alpha[:, None]) * (r * (r / r_p).log() - r + r_p).sum(-1)
    torch.testing.assert_close(duo.bound(probs, tokens, x, alpha, rate), want)
    exact = duo.bound(F.one_hot(tokens, vocab).double(), tokens, x, alpha, rate)
    assert want.min() > 1e-6 and exact.abs().max() < 1e-12


def test_bound_in_single_precision_keeps_its_digits_at_a_large_vocabulary() -> None:
    vocab, u = 4_096, torch.linspace(0, 1, 9).double()
    alpha, rate = duo.linear(u)
    tokens = torch.randint(0, vocab, (9, 4))
    x = torch.cat([tokens[:, :2], torch.randint(0, vocab, (9, 2))], 1)
    probs = random_probs(9, 4, vocab)
    want = duo.bound(probs, tokens, x, alpha, rate)
    got = duo.bound(probs.float(), tokens, x, alpha.float(), rate.float())
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)


def test_loss_of_an_untrained_network_is_ln_v() -> None:
    """Uniform predictions: the bound of the likelihood is exact, and its mean over time ln V."""
    vocab, n = 30, 4_000
    net = duo.DiT(small(length=3, layers=1).model, vocab)
    u, tokens = (torch.arange(n).double() + 0.5) / n, torch.randint(0, vocab, (n, 3))
    alpha, rate = duo.linear(u)
    x = duo.replace_tokens(tokens, alpha, row_noise(0, range(n), (2, 3), 1, CPU), vocab)
    loss = duo.duo_loss(net, net.embed[x], tokens, x, alpha.float(), rate.float(), "bound")
    assert loss.item() == pytest.approx(math.log(vocab), rel=0.02)


def test_bound_of_the_exact_denoiser_is_the_entropy_of_the_language() -> None:
    """... of a token given the others; with the token's own noised value it is counted twice, which costs more."""
    entropy = -(LAW * LAW.log()).sum().item() / LENGTH
    exact, both = (duo.validate(Oracle(own), toy_rows(1_000, seed=0), 4) for own in (False, True))
    assert exact["valid/bound"] == pytest.approx(entropy, abs=3 * exact["valid/bound_error"] + 0.002)
    assert exact["valid/bound_error"] < 0.015 and both["valid/bound"] > entropy + 0.05
    quarters = [exact[f"valid/bound_quarter{i}"] for i in range(1, 5)]
    assert np.mean(quarters) == pytest.approx(exact["valid/bound"])


# --- cross entropy ----------------------------------------------------------------------------------------------------


def test_cross_entropy_counts_replaced_tokens_and_has_the_optimum_of_the_bound() -> None:
    """One token of law pi: given x, drawn anew with the weight's chance, both losses have no gradient at pi."""
    vocab, alpha = 5, torch.full((1,), 0.4).double()
    pi = random_probs(vocab)
    token, x = (z.reshape(1, -1) for z in torch.meshgrid(torch.arange(vocab), torch.arange(vocab), indexing="ij"))
    joint = (pi[:, None] * process(0.4, vocab)).reshape(1, -1)

    class Given(nn.Module):
        embed, trunk = torch.eye(vocab), staticmethod(lambda *inputs: inputs)

        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(pi.log().expand(1, vocab**2, vocab).clone())

        def head(self, h: Tensor, cond: Tensor) -> Tensor:
            return self.logits

    net, h, per_pair = Given(), torch.zeros(1, vocab**2, 1), {}
    for kind in ("ce", "bound"):
        loss = vocab**2 * duo.duo_loss(net, h, token, x, alpha, torch.ones(1).double(), kind)
        per_pair[kind] = torch.autograd.grad(loss, net.logits)[0]  # (1, V V, V)
        given_x = (joint[..., None] * per_pair[kind]).reshape(vocab, vocab, vocab).sum(0)
        assert per_pair[kind].abs().max() > 1e-2 and given_x.abs().max() < 1e-9
    weight = -per_pair["ce"].gather(-1, token[..., None]).squeeze(-1) / (1 - pi[token])
    torch.testing.assert_close((joint * weight).sum(), scalar(0.6))  # what is drawn anew: 1 - alpha
    assert torch.equal(weight > 0.999, token != x)


@pytest.mark.parametrize("kind", ["bound", "ce"])
def test_loss_by_rows_and_second_reading_change_nothing_else(kind: str) -> None:
    net = duo.DiT(small(self_condition=0.5).model, 12).double()
    perturbed(net, 0.2)
    tokens, x = torch.randint(0, 12, (2, 5, 6))
    alpha, rate = duo.linear(torch.rand(5).double())
    weights = list(net.parameters())
    h = net.embed[x]
    again = h + net.recall((net(h, alpha).softmax(-1) @ net.embed).detach())
    plain = duo.duo_loss(net, again, tokens, x, alpha, rate, kind)
    want = [plain, *torch.autograd.grad(plain, weights)]
    for rows in (0, 2):
        loss = duo.duo_loss(net, net.embed[x], tokens, x, alpha, rate, kind, rows, twice=True)
        for a, b in zip([loss, *torch.autograd.grad(loss, weights)], want, strict=True):
            torch.testing.assert_close(a, b)


# --- Gaussian states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "window", "gammas"),
    [
        (30_522, "CURRICULUM", (-3.5, -1.75)),  # the authors' values, rounded, for their vocabularies
        (50_257, "CURRICULUM", (-3.55, -1.85)),
        (50_257, "DCD", (-4.0, -1.0)),
        (4_096, "CURRICULUM", (-3.34, -1.28)),  # by quadrature
        (4_096, "DCD", (-3.84, -0.07)),
        (64, "CURRICULUM", (-2.80, 0.76)),
    ],
)
def test_gaussian_window_is_recomputed_for_the_vocabulary(vocab: int, window: str, gammas: tuple[float, float]) -> None:
    ends = getattr(duo, window)
    gamma, alpha, _ = duo.gaussian(torch.tensor([0.0, 1.0]).double(), ends, duo.accuracy_table(vocab))
    assert gamma.tolist() == pytest.approx(gammas, abs=0.04) and alpha.tolist() == pytest.approx(ends, abs=1e-6)


def test_gaussian_noise_level_is_flms_clock_and_its_rate_the_derivative() -> None:
    vocab, table = 200, duo.accuracy_table(200)
    assert torch.equal(table, flm.accuracy_table(200))
    gamma, alpha, rate = duo.gaussian(torch.linspace(0, 1, 2_001).double(), duo.CURRICULUM, table)
    m = (-gamma / 2).exp()
    torch.testing.assert_close(flm.Clock(table).t(alpha), m / (1 + m), atol=1e-6, rtol=0)
    torch.testing.assert_close(alpha, interpolate(m / (1 + m), *table))
    z = torch.linspace(-9, 9, 4_001).double()  # d alpha / d gamma, differentiated under the expectation
    inner = (vocab - 1) * torch.exp(
        (vocab - 2) * torch.special.log_ndtr(z + m[::100, None]) - (z + m[::100, None]) ** 2 / 2
    )
    density = (inner * torch.exp(-(z**2) / 2)).sum(-1) * (z[1] - z[0]) / (2 * math.pi)
    slope = vocab / (vocab - 1) * density * m[::100] / 2 * (gamma[-1] - gamma[0])
    torch.testing.assert_close(rate[::100], slope, rtol=2e-3, atol=1e-4)
    assert rate.mean().item() == pytest.approx(0.945 - 0.049, rel=1e-3)


@pytest.mark.parametrize("vocab", [2, 50])
def test_argmax_of_gaussian_states_has_the_law_of_replaced_tokens(vocab: int) -> None:
    n, table = 20_000, duo.accuracy_table(vocab)
    gamma, alpha, _ = duo.gaussian(torch.tensor([0.5]).double(), duo.CURRICULUM, table)
    xi = torch.randn(1, n, vocab, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(1, n, dtype=torch.long)
    soft, hard = duo.soft_tokens(tokens, gamma.float(), xi, 1e-3)
    (path,) = duo.path_tokens(tokens, [gamma], row_noise(0, range(1), (3, n), 1, CPU), vocab)
    discrete = duo.replace_tokens(tokens, alpha, row_noise(0, range(1), (2, n), 1, CPU), vocab)
    right = 1 / vocab + (1 - 1 / vocab) * alpha.item()
    other = (1 - right) / (vocab - 1)
    for x in (hard, path, discrete):
        share = torch.bincount(x[0], minlength=vocab) / n
        assert share[0].item() == pytest.approx(right, abs=4 * math.sqrt(right * (1 - right) / n))
        assert (share[1:] - other).abs().max().item() < 5 * math.sqrt(other / n)
    assert soft.argmax(-1).equal(hard) and (soft.max(-1).values > 0.99).double().mean() > 0.97
    torch.testing.assert_close(soft.sum(-1), torch.ones(1, n))


def test_path_of_three_numbers_a_token_has_the_joint_law_of_v_gaussians() -> None:
    """Both times right, only the later wrong, both wrong; a token that is lost stays lost, at one other token."""
    vocab, n, table = 20, 40_000, duo.accuracy_table(20)
    tokens = torch.randint(0, vocab, (1, n), generator=torch.Generator().manual_seed(1))
    gammas = [duo.gaussian(torch.tensor([u]).double(), duo.DCD, table)[0] for u in (0.7, 0.4)]
    late, early = duo.path_tokens(tokens, gammas, row_noise(0, range(1), (3, n), 1, CPU), vocab)
    xi = torch.randn(1, n, vocab, generator=torch.Generator().manual_seed(0))
    dense = [duo.soft_tokens(tokens, g.float(), xi, 1.0)[1] for g in gammas]
    for (a, b), (c, d) in (((late, early), dense),):
        for f in (lambda y: y == tokens, lambda y: y != tokens):
            got, want = ((f(y) & f(z)).double().mean().item() for y, z in ((a, b), (c, d)))
            assert got == pytest.approx(want, abs=4 * math.sqrt(0.5 / n))
    assert not ((late == tokens) & (early != tokens)).any()
    assert torch.equal(late[early != tokens], early[early != tokens])


# --- distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_condition", [0.0, 0.5])
def test_dcd_loss_is_the_divergence_of_student_from_teacher(self_condition: float) -> None:
    m, rows = small(self_condition=self_condition).model, 2
    nets = [duo.DiT(m, 12).double() for _ in range(2)]
    for seed, net in enumerate(nets):
        perturbed(net, 0.2, seed)
    net, teacher = nets
    x, x_s = torch.randint(0, 12, (2, 5, 6))
    alpha, alpha_s = torch.rand(2, 5).double()
    twice = self_condition > 0

    def law(net: duo.DiT, x: Tensor, alpha: Tensor) -> Tensor:
        h = net.embed[x]
        return net(h + net.recall(net(h, alpha).softmax(-1) @ net.embed) if twice else h, alpha).softmax(-1)

    p, q = law(net, x, alpha), law(teacher, x_s, alpha_s)
    want = (p * (p / q).log()).sum(-1).mean()
    for pieces in (0, rows):
        torch.testing.assert_close(duo.dcd_loss(net, teacher, x, x_s, alpha, alpha_s, pieces, twice), want)
    same = duo.dcd_loss(net, net, x, x, alpha, alpha, twice=twice)
    assert same.abs().item() < 1e-12 < want.item()
    duo.dcd_loss(net, teacher, x, x_s, alpha, alpha_s, twice=twice).backward()
    assert net.embed.grad.abs().max() > 0 and teacher.embed.grad is None


# --- sampler ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sampled(net: nn.Module, steps: int, n: int = 3_000, **how: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(V, (n, LENGTH), generator=generator)
    return duo.sample_ancestral(net, x, steps, small(**how).sample, generator).numpy()


MARGINALS = (LAW[:, None, None] * WORDS_OF).sum(0)  # (L, V)


def test_exact_denoiser_samples_the_toy_law_in_many_calls_and_the_product_of_marginals_in_one() -> None:
    rows = sampled(Oracle(), 32)
    assert toy_distance(rows) < 0.09  # 3,000 draws of the law itself: 0.05
    one = sampled(Oracle(), 1)
    product = (WORDS_OF * MARGINALS).sum(-1).prod(-1)  # of each sentence of the language
    want = 0.5 * ((product - LAW).abs().sum() + 1 - product.sum()).item()
    assert toy_distance(one) == pytest.approx(want, abs=0.02) and want > 0.7
    share = (one[..., None] == np.arange(V)).mean(0)  # (L, V)
    np.testing.assert_allclose(share, MARGINALS, atol=0.03)


def test_posterior_takes_the_law_given_the_other_tokens() -> None:
    """Then it is the mean of q(x_s | x, token) over the token given all; with that law in its place x counts twice."""
    x, alpha, alpha_s = SENTENCES, scalar(0.5), scalar(0.75)
    others, everything = (Oracle(own)(WORDS_OF, alpha.expand(len(x))).exp() for own in (False, True))
    mean = sum(
        everything[..., [j]] * duo.posterior(WORDS_OF * 0 + F.one_hot(torch.tensor(j), V), x, alpha, alpha_s)
        for j in range(V)
    )
    torch.testing.assert_close(duo.posterior(others, x, alpha, alpha_s), mean)
    kept = (duo.posterior(everything, x, alpha, alpha_s) - mean).gather(-1, x[..., None])
    assert kept.min() > -1e-12 and kept.max() > 0.01


@pytest.mark.parametrize(("steps", "greedy"), [(1, False), (3, False), (8, False), (1, True), (3, True)])
def test_sampler_makes_exactly_n_calls(steps: int, greedy: bool) -> None:
    net = Oracle()
    rows = sampled(net, steps, n=20, greedy_tail=greedy)
    assert net.calls == steps and rows.shape == (20, LENGTH)


def test_greedy_tail_is_the_likeliest_tokens_of_the_last_prediction() -> None:
    rows = sampled(Oracle(), 1, n=50, greedy_tail=True)
    assert (rows == MARGINALS.argmax(-1).numpy()).all()
    assert not (sampled(Oracle(), 1, n=50) == rows).all()


def test_temperature_and_nucleus_act_on_the_prediction_not_on_the_posterior() -> None:
    """One of two steps from known tokens: the chance of each next token is the posterior of the filtered prediction."""
    vocab, n = 4, 60_000
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).double()

    class Constant(nn.Module):
        embed, recall, calls = torch.eye(vocab), None, 0

        def forward(self, h: Tensor, alpha: Tensor) -> Tensor:
            self.seen = h.argmax(-1) if alpha[0] > 0 else None
            return p.log().expand(*h.shape[:2], vocab)

    for how in (dict(temperature=0.5), dict(top_p=0.7), dict(temperature=2.0, top_p=0.6)):
        net, x = Constant(), torch.full((1, n), 3)
        sample = small(**how).sample
        duo.sample_ancestral(net, x, 2, sample, torch.Generator().manual_seed(0))
        share = torch.bincount(net.seen[0], minlength=vocab) / n
        filtered = duo.tempered(p, sample.temperature, sample.top_p)
        want = duo.posterior(filtered.expand(1, 1, vocab), x[:, :1], scalar(0.0), scalar(0.5))[0, 0]
        torch.testing.assert_close(share.double(), want, atol=0.01, rtol=0)
        wrong = duo.tempered(
            duo.posterior(p.expand(1, 1, vocab), x[:, :1], scalar(0.0), scalar(0.5))[0, 0], *vars_of(how)
        )
        assert (share - wrong).abs().max() > 0.03


def vars_of(how: dict[str, float]) -> tuple[float, float]:
    return how.get("temperature", 1.0), how.get("top_p", 1.0)


def test_tempered_by_hand() -> None:
    p = torch.tensor([0.1, 0.5, 0.25, 0.15]).double()
    torch.testing.assert_close(duo.tempered(p, 1.0, 1.0), p)
    torch.testing.assert_close(duo.tempered(p, 0.5, 1.0), p**2 / (p**2).sum())
    torch.testing.assert_close(duo.tempered(p, 1.0, 0.7), torch.tensor([0.0, 2 / 3, 1 / 3, 0.0]).double())
    assert duo.tempered(p, 1.0, 0.0).tolist() == [0, 1, 0, 0]


def test_pick_draws_rare_tokens_as_often_as_they_should() -> None:
    p = torch.tensor([0.0, 1e-12, 0.25, 0.75, 0.0]).double().expand(4, 5)
    assert duo.pick(p, torch.tensor([0.0, 0.5e-12, 0.2, 1 - 1e-9], dtype=torch.float64)).tolist() == [1, 1, 2, 3]
    uniform = (torch.arange(1_000).double() + 0.5) / 1_000
    law = random_probs(9)
    share = torch.bincount(duo.pick(law.expand(1_000, 9), uniform), minlength=9) / 1_000
    torch.testing.assert_close(share.double(), law, atol=1e-3, rtol=0)


# --- runs -------------------------------------------------------------------------------------------------------------

TINY = [
    *("--width", "32", "--heads", "2", "--layers", "1"),
    *("--threads", "1", "--batch", "32", "--samples", "16", "--steps", "1", "2"),
    *("--log-every", "1", "--eval-every", "12", "--checkpoint-every", "6"),
]


def timeless(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without final samples, on fewer held-out rows; the machine is not measured, the script read once."""
    validate = duo.validate
    monkeypatch.setattr(TextRun, "evaluate", lambda *values: None)
    monkeypatch.setattr(duo, "validate", lambda net, rows, times: validate(net, rows[:64], times))
    monkeypatch.setattr(duo, "accuracy_table", functools.cache(duo.accuracy_table))
    monkeypatch.setattr(record, "definitions", functools.cache(record.definitions))
    monkeypatch.setattr(Meter, "_seconds", lambda *values: 1.0)


def stopping_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log_training = TextRun.log_training

    def log_and_stop(run: TextRun, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        log_training(run, metrics, speed)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TextRun, "log_training", log_and_stop)


def test_run_and_distillation_resume_exactly_and_evaluate(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut in the curriculum and in the last stage of DCD, whose teacher no longer is the base; the base may go."""
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--total-steps", "12", *TINY]
    runs = {
        "base": (4, [*places, "--data", "toy", "--dropout", "0.1", "--self-condition", "0.5"]),
        "dcd": (9, [*places, "--distill", str(tmp_path / "base"), "--stages", "3"]),
    }
    for name, (step, flags) in runs.items():
        duo.main([*flags, "--run-name", name])
        with monkeypatch.context() as patch:
            stopping_at(step, patch)
            duo.main([*flags, "--run-name", f"{name}_cut"])
        assert checkpoint.load(tmp_path / f"{name}_cut" / "checkpoint.pt")["step"] == step
        if name == "dcd":
            (tmp_path / "base").rename(tmp_path / "elsewhere")
        duo.main(["--resume", str(tmp_path / f"{name}_cut")])
        whole, cut = (checkpoint.load(tmp_path / n / "checkpoint.pt") for n in (name, f"{name}_cut"))
        for part in ("net", "ema", *(["teacher"] if name == "dcd" else [])):
            assert all(torch.equal(whole[part][k], cut[part][k]) for k in whole[part])
        assert len(timeless(tmp_path / name)) > 12 and timeless(tmp_path / name) == timeless(tmp_path / f"{name}_cut")
    held_out = json.loads((tmp_path / "dcd" / "bound.json").read_text())
    assert f"bound per token {held_out['valid/bound']:.3f}" in capsys.readouterr().out
    monkeypatch.undo()
    duo.main(["--eval", str(tmp_path / "dcd"), "--greedy-tail", "--temperature", "0.8"])
    out = capsys.readouterr().out
    assert "| 2 steps |" in out and "bound per token" not in out  # it does not depend on the sampler
    assert (tmp_path / "dcd" / "evaluation_ngram_t0.8_p1_greedy.json").exists()


def test_train_in_pieces_gives_the_steps_of_the_whole_batch(tmp_path: Path, quick: None) -> None:
    """Both halves of the training; the draws belong to the row's place in the batch."""
    flags = [*TINY, "--data", "toy", "--total-steps", "6", "--eval-every", "100", "--lr", "1e-3"]
    flags += ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name"]
    losses = {}
    for name, pieces in {"whole": ["--micro-batch", "0"], "parts": ["--micro-batch", "12", "--loss-rows", "5"]}.items():
        duo.main([*flags, name, *pieces])
        losses[name] = [row["train/loss"] for row in read_metrics(tmp_path / name) if "train/loss" in row]
    assert len(losses["whole"]) == 6 and losses["parts"] == pytest.approx(losses["whole"], abs=2e-5)


def test_main_refuses_the_run_of_another_script(tmp_path: Path, quick: None) -> None:
    places = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    flm.main([*TINY, "--data", "toy", "--total-steps", "1", *places, "--run-name", "flow"])
    for flag in ("--distill", "--eval", "--resume"):
        with pytest.raises(
            UserError, match=r"is a run of flm_train\.py, whose networks are others than those of duo\.py"
        ):
            duo.main([flag, str(tmp_path / "flow")])
    for flags in (["--curriculum", "2"], ["--soft", "0"], ["--data", "toy", "--grid", "1"], ["--loss", "elbo"]):
        with pytest.raises(UserError, match=flags[-2]) as caught:
            duo.main(flags)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "limit"), [("bound", 0.25), ("ce", 0.55)])
def test_train_learns_the_toy_language(
    tmp_path: Path, loss: str, limit: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """One call writes words of the right frequencies, but draws them independently; a DCD student does not."""
    places = ["--threads", "1", "--run-dir", str(tmp_path), "--data-dir", str(tmp_path), "--run-name"]

    def distances(*flags: str) -> list[float]:
        duo.main([*flags[:4], *places, *flags[4:]])
        said = re.findall(r"\d steps: total variation .* (\d\.\d+)", capsys.readouterr().out)
        return [float(number) for number in said]

    one, many = distances("--data", "toy", "--loss", loss, "base", "--steps", "1", "32")
    assert many < limit and one > 0.68
    if loss == "bound":
        (student,) = distances("--distill", str(tmp_path / "base"), "--steps", "1", "dcd")
        assert student < 0.68


# --- arguments and shared text ----------------------------------------------------------------------------------------


def test_script_shares_the_text_of_flm_train() -> None:
    ours, theirs = definitions(duo), definitions(flm)
    same = {name for name in ours.keys() & theirs.keys() if ours[name] == theirs[name]}
    assert same == {
        "TrainArgs", "accuracy_table", "stratified_times", "makes_two_passes", "recalled", "attention", "TimeEmbedding",
        "ShortConv", "Block", "zero", "rotate", "learning_rate",
    }  # fmt: skip
    head, tail = ours["DiT"].split("    def trunk")  # the network of flm_train.py has also scale_rows between the two
    assert theirs["DiT"].startswith(head) and theirs["DiT"].endswith(tail)


def test_defaults_for_data_and_network_are_those_of_flm_train() -> None:
    for data in ("austen", *flm.SETTINGS):
        ours, theirs = cli.flatten(duo.default_args(data=data)), cli.flatten(flm.default_args(data))
        own = {"self_condition", "temperature", "top_p", *(("lr",) if data == "toy" else ())}  # its rates are tuned
        assert {k: v for k, v in ours.items() if k in theirs and k not in own} == {
            k: v for k, v in theirs.items() if k in ours and k not in own
        }
