"""The study's statistics by hand, its verdicts on made-up runs, and its stored tables from the stored runs."""

import gzip
import importlib
import json
import time
import types
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = importlib.import_module("study")
    for cached in (study.stored, study.numbers, study.row):
        cached.cache_clear()
    return study


def write(folder: Path, ode: list[float], bon: list[float], final: float) -> None:
    # At step 1 it is still the cloned policy; from step 2 on the actor moves.
    rows = [{"step": 0, "eval/ode_success": 0.4}, {"step": 1, "eval/ode_success": 0.0, "eval/bon_success": 1.0}]
    rows += [{"step": 2, "ogpo/actor_grad": 1.0}]
    rows += [{"step": i + 2, "eval/ode_success": ode[i], "eval/bon_success": bon[i]} for i in range(len(ode))]
    rows += [{"step": len(ode) + 1, "final/ode_success": final - 0.1, "final/bon_success": final}]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    arguments = {
        "args": {"eval_episodes": 100, "eval_interval_episodes": 20, "start_training": 1}
    }  # step 1 is the cloned policy
    (folder / "args.json").write_text(json.dumps(arguments))


@pytest.mark.parametrize(
    ("values", "middle"),
    [([0.5], 0.5), ([0.9, 0.0, 0.3], 0.9 / 6 + 0.3 * 2 / 3), ([0.0, 0.2, 0.4, 1.0], 0.3)],
)
def test_interquartile_mean_by_hand(study: types.ModuleType, values: list[float], middle: float) -> None:
    assert study.interquartile_mean(np.array(values)) == pytest.approx(middle)


def test_measures_by_hand(study: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(study, "STORE", tmp_path)
    write(tmp_path / "lift_ogpo_s2", [0.4, 0.1, 0.7], [0.2, 0.8, 0.5], 0.9)
    found, drawn = study.numbers("lift", "ogpo")[2]
    expected = {"cloned": 0.4, "lowest": 0.1, "area": 0.5, "fall": 0.3, "ode": 0.8, "final": 0.9}
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected)
    # Beta(90.5, 10.5): mean 0.896, deviation 0.030
    assert drawn["final"].mean() == pytest.approx(0.896, abs=0.002)
    assert drawn["final"].std() == pytest.approx(0.030, abs=0.002)
    study.dip_file("lift", "ogpo", 2).parent.mkdir()
    study.dip_file("lift", "ogpo", 2).write_text('{"0": 0.4, "1": 0.0, "4": 0.5}')
    study.numbers.cache_clear()
    found, drawn = study.numbers("lift", "ogpo")[2]
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected | {"before": 0.4, "early": 0.0})
    # Beta(0.5, 50.5): mean 0.0098
    assert drawn["early"].mean() == pytest.approx(0.0098, abs=0.002)


def test_an_actor_that_never_moved_has_its_final_rate_as_lowest(study: types.ModuleType) -> None:
    rows = [{"step": 0, "eval/ode_success": 0.4}, {"step": 5, "eval/ode_success": 0.1, "eval/bon_success": 0.3}]
    rows += [{"step": 5, "final/ode_success": 0.5, "final/bon_success": 0.6}]
    assert study.measures(study.evaluations(rows, 1))["lowest"] == 0.5


def test_the_dip_is_asked_before_and_after_updates_of_the_actor(
    study: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    diagnose = importlib.import_module("diagnose")
    updates: list[int] = []
    agent = types.SimpleNamespace(actor_updates=0)

    def update(*_: object) -> dict[str, float]:  # the actor waits for two updates
        updates.append(1)
        agent.actor_updates = max(0, len(updates) - 2)
        return {}

    script = types.SimpleNamespace(update=update)
    script.main = lambda argv: [script.update(agent, None, None) for _ in range(1_000)]
    monkeypatch.setattr(diagnose, "module", lambda config: script)
    monkeypatch.setattr(diagnose, "success", lambda *_: len(updates) / 1_000)
    monkeypatch.setattr(diagnose, "RUNS", tmp_path)
    monkeypatch.setattr(study, "STORE", tmp_path)
    assert diagnose.dip("lift", "ogpo+", 1) == 0
    expected = {"0": 0.0} | {str(n): (n + 2) / 1_000 for n in diagnose.AFTER}
    assert json.loads(study.dip_file("lift", "ogpo+", 1).read_text()) == expected
    assert len(updates) == 502 and script.update is update
    script.main = lambda argv: [script.update(agent, None, None) for _ in range(100)]
    assert diagnose.dip("lift", "ogpo+", 2) == 1  # its actor had too few updates
    assert not study.dip_file("lift", "ogpo+", 2).exists()


@pytest.mark.parametrize(
    ("first", "second", "sign", "verdict"),
    [
        ((0.9, 0.95, 1.0), (0.3, 0.4, 0.2), 1, "holds"),
        ((0.9, 0.95, 1.0), (0.3, 0.4, 0.2), -1, "does not hold"),
        ((0.9, 0.95, 1.0), (0.3, 0.4, 0.2), 0, "does not hold"),
        ((0.9, 0.95, 1.0), (0.95, 0.9, 1.0), 1, "undecided"),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 0, "holds"),
        ((0.5, 0.6, 0.4), (0.5, 0.4, 0.6), 0, "undecided"),
    ],
)
def test_verdicts(
    study: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    first: tuple[float, ...],
    second: tuple[float, ...],
    sign: int,
    verdict: str,
) -> None:
    monkeypatch.setattr(study, "STORE", tmp_path)
    for name, finals in (("ogpo+", first), ("ogpo", second)):
        for seed, final in enumerate(finals, 1):
            write(tmp_path / f"can_{name}_s{seed}", [0.5], [0.5], final)
    line = study.judge(study.Claim("a claim", "ogpo+", "ogpo", "final", sign), "can")
    assert line.split(" | ")[-1] == f"{verdict} |", line
    assert study.judge(study.Claim("a claim", "ogpo+", "ogpo", "final", sign), "lift") is None


def test_a_seed_alone_is_in_no_claim(study: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs are compared by seed, from the same cloned policy."""
    monkeypatch.setattr(study, "STORE", tmp_path)
    write(tmp_path / "can_bptt_s1", [0.5], [0.5], 0.1)
    write(tmp_path / "can_ogpo+ca_s2", [0.5], [0.5], 0.9)
    assert study.judge(study.Claim("a claim", "bptt", "ogpo+ca", "final", -1), "can") is None
    assert "-0.30 [" in study.judge(study.Claim("a claim", "bptt", "bptt", "final", -1, "cloned"), "can")


def test_what_a_claim_compares_is_run(study: types.ModuleType) -> None:
    run = {config for panels in study.FIGURES.values() for _, configs in panels for config in configs}
    assert run == set(study.CONFIGS)
    assert {c for claim in study.CLAIMS for c in (claim.first, claim.second) if c} <= run


def test_stored_tables_are_remade_from_the_stored_runs(
    study: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (study.STORE / "results.md").read_text()
    monkeypatch.setattr(study, "plot", lambda figure: None)
    written: list[str] = []
    monkeypatch.setattr(Path, "write_text", lambda self, text: written.append(text))
    study.report()
    assert written == [before]


def test_runs_wait_for_their_cloned_policy(study: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose clone failed is not started and counts as failed; one that clones for itself does not wait."""
    ended: list[tuple] = []

    def one(task: str, config: str, seed: int) -> int:
        if config not in ("clone", *study.ALONE):
            assert (task, "clone", seed) in ended
        time.sleep(0.02 if config == "clone" else 0)
        ended.append((task, config, seed))
        return int(config == "clone" and task == "can" and seed == 2)

    monkeypatch.setattr(study, "run_one", one)
    assert study.run(["diffusion"], (1,), jobs=3) == 0
    assert set(ended) == {(t, c, 1) for t in ("lift", "can") for c in ("clone", "ogpo+ca", "diffusion")}
    assert study.run(["diffusion"], (2,), jobs=3) == 1
    assert ("can", "diffusion", 2) in ended
    assert ("can", "ogpo+ca", 2) not in ended
    ended.clear()
    assert study.run(["tasks", "diffusion"], (1,), 1, tasks=["lift"], only=["diffusion"]) == 0
    assert ended == [("lift", "diffusion", 1)]
