"""Meta-World tasks as Gymnasium environments: one task, or several under one policy."""

import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as MAKERS
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from numpy.typing import NDArray

from common.envs import TaskSpec
from common.envs.simulation import Simulation
from common.errors import UserError


class MetaWorldEnv(Simulation):
    """Sawyer arm, 80 Hz position deltas, sparse reward; the goal is observed.

    Observation, float32 (39,): hand position (3), finger opening (1), positions and quaternions of up to two objects
    (14), the same 18 numbers of the step before, goal position (3). With several tasks a one-hot of the task (n,)
    follows, and an episode's task is its seed modulo n. Action, float32 (4,) in [-1, 1]: position delta in units of
    1 cm, closing force of the fingers. The reward is 1 on success, else 0; the first success terminates the episode,
    `horizon` steps truncate it [deviation: the benchmark has dense rewards, 500 steps, and goes on after success].

    Raises UserError for a horizon longer than 500.
    """

    view = "corner2"

    def __init__(self, task: TaskSpec, horizon: int, *, render: bool = False) -> None:
        if horizon > SawyerXYZEnv.max_path_length:
            raise UserError(f"--horizon {horizon}: Meta-World ends episodes after {SawyerXYZEnv.max_path_length} steps")
        super().__init__(task, horizon, render=render)
        self.names = [f"{name}-v3" for name in task.tasks] or [task.env_name]
        self._made: dict[str, SawyerXYZEnv] = {}

    def _start(self, seed: int) -> NDArray[np.float32]:
        self.which = seed % len(self.names)
        name = self.names[self.which]
        if name not in self._made:
            self._made[name] = MAKERS[f"{name}-goal-observable"](seed=0)
            # Places from the generator that `seed` sets, new at every reset.
            self._made[name].seeded_rand_vec, self._made[name]._freeze_rand_vec = True, False
        self.env = self._made[name]
        self.env.seed(seed)
        return self._observe(self.env.reset()[0])

    def _act(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool]:
        obs, *_, info = self.env.step(action)
        return self._observe(obs), info["success"], info["success"], info["success"]

    def _observe(self, obs: NDArray[np.float64]) -> NDArray[np.float32]:
        task = np.eye(len(self.names))[self.which] if len(self.names) > 1 else ()
        return np.concatenate([obs, task], dtype=np.float32)

    def render(self) -> NDArray[np.uint8] | None:
        """As `Simulation.render`; the camera hangs upside down."""
        image = super().render()
        return None if image is None else image[::-1, ::-1]

    def close(self) -> None:
        """Frees the renderers and the simulations; a later reset makes new ones."""
        super().close()
        for env in self._made.values():
            env.close()
        self._made.clear()
