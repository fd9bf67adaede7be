"""baselines/ar.py: causality, the exact likelihood by enumeration, the sampler's law, whole runs."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import flm_train
from baselines import ar
from common import checkpoint, cli
from common.errors import UserError
from common.runlog import read_metrics
from common.text import load_text, toy_probabilities
from common.text_run import TextRun
from tests.helpers import definitions, differing, perturbed

SCRIPT = Path(ar.__file__)
ROOT = SCRIPT.parents[1]
CPU = torch.device("cpu")
NETS = [dict(conv=0), dict(conv=3), dict(conv=4, attention_cap=0.0, logit_cap=0.0)]
SMALL = [
    *("--data", "toy", "--threads", "1", "--layers", "1", "--width", "32", "--batch", "32", "--samples", "32"),
    *("--conv", "3", "--log-every", "1", "--eval-every", "20", "--checkpoint-every", "10"),
]


def new_net(vocab: int, scale: float = 0.2, **changes: object) -> ar.DiT:
    """A small network in double precision, its weights moved away from the start."""
    sizes = dict(layers=2, width=16, heads=2, cond_width=16, length=6, precision="fp32")
    torch.manual_seed(0)
    net = ar.DiT(cli.override(ar.Args(), sizes | changes).model, vocab).double().eval()
    perturbed(net, scale)
    return net


def places(folder: Path, name: str) -> list[str]:
    return ["--run-dir", str(folder), "--data-dir", str(folder), "--run-name", name]


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [0.0, 0.5])
@pytest.mark.parametrize("n", [1, 5])
def test_attention_is_a_mean_over_the_tokens_up_to_its_own(cap: float, n: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    want = torch.empty_like(v)
    for i in range(5):
        scores = q[:, :, i, None] @ k[:, :, : i + 1].mT / math.sqrt(8)
        scores = cap * torch.tanh(scores / cap) if cap else scores
        want[:, :, i] = (scores.softmax(-1) @ v[:, :, : i + 1]).squeeze(2)
    torch.testing.assert_close(ar.attention(q[:, :, -n:], k, v, cap), want[:, :, -n:])


class OnGpu(Tensor):
    """Numbers that say they are on a GPU."""

    is_cuda = True


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["flex", "fused"])
def test_attention_of_long_rows_by_other_kernels_is_the_same(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function of the scores that a GPU's kernel gets, evaluated without a GPU; the fused kernel of no cap."""
    calls = []

    def eager(q: Tensor, *others: Tensor, **how: object) -> Tensor:
        calls.append(how.keys())
        return flex_attention(q.as_subclass(Tensor), *others, **how)

    monkeypatch.setattr(ar, "flex_attention", lambda: eager)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    cap = 0.5 if kernel == "flex" else 0.0
    one = ar.attention(q.as_subclass(OnGpu) if kernel == "flex" else q, k, v, cap)
    scores = q @ k.mT / 4
    scores = cap * torch.tanh(scores / cap) if cap else scores
    later = torch.arange(256) > torch.arange(256)[:, None]
    torch.testing.assert_close(one, scores.masked_fill(later, -math.inf).softmax(-1) @ v)
    assert len(calls) == (kernel == "flex")
    last = ar.attention(q[:, :, -1:], k, v, cap)  # what a call of the sampler asks for
    torch.testing.assert_close(last, one[:, :, -1:].as_subclass(Tensor))


@pytest.mark.parametrize("width", [1, 3, 4])
def test_short_conv_reads_the_last_tokens_alone(width: int) -> None:
    torch.manual_seed(0)
    conv, x = ar.ShortConv(8, width), torch.randn(2, 5, 8)
    perturbed(conv, 0.5)
    kernel = conv.weight.T[:, None]  # the last weight is that of the token itself
    want = x + F.conv1d(F.pad(x.mT, (width - 1, 0)), kernel, conv.bias, groups=8).mT
    torch.testing.assert_close(conv(x), want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changes", [*NETS, dict(length=300, attention_cap=0.0)])
def test_logits_of_a_token_know_those_before_it_and_no_other(changes: dict, training: bool) -> None:
    net = new_net(9, **changes).train(training)
    length = net.rope.shape[1]
    tokens = torch.randint(0, 9, (3, length))
    logits = net(ar.before(net, tokens))
    for i in {0, 1, 2, 4, length - 1}:
        other = tokens.clone()
        other[:, i] = (other[:, i] + 1) % 9
        change = (net(ar.before(net, other)) - logits).abs().amax((0, 2))
        assert (change[: i + 1] == 0).all()
        assert (change[i + 1 : i + 6] > 1e-9).all()


@pytest.mark.parametrize("changes", [dict(conv=0), dict(conv=3)])
def test_network_has_the_weights_of_flm_and_a_start(changes: dict) -> None:
    args, vocab = cli.override(ar.Args(), changes), 50
    theirs = flm_train.DiT(cli.override(flm_train.Args(), changes | dict(self_condition=0.0)).model, vocab)
    counts = [sum(p.numel() for p in net.parameters()) for net in (ar.DiT(args.model, vocab), theirs)]
    assert counts[0] == counts[1] + args.model.width


@pytest.mark.parametrize("changes", NETS)
@pytest.mark.parametrize("pieces", [[1] * 6, [6]])
def test_calls_with_a_memory_give_the_logits_of_the_whole_row(changes: dict, pieces: list[int]) -> None:
    net = new_net(9, **changes)
    tokens = ar.before(net, torch.randint(0, 9, (3, 6)))
    memory, parts, place = {}, [], 0
    for part in tokens.split(pieces, 1):
        parts.append(net(part, place, memory))
        place += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), net(tokens), atol=1e-12, rtol=1e-10)


# --- loss and likelihood ----------------------------------------------------------------------------------------------


def test_before_shifts_by_one_behind_the_start() -> None:
    net = new_net(9)
    assert ar.before(net, torch.tensor([[3, 0, 8]])).tolist() == [[9, 3, 0]]


def test_ar_loss_is_ln_v_at_the_start_and_the_plain_formula_later() -> None:
    net, tokens = new_net(9, scale=0.0), torch.randint(0, 9, (4, 6))
    assert ar.ar_loss(net, tokens).item() == pytest.approx(math.log(9))
    net = new_net(9)
    want = 0.0
    for row in tokens:
        for i in range(6):
            logits = net(torch.cat([torch.tensor([9]), row[:i]])[None])  # the start and the tokens before
            want -= logits[0, -1].log_softmax(-1)[row[i]] / 24
    torch.testing.assert_close(ar.ar_loss(net, tokens), want)


def test_ar_loss_by_rows_changes_nothing() -> None:
    net, tokens = new_net(9), torch.randint(0, 9, (5, 6))
    found = []
    for rows in (0, 2):
        loss = ar.ar_loss(net, tokens, rows)
        found.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def every_text(vocab: int, length: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(vocab), repeat=length)))


@pytest.mark.parametrize("changes", NETS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_probabilities_of_all_texts_sum_to_one(changes: dict, temperature: float) -> None:
    net = new_net(3, scale=0.5, **changes)
    p = ar.log_likelihood(net, every_text(3, 5), temperature).sum(1).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12) and p.max() > 5 / 3**5


def test_validate_is_the_loss_of_the_held_out_rows() -> None:
    net, rows = new_net(9), np.random.default_rng(0).integers(0, 9, (300, 6)).astype(np.uint16)
    assert ar.rows_at_once(CPU, 6) < 300
    want = ar.ar_loss(net, torch.from_numpy(rows.astype(np.int64))).item()
    assert ar.validate(net, rows) == {"valid/ce": pytest.approx(want)}


# --- sampler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.4, 0.8), (1.0, 0.0)])
def test_log_prob_drawn_is_the_frequency_of_draw(temperature: float, top_p: float) -> None:
    logits = torch.tensor([0.3, 1.5, -0.4, 0.9, -2.0], dtype=torch.float64)
    n = 100_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    y = ar.draw((logits / temperature).softmax(-1).expand(n, 5), uniform, top_p)
    drawn, counts = y.unique(return_counts=True)
    log_p = ar.log_prob_drawn(logits.expand(len(drawn), 5), drawn, temperature, top_p)
    torch.testing.assert_close(log_p.exp(), counts / n, atol=2 / n, rtol=0, check_dtype=False)


@torch.no_grad()
@pytest.mark.parametrize("changes", NETS)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9)])
def test_sample_ar_writes_what_recomputing_every_call_writes(changes: dict, temperature: float, top_p: float) -> None:
    net = new_net(9, **changes)
    texts = ar.sample_ar(net, 20, 6, temperature, top_p, torch.Generator().manual_seed(0))
    generator, want = torch.Generator().manual_seed(0), torch.zeros(20, 0, dtype=torch.int64)
    for _ in range(6):
        read = torch.cat([torch.full((20, 1), 9), want], 1)
        probs = (net(read)[:, -1:].double() / temperature).softmax(-1)
        uniform = torch.rand(20, 1, generator=generator, dtype=torch.float64)
        want = torch.cat([want, ar.draw(probs, uniform, top_p)], 1)
    assert torch.equal(texts, want) and len(texts.unique(dim=0)) > 10


@torch.no_grad()
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_sample_ar_has_the_law_and_the_entropy_of_its_likelihood(temperature: float, top_p: float) -> None:
    net, n = new_net(3, scale=0.15), 20_000
    texts = ar.sample_ar(net, n, 4, temperature, top_p, torch.Generator().manual_seed(0))
    found, counts = texts.unique(dim=0, return_counts=True)
    log_p = ar.log_likelihood(net, found, temperature, top_p).sum(1)
    p = log_p.exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-3)  # all that can be drawn was
    assert len(found) == 81 if top_p == 1 else 20 < len(found) < 60
    z = (counts - n * p) / (n * p).sqrt()
    assert z.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / len(z))) and z.abs().max() < 4.5
    entropy = -(p * log_p).sum().item()  # of all texts, exactly
    estimate = -ar.log_likelihood(net, texts, temperature, top_p).sum(1)
    assert estimate.mean().item() == pytest.approx(entropy, abs=4 * estimate.std().item() / math.sqrt(n))


@torch.no_grad()
def test_generate_makes_one_call_a_token_and_is_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, args = new_net(9), cli.override(ar.Args(), dict(length=6))
    calls, forward = [], ar.DiT.forward

    def counted(net: ar.DiT, y: Tensor, *rest: object) -> Tensor:
        calls.append(len(y))
        return forward(net, y, *rest)

    monkeypatch.setattr(ar.DiT, "forward", counted)
    texts = ar.generate(net, args, 400, 6)
    at_once = ar.rows_at_once(CPU, 6)
    assert calls == [at_once] * 6 * (400 // at_once) + [400 % at_once] * 6 and texts.shape == (400, 6)
    assert torch.equal(texts, ar.generate(net, args, 400, 6))
    assert not torch.equal(texts, ar.generate(net, cli.override(args, dict(seed=2)), 400, 6))


def test_sampler_tag_names_what_is_not_usual() -> None:
    usual = ar.SampleArgs()
    assert ar.sampler_tag(ar.SampleArgs(samples=9), usual) == ""
    assert ar.sampler_tag(ar.SampleArgs(temperature=0.7, top_p=0.95), usual) == "_t0.7_p0.95"


# --- whole runs -------------------------------------------------------------------------------------------------------


def timeless(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)]


def test_main_trains_evaluates_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load, judges = ar.load_judge, []

    def load_once(*values: object) -> object:
        judges[:] = judges or [load(*values)]
        return judges[0]

    monkeypatch.setattr(ar, "load_judge", load_once)
    flags = [*SMALL, "--total-steps", "40", "--dropout", "0.1"]
    ar.main([*flags, *places(tmp_path, "whole")])
    folder, out = tmp_path / "whole", capsys.readouterr().out
    assert "| 8 steps |" in out and "entropy of these samples, -mean log p:" in out
    found = json.loads((folder / "entropy.json").read_text())
    assert (found["step"], found["samples"], found["temperature"], found["top_p"]) == (40, 32, 1.0, 1.0)
    assert f"valid/ce {found['held_out_nll']:.3f}" in out
    (row,) = json.loads((folder / "evaluation_ngram.json").read_text())[:1]
    assert found["unigram_entropy"] == row["entropy"] and 0 < found["entropy"] < math.log(18)

    log_training = TextRun.log_training

    def log_and_stop(run: TextRun, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        log_training(run, metrics, speed)
        if run.step == 27:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TextRun, "log_training", log_and_stop)
        ar.main([*flags, *places(tmp_path, "cut")])
    assert "--resume" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "cut" / "checkpoint.pt")["step"] == 27
    ar.main(["--resume", str(tmp_path / "cut")])
    whole, cut = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    for part in ("net", "ema"):
        assert all(torch.equal(whole[part][k], cut[part][k]) for k in whole[part])
    assert len(timeless(folder)) > 40 and timeless(folder) == timeless(tmp_path / "cut")

    ar.main(["--eval", str(folder), "--temperature", "0.5", "--top-p", "0.9", "--samples", "64"])
    colder = json.loads((folder / "entropy_t0.5_p0.9.json").read_text())
    assert colder["samples"] == 64 and colder["entropy"] < found["entropy"] - 0.1
    assert (folder / "evaluation_ngram_t0.5_p0.9.md").exists()
    with pytest.raises(UserError, match=r"is a run of ar\.py, whose networks are others"):
        flm_train.main(["--eval", str(folder)])


def test_train_in_pieces_gives_the_steps_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ar, "load_judge", lambda *_: None)
    for needs_judge in ("log_samples", "evaluate"):
        monkeypatch.setattr(TextRun, needs_judge, lambda *_: None)
    found = {}
    for name, pieces in {"whole": ["--micro-batch", "0"], "parts": ["--micro-batch", "12", "--loss-rows", "5"]}.items():
        ar.main([*SMALL, "--total-steps", "5", *pieces, *places(tmp_path, name)])
        found[name] = [row["train/loss"] for row in read_metrics(tmp_path / name) if "train/loss" in row]
    assert len(found["whole"]) == 5 and found["parts"] == pytest.approx(found["whole"], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "4"], "--steps"),
        (["--top-p", "1.5"], "--top-p 1.5: must be at least 0 and at most 1"),
        (["--temperature", "0"], "--temperature 0.0: must be above 0"),
        (["--width", "33"], "--width 33 must be an even multiple of --heads 4"),
    ],
)
def test_main_says_in_one_line_what_cannot_work(tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        ar.main(["--data", "toy", *flags, *places(tmp_path, "r")])
    assert said in str(caught.value) and "\n" not in str(caught.value) and caught.value.code == 2


@pytest.mark.slow
def test_train_in_two_processes_gives_the_losses_of_one(tmp_path: Path) -> None:
    found = []
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        flags = [*SMALL, "--total-steps", "10", *places(tmp_path, name)]
        subprocess.run([sys.executable, *launcher, str(SCRIPT), *flags], cwd=ROOT, check=True, capture_output=True)
        found.append([row["train/loss"] for row in read_metrics(tmp_path / name) if "train/loss" in row])
    assert len(found[0]) == 10 and found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.slow
def test_train_learns_the_toy_language(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its law, by the exact probability of every sentence; what it writes; and the caps, which it must not reach."""
    ar.main(["--data", "toy", "--threads", "1", *places(tmp_path, "r")])
    assert "8 steps: total variation distance from the language 0.0" in capsys.readouterr().out
    args, data = ar.default_args("toy"), load_text("toy", length=8, data_dir=tmp_path)
    net = ar.DiT(args.model, 18)
    net.load_state_dict(checkpoint.load(tmp_path / "r" / "checkpoint.pt")["ema"])
    language = toy_probabilities()
    sentences, want = torch.tensor(list(language)), torch.tensor(list(language.values()), dtype=torch.float64)
    p = ar.log_likelihood(net, sentences).sum(1).exp()
    assert p.sum().item() == pytest.approx(1, abs=0.01)
    assert 0.5 * ((p - want).abs().sum() + 1 - p.sum()) < 0.03
    entropy = -(want * want.log()).sum().item() / 8  # of the language, in nats per token
    held_out = ar.validate(net, data.valid)["valid/ce"]
    found = json.loads((tmp_path / "r" / "entropy.json").read_text())
    assert held_out == pytest.approx(entropy, abs=0.02) and found["held_out_nll"] == pytest.approx(held_out)
    assert found["entropy"] == pytest.approx(held_out, abs=0.02)  # sampled against held-out
    capped = net.cap
    net.cap = 0.0
    with torch.no_grad():
        assert net(ar.before(net, sentences)).abs().max() < capped


# --- arguments and copies ---------------------------------------------------------------------------------------------


def test_script_is_short_and_shares_its_text_with_flm_train() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 620
    same = definitions(flm_train).keys() - differing(flm_train, ar)
    assert same >= {"TrainArgs", "TimeEmbedding", "default_args", "draw", "learning_rate", "rotate", "zero"}


@pytest.mark.parametrize("data", ["austen", *ar.SETTINGS])
def test_default_args_are_those_of_flm(data: str) -> None:
    ours, theirs = (cli.flatten(module.default_args(data)) for module in (ar, flm_train))
    own = {"temperature", "top_p", *(("lr",) if data == "toy" else ())}  # the toy's rates are tuned
    assert ours.keys() - theirs.keys() == set()
    assert {k: v for k, v in ours.items() if k not in own} == {k: theirs[k] for k in ours.keys() - own}
    assert (ours["temperature"], ours["top_p"]) == (1.0, 1.0)
