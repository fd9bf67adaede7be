"""Vectors of environments in which one that raises, hangs or dies is an EnvError that says which, and when."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import connection, util
from queue import Empty
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState, _async_worker

from common.errors import EnvError, UserError, blame

Make = Callable[[], gym.Env[Any, Any]]
PATIENCE = 5.0  # seconds for an environment to answer when the run is to stop, and for its process to end
MAIN_ONLY = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # the main process answers
# Forked from a server that has imported what they need; Windows has no fork.
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class OneEnv(SyncVectorEnv):
    """A single environment in this process."""

    def __init__(self, make: Make) -> None:
        super().__init__([make], autoreset_mode=AutoresetMode.DISABLED)

    def reset(self, **kwargs: Any) -> Any:
        return self._call(super().reset, **kwargs)

    def step(self, actions: Any) -> Any:
        return self._call(super().step, actions)

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except EnvError as error:
            raise EnvError(f"the environment, {error}", self) from error

    def close_extras(self, **kwargs: Any) -> None:
        with suppress(Exception):  # its results are there
            super().close_extras(**kwargs)


class ManyEnvs(AsyncVectorEnv):
    """Environments in processes of their own, which no signal to the process group ends and which end with this one."""

    def __init__(self, makes: Sequence[Make]) -> None:
        self.hurry: Callable[[], bool] = bool  # whether the run is to stop: then nothing is waited for in vain
        self.processes: list[Any] = []
        self.seeds, self.steps = [0] * len(makes), np.zeros(len(makes), int)  # of the episodes in progress
        context = START
        if START == "forkserver" and multiprocessing.parent_process():  # a process of ours, young and with one thread:
            context = "fork"  # that breaks nothing
        else:
            quiet_server()
        try:
            super().__init__(makes, context=context, worker=_work, autoreset_mode=AutoresetMode.DISABLED)
        except BaseException as error:
            self.closed = True
            kill(self.processes)
            if isinstance(error, (EOFError, OSError)):
                raise EnvError("the process of an environment died while it was made") from error
            raise
        util.Finalize(self, kill, (self.processes,), exitpriority=1)  # before multiprocessing waits for them

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        for i in np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs, bool))):
            self.seeds[i], self.steps[i] = seed and seed[i], 0
        return self._call(super().reset, seed=seed, options=options)

    def step(self, actions: Any) -> Any:
        result = self._call(super().step, actions)
        self.steps += result[-1].get("steps", 1)
        return result

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (EOFError, OSError) as error:
            ended = connection.wait([process.sentinel for process in self.processes], PATIENCE)
            died = [i for i, process in enumerate(self.processes) if process.sentinel in ended]
            code = self.processes[died[0]].exitcode if died else None
            raise self._failure(died[0] if died else 0, f"its process died (exit code {code})") from error

    def _failure(self, i: int, what: str) -> EnvError:
        where = f"episode seed {self.seeds[i]}, after step {self.steps[i]}"
        return EnvError(f"environment {i}, {where}: {what}", self, i)

    def _poll_pipe_envs(self, timeout: float | None = None) -> bool:
        """Waits for every environment, which gymnasium asks for before it reads the answers."""
        late = 0.0
        for i, pipe in enumerate(self.parent_pipes):
            while not pipe.poll(0.5):
                if self.hurry():
                    late = late or time.monotonic() + PATIENCE
                    if time.monotonic() > late:
                        raise self._failure(i, "it does not answer")
        return True

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        if all(successes):
            return
        try:
            i, _, error, _ = self.error_queue.get(timeout=PATIENCE)
        except Empty:
            raise EnvError("an environment failed and could not say why", self) from None
        if isinstance(error, UserError):
            raise error
        if isinstance(error, EnvError):
            raise EnvError(f"environment {i}, {error}", self, i)
        raise self._failure(i, blame(error))

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Ends every process: on request while all is well, by force if asked to, or after PATIENCE."""
        if not terminate and self._state == AsyncState.DEFAULT:
            late = time.monotonic() + PATIENCE
            with suppress(OSError):
                for pipe in self.parent_pipes:
                    pipe.send(("close", None))
            for process in self.processes:
                process.join(max(0.0, late - time.monotonic()))
        kill(self.processes)
        for pipe in self.parent_pipes:
            pipe.close()


def quiet_server() -> None:
    """Start the server that new processes are forked from, if it is not there: deaf to the main process's signals."""
    if START == "spawn":
        return
    from multiprocessing import forkserver, resource_tracker  # not there on Windows

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for start in (resource_tracker.ensure_running, forkserver.ensure_running):
            signal.pthread_sigmask(signal.SIG_BLOCK, MAIN_ONLY)  # inherited; the first of them undoes it here
            start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def kill(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.pid:
            process.kill()
            process.join()


def _work(index: int, make: Make, pipe: Any, parent_pipe: Any, memory: Any, errors: Any, *rest: Any) -> None:
    """gymnasium's worker, silent: what goes wrong is said by the main process, without which this one ends."""
    end_with_main()
    with suppress(EOFError, OSError):  # the main process is gone
        try:
            env = make()
        except Exception as error:
            pipe.recv()
            told = error if isinstance(error, UserError) else EnvError(f"when it was made: {blame(error)}")
            errors.put((index, None, told, None))
            pipe.send((None, False))
        else:
            _async_worker(index, lambda: env, pipe, parent_pipe, memory, errors, *rest)


def end_with_main() -> None:
    """From now on this process ends when the one that made it does."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
