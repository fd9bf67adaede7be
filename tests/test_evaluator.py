"""Evaluations beside the training: the same numbers, exact resume, failures, and the end at a rate of success."""

import os
import subprocess
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from common import checkpoint
from common.envs import make_vec_env
from common.errors import EnvError, UserError
from common.evaluator import Evaluator
from common.runlog import read_metrics
from tests.helpers import slow
from tests.test_failures import children, line
from tests.test_training import SMALL, assert_interruptions_change_nothing, assert_same_run, train

__all__ = ["line"]  # a fixture
BESIDE = ["--eval-envs", "1", "--eval-every", "200", "--eval-interval-episodes", "20"]


def divide(envs: object) -> float:
    return envs.num_envs / 0


def size(envs: object) -> int:
    return envs.num_envs


def wrong(envs: object) -> None:
    raise UserError("a mistake")


def make_nothing() -> None:
    raise UserError("no such environment")


def die(envs: object) -> None:
    os._exit(3)


def test_evaluator_works_and_says_what_failed() -> None:
    for work, error, said in (
        (divide, EnvError, r"in an evaluation: ZeroDivisionError: .* \(test_evaluator.py:\d+\)"),
        (wrong, UserError, "^a mistake$"),
        (die, EnvError, r"in an evaluation: its process died \(exit code 3\)"),
    ):
        evaluator = Evaluator(partial(make_vec_env, "toy", 2))
        assert evaluator.single_action_space.shape == (2,)
        for _ in range(2):
            evaluator.ask(size)
            assert evaluator.answer() == 2
        evaluator.ask(work)
        with pytest.raises(error, match=said):
            evaluator.answer()
        evaluator.ask(size)  # it has ended: no work is taken, and that is said
        with pytest.raises(EnvError, match="its process died"):
            evaluator.answer()
        below = children(evaluator.process.pid)
        evaluator.close()
        assert not evaluator.process.is_alive() and not any(map(children, below))


def test_evaluator_environments_that_cannot_be_made() -> None:
    with pytest.raises(UserError, match="no such environment"):
        Evaluator(make_nothing)


@pytest.mark.slow
@pytest.mark.parametrize("envs", ["1", "3"])
def test_begin_evaluation_gives_what_evaluate_does_and_resumes_exactly(envs: str, tmp_path: Path) -> None:
    """Runs that wait for their evaluations, that do not, and of the latter one that is killed, stopped and resumed."""
    flags = [*SMALL, *BESIDE, "--num-envs", envs, "--checkpoint-every", "100"]
    assert_interruptions_change_nothing(
        tmp_path, flags, [("6", subprocess.Popen.kill), ("9", subprocess.Popen.terminate)]
    )
    total = str(checkpoint.load(tmp_path / "whole" / "checkpoint.pt")["step"])
    train(tmp_path, *flags, "--eval-envs", "0", "--run-name", "waits", "--total-steps", total)
    assert_same_run(tmp_path / "waits", tmp_path / "whole")


def test_begin_evaluation_is_in_a_checkpoint_until_it_has_ended(tmp_path: Path, line: list[str]) -> None:
    """A checkpoint of the step at which an evaluation begins; what is evaluated is what was, not what has become."""
    flags = [*line, "--env", "line:Line-v0", *BESIDE, "--checkpoint-every", "200", "--total-steps", "400"]
    train(tmp_path, *flags, "--run-name", "whole")
    assert (
        checkpoint.load(tmp_path / "whole" / "checkpoint.prev.pt")["beside"]["step"] == 400
    )  # at the end, saved twice
    train(tmp_path, "--resume", str(tmp_path / "whole"), "--env", "line:Line-v0")
    steps = [row["step"] for row in read_metrics(tmp_path / "whole") if "eval/bon_success" in row]
    assert steps == [200, 400]


def test_good_enough_ends_a_run_after_two_evaluations(tmp_path: Path) -> None:
    for name, processes in (("run0", "1"), ("run1", "0")):
        flags = [
            *SMALL,
            *BESIDE,
            "--eval-envs",
            processes,
            "--bc-steps",
            "400",
            "--bc-stop-success",
            "1",
            "--bc-eval-every",
            "400",
        ]
        train(tmp_path, *flags, "--total-steps", "3000", "--stop-success", "0.05", "--run-name", name)
        rows = read_metrics(tmp_path / name)
        rates = [row["eval/bon_success"] for row in rows if "eval/bon_success" in row]
        assert min(rates[-2:]) >= 0.05 and all(min(pair) < 0.05 for pair in pairwise(rates[:-1]))
        end_step = rows[-1]["step"]
        assert "final/bon_success" in rows[-1] and 400 <= end_step < 3000
    assert_same_run(tmp_path / "run0", tmp_path / "run1")
    train(tmp_path, "--resume", str(tmp_path / "run0"))  # nothing is left to do
    assert_same_run(tmp_path / "run0", tmp_path / "run1")
    train(tmp_path, "--resume", str(tmp_path / "run0"), "--stop-success", "0", "--total-steps", str(end_step + 300))
    assert checkpoint.load(tmp_path / "run0" / "checkpoint.pt")["step"] == end_step + 300


@pytest.mark.parametrize(("fault", "envs"), [slow("raises", "1"), ("dies", "2"), slow("reward", "2")])
def test_begin_evaluation_failed_environment_is_named(fault: str, envs: str, tmp_path: Path, line: list[str]) -> None:
    env = ["--env", f"line:{fault.title()}EvalLine-v0"]
    for flags in ([*line, *env, *BESIDE, "--eval-envs", envs], ["--resume", str(tmp_path / "run"), *env]):
        done = train(tmp_path, *flags, check=1)
        assert "episode seed 200000, " in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.strip().endswith(f"--resume {tmp_path / 'run'} {' '.join(env)}")
        assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["beside"]["step"] == 200
