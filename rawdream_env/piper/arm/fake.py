"""A Piper that exists as CAN frames only, for tests and for trying things out without an arm.

No bus and no clock: the caller hands over frames and lets time pass. Kinematics and limits are those of ``geometry``;
joints move at constant speed, without inertia or load.
"""

from __future__ import annotations

import numpy as np

from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm import frames as can
from rawdream_env.piper.arm.end_pose import FloatArray, end_pose_from_joints, pose_from_end_pose

_JOINT_SPEED = 3.0
"""At 100 percent (rad/s)."""
_GRIPPER_SPEED = 0.15
"""Of the opening (m/s)."""
_ENABLED = 0x40
_ROUNDING = 1e-5
"""Of angles and positions in frames (rad, m): more than half a unit."""


class FakeArm:
    """The controller's side of the bus.

    Args:
        joints: where the arm stands at first (6,), default the home pose.

    Attributes:
        received: every frame so far, in order.
        joints: angles now (6,) in radians.
        opening: distance between the fingers now (m).
        status: ``frames.ArmStatus``. A target out of reach sets NO_SOLUTION, one outside the joint limits BEYOND_LIMITS;
            neither is followed.
        dropped: whether the power was cut while the arm was enabled. A real arm falls on the table then.
    """

    def __init__(self, joints: FloatArray | None = None) -> None:
        start = geo.joint_angles(geo.HOME_POSE) if joints is None else joints
        self.joints: FloatArray = np.array(start, dtype=np.float64)
        self.opening = 0.0
        self.status = can.ArmStatus.NORMAL
        self.enabled = False
        self.dropped = False
        self.received: list[can.Frame] = []
        self._mode = can.Mode(False, can.MoveMode.POSE, 0)
        self._target: FloatArray = self.joints.copy()
        self._opening_target = 0.0
        self._parts: dict[int, can.Frame] = {}

    def receive(self, frame: can.Frame) -> None:
        """Take one frame from the bus. Frames of other identifiers change nothing.

        Raises:
            CanFrameError: a frame of a known identifier with content that is never used here.
        """
        self.received.append(frame)
        if frame.can_id == can.MODE_ID:
            self._mode = can.decode_mode(frame)
        elif frame.can_id == can.POWER_ID:
            self._power(can.decode_power(frame))
        elif frame.can_id == can.STOP_ID:
            self._stop(can.decode_stop(frame))
        elif frame.can_id == can.GRIPPER_ID:
            gripper = can.decode_gripper(frame)
            if gripper.code in {can.GripperCode.ENABLE, can.GripperCode.ENABLE_AND_CLEAR}:
                self._opening_target = min(gripper.opening, geo.MAX_OPENING)
        elif frame.can_id in can.JOINT_IDS:
            self._collect(frame, can.JOINT_IDS, (can.MoveMode.JOINT,))
        elif frame.can_id in can.END_POSE_IDS:
            self._collect(frame, can.END_POSE_IDS, (can.MoveMode.POSE, can.MoveMode.LINE))

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        if self.enabled and self._mode.can_control and self.status != can.ArmStatus.EMERGENCY_STOP:
            step = _JOINT_SPEED * self._mode.speed_percent / 100 * seconds
            self.joints = self.joints + np.clip(self._target - self.joints, -step, step)
        step = _GRIPPER_SPEED * seconds
        self.opening += float(np.clip(self._opening_target - self.opening, -step, step))

    def feedback(self) -> list[can.Frame]:
        """The frames that the arm sends now: status, end pose, joints, gripper and motors."""
        moving = int(not np.allclose(self.joints, self._target))
        status = bytes([self._mode.can_control, self.status, self._mode.move_mode, 0, moving, 0, 0, 0])
        on = _ENABLED * self.enabled
        gripper = can.encode_gripper(can.Gripper(self.opening, 0.0, can.GripperCode.ENABLE)).data
        end_pose, joints = can.encode_end_pose(end_pose_from_joints(self.joints)), can.encode_joints(self.joints)
        return [
            can.Frame(can.FEEDBACK_STATUS_ID, status),
            *(can.Frame(i, f.data) for i, f in zip(can.FEEDBACK_END_POSE_IDS, end_pose, strict=True)),
            *(can.Frame(i, f.data) for i, f in zip(can.FEEDBACK_JOINT_IDS, joints, strict=True)),
            can.Frame(can.FEEDBACK_GRIPPER_ID, gripper[:6] + bytes([_ENABLED, 0])),
            *(can.Frame(i, bytes([0, 0, 0, 0, 0, on, 0, 0])) for i in can.FEEDBACK_MOTOR_IDS),
        ]

    def _power(self, on: bool) -> None:
        self.dropped |= self.enabled and not on
        self.enabled = on
        self._target = self.joints.copy()

    def _stop(self, code: can.StopCode) -> None:
        if code == can.StopCode.STOP:
            self.status = can.ArmStatus.EMERGENCY_STOP
        elif code == can.StopCode.RESET:
            self.status = can.ArmStatus.NORMAL
            self._power(False)

    def _collect(self, frame: can.Frame, ids: tuple[int, ...], modes: tuple[can.MoveMode, ...]) -> None:
        """A target is complete with its third frame; in another mode it is not followed."""
        self._parts[frame.can_id] = frame
        if frame.can_id != ids[-1]:
            return
        parts = [self._parts.pop(i, None) for i in ids]
        found = [part for part in parts if part is not None]
        if len(found) == len(ids) and self._mode.move_mode in modes:
            self._aim(found)

    def _aim(self, parts: list[can.Frame]) -> None:
        if self.status == can.ArmStatus.EMERGENCY_STOP:
            return
        solved = True
        if parts[0].can_id in can.JOINT_IDS:
            joints = can.decode_joints(parts)
        else:
            end_pose = can.decode_end_pose(parts)
            joints = geo.joint_angles(pose_from_end_pose(end_pose, 0.0), clip=False)
            solved = np.allclose(end_pose_from_joints(joints)[:3], end_pose[:3], rtol=0, atol=_ROUNDING)
        if not solved:
            self.status = can.ArmStatus.NO_SOLUTION
        elif (joints < geo.JOINT_LOW - _ROUNDING).any() or (joints > geo.JOINT_HIGH + _ROUNDING).any():
            self.status = can.ArmStatus.BEYOND_LIMITS
        else:
            self.status, self._target = can.ArmStatus.NORMAL, joints
