"""robosuite tasks as Gymnasium environments, with the observations and actions of robomimic v1.5."""

import logging
import os
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.render import Camera  # before robosuite imports mujoco
from common.errors import UserError


def _import_robosuite() -> Any:
    """The robosuite module, imported without its warnings about optional parts.

    Importing it sets MUJOCO_GL=egl even where there is no EGL, which would keep child processes from importing MuJoCo.
    """
    gl = os.environ.get("MUJOCO_GL")
    logging.disable(logging.WARNING)
    try:
        import robosuite
    except (ImportError, AssertionError) as error:
        raise UserError(f"robosuite cannot be imported ({error}); install the simulators as the README says") from error
    finally:
        logging.disable(logging.NOTSET)
        if gl is None:
            os.environ.pop("MUJOCO_GL", None)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    return robosuite


suite = _import_robosuite()

from common.envs.osc import FastStep  # noqa: E402

MODEL_BLOCK = 32  # seeds that share one compiled model: compiling costs 100 times a plain reset
ARM_ACTIONS = 7
HIDDEN = (0,)  # collision shapes


def env_kwargs(robots: int) -> dict[str, Any]:
    """Arguments of `robosuite.make`: robomimic's v1.5 setting, and cheaper `lite_physics` stepping."""
    arm = {
        "type": "OSC_POSE",
        "input_max": 1,
        "input_min": -1,
        "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
        "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
        "kp": 150,
        "damping_ratio": 1,
        "impedance_mode": "fixed",
        "kp_limits": [0, 300],
        "damping_ratio_limits": [0, 10],
        "position_limits": None,
        "orientation_limits": None,
        "uncouple_pos_ori": True,
        "input_type": "delta",
        "input_ref_frame": "world",
        "interpolation": None,
        "ramp_ratio": 0.2,
        "gripper": {"type": "GRIP"},
    }
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


class RobosuiteEnv(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One robosuite task: 20 Hz pose deltas of a Panda arm, low-dimensional observations, sparse reward.

    Observation, float32 (O,): for each robot end effector position (3), hand quaternion xyzw (4) and finger
    positions (2), then the task's object state. Action, float32 (7,) a robot in [-1, 1]: position delta in
    units of 5 cm, rotation vector in units of 0.5 rad, gripper (-1 opens, 1 closes). The reward is 0 or 1, as
    robosuite gives it; the first success terminates the episode, `horizon` steps truncate it.

    As in robosuite, observations, reward and success after a step are of the body poses at the start of the
    last 2 ms physics step, but of the joint positions at its end; and where the object state has the object's pose
    relative to the hand, that is the object's pose of the observation before [deviation: at a reset the present one,
    where robosuite has zeros and its datasets have not].

    Args:
        task: names robosuite's environment and the layout of observations and actions.
        horizon: steps until truncation.
        original_step: use robosuite's own (slower) `env.step` instead of `FastStep`.
        render: allow `render()`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, task: TaskSpec, horizon: int, *, original_step: bool = False, render: bool = False) -> None:
        self.task, self.horizon = task, horizon
        self.original_step = original_step
        self.render_mode = "rgb_array" if render else None
        width = sum(width for _, width in task.obs)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (task.action_dim,), np.float32)
        self._block: int | None = None
        self._shown = ""
        self._camera = Camera(HIDDEN)
        self._eyes: dict[int, Camera] = {}  # by the size of their images

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts the episode that `seed` names, or one drawn from `np_random`.

        The model (e.g. the cube's size) is drawn from seed // MODEL_BLOCK, the placement from the seed: runs of
        neighbouring seeds are fast, since they compile a model once.
        """
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        block = seed // MODEL_BLOCK
        if block != self._block:
            self.close()
            robots = self.task.action_dim // ARM_ACTIONS
            self.env = suite.make(self.task.env_name, seed=[1, block], **env_kwargs(robots))
            self._block, self._shown = block, ""
        # robosuite's placement samplers hold references to its generator: restart it in place.
        self.env.rng.bit_generator.state = np.random.default_rng([0, seed]).bit_generator.state
        self.env.reset()
        self._advance = self.env.step if self.original_step else FastStep(self.env)
        self._steps = 0
        self._observe()  # sensors of relative poses read what the others saw the time before: at first nothing
        return self._observe(), {"success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Applies one action (A,). `info["success"]` is robosuite's success test after the step."""
        action = np.asarray(action, np.float64)
        self._advance(action)
        self._steps += 1
        success = bool(self.env._check_success())
        truncated = self._steps >= self.horizon and not success
        return self._observe(), float(self.env.reward(action)), success, truncated, {"success": success}

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

    def render(self) -> NDArray[np.uint8] | None:
        """RGB image (256, 256, 3) of the state, which stays as it is; None if made without render=True.

        Raises UserError where there is no OpenGL.
        """
        sim = self.env.sim
        return self._camera(sim.model._model, sim.data._data, "agentview") if self.render_mode else None

    def images(self, cameras: tuple[str, ...], size: int) -> NDArray[np.uint8]:
        """RGB images (N, size, size, 3) of the state. Raises UserError without OpenGL or for an unknown camera."""
        if size not in self._eyes:
            self._eyes[size] = Camera(HIDDEN, size)
        eye, sim = self._eyes[size], self.env.sim
        return np.stack([eye(sim.model._model, sim.data._data, name) for name in cameras])

    def show(self, model_xml: str, state: NDArray[np.float64]) -> None:
        """Puts the simulation into a recorded state (S,) of a recorded model, to be drawn."""
        if model_xml != self._shown:
            self.env.reset_from_xml_string(self.env.edit_model_xml(model_xml))
            self._shown, self._block = model_xml, -1  # no seed's model: the next reset makes its own
        self.env.sim.set_state_from_flattened(state)
        self.env.sim.forward()

    def close(self) -> None:
        """Frees the renderer and the simulation; a later reset makes new ones."""
        for camera in (self._camera, *self._eyes.values()):
            camera.close()
        if self._block is not None:
            self.env.close()
        self._block = None
