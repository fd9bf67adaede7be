"""baselines/mdlm.py against a Markov chain whose conditionals are known, the toy language, and closed forms."""

import itertools
import json
import math
import os
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flm_train as flm
from baselines import mdlm
from common import checkpoint, cli, record
from common.errors import UserError
from common.meter import Meter
from common.runlog import read_metrics
from common.text import toy_probabilities
from common.text_run import TextRun, toy_distance
from tests.helpers import definitions, perturbed
from tests.test_text_training import SMALL, losses, run, timeless

V, L = 3, 4
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (81, 4)
FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
NEXT = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.05, 0.25, 0.7]], dtype=torch.float64)
CHAIN = FIRST[SEQUENCES[:, 0]] * NEXT[SEQUENCES[:, :-1], SEQUENCES[:, 1:]].prod(-1)  # (81,) sums to 1
ENTROPY = -(CHAIN * CHAIN.log()).sum().item() / L  # per token


class Oracle(nn.Module):
    """The exact p(token | x_t) of a law over sequences, as a network of mdlm.py; counts its calls."""

    def __init__(self, sequences: Tensor, probs: Tensor, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.eye(vocab, dtype=torch.float64))
        self.sequences, self.probs, self.recall, self.noise_width, self.calls = sequences, probs, None, 0, 0

    def read(self, x: Tensor, eps: Tensor) -> Tensor:
        return x

    def trunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def head(self, x: Tensor, cond: Tensor) -> Tensor:
        vocab = len(self.embed)
        code = (vocab + 1) ** torch.arange(x.shape[1])
        numbers, place = (x * code).sum(-1).unique(return_inverse=True)
        states = numbers[:, None] // code % (vocab + 1)  # each once (S, L)
        fits = ((states[:, None] == self.sequences) | (states[:, None] == vocab)).all(-1) * self.probs  # (S, N)
        counts = fits @ F.one_hot(self.sequences, vocab).double().flatten(1)  # (S, L V)
        return counts.unflatten(-1, (-1, vocab)).log()[place]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x, x)


def chain() -> Oracle:
    return Oracle(SEQUENCES, CHAIN, V)


def small(**changes: object) -> mdlm.Args:
    values = dict(layers=2, width=32, heads=2, cond_width=16, length=6, precision="fp32", batch=16)
    return cli.override(mdlm.Args(), values | changes)


def network(vocab: int = 12, noise_width: int = 0, scale: float = 0.2, **changes: object) -> mdlm.MaskedDiT:
    torch.manual_seed(0)
    net = mdlm.MaskedDiT(small(**changes).model, vocab, noise_width)
    perturbed(net, scale)
    return net.double().eval()


def batch(rows: int, vocab: int, noise_width: int = 0, length: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, times, uniform numbers (3, B, L) and eps."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (rows, length), generator=g)
    uniform = torch.rand(3, rows, length, generator=g, dtype=torch.float64)
    eps = torch.rand(rows, length, noise_width, generator=g, dtype=torch.float64)
    return tokens, mdlm.EPS + (1 - mdlm.EPS) * mdlm.stratified_times(0, rows, 1), uniform, eps


def draws_of(oracle: Oracle, rows: int, steps: int, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    x = torch.full((rows, oracle.sequences.shape[1]), len(oracle.embed))
    with torch.no_grad():
        return mdlm.sample_ancestral(oracle, x, steps, temperature, top_p, False, torch.Generator().manual_seed(0))


def frequencies(x: Tensor) -> Tensor:
    """Of all sequences of the chain (81,)."""
    return torch.bincount((x * V ** torch.arange(L - 1, -1, -1)).sum(-1), minlength=V**L).double() / len(x)


def marginals(sequences: Tensor, probs: Tensor, vocab: int) -> Tensor:
    return (F.one_hot(sequences, vocab) * probs[:, None, None]).sum(0)  # (L, V)


# --- masks and losses -------------------------------------------------------------------------------------------------


def test_mask_tokens_leaves_a_share_alpha() -> None:
    tokens, t = torch.zeros(4, 20_000, dtype=torch.long), torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    uniform = mdlm.uniform_draws(3, range(4), (20_000,), 1, torch.device("cpu"))
    left = (mdlm.mask_tokens(tokens, t, uniform, 5) == 0).double().mean(-1)
    torch.testing.assert_close(left, 1 - (1 - 1e-3) * t, atol=0.015, rtol=0)
    assert left[0] == 1 and mdlm.alpha(t)[-1].item() == pytest.approx(1e-3)


def test_uniform_draws_belong_to_the_place_in_the_global_batch() -> None:
    device = torch.device("cpu")
    whole = mdlm.uniform_draws(7, range(8), (500, 3), 1, device)
    assert torch.equal(whole[4:], mdlm.uniform_draws(7, range(4, 8), (500, 3), 1, device))
    assert not torch.equal(whole, mdlm.uniform_draws(8, range(8), (500, 3), 1, device))
    places = (whole.flatten() * 10).long()  # uniform: a tenth in every tenth
    torch.testing.assert_close(torch.bincount(places) / places.numel(), torch.full((10,), 0.1), atol=0.012, rtol=0)


def test_mdlm_loss_is_ln_v_at_the_start() -> None:
    tokens, t, uniform, eps = batch(4_096, 50)
    net = mdlm.MaskedDiT(small().model, 50)
    masked = mdlm.mask_tokens(tokens, t, uniform[0], 50) == 50
    ce, elbo = (mdlm.mdlm_loss(net, tokens, t, uniform[0], eps, loss).item() for loss in ("ce", "elbo"))
    assert ce == pytest.approx(2 * masked.double().mean().item() * math.log(50), rel=1e-5)
    assert elbo == pytest.approx((masked / t[:, None]).mean().item() * math.log(50), rel=1e-5)
    assert ce == pytest.approx(math.log(50), rel=0.03) and elbo == pytest.approx(math.log(50), rel=0.03)


@pytest.mark.parametrize("loss", ["ce", "elbo"])
def test_mdlm_loss_is_the_plain_formula(loss: str) -> None:
    net = network()
    tokens, t, uniform, eps = batch(5, 12)
    want = 0.0
    for row in range(5):
        gone = uniform[0, row] < (1 - mdlm.EPS) * t[row]
        h = torch.where(gone[:, None], net.mask, net.embed[tokens[row]])
        log_p = mdlm.DiT.forward(net, h[None])[0].log_softmax(-1)
        nll = -log_p[torch.arange(6), tokens[row]][gone].sum()
        want = want + (nll / t[row] / 30 if loss == "elbo" else nll / 15)
    got = mdlm.mdlm_loss(net, tokens, t, uniform[0], eps, loss)
    torch.testing.assert_close(got.item(), want.item(), atol=0, rtol=1e-5)


def test_mdlm_loss_by_rows_and_in_pieces_changes_nothing() -> None:
    net = network(self_condition=0.5, noise_width=4)
    tokens, t, uniform, eps = batch(6, 12, 4)

    def gradients(rows: int, parts: list[slice]) -> list[Tensor]:
        loss = sum(
            (part.stop - part.start) / 6
            * mdlm.mdlm_loss(net, tokens[part], t[part], uniform[0, part], eps[part], "ce", rows, twice=True)
            for part in parts
        )  # fmt: skip
        return [loss, *torch.autograd.grad(loss, list(net.parameters()))]

    whole = gradients(0, [slice(0, 6)])
    for other in (gradients(4, [slice(0, 6)]), gradients(0, [slice(0, 2), slice(2, 6)])):
        for a, b in zip(whole, other, strict=True):
            torch.testing.assert_close(a, b)


def test_second_pass_reads_the_first_prediction_and_sends_no_gradient_into_it() -> None:
    net = network(self_condition=0.5)
    tokens, t, uniform, eps = batch(5, 12)
    x = mdlm.mask_tokens(tokens, t, uniform[0], 12)
    first = mdlm.predict(net, x, eps).exp().detach()
    known = x < 12
    assert torch.equal(first[known], F.one_hot(tokens[known], 12).double())
    log_p = net(net.read(x, eps) + net.recall(first @ net.embed)).log_softmax(-1)
    want = 2 * (-log_p.gather(-1, tokens[..., None])[..., 0] * ~known).sum() / 30
    got = mdlm.mdlm_loss(net, tokens, t, uniform[0], eps, "ce", twice=True)
    torch.testing.assert_close(got, want)
    weights = list(net.parameters())
    for a, b in zip(torch.autograd.grad(got, weights), torch.autograd.grad(want, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_weighted_loss_of_a_perfect_bigram_model_is_its_entropy() -> None:
    """Random orders of the chain rule: the bound is tight for exact conditionals."""
    n = 40_000
    tokens = SEQUENCES[torch.multinomial(CHAIN, n, replacement=True, generator=torch.Generator().manual_seed(0))]
    _, t, uniform, eps = batch(n, V, length=L)
    with torch.no_grad():
        loss = mdlm.mdlm_loss(chain(), tokens, t, uniform[0], eps, "elbo")
    assert loss.item() == pytest.approx(ENTROPY, abs=0.02)
    out = mdlm.validate(chain(), tokens.numpy(), small(length=L), count=1_000, times=16)
    own = -CHAIN[(tokens[:1_000] * V ** torch.arange(L - 1, -1, -1)).sum(-1)].log().mean().item() / L
    assert out["valid/elbo"] == pytest.approx(own, abs=0.03) and list(out) == ["valid/ce", "valid/elbo"]
    assert 0 < out["valid/ce"] < math.log(V)


def test_validate_is_ln_v_at_the_start_and_the_same_for_any_number_of_rows_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.random.default_rng(0).integers(0, 64, (256, 6)).astype(np.uint16)
    out = mdlm.validate(mdlm.MaskedDiT(small().model, 64), rows, small(), times=4)
    assert out["valid/ce"] == pytest.approx(math.log(64), rel=1e-5)
    assert out["valid/elbo"] == pytest.approx(math.log(64), rel=0.05)
    net, found = network(64, noise_width=4), []
    for at_once in (7, 256):
        monkeypatch.setattr(mdlm, "rows_at_once", lambda *_, at_once=at_once: at_once)
        found.append(mdlm.validate(net, rows, small(), times=2))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


# --- sampler against the exact conditionals ---------------------------------------------------------------------------


def test_copy_over_is_exact() -> None:
    x = torch.tensor([[2, 0, 3, 1]])
    log_p = mdlm.copy_over(torch.randn(1, 4, 3, dtype=torch.float64), x)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, 4, dtype=torch.float64))
    assert torch.equal(log_p[0, [0, 1, 3]].exp(), F.one_hot(x[0, [0, 1, 3]], 3).double())
    uniform = torch.rand(2, 1, 4, dtype=torch.float64)
    hot = mdlm.fill_in(x, log_p.exp(), torch.zeros(1), uniform, temperature=100.0)
    assert torch.equal(hot[0, [0, 1, 3]], x[0, [0, 1, 3]]) and hot.max() < 3


def test_fill_in_keeps_masks_with_the_probability_to_stay() -> None:
    x, stay = torch.full((2, 40_000), V), torch.tensor([0.9, 0.25], dtype=torch.float64)
    uniform = torch.rand(2, 2, 40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = mdlm.fill_in(x, FIRST.expand(2, 40_000, V), stay, uniform)
    torch.testing.assert_close((y == V).double().mean(-1), stay, atol=0.01, rtol=0)
    drawn = torch.bincount(y[1][y[1] < V], minlength=V) / (y[1] < V).sum()
    torch.testing.assert_close(drawn.double(), FIRST, atol=0.01, rtol=0)
    assert (x == V).all()  # the argument is left alone


def test_many_calls_sample_the_law() -> None:
    n = 10_000
    floor = 0.5 * math.sqrt(2 / (math.pi * n)) * (CHAIN * (1 - CHAIN)).sqrt().sum().item()  # of n perfect samples
    distances = [0.5 * (frequencies(draws_of(chain(), n, steps)) - CHAIN).abs().sum().item() for steps in (1, 4, 80)]
    assert distances[0] > distances[1] + 0.05 > distances[2] + 0.1
    assert distances[2] < floor + 0.01


def test_one_call_samples_the_product_of_the_marginals() -> None:
    n, p = 40_000, marginals(SEQUENCES, CHAIN, V)
    product = p[torch.arange(L), SEQUENCES].prod(-1)
    assert 0.5 * (frequencies(draws_of(chain(), n, 1)) - product).abs().sum() < 0.02
    table = toy_probabilities()
    sequences, probs = torch.tensor(list(table)), torch.tensor(list(table.values()), dtype=torch.float64)
    rows = draws_of(Oracle(sequences, probs, 18), 20_000, 1)
    q = marginals(sequences, probs, 18)[torch.arange(8), sequences].prod(-1)  # of the 64 sentences; the rest is no text
    assert toy_distance(rows.numpy()) == pytest.approx(0.5 * ((q - probs).abs().sum() + 1 - q.sum()).item(), abs=0.02)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_sampler_makes_exactly_as_many_calls_and_leaves_no_mask(steps: int) -> None:
    oracle = chain()
    assert draws_of(oracle, 500, steps).max() < V and oracle.calls == steps


@pytest.mark.parametrize("steps", [1, 5])
def test_temperature_and_top_p_act_on_the_prediction(steps: int) -> None:
    """One token: its law is that of the changed prediction at any number of calls. A changed posterior has another."""
    one = Oracle(torch.arange(V)[:, None], FIRST, V)

    def law(**how: float) -> Tensor:
        return torch.bincount(draws_of(one, 40_000, steps, **how).flatten(), minlength=V).double() / 40_000

    torch.testing.assert_close(law(temperature=0.5), FIRST**2 / (FIRST**2).sum(), atol=0.01, rtol=0)
    nucleus = torch.tensor([5 / 8, 3 / 8, 0], dtype=torch.float64)
    torch.testing.assert_close(law(top_p=0.7), nucleus, atol=0.01, rtol=0)


def test_sampler_hands_the_last_prediction_on() -> None:
    net, g = network(self_condition=0.5, scale=0.5), torch.Generator()
    x = torch.full((64, 6), 12)
    with torch.no_grad():
        one, four = (mdlm.sample_ancestral(net, x, n, 1, 1, False, g.manual_seed(0)) for n in (1, 4))
        net.recall = None
        assert torch.equal(one, mdlm.sample_ancestral(net, x, 1, 1, 1, False, g.manual_seed(0)))
        assert not torch.equal(four, mdlm.sample_ancestral(net, x, 4, 1, 1, False, g.manual_seed(0)))


# --- SDTT -------------------------------------------------------------------------------------------------------------


def test_sdtt_target_of_a_short_step_is_the_prediction_of_one_call() -> None:
    net = network()
    tokens, t, uniform, eps = batch(64, 12)
    x = mdlm.mask_tokens(tokens, t, uniform[0], 12)
    with torch.no_grad():
        target = mdlm.sdtt_target(net, x, eps, t, 1e-12, uniform[1:])
        assert torch.equal(target, mdlm.predict(net, x, eps))
        loss = mdlm.sdtt_loss(net, net, tokens, t, 1e-12, uniform, eps)
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_sdtt_target_takes_two_equal_steps_that_end_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    stays, fill_in = [], mdlm.fill_in
    monkeypatch.setattr(mdlm, "fill_in", lambda x, p, stay, u: stays.append(stay) or fill_in(x, p, stay, u))
    t, x = torch.tensor([0.9, 0.5, 0.3, 0.01], dtype=torch.float64), torch.full((4, L), V)
    oracle = chain()
    mdlm.sdtt_target(oracle, x, torch.zeros(4, L, 0), t, 0.25, torch.rand(2, 4, L))
    middle = torch.tensor([0.65, 0.25, 0.15, 0.005], dtype=torch.float64)
    torch.testing.assert_close(stays[0], middle / t)
    assert oracle.calls == 2 and len(stays) == 1


def test_sdtt_target_is_the_prediction_that_filled_the_mask_in_or_the_second() -> None:
    x = torch.tensor([[V, V, 1, V]])
    uniform = torch.tensor([[[0.9, 0.1, 0.9, 0.1]], [[0.99, 0, 0, 0]]], dtype=torch.float64)  # the first is filled in
    t = torch.ones(1, dtype=torch.float64)
    target = mdlm.sdtt_target(chain(), x, torch.zeros(1, L, 0), t, 0.5, uniform)[0].exp()

    def given(*state: int) -> Tensor:
        return chain()(torch.tensor([state]))[0].softmax(-1)

    rarest = given(V, V, 1, V)[0].argmin().item()
    torch.testing.assert_close(target[0], given(V, V, 1, V)[0])
    torch.testing.assert_close(target[1], given(rarest, V, 1, V)[1])
    torch.testing.assert_close(target[3], NEXT[1])
    assert not torch.allclose(target[1], given(V, V, 1, V)[1], atol=0.01)


def test_sdtt_loss_is_the_divergence_of_the_student_over_its_masks() -> None:
    teacher, student = network(), network(scale=0.3)
    tokens, t, uniform, eps = batch(5, 12)
    x = mdlm.mask_tokens(tokens, t, uniform[0], 12)
    target = mdlm.sdtt_target(teacher, x, eps, t, 0.25, uniform[1:])
    p, want = mdlm.predict(student, x, eps), 0.0
    for row, place in (x == 12).nonzero().tolist():
        log_p, log_q = p[row, place], target[row, place]
        want = want + sum(log_p[j].exp() * (log_p[j] - log_q[j]) for j in range(12))
    loss = mdlm.sdtt_loss(student, teacher, tokens, t, 0.25, uniform, eps)
    torch.testing.assert_close(loss, want / 15)
    loss.backward()
    assert all(w.grad is None for w in teacher.parameters())
    assert all(w.grad is not None and w.grad.isfinite().all() for w in student.parameters())


def test_rounds_double_the_step_until_two_calls_are_left() -> None:
    args = cli.override(mdlm.Args(), {})
    steps = [mdlm.round_of(step, args.mask, args.train) for step in range(args.train.total_steps + 1)]
    assert [steps.count(r) for r in range(6)] == [500] * 5 + [501]
    assert [2**r / args.mask.calls for r in range(6)] == [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    for data in mdlm.DISTILLED:
        k = cli.override(mdlm.Args(), mdlm.SETTINGS[data] | mdlm.DISTILLED[data]).mask
        assert 2**k.rounds <= k.calls
    with pytest.raises(UserError, match="--rounds 7: the teacher's --calls 64"):
        mdlm.main(["--data", "toy", "--rounds", "7"])


# --- IMDM -------------------------------------------------------------------------------------------------------------


def test_random_masks_start_equal_to_the_mask() -> None:
    torch.manual_seed(0)
    plain, random = (mdlm.MaskedDiT(small().model, 12, n) for n in (0, 8))
    perturbed(plain, 0.3)
    random.load_state_dict(random.state_dict() | plain.state_dict())
    tokens, t, uniform, _ = batch(9, 12)
    x = mdlm.mask_tokens(tokens, t, uniform[0], 12)
    for seed in range(3):
        eps = torch.rand(9, 6, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(random(random.read(x, eps)), plain(plain.read(x, eps[..., :0])))


def test_random_masks_change_masked_positions_alone() -> None:
    net = network(noise_width=8)
    x = torch.tensor([[12, 3, 12, 0, 1, 12]])
    a, b = (net.read(x, torch.rand(1, 6, 8, dtype=torch.float64)) for _ in range(2))
    assert torch.equal(a[0, [1, 3, 4]], net.embed[[3, 0, 1]]) and torch.equal(a[0, [1, 3, 4]], b[0, [1, 3, 4]])
    assert ((a != b).all(-1) == (x == 12)).all()
    want = net.mask + net.mask_noise(torch.full((8,), -1.0, dtype=torch.float64))  # eps in [0, 1] is read as [-1, 1]
    torch.testing.assert_close(net.read(x, torch.zeros(1, 6, 8, dtype=torch.float64))[0, 0], want)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What networks have read: (x, eps) of each call."""
    found, read = [], mdlm.MaskedDiT.read
    monkeypatch.setattr(mdlm.MaskedDiT, "read", lambda net, x, eps: found.append((x, eps)) or read(net, x, eps))
    return found


def test_teacher_and_student_get_the_same_eps(seen: list[tuple[Tensor, Tensor]]) -> None:
    teacher, student = network(noise_width=8), network(noise_width=8, scale=0.3)
    tokens, t, uniform, eps = batch(5, 12, 8)
    mdlm.sdtt_loss(student, teacher, tokens, t, 0.25, uniform, eps).backward()
    assert len(seen) == 3 and all(torch.equal(read, eps) for _, read in seen)
    assert student.mask_noise[2].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_masks_that_stay_keep_their_eps_or_draw_another(seen: list[tuple[Tensor, Tensor]]) -> None:
    """Another with probability 1 - alpha_t / alpha_s; none with keep_noise."""
    net, g = network(noise_width=2), torch.Generator()
    x = torch.full((1_000, 6), 12)
    for keep in (True, False):
        seen.clear()
        mdlm.sample_ancestral(net, x, 4, 1, 1, keep, g.manual_seed(0))
        for i, ((_, before), (state, after)) in enumerate(itertools.pairwise(seen)):
            kept = (before == after).all(-1)[state == 12].double().mean().item()
            t, s = 1 - i / 4, 1 - (i + 1) / 4
            want = 1 if keep else (1 - (1 - mdlm.EPS) * t) / (1 - (1 - mdlm.EPS) * s)
            assert kept == pytest.approx(want, abs=0.03 if not keep else 0)
        assert len(seen) == 4 and 0 <= seen[3][1].min() < 0.01 and 0.99 < seen[3][1].max() <= 1


# --- arguments and shared text ----------------------------------------------------------------------------------------

SCRIPT = Path(mdlm.__file__)
SHARED = {
    *("Block", "DiT", "ShortConv", "TimeEmbedding", "TrainArgs", "attention", "draw", "learning_rate", "recalled"),
    *("makes_two_passes", "rotate", "stratified_times", "zero"),
}


def test_text_shared_with_flm_train_is_identical() -> None:
    """The network but for the rows' scaling, whose place here is empty."""
    ours, theirs = definitions(mdlm), definitions(flm)
    scaling = theirs["DiT"][theirs["DiT"].index("    @torch.no_grad()") : theirs["DiT"].index("    def trunk")]
    theirs["DiT"] = theirs["DiT"].replace(scaling, "")
    assert {name for name in SHARED if ours[name] != theirs[name]} == set()


@torch.no_grad()
def test_only_convolutions_show_positions_in_a_row_of_masks() -> None:
    """Rotary positions are relative, and the mean of equal values is the same everywhere; random masks differ."""
    x = torch.full((1, 6), 12)
    for conv, noise_width, shown in ((0, 0, False), (3, 0, True), (0, 8, True)):
        net = network(conv=conv, noise_width=noise_width)
        logits = net(net.read(x, torch.rand(1, 6, noise_width, dtype=torch.float64)))[0]
        assert torch.allclose(logits, logits[:1].expand_as(logits)) != shown


def test_network_has_the_weights_of_flm_and_a_mask() -> None:
    m, n = small().model, small(self_condition=0.5).model
    for model, of in ((m, flm.DiT(m, 50)), (n, flm.DiT(n, 50))):
        ours = mdlm.MaskedDiT(model, 50)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in of.parameters()) + m.width
    torch.manual_seed(3)
    one = mdlm.MaskedDiT(m, 50).state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(one[name], value) for name, value in flm.DiT(m, 50).state_dict().items())


def test_default_args_are_those_of_flm_train() -> None:
    for data in ("austen", *mdlm.SETTINGS):
        ours, theirs = cli.flatten(mdlm.default_args(data=data)), cli.flatten(flm.default_args(data))
        own = {"steps", "top_p", "temperature", "self_condition", *(("conv",) if data == "toy" else ())}
        assert {k: ours[k] for k in ours.keys() & theirs.keys() - own} == {
            k: theirs[k] for k in ours.keys() & theirs.keys() - own
        }
        assert ours["loss"] == ("elbo" if data in ("lm1b", "openwebtext") else "ce") and ours["temperature"] == 1


def test_sampler_tag_names_what_is_not_usual() -> None:
    tags = [mdlm.sampler_tag(small(**how).sample) for how in ({}, {"temperature": 0.8}, {"keep_noise": True})]
    assert tags == ["", "_t0.8_p1", "_t1_p1_kept"]


# --- whole runs -------------------------------------------------------------------------------------------------------


TINY = [*SMALL, "--eval-every", "6", "--checkpoint-every", "5", "--noise-width", "8"]


class Anyone:
    """A judge to whom all texts are the same."""

    name = "anyone"

    def perplexity(self, texts: list[str], max_length: int) -> float:
        return 1.0


def places(folder: Path) -> list[str]:
    return ["--run-dir", str(folder), "--data-dir", str(folder)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Runs without what is tested elsewhere: the speed of products, the evaluation, its many times and masks."""
    validate = mdlm.validate
    patch.setattr(Meter, "_seconds", lambda *_: 1.0)
    patch.setattr(TextRun, "evaluate", lambda *_: None)
    for module in (mdlm, flm):
        patch.setattr(module, "load_judge", lambda *_: Anyone())
    patch.setattr(mdlm, "validate", lambda net, rows, args, **_: validate(net, rows, args, count=64))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of 12 steps."""
    folder = tmp_path_factory.mktemp("mdlm")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        mdlm.main([*TINY, *places(folder), "--total-steps", "12", "--run-name", "base", "--dropout", "0.1"])
    return folder / "base"


def test_run_logs_and_evaluates(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_metrics(base)
    assert len(losses(base)) == 12 and losses(base)[-1] < losses(base)[0]
    valid = [row for row in rows if "valid/elbo" in row]
    assert len(valid) == 2 and all(0 < row["valid/ce"] < math.log(18) + 0.1 for row in valid)
    assert json.loads((base / "likelihood.json").read_text()) == {k: valid[-1][k] for k in ("valid/ce", "valid/elbo")}
    (base / "likelihood.json").unlink()  # an evaluation makes it where it is missing, and only there
    mdlm.main(["--eval", str(base), "--steps", "1", "3", "--temperature", "0.5", *places(base.parent)])
    found, out = json.loads((base / "likelihood.json").read_text()), capsys.readouterr().out
    assert valid[-1]["valid/ce"] == pytest.approx(found["valid/ce"], rel=0.02)  # of more times and rows
    assert "| 3 steps |" in out and f"valid/elbo {found['valid/elbo']:.4f}" in out
    mdlm.main(["--eval", str(base), "--steps", "1", "--temperature", "0.6", *places(base.parent)])
    assert "valid/elbo" not in capsys.readouterr().out
    scores = json.loads((base / "evaluation_ngram_t0.5_p1.json").read_text())
    assert [score["text"] for score in scores] == ["1 steps", "3 steps", "real text"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("flags", [[], ["--distill"]])
def test_run_stopped_and_resumed_ends_with_the_same_bits(
    base: Path, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a distillation with random masks in its second of three rounds, without its teacher's folder."""
    if flags:
        flags = ["--distill", str(base), "--random-mask", "--rounds", "3", "--calls", "8"]
    flags = [*TINY, *places(tmp_path), "--total-steps", "12", "--eval-every", "12", "--dropout", "0.1", *flags]
    flags += ["--run-name"]
    mdlm.main([*flags, "whole"])
    log_training = TextRun.log_training

    def log_and_stop(run: TextRun, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        log_training(run, metrics, speed)
        if run.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TextRun, "log_training", log_and_stop)
        mdlm.main([*flags, "cut"])
    assert checkpoint.load(tmp_path / "cut" / "checkpoint.pt")["step"] == 7
    with monkeypatch.context() as patch:
        patch.setattr(mdlm, "load_run", None)
        mdlm.main(["--resume", str(tmp_path / "cut")])
    whole, cut = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    for part in ("net", "ema", *(["teacher"] if whole["teacher"] else [])):
        assert all(torch.equal(whole[part][name], cut[part][name]) for name in whole[part])
    assert len(timeless(tmp_path / "whole")) > 12 and timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


@pytest.mark.usefixtures("quick")
def test_student_starts_as_the_averaged_teacher_and_is_the_next_teacher(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--distill", str(base), "--run-dir", str(tmp_path), "--data-dir", str(base.parent), "--threads", "1"]
    flags += ["--random-mask", "--noise-width", "8", "--batch", "8", "--samples", "8", "--steps", "1"]
    still = ["--total-steps", "1", "--lr", "0", "--run-name", "still"]
    mdlm.main([*flags, *still])
    teacher, student = (checkpoint.load(path / "checkpoint.pt") for path in (base, tmp_path / "still"))
    assert student["args"]["layers"] == 1 and student["args"]["data"] == "toy"  # taken over
    for name, value in teacher["ema"].items():
        assert torch.equal(student["net"][name], value) and torch.equal(student["ema"][name], value)
    assert {n for n in student["net"].keys() - teacher["net"].keys()} == {
        f"mask_noise.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    equal, log_training = [], TextRun.log_training

    def compare(run: TextRun, *values: Any) -> None:
        net, of = (run.parts[name].state_dict() for name in ("net", "teacher"))
        equal.append(all(torch.equal(net[name], of[name]) for name in net))
        log_training(run, *values)

    monkeypatch.setattr(TextRun, "log_training", compare)
    rounds = ["--rounds", "3", "--calls", "8", "--total-steps", "6", "--log-every", "1", "--run-name", "moves"]
    mdlm.main([*flags, *rounds])
    assert equal == [False, True, False, True, False, False]


@pytest.mark.usefixtures("quick")
def test_main_refuses_runs_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    record.reserve(tmp_path, "flow", False, (flm.DiT, flm.Clock), {})
    checkpoint.save(tmp_path / "checkpoint.pt", {"args": {"data": "toy"}, "step": 1})
    for flags, words in (
        (["--distill", str(tmp_path / "flow")], "is a run of flm_train.py, whose networks are others"),
        (["--eval", str(tmp_path / "flow")], "is a run of flm_train.py, whose networks are others"),
        (["--distill", str(tmp_path)], "holds no weights of this network"),
        (["--distill", "nowhere"], "no checkpoint at nowhere"),
        (["--distill", str(base), "--layers", "2"], "holds no weights of this network"),
        (["--resume", str(base), "--random-mask"], "--random-mask: the run was started with False"),
    ):
        more = [] if "--resume" in flags else ["--run-dir", str(tmp_path), "--data-dir", str(base.parent)]
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            mdlm.main([*flags, *more])
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_train_in_several_processes_gives_the_losses_of_one(base: Path, tmp_path: Path) -> None:
    distil = ["--distill", str(base), "--random-mask", "--noise-width", "8", "--rounds", "3", "--calls", "8"]
    for kind, flags in (("train", []), ("distil", distil)):
        for name, processes in (("one", 0), ("two", 2)):
            flags_of_run = [*SMALL, *flags, "--total-steps", "20", "--run-name", f"{kind}_{name}"]
            run(tmp_path, "baselines/mdlm.py", *flags_of_run, processes=processes)
        one, two = (losses(tmp_path / f"{kind}_{name}") for name in ("one", "two"))
        assert len(one) == 20 and one == pytest.approx(two, abs=1e-5)


def least_distance_of_one_call() -> float:
    """Of independent words from the toy language, seen through the number of determiner, noun and verb alone."""
    singular = sum(p for words, p in toy_probabilities().items() if words[0] == 0)
    a = torch.linspace(0, 1, 101, dtype=torch.float64)
    a, b, c = torch.meshgrid(a, a, a, indexing="ij")
    agree, other = a * b * c, (1 - a) * (1 - b) * (1 - c)
    wrong = 1 - agree - other
    return (0.5 * ((agree - singular).abs() + (other - (1 - singular)).abs() + wrong)).min().item()


@pytest.mark.slow
def test_train_learns_the_toy_language_and_distillation_writes_sentences_in_one_call(tmp_path: Path) -> None:
    """Many calls of MDLM have the law; one call of a student has its sentences, and the bound of independent words."""
    flags = ["--threads", "1", "--steps", "1", "2", "32", "--run-name"]
    base = run(tmp_path, "baselines/mdlm.py", "--data", "toy", *flags, "base").stdout
    student = run(tmp_path, "baselines/mdlm.py", "--distill", str(tmp_path / "base"), *flags, "student").stdout

    def distance(text: str, calls: int) -> float:
        return float(re.search(rf"^{calls} steps: total variation .* (\d\.\d+)", text, re.MULTILINE)[1])

    def sentences(text: str, calls: int) -> float:
        """Share of samples that are among the training rows, in percent."""
        return float(re.search(rf"^\| {calls} steps .* (\S+)% \|", text, re.MULTILINE)[1])

    assert distance(base, 32) < 0.15 and distance(base, 1) > 0.6 and sentences(base, 1) < 40
    assert sentences(student, 1) > 70 and sentences(student, 2) > sentences(base, 2) + 10
    assert least_distance_of_one_call() - 0.03 < distance(student, 1) < distance(base, 1) - 0.1
