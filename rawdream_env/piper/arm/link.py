"""The manufacturer's SDK on a CAN channel, with a check on every frame that leaves and a time on every frame that comes.

The SDK alone is not enough: it only logs a send that failed, joins halves of two different poses, has no age for what it
returns, and would let anybody send the reset that drops the arm. Here the SDK opens the bus and encodes commands; what it
is about to send passes ``PiperLink``, and feedback is decoded from whole groups of frames.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import CanBusError, CanFrameError, MissingDependencyError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm import frames as fr
from rawdream_env.piper.arm.end_pose import FloatArray, end_pose_from_pose
from rawdream_env.piper.arm.guard import Guarded

try:
    import can
    from piper_sdk import C_PiperInterface_V2
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "the arm needs piper_sdk and python-can: pip install 'rawdream-env[piper]'."
    ) from error

_NEVER = float("-inf")
_LOSS_WINDOW = 300
"""Frames over which losses are counted: a quarter of a second of pose and joint feedback at 200 Hz."""
_BUS_OFF = 0x40
"""Bit of an error frame's identifier: the controller has left the bus."""
_EFFORT = 1.0
"""Of the gripper (N m)."""


@dataclass
class Feedback:
    """The last complete feedback. Times are those of the clock, ``-inf`` before the first.

    ``end_pose`` (6,) flange xyz (m), roll, pitch, yaw (rad); ``joints`` (6,) rad; ``opening`` of the gripper (m); ``status``
    as in ``frames.ArmStatus``; ``motors`` (6,) whether each is on; ``jump``: the largest change of a joint between two
    successive feedbacks beyond what the arm can do in that time (rad), since connecting; ``changed_at``: when joints last
    differed from those before; ``loss``: share of pose and joint frames that were missing lately.
    """

    end_pose: FloatArray = field(default_factory=lambda: np.full(6, np.nan))
    joints: FloatArray = field(default_factory=lambda: np.full(6, np.nan))
    opening: float = float("nan")
    status: int = int(fr.ArmStatus.NORMAL)
    motors: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(6, np.bool_))
    end_pose_at: float = _NEVER
    joints_at: float = _NEVER
    status_at: float = _NEVER
    gripper_at: float = _NEVER
    motors_at: FloatArray = field(default_factory=lambda: np.full(6, _NEVER))
    changed_at: float = _NEVER
    jump: float = 0.0
    loss: float = 0.0

    @property
    def complete_at(self) -> float:
        """Age limit of the whole: when its oldest part arrived."""
        return float(min(self.end_pose_at, self.joints_at, self.status_at, self.gripper_at))


class PiperLink:
    """One arm on one CAN channel. Not for several threads at once.

    Owns: the SDK's end of the bus.

    Args:
        channel: "can0", or the name of a virtual bus.
        interface: of python-can: "socketcan", "virtual", ...
        max_joint_speed: that the arm can have (rad/s); joints that change faster have jumped.

    Raises:
        CanBusError: the bus cannot be opened, or another link has it, in whichever process.
    """

    def __init__(self, channel: str, interface: str = "socketcan", max_joint_speed: float = 3.0) -> None:
        self.channel, self.feedback = channel, Feedback()
        self._max_joint_speed = max_joint_speed
        self._allowed: dict[int, bytes] = {}
        self._parts: dict[tuple[int, ...], list[fr.Frame]] = {}
        self._next: dict[tuple[int, ...], int] = {}
        self._losses: deque[int] = deque(maxlen=_LOSS_WINDOW)
        self._claim = _claim(channel, interface)
        self._sdk: Any = C_PiperInterface_V2(channel, judge_flag=False, can_auto_init=False)
        try:
            self._sdk.CreateCanBus(channel, bustype=interface, judge_flag=False)
        except Exception as error:  # the SDK raises ConnectionError, adapters their own errors
            self._claim.close()
            raise self._failed(f"cannot be opened ({error})") from error
        self._bus: Any = self._sdk.GetCanBus()
        if self._bus.recv_bus is None or self._bus.send_bus is None:
            self._claim.close()
            raise self._failed("cannot be opened")
        self._bus.send_bus.shutdown()  # nobody reads what it receives: on a virtual bus that piles up
        self._bus.send_bus = self._bus.recv_bus
        self._send_unchecked = self._bus.SendCanMessage
        self._bus.SendCanMessage = self._send

    # ---- commands ------------------------------------------------------------------------------------------------------

    def enable(self) -> None:
        """Ask for power on all motors. The read-back is ``feedback.motors``."""
        self._sdk.EnableArm(7)

    def stop(self) -> None:
        """The arm's emergency stop: it sinks slowly."""
        self._sdk.EmergencyStop(0x01)

    def send_target(self, target: Guarded, speed_percent: int) -> None:
        """Send one allowed target of the guard, no other: the mode, which the arm needs again each time, pose and gripper.

        Raises:
            CanBusError: a frame could not be sent.
        """
        if target.pose.shape != (7,) or not target.allowed:
            raise CanFrameError(f"target {target.pose} is not one pose that the guard allows; nothing was sent.")
        end_pose = fr.encode_end_pose(end_pose_from_pose(target.pose))
        gripper = fr.Gripper(float(geo.finger_opening(target.pose[6])), _EFFORT, fr.GripperCode.ENABLE)
        mode = fr.encode_mode(fr.Mode(True, fr.MoveMode.POSE, speed_percent))
        allowed = (mode, *end_pose, fr.encode_gripper(gripper))
        self._allowed = {frame.can_id: frame.data for frame in allowed}
        self._sdk.MotionCtrl_2(0x01, int(fr.MoveMode.POSE), speed_percent)
        self._sdk.EndPoseCtrl(*_whole(b"".join(frame.data for frame in end_pose), 4))
        opening_um = _whole(allowed[-1].data[:4], 4)[0]
        self._sdk.GripperCtrl(opening_um, round(_EFFORT * 1e3), int(fr.GripperCode.ENABLE), 0)

    def _send(self, can_id: int, data: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """The one door to the bus, for the SDK as well: targets as the guard allowed them, power on, stop; nothing else."""
        frame = fr.Frame(int(can_id), bytes(data))
        power_on = can_id == fr.POWER_ID and fr.decode_power(frame)
        stop = can_id == fr.STOP_ID and fr.decode_stop(frame) == fr.StopCode.STOP
        if not (power_on or stop or self._allowed.get(frame.can_id) == frame.data):
            raise CanFrameError(
                f"frame 0x{frame.can_id:X} {frame.data.hex()} has not passed the guard; it was not sent."
            )
        status = self._send_unchecked(can_id, data, *args, **kwargs)
        if status is not self._bus.CAN_STATUS.SEND_MESSAGE_SUCCESS:
            raise self._failed(f"does not take frame 0x{frame.can_id:X} ({getattr(status, 'name', status)})")
        return status

    # ---- feedback ------------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> None:
        """Take all frames that have arrived, with ``now`` as their time.

        Raises:
            CanBusError: the bus is off, down or gone.
        """
        while True:
            try:
                message = self._bus.recv_bus.recv(timeout=0.0)
            except (can.CanError, OSError, AttributeError, ValueError) as error:
                raise self._failed(f"cannot be read ({error})") from error
            if message is None:
                return
            if message.is_error_frame:
                if message.arbitration_id & _BUS_OFF:
                    raise self._failed("is off: the controller saw too many errors")
            elif not message.is_extended_id and message.dlc == 8:
                self._take(fr.Frame(message.arbitration_id, bytes(message.data)), now)

    def forget_problems(self) -> None:
        """Count jumps and losses anew."""
        self._losses.clear()
        self.feedback.jump = self.feedback.loss = 0.0

    def _take(self, frame: fr.Frame, now: float) -> None:
        f, i = self.feedback, frame.can_id
        if i == fr.FEEDBACK_STATUS_ID:
            f.status, f.status_at = fr.decode_status(frame), now
        elif i == fr.FEEDBACK_GRIPPER_ID:
            f.opening, f.gripper_at = fr.decode_gripper(frame).opening, now
        elif i in fr.FEEDBACK_MOTOR_IDS:
            motor, f.motors[fr.FEEDBACK_MOTOR_IDS.index(i)] = fr.decode_motor_enabled(frame)
            f.motors_at[motor] = now
        elif i in fr.FEEDBACK_END_POSE_IDS:
            if parts := self._complete(frame, fr.FEEDBACK_END_POSE_IDS):
                f.end_pose, f.end_pose_at = fr.decode_end_pose(parts), now
        elif i in fr.FEEDBACK_JOINT_IDS and (parts := self._complete(frame, fr.FEEDBACK_JOINT_IDS)):
            self._take_joints(fr.decode_joints(parts), now)

    def _take_joints(self, joints: FloatArray, now: float) -> None:
        f = self.feedback
        if f.joints_at > _NEVER:
            change = float(np.abs(joints - f.joints).max())
            f.jump = max(f.jump, change - 2 * self._max_joint_speed * (now - f.joints_at))
            f.changed_at = now if change > 0 else f.changed_at
        else:
            f.changed_at = now
        f.joints, f.joints_at = joints, now

    def _complete(self, frame: fr.Frame, ids: tuple[int, ...]) -> list[fr.Frame]:
        """The group that ``frame`` completes, or nothing. Frames of a group come in order; gaps are losses."""
        index = ids.index(frame.can_id)
        parts = self._parts.setdefault(ids, [])
        missing = (index - self._next.get(ids, index)) % len(ids)
        self._next[ids] = (index + 1) % len(ids)
        self._losses.extend([1] * missing + [0])
        self.feedback.loss = sum(self._losses) / _LOSS_WINDOW
        if missing or index == 0:
            parts.clear()
        if len(parts) == index:
            parts.append(frame)
        return list(parts) if len(parts) == len(ids) else []

    def _failed(self, what: str) -> CanBusError:
        return CanBusError(
            f"CAN bus {self.channel} {what}. Check cable, power and `ip -details link show {self.channel}`."
        )

    def close(self) -> None:
        """Let go of the bus. The arm stays where it was sent last."""
        self._bus.Close()
        self._bus.SendCanMessage = self._send_unchecked
        self._claim.close()


def _claim(channel: str, interface: str) -> socket.socket:
    """What this process holds while it drives an arm: two drivers on one bus would pull it to and fro. A name of the kernel,
    so that it is free again however the process ends.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if sys.platform == "linux":
        process = f" of {os.getpid()}" if interface == "virtual" else ""  # has virtual buses of its own
        try:
            claim.bind(f"\0rawdream-env {interface} {channel}{process}")
        except OSError as error:
            claim.close()
            if error.errno == errno.EADDRINUSE:
                raise CanBusError(
                    f"the arm on CAN bus {channel} is driven already: close the other environment, or end its process."
                ) from error
            raise CanBusError(f"CAN bus {channel} cannot be claimed ({error}).") from error
    return claim


def _whole(data: bytes, size: int) -> list[int]:
    """Big-endian signed integers of ``size`` bytes."""
    return [int.from_bytes(data[k : k + size], "big", signed=True) for k in range(0, len(data), size)]
