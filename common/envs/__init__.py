"""Environments by name: one contract for the built-in tasks and a user's own.

Observations are float32 vectors, actions float32 vectors in [-1, 1]. `info["success"]` is set at every step;
the first success terminates the episode, the horizon truncates it (never both). `reset(seed=s)` makes the
episode a function of s and the actions.
"""

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from common.envs.wrappers import ChunkStep, PixelEnv, Pixels
from common.errors import UserError

SUITES = {  # suite -> module of this package and class, made with (task, horizon, render=...)
    "toy": ("toy", "ToyReach"),
    "robosuite": ("robosuite_env", "RobosuiteEnv"),
    "metaworld": ("metaworld_env", "MetaWorldEnv"),
    "adroit": ("robotics_env", "RoboticsEnv"),
    "kitchen": ("robotics_env", "RoboticsEnv"),
    "gymnasium": ("gymnasium_env", "UserEnv"),
}


@dataclass(frozen=True)
class TaskSpec:
    """One task. A user's own environment has no horizon, dataset or layout here: it brings its own."""

    name: str
    suite: str  # a key of SUITES
    env_name: str
    horizon: int | None = None
    datasets: tuple[str, ...] = ()  # published demonstrations of robomimic or Minari, those of the paper first
    obs: tuple[tuple[str, int], ...] = ()  # name and width of the parts of an observation, in order
    action_dim: int = 0
    tasks: tuple[str, ...] = ()  # several under one policy: an episode is of tasks[seed % len(tasks)]
    demo_weights: tuple[int, ...] = ()  # shares of `tasks` in the scripted demonstrations
    goals: tuple[str, ...] = ()  # what has to be done, in Kitchen
    proprio: tuple[int, ...] = ()  # the observation's numbers that the robot feels itself, to go with images


_PANDA = (("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2))
_PANDAS = (*_PANDA, ("robot1_eef_pos", 3), ("robot1_eef_quat", 4), ("robot1_gripper_qpos", 2))


def _robosuite(name: str, env: str, horizon: int, datasets: tuple[str, ...], objects: int, arms: int = 1) -> TaskSpec:
    obs = (*(_PANDA if arms == 1 else _PANDAS), ("object", objects))
    return TaskSpec(name, "robosuite", env, horizon, datasets, obs, 7 * arms, proprio=tuple(range(9 * arms)))


def _metaworld(name: str) -> TaskSpec:
    return TaskSpec(name, "metaworld", f"{name}-v3", 200, (), (("state", 39),), 4)


def _metaworld_set(name: str, tasks: dict[str, int]) -> TaskSpec:
    obs = (("state", 39), ("task", len(tasks)))
    return TaskSpec(name, "metaworld", name, 200, (), obs, 4, tuple(tasks), tuple(tasks.values()))


def _adroit(name: str, width: int, action_dim: int) -> tuple[TaskSpec, TaskSpec]:
    env, obs = f"AdroitHand{name.capitalize()}", (("state", width),)
    sparse = TaskSpec(name, "adroit", f"{env}Sparse-v1", 200, MINARI, obs, action_dim)
    return sparse, TaskSpec(f"{name}-dense", "adroit", f"{env}-v1", 200, MINARI, obs, action_dim)


def _kitchen(name: str, width: int, goals: tuple[str, ...]) -> TaskSpec:
    obs = (("observation", 59), ("achieved_goal", width), ("desired_goal", width))
    return TaskSpec(f"kitchen-{name}", "kitchen", "FrankaKitchen-v1", 600, (name,), obs, 9, goals=goals)


MINARI = ("expert", "human", "cloned")
MT10 = {  # task: share of the demonstrations. With equal ones half of the tasks are cloned before the others begin.
    "reach": 2, "push": 12, "pick-place": 12, "door-open": 2, "drawer-open": 4, "drawer-close": 1,
    "button-press-topdown": 2, "peg-insert-side": 13, "window-open": 1, "window-close": 1,
}  # fmt: skip
TASKS = {
    task.name: task
    for task in (
        TaskSpec("toy", "toy", "toy", 40, obs=(("state", 6),), action_dim=2, proprio=(0, 1, 4, 5)),
        _robosuite("lift", "Lift", 300, ("ph", "mh"), 10),
        _robosuite("can", "PickPlaceCan", 300, ("ph", "mh"), 14),
        _robosuite("square", "NutAssemblySquare", 400, ("mh", "ph"), 14),
        _robosuite("tool_hang", "ToolHang", 1_000, ("ph",), 44),
        _robosuite("transport", "TwoArmTransport", 800, ("mh", "ph"), 41, arms=2),
        *map(_metaworld, ("peg-insert-side", "assembly", "hand-insert", "pick-place")),
        _metaworld_set("mt10", MT10),
        *_adroit("door", 39, 28),
        *_adroit("hammer", 46, 26),
        *_adroit("pen", 45, 24),
        *_adroit("relocate", 39, 30),
        _kitchen("complete", 11, ("microwave", "kettle", "light switch", "slide cabinet")),
        _kitchen("mixed", 12, ("microwave", "kettle", "bottom burner", "light switch")),
        _kitchen("partial", 11, ("microwave", "kettle", "light switch", "slide cabinet")),
    )
}


def resolve(env_id: str) -> TaskSpec:
    """The task called `env_id`, or the Gymnasium environment "package.module:EnvId". Raises UserError."""
    if env_id in TASKS:
        return TASKS[env_id]
    module, _, name = env_id.partition(":")
    if not (module and name):
        names = ", ".join(TASKS)
        raise UserError(f"unknown task {env_id!r}; use one of {names}, or package.module:EnvId for your own")
    return TaskSpec(env_id, "gymnasium", env_id)


def make_env(
    env_id: str,
    *,
    horizon: int | None = None,
    original_step: bool = False,
    render: bool = False,
    chunk: int = 0,
    pixels: Pixels | None = None,
) -> gym.Env[Any, Any]:
    """Makes one environment.

    Args:
        env_id: a name in TASKS or "package.module:EnvId".
        horizon: steps until truncation; None takes the task's.
        original_step: step robosuite tasks with robosuite's own Python instead of the fast path.
        render: allow `render()`, which returns an RGB image (H, W, 3) uint8.
        chunk: if not 0, one step executes this many actions (`ChunkStep`).
        pixels: observe images and what the robot feels (`PixelEnv`), once per step or chunk.

    Raises UserError if the environment is unknown or cannot be made.
    """
    task = resolve(env_id)
    module, name = SUITES[task.suite]
    make = getattr(importlib.import_module(f"common.envs.{module}"), name)
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


def _make_worker_env(main_process: int, make: Callable[[], gym.Env[Any, Any]]) -> gym.Env[Any, Any]:
    """Makes an environment of a vector; in a process of its own, Ctrl-C is left to the main process."""
    if os.getpid() != main_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return make()


def make_vec_env(
    env_id: str,
    num_envs: int,
    *,
    horizon: int | None = None,
    original_step: bool = False,
    chunk: int = 0,
    pixels: Pixels | None = None,
) -> VectorEnv[Any, Any, Any]:
    """Makes `num_envs` environments, each in a process of its own if there are several.

    With `chunk` every environment is a ChunkStep: actions (n, chunk, A).

    Nothing resets by itself: reset finished episodes with `reset(seed=[...], options={"reset_mask": mask})`,
    a fresh options dictionary at every call. Arguments and errors are those of `make_env`.
    """
    make = partial(make_env, env_id, horizon=horizon, original_step=original_step, chunk=chunk, pixels=pixels)
    if num_envs == 1:
        return SyncVectorEnv([make], autoreset_mode=AutoresetMode.DISABLED)
    context = "spawn"
    if sys.platform != "win32":
        context = "forkserver"
        # Worth importing once rather than in every worker; what cannot be imported is left to the workers.
        module, _ = SUITES[resolve(env_id).suite]
        multiprocessing.set_forkserver_preload(["torch", f"common.envs.{module}"])
    make_worker = partial(_make_worker_env, os.getpid(), make)
    return AsyncVectorEnv([make_worker] * num_envs, context=context, autoreset_mode=AutoresetMode.DISABLED)
