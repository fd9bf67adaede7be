"""Environments by name: one contract for the built-in tasks and a user's own.

Observations are float32 vectors, actions float32 vectors in [-1, 1]. `info["success"]` is set at every step;
the first success terminates the episode, the horizon truncates it (never both). `reset(seed=s)` makes the
episode a function of s and the actions.
"""

import ctypes
import difflib
import importlib
import multiprocessing
import os
import sys
from contextlib import suppress
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from common.envs.vector import START, ManyEnvs, OneEnv
from common.envs.wrappers import ChunkStep, Guard, PixelEnv, Pixels
from common.errors import UserError
from settings.tasks import TASKS, TaskSpec

# Its own list of dependencies has the OpenCV that replaces ours and needs system libraries.
_PUSHT = "pymunk==6.11.1 pygame==2.6.1 shapely==2.2.0 && pip install --no-deps gym-pusht==0.1.8"
SUITES = {  # suite -> module of this package, class, made with (task, horizon, render=...), and what pip installs
    "toy": ("toy", "ToyReach", ""),
    "robosuite": ("robosuite_env", "RobosuiteEnv", "--no-deps -r requirements-nodeps.txt"),
    "metaworld": ("metaworld_env", "MetaWorldEnv", "metaworld==3.1.1"),
    "adroit": ("robotics_env", "RoboticsEnv", "gymnasium-robotics==1.4.2"),
    "kitchen": ("robotics_env", "RoboticsEnv", "gymnasium-robotics==1.4.2"),
    "fetch": ("robotics_env", "RoboticsEnv", "gymnasium-robotics==1.4.2"),
    "pusht": ("pusht_env", "PushT", _PUSHT),
    "gymnasium": ("gymnasium_env", "UserEnv", ""),
}

_WANTED = os.environ.get("MUJOCO_GL", "").lower()
if sys.platform == "linux" and _WANTED in ("", "egl", "osmesa"):
    # MuJoCo picks its OpenGL library on import, and cannot be imported where that is missing. EGL and OSMesa need no
    # display; EGL, which can use a GPU, comes first.
    _found = []
    for _name, _library in (("egl", "libEGL.so.1"), ("osmesa", "libOSMesa.so.8"), ("osmesa", "libOSMesa.so")):
        with suppress(OSError):
            ctypes.CDLL(_library)
            _found.append(_name)
    if _WANTED not in _found:
        os.environ.pop("MUJOCO_GL", None)
        if _found:
            os.environ["MUJOCO_GL"] = _found[0]
        if _WANTED:
            print(f"note: MUJOCO_GL={_WANTED}: its library is missing; using {(*_found, 'the default')[0]}", flush=True)


def resolve(env_id: str) -> TaskSpec:
    """The task called `env_id`, or the Gymnasium environment "package.module:EnvId". Raises UserError."""
    if env_id in TASKS:
        return TASKS[env_id]
    module, _, name = env_id.partition(":")
    if not (module and name):
        near = ", ".join(difflib.get_close_matches(env_id.lower(), TASKS, 5, cutoff=0))
        raise UserError(
            f"unknown task {env_id!r}; nearest are {near}; docs/tasks.md lists all; package.module:EnvId is your own"
        )
    return TaskSpec(env_id, "gymnasium", env_id)


def own_horizon(env_id: str) -> int | None:
    """Cap of a task's episodes; of a user's environment the registered `max_episode_steps`. Raises UserError."""
    task = resolve(env_id)
    if task.suite != "gymnasium":
        return task.horizon
    from common.envs.gymnasium_env import find_spec

    return find_spec(env_id).max_episode_steps


def make_env(
    env_id: str, *, horizon: int | None = None, original_step: bool = False, render: bool = False, chunk: int = 0,
    pixels: Pixels | None = None,
) -> gym.Env[Any, Any]:  # fmt: skip
    """Makes the environment called `env_id` (see `resolve`).

    horizon: steps until truncation, None takes the task's; original_step: robosuite's own Python instead of the fast
    path; render: allow `render()`, which returns an RGB image (H, W, 3) uint8; chunk: actions that one step executes
    (`ChunkStep`), 0 for none; pixels: observe images and what the robot feels (`PixelEnv`), once per step or chunk.

    Raises UserError if the environment is unknown or cannot be made.
    """
    task = resolve(env_id)
    module, name, packages = SUITES[task.suite]
    try:
        make = getattr(importlib.import_module(f"common.envs.{module}"), name)
    except (ImportError, AssertionError) as error:  # robosuite asserts that there is an OpenGL library
        raise UserError(f"{task.suite} cannot be imported ({error}); run: pip install {packages}") from error
    more = {"original_step": original_step} if task.suite == "robosuite" else {}
    env = make(task, horizon or task.horizon, render=render, **more)
    if chunk:
        env = ChunkStep(env, chunk)
    if not pixels:
        return env
    if not task.proprio:
        names = ", ".join(name for name, other in TASKS.items() if other.proprio)
        raise UserError(f"{env_id} has no cameras here; use one of {names}")
    return PixelEnv(env, task.proprio, pixels)


def _make_guarded(env_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    return Guard(make_env(env_id, **kwargs))


def make_vec_env(
    env_id: str, num_envs: int, *, horizon: int | None = None, chunk: int = 0, pixels: Pixels | None = None
) -> VectorEnv[Any, Any, Any]:
    """Makes `num_envs` environments, each in a process of its own if there are several.

    Nothing resets by itself: reset finished episodes with `reset(seed=[...], options={"reset_mask": mask})`,
    a fresh options dictionary at every call. Arguments and errors are those of `make_env`; reset and step raise
    EnvError for an environment that raises, dies or returns what is not finite.
    """
    make = partial(_make_guarded, env_id, horizon=horizon, chunk=chunk, pixels=pixels)
    if num_envs == 1:
        return OneEnv(make)
    # Worth importing once rather than in every worker; what cannot be imported is left to the workers.
    module, *_ = SUITES[resolve(env_id).suite]
    if START == "forkserver":
        multiprocessing.set_forkserver_preload(["torch", f"common.envs.{module}"])
    return ManyEnvs([make] * num_envs)
