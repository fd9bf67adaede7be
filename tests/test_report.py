"""tools/report.py: the runs' numbers, well-formed, loading nothing, escaped; one line for wrong input."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from common.errors import UserError
from common.evaluate import wilson
from common.judge.metrics import TextScore
from tests.test_compare import make_run
from tools import report, webpage

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that every tag is closed; collects tables [[cell, ...], ...], ids, attributes and other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tables, self.attributes, self.said = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data

    def table(self, *head: str) -> list[list[str]]:
        """The rows below a line that begins with these cells."""
        return next(table[1:] for table in self.tables if table[0][: len(head)] == [*head])


def report_of(runs: list[Path], out: Path) -> Page:
    report.main([*map(str, runs), "--out", str(out)])
    return Page(out.read_text())


def robot(folder: Path, success: list[float], final: tuple[float, float] = (0.5, 0.75), **args: object) -> Path:
    """A run of four final episodes."""
    make_run(folder, success, **{"eval_episodes": 4, "eval_interval_episodes": 10} | args)
    last = {"step": 250, "final/ode_success": final[0], "final/bon_success": final[1], "final/bon_length": 12.3}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(last | {"final/ode_length": 14.5, "time/wall": 150.0}) + "\n")
    return folder


def scores(*perplexities: float) -> list[TextScore]:
    """Lines of 1, 2, ... calls and of real text."""
    names = [*(f"{i} steps" for i in range(1, len(perplexities))), "real text"]
    rest = dict(judge="ngram", unit="word", entropy=3.25, self_bleu=0.5, distances=(0.1, 0.2, 0.3), copied=0.125)
    return [TextScore(text=name, perplexity=x, samples=64, **rest) for name, x in zip(names, perplexities, strict=True)]


def language(folder: Path, made: list[TextScore], sample: str = "a text", seed: int = 1) -> Path:
    folder.mkdir()
    args = {"data": "toy", "seed": seed, "run_name": folder.name, "steps": [1, 2]}
    (folder / "args.json").write_text(json.dumps({"script": "flm_train.py", "args": args}))
    rows = [{"step": i, "valid/ce": 3.0 / i, "eval/perplexity_1": 90.0 / i, "eval/entropy_1": 3.0} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation_ngram.json").write_text(json.dumps([asdict(score) for score in made]))
    (folder / "samples_1_steps.txt").write_text(f"{sample}\n----\nsecond\n----\nthird\n----\nfourth\n")
    return folder


def test_main_shows_the_numbers_of_robot_runs(tmp_path: Path) -> None:
    runs = [
        robot(tmp_path / "a1", [0.4, 0.8, 0.9], (0.5, 0.75), seed=1),
        robot(tmp_path / "a2", [0.2, 0.6, 0.7], (0.75, 1.0), seed=2),
        robot(tmp_path / "b1", [0.4, 0.9, 1.0], chunk=8),
    ]
    page = report_of(runs, tmp_path / "out.html")
    reach = stats.t.ppf(0.975, 1) * 0.125  # sd / sqrt(2) of two values 0.25 apart
    assert reach > 1  # wider than Wilson's interval of 7 of 8 episodes: all of [0, 1]
    low, high = wilson(3, 4)
    first, second = page.table("setting", "runs", "final success, acting policy")
    assert first[:4] == ["chunk 4", "2", "0.875 [0.000, 1.000]", "0.625 [0.000, 1.000]"]
    assert second[:3] == ["chunk 8", "1", f"0.750 [{low:.3f}, {high:.3f}]"]
    assert [row[4] for row in (first, second)] == ["12.3 [12.3, 12.3]", "12.3"]
    low, high = wilson(10, 10)
    assert second[5] == f"1.000 [{low:.3f}, {high:.3f}]"
    low, high = wilson(2, 4)
    assert page.table("run", "policy")[1] == [str(runs[0]), "noise-free", f"0.500 [{low:.3f}, {high:.3f}]", "4", "14.5"]
    assert page.table("run", "setting")[0][:7] == [str(runs[0]), "chunk 4", "1", "250", "100", "200", "2.5"]
    assert page.table("argument", "chunk 4", "chunk 8") == [["chunk", "4", "8"]]
    assert ["env", "toy"] in page.table("argument", "value")


def test_curves_are_means_and_bands_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the axes that the page shows."""
    seen = {}

    def svg(figure: object, title: str) -> str:
        seen[title] = figure.axes[0]
        return ""

    monkeypatch.setattr(report, "svg", svg)
    runs = [robot(tmp_path / "a1", [0.4, 0.8]), robot(tmp_path / "a2", [0.2, 0.5], seed=2)]
    report_of([*runs, robot(tmp_path / "b1", [0.1, 0.3], chunk=8)], tmp_path / "out.html")
    assert [*seen] == ["success, acting policy"]
    one, two = seen["success, acting policy"].lines
    assert one.get_xdata().tolist() == [0, 100] and one.get_ydata() == pytest.approx([0.3, 0.65])
    assert two.get_ydata() == pytest.approx([0.1, 0.3]) and one.get_color() != two.get_color()
    band = seen["success, acting policy"].collections[0].get_paths()[0].vertices
    assert {(0, 0.2), (0, 0.4), (100, 0.5), (100, 0.8)} <= {*map(tuple, band.tolist())}


def test_main_shows_the_numbers_and_samples_of_language_runs(tmp_path: Path) -> None:
    one = language(tmp_path / "a1", scores(90.0, 40.0, 11.0), "<script>alert(1)</script> & more")
    two = language(tmp_path / "a2", scores(110.0, 50.0, 11.0), seed=2)
    later = tmp_path / "a2" / "evaluation-2"
    later.mkdir()
    (later / "args.json").write_text(json.dumps({"data": "toy", "seed": 2, "steps": [1, 2], "temperature": 0.5}))
    (later / "evaluation_ngram.json").write_text(json.dumps([asdict(score) for score in scores(70.0, 11.0)]))
    page = report_of([one, two], tmp_path / "out.html")
    low, high = 100 + np.array([-1, 1]) * stats.t.ppf(0.975, 1) * 10
    assert page.table("setting", "runs", "held-out cross entropy (nats per token)") == [
        ["runs", "2", "1.500 [1.500, 1.500]"]
    ]
    means, cooler = (t[1:] for t in page.tables if t[0][:3] == ["setting", "text", "runs"])
    assert means[0][:4] == ["runs", "1 steps", "2", f"100.00 [{max(low, 0):.2f}, {high:.2f}]"]
    assert means[2][:5] == ["runs", "real text", "2", "11.00 [11.00, 11.00]", "3.250 [3.250, 3.250]"]
    assert cooler[0] == ["runs", "1 steps", "1", "70.00", "3.250", "0.500", "0.100", "0.200", "0.300", "0.1250", "64"]
    assert "ngram, temperature 0.5, on toy" in page.said
    own = page.table("text", "perplexity (ngram, per word)")
    assert own[1] == ["2 steps", "40.00", "3.250", "0.500", "0.100", "0.200", "0.300", "12.50%", "64"]
    assert "<script>alert(1)</script> & more" in page.said and "third" in page.said and "fourth" not in page.said


def test_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    """Whatever names, arguments and texts are; ids are unique, as links within figures need."""
    odd = robot(tmp_path / "<img src=x>", [0.1, 0.2], env="$a_{<b>$", chunk='"><script>')
    text = language(tmp_path / "text", scores(90.0, 40.0, 11.0), "http://a.b <script src='http://a.b/c.js'></script>")
    (odd / "after.mp4").write_bytes(b"a film")
    for run in ([odd, robot(tmp_path / "b", [0.1, 0.2])], [text]):
        page = report_of(run, tmp_path / "out.html")
        tags = {tag for tag, *_ in page.attributes}
        assert not {"script", "link", "iframe", "img"} & tags and "svg" in tags
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "poster")]
        assert links and all(link.startswith(("#", "data:video/mp4;base64,")) for link in links)
        assert not re.search(r"url\((?!#)|@import", (tmp_path / "out.html").read_text())
        ids = [value for _, name, value in page.attributes if name == "id"]
        assert len(ids) == len({*ids}) and {link[1:] for link in links if link[0] == "#"} <= {*ids}
        policy = next(value for tag, name, value in page.attributes if value and "default-src" in value)
        assert policy.startswith("default-src 'none'")


def test_main_shows_how_the_runs_were_made(tmp_path: Path) -> None:
    runs = [robot(tmp_path / "a1", [0.1, 0.2]), robot(tmp_path / "a2", [0.1, 0.2], seed=2)]
    for run in runs:
        kept = json.loads((run / "args.json").read_text()) | {
            "argv": ["ogpo_state.py", "--env", "toy", "--run-name", "two words"],
            "versions": {"python": "3.11.2", "torch": "2.13.0"}, "git": {"commit": "0123456789abcdef", "dirty": True},
            "cpu": "a CPU", "gpu": None, "started": "2026-01-02T03:04:05+00:00",
            "changes": [{"from_step": 1000, "args": {"eval_episodes": 8}}],
        }  # fmt: skip
        (run / "args.json").write_text(json.dumps(kept))
    page = report_of(runs, tmp_path / "out.html")
    assert "all runs: commit 0123456789ab, files differed; a CPU; python 3.11.2, torch 2.13.0" in page.said
    assert "python ogpo_state.py --env toy --run-name 'two words'" in page.said
    assert f"{runs[0]}, from step 1,000: eval_episodes 8" in page.said
    assert page.table("run", "policy")[0][3] == "8" and page.table("run", "setting")[0][7] == "2026-01-02 03:04"


def test_videos_are_embedded_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = robot(tmp_path / "a", [0.1, 0.2])
    (run / "before.mp4").write_bytes(b"x" * 700_000)
    (run / "after.mp4").write_bytes(b"y" * 700_000)
    monkeypatch.setattr(report, "VIDEO_MB", 1)
    page = report_of([run], tmp_path / "out.html")
    (video,) = [value for tag, name, value in page.attributes if tag == "video" and name == "src"]
    assert video.startswith("data:video/mp4;base64,eHh4") and len(video) > 900_000
    assert f"{run / 'after.mp4'} (0.7 MB)" in page.said and "holds 1 MB" in page.said


def test_main_writes_the_same_page_again(tmp_path: Path) -> None:
    run = robot(tmp_path / "a", [0.1, 0.2])
    pages = []
    for _ in range(2):
        report_of([run], tmp_path / "out.html")
        pages.append((tmp_path / "out.html").read_bytes())
    assert pages[0] == pages[1]


def test_settings_that_differ_in_much_are_numbered(tmp_path: Path) -> None:
    many = {f"argument_{i}": i for i in range(9)}
    page = report_of(
        [robot(tmp_path / "a", [0.1, 0.2]), robot(tmp_path / "b", [0.3, 0.4], **many)], tmp_path / "o.html"
    )
    assert [row[0] for row in page.table("setting", "runs")] == ["setting 1", "setting 2"]
    assert page.table("argument", "setting 1", "setting 2")[3] == ["argument_3", "-", "3"]


def test_cell_escapes_what_is_not_html() -> None:
    assert webpage.cell("<b>") == "&lt;b&gt;" and webpage.cell(webpage.Html("<b>")) == "<b>"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nowhere"], "nowhere is no run folder"),
        (["empty"], "has no metrics yet"),
        (["damaged"], "damaged is no run folder"),
        (["cloning"], "cloning has no curve to show yet"),
        (["a", "text"], "a is of a robot and text of a language model"),
        (["broken"], "evaluation_ngram.json cannot be read"),
        (["a", "--out", "x.png"], "give --out NAME.html"),
        (["a", "--out", "folder.html"], "cannot write folder.html"),
    ],
)
def test_main_refuses_in_one_line(flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    robot(Path("a"), [0.1, 0.2])
    make_run(Path("empty"), [])
    (make_run(Path("damaged"), [0.1]) / "metrics.jsonl").write_text('{"eval/bon_success": 0.1}\n')
    (make_run(Path("cloning"), [0.1]) / "metrics.jsonl").write_text('{"step": 0, "bc/loss": 0.1}\n')
    language(Path("text"), scores(90.0, 11.0))
    language(Path("broken"), scores(90.0, 11.0)[:1])  # without real text
    Path("folder.html").mkdir()
    with pytest.raises(UserError, match=said) as caught:
        report.main(flags)
    assert "\n" not in str(caught.value) and caught.value.code == 2
    assert not [path for path in Path().iterdir() if path.is_file()]
