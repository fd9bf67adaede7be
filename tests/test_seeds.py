"""Episode seeds: no episode serves two purposes, and those of the stored runs are as they were."""

import random
from pathlib import Path

import pytest

import ogpo_state as og
from common import evaluator
from common.envs.toy import ToyReach
from common.seeds import BLOCK, DEMOS, ENV, TRAIN, USES, demo_seed, eval_seeds, train_seed

LAST = 2**31 - 1  # of --seed


def some(last: int) -> list[int]:
    """The ends of a range, numbers around powers of two and of ten, and drawn ones."""
    draw = random.Random(0)
    marks = {m + d for m in (2**29, 2**30, 2**31, *(10**k for k in range(10))) for d in (-1, 0, 1)}
    return sorted({0, last, *(m for m in marks if m <= last), *(draw.randint(0, last) for _ in range(300))})


def test_train_seed_lies_in_its_range() -> None:
    for seed in some(LAST):
        for env in (0, 1, 147, 148, 1023):
            for episode in (0, 1, ENV - 1, 10**9):
                assert TRAIN <= train_seed(seed, env, episode) < DEMOS


def test_eval_seeds_of_two_uses_never_meet() -> None:
    """Their blocks take turns, whatever the number of episodes."""
    for turn, use in enumerate(USES):
        seeds = eval_seeds(use, 2 * BLOCK)
        assert all(0 <= seed < TRAIN and seed // BLOCK % len(USES) == turn for seed in seeds)
        assert len(set(seeds)) == len(seeds)
        assert [seed % 10 for seed in seeds[:20]] == [*range(10)] * 2  # tasks of MT10 take turns


def test_demo_seed_lies_above_the_others() -> None:
    assert all(DEMOS <= demo_seed(seed, n) < 2**32 for seed in some(10**6) for n in (0, 20 * 10**9 + 19))


def test_train_seed_environments_of_a_run_have_their_own() -> None:
    for seed in some(LAST):
        starts = sorted(train_seed(seed, env, 0) for env in range(1024))
        gaps = [b - a for a, b in zip(starts, [*starts[1:], starts[0] + DEMOS - TRAIN], strict=True)]
        assert min(gaps) >= ENV


def test_seeds_of_the_stored_runs_are_as_they_were() -> None:
    """Those have --seed 1 to 5, one environment."""
    for seed in range(1, 6):
        for env in range(8):
            before = (seed * 1_000 + env) * 1_000_000 % 2**31
            assert [train_seed(seed, env, k) for k in (0, 1, 99_999)] == [before, before + 1, before + 99_999]
    for use, first in (("final", 0), ("bc", 100_000), ("interval", 200_000)):
        assert eval_seeds(use, BLOCK) == list(range(first, first + BLOCK))
    assert demo_seed(0, 7) == 2**31 + 7


@pytest.mark.parametrize("seed", ["0", "2", "1024000000"])
def test_main_trains_on_no_episode_of_an_evaluation(seed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, evaluated, evaluate, start = [], [], evaluator.evaluate, ToyReach._start

    def note(env: ToyReach, seed: int) -> object:
        begun.append(seed)
        return start(env, seed)

    def spy(envs: object, act: object, seeds: list[int], encode: object) -> object:
        evaluated.extend(seeds)
        before = len(begun)
        result = evaluate(envs, act, seeds, encode)
        assert set(begun[before:]) == set(seeds)
        del begun[before:]
        return result

    monkeypatch.setattr(ToyReach, "_start", note)
    monkeypatch.setattr(evaluator, "evaluate", spy)
    flags = "--env toy --no-video --num-demos 2 --bc-steps 2 --bc-eval-every 2 --bc-eval-episodes 3 --eval-episodes 5"
    flags += " --total-steps 400 --start-training 300 --eval-every 100 --eval-interval-episodes 4 --run-name run"
    og.main([*flags.split(), "--seed", seed, "--run-dir", str(tmp_path), "--data-dir", str(tmp_path)])
    demos, trained = [s for s in begun if s >= DEMOS], [s for s in begun if s < DEMOS]
    assert len(demos) >= 2 and len(trained) >= 10 and len(set(trained)) == len(trained)
    assert not set(trained) & set(evaluated)
