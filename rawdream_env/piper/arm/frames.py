"""CAN frames of the AgileX Piper: mode, end pose, joints, gripper, power and stop, as bytes.

Pure functions. This is the only place with the arm's own units: 0.001 mm, 0.001 degree, 0.001 N m, as big-endian
integers; arguments and results are in metres, radians and newton metres. Numbers are rounded to the nearest unit, so a
frame may differ from its argument by half a unit. Feedback of pose, joints and gripper has the layout of the command.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rawdream_env.errors import CanFrameError, InvalidActionError, shorten

FloatArray = NDArray[np.floating[Any]]

STOP_ID = 0x150
MODE_ID = 0x151
END_POSE_IDS = (0x152, 0x153, 0x154)
JOINT_IDS = (0x155, 0x156, 0x157)
GRIPPER_ID = 0x159
POWER_ID = 0x471
FEEDBACK_STATUS_ID = 0x2A1
FEEDBACK_END_POSE_IDS = (0x2A2, 0x2A3, 0x2A4)
FEEDBACK_JOINT_IDS = (0x2A5, 0x2A6, 0x2A7)
FEEDBACK_GRIPPER_ID = 0x2A8
FEEDBACK_MOTOR_IDS = (0x261, 0x262, 0x263, 0x264, 0x265, 0x266)

_UM = 1e-6  # metres in 0.001 mm
_MDEG = float(np.deg2rad(1e-3))  # radians in 0.001 degree
_MNM = 1e-3  # newton metres in 0.001 N m
_END_POSE_UNITS = (_UM, _UM, _UM, _MDEG, _MDEG, _MDEG)
_JOINT_UNITS = (_MDEG,) * 6
_INT32 = 2**31 - 1
_ALL_MOTORS = 7
_ENABLED_BIT = 0x40  # of the status byte of a motor and of the gripper
MAX_EFFORT = 5.0
"""Largest gripper effort that the arm takes (N m)."""


class MoveMode(IntEnum):
    """How the arm follows the next commands."""

    POSE = 0
    """To end poses, along any path."""
    JOINT = 1
    """To joint angles."""
    LINE = 2
    """To end poses, along straight lines."""


class GripperCode(IntEnum):
    """What a gripper frame switches."""

    DISABLE = 0
    ENABLE = 1
    DISABLE_AND_CLEAR = 2
    ENABLE_AND_CLEAR = 3


class StopCode(IntEnum):
    """Content of a stop frame."""

    NONE = 0
    STOP = 1
    """The arm sinks slowly."""
    RESET = 2
    """Ends a stop and cuts the power: the arm drops."""


class ArmStatus(IntEnum):
    """What the controller reports; other values are other faults."""

    NORMAL = 0
    EMERGENCY_STOP = 1
    NO_SOLUTION = 2
    SINGULARITY = 3
    BEYOND_LIMITS = 4


@dataclass(frozen=True)
class Frame:
    """A CAN frame with an 11-bit identifier."""

    can_id: int
    data: bytes


@dataclass(frozen=True)
class Mode:
    """Content of a mode frame."""

    can_control: bool
    """False: standby."""
    move_mode: MoveMode
    speed_percent: int
    """Of the arm's own speed limit, 0 to 100."""


@dataclass(frozen=True)
class Gripper:
    """Content of a gripper frame."""

    opening: float
    """Distance between the fingers (m)."""
    effort: float
    """Torque of the gripper's motor (N m), 0 to ``MAX_EFFORT``. Negative in feedback while it pushes the other way."""
    code: int
    """``GripperCode`` in commands, status bits in feedback."""


def encode_mode(mode: Mode) -> Frame:
    """The mode frame. The arm needs it again before every motion.

    Raises:
        InvalidActionError: speed out of range.
    """
    if mode.speed_percent not in range(101):
        raise InvalidActionError(f"speed_percent={mode.speed_percent} must be a whole number from 0 to 100.")
    return Frame(MODE_ID, struct.pack(">3B5x", int(mode.can_control), mode.move_mode, mode.speed_percent))


def decode_mode(frame: Frame) -> Mode:
    """Content of a mode frame; ``CanFrameError`` for another one."""
    _check(frame, (MODE_ID,))
    control, move, speed = frame.data[:3]
    if control > 1 or move not in list(MoveMode) or speed > 100 or any(frame.data[3:]):
        raise CanFrameError(f"mode frame {frame.data.hex()} asks for a mode that is never used here.")
    return Mode(bool(control), MoveMode(move), speed)


def encode_end_pose(end_pose: ArrayLike) -> tuple[Frame, ...]:
    """Three frames for an end pose (6,): flange xyz (m) and roll, pitch, yaw (rad) in the frame of the arm's base.

    Raises:
        InvalidActionError: not six finite numbers that fit the frames.
    """
    return _encode_six("an end pose", end_pose, _END_POSE_UNITS, END_POSE_IDS)


def decode_end_pose(frames: Sequence[Frame]) -> FloatArray:
    """End pose (6,) of three frames, commanded or fed back; ``CanFrameError`` for others."""
    return _decode_six(frames, _END_POSE_UNITS, (END_POSE_IDS, FEEDBACK_END_POSE_IDS))


def encode_joints(joints: ArrayLike) -> tuple[Frame, ...]:
    """Three frames for joint angles (6,) in radians.

    Raises:
        InvalidActionError: not six finite numbers that fit the frames.
    """
    return _encode_six("joints", joints, _JOINT_UNITS, JOINT_IDS)


def decode_joints(frames: Sequence[Frame]) -> FloatArray:
    """Joint angles (6,) in radians of three frames, commanded or fed back; ``CanFrameError`` for others."""
    return _decode_six(frames, _JOINT_UNITS, (JOINT_IDS, FEEDBACK_JOINT_IDS))


def encode_gripper(gripper: Gripper) -> Frame:
    """The gripper frame. It never sets the gripper's zero.

    Raises:
        InvalidActionError: opening negative or too large for the frame, effort out of range, or not finite.
    """
    if not (0.0 <= gripper.opening <= _INT32 * _UM and 0.0 <= gripper.effort <= MAX_EFFORT):
        raise InvalidActionError(
            f"opening={gripper.opening} m must be >= 0 and effort={gripper.effort} N m from 0 to {MAX_EFFORT}."
        )
    if gripper.code not in list(GripperCode):
        raise InvalidActionError(f"code={gripper.code} is none of {list(GripperCode)}.")
    opening_um, effort_mnm = round(gripper.opening / _UM), round(gripper.effort / _MNM)
    return Frame(GRIPPER_ID, struct.pack(">iHBx", opening_um, effort_mnm, gripper.code))


def decode_gripper(frame: Frame) -> Gripper:
    """Content of a gripper frame, commanded or fed back; ``CanFrameError`` for another one."""
    _check(frame, (GRIPPER_ID, FEEDBACK_GRIPPER_ID))
    opening_um, effort_mnm, code = struct.unpack(">ihBx", frame.data)
    return Gripper(opening_um * _UM, effort_mnm * _MNM, code)


def encode_power(on: bool) -> Frame:
    """The frame that powers all motors, or cuts their power. Without power the arm drops."""
    return Frame(POWER_ID, bytes([_ALL_MOTORS, 2 if on else 1]) + bytes(6))


def encode_stop() -> Frame:
    """The emergency stop: the arm sinks slowly. Nothing here makes the frame that resets the arm, which drops it."""
    return Frame(STOP_ID, bytes([StopCode.STOP]) + bytes(7))


def decode_power(frame: Frame) -> bool:
    """Whether a power frame turns all motors on; ``CanFrameError`` for another one."""
    _check(frame, (POWER_ID,))
    if frame.data[0] != _ALL_MOTORS or frame.data[1] not in {1, 2}:
        raise CanFrameError(f"power frame {frame.data.hex()} is not about all motors.")
    return frame.data[1] == 2


def decode_stop(frame: Frame) -> StopCode:
    """Content of a stop frame; ``CanFrameError`` for another one."""
    _check(frame, (STOP_ID,))
    if frame.data[0] not in list(StopCode):
        raise CanFrameError(f"stop frame {frame.data.hex()} has an unknown code.")
    return StopCode(frame.data[0])


def decode_status(frame: Frame) -> int:
    """``ArmStatus``, or another number for another fault; ``CanFrameError`` for another frame."""
    _check(frame, (FEEDBACK_STATUS_ID,))
    return frame.data[1]


def decode_motor_enabled(frame: Frame) -> tuple[int, bool]:
    """Which joint's motor (0 to 5) a motor frame is about, and whether it is on; ``CanFrameError`` for another frame."""
    _check(frame, FEEDBACK_MOTOR_IDS)
    return FEEDBACK_MOTOR_IDS.index(frame.can_id), bool(frame.data[5] & _ENABLED_BIT)


def _check(frame: Frame, ids: Sequence[int]) -> None:
    if frame.can_id not in ids or len(frame.data) != 8:
        expected = " or ".join(f"0x{i:X}" for i in ids)
        raise CanFrameError(f"frame 0x{frame.can_id:X} with {len(frame.data)} bytes: expected {expected} with 8 bytes.")


def _encode_six(what: str, values: ArrayLike, units: Sequence[float], ids: Sequence[int]) -> tuple[Frame, ...]:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidActionError(f"{what} must be 6 numbers: {error}.") from error
    if numbers.shape != (6,) or not np.isfinite(numbers).all() or (np.abs(numbers) > _INT32 * np.array(units)).any():
        raise InvalidActionError(f"{what} must be 6 finite numbers that fit a CAN frame, got {shorten(numbers)}.")
    whole = [int(n) for n in np.rint(numbers / units)]
    return tuple(Frame(ids[k], struct.pack(">2i", *whole[2 * k : 2 * k + 2])) for k in range(3))


def _decode_six(frames: Sequence[Frame], units: Sequence[float], ids: Sequence[Sequence[int]]) -> FloatArray:
    if len(frames) != 3:
        raise CanFrameError(f"got {len(frames)} frames: expected 3.")
    expected = next((three for three in ids if frames[0].can_id in three), ids[0])
    for frame, can_id in zip(frames, expected, strict=True):
        _check(frame, (can_id,))
    return np.array([n for frame in frames for n in struct.unpack(">2i", frame.data)]) * units
