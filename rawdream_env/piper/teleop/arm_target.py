"""The real arm as a target of tele-operation: its driver and its camera behind the twin's interface."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from rawdream_env.piper.arm.camera import FrameSource
from rawdream_env.piper.geometry import CONTROL_HZ, HOME_POSE, FloatArray
from rawdream_env.types import Float32Array, UInt8Array

_MARGIN = 0.01
"""Of a control step (s), left for reading the picture and for what the caller does."""


class Driver(Protocol):
    """What a target needs of an arm's driver. It holds the arm between actions, and guards them."""

    @property
    def pose(self) -> FloatArray:
        """The commanded pose (7,)."""
        ...

    def send_action(self, action: ArrayLike) -> Any:
        """Move by one action; returns what was really sent, with its ``action`` (7,)."""
        ...

    def move_to(self, pose: ArrayLike) -> None:
        """Move to a pose (7,) and wait."""
        ...

    def hold(self) -> None:
        """No action comes for a while."""
        ...

    def close(self) -> None:
        """Let go of the arm."""
        ...


class ArmTarget:
    """An enabled arm. A reset moves it home; the person arranges the scene before the first command.

    Owns: the driver and the camera.

    Args:
        driver: of the arm, enabled.
        camera: gives what the policy will see, such as ``Viewed(open_camera("/dev/video0"), CameraView(64))``.
        now: seconds, and ``sleep``: those of the driver's clock, where that is not real time.
    """

    def __init__(
        self,
        driver: Driver,
        camera: FrameSource,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.driver, self.camera = driver, camera
        self._now, self._sleep = now, sleep
        self.sent_action: Float32Array = np.zeros(7, np.float32)

    def reset(self, seed: int, *, task: str | None = None, layout: str = "narrow") -> UInt8Array:
        """Move home; the scene is the person's."""
        self.driver.move_to(HOME_POSE)
        self.driver.hold()
        return self.frame()

    def step(self, action: Float32Array) -> UInt8Array:
        """Send one action; the picture at the end of the control step.

        Raises:
            ArmFaultError: the arm holds. StaleFrameError: the camera is frozen or gone; the arm holds.
        """
        begin = self._now()
        sent = self.driver.send_action(action)
        self.sent_action = np.clip(sent.action, -1.0, 1.0).astype(np.float32)
        self._sleep(max(0.0, begin + 1.0 / CONTROL_HZ - _MARGIN - self._now()))
        return self.frame()

    def frame(self) -> UInt8Array:
        """The camera's newest picture."""
        try:
            return self.camera.read()[0]
        except BaseException:
            self.driver.hold()
            raise

    def proprio(self) -> Float32Array:
        """The commanded pose (7,)."""
        return self.driver.pose.astype(np.float32)

    def hold(self) -> None:
        """Stay where it is until the next action."""
        self.driver.hold()

    def close(self) -> None:
        """Let go of arm and camera."""
        self.driver.close()
        self.camera.close()
