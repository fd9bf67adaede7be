"""A process that evaluates while this one trains."""

import multiprocessing
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import util
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from common.envs.vector import START, end_with_main, kill, quiet_server
from common.errors import EnvError, UserError, blame
from common.evaluate import Act, Encode, EvalResult, Policy, act_on_arrays, evaluate
from common.rng import Rng

Work = Callable[[VectorEnv[Any, Any, Any]], Any]


def acting(policy: Policy, device: torch.device) -> Act:
    """The policy between arrays, with the same noise each time."""
    rng = Rng(0, device)
    return lambda obs: act_on_arrays(policy, obs, rng)


def evaluate_all(
    policies: Mapping[str, Policy], encode: Encode, seeds: Sequence[int], tasks: Sequence[str],
    device: torch.device, envs: VectorEnv[Any, Any, Any],
) -> dict[str, EvalResult]:  # fmt: skip
    """{name: result} of every policy, each with the same noise; tasks: several under one policy, or none."""
    results, parts = {}, tuple(tasks[seed % len(tasks)] for seed in seeds) if tasks else ()
    for name, policy in policies.items():
        results[name] = replace(evaluate(envs, acting(policy, device), seeds, encode), parts=parts)
    return results


class Evaluator:
    """Does work with environments of its own, one piece after the other. It ends with the process that made it."""

    def __init__(self, make: Callable[[], VectorEnv[Any, Any, Any]]) -> None:
        """make: the environments, there. Raises UserError or EnvError if they cannot be made."""
        context = multiprocessing.get_context(START)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, theirs))
        quiet_server()
        self.process.start()
        theirs.close()
        util.Finalize(self, kill, ([self.process],), exitpriority=1)  # before multiprocessing waits for it
        self.single_observation_space, self.single_action_space = self.answer()

    def ask(self, work: Work) -> None:
        """Begin with work(envs), on a copy of all that `work` holds."""
        with suppress(OSError):  # it has died, which `answer` says
            self.pipe.send_bytes(pickle.dumps(work))

    def answer(self) -> Any:
        """What the work returned. Raises UserError or EnvError if it failed."""
        try:
            result, error = self.pipe.recv()
        except (EOFError, OSError) as end:
            self.process.join()
            code = self.process.exitcode
            raise EnvError(f"in an evaluation: its process died (exit code {code})") from end
        if error:
            raise error
        return result

    def close(self) -> None:
        kill([self.process])
        self.pipe.close()


def _serve(make: Callable[[], VectorEnv[Any, Any, Any]], pipe: Any) -> None:
    try:
        envs = make()
        result: Any = (envs.single_observation_space, envs.single_action_space)
        end_with_main()
        while True:
            pipe.send((result, None))
            work: Work = pickle.loads(pipe.recv_bytes())
            result = work(envs)
    except (EOFError, OSError):
        pass  # the main process is gone
    except UserError as error:
        pipe.send((None, error))
    except EnvError as error:
        pipe.send((None, EnvError(str(error))))
    except Exception as error:
        pipe.send((None, EnvError(f"in an evaluation: {blame(error)}")))
