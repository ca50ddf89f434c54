"""The arm as a target of tele-operation: its driver and its camera behind the twin's interface."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from rawdream_env.errors import InvalidOptionError
from rawdream_env.piper.arm.camera import MAX_AGE, CameraView, FrameSource
from rawdream_env.piper.arm.faults import PERIOD
from rawdream_env.piper.geometry import HOME_POSE
from rawdream_env.types import Float32Array, UInt8Array

if TYPE_CHECKING:
    from rawdream_env.piper.arm.driver import PiperDriver

_MARGIN = 0.01
"""Of a control step (s), left for reading the picture and for what the caller does."""


class ArmTarget:
    """An enabled arm. A reset moves it home; the person arranges the scene before the first command.

    Owns: the driver, the camera and the fake arm.

    Args:
        driver: of the arm, enabled.
        camera: gives what the policy will see, such as ``Viewed(open_camera("/dev/video0"), CameraView(64))``.
        fake: a ``FakeArmBus`` with a ``TwinArm``, on whose table a reset puts the scene; None: a real arm.
    """

    def __init__(self, driver: PiperDriver, camera: FrameSource, fake: Any = None) -> None:
        self.driver, self.camera, self.fake = driver, camera, fake
        self.sent_action: Float32Array = np.zeros(7, np.float32)

    def reset(self, seed: int, *, task: str | None = None, layout: str = "narrow") -> UInt8Array:
        """Move home; the scene is the person's."""
        if self.fake is None:
            self.driver.move_over(HOME_POSE)
        else:
            home = self.fake.arm.home(seed, task, layout)
            self.driver.move_over(home)
            self.fake.arm.begin(seed, task, layout)
            self.driver.move_to(home)
            self.driver.clock.sleep(MAX_AGE)  # frames from now on show the new scene
        return self.frame()

    def step(self, action: Float32Array) -> UInt8Array:
        """Send one action; the picture at the end of the control step. If the next action is late, the arm holds.

        Raises:
            ArmFaultError: the arm holds. StaleFrameError: the camera is frozen or gone; the arm holds.
        """
        clock = self.driver.clock
        end = clock.now() + PERIOD - (0.0 if clock.lockstep else _MARGIN)
        sent = self.driver.send_action(action, late_is_fault=False)
        self.sent_action = np.clip(sent.action, -1.0, 1.0).astype(np.float32)
        clock.sleep(end - clock.now())
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
        if self.fake is not None:
            self.fake.close()


def open_arm(channel: str, camera: str, view: CameraView, *, live: bool = True) -> ArmTarget:
    """The arm on a CAN channel, powered, and the camera that ``camera`` names.

    Args:
        channel: "can0"; "fake": the fake arm, whose camera is the twin's.
        camera: see ``open_camera``.
        view: of the camera.
        live: False: a fake arm runs in lockstep, as fast as the computer.

    Raises:
        CanBusError: there is no such bus. CameraError: there is no such camera. ArmFaultError: the arm is not ready.
        InvalidOptionError: no camera is named. MissingDependencyError: the extra ``piper`` is not installed.
    """
    from rawdream_env.piper.arm.station import Station

    fake = channel == "fake"
    if not (fake or camera):
        raise InvalidOptionError(f"target arm:{channel} needs a camera: add --camera /dev/video0.")
    station = Station(channel, camera, view, fake=fake, realtime=live)
    with ExitStack() as opened:
        opened.callback(station.close)
        station.driver.enable()
        opened.pop_all()
    return ArmTarget(station.driver, station.camera, station.bus)
