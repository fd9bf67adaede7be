"""robosuite tasks as Gymnasium environments, with the observations and actions of robomimic v1.5."""

import logging
import os
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.simulation import Simulation

_gl = os.environ.get("MUJOCO_GL")
logging.disable(logging.WARNING)  # robosuite warns of every optional part that is not there
try:
    import robosuite as suite
    from robosuite.controllers import load_part_controller_config
finally:
    logging.disable(logging.NOTSET)
    if _gl is None:  # it sets egl even where there is none, which would keep child processes from importing MuJoCo
        os.environ.pop("MUJOCO_GL", None)
logging.getLogger("robosuite_logs").setLevel(logging.ERROR)

from common.envs.osc import FastStep  # noqa: E402

MODEL_BLOCK = 32  # seeds that share one compiled model: compiling costs 100 times a plain reset
ARM_ACTIONS = 7


def env_kwargs(robots: int) -> dict[str, Any]:
    """Arguments of `robosuite.make`: robomimic's v1.5 setting, and cheaper `lite_physics` stepping."""
    arm = load_part_controller_config(default_controller="OSC_POSE")
    arm |= {"input_ref_frame": "world", "gripper": {"type": "GRIP"}}
    return {
        "robots": ["Panda"] * robots,
        "controller_configs": {"type": "BASIC", "body_parts": {"right": arm}},
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "use_camera_obs": False,
        "use_object_obs": True,
        "ignore_done": True,
        "hard_reset": False,
        "control_freq": 20,
        "lite_physics": True,
        "reward_shaping": False,
    }


class RobosuiteEnv(Simulation):
    """One robosuite task: 20 Hz pose deltas of a Panda arm, low-dimensional observations, sparse reward.

    Observation, float32 (O,): for each robot end effector position (3), hand quaternion xyzw (4) and finger
    positions (2), then the task's object state. Action, float32 (7,) a robot in [-1, 1]: position delta in
    units of 5 cm, rotation vector in units of 0.5 rad, gripper (-1 opens, 1 closes). The reward is 0 or 1, as
    robosuite gives it; the first success terminates the episode, `horizon` steps truncate it.

    As in robosuite, observations, reward and success after a step are of the body poses at the start of the
    last 2 ms physics step, but of the joint positions at its end; and where the object state has the object's pose
    relative to the hand, that is the object's pose of the observation before [deviation: at a reset the present one,
    where robosuite has zeros and its datasets have not].

    With `original_step` it takes robosuite's own (slower) `env.step` instead of `FastStep`.
    """

    hidden = (0,)  # collision shapes
    view = "agentview"

    def __init__(self, task: TaskSpec, horizon: int, *, original_step: bool = False, render: bool = False) -> None:
        super().__init__(task, horizon, render=render)
        self.original_step = original_step
        self._block: int | None = None

    def model_and_data(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """MuJoCo's model and data, which robosuite wraps."""
        return self.env.sim.model._model, self.env.sim.data._data

    def _start(self, seed: int) -> NDArray[np.float32]:
        """The model (e.g. the cube's size) is drawn from seed // MODEL_BLOCK, the placement from the seed.

        So runs of neighbouring seeds are fast: they compile a model once.
        """
        block = seed // MODEL_BLOCK
        if block != self._block:
            self.close()
            robots = self.task.action_dim // ARM_ACTIONS
            self.env = suite.make(self.task.env_name, seed=[1, block], **env_kwargs(robots))
            self._block = block
        # robosuite's placement samplers hold references to its generator: restart it in place.
        self.env.rng.bit_generator.state = np.random.default_rng([0, seed]).bit_generator.state
        self.env.reset()
        self._advance = self.env.step if self.original_step else FastStep(self.env)
        self._observe()  # sensors of relative poses read what the others saw the time before: at first nothing
        return self._observe()

    def _act(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool]:
        action = np.asarray(action, np.float64)
        self._advance(action)
        success = self.env._check_success()
        return self._observe(), self.env.reward(action), success, success

    def state(self) -> NDArray[np.float64]:
        """The simulator's state (S,): time, joint positions, joint velocities, as robomimic stores it."""
        return self.env.sim.get_state().flatten()

    def _observe(self) -> NDArray[np.float32]:
        """Reads the sensors of the task's observation, now.

        `_get_observations(force_update=True)` would give the same values, but shifts the phase of robosuite's
        sampling clock, so that from then on its own step would report observations from before its end.
        """
        cache, objects = self.env._obs_cache, []
        keys = [key for key, _ in self.task.obs if key != "object"]
        for name, observable in self.env._observables.items():
            is_object = observable.modality == "object"
            if is_object or name in keys:
                value = cache[name] = np.atleast_1d(observable._sensor(cache))
                if is_object and observable.is_enabled() and observable.is_active():
                    objects.append(value)
        return np.concatenate([cache[key] for key in keys] + objects, dtype=np.float32)

    def images(self, cameras: tuple[str, ...], size: int) -> NDArray[np.uint8]:
        """RGB images (N, size, size, 3) of the state. Raises UserError without OpenGL or for an unknown camera."""
        return np.stack([self.draw(name, size) for name in cameras])

    def close(self) -> None:
        """Frees the renderers and the simulation; a later reset makes new ones."""
        super().close()
        if self._block is not None:
            self.env.close()
        self._block = None
