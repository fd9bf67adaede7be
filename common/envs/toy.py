"""Two gaps, one target: a two-dimensional reaching task in plain Python.

A point starts on the left, the target lies on the right, and the wall between them has two gaps. Either gap
serves, so demonstrations are bimodal; both are narrow, so an imprecise clone gets stuck at the wall.
"""

import numpy as np

from common.envs.base import Floats, TaskEnv
from common.errors import UserError

STEP = 0.1  # distance covered per step at full speed; the arena is [-1, 1]^2
LAG = 0.5  # share of the old velocity that survives a step
TARGET_RADIUS = 0.2
GAP_CENTRE = 0.5  # the gaps lie at y = +-GAP_CENTRE of the wall x = 0
GAP_HALF_WIDTH = 0.25
START_X = -0.45  # one chunk of eight actions reaches and passes the wall: a gap is chosen once
START_SPREAD = 0.4  # the start is (START_X, y) with |y| at most this
GOAL_SPREAD = 0.6  # the target is (0.8, y) with |y| at most this

_SKIN = 1e-3  # a blocked point rests this far from the wall


class ToyReach(TaskEnv):
    """Reach the target through one of two gaps.

    Observation (6,) float32: position, target, velocity (x and y each, about [-1, 1]).
    Action (2,) float32 in [-1, 1]: commanded velocity, in units of `STEP` per step.
    Reward 1 on success, else 0. Success is a distance below `TARGET_RADIUS`, and terminates.
    """

    def _start(self, seed: int) -> Floats:
        noise = np.random.default_rng(seed).uniform(-1.0, 1.0, 2).tolist()
        self.x, self.y = START_X, START_SPREAD * noise[0]
        self.goal_x, self.goal_y = 0.8, GOAL_SPREAD * noise[1]
        self.vx = self.vy = 0.0
        return self._obs()

    def _act(self, action: Floats) -> tuple[Floats, float, bool, bool]:
        """Move one step; Python floats, because arrays of two would cost ten times as much."""
        ax, ay = action.tolist()
        self.vx = LAG * self.vx + (1 - LAG) * min(max(ax, -1.0), 1.0)
        self.vy = LAG * self.vy + (1 - LAG) * min(max(ay, -1.0), 1.0)
        x = min(max(self.x + STEP * self.vx, -1.0), 1.0)
        y = min(max(self.y + STEP * self.vy, -1.0), 1.0)
        if (x >= 0.0) != (self.x >= 0.0):  # the path crosses the wall: at which height?
            crossing = self.y + (y - self.y) * self.x / (self.x - x)
            if abs(abs(crossing) - GAP_CENTRE) > GAP_HALF_WIDTH:
                x = _SKIN if self.x >= 0.0 else -_SKIN
                self.vx = 0.0
        self.x, self.y = x, y
        success = (x - self.goal_x) ** 2 + (y - self.goal_y) ** 2 < TARGET_RADIUS**2
        return self._obs(), success, success, success

    def render(self) -> np.ndarray:
        """Picture (192, 192, 3) uint8: wall, target (green) and point (blue), y upwards."""
        return self._draw(192)

    def images(self, cameras: tuple[str, ...], size: int) -> np.ndarray:
        """The picture (N, size, size, 3) from every camera; there is one, "top"."""
        if unknown := set(cameras) - {"top"}:
            raise UserError(f"there is no camera {min(unknown)!r}; the toy task has top")
        return np.stack([self._draw(size)] * len(cameras))

    def _draw(self, size: int) -> np.ndarray:
        axis = np.linspace(-1.0, 1.0, size, dtype=np.float32)
        xs, ys = axis[None], axis[::-1, None]
        image = np.full((size, size, 3), 250, np.uint8)
        image[(np.abs(xs) < max(0.02, 1.1 / size)) & (np.abs(np.abs(ys) - GAP_CENTRE) > GAP_HALF_WIDTH)] = (60, 60, 60)
        image[(xs - self.goal_x) ** 2 + (ys - self.goal_y) ** 2 < TARGET_RADIUS**2] = (40, 170, 70)
        image[(xs - self.x) ** 2 + (ys - self.y) ** 2 < max(0.05, 2.5 / size) ** 2] = (40, 90, 220)
        return image

    def _obs(self) -> Floats:
        return np.array((self.x, self.y, self.goal_x, self.goal_y, self.vx, self.vy), np.float32)
