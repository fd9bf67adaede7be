"""Meta-World tasks as Gymnasium environments: one task, or several under one policy."""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.simulation import Simulation  # before metaworld imports mujoco
from common.errors import UserError

try:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as MAKERS
    from metaworld.sawyer_xyz_env import SawyerXYZEnv
except ImportError as error:
    raise UserError(f"Meta-World cannot be imported ({error}); run: pip install metaworld==3.1.1") from error


class MetaWorldEnv(Simulation):
    """Sawyer arm, 80 Hz position deltas, sparse reward; the goal is observed.

    Observation, float32 (39,): hand position (3), finger opening (1), positions and quaternions of up to two objects
    (14), the same 18 numbers of the step before, goal position (3). With several tasks a one-hot of the task (n,)
    follows, and an episode's task is its seed modulo n. Action, float32 (4,) in [-1, 1]: position delta in units of
    1 cm, closing force of the fingers. The reward is 1 on success, else 0; the first success terminates the episode,
    `horizon` steps truncate it [deviation: the benchmark has dense rewards, 500 steps, and goes on after success].

    Raises UserError for a horizon longer than 500.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 80}
    view = "corner2"

    def __init__(self, task: TaskSpec, horizon: int, *, render: bool = False) -> None:
        if horizon > SawyerXYZEnv.max_path_length:
            raise UserError(f"--horizon {horizon}: Meta-World ends episodes after {SawyerXYZEnv.max_path_length} steps")
        super().__init__(task, horizon, render=render)
        self.names = [f"{name}-v3" for name in task.tasks] or [task.env_name]
        self._made: dict[str, SawyerXYZEnv] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts the episode that `seed` names, or one drawn from `np_random`."""
        seed = self.draw_seed(seed)
        self.which = seed % len(self.names)
        name = self.names[self.which]
        if name not in self._made:
            self._made[name] = MAKERS[f"{name}-goal-observable"](seed=0)
            # Places from the generator that `seed` sets, new at every reset.
            self._made[name].seeded_rand_vec, self._made[name]._freeze_rand_vec = True, False
        self.env = self._made[name]
        self.env.seed(seed)
        obs, _ = self.env.reset()
        self.steps = 0
        return self._observe(obs), {"success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Applies one action (4,). `info["success"]` is the benchmark's success test after the step."""
        obs, *_, info = self.env.step(action)
        success = bool(info["success"])
        return self.outcome(self._observe(obs), success, success, success)

    def _observe(self, obs: NDArray[np.float64]) -> NDArray[np.float32]:
        task = np.eye(len(self.names))[self.which] if len(self.names) > 1 else ()
        return np.concatenate([obs, task], dtype=np.float32)

    def render(self) -> NDArray[np.uint8] | None:
        """As `Simulation.render`; the camera hangs upside down."""
        image = super().render()
        return None if image is None else image[::-1, ::-1]

    def close(self) -> None:
        """Frees the renderer and the simulations; a later reset makes new ones."""
        super().close()
        for env in self._made.values():
            env.close()
        self._made.clear()
