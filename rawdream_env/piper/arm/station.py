"""An arm and its camera, opened together: real ones, or the fake arm with the twin's camera (extra ``piper``)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from rawdream_env.piper.arm.camera import MAX_AGE, CameraView, FrameSource, Viewed, open_camera
from rawdream_env.piper.arm.clock import Clock, LockstepClock, WallClock
from rawdream_env.piper.arm.driver import PiperDriver
from rawdream_env.piper.arm.faults import DriverConfig
from rawdream_env.piper.arm.link import PiperLink

if TYPE_CHECKING:
    from rawdream_env.piper.arm.guard import Limits


class Station:
    """Owns: the driver, the camera and, where they are fake, the bus and the arm behind it.

    Args:
        channel: of the CAN bus; not used with ``fake``.
        camera: a name for ``open_camera``, whose frames are seen through ``view``, or a frame source; not used with ``fake``.
        view: of a named camera; its size is that of a fake one.
        fake: the twin instead of arm and camera.
        realtime: a fake arm in real time, in a thread; otherwise in lockstep.
        max_age: of a frame (s).
        limits: of the guard.
        config: of the driver.

    Attributes:
        bus: the ``FakeArmBus`` of a fake arm, whose ``arm`` is a ``TwinArm``; None without.

    Raises:
        CanBusError: there is no such bus. CameraError: there is no such camera.
    """

    def __init__(
        self,
        channel: str,
        camera: str | FrameSource,
        view: CameraView,
        *,
        fake: bool,
        realtime: bool,
        max_age: float = MAX_AGE,
        limits: Limits | None = None,
        config: DriverConfig | None = None,
    ) -> None:
        self.clock: Clock = WallClock() if realtime or not fake else LockstepClock()
        self.bus: Any = None
        with ExitStack() as opened:
            if fake:
                from rawdream_env.piper.arm.fake_twin import REAL_TIME, open_fake_arm

                self.bus, camera = open_fake_arm(self.clock, view.size, max_age)
                opened.callback(self.bus.close)
                opened.callback(camera.close)
                channel, config = self.bus.channel, config or (REAL_TIME if realtime else None)
            elif isinstance(camera, str):
                camera = Viewed(open_camera(camera, max_age=max_age), view)
                opened.callback(camera.close)
            self.camera: FrameSource = camera
            link = PiperLink(channel, "virtual" if fake else "socketcan")
            self.driver = PiperDriver(link, clock=self.clock, limits=limits, config=config)
            opened.pop_all()

    def close(self) -> None:
        """Hold, and let go of bus and camera."""
        with ExitStack() as closing:  # each of them, whatever the others raise
            if self.bus is not None:
                closing.callback(self.bus.close)
            closing.callback(self.camera.close)
            closing.callback(self.driver.close)
