"""A fast control step for robosuite arms driven by OSC_POSE.

robosuite evaluates its operational-space controller in Python at every 2 ms physics step; most of an
environment step is spent there. `FastStep` computes the same torques in one compiled function per physics
step. The order of operations is robosuite's own (`step1`, controller, `step2`, its `lite_physics` path), all
gains, limits and joint indices are read from its controller objects, and goals, gripper commands,
observations, rewards and success still come from robosuite.
"""

import inspect

import mujoco
import numba
import numpy as np
import robosuite.utils.transform_utils as T
from numpy.typing import NDArray
from robosuite.controllers.parts.arm.osc import OperationalSpaceController
from robosuite.controllers.parts.gripper.simple_grip import SimpleGripController
from robosuite.environments.robot_env import RobotEnv
from robosuite.robots.robot import Robot
from robosuite.utils.control_utils import nullspace_torques

Array = NDArray[np.float64]
# The null-space stiffness is a default argument in robosuite rather than a controller setting.
NULLSPACE_KP = float(inspect.signature(nullspace_torques).parameters["joint_kp"].default)


@numba.njit(cache=True)
def _solve_block(a: Array, b: Array, start: int, stop: int) -> Array:
    """x (n, k) with a x = b in rows start to stop and zero in the others, for a symmetric positive definite a (n, n).

    Only that diagonal block of a is used. Cholesky in loops: at these sizes faster than LAPACK, and to compile.
    """
    low, x = np.zeros(a.shape), np.zeros(b.shape)
    for i in range(start, stop):
        for j in range(start, i + 1):
            s = a[i, j]
            for p in range(start, j):
                s -= low[i, p] * low[j, p]
            low[i, j] = np.sqrt(s) if i == j else s / low[j, j]
    for i in range(start, stop):
        x[i] = b[i]
        for p in range(start, i):
            x[i] -= low[i, p] * x[p]
        x[i] /= low[i, i]
    for i in range(stop - 1, start - 1, -1):
        for p in range(i + 1, stop):
            x[i] -= low[p, i] * x[p]
        x[i] /= low[i, i]
    return x


@numba.njit(cache=True)
def _apply_osc(
    mass_full: Array, jac_full: Array, qpos: Array, qvel: Array, bias: Array, pos: Array, mat: Array, goal_pos: Array,
    goal_mat: Array, gains: Array, rest: Array, limits: Array, index: NDArray[np.int64], ctrl: Array,
) -> None:  # fmt: skip
    """Writes the clipped joint torques of one arm with n joints into `ctrl`.

    Full-model inputs are MuJoCo's: mass_full (nv, nv), jac_full (6, nv) of the end effector site, qpos, qvel
    and bias. pos (3,) and mat (9,) are the site's pose, goal_pos (3,) and goal_mat (3, 3) its target. gains
    (2, 7) are stiffness and damping of the six pose coordinates, then of the null space. rest (n,) is the
    null-space posture, limits (2, n) the torque range, index (3, n) the joints' places in qpos, qvel, ctrl.
    """
    n, joints = index.shape[1], index[1]
    q_dot, mass, jac_t = qvel[joints], mass_full[joints][:, joints], jac_full[:, joints].T
    posture = gains[0, 6] * (rest - qpos[index[0]]) - gains[1, 6] * q_dot  # (n,)

    # Desired acceleration of the end effector: a spring to the goal pose and a damper. The orientation error
    # is half the sum of the cross products of the current and the desired axes (columns).
    acc = np.zeros((6, 1))
    acc[:3, 0] = goal_pos - pos
    for c in range(3):
        acc[3:, 0] += 0.5 * np.cross(mat[c::3], goal_mat[:, c])
    for r in range(6):
        acc[r, 0] = gains[0, r] * acc[r, 0] - gains[1, r] * (jac_t[:, r] * q_dot).sum()

    # With X = M^-1 J^T the inverse operational inertia is J X. Position and orientation use their own
    # blocks of it ("uncoupled"). The posture torque M p is projected by N^T = 1 - J^T (J X)^-1 X^T (X^T M = J).
    minv_jt = _solve_block(mass, jac_t, 0, n)
    inertia_inv, drift = np.zeros((6, 6)), np.zeros((6, 1))
    for i in range(n):
        drift[:, 0] += jac_t[i] * posture[i]
        inertia_inv += np.outer(jac_t[i], minv_jt[i])
    counter = _solve_block(inertia_inv, drift, 0, 6)
    force, torque = _solve_block(inertia_inv, acc, 0, 3), _solve_block(inertia_inv, acc, 3, 6)
    tau = bias[joints]
    for j in range(n):
        tau += mass[:, j] * posture[j]
    for r in range(6):
        tau += jac_t[:, r] * (force[r, 0] + torque[r, 0] - counter[r, 0])
    ctrl[index[2]] = np.minimum(np.maximum(tau, limits[0]), limits[1])


def _require_supported(env: RobotEnv, robot: Robot) -> None:
    """Raises ValueError unless the robot's controllers are those this file computes."""
    parts = list(robot.part_controllers.values())
    kinds = [type(part) for part in parts]
    if robot.composite_controller.name != "BASIC" or kinds != [OperationalSpaceController, SimpleGripController]:
        raise ValueError("FastStep needs a BASIC controller of an OSC_POSE arm and a GRIP gripper; use original_step")
    (osc, grip), model = parts, env.sim.model._model
    base = model.site(f"{osc.naming_prefix}{osc.part_name}_center").bodyid[0]
    conditions = {
        "lite_physics=True": env.lite_physics,
        "a fixed base": model.body_weldid[base] == 0,
        "OSC_POSE": osc.name == "OSC_POSE",
        'impedance_mode="fixed"': osc.impedance_mode == "fixed",
        'input_type="delta"': osc.input_type == "delta",
        'input_ref_frame="world"': osc.input_ref_frame == "world",
        "uncouple_pos_ori=True": osc.uncoupling,
        "goals relative to the achieved pose": osc._goal_update_mode == "achieved",
        "no interpolation": osc.interpolator_pos is osc.interpolator_ori is grip.interpolator is None,
        "no pose limits": osc.position_limits is None and osc.orientation_limits is None,
    }
    missing = [name for name, holds in conditions.items() if not holds]
    if missing:
        raise ValueError(f"FastStep needs {', '.join(missing)}; use original_step for this controller")


class _Arm:
    """The torques of a single-armed robot and the command of its gripper; `start` is its first action."""

    def __init__(self, env: RobotEnv, robot: Robot, start: int) -> None:
        _require_supported(env, robot)
        name = robot.arms[0]
        grip_name = robot.get_gripper_name(name)
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.osc, self.grip = robot.part_controllers[name], robot.part_controllers[grip_name]
        self.gripper = robot.gripper[name]
        self.arm_action = slice(start, start + self.osc.control_dim)
        self.grip_action = slice(start + self.osc.control_dim, start + robot.action_dim)
        self.grip_ctrl = robot._ref_actuators_indexes_dict[grip_name]
        self.grip_range = self.model.actuator_ctrlrange[self.grip_ctrl].T
        self.site = self.model.site(self.osc.ref_name).id
        self.pos, self.mat = self.data.site_xpos[self.site], self.data.site_xmat[self.site]
        self.mass = np.zeros((self.model.nv, self.model.nv))
        self.jac = np.zeros((6, self.model.nv))
        osc, actuators = self.osc, robot._ref_actuators_indexes_dict[name]
        self.constants = (
            np.stack([np.append(osc.kp, NULLSPACE_KP), np.append(osc.kd, 2 * np.sqrt(NULLSPACE_KP))]),
            np.array(osc.initial_joint),
            np.ascontiguousarray(self.model.actuator_ctrlrange[actuators].T),
            np.array([osc.qpos_index, osc.qvel_index, actuators], dtype=np.int64),
        )

    def set_goal(self, action: Array) -> None:
        """Sets the pose target relative to the pose reached, and the gripper's command."""
        delta = self.osc.scale_action(action[self.arm_action])
        self.goal_pos = self.pos + delta[:3]
        self.goal_mat = T.quat2mat(T.axisangle2quat(delta[3:])) @ self.mat.reshape(3, 3)
        self.grip.new_update = False  # spares it the inertia matrix, which its command does not need
        self.grip.set_goal(self.gripper.format_action(action[self.grip_action]))
        # The command does not depend on the state, so it holds for the whole control step.
        self.data.ctrl[self.grip_ctrl] = np.clip(self.grip.run_controller(), *self.grip_range)

    def control(self) -> None:
        """Sets this physics step's joint torques."""
        m, d = self.model, self.data
        mujoco.mj_jacSite(m, d, self.jac[:3], self.jac[3:], self.site)
        mujoco.mj_fullM(m, self.mass, d.qM)
        state = (d.qpos, d.qvel, d.qfrc_bias, self.pos, self.mat)
        _apply_osc(self.mass, self.jac, *state, self.goal_pos, self.goal_mat, *self.constants, d.ctrl)


class FastStep:
    """Advances a robosuite environment by one control step, as `env.step` with `lite_physics` does.

    Make a new one after every `env.reset()`, which replaces robosuite's controllers. Raises ValueError for
    a controller configuration this file does not reproduce.
    """

    def __init__(self, env: RobotEnv) -> None:
        self.env = env
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.arms, start = [], 0
        for robot in env.robots:
            self.arms.append(_Arm(env, robot, start))
            start += robot.action_dim
        self.substeps = int(env.control_timestep / env.model_timestep)
        self.fresh = True

    def __call__(self, action: Array) -> None:
        """Advances the simulation under action (A,) float64 in [-1, 1]."""
        for i in range(self.substeps):
            mujoco.mj_step1(self.model, self.data)
            if self.fresh:
                # In an episode's first physics step robosuite's controllers use the inertia from before the
                # fingers were placed; only they know it.
                self.env._pre_action(action, True)
                for arm in self.arms:
                    arm.goal_pos, arm.goal_mat = arm.osc.goal_pos, arm.osc.goal_ori
                self.fresh = False
            else:
                for arm in self.arms:
                    if i == 0:
                        arm.set_goal(action)
                    arm.control()
            mujoco.mj_step2(self.model, self.data)
