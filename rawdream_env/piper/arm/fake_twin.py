"""A fake arm whose body, table and camera are the MuJoCo twin."""

from __future__ import annotations

import threading

import numpy as np

from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm.clock import Clock
from rawdream_env.piper.arm.end_pose import FloatArray
from rawdream_env.piper.arm.fake import FakeArm
from rawdream_env.piper.arm.frames import ArmStatus
from rawdream_env.piper.simulator.model import TIMESTEP
from rawdream_env.piper.simulator.twin import PiperTwin
from rawdream_env.types import UInt8Array

_APPROACH = 1.0 / geo.CONTROL_HZ
"""Time in which the arm goes to a new target, in equal steps (s); the twin's own actions do the same."""


class TwinArm(FakeArm):
    """The controller's side of the bus, with the twin's physics behind it.

    Args:
        twin: it must have an episode; ``begin`` starts one.

    Attributes:
        lock: held while the physics or the camera uses the twin.
    """

    def __init__(self, twin: PiperTwin) -> None:
        super().__init__()
        self.twin, self.lock = twin, threading.Lock()
        self.begin(0, None, "narrow")

    def home(self, seed: int, task: str | None, layout: str) -> FloatArray:
        """Commanded pose (7,) at which the episode of ``PiperTwin.reset`` begins. The scene stays as it is."""
        with self.lock:
            state = self.twin.state()
            self.twin.reset(seed, task=task, layout=layout)
            pose = self.twin.pose.copy()
            self.twin.restore(state)
            return pose

    def begin(self, seed: int, task: str | None, layout: str) -> None:
        """Put the scene of ``PiperTwin.reset`` on the table, and the arm at its beginning."""
        with self.lock:
            self.twin.reset(seed, task=task, layout=layout)
            pose = self.twin.pose
            self._from = self._goal = self._target = geo.joint_angles(pose)
            self._elapsed, self._substeps = _APPROACH, 0.0
            self._opening_target = float(geo.finger_opening(pose[6]))
            self._measure()

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        seconds = round(seconds, 9)  # differences of times: their rounding must not tell one episode from the next
        with self.lock:
            if not np.array_equal(self._target, self._goal):
                self._from, self._goal, self._elapsed = self._servo(), self._target, 0.0
            if self.enabled and self._mode.can_control and self.status != ArmStatus.EMERGENCY_STOP:
                self._elapsed = min(self._elapsed + seconds, _APPROACH)
            self._substeps += seconds / TIMESTEP
            whole = int(self._substeps + 1e-6)
            self._substeps -= whole
            if whole:
                self.twin.drive(self._servo(), self._gripper(), whole)
                self._measure()

    def frame(self) -> UInt8Array:
        """What the camera sees, uint8 (H, W, 3)."""
        with self.lock:
            return self.twin.frame()

    def success(self) -> bool:
        """Whether the task of the scene is done."""
        with self.lock:
            return self.twin.success()

    def _servo(self) -> FloatArray:
        return self._from + (self._goal - self._from) * (self._elapsed / _APPROACH)

    def _gripper(self) -> float:
        """Gripper command of the target opening; a gripper that is sent to 0 keeps squeezing."""
        opening = self._opening_target
        return 1.0 if opening <= 0 else float(1.0 - 2.0 * (opening + 0.01) / (geo.MAX_OPENING + 0.01))

    def _measure(self) -> None:
        self.joints, self.opening = self.twin.joint_positions(), max(self.twin.gripper_opening(), 0.0)


class TwinCamera:
    """The twin's camera as a frame source, stamped by ``clock``."""

    def __init__(self, arm: TwinArm, clock: Clock) -> None:
        self.arm, self.clock = arm, clock

    def read(self) -> tuple[UInt8Array, float]:
        """The frame now, and its time."""
        return self.arm.frame(), self.clock.now()

    def close(self) -> None:
        """Free the renderer."""
        self.arm.twin.close()
