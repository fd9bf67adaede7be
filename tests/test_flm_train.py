"""flm_train.py against closed forms: one token with known distribution pi, whose exact denoiser is a softmax."""

import ast
import math
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flm_train as flm
from common import checkpoint, cli, machine
from common.errors import UserError
from common.runlog import read_metrics
from common.tensors import interpolate
from common.text_run import check_fit
from tests.helpers import differing
from variants import flm_ablations, flm_sampling

SCRIPT = Path(flm.__file__)
PI = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
V = len(PI)
CLOCK = flm.Clock(flm.accuracy_table(V))


class Oracle(nn.Module):
    """D_t(x) = softmax(log pi + t x / (1 - t)^2) as a network: logits from x and tau."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.eye(V, dtype=torch.float64))
        self.blocks = nn.ModuleList()
        self.recall = None

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        t = CLOCK.t(tau)[:, None, None]
        return PI.log() + t * x / (1 - t) ** 2


def small(module: ModuleType = flm, **changes: object) -> flm.Args:
    values = dict(layers=2, width=32, heads=2, cond_width=16, length=6, precision="fp32", space="onehot", batch=16)
    return cli.override(module.Args(), values | changes)


def tau_at(t: Tensor, clock: flm.Clock) -> Tensor:
    return interpolate(t, clock.table[0], clock.table[1])


def perturbed(net: nn.Module, scale: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return net


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "values"),
    [  # tau -> t, computed by adaptive quadrature
        (30_522, {0.01: 0.6312, 0.05: 0.7069, 0.1: 0.7359, 0.3: 0.7812, 0.5: 0.8045, 0.7: 0.8233, 0.9: 0.8450,
                  0.95: 0.8537, 0.99: 0.8676, 0.999: 0.8805}),
        (50_258, {0.01: 0.6465, 0.05: 0.7166, 0.1: 0.7438, 0.3: 0.7866, 0.5: 0.8087, 0.7: 0.8268, 0.9: 0.8477,
                  0.95: 0.8560, 0.99: 0.8695, 0.999: 0.8820}),
    ],
)  # fmt: skip
def test_clock_t_at_given_decoding_accuracy(vocab: int, values: dict[float, float]) -> None:
    clock = flm.Clock(flm.accuracy_table(vocab))
    tau = torch.tensor(list(values), dtype=torch.float64)
    want = torch.tensor(list(values.values()), dtype=torch.float64)
    torch.testing.assert_close(clock.t(tau), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(tau_at(clock.t(tau), clock), tau, atol=1e-9, rtol=0)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(clock.t(ends), ends) and torch.equal(tau_at(ends, clock), ends)


@pytest.mark.parametrize("vocab", [2, 5, 200])
def test_accuracy_table_by_monte_carlo(vocab: int) -> None:
    """The argmax of t e_y + (1 - t) eps is y with probability 1/V + (1 - 1/V) tau."""
    clock, generator, n = flm.Clock(flm.accuracy_table(vocab)), torch.Generator().manual_seed(0), 40_000
    for tau in (0.1, 0.5, 0.9):
        t = clock.t(torch.tensor(tau, dtype=torch.float64)).item()
        x = (1 - t) * torch.randn(n, vocab, generator=generator)
        x[:, 0] += t
        want = 1 / vocab + (1 - 1 / vocab) * tau
        error = math.sqrt(want * (1 - want) / n)
        assert (x.argmax(-1) == 0).double().mean().item() == pytest.approx(want, abs=4 * error)


def test_accuracy_table_of_two_tokens_has_a_closed_form() -> None:
    """V = 2: q = Phi(m / sqrt 2) with m = t / (1 - t)."""
    t = torch.linspace(0.01, 0.9, 50, dtype=torch.float64)
    q = torch.special.ndtr(t / (1 - t) / math.sqrt(2))
    torch.testing.assert_close(tau_at(t, flm.Clock(flm.accuracy_table(2))), 2 * q - 1, atol=1e-7, rtol=0)


def test_stratified_times_cover_the_global_batch() -> None:
    tau = flm.stratified_times(7, 64, seed=3)
    assert torch.equal((tau * 64).long().sort().values, torch.arange(64))
    assert not torch.equal(tau, flm.stratified_times(8, 64, seed=3))
    assert not torch.equal(tau, tau.sort().values)


# --- network ----------------------------------------------------------------------------------------------------------


def test_flm_loss_is_ln_v_at_the_start() -> None:
    args = small()
    net = flm.DiT(args.model, 50)
    tokens = torch.randint(0, 50, (4, 6))
    loss = flm.flm_loss(net, tokens, torch.rand(4), torch.rand(4), torch.randn(4, 6, 50), args.flow)
    assert loss.item() == pytest.approx(math.log(50), abs=1e-5)


def test_dit_has_the_published_number_of_parameters() -> None:
    m = cli.override(flm.default_args("lm1b"), {}).model
    with torch.device("meta"):
        net = flm.DiT(m, 30_522)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(139.29e6, abs=5e3)


def test_scale_rows_shows_more_of_the_token() -> None:
    """Norms go with sqrt(frequency), Frobenius norm stays; the share of x E's signal that noise leaves is p-weighted
    mean of e_y^T E (E^T E)^-1 E^T e_y, d / V for random rows."""
    torch.manual_seed(0)
    net, vocab = flm.DiT(small().model, 2_000), 2_000
    count = (100_000 / torch.arange(1, vocab + 1)).long()  # Zipf's law

    def signal() -> float:
        e = net.embed.detach().double()
        share = (e @ torch.linalg.inv(e.mT @ e) * e).sum(-1)
        return (share * count / count.sum()).sum().item()

    with torch.no_grad():
        net.embed /= net.embed.norm(dim=-1, keepdim=True)
    before, signal_before = net.embed.square().sum().item(), signal()
    net.scale_rows(count)
    norm = net.embed.detach().norm(dim=-1)
    assert (norm[0] / norm[99]).item() == pytest.approx(math.sqrt(100_001 / 1_001), rel=1e-4)
    assert net.embed.square().sum().item() == pytest.approx(before, rel=1e-4)
    assert signal_before == pytest.approx(32 / vocab, rel=0.1) and signal() > 10 * signal_before


def test_dit_caps_logits_and_sees_positions_and_time() -> None:
    args = small(logit_cap=2.0)
    net = perturbed(flm.DiT(args.model, 50), 0.5).eval()
    h, tau = 3 * torch.randn(2, 6, 32), torch.rand(2)
    out = net(h, tau)
    assert out.abs().max() <= 2.0
    assert not torch.allclose(net(h.flip(1), tau), out.flip(1), atol=1e-3)  # rotary embedding
    assert not torch.allclose(net(h, 1 - tau), out, atol=1e-3)


def test_attention_caps_scores() -> None:
    q, k, v = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    scores = q @ k.mT / math.sqrt(8)
    want = (0.5 * torch.tanh(scores / 0.5)).softmax(-1) @ v
    torch.testing.assert_close(flm.attention(q, k, v, 0.5), want)
    torch.testing.assert_close(flm.attention(q, k, v, 0.0), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("units", [True, False])
def test_use_bf16_follows_the_hardware(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPU_BF16", units)
    torch.manual_seed(0)
    net = perturbed(flm.DiT(small(precision="auto").model, vocab=11))
    x, tau = torch.randn(2, 6, 32), torch.rand(2)
    outputs = {}
    for precision in ("auto", "bf16", "fp32"):
        net.precision = precision
        outputs[precision] = net(x, tau)
    assert outputs["auto"].equal(outputs["bf16" if units else "fp32"])
    assert not outputs["bf16"].equal(outputs["fp32"])
    assert machine.use_bf16("auto", torch.device("cuda"))


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "changes"), [(flm, {}), (flm_ablations, {}), (flm_ablations, {"softmax": False})])
def test_flm_loss_is_the_plain_formula(module: ModuleType, changes: dict) -> None:
    args = small(module, **changes)
    net = perturbed(flm.DiT(args.model, 12))
    tokens, tau, t, xi = torch.randint(0, 12, (5, 6)), torch.rand(5), torch.rand(5), torch.randn(5, 6, 12)
    onehot = F.one_hot(tokens, 12).float()
    out = net(((1 - t[:, None, None]) * xi + t[:, None, None] * onehot) @ net.embed, tau)
    if module is flm:
        want = F.cross_entropy(out.flatten(0, 1), tokens.flatten())
    else:
        out = out.softmax(-1) if args.flow.softmax else out
        want = (out - onehot).square().sum(-1).mean()
    torch.testing.assert_close(module.flm_loss(net, tokens, tau, t, xi, args.flow), want)


def test_denoise_and_loss_of_a_velocity() -> None:
    args = small(flm_ablations, predict="velocity")
    net = perturbed(flm.DiT(args.model, 12))
    tokens, tau, t, xi = torch.randint(0, 12, (5, 6)), torch.rand(5), torch.rand(5), torch.randn(5, 6, 12)
    onehot, s = F.one_hot(tokens, 12).float(), t[:, None, None]
    x = (1 - s) * xi + s * onehot
    loss = flm_ablations.flm_loss(net, tokens, tau, t, xi, args.flow)
    torch.testing.assert_close(loss, (net(x @ net.embed, tau) - (onehot - xi)).square().sum(-1).mean())
    exact = x + (1 - s) * (onehot - xi)  # what the denoiser is if the velocity is right
    torch.testing.assert_close(exact, onehot)
    probs = flm_ablations.denoise(net, x @ net.embed, x, tau, t, args.flow)
    torch.testing.assert_close(probs, x + (1 - s) * net(x @ net.embed, tau))


@pytest.mark.parametrize("space", ["embedding", "onehot"])
def test_flm_loss_by_rows_changes_nothing(space: str) -> None:
    args = small(space=space, width=8, heads=1, self_condition=0.5)
    net = perturbed(flm.DiT(args.model, 12))
    width = flm.make_space(net, space).width
    batch = (torch.randint(0, 12, (5, 6)), torch.rand(5), torch.rand(5), torch.randn(5, 6, width))
    gradients = []
    for rows in (0, 2):
        loss = flm.flm_loss(net, *batch, args.flow, rows, twice=True)
        gradients.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# --- embedding space --------------------------------------------------------------------------------------------------


def test_gram_noise_has_the_law_of_projected_noise() -> None:
    torch.manual_seed(0)
    embed = torch.randn(40, 5, dtype=torch.float64)
    noise = flm.EmbeddingSpace(embed).noise(torch.randn(200_000, 5, dtype=torch.float64))
    gram = embed.T @ embed
    assert (noise.T @ noise / len(noise) - gram).norm() / gram.norm() < 0.02


def test_gram_noise_gradient_is_the_conditional_mean_of_the_dense_one() -> None:
    """For xi = eps E L^-T the backward equals eps^T g projected on the span of E, where the rest has mean 0."""
    torch.manual_seed(0)
    embed = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    eps, g = torch.randn(64, 30, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    chol = torch.linalg.cholesky(embed.mT @ embed).detach()
    xi = torch.linalg.solve_triangular(chol, (eps @ embed.detach()).mT, upper=False).mT
    noise = flm.EmbeddingSpace(embed).noise(xi)
    torch.testing.assert_close(noise, eps @ embed)  # the same noise
    (ours,) = torch.autograd.grad((noise * g).sum(), embed)
    span = torch.linalg.qr(embed.detach()).Q
    torch.testing.assert_close(ours, span @ span.mT @ (eps.mT @ g))


def test_flm_loss_gradients_of_both_spaces_agree_in_expectation() -> None:
    torch.manual_seed(0)
    args = small(width=8, heads=1, length=3)
    net = perturbed(flm.DiT(args.model, 30).double(), 0.3)
    tokens = torch.randint(0, 30, (512, 3))
    means, errors = [], []
    for space in ("onehot", "embedding"):
        f = cli.override(args, {"space": space}).flow
        width, grads = flm.make_space(net, space).width, []
        for _ in range(40):
            t = torch.rand(512, dtype=torch.float64)
            loss = flm.flm_loss(net, tokens, t, t, torch.randn(512, 3, width, dtype=torch.float64), f)
            grads.append(torch.autograd.grad(loss, net.embed)[0])
        grads = torch.stack(grads)
        means.append(grads.mean(0))
        errors.append(grads.var(0) / len(grads))
    z = (means[0] - means[1]) / (errors[0] + errors[1]).sqrt()
    assert z.mean().abs() < 0.3 and 0.8 < z.std() < 1.2
    assert errors[1].sum() < 0.7 * errors[0].sum()  # and less variance


def test_sample_euler_writes_identical_tokens_in_both_spaces() -> None:
    torch.manual_seed(0)
    net = perturbed(flm.DiT(small(width=16, heads=1).model, 40).double(), 0.3).eval()
    x = torch.randn(8, 6, 40, dtype=torch.float64)
    clock = flm.Clock(flm.accuracy_table(40))
    with torch.no_grad():
        for steps in (1, 3, 16):
            plain = flm.sample_euler(net, x, steps, clock, flm.OneHotSpace(net.embed))
            projected = flm.sample_euler(net, x @ net.embed, steps, clock, flm.EmbeddingSpace(net.embed))
            assert torch.equal(plain, projected)
    assert len(plain.unique()) > 1


# --- samplers against the exact denoiser ------------------------------------------------------------------------------


@torch.no_grad()
def frequencies(tokens: Tensor) -> Tensor:
    return torch.bincount(tokens.flatten(), minlength=V).double() / tokens.numel()


@torch.no_grad()
def test_sample_euler_with_the_exact_denoiser_samples_pi() -> None:
    net = Oracle()
    x = torch.randn(40_000, 1, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = frequencies(flm.sample_euler(net, x, 128, CLOCK, flm.OneHotSpace(net.embed)))
    assert (got - PI).abs().max() < 0.01
    one = flm.sample_euler(net, x, 1, CLOCK, flm.OneHotSpace(net.embed))
    assert (one == 0).all()  # one step writes the most frequent token everywhere


@torch.no_grad()
def test_temperature_sharpens_the_law() -> None:
    net, space = Oracle(), flm.OneHotSpace(torch.eye(V, dtype=torch.float64))
    x = torch.randn(20_000, 1, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entropies = []
    for temperature in (1.0, 0.6, 0.3):
        p = frequencies(flm.sample_euler(net, x, 32, CLOCK, space, temperature=temperature))
        entropies.append(-torch.special.xlogy(p, p).sum().item())
    assert entropies[0] > entropies[1] + 0.02 > entropies[2] + 0.04


def test_temperature_falls_evenly_with_tau() -> None:
    logits, tau = torch.randn(3, 2, 5), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    expected = logits / torch.tensor([1.0, 0.8, 0.6])[:, None, None]
    torch.testing.assert_close(flm.cooled(logits, tau, 0.6), expected)
    torch.testing.assert_close(flm.cooled(logits[1:2], tau[1], 0.6), expected[1:2])


# --- short convolutions and self-conditioning -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 4, 7])
def test_short_conv_is_a_residual_depthwise_convolution(width: int) -> None:
    torch.manual_seed(0)
    conv, x = perturbed(flm.ShortConv(8, width)), torch.randn(2, 5, 8)
    padded = F.pad(x.mT, (width // 2, (width - 1) // 2))
    expected = x + F.conv1d(padded, conv.weight.T[:, None], conv.bias, groups=8).mT
    torch.testing.assert_close(conv(x), expected)


def test_network_of_the_paper_has_no_further_weights() -> None:
    plain, more = (flm.DiT(small(**how).model, V) for how in ({"conv": 0, "self_condition": 0.0}, {}))
    further = {name.split(".")[-2] for name in more.state_dict().keys() - plain.state_dict().keys()}
    assert further == {"conv1", "conv2", "recall"} and not plain.state_dict().keys() - more.state_dict().keys()


@pytest.mark.parametrize("rows", [0, 3])
def test_second_pass_reads_the_first_prediction_and_sends_no_gradient_into_it(rows: int) -> None:
    torch.manual_seed(0)
    args = small(conv=3, self_condition=0.5)
    net = perturbed(flm.DiT(args.model, 30).double(), 0.3)
    tokens, t, xi = torch.randint(0, 30, (4, 6)), torch.rand(4).double(), torch.randn(4, 6, 30).double()
    h = flm.interpolant(flm.OneHotSpace(net.embed), tokens, xi, t) @ net.embed
    first = (net(h, t).softmax(-1) @ net.embed).detach()
    expected = F.cross_entropy(net(h + net.recall(first), t).flatten(0, 1), tokens.flatten())
    loss = flm.flm_loss(net, tokens, t, t, xi, args.flow, rows, twice=True)
    torch.testing.assert_close(loss, expected)
    weights = list(net.parameters())
    for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_share_of_the_steps_with_two_passes() -> None:
    for share in (0.0, 0.25, 1.0):
        drawn = np.mean([flm.makes_two_passes(step, share, seed=1) for step in range(2_000)])
        assert drawn == pytest.approx(share, abs=0.03 if 0 < share < 1 else 0)


@torch.no_grad()
def test_sampler_hands_the_last_prediction_on_in_both_spaces() -> None:
    torch.manual_seed(0)
    net = perturbed(flm.DiT(small(width=16, heads=1, conv=3, self_condition=0.5).model, 40).double(), 0.3).eval()
    x, clock = torch.randn(8, 6, 40, dtype=torch.float64), flm.Clock(flm.accuracy_table(40))
    plain = flm.sample_euler(net, x, 8, clock, flm.OneHotSpace(net.embed))
    projected = flm.sample_euler(net, x @ net.embed, 8, clock, flm.EmbeddingSpace(net.embed))
    assert torch.equal(plain, projected)
    net.recall = None
    assert not torch.equal(plain, flm.sample_euler(net, x, 8, clock, flm.OneHotSpace(net.embed)))


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sample_bridge_samples_pi_in_any_number_of_steps(steps: int) -> None:
    net, generator = Oracle(), torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 1, V, generator=generator, dtype=torch.float64)
    tokens = flm.sample_bridge(net, x, steps, CLOCK, flm.OneHotSpace(net.embed), 1.0, 1.0, generator)
    assert (frequencies(tokens) - PI).abs().max() < 0.01


def test_bridge_coefficients_keep_the_interpolant() -> None:
    """a x_t + b x_1 + sqrt(v) noise has the law of the interpolant at the next time when x_t has that at t."""
    t, t_next = (torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.8))
    a, b, v = flm.bridge_coefficients(t, t_next)
    assert (a * t + b).item() == pytest.approx(t_next.item())
    assert (a**2 * (1 - t) ** 2 + v).item() == pytest.approx((1 - t_next.item()) ** 2)


def test_draw_by_enumeration() -> None:
    probs = torch.tensor([0.1, 0.5, 0.25, 0.15])
    uniform = torch.linspace(0.0005, 0.9995, 1000)

    def share(**how: float) -> Tensor:
        return torch.bincount(flm.draw(probs.expand(1000, 4), uniform, **how), minlength=4) / 1000

    torch.testing.assert_close(share(top_p=1.0), probs, atol=2e-3, rtol=0)
    nucleus = torch.tensor([0.0, 2 / 3, 1 / 3, 0.0])
    torch.testing.assert_close(share(top_p=0.7), nucleus, atol=2e-3, rtol=0)
    assert share(top_p=0.0)[1] == 1


def test_sampling_variant_knows_every_argument_of_a_run_of_the_script() -> None:
    assert cli.flatten(flm.Args()).keys() <= cli.flatten(flm_sampling.Args()).keys()


@torch.no_grad()
def test_guided_leaves_the_weak_network_behind() -> None:
    net = perturbed(flm.DiT(small().model, 12), 0.3).eval()
    x, tau, space = torch.randn(4, 6, 12), torch.full((4,), 0.5), flm.OneHotSpace(net.embed)

    def run(**changes: float) -> Tensor:
        return flm_sampling.guided(net, space.read(x), tau, small(flm_sampling, **changes).sample).softmax(-1)

    strong = run()
    torch.testing.assert_close(run(guidance=3.0, guidance_dropout=0.0), strong)
    torch.manual_seed(0)
    weak = run(guidance=0.0, guidance_dropout=0.5)
    torch.manual_seed(0)
    apart = (weak + 3 * (strong - weak)).clamp(min=0)
    torch.testing.assert_close(run(guidance=3.0, guidance_dropout=0.5), apart / apart.sum(-1, keepdim=True))
    assert not torch.allclose(weak, strong) and torch.equal(run(), strong)


# --- training ---------------------------------------------------------------------------------------------------------


def test_train_in_pieces_gives_the_steps_of_the_whole_batch(tmp_path: Path) -> None:
    flags = ["--data", "toy", "--layers", "1", "--width", "32", "--batch", "16", "--total-steps", "5", "--threads", "1"]
    flags += ["--log-every", "1", "--samples", "4", "--steps", "1", "--run-dir", str(tmp_path), "--lr", "1e-3"]
    runs = {"whole": ["--micro-batch", "0"], "parts": ["--micro-batch", "6", "--loss-rows", "2"]}
    losses, weights = {}, {}
    for name, pieces in runs.items():
        flm.main([*flags, "--data-dir", str(tmp_path), "--run-name", name, *pieces])
        losses[name] = [row["train/loss"] for row in read_metrics(tmp_path / name) if "train/loss" in row]
        weights[name] = checkpoint.load(tmp_path / name / "checkpoint.pt")["net"]
    assert len(losses["whole"]) == 5 and losses["parts"] == pytest.approx(losses["whole"], abs=1e-5)
    for name, value in weights["whole"].items():
        torch.testing.assert_close(value, weights["parts"][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("module", "changes", "name", "want"),
    [
        (flm, {}, "valid/ce", math.log(64)),  # an untrained network is uniform
        (flm_ablations, {}, "valid/ce", math.log(64)),
        (flm_ablations, {"softmax": False}, "valid/mse", 1.0),  # ... or zero: the one-hot is the whole error
        (flm_ablations, {"predict": "velocity"}, "valid/mse", None),
    ],
)
def test_validate_gives_cross_entropy_only_of_distributions(
    module: ModuleType, changes: dict, name: str, want: float | None
) -> None:
    args = small(module, **changes)
    net, clock = flm.DiT(args.model, 64), flm.Clock(flm.accuracy_table(64))
    rows = np.random.default_rng(0).integers(0, 64, (256, 6)).astype(np.uint16)
    out = module.validate(net, rows, clock, args)
    assert list(out) == [name, *(f"{name}_quarter{i}" for i in range(1, 5))]
    if want is None:  # D = x at zero velocity, D - x_1 = (1 - t)(x_0 - x_1): (1 - t)^2 (V + 1) on average
        t = clock.t((torch.arange(256, dtype=torch.float64) + 0.5) / 256)
        want = float(((1 - t) ** 2).mean() * 65)
    assert out[name] == pytest.approx(want, rel=0.02)


def test_learning_rate_warms_up_and_decays() -> None:
    a = small(lr=1.0, warmup=10, total_steps=100, decay=0.2).train
    rates = [flm.learning_rate(k, a) for k in range(100)]
    assert rates[0] == 0.1 and rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": "embedding", "width": 64}, "--space embedding needs"),
        ({"heads": 3}, "--width 32"),
        ({"processes": 3}, "--batch 16"),
        ({"steps": (4, 0)}, "--steps 0"),
    ],
)
def test_check_fit_says_what_cannot_work(changes: dict, words: str) -> None:
    sizes = dict(space="onehot", vocab=50, width=32, heads=2, batch=16, processes=2, steps=(1, 4))
    check_fit(**sizes)
    with pytest.raises(UserError, match=words):
        check_fit(**sizes | changes)


def test_main_of_the_ablations_refuses_a_velocity_in_embedding_space() -> None:
    with pytest.raises(UserError, match="--predict velocity needs --space onehot"):
        flm_ablations.main(["--predict", "velocity"])


# --- arguments and copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["austen", *flm.SETTINGS])
def test_default_args_are_the_same_on_every_device(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = []
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        values.append([module.default_args(data) for module in (flm, flm_ablations, flm_sampling)])
    assert values[0] == values[1]


@pytest.mark.parametrize("module", [flm, flm_ablations, flm_sampling])
def test_args_are_documented_and_read(module: ModuleType) -> None:
    """Every flag has its comment, and is read in the script or by name where a run starts."""
    script, flags = Path(module.__file__), cli.flatten(module.Args())
    tree, start = ast.parse(script.read_text()), ast.parse((SCRIPT.parent / "common" / "start.py").read_text())
    reads = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    reads |= {n.value for n in ast.walk(start) if isinstance(n, ast.Constant)}
    assert [f for f in flags if f not in reads] == []
    lines = script.read_text().splitlines()
    fields = [
        n for c in tree.body if isinstance(c, ast.ClassDef) and c.name.endswith("Args")
        for n in c.body if c.name != "Args" and isinstance(n, ast.AnnAssign)
    ]  # fmt: skip
    assert {n.target.id for n in fields} == set(flags)
    assert [n.target.id for n in fields if "  # " not in lines[n.end_lineno - 1]] == []


@pytest.mark.parametrize(("script", "limit"), [("flm_train.py", 690), ("fmlm_distill.py", 710)])
def test_main_scripts_can_be_read_in_one_go(script: str, limit: int) -> None:
    assert len((SCRIPT.parent / script).read_text().splitlines()) <= limit


@pytest.mark.parametrize(
    ("variant", "own"),
    [
        (
            flm_ablations,
            {"RunArgs", "FlowArgs", "SampleArgs", "flm_loss", "denoise", "sample_euler", "generate", "validate", "main"}
            | {"sampler_tag", "draw", "bridge_coefficients", "sample_bridge", "cooled", "PAPER"},
        ),
        (
            flm_sampling,
            {"SampleArgs", "guided", "sample_bridge", "sample_euler", "generate", "sampler_tag"},
        ),
    ],
)
def test_variants_of_flm_train_are_short_diffs(variant: ModuleType, own: set[str]) -> None:
    changed = differing(flm, variant)
    assert changed == own, f"{changed ^ own}: carry a change of the script with python tools/carry.py flm_train.py"
    printed = subprocess.run(["diff", SCRIPT, variant.__file__], capture_output=True, text=True).stdout
    assert 50 < len(printed.splitlines()) < 210
