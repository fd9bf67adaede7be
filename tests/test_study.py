"""The study's statistics by hand, and its verdicts on made-up runs."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import study
import study_stats as stats
from common.runlog import write_json
from runs import Run, read, write
from study_configs import CLAIMS, CONFIGS, FIGURES, Claim


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty store in place of the study's."""
    monkeypatch.setattr(stats, "STORE", tmp_path)
    clear()
    yield tmp_path
    clear()


def clear() -> None:
    for cached in (read, stats.stored, stats.numbers):
        cached.cache_clear()


def made_up(name: str, ode: list[float], bon: list[float], final: float) -> Run:
    """At step 1 it is still the cloned policy; from step 2 on the actor moves."""
    rows = [{"step": 0, "eval/ode_success": 0.4}, {"step": 1, "eval/ode_success": 0.0, "eval/bon_success": 1.0}]
    rows += [{"step": 2, "ogpo/actor_grad": 1.0}]
    rows += [{"step": i + 2, "eval/ode_success": ode[i], "eval/bon_success": bon[i]} for i in range(len(ode))]
    rows += [{"step": len(ode) + 1, "final/ode_success": final - 0.1, "final/bon_success": final}]
    return Run(name, {"eval_episodes": 100, "eval_interval_episodes": 20, "start_training": 1}, {}, 1, rows)


@pytest.mark.parametrize(
    ("values", "middle"),
    [([0.5], 0.5), ([0.9, 0.0, 0.3], 0.9 / 6 + 0.3 * 2 / 3), ([0.0, 0.2, 0.4, 1.0], 0.3)],
)
def test_interquartile_mean_by_hand(values: list[float], middle: float) -> None:
    assert stats.interquartile_mean(np.array(values)) == pytest.approx(middle)


def test_numbers_by_hand(store: Path) -> None:
    write(store, [made_up("lift_ogpo_s2", [0.4, 0.1, 0.7], [0.2, 0.8, 0.5], 0.9)])
    found = stats.numbers("lift", "ogpo")[2]
    expected = {"cloned": 0.4, "lowest": 0.1, "area": 0.5, "fall": 0.3, "ode": 0.8, "final": 0.9}
    assert found.values == pytest.approx(expected)
    # Beta(90.5, 10.5): mean 0.896, deviation 0.030
    assert found.drawn["final"].mean() == pytest.approx(0.896, abs=0.002)
    assert found.drawn["final"].std() == pytest.approx(0.030, abs=0.002)
    write_json(store / "dip.json", {"lift_ogpo_s2": {"0": 0.4, "1": 0.0, "4": 0.5}})
    clear()
    found = stats.numbers("lift", "ogpo")[2]
    assert found.values == pytest.approx(expected | {"before": 0.4, "early": 0.0})
    # Beta(0.5, 50.5): mean 0.0098
    assert found.drawn["early"].mean() == pytest.approx(0.0098, abs=0.002)


def test_evaluations_of_an_actor_that_never_moved_are_its_final_rate() -> None:
    rows = [{"step": 0, "eval/ode_success": 0.4}, {"step": 5, "eval/ode_success": 0.1, "eval/bon_success": 0.3}]
    rows += [{"step": 5, "final/ode_success": 0.5, "final/bon_success": 0.6}]
    run = Run("name", {"start_training": 1}, {}, 1, rows)
    assert stats.first_move(run) == float("inf")
    assert stats.measures(stats.evaluations(run))["lowest"] == 0.5


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
def test_judge_verdicts(
    store: Path, first: tuple[float, ...], second: tuple[float, ...], sign: int, verdict: str
) -> None:
    write(
        store,
        [
            made_up(f"can_{name}_s{seed}", [0.5], [0.5], final)
            for name, finals in (("ogpo+", first), ("ogpo", second))
            for seed, final in enumerate(finals, 1)
        ],
    )
    claim = Claim("a claim", "ogpo+", "ogpo", "final", sign)
    found = stats.judge(claim, "can")
    assert found.verdict == verdict
    assert found.by_seed == pytest.approx([one - two for one, two in zip(first, second, strict=True)])
    assert found.low <= found.middle <= found.high
    assert stats.judge(claim, "lift") is None


def test_judge_leaves_out_a_seed_alone(store: Path) -> None:
    """Runs are compared by seed, from the same cloned policy."""
    write(store, [made_up("can_bptt_s1", [0.5], [0.5], 0.1), made_up("can_ogpo+ca_s2", [0.5], [0.5], 0.9)])
    assert stats.judge(Claim("a claim", "bptt", "ogpo+ca", "final", -1), "can") is None
    found = stats.judge(Claim("a claim", "bptt", "bptt", "final", -1, "cloned"), "can")
    assert found.by_seed == pytest.approx((-0.3,)) and found.verdict == "seeds missing"


def test_claims_compare_what_is_run() -> None:
    run = {config for figure in FIGURES.values() for config in figure.configs}
    assert run == set(CONFIGS)
    assert {config for claim in CLAIMS for config in (claim.first, claim.second)} <= run


def test_figures_panels_show_every_configuration_few_at_a_time() -> None:
    for figure in FIGURES.values():
        assert {config for panel in figure.panels for config in panel.configs} == set(figure.configs)
        assert all(2 <= len(panel.configs) <= 4 for panel in figure.panels)


def test_store_keeps_the_cloned_policy_as_a_file(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    folder = tmp_path / "runs" / "study_can_clone_s2"
    folder.mkdir(parents=True)
    for name, text in (
        ("args.json", '{"args": {}}'),
        ("metrics.jsonl", ""),
        ("wall_seconds", "7\n"),
        ("cloned.pt", "c"),
    ):
        (folder / name).write_text(text)
    assert study.cloned("can", 2) == folder
    study.store()
    assert list(read(store)) == ["can_clone_s2"]
    assert study.cloned("can", 2) == store / "can_clone_s2"
    assert (store / "can_clone_s2" / "cloned.pt").read_text() == "c"


def test_run_waits_for_the_cloned_policy(monkeypatch: pytest.MonkeyPatch) -> None:
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
