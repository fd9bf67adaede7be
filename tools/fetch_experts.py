"""Scripted experts for the Fetch arm: they look where hand, object and goal are, and say where the hand should go.

Each is a generator: it yields actions (4,) and is sent the observation after each. `noise` is the standard deviation
of a tremor on the three position commands, in units of the action range.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.scripted import Expert

Array = NDArray[np.float64]
Obs = NDArray[np.float32]
OPEN, CLOSE = 1.0, -1.0
GAIN = 20.0  # command for a metre
UP = np.array([0.0, 0.0, 1.0])


def places(obs: Obs) -> tuple[Array, Array, Array]:
    """Position (3,) of hand, object and goal."""
    hand, thing, goal = obs[[0, 1, 2, 3, 4, 5, -3, -2, -1]].astype(np.float64).reshape(3, 3)
    return hand, thing, goal


def move(way: Array, grip: float, rng: np.random.Generator, noise: float) -> Obs:
    """Action (4,) that moves the hand by `way` (3,) metres, as far as one step does."""
    command = np.clip(GAIN * way, -1, 1) + noise * rng.standard_normal(3)
    return np.append(np.clip(command, -1, 1), grip).astype(np.float32)


def reach_expert(env: Any, obs: Obs, rng: np.random.Generator, noise: float) -> Expert:
    """Straight to the goal."""
    while True:
        hand, _, goal = places(obs)
        obs = yield move(goal - hand, CLOSE, rng, noise)


def push_expert(env: Any, obs: Obs, rng: np.random.Generator, noise: float) -> Expert:
    """Above the place behind the object, down, and on towards the goal; again whenever the hand is not behind it."""
    while True:
        hand, thing, goal = places(obs)
        ahead = (goal - thing) * [1, 1, 0]
        ahead /= max(np.linalg.norm(ahead), 1e-6)
        off = hand - (thing - 0.06 * ahead)  # from the place behind the object, where the hand touches it
        forward = off @ ahead
        aside = off - forward * ahead
        if np.linalg.norm(aside) < 0.03 and -0.06 < forward < 0.04:
            way = goal - thing - aside
        elif np.linalg.norm(off[:2]) < 0.03:
            way = -off
        else:
            way = 0.1 * UP if off[2] < 0.05 else 0.08 * UP - off
        obs = yield move(way, CLOSE, rng, noise)


def pick_and_place_expert(env: Any, obs: Obs, rng: np.random.Generator, noise: float) -> Expert:
    """Above the object, down, close, and to the goal; again whenever the object is not between the fingers."""
    held = 0  # steps for which the fingers have closed
    while True:
        hand, thing, goal = places(obs)
        off = thing - hand
        held = held + 1 if np.linalg.norm(off) < (0.035 if held else 0.02) else 0
        if held > 3:
            way = goal - thing
        else:
            way = off if held or np.linalg.norm(off[:2]) < 0.03 else off + 0.08 * UP
        obs = yield move(way, CLOSE if held else OPEN, rng, noise)
