"""A fake arm whose body, table and camera are the MuJoCo twin."""

from __future__ import annotations

import math
import threading
from copy import copy
from itertools import count
from typing import Any

import numpy as np

from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm.camera import FrameSource, NewestFrames
from rawdream_env.piper.arm.clock import Clock
from rawdream_env.piper.arm.end_pose import FloatArray
from rawdream_env.piper.arm.fake import FakeArm
from rawdream_env.piper.arm.fake_bus import FakeArmBus
from rawdream_env.piper.arm.faults import DriverConfig
from rawdream_env.piper.arm.frames import ArmStatus
from rawdream_env.piper.simulator.model import TIMESTEP
from rawdream_env.piper.simulator.renderer import PiperRenderer
from rawdream_env.piper.simulator.twin import SERVO_KNOTS, PiperTwin
from rawdream_env.types import UInt8Array

CAMERA_FPS = 30.0
"""Frame rate of the camera in real time (Hz)."""
REAL_TIME = DriverConfig(feedback_timeout=0.5, frozen_timeout=0.5, max_lag=0.1)
"""Of the driver of a fake arm in real time: it shares the computer with everything else, and is late when that is busy."""
_number = count()
_APPROACH = 1.0 / geo.CONTROL_HZ
"""Time in which the arm goes to a new target (s), in ``SERVO_KNOTS`` equal parts, as in ``PiperTwin.step``."""


class TwinArm(FakeArm):
    """The controller's side of the bus, with the twin's physics behind it.

    Args:
        twin: it must have an episode; ``begin`` starts one.

    Attributes:
        lock: held while the twin is used.
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

    def scene(self) -> Any:
        """A copy of the scene as it is now, for ``PiperRenderer.draw``: the arm moves on while it is drawn."""
        with self.lock:
            return copy(self.twin.data)

    def success(self) -> bool:
        """Whether the task of the scene is done."""
        with self.lock:
            return self.twin.success()

    def _servo(self) -> FloatArray:
        part = math.ceil(round(self._elapsed / _APPROACH * SERVO_KNOTS, 6)) / SERVO_KNOTS
        return self._from + (self._goal - self._from) * part

    def _gripper(self) -> float:
        """Gripper command of the target opening; a gripper that is sent to 0 keeps squeezing."""
        opening = self._opening_target
        return 1.0 if opening <= 0 else float(1.0 - 2.0 * (opening + 0.01) / (geo.MAX_OPENING + 0.01))

    def _measure(self) -> None:
        self.joints, self.opening = self.twin.joint_positions(), max(self.twin.gripper_opening(), 0.0)


class TwinCamera:
    """The twin's camera as a frame source, stamped by ``clock``.

    With ``fps``, ``read`` waits for the next frame of such a camera, for a thread that reads it (``NewestFrames``); without,
    it draws at once.
    """

    def __init__(self, arm: TwinArm, clock: Clock, image_size: int, fps: float | None = None) -> None:
        self.arm, self.clock, self.fps = arm, clock, fps
        self._renderer, self._due = PiperRenderer(image_size), clock.now()

    def read(self) -> tuple[UInt8Array, float]:
        """A frame, and the time when it was taken."""
        if self.fps is not None:
            self._due = max(self._due + 1.0 / self.fps, self.clock.now())
            self.clock.sleep(self._due - self.clock.now())
        scene, taken = self.arm.scene(), self.clock.now()
        return self._renderer.draw(scene), taken

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()


def open_fake_arm(clock: Clock, image_size: int, max_age: float) -> tuple[FakeArmBus, FrameSource]:
    """A fake arm on a bus of its own, whose ``arm`` is a ``TwinArm``, and its camera. In real time the camera draws in a
    thread, as a real one does, and its frames get no older than ``max_age`` (s). Close both.
    """
    arm = TwinArm(PiperTwin(render=False))
    bus = FakeArmBus(f"fake arm {next(_number)}", arm, clock=clock)
    bus.__enter__()
    if clock.lockstep:
        return bus, TwinCamera(arm, clock, image_size)
    return bus, NewestFrames(TwinCamera(arm, clock, image_size, CAMERA_FPS), max_age=max_age, repeats_are_old=False)
