"""Scripted experts for robosuite tasks of one Panda arm: servo from pose to pose, with tremor and imprecise grasps.

Each is a generator: it yields actions (7,) and is sent the observation after each. `noise` is the standard deviation
of a tremor on the six pose commands, in units of the action range; with it the grasp also misses by some millimetres.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tools.scripted import Expert

Array = NDArray[np.float64]
Obs = NDArray[np.float32]
Pose = Callable[[Obs], tuple[Array, Rotation]]  # where the hand should be, given an observation
OPEN, CLOSE = -1.0, 1.0
UP = np.array([0.0, 0.0, 1.0])


def yaw_of(hand: Rotation) -> float:
    """Direction in which the fingers close, the hand's y axis."""
    x, y, _ = hand.as_matrix()[:, 1]
    return float(np.arctan2(y, x))


def top_down(yaw: float) -> Rotation:
    """The hand pointing down, with its fingers closing along `yaw`."""
    y = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    return Rotation.from_matrix(np.stack([np.cross(UP, y), y, -UP], axis=1))


def nearest(angle: float, to: float, period: float) -> float:
    """`angle` plus the multiple of `period` that comes nearest to `to`."""
    return to + (angle - to + period / 2) % period - period / 2


def heading(quat: Obs) -> float:
    """Direction of a body's x axis on the table."""
    x, y, _ = Rotation.from_quat(quat).as_matrix()[:, 0]
    return float(np.arctan2(y, x))


class Arm:
    """The hand in the newest observation, and the actions that move it."""

    def __init__(self, obs: Obs, rng: np.random.Generator, noise: float) -> None:
        self.rng, self.noise, self.drift = rng, noise, np.zeros(3)
        self.see(obs)

    def see(self, obs: Obs) -> None:
        self.obs, self.pos, self.hand = obs, obs[:3].astype(np.float64), Rotation.from_quat(obs[3:7])

    def move(self, pos: Array, hand: Rotation, grip: float, gain: float = 1.0, integral: bool = False) -> Obs:
        """Action (7,) towards a pose; `integral` removes the controller's steady-state error, for the last millimetres,
        where a careful hand also trembles less."""
        error, turn = pos - self.pos, (hand * self.hand.inv()).as_rotvec()
        self.drift = np.clip(self.drift + error, -0.03, 0.03) if integral else np.zeros(3)
        command = np.concatenate([(1.5 * gain * error + 0.1 * self.drift) / 0.05, gain * turn / 0.5])
        command = np.clip(command, -1, 1) + self.noise * (0.25 if integral else 1.0) * self.rng.standard_normal(6)
        return np.append(np.clip(command, -1, 1), grip).astype(np.float32)

    def go(self, pose: Pose, grip: float, near: float = 0.0, turn: float = np.inf, steps: float = np.inf) -> Expert:
        """Until within `near` m and `turn` rad of the pose, or for that many steps."""
        while steps > 0:
            pos, hand = pose(self.obs)
            if np.linalg.norm(pos - self.pos) < near and (hand * self.hand.inv()).magnitude() < turn:
                return
            self.see((yield self.move(pos, hand, grip)))
            steps -= 1


def lift_expert(env: Any, obs: Obs, rng: np.random.Generator, noise: float) -> Expert:
    """Above the cube, down, close, up. `env` is unused: the observation says it all."""
    miss = rng.uniform(-0.004, 0.004, 3) if noise else np.zeros(3)
    arm = Arm(obs, rng, noise)
    grasp = top_down(nearest(heading(obs[12:16]), yaw_of(arm.hand), np.pi / 2))  # the nearest pair of faces
    cube = lambda up: lambda obs: (obs[9:12].astype(np.float64) + up, grasp)  # noqa: E731
    yield from arm.go(cube(0.08 * UP), OPEN, near=0.015, turn=0.15)
    yield from arm.go(cube(miss), OPEN, near=0.008)
    yield from arm.go(cube(miss), CLOSE, steps=5)
    top = arm.pos + 0.12 * UP
    yield from arm.go(lambda obs: (top, grasp), CLOSE)


def can_expert(env: Any, obs: Obs, rng: np.random.Generator, noise: float) -> Expert:
    """Above the can, down, close, up, over its bin, down, open, up."""
    miss = rng.uniform(-0.008, 0.008, 3) if noise else np.zeros(3)
    arm = Arm(obs, rng, noise)
    grasp = top_down(yaw_of(arm.hand))
    can = lambda up: lambda obs: (obs[16:19] + miss + up * UP, grasp)  # noqa: E731
    yield from arm.go(can(0.14), OPEN, near=0.02, turn=0.15)
    yield from arm.go(can(0.015), OPEN, near=0.008)
    yield from arm.go(can(0.015), CLOSE, steps=7)
    height = 1.02  # clears the walls of the bins; higher leaves the reach, and the arm stalls centimetres short
    # The bin's centre lies at the edge of the reach: a little short of it is inside too.
    drop = env.env.target_bin_placements[env.env.object_id] + [-0.03, -0.04, 0.09]
    for place, near, steps in (
        (np.array([*arm.pos[:2], height]), 0.03, np.inf),
        (np.array([*drop[:2], height]), 0.03, np.inf),
        (drop, 0.025, 26),
    ):
        yield from arm.go(lambda obs, p=place: (p, grasp), CLOSE, near, steps=steps)
    yield from arm.go(lambda obs: (drop + 0.15 * UP, grasp), OPEN)


def square_expert(env: Any, obs: Obs, rng: np.random.Generator, noise: float) -> Expert:
    """Above the nut's handle, down, close, up, over the peg with the hole aligned, down, open; from the start again
    whenever the nut is not in the hand. With noise four grasps in ten are off by up to 6 cm."""
    arm, sim, nut = Arm(obs, rng, noise), env.env.sim, env.env.nuts[0]
    site = sim.model.site_name2id(nut.important_sites["handle"])
    peg = np.array(sim.data.body_xpos[env.env.peg1_body_id])
    start = yaw_of(arm.hand)

    def held() -> bool:
        return bool(np.linalg.norm(sim.data.site_xpos[site] - arm.pos) < 0.035)

    while True:
        miss = np.append(rng.uniform(-1, 1, 2) * (0.06 if rng.random() < 0.4 else 0.004), 0.0) * bool(noise)

        def handle(up: float, miss: Array = miss) -> Pose:
            def pose(obs: Obs) -> tuple[Array, Rotation]:
                along = sim.data.site_xpos[site] - obs[16:19]
                across = np.arctan2(along[1], along[0]) + np.pi / 2
                return sim.data.site_xpos[site] + miss + up * UP, top_down(nearest(across, start, np.pi))

            return pose

        yield from arm.go(handle(0.08), OPEN, near=0.01, turn=0.05, steps=80)
        yield from arm.go(handle(-0.005), OPEN, near=0.006, turn=0.05, steps=40)
        yield from arm.go(handle(-0.005), CLOSE, steps=9)
        carry, grasp = np.array([*arm.pos[:2], 0.985]), arm.hand  # just above the peg; higher leaves the reach
        for _ in range(60):
            if not held() or np.linalg.norm(carry - arm.pos) < 0.03:
                break
            arm.see((yield arm.move(carry, top_down(yaw_of(grasp)), CLOSE)))

        # Any multiple of 90 degrees fits. Best is the one with the handle along the table's y axis: along +x the arm
        # runs out of reach, along -x the nut slides off when let go.
        now = heading(arm.obs[19:23])
        along = arm.pos - arm.obs[16:19]
        turns = [nearest(0.0, now, np.pi / 2) - now + k * np.pi / 2 for k in (-1, 0, 1)]
        goal = now + min(turns, key=lambda d: 3 * abs(np.cos(np.arctan2(along[1], along[0]) + d)) + 0.2 * abs(d))
        still = lowered = tries = 0
        while held() and lowered < 26 and (still < 3 or arm.obs[18] > env.env.table_offset[2] + 0.05):
            centre = arm.obs[16:19].astype(np.float64)
            turn = Rotation.from_euler("z", nearest(goal - heading(arm.obs[19:23]), 0.0, 2 * np.pi))
            hand, off = top_down(yaw_of(turn * arm.hand)), np.linalg.norm((centre - peg)[:2])
            place = peg * [1, 1, 0] + turn.apply(arm.pos - centre)
            aligned = off < 0.0015 and turn.magnitude() < 0.02 and (hand * arm.hand.inv()).magnitude() < 0.03
            tries += 1
            still = still + 1 if aligned or still >= 3 or tries > 80 else 0
            place[2] = carry[2] if still < 3 else arm.pos[2] - 0.02
            lowered += still >= 3
            gain = 0.5 if off < 0.03 or still >= 3 else 1.0
            arm.see((yield arm.move(place, hand, CLOSE, gain, integral=off < 0.01 or still >= 3)))
        for _ in range(20):  # a nut that sits on the rim falls over the peg
            arm.see((yield np.array([*np.zeros(6), OPEN], np.float32)))
