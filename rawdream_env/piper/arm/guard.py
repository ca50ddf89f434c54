"""The guard: the nearest commanded pose that an arm may be sent.

Pure functions, no input or output. Every target for a real arm goes through :func:`guard`, which moves it inside every
limit and says why, or refuses it. Poses are the commanded poses of ``geometry``: tool xyz (m), roll, pitch, yaw (rad),
gripper command in [-1, 1]. One target is sent per ``Limits.period``. Shape letters: B arms (any leading shape, or none).

Standing still is always allowed: an arm inside the limits can stop within one period (``Limits`` checks this), so a
sequence of targets cannot drive it to where every next command breaks a limit.

Targets are compared, not the paths between them; two successive targets are at most ``max_step`` apart on each axis.
Whether the arm follows its commands is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rawdream_env.errors import InvalidActionError, InvalidOptionError
from rawdream_env.piper import geometry as geo
from rawdream_env.types import ACTION_DIM

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]

_SHOULDER, _ELBOW, _WRIST = (geo.ARM_POINT_NAMES.index(name) for name in ("shoulder", "elbow", "wrist"))
_HALVINGS = 6
"""A target that breaks a limit is approached to 1/64 of the way to it."""
_JOINT_MARGIN = 5e-4
"""A pose that is rounded to CAN frames (0.001 degree) moves a joint by up to 3e-4 rad where the wrist is bent least."""
_ROUNDING = 1e-9
"""Tolerance of comparisons between differences of numbers (m, rad)."""
_STAGES: Final = (slice(0, 3), slice(3, 6), slice(6, 7))
"""Position comes before direction, direction before gripper."""


class Reason(IntFlag):
    """Why a target was changed or refused. Reasons add up: ``Reason.STEP | Reason.TABLE``."""

    NOT_FINITE = 1
    """Refused: the target has NaN or infinity."""
    STATE = 2
    """Refused: the current state breaks a limit or is not finite. Bring the arm back to its workspace first."""
    GRIPPER = 4
    """Gripper command out of range."""
    WORKSPACE = 8
    """Position outside the workspace box."""
    DIRECTION = 16
    """Roll, pitch or yaw out of range."""
    STEP = 32
    """Further from the current pose than one command may move."""
    ACCELERATION = 64
    """Too much change of velocity."""
    SPEED = 128
    """Tool too fast."""
    JOINT_LIMIT = 256
    """A joint angle out of range."""
    JOINT_SPEED = 512
    """A joint too fast."""
    SINGULARITY = 1024
    """Too near a pose where joints lose a direction of motion, or out of reach."""
    TABLE = 2048
    """Part of the arm too near the table."""


REFUSALS: Final = Reason.NOT_FINITE | Reason.STATE
_OUT_OF_RANGE: Final = np.repeat([int(r) for r in (Reason.WORKSPACE, Reason.DIRECTION, Reason.GRIPPER)], [3, 3, 1])


@dataclass(frozen=True, eq=False)
class Limits:
    """What the guard lets through. Metres, radians, seconds; world frame of ``geometry``.

    Raises:
        InvalidOptionError: a limit is not a positive number, a range is empty, or the arm cannot stop in one period.
    """

    period: float = 1 / geo.CONTROL_HZ
    """Time between two commands (s)."""
    workspace_low: FloatArray = field(default_factory=lambda: geo.WORKSPACE_LOW)
    """Lowest x, y, z of the tool point (m). Default: that of the simulator."""
    workspace_high: FloatArray = field(default_factory=lambda: geo.WORKSPACE_HIGH)
    """Highest x, y, z of the tool point (m). Default: that of the simulator."""
    rpy_low: FloatArray = field(default_factory=lambda: geo.RPY_LOW)
    """Lowest roll, pitch, yaw (rad). Default: that of the simulator."""
    rpy_high: FloatArray = field(default_factory=lambda: geo.RPY_HIGH)
    """Highest roll, pitch, yaw (rad). Default: that of the simulator."""
    gripper_low: float = -0.95
    """Widest gripper command. Default: opens 0.06995 m; the manufacturer's SDK allows 0 to 0.07 m."""
    gripper_high: float = 1.0
    """Most closed gripper command."""
    joint_low: FloatArray = field(default_factory=lambda: geo.JOINT_LOW + _JOINT_MARGIN)
    """Lowest joint angles (rad). Default: just inside the limits of the manufacturer's SDK."""
    joint_high: FloatArray = field(default_factory=lambda: geo.JOINT_HIGH - _JOINT_MARGIN)
    """Highest joint angles (rad). Default: just inside the limits of the manufacturer's SDK."""
    max_step: float = geo.DPOS
    """Longest move of one command along each of x, y, z (m). Default: that of action 1."""
    max_turn: float = geo.DROT
    """Largest change of roll, pitch and yaw by one command (rad). Default: that of action 1."""
    max_speed: float = 0.25
    """Speed of the tool point (m/s). Default: the reduced speed of ISO 10218-1."""
    max_acceleration: float = 1.5
    """Along each of x, y, z (m/s^2). Default: from rest to a full step; a reversal takes two commands."""
    max_turn_acceleration: float = 15.0
    """Of roll, pitch and yaw (rad/s^2). Default: from rest to a full turn; a reversal takes two commands."""
    max_joint_speed: float = 3.0
    """Of each joint (rad/s). Default: the highest that the manufacturer's SDK can set."""
    min_wrist_bend: float = 0.05
    """Angle of joint 5 (rad); at 0 the axes of joints 4 and 6 coincide. Our choice."""
    min_reach_margin: float = 0.005
    """How far the wrist stays from the stretched and from the folded arm (m). Our choice."""
    min_axis_distance: float = 0.05
    """Horizontal distance of the wrist from the axis of joint 1 (m). Our choice."""
    table_clearance: float = 0.0015
    """Height of fingertips, tool, flange, wrist and elbow above the table (m). Default: just under that of fingers
    pointing straight down at the bottom of the simulator's workspace, 0.002 m."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            array = np.array(value, dtype=np.float64)
            array.setflags(write=False)
            if isinstance(value, np.ndarray):
                object.__setattr__(self, name, array)
            positive = name not in {"gripper_low", "gripper_high"} and not isinstance(value, np.ndarray)
            if not np.isfinite(array).all() or (positive and array <= 0):
                raise InvalidOptionError(f"{name}={value} must be {'positive and ' * positive}finite.")
        for name, size in (("workspace", 3), ("rpy", 3), ("joint", 6)):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if low.shape != (size,) or high.shape != (size,) or not (low < high).all():
                raise InvalidOptionError(f"{name}_low={low} must be {size} numbers below {name}_high={high}.")
        if not -1.0 <= self.gripper_low < self.gripper_high <= 1.0:
            raise InvalidOptionError(f"gripper_low={self.gripper_low} to {self.gripper_high} is no range in [-1, 1].")
        for most, step, unit in (("max_acceleration", "max_step", "m"), ("max_turn_acceleration", "max_turn", "rad")):
            stop = getattr(self, most) * self.period**2
            if stop < getattr(self, step) * (1 - _ROUNDING):
                raise InvalidOptionError(
                    f"{most}={getattr(self, most)} stops {stop:.4g} {unit} per period, {step}={getattr(self, step)}: "
                    f"the arm could not stop in one period. Raise {most} or lower {step}."
                )

    @cached_property
    def pose_low(self) -> FloatArray:
        """Lowest commanded pose (7,)."""
        return np.concatenate([self.workspace_low, self.rpy_low, [self.gripper_low]])

    @cached_property
    def pose_high(self) -> FloatArray:
        """Highest commanded pose (7,)."""
        return np.concatenate([self.workspace_high, self.rpy_high, [self.gripper_high]])


@dataclass(frozen=True, eq=False)
class Guarded:
    """What may be sent. Refused rows are NaN, so that they cannot be sent by mistake."""

    pose: FloatArray
    """(B, 7) allowed commanded pose."""
    joints: FloatArray
    """(B, 6) its joint angles (rad)."""
    reasons: NDArray[np.int64]
    """(B,) sums of ``Reason``; 0 where the target is unchanged. ``Reason(int(x))`` names them."""

    @property
    def allowed(self) -> BoolArray:
        """(B,) False where the target is refused."""
        return np.asarray((self.reasons & int(REFUSALS)) == 0)


@dataclass(frozen=True, eq=False)
class ArmState:
    """The last two commanded poses: where the arm is sent, and how fast it moves.

    Args:
        pose: (B, 7) last commanded pose.
        before: (B, 7) the one before it, one period earlier; equal for an arm at rest.
    """

    pose: FloatArray
    before: FloatArray

    @classmethod
    def at_rest(cls, pose: ArrayLike = geo.HOME_POSE, limits: Limits | None = None) -> ArmState:
        """An arm that stands still; the gripper command is brought into the limits."""
        limits = limits or Limits()
        here = _poses("a state", pose)
        here[..., 6] = np.clip(here[..., 6], limits.gripper_low, limits.gripper_high)
        return cls(here, here)

    def after(self, sent: Guarded) -> ArmState:
        """The state once ``sent`` has been sent; where it was refused, once the arm holds its last pose."""
        return ArmState(np.where(sent.allowed[..., None], sent.pose, self.pose), self.pose)


def _poses(what: str, values: ArrayLike) -> FloatArray:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidActionError(f"{what} must be numbers of shape (..., {ACTION_DIM}): {error}.") from error
    if array.shape[-1:] != (ACTION_DIM,):
        raise InvalidActionError(f"{what} must have shape (..., {ACTION_DIM}), got {array.shape}.")
    return array


def target_pose(pose: ArrayLike, action: ArrayLike) -> FloatArray:
    """The pose that an action of the environments asks for: ``geometry.integrate_action`` before any clipping.

    Args:
        pose: (B, 7) last commanded pose.
        action: (B, 7) delta xyz, delta roll, pitch, yaw, gripper command.
    """
    here, act = _poses("a pose", pose), _poses("an action", action)
    with np.errstate(all="ignore"):  # not a number in, not a number out: the guard refuses it
        moved = here[..., :6] + np.array([geo.DPOS] * 3 + [geo.DROT] * 3) * act[..., :6]
    return np.concatenate([moved, np.broadcast_to(act[..., 6:], (*moved.shape[:-1], 1))], axis=-1)


def guard(state: ArmState, target: ArrayLike, limits: Limits | None = None) -> Guarded:
    """Bring a target inside every limit.

    Args:
        state: the last two commanded poses (B, 7).
        target: (B, 7) requested pose (``target_pose`` makes it of an action).
        limits: default ``Limits()``.

    Returns:
        The allowed pose, its joint angles and the reasons. Guarding an allowed pose in the same state changes nothing.
        Rows do not depend on each other.

    Raises:
        InvalidActionError: not numbers, or another shape.
    """
    limits = limits or Limits()
    goal, here, before = np.broadcast_arrays(
        _poses("a target", target), _poses("a state", state.pose), _poses("a state", state.before)
    )
    shape, (goal, here, before) = goal.shape[:-1], (a.reshape(-1, ACTION_DIM) for a in (goal, here, before))
    finite = np.isfinite(goal).all(axis=-1)
    ready, joints_here = _state(here, before, limits)
    reasons = np.where(finite, 0, int(Reason.NOT_FINITE))
    reasons |= np.where(ready, 0, int(Reason.STATE))
    pose, joints = np.full_like(here, np.nan), np.full((len(here), 6), np.nan)
    rows = np.flatnonzero(reasons == 0)
    if len(rows):
        boxed, reasons[rows] = _into_boxes(goal[rows], here[rows], before[rows], limits)
        pose[rows], joints[rows], more = _nearest(boxed, here[rows], joints_here[rows], limits)
        reasons[rows] |= more
    return Guarded(pose.reshape(*shape, ACTION_DIM), joints.reshape(*shape, 6), reasons.reshape(shape))


def _state(here: FloatArray, before: FloatArray, limits: Limits) -> tuple[BoolArray, FloatArray]:
    """(B,) whether the last command was inside the limits, and slow enough to stop in one period; its joint angles (B, 6)."""
    finite: BoolArray = np.asarray(np.isfinite(here).all(axis=-1) & np.isfinite(before).all(axis=-1))
    if not finite.all():
        here, before = (np.where(finite[:, None], a, geo.HOME_POSE) for a in (here, before))
    step = np.abs(here - before)[:, :6] <= np.repeat([limits.max_step, limits.max_turn], 3) + _ROUNDING
    inside = (here >= limits.pose_low) & (here <= limits.pose_high)
    joints, broken = _broken(here, None, None, limits)
    return finite & step.all(axis=-1) & inside.all(axis=-1) & (broken == 0), joints


def _into_boxes(
    goal: FloatArray, here: FloatArray, before: FloatArray, limits: Limits
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Clip to the limits that are ranges of each axis: pose (B, 7) and reasons (B,)."""
    step = np.append(np.repeat([limits.max_step, limits.max_turn], 3), np.inf)
    change = np.append(np.repeat([limits.max_acceleration, limits.max_turn_acceleration], 3), np.inf) * limits.period**2
    coast = here + (here - before)
    boxes = (
        (limits.pose_low, limits.pose_high, _OUT_OF_RANGE),
        (here - step, here + step, int(Reason.STEP)),
        (coast - change, coast + change, int(Reason.ACCELERATION)),
    )
    reasons = np.zeros(len(goal), dtype=np.int64)
    pose = goal
    for low, high, reason in boxes:
        low, high = np.minimum(low, here), np.maximum(high, here)  # against rounding: standing still is inside
        outside = (goal < low) | (goal > high)
        reasons |= np.bitwise_or.reduce(np.where(outside, reason, 0), axis=-1)
        pose = np.minimum(np.maximum(pose, low), high)
    return pose, reasons


def _broken(
    goal: FloatArray, here: FloatArray | None, joints_here: FloatArray | None, limits: Limits
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Joint angles (B, 6) of ``goal`` and the limits it breaks (B,), of those that are not ranges of each axis.

    Without ``here`` and its joints, speeds are left out.
    """
    joints, points = geo.joints_and_points(goal)
    shoulder, elbow, wrist = (points[..., k, :] for k in (_SHOULDER, _ELBOW, _WRIST))
    upper, reach = _length(elbow - shoulder), _length(wrist - shoulder)
    margin = np.minimum(geo.FOREARM + upper - reach, reach - np.abs(geo.FOREARM - upper))
    singular = (margin < limits.min_reach_margin) | (np.abs(joints[..., 4]) < limits.min_wrist_bend)
    singular |= np.hypot(wrist[..., 0], wrist[..., 1]) < limits.min_axis_distance
    broken = {
        Reason.JOINT_LIMIT: ((joints < limits.joint_low) | (joints > limits.joint_high)).any(axis=-1),
        Reason.SINGULARITY: singular,
        Reason.TABLE: points[..., _ELBOW:, 2].min(axis=-1) < limits.table_clearance,
    }
    if here is not None and joints_here is not None:
        turned = np.abs(joints - joints_here).max(axis=-1)
        broken[Reason.SPEED] = _length((goal - here)[..., :3]) > limits.max_speed * limits.period + _ROUNDING
        broken[Reason.JOINT_SPEED] = turned > limits.max_joint_speed * limits.period + _ROUNDING
    reasons = np.zeros(goal.shape[:-1], dtype=np.int64)
    for reason, rows in broken.items():
        reasons |= rows * np.int64(reason)
    return joints, reasons


def _nearest(
    goal: FloatArray, here: FloatArray, joints_here: FloatArray, limits: Limits
) -> tuple[FloatArray, FloatArray, NDArray[np.int64]]:
    """The goal, or from ``here`` as far towards it as the limits let: pose, joints and reasons.

    Position, direction and gripper are approached one after the other, so a wrist at its limit does not stop the hand.
    """
    joints, reasons = _broken(goal, here, joints_here, limits)
    pose, rows = goal.copy(), np.flatnonzero(reasons)
    if not len(rows):
        return pose, joints, reasons
    best, best_joints = here[rows], joints_here[rows]
    for axes in _STAGES:
        end = best.copy()
        end[:, axes] = goal[rows, axes]
        best_joints, broken = _broken(end, here[rows], joints_here[rows], limits)
        if len(short := np.flatnonzero(broken)):
            k = rows[short]
            end[short], best_joints[short] = _part_way(best[short], end[short], here[k], joints_here[k], limits)
        best = end
    pose[rows], joints[rows] = best, best_joints
    return pose, joints, reasons


def _part_way(
    start: FloatArray, end: FloatArray, here: FloatArray, joints_here: FloatArray, limits: Limits
) -> tuple[FloatArray, FloatArray]:
    """By bisection, from ``start``, which is allowed, as far as allowed towards ``end``, which is not: pose and joints.

    All fractions are tried at once: a batch takes little longer than a row.
    """
    fractions = np.arange(2**_HALVINGS)[:, None] / 2**_HALVINGS
    trials = start[:, None] + fractions * (end - start)[:, None]
    joints, broken = _broken(trials, here[:, None], joints_here[:, None], limits)
    rows, low, high = np.arange(len(start)), np.zeros(len(start), int), np.full(len(start), 2**_HALVINGS)
    for _ in range(_HALVINGS):
        tried = (low + high) // 2
        good = broken[rows, tried] == 0
        low, high = np.where(good, tried, low), np.where(good, high, tried)
    return trials[rows, low], joints[rows, low]


def _length(vectors: FloatArray) -> FloatArray:
    """(B,) of vectors (B, 3)."""
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    return np.asarray(np.sqrt(x * x + y * y + z * z))
