"""Piper's master arm: a second arm, moved by hand, whose CAN frames say where the first one should go.

In the manufacturer's master mode an arm without power in its joints sends its own joint angles and gripper as *command*
frames. Here they are read, and the arm or its twin follows by actions, so that it stays inside the limits of actions and
workspace, and the data set holds what was asked of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from rawdream_env.errors import InvalidOptionError, MissingDependencyError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm import frames as can_frames
from rawdream_env.piper.arm.end_pose import end_pose_from_joints, pose_from_end_pose
from rawdream_env.piper.geometry import FloatArray
from rawdream_env.piper.teleop.controls import GRIPPER, Command, Operator, hold

MAX_AGE = 0.3
"""A master arm that has been silent for this long (s) is not followed; the arm holds."""


class FrameReceiver(Protocol):
    """The receiving end of a CAN bus."""

    def receive(self) -> can_frames.Frame | None:
        """The next waiting frame, or None; does not wait."""
        ...

    def close(self) -> None:
        """Leave the bus."""
        ...


class CanReceiver:
    """A bus of python-can (extra ``piper``).

    Raises:
        MissingDependencyError: python-can is not installed. InvalidOptionError: there is no such bus.
    """

    def __init__(self, channel: str, interface: str = "socketcan") -> None:
        try:
            import can
        except ModuleNotFoundError as error:
            raise MissingDependencyError("the CAN bus needs python-can: pip install 'rawdream-env[piper]'.") from error
        try:
            self._bus: Any = can.Bus(channel, interface=interface)
        except (OSError, can.CanError) as error:
            raise InvalidOptionError(
                f"CAN bus {channel} cannot be opened ({error}). Plug the adapter in, then: "
                f"sudo ip link set {channel} up type can bitrate 1000000."
            ) from error

    def receive(self) -> can_frames.Frame | None:
        """See :class:`FrameReceiver`."""
        message = self._bus.recv(timeout=0.0)
        return None if message is None else can_frames.Frame(message.arbitration_id, bytes(message.data))

    def close(self) -> None:
        """See :class:`FrameReceiver`."""
        self._bus.shutdown()


class MasterArm:
    """Follows a master arm at no more than full speed; the keys of ``keys`` end episodes, and do not move the arm.

    Args:
        bus: where the master arm sends.
        keys: another operator, for its events.
        clock: seconds, for tests.
    """

    def __init__(self, bus: FrameReceiver, keys: Operator, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.bus, self.keys, self.clock = bus, keys, clock
        self.gripper = -1.0
        self._parts: dict[int, can_frames.Frame] = {}
        self._pose: FloatArray | None = None
        self._received = -np.inf

    def command(self, pose: FloatArray) -> Command:
        """See :class:`controls.Operator`.

        Raises:
            CanFrameError: a command frame on the bus is not one of an arm.
        """
        while (frame := self.bus.receive()) is not None:
            self._take(frame)
        action = hold(pose)
        if self._pose is not None and self.clock() - self._received <= MAX_AGE:
            action[:6] = np.clip(geo.action_between(pose, self._pose)[:6], -1.0, 1.0)
            action[GRIPPER] = self.gripper
        return Command(action, self.keys.command(pose).event)

    def close(self) -> None:
        """Close the bus and the keys."""
        self.bus.close()
        self.keys.close()

    def _take(self, frame: can_frames.Frame) -> None:
        if frame.can_id == can_frames.GRIPPER_ID:
            self.gripper = gripper_command(can_frames.decode_gripper(frame).opening)
        elif frame.can_id in can_frames.JOINT_IDS:
            self._parts[frame.can_id] = frame
            if frame.can_id == can_frames.JOINT_IDS[-1]:
                parts, self._parts = self._parts, {}
                if len(parts) == len(can_frames.JOINT_IDS):  # else one was lost
                    joints = can_frames.decode_joints([parts[i] for i in can_frames.JOINT_IDS])
                    self._pose, self._received = pose_from_end_pose(end_pose_from_joints(joints), 0.0), self.clock()


def gripper_command(opening: float) -> float:
    """The gripper command in [-1, 1] that asks for a distance (m) between the fingers: inverse of ``finger_opening``."""
    low, high = -0.01, geo.MAX_OPENING
    return float(np.clip(1.0 - 2.0 * (opening - low) / (high - low), -1.0, 1.0))
