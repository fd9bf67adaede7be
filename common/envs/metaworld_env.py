"""Meta-World tasks as Gymnasium environments: one task, or several under one policy."""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.render import Camera  # before metaworld imports mujoco
from common.errors import UserError

try:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as MAKERS
    from metaworld.sawyer_xyz_env import SawyerXYZEnv
except ImportError as error:
    raise UserError(f"Meta-World cannot be imported ({error}); run: pip install metaworld==3.1.1") from error

STATE = 39  # numbers of Meta-World's own observation


class MetaWorldEnv(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Sawyer arm, 80 Hz position deltas, sparse reward; the goal is observed.

    Observation, float32 (39,): hand position (3), finger opening (1), positions and quaternions of up to two objects
    (14), the same 18 numbers of the step before, goal position (3). With several tasks a one-hot of the task (n,)
    follows, and an episode's task is its seed modulo n. Action, float32 (4,) in [-1, 1]: position delta in units of
    1 cm, closing force of the fingers. The reward is 1 on success, else 0; the first success terminates the episode,
    `horizon` steps truncate it [deviation: the benchmark has dense rewards, 500 steps, and goes on after success].

    Args:
        task: names Meta-World's environment, or several in `tasks`.
        horizon: steps until truncation, at most 500.
        render: allow `render()`.

    Raises UserError for a longer horizon.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(self, task: TaskSpec, horizon: int, *, render: bool = False) -> None:
        if horizon > SawyerXYZEnv.max_path_length:
            raise UserError(f"--horizon {horizon}: Meta-World ends episodes after {SawyerXYZEnv.max_path_length} steps")
        names = [f"{name}-v3" for name in task.tasks]
        self.names, self.horizon = names or [task.env_name], horizon
        self.render_mode = "rgb_array" if render else None
        width = STATE + len(names)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (4,), np.float32)
        self._made: dict[str, SawyerXYZEnv] = {}
        self._camera = Camera()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts the episode that `seed` names, or one drawn from `np_random`."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.which = seed % len(self.names)
        name = self.names[self.which]
        if name not in self._made:
            self._made[name] = MAKERS[f"{name}-goal-observable"](seed=0)
            # Places from the generator that `seed` sets, new at every reset.
            self._made[name].seeded_rand_vec, self._made[name]._freeze_rand_vec = True, False
        self.env = self._made[name]
        self.env.seed(seed)
        obs, _ = self.env.reset()
        self._steps = 0
        return self._observe(obs), {"success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Applies one action (4,). `info["success"]` is the benchmark's success test after the step."""
        obs, *_, info = self.env.step(action)
        self._steps += 1
        success = bool(info["success"])
        truncated = self._steps >= self.horizon and not success
        return self._observe(obs), float(success), success, truncated, {"success": success}

    def _observe(self, obs: NDArray[np.float64]) -> NDArray[np.float32]:
        task = np.eye(len(self.names))[self.which] if len(self.names) > 1 else ()
        return np.concatenate([obs, task], dtype=np.float32)

    def state(self) -> NDArray[np.float64]:
        """The simulator's joint positions and velocities (S,)."""
        return np.concatenate([self.env.data.qpos, self.env.data.qvel])

    def render(self) -> NDArray[np.uint8] | None:
        """RGB image (256, 256, 3); None if made without render=True. Raises UserError where there is no OpenGL."""
        if self.render_mode is None:
            return None
        return self._camera(self.env.model, self.env.data, "corner2")[::-1, ::-1]  # this camera hangs upside down

    def close(self) -> None:
        self._camera.close()
        for env in self._made.values():
            env.close()
        self._made.clear()
