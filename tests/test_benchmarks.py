"""What the benchmarks store and report, and that their commands are those of the scripts."""

import gzip
import importlib
import json
import sys
import types
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from common import cli, jobs

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import captions
import diagnose
import flm
import lift
import peers
import pixels
import probes
import runs
import study
import study_stats
import tables
import tasks
import toy
import update_speed

ROOT = Path(__file__).resolve().parent.parent
STORES = ("flm", "lift", "lift/tuning", "peers", "pixels", "study", "tasks", "toy")


def finished(folder: Path, rows: list[dict], args: dict, seconds: int) -> Path:
    """A run folder as a script and `execute` leave it."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "args.json").write_text(json.dumps({"args": args, "cpu": "a CPU", "gpu": None}))
    (folder / "wall_seconds").write_text(f"{seconds}\n")
    return folder


def test_execute_told_to_stop_is_not_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "checkpoint.pt").touch()  # so that the folder is kept
    script = tmp_path / "script.py"
    for words, code in (("saved; go on with: --resume", jobs.STOPPED), ("success 0.50", 0)):
        script.write_text(f"print({words!r}); print('learning curve')")
        assert runs.execute(str(script), "name", []) == code
        assert (tmp_path / "name" / "wall_seconds").exists() == (code == 0)


def test_run_minutes_adds_the_parts_before_a_resume() -> None:
    """Stopped after 60 s (the last line of the log that counts) and after 30 s, then 90 s to the end."""
    walls = [20.0, 60.0, 10.0, 30.0, 15.0, 80.0]
    rows = [{"step": i, "time/wall": wall} for i, wall in enumerate(walls)] + [{"step": 9, "eval/x": 1}]
    assert runs.Run("name", {}, {}, 90, rows).minutes == (60 + 30 + 90) / 60


def test_run_series_leaves_out_rows_without_the_metric() -> None:
    run = runs.Run(
        "name", {}, {}, 1, [{"step": 0, "a": 1}, {"step": 5, "b": 2}, {"step": 7, "a": None}, {"step": 9, "a": 3}]
    )
    steps, values = run.series("a")
    assert steps.tolist() == [0, 9] and values.tolist() == [1, 3]
    assert run.first("a") == 1 and run.last("a") == 3 and np.isnan(run.last("c"))


def test_keep_stores_finished_runs_beside_the_stored_ones(tmp_path: Path) -> None:
    store, rows = tmp_path / "store", [{"step": 3, "a": 0.1 + 0.2, "bad": float("nan")}]
    one = finished(tmp_path / "one", rows, {"seed": 1}, 5)
    two = finished(tmp_path / "two", [], {"seed": 2}, 6)
    (tmp_path / "going_on").mkdir()
    kept = runs.keep(store, {"b_s1": one, "b_s2": tmp_path / "going_on", "b_s3": tmp_path / "absent"})
    assert kept == ["b_s1"]
    assert runs.keep(store, {"a_s2": two}, lambda folder: {"name.txt": folder.name}) == ["a_s2"]
    found = runs.read(store)
    assert list(found) == ["a_s2", "b_s1"]
    assert json.dumps(found["b_s1"].metrics) == json.dumps(rows)
    assert found["b_s1"].args == {"seed": 1} and found["b_s1"].machine == {"cpu": "a CPU", "gpu": None}
    assert found["b_s1"].wall_seconds == 5 and found["a_s2"].files == {"name.txt": "two"}
    assert list(runs.read_seeds(store, "b", (1, 2))) == [1]
    before = (store / "runs.jsonl.gz").read_bytes()
    runs.write(store, reversed(found.values()))
    assert (store / "runs.jsonl.gz").read_bytes() == before


@pytest.mark.parametrize("name", STORES)
def test_read_gives_back_every_stored_line(name: str) -> None:
    file = ROOT / "benchmarks" / name / "runs.jsonl.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    found = runs.read(file.parent)
    assert len(found) == len(lines) and sorted(found) == list(found)
    for line, run in zip(lines, found.values(), strict=True):
        assert json.dumps(vars(run), separators=(",", ":")) == line
        assert run.metrics and all("step" in row for row in run.metrics)
        if name != "lift/tuning":  # explored before arguments and times were kept
            assert run.wall_seconds > 0 and run.args["seed"] > 0 and run.machine["versions"]["torch"]


@pytest.mark.parametrize(
    ("module", "page"),
    [
        (lift, "lift/results.md"),
        (tasks, "tasks/results.md"),
        (pixels, "pixels/results.md"),
        (flm, "flm/results.md"),
        (study, "study/results.md"),
        (diagnose, "study/diagnostics.md"),
        (toy, "toy/results.md"),
        (peers, "peers/results.md"),
        (captions, "captions/results.md"),
    ],
)
def test_report_remakes_the_stored_page(module: types.ModuleType, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = (ROOT / "benchmarks" / page).read_text()
    written: dict[Path, str] = {}
    figures: list[Path] = []
    monkeypatch.setattr(Path, "write_text", lambda self, text: written.update({self: text}))
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(path))
    module.report()
    assert written == {ROOT / "benchmarks" / page: stored}
    assert (figures or module in (toy, peers, captions)) and all(path.exists() for path in figures)


def test_tables_has_every_table_of_the_stored_pages() -> None:
    found = tables.tables()
    assert all(table.count("\n") >= 2 and not table.endswith("\n") for table in found.values())
    for name in ("lift", "tasks", "pixels", "flm", "study", "toy", "peers", "captions"):
        paragraphs = (ROOT / "benchmarks" / name / "results.md").read_text().rstrip().split("\n\n")
        pages = [paragraph.strip() for paragraph in paragraphs if paragraph.startswith("|")]
        assert pages and not set(pages) - set(found.values()), name


def test_tables_measured_has_a_table_below_every_heading() -> None:
    text = (ROOT / "benchmarks" / "measured.md").read_text()
    assert len(tables.measured()) == text.count("\n## ")
    assert "\n".join(line for line in text.splitlines() if line.startswith("|")) == "\n".join(
        tables.measured().values()
    )


def started(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """(script, flags) of everything that a benchmark runs."""
    found: list[tuple[str, list[str]]] = []

    def execute(script: str, name: str, flags: list[str], resume: tuple[str, ...] = ()) -> int:
        found.append((script, [*flags, "--run-name", name]))
        return 0

    monkeypatch.setattr(runs, "execute", execute)
    if module is lift:
        for config in lift.CONFIGS:
            lift.run_one(config, 1)
    elif module is tasks:
        tasks.run(1, tasks.NAMES, [1], Path("policies"))
    elif module is pixels:
        for name in pixels.NAMES:
            pixels.run_one(name, 1)
    elif module is toy:
        for name in toy.COMMANDS:
            toy.run_one(name)
    elif module is study:
        study.run(list(study.FIGURES), (1,), jobs=1)
        found.append(("ogpo_state.py", study.run_flags("lift", "clone", 1)))
    elif module is peers:
        peers.run(list(peers.STEPS), list(peers.METHODS), [1], jobs=1)
        peers.tune(list(peers.METHODS), jobs=1)
    elif module is captions:
        captions.run()
    elif module is diagnose:
        for config in ("ogpo+ca", "bptt", "start+", "start+ca", "ogpo+", "lr_warmup"):
            flags = diagnose.run_flags("lift", config, 1)
            found.append((study.CONFIGS[config].script, [*flags, "--eval-every", "2000", "--total-steps", "0"]))
    else:
        monkeypatch.setattr(flm, "evaluate", lambda script, run, *flags: found.append((script, list(flags))))
        flm.run([1], "ngram")
        flm.judge([1], "smollm2")
        flm.frontier()
        flm.ablations(1_000)
        flm.time()
    return found


@pytest.mark.parametrize("module", [lift, tasks, pixels, study, diagnose, flm, toy, peers, captions])
def test_commands_parse_by_their_scripts(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of a benchmark is one that its script, as it is now, accepts; a flag sets what it names."""
    refused = {}
    commands = started(module, monkeypatch)
    for script, flags in commands:
        try:
            program = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            text = script.removeprefix("variants/").startswith("f")  # its teacher's arguments would be looked for
            names = ("data",) if text else signature(program.default_args).parameters
            chosen = cli.peek(flags, *names)
            args = cli.flatten(cli.parse(program.default_args(**chosen), flags, ""))
            assert args.items() >= chosen.items()
        except (Exception, SystemExit) as error:
            refused[f"{script} {' '.join(flags)}"] = repr(error)
    assert commands and not refused


def test_rollouts_returns_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two: an episode that ends with its third step, then one that is cut after its second."""
    ends = {0: (3, True), 1: (2, False)}

    class Env:
        def reset(self, seed: int) -> tuple[np.ndarray, dict]:
            self.length, self.good = ends[seed - probes.SEED]
            self.steps = 0
            return np.zeros(1, np.float32), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            self.steps += 1
            over = self.steps == self.length
            return (
                np.zeros(1, np.float32),
                0.0,
                over and self.good,
                over and not self.good,
                {"success": over and self.good},
            )

        def close(self) -> None:
            pass

    torch = probes.torch
    agent = types.SimpleNamespace(critic_ema=lambda obs, action: torch.full((2, len(obs)), 7.0))
    script = types.SimpleNamespace(act_best_of_n=lambda agent, args, obs, rng: torch.zeros(len(obs), 2, 1))
    critic = types.SimpleNamespace(reward_offset=-1.0, success_bonus=5.0, gamma=0.5)
    task = types.SimpleNamespace(horizon=9)
    args = types.SimpleNamespace(critic=critic, task=task, run=types.SimpleNamespace(env="toy"))
    monkeypatch.setattr(probes, "make_env", lambda env, horizon: Env())
    monkeypatch.setattr(probes, "EPISODES", 2)
    found = probes.rollouts(script, agent, args)
    # -1 - 1/2 + 4/4 from the start, 4 from the third step; cut: -1 - 1/2 - 2/4, as never succeeding is worth -2
    assert found["return"].tolist() == [-0.5, 4.0, -2.0]
    assert found["q"].tolist() == [7.0] * 3 and found["success"].tolist() == [True, False]


def test_probes_ask_a_trained_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = probes.module("ogpo+ca")
    script.main(
        [
            *("--env", "toy", "--run-dir", str(tmp_path), "--run-name", "run", "--total-steps", "300", "--no-video"),
            *("--bc-steps", "20", "--bc-eval-every", "20", "--bc-eval-episodes", "2", "--eval-episodes", "2"),
            *("--num-demos", "5", "--start-training", "200", "--data-dir", str(tmp_path)),
        ]
    )
    agent, args = probes.load(script, tmp_path / "run")
    assert agent.bc_done and args.run.env == "toy"
    monkeypatch.setattr(probes, "EPISODES", 2)
    found = probes.rollouts(script, agent, args)
    assert len(found["obs"]) == len(found["q"]) == len(found["return"]) and len(found["success"]) == 2
    spread = probes.spread(script, agent, args, found["obs"])
    assert all(len(values) == len(found["obs"]) and np.isfinite(values).all() for values in spread.values())
    assert min(spread["along"]) > 0 and min(spread["across"]) > 0 and max(spread["consensus"]) <= 1 + 1e-6
    monkeypatch.setattr(probes, "DIP_EPISODES", 4)
    assert probes.success(script, agent, args) == probes.success(script, agent, args)


def test_dip_asks_before_and_after_updates_of_the_actor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    updates: list[int] = []
    agent = types.SimpleNamespace(actor_updates=0)

    def update(*_: object) -> dict[str, float]:  # the actor waits for two updates
        updates.append(1)
        agent.actor_updates = max(0, len(updates) - 2)
        return {}

    script = types.SimpleNamespace(update=update)
    script.main = lambda argv: [script.update(agent, None, None) for _ in range(1_000)]
    monkeypatch.setattr(probes, "module", lambda config: script)
    monkeypatch.setattr(probes, "success", lambda *_: len(updates) / 1_000)
    monkeypatch.setattr(probes, "RUNS", tmp_path)
    monkeypatch.setattr(study_stats, "STORE", tmp_path)
    assert diagnose.dip("lift", "ogpo+", 1) == 0
    expected = {"0": 0.0} | {str(n): (n + 2) / 1_000 for n in probes.AFTER}
    assert study_stats.read_dips() == {"lift_ogpo+_s1": expected}
    assert len(updates) == 502 and script.update is update
    script.main = lambda argv: [script.update(agent, None, None) for _ in range(100)]
    assert diagnose.dip("lift", "ogpo+", 2) == 1  # its actor had too few updates
    assert study_stats.read_dips() == {"lift_ogpo+_s1": expected}


def test_update_speed_main_prints_both_advantages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(update_speed, "GEMM", 64)
    monkeypatch.setattr(sys, "argv", ["update_speed.py", "--presets", "laptop", "--repeats", "1"])
    update_speed.main()
    out = capsys.readouterr().out
    assert "vanilla" in out and "with an advantage 1.000" in out and "conservative" in out


def test_toy_results_are_the_printed_distances(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toy, "RUNS", tmp_path)
    words = "total variation distance from the language"
    (tmp_path / "run.txt").write_text(f"step 5\n1 steps: {words} 0.500\nreal text: {words} 0.075\n\n1 steps (x.txt):\n")
    (tmp_path / "robot.txt").write_text("success 0.50\n")
    assert toy.results(tmp_path / "run") == {"distances": {"1 steps": 0.5, "real text": 0.075}}
    assert toy.results(tmp_path / "robot") == {}


def test_bleu_against_references_is_self_bleus_of_two_rows() -> None:
    rows = ["a man rides a red bike .".split(), "a man on a bike rides a wave .".split()]
    for n in (2, 3, 4):
        each = [captions.bleu([rows[i]], [rows[1 - i]], n) for i in (0, 1)]
        assert np.mean(each) == pytest.approx(captions.self_bleu(rows, n))
    # 2 of 3 words and 1 of 2 pairs are in a reference, which is as long
    assert captions.bleu([["a", "b", "c"]], [["a", "b", "d"], ["x"] * 9], 2) == pytest.approx((2 / 3 * 1 / 2) ** 0.5)


def test_whole_captions_leaves_out_what_an_edge_cuts() -> None:
    assert captions.whole_captions(["\non a bed .\nA dog runs.\n\ntwo birds\na man in\n", "\nno end"]) == [
        ["a", "dog", "runs", "."], ["two", "birds"],
    ]  # fmt: skip


def test_peers_measures_by_hand() -> None:
    metrics = [{"step": s, "eval/act_success": x} for s, x in ((0, 0.3), (100, 0.85), (200, 0.8), (300, 0.95))]
    metrics += [{"step": 300, "final/act_success": 0.97, "final/ode_success": 0.9}]
    run = runs.Run("toy_qc_s1", {"seed": 1, "eval_episodes": 100}, {}, 60, metrics)
    assert peers.acting(run) == "act" and peers.steps_to(run, 0.8) == 100 and peers.steps_to(run, 0.96) == np.inf
    rate, drawn = peers.final(run, "act")
    assert rate == 0.97 and drawn.mean() == pytest.approx(97.5 / 101, abs=1e-3)
