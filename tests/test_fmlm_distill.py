"""fmlm_distill.py against the exact flow map of one token with known distribution pi."""

import ast
import math
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flm_train as flm
import fmlm_distill as fmlm
from common import cli
from tests.helpers import differing
from variants import fmlm_recipes, fmlm_two_stage

SCRIPT = Path(fmlm.__file__)
PI = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
V = len(PI)
CLOCK = fmlm.Clock(fmlm.accuracy_table(V))
SPACE = fmlm.OneHotSpace(torch.eye(V, dtype=torch.float64))


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    """D_t(x) = softmax(log pi + t x / (1 - t)^2)"""
    return (PI.log() + t * x / (1 - t) ** 2).softmax(-1)


def flow(x: Tensor, s: Tensor, t: Tensor, steps: int = 400) -> Tensor:
    """X_{s,t}(x) by Runge-Kutta on dx/dt = (D - x) / (1 - t)."""
    h = (t - s) / steps

    def b(x: Tensor, r: Tensor) -> Tensor:
        return (denoiser(x, r) - x) / (1 - r)

    for i in range(steps):
        r = s + i * h
        k1 = b(x, r)
        k2 = b(x + h / 2 * k1, r + h / 2)
        k3 = b(x + h / 2 * k2, r + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + b(x + h * k3, r + h))
    return x


def exact_student(x: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
    """log delta_{s,t}(x), delta = x + (1 - s)(X - x) / (t - s)"""
    s, t = CLOCK.t(tau_s)[:, None, None], CLOCK.t(tau_t)[:, None, None]
    return (x + (1 - s) * (flow(x, s, t) - x) / (t - s)).log()


def exact_teacher(x: Tensor, tau: Tensor) -> Tensor:
    return denoiser(x, CLOCK.t(tau)[:, None, None]).log()


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    tau_s = torch.rand(20, generator=g, dtype=torch.float64) * 0.5 + 0.02
    tau_t = tau_s + (0.97 - tau_s) * torch.rand(20, generator=g, dtype=torch.float64).clamp(min=0.1)
    s = CLOCK.t(tau_s)[:, None, None]
    y = torch.multinomial(PI, 20, replacement=True, generator=g)
    x = (1 - s) * torch.randn(20, 1, V, generator=g, dtype=torch.float64) + s * F.one_hot(y, V)[:, None]
    return x, tau_s, tau_t


# --- identities of the exact map --------------------------------------------------------------------------------------


def test_semigroup_target_of_the_exact_map_is_the_map(rows: tuple) -> None:
    x, tau_s, tau_t = rows
    want = exact_student(x, tau_s, tau_t).exp()
    assert (want >= 0).all() and torch.allclose(want.sum(-1), torch.ones(20, 1, dtype=torch.float64))
    got = fmlm.semigroup_target(exact_student, SPACE, x, tau_s, tau_t, CLOCK)
    torch.testing.assert_close(got, want, atol=1e-7, rtol=0)


def test_lagrangian_target_of_the_exact_map_is_the_map(rows: tuple) -> None:
    x, tau_s, tau_t = rows
    got = fmlm_recipes.lagrangian_target(exact_student, exact_teacher, SPACE, x, tau_s, tau_t, CLOCK)
    torch.testing.assert_close(got, exact_student(x, tau_s, tau_t).exp(), atol=1e-5, rtol=0)


def test_eulerian_target_of_the_exact_map_is_the_map(rows: tuple) -> None:
    x, tau_s, tau_t = rows
    got = fmlm_recipes.eulerian_target(exact_student, exact_teacher, SPACE, x, tau_s, tau_t, CLOCK)
    torch.testing.assert_close(got, exact_student(x, tau_s, tau_t).exp(), atol=1e-5, rtol=0)


def test_targets_of_a_wrong_map_are_not_the_map(rows: tuple) -> None:
    x, tau_s, tau_t = rows

    def wrong(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return exact_teacher(x, s)  # one Euler step taken for the map

    for got in (
        fmlm.semigroup_target(wrong, SPACE, x, tau_s, tau_t, CLOCK),
        fmlm_recipes.lagrangian_target(wrong, exact_teacher, SPACE, x, tau_s, tau_t, CLOCK),
    ):
        assert (got - wrong(x, tau_s, tau_t).exp()).abs().max() > 0.01


def test_jump_is_the_flow(rows: tuple) -> None:
    x, tau_s, tau_t = rows
    s, t = CLOCK.t(tau_s), CLOCK.t(tau_t)
    got = fmlm.jump(SPACE, x, exact_student(x, tau_s, tau_t).exp(), s, t)
    torch.testing.assert_close(got, flow(x, s[:, None, None], t[:, None, None]), atol=1e-9, rtol=0)


def test_residual_loss_is_zero_for_the_exact_residual(rows: tuple) -> None:
    """X = x + (t - s) v_s + (t - s)^2 / 2 g solved for g."""
    x, tau_s, tau_t = rows

    def residual(x: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
        s, t = CLOCK.t(tau_s)[:, None, None], CLOCK.t(tau_t)[:, None, None]
        return 2 / (t - s) ** 2 * (flow(x, s, t) - x - (t - s) * (denoiser(x, s) - x) / (1 - s))

    class Fixed(fmlm.OneHotSpace):
        def noise(self, xi: Tensor) -> Tensor:  # so that the loss sees x: noise with x = (1 - s) noise + s e_0
            s = CLOCK.t(tau_s)[:, None, None]
            return (x - s * F.one_hot(torch.zeros(20, 1, dtype=torch.long), V)) / (1 - s)

    def weight(tau: Tensor) -> Tensor:
        return torch.zeros(20, 1, dtype=torch.float64)

    def zero(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    tokens = torch.zeros(20, 1, dtype=torch.long)
    space = Fixed(torch.eye(V, dtype=torch.float64))
    loss, _ = fmlm_two_stage.residual_loss(residual, exact_teacher, space, tokens, tau_s, tau_t, x, CLOCK, weight)
    assert loss.item() < 1e-9
    wrong, _ = fmlm_two_stage.residual_loss(zero, exact_teacher, space, tokens, tau_s, tau_t, x, CLOCK, weight)
    assert wrong > 1e-3
    nets = (exact_student, residual, exact_teacher)
    exact, _ = fmlm_two_stage.regression_loss(*nets, space, tokens, tau_s, tau_t, x, CLOCK)
    assert exact.item() < 1e-9


@torch.no_grad()
def test_teacher_reads_its_first_prediction_and_cools_both() -> None:
    """As a step of the sampler, whose temperature falls with tau."""
    torch.manual_seed(0)
    m = fmlm.ModelArgs(length=6, layers=1, width=8, heads=1, cond_width=8, precision="fp32")
    teacher = fmlm.DiT(m, 12)
    for p in teacher.parameters():
        p += 0.3 * torch.randn_like(p)
    h, tau = torch.randn(2, 6, 8), torch.tensor([0.0, 0.5])
    heat = torch.tensor([1.0, 0.8])[:, None, None]
    first = (teacher(h, tau) / heat).softmax(-1)
    expected = teacher(h + teacher.recall(first @ teacher.embed), tau) / heat
    torch.testing.assert_close(fmlm.second_pass(teacher, 0.6, h, tau), expected)
    teacher.recall = None
    torch.testing.assert_close(fmlm.second_pass(teacher, 1.0, h, tau), teacher(h, tau))


# --- times and losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "batch", "want"), [("lm1b", 512, (256, 8)), ("lm1b", 128, (64, 2)), ("austen", 16, (8, 2))]
)
def test_two_times_shares_of_the_batch(data: str, batch: int, want: tuple[int, int]) -> None:
    """The paper's counts for its settings; a quarter of the others whole jumps where a batch is small."""
    tau_s, tau_t = fmlm.two_times(3, batch, 1, fmlm.default_args("", data).distill)
    whole = (tau_s == 0) & (tau_t == 1)
    assert ((tau_s == tau_t).sum(), whole.sum()) == want
    assert (tau_s <= tau_t).all() and tau_s.min() >= 0 and tau_t.max() <= 1
    same = (tau_s[tau_s == tau_t] * want[0]).long().sort().values
    assert torch.equal(same, torch.arange(want[0]))  # stratified


def test_semigroup_target_from_noise_to_data_is_the_second_jump(rows: tuple) -> None:
    """From 0 to 1: lambda is 0, the target is delta_{u,1}(X_{0,u}(x))."""
    x = torch.randn(6, 1, V, dtype=torch.float64)

    def net(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return x * (1 + s + 2 * t)[:, None, None]  # any network

    zero, one = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    half = one / 2
    u = CLOCK.t(half)
    x_u = fmlm.jump(SPACE, x, net(x, zero, half).softmax(-1), zero, u)
    want = net(x_u, half, one).softmax(-1)
    torch.testing.assert_close(fmlm.semigroup_target(net, SPACE, x, zero, one, CLOCK), want)


def test_project_to_simplex_is_the_nearest_point() -> None:
    v = torch.randn(200, 7, dtype=torch.float64)
    p = fmlm_recipes.project_to_simplex(v)
    assert (p >= 0).all() and torch.allclose(p.sum(-1), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close(fmlm_recipes.project_to_simplex(p), p)
    # optimality: (v - p)(q - p) <= 0 for every corner q of the simplex
    inner = ((v - p)[:, None] * (torch.eye(7, dtype=torch.float64) - p[:, None])).sum(-1)
    assert inner.max() < 1e-12


def test_tau_at_is_the_inverse_of_the_clock() -> None:
    tau = torch.linspace(0, 1, 30, dtype=torch.float64)
    torch.testing.assert_close(fmlm.tau_at(CLOCK.t(tau), CLOCK), tau, atol=1e-9, rtol=0)
    assert torch.equal(fmlm.tau_at(tau, fmlm.Clock(None)), tau)


def test_tau_rate_is_the_derivative_of_tau() -> None:
    t, h = torch.linspace(0.05, 0.6, 30, dtype=torch.float64) + 1e-5, 1e-6
    difference = (fmlm.tau_at(t + h, CLOCK) - fmlm.tau_at(t - h, CLOCK)) / (2 * h)
    torch.testing.assert_close(fmlm_recipes.tau_rate(t, CLOCK), difference, atol=1e-3, rtol=1e-3)


# --- student ----------------------------------------------------------------------------------------------------------


def small(module: ModuleType = fmlm, **changes: object) -> fmlm.Args:
    values = dict(layers=2, width=32, heads=2, cond_width=16, length=6, precision="fp32", space="onehot", batch=16)
    return cli.override(module.Args(), values | changes)


def trained_teacher(args: fmlm.Args, vocab: int) -> fmlm.DiT:
    torch.manual_seed(0)
    teacher = fmlm.DiT(args.model, vocab).requires_grad_(False).eval()
    for p in teacher.parameters():
        p.add_(0.2 * torch.randn(p.shape))
    return teacher


def test_make_student_starts_as_the_teacher() -> None:
    args = small()
    teacher = trained_teacher(args, 12)
    student = fmlm.make_student(teacher, args.model, 12).eval()
    h, tau = torch.randn(4, 6, 32), torch.rand(4)
    for other in (tau, torch.ones(4), torch.rand(4)):
        assert torch.equal(student(h, tau, other), teacher(h, tau))
    residual = fmlm_two_stage.make_residual(teacher, args.model, 12)
    assert (residual(h, tau, tau) == 0).all() and residual.cap == 0


@pytest.mark.parametrize(
    ("module", "recipe"), [(fmlm, {}), (fmlm_recipes, {"recipe": "lagrangian"}), (fmlm_recipes, {"recipe": "eulerian"})]
)
def test_distill_loss_teaches_the_diagonal_and_spaces_agree(module: ModuleType, recipe: dict) -> None:
    args = small(module, width=8, heads=1, **recipe)
    more = (args.distill,) if recipe else ()
    teacher = trained_teacher(args, 12).double()
    student = fmlm.make_student(teacher, args.model, 12).double().eval()
    student.times[1].mlp[2].weight.data.normal_()
    tokens, tau_s = torch.randint(0, 12, (6, 6)), torch.rand(6, dtype=torch.float64) * 0.5
    tau_t = torch.where(torch.arange(6) < 3, tau_s, tau_s + 0.3)
    clock, eps = fmlm.Clock(fmlm.accuracy_table(12)), torch.randn(6, 6, 12, dtype=torch.float64)

    class Projected(fmlm.EmbeddingSpace):
        def noise(self, xi: Tensor) -> Tensor:
            return xi @ self.embed

    results = []
    for space in (fmlm.OneHotSpace(student.embed), Projected(student.embed)):
        loss, info = module.distill_loss(student, teacher, space, tokens, tau_s, tau_t, eps, clock, *more)
        gradients = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
        results.append([loss, *[g for g in gradients if g is not None]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)
    s = clock.t(tau_s)[:3, None, None]
    x = (1 - s) * eps[:3] + s * F.one_hot(tokens[:3], 12)
    p, q = teacher(x @ teacher.embed, tau_s[:3]), student(x @ teacher.embed, tau_s[:3], tau_s[:3])
    want = -(p.softmax(-1) * q.log_softmax(-1)).sum(-1).mean() / 2
    torch.testing.assert_close(info["diagonal"], want)


def test_dit_forward_derivative_is_that_of_finite_differences() -> None:
    args = small()
    student = fmlm.make_student(trained_teacher(args, 12), args.model, 12).double().eval()
    student.times[1].mlp[2].weight.data.normal_()
    h, s, t = torch.randn(3, 6, 32, dtype=torch.float64), *torch.rand(2, 3, dtype=torch.float64)

    def f(t: Tensor) -> Tensor:
        return student(h, s, t).log_softmax(-1)

    _, rate = torch.func.jvp(f, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(rate, (f(t + 1e-6) - f(t - 1e-6)) / 2e-6, atol=1e-6, rtol=1e-4)


# --- sampler ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("steps", "gamma"), [(1, 0.0), (3, 0.0), (3, 1.0), (4, 0.7)])
def test_sample_flow_map_samples_pi_in_any_number_of_steps(steps: int, gamma: float) -> None:
    """Without renoising exactly; gamma = 1 is multistep consistency sampling with the soft delta, a little off."""

    def student(x: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
        s, t = CLOCK.t(tau_s)[:, None, None], CLOCK.t(tau_t)[:, None, None].clamp(max=1 - 1e-4)
        return (x + (1 - s) * (flow(x, s, t, 150) - x) / (t - s)).clamp(min=1e-12).log()

    g = torch.Generator().manual_seed(0)
    x = torch.randn(4_000, 1, V, generator=g, dtype=torch.float64)
    tokens = fmlm.sample_flow_map(student, SPACE, x, steps, CLOCK, gamma, g)
    got = torch.bincount(tokens.flatten(), minlength=V).double() / 4_000
    assert (got - PI).abs().max() < (0.025 if gamma == 0 else 0.06)


@torch.no_grad()
def test_sample_flow_map_gamma_sets_mean_and_noise() -> None:
    """gamma 0: x_{i+1} is the deterministic jump; gamma 1: mean t delta, standard deviation 1 - t."""
    seen: list[Tensor] = []

    def net(x: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
        seen.append(x)
        return PI.log().expand_as(x) + 0 * x

    x = torch.randn(20_000, 1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = CLOCK.t(torch.tensor(0.5, dtype=torch.float64)).item()
    fmlm.sample_flow_map(net, SPACE, x, 2, CLOCK, 0.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(seen[1], (1 - t) * x + t * PI)
    fmlm.sample_flow_map(net, SPACE, x, 2, CLOCK, 1.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(seen[3].mean(0)[0], t * PI, atol=0.01, rtol=0)
    torch.testing.assert_close(seen[3].std(0)[0], torch.full((V,), 1 - t, dtype=torch.float64), atol=0.01, rtol=0)
    fmlm.sample_flow_map(net, SPACE, x, 2, CLOCK, 0.6, torch.Generator().manual_seed(1))
    kept = (1 - t) * math.sqrt(1 - 0.36)
    mean = kept * x + (1 - kept) * PI + (kept - (1 - t)) * PI  # jump past the next time, then back
    torch.testing.assert_close((seen[5] - mean).mean(0)[0], torch.zeros(V, dtype=torch.float64), atol=0.01, rtol=0)
    assert (seen[5] - mean).std().item() == pytest.approx(0.6 * (1 - t), rel=0.02)


# --- arguments and copies ---------------------------------------------------------------------------------------------

CARRY = "carry a change of the script with python tools/carry.py"


@pytest.mark.parametrize("data", ["austen", *fmlm.SETTINGS])
def test_default_args_are_the_same_on_every_device(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = []
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        values.append([module.default_args("", data) for module in (fmlm, fmlm_recipes, fmlm_two_stage)])
    assert values[0] == values[1]


@pytest.mark.parametrize("module", [fmlm, fmlm_recipes, fmlm_two_stage])
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


def test_text_shared_with_flm_train_is_identical() -> None:
    message = f"{CARRY} flm_train.py"
    texts = [Path(module.__file__).read_text() for module in (flm, fmlm)]
    for title in ("Where noise and states live", "Time: measured in decoding accuracy", "Network"):
        sections = [text.split(f"\n# --- {title} ---")[1].split("\n# --- ")[0] for text in texts]
        assert sections[0] == sections[1], f"{title}: {message}"
    assert not {"ModelArgs", "learning_rate"} & differing(flm, fmlm), message


@pytest.mark.parametrize(
    ("variant", "own"),
    [
        (
            fmlm_recipes,
            {"RunArgs", "DistillArgs", "distill_loss", "map_target", "semigroup_target", "col", "tau_rate", "train"}
            | {"lagrangian_target", "eulerian_target", "project_to_simplex", "FIXED", "main"},
        ),
        (
            fmlm_two_stage,
            {"RunArgs", "DistillArgs", "distill_loss", "residual_loss", "regression_loss", "two_times", "train"}
            | {"semigroup_target", "make_residual", "main"},
        ),
    ],
)
def test_variants_of_fmlm_distill_are_short_diffs(variant: ModuleType, own: set[str]) -> None:
    changed = differing(fmlm, variant)
    assert changed == own, f"{changed ^ own}: {CARRY} fmlm_distill.py"
    printed = subprocess.run(["diff", SCRIPT, variant.__file__], capture_output=True, text=True).stdout
    assert 50 < len(printed.splitlines()) < 200
