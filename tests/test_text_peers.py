"""benchmarks/text_peers.py: its commands are those of the scripts, and a page from runs that are made up."""

import importlib
import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import cli
from common.errors import UserError
from common.text import toy_rows
from common.text.toy import WORDS, toy_tokenizer
from common.text_run import toy_distance

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import runs
import text_configs as configs
import text_peers
import text_report
import text_stats as stats

LIKELIHOODS = {
    "ar": ("entropy", "held_out_nll"),
    "mdlm": ("likelihood", "valid/elbo"),
    "duo": ("bound", "valid/bound"),
}
DATA = {"toy": 8, "captions": 32, "austen": 64}  # tokens a row


def parsed(method: str, data: str, flags: list[str]) -> tuple[types.ModuleType, object]:
    """A method's script, and the arguments that it makes of these flags."""
    script = importlib.import_module(configs.METHODS[method].script.removesuffix(".py").replace("/", "."))
    return script, cli.parse(script.default_args(data=data), flags, "")


@pytest.mark.parametrize("method", configs.METHODS)
def test_commands_parse_by_their_scripts(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs, trials and evaluations; the tag of an evaluation is the one that the script gives its files."""
    monkeypatch.setattr(text_peers, "equal_seconds", lambda *_: 77)
    monkeypatch.setitem(configs.TUNED, ("austen", method), "0.125")
    commands: list[list[str]] = []
    done = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(text_peers, "open", lambda *_: open("/dev/null", "a"), raising=False)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or done)
    for data in DATA:
        kinds = ("", "seconds", configs.DATA[data][0]) if method in configs.TEACHERS else ("",)
        for kind in kinds:
            flags = text_peers.run_flags(data, method, 2, kind)
            args = cli.flatten(parsed(method, data, flags)[1])
            assert args["seed"] == 2 and (kind != "seconds" or args["total_steps"] == 77)
            assert kind != configs.DATA[data][0] or args["lr"] == float(kind)
            assert data != "austen" or kind not in ("", "seconds") or args["lr"] == 0.125
            assert method == "ar" or args["steps"] == ((32,) if kind == kinds[-1] != "" else configs.calls_of(method))
            teacher = configs.METHODS[method].teacher
            assert (args.get("teacher") or args.get("distill") or "") == (teacher and f"runs/text_{data}_{teacher}_s2")
        for tag in configs.grid(data, method) if data != "captions" else ("",):  # which has Austen's grid
            assert text_peers.evaluate_one((data, method, 2, ""), "ngram", tag) == 0
            python, _, way, run, *flags = commands.pop()
            assert (python, way, Path(run).name) == (sys.executable, "--eval", f"text_{data}_{method}_s2")
            module, args = parsed(method, data, flags)
            usual = () if method in ("mdlm", "sdtt", "imdm", "fmlm") else (module.default_args(data=data).sample,)
            assert module.sampler_tag(args.sample, *usual) == tag


@pytest.mark.parametrize(("data", "method"), [*product(DATA, configs.TEACHERS)])
def test_default_rate_is_one_of_those_tried(data: str, method: str) -> None:
    lr = cli.flatten(parsed(method, data, [])[1])["lr"]
    rates = [float(rate) for rate in configs.DATA[data]]
    assert lr in rates and rates == [rates[0], 2 * rates[0], 4 * rates[0]]


def test_students_wait_for_their_teachers_which_are_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(runs, "execute", lambda script, name, flags: made.append(name) or int("mdlm" in name))
    assert text_peers.run(["toy"], ["sdtt", "dcd"], [1], "tokens", jobs=1) == 1
    assert made == ["text_toy_mdlm_s1", "text_toy_duo_s1", "text_toy_dcd_s1"]  # no student without its teacher


def made_up(
    folder: Path, data: str, method: str, seed: int, points: dict[tuple[str, int], tuple[float, float]],
    texts: Callable[[int], list[str]], speed: float = 1_000.0,
) -> None:  # fmt: skip
    """A finished run whose evaluations {(tag, calls): (entropy, perplexity)} have these texts(calls)."""
    folder.mkdir(parents=True)
    args = dict(data=data, length=DATA[data], batch=10, total_steps=500, samples=64, seed=seed, self_condition=0.0)
    args |= {"fmlm": dict(teacher="x", diagonal=0.5), "sdtt": dict(distill="x", rounds=3)}.get(method, {})
    metrics = [{"step": step, "time/tokens_per_second": speed * x} for step, x in ((50, 1), (100, 0.1), (150, 1))]
    (folder / "args.json").write_text(json.dumps({"args": args, "cpu": "a CPU"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "wall_seconds").write_text("60\n")
    if method in LIKELIHOODS:
        file, key = LIKELIHOODS[method]
        (folder / f"{file}.json").write_text(json.dumps({key: 0.5}))
    for tag in {tag for tag, _ in points}:
        rows = {f"{n} steps": (n, point) for (t, n), point in points.items() if t == tag} | {
            "real text": (0, (3.8, 90.0))
        }
        table = [
            dict(text=text, judge="ngram", unit="word", entropy=h, perplexity=p, self_bleu=0.2, distances=[0.1] * 3,
                 copied=0.01, samples=64) for text, (_, (h, p)) in rows.items()
        ]  # fmt: skip
        (folder / f"evaluation_ngram{tag}.json").write_text(json.dumps(table))
        for text, (n, _) in rows.items():
            file = folder / f"samples_{text.replace(' ', '_')}{tag}.txt"
            file.write_text("\n----\n".join(texts(n)) + "\n")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs and store in a folder of the test; Austen's text is eight words, the judge a table."""
    rows = np.array([[0, 1, 2, 3], [0, 2, 1, 3]], np.uint16)
    tokenizer = types.SimpleNamespace(vocab_size=4, encode_batch=lambda texts: [t.split() for t in texts])
    text = types.SimpleNamespace(name="austen", train=rows, valid=rows, tokenizer=tokenizer)
    judge = types.SimpleNamespace(name="ngram", perplexity=lambda texts, _: 50.0 + len(set(texts[0].split())))
    toy = text_peers.corpus("toy", 8)
    monkeypatch.setattr(text_peers, "corpus", lambda data, length: toy if data == "toy" else (text, judge))
    monkeypatch.setattr(configs, "RUNS", tmp_path / "runs")
    for module in (text_peers, text_report):
        monkeypatch.setattr(module, "STORE", tmp_path / "store")
    monkeypatch.setattr(text_report, "ROOT", tmp_path)
    return tmp_path


def toy_texts(rows: np.ndarray) -> list[str]:
    return [toy_tokenizer().decode(row, separators="\n") for row in rows]


def test_store_and_report_of_made_up_runs(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"w{i} w{j} w{i + j}" for i in range(8) for j in range(8)]
    for seed in (1, 2):
        for method, reach in (("mdlm", 4.0), ("flm", 3.9), ("fmlm", 3.6), ("ar", 4.0)):
            calls = (64,) if method == "ar" else (1, 8)
            found = {
                (tag, n): (reach - 0.4 * i, 800.0 / n / 4**i) for i, tag in enumerate(("", "_t0.7")) for n in calls
            }
            if method == "fmlm":
                del found["_t0.7", 1]
            made_up(configs.folder_of("austen", method, seed), "austen", method, seed, found, lambda n: words)
        for method in ("mdlm", "sdtt"):
            point = {("", n): (2.0, 9.0) for n in (1, 8)}
            rows = {n: toy_rows(64, seed=n) for n in (0, 1, 8)}
            made_up(
                configs.folder_of("toy", method, seed), "toy", method, seed, point, lambda n, r=rows: toy_texts(r[n])
            )
    made_up(configs.folder_of("austen", "ar", 3), "austen", "ar", 3, {}, lambda n: words)
    (configs.folder_of("austen", "ar", 3) / "wall_seconds").unlink()  # not finished
    text_peers.store()
    found = runs.read(places / "store")
    assert len(found) == 12 and "austen_ar_s3" not in found
    assert found["austen_mdlm_s1"].files["nats"].keys() == {"unigram", "bigram", "model"}
    assert found["austen_flm_s1"].files["samples_8_steps.txt"] == words[:3]

    figures: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.update({path.name: self}))
    for folder in (places / "runs").iterdir():  # the report needs none of it
        folder.rename(folder.with_suffix(".away"))
    text_report.report()
    assert figures.keys() == {"headline.png", "frontiers_austen_ngram.png", "toy.png"}
    table = text_report.tables()
    page = (places / "store" / "results.md").read_text()
    assert all(text in page for text in table.values())

    def cells(name: str, line: str) -> list[str]:
        (row,) = (r for r in table[f"text_peers/{name}"].splitlines() if r.startswith(f"| {line} |"))
        return [cell.strip() for cell in row.split("|")[2:-1]]

    middle = 800 / 4**0.5  # half way between 4.0 and 3.6, in logarithms
    assert [float(cell.split()[0]) for cell in cells("austen/ngram", "MDLM")[:2]] == [middle, middle / 8]
    assert cells("austen/ngram", "FMLM")[0].startswith(">800 [")  # one point, with less entropy
    assert cells("austen/ngram", "AR")[:2] == ["-", "-"] and cells("austen/ngram", "AR")[2] != "-"
    assert cells("austen/ngram/one_call", "MDLM")[0].startswith("200 ")  # at 3.6
    assert cells("austen/cost", "FMLM")[1:3] == ["2.5", "1,750"] and cells("toy/cost", "SDTT")[1:3] == ["3", "2,000"]
    assert cells("austen/cost", "FLM")[3] == "0.640"  # 640 tokens, but for the line with an evaluation
    assert cells("austen/cost", "MDLM")[-1] == "0.500 0.500" and cells("austen/cost", "FLM")[-1] == "-"
    distance = toy_distance(toy_rows(64, seed=8))
    assert cells("toy/ngram", "SDTT")[1].startswith(f"{distance:.3f} (1.00, ")

    axis: Axes = figures["headline.png"].axes[0]
    dots = [points for points in axis.collections if points.get_offsets().shape == (2, 2)]
    faces = {round(points.get_offsets()[0, 1]): points.get_facecolors()[0].tolist() for points in dots}  # at one call
    assert faces[800] == [1, 1, 1, 1] != faces[middle]  # an end is hollow
    assert axis.get_xscale() == axis.get_yscale() == "log" and axis.get_xlabel() and axis.get_ylabel()


def test_report_without_runs_says_what_to_run(places: Path) -> None:
    assert text_report.tables() == {}
    with pytest.raises(UserError, match=r"store has no stored runs; make some: python benchmarks/text_peers\.py run"):
        text_report.report()


def test_evaluate_makes_what_is_missing_of_finished_runs(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(configs.folder_of("austen", "dcd", 1), "austen", "dcd", 1, {("_t1.2_p1", 1): (3.0, 5.0)}, lambda n: ["a"])
    made: list[str] = []
    monkeypatch.setattr(text_peers, "evaluate_one", lambda job, judge, tag: made.append(tag) or 0)
    jobs = [("austen", "dcd", seed, "") for seed in (1, 2)]
    assert text_peers.evaluate(jobs, "ngram", 1) == 0
    assert sorted(made) == sorted(set(configs.grid("austen", "dcd")) - {"_t1.2_p1"})
    made.clear()
    assert text_peers.evaluate(jobs, "smollm2", 1) == 0 and len(made) == len(configs.grid("austen", "dcd"))


def test_equal_seconds_by_hand(places: Path) -> None:
    for method, speed in (("mdlm", 3_000.0), ("flm", 2_000.0)):
        with pytest.raises(UserError, match=r"_s1, which is not finished; first: python .* --methods mdlm flm"):
            text_peers.run(["austen"], ["mdlm"], [1], "seconds", jobs=1)
        made_up(configs.folder_of("austen", method, 1), "austen", method, 1, {}, lambda n: [], speed)
    assert text_peers.equal_seconds("austen", "mdlm", 1) == 750


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_ngram_nats_by_hand() -> None:
    """Tokens 0, 1, 2; start twice before 0, 0 twice before 1, 1 before 0 once and at the end once."""
    train = np.array([[0, 1, 0], [0, 1, 1]])
    found = stats.ngram_nats(train, np.array([[0, 2, 1]]), 3)
    p = np.array([4, 4, 1]) / 9
    assert found["unigram"] == pytest.approx(-np.log(p[[0, 2, 1]]).mean())
    # start: 0 twice of 2, one kind; 0: 1 twice of 2, one kind; 2 was never followed
    both = np.array([(2 + p[0]) / 3, (0 + p[2]) / 3, p[1]])
    assert found["bigram"] == pytest.approx(-np.log(both).mean())


def test_bigram_model_sums_to_one() -> None:
    train = np.random.default_rng(0).integers(0, 5, (20, 6))
    nats = [stats.ngram_nats(train, np.array([[y]]), 5) for y in range(5)]  # behind the start
    assert sum(math.exp(-n["bigram"]) for n in nats) == pytest.approx(1)


def test_language_is_measured_as_an_evaluation_does() -> None:
    rows = toy_rows(300, seed=3).copy()
    rows[:40, 2] = WORDS.index("one")
    rows[40:60, 3] = WORDS.index(".")
    found = stats.language(toy_texts(rows))
    assert found["distance"] == pytest.approx(toy_distance(rows)) and found["valid"] == pytest.approx(240 / 300)
    assert 0 < found["kl"] < stats.language(toy_texts(rows[60:100]))["kl"]
    assert stats.language(["one one"]) == {"distance": 1.0, "valid": 0.0, "kl": 0.0}


def test_perfect_distances_are_those_of_draws() -> None:
    drawn = [toy_distance(toy_rows(2_048, seed)) for seed in range(30)]
    assert np.mean(drawn) == pytest.approx(stats.perfect_distances(2_048).mean(), rel=0.05)


def test_sampling_error_is_that_of_resampled_texts() -> None:
    """Texts whose words differ in number and price, the more the less variety they have."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(0, k, n)) for k, n in rng.integers(3, 30, (400, 2))]
    judge = types.SimpleNamespace(perplexity=lambda texts, _: 5.0 + len(set(texts[0].split())))
    tokens = [text.split() for text in texts]
    found = np.array(stats.sampling_error([*texts, ""], [*tokens, ["x"]], judge))
    assert np.isfinite(found).all()
    found = np.array(stats.sampling_error(texts, tokens, judge))
    length = np.array([len(t) for t in tokens])
    nats = length * np.log([judge.perplexity([text], 0) for text in texts])
    entropy = np.array([stats.unigram_entropy([t]) for t in tokens])
    pick = rng.integers(400, size=(4_000, 400))
    log_p = nats[pick].sum(1) / length[pick].sum(1)
    assert np.allclose(found, np.cov(entropy[pick].mean(1), log_p), rtol=0.15)


def test_at_entropy_interpolates_and_marks_the_ends() -> None:
    rows = [{"entropy": h, "perplexity": p} for h, p in ((3.0, 100.0), (4.0, 400.0), (4.0, 900.0), (3.5, math.inf))]
    one = stats.at_entropy([rows], 3.5)
    assert one.mean == pytest.approx(200) and one.mark == "" and one.low == pytest.approx(one.high, rel=1e-4)
    assert [(v.mark, round(v.mean)) for v in (stats.at_entropy([rows], h) for h in (2.9, 4.1))] == [
        ("<", 100),
        (">", 400),
    ]
    two = stats.at_entropy([rows, rows[:1]], 3.5)  # the second seed ends below
    assert two.each == (pytest.approx(200), pytest.approx(100)) and two.mark == ">"
    assert two.mean == pytest.approx(math.sqrt(200 * 100))
    assert two.low == pytest.approx(100, rel=1e-3) and two.high == pytest.approx(200, rel=1e-3)
    unsure = [row | {"error": [[0.0, 0.0], [0.0, 0.01]]} for row in rows[:2]]  # 0.1 at each end, independent
    value = stats.at_entropy([unsure], 3.5)
    assert math.log(value.high / value.low) == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(2), rel=0.2)
    assert stats.at_entropy([rows[3:]], 3.5) is None and stats.at_entropy([rows, []], 3.5) is None
