"""The fake arm on a virtual CAN bus of python-can, so that the manufacturer's SDK can drive it (extra ``piper``)."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rawdream_env.errors import MissingDependencyError
from rawdream_env.piper.arm.clock import TICK, Clock, WallClock
from rawdream_env.piper.arm.fake import FakeArm
from rawdream_env.piper.arm.frames import Frame

try:
    import can
except ModuleNotFoundError as error:
    raise MissingDependencyError("the CAN bus needs python-can: pip install 'rawdream-env[piper]'.") from error


class FakeArmBus:
    """Runs a fake arm while the context is open; a round of feedback every 5 ms, about as often as the arm.

    Owns: its end of the bus, and with the wall clock a thread. The other end, in the same process, is
    ``can.Bus(channel, interface="virtual")`` or the SDK with ``CreateCanBus(channel, bustype="virtual", judge_flag=False)``.

    Args:
        channel: name of the virtual bus.
        arm: default one at the home pose. Its attributes may be read at any time.
        clock: default real time.
        feedback: what happens to the feedback on its way: frames sent by the arm -> frames on the bus. For tests.
        commands: what happens to a command: whether it arrives. For tests.

    Attributes:
        error: what ended the arm early, or None.
    """

    def __init__(
        self,
        channel: str,
        arm: FakeArm | None = None,
        *,
        clock: Clock | None = None,
        feedback: Callable[[list[Frame]], list[Frame]] = lambda frames: frames,
        commands: Callable[[Frame], bool] = lambda frame: True,
    ) -> None:
        self.channel, self.arm, self.clock = channel, arm or FakeArm(), clock or WallClock()
        self.error: Exception | None = None
        self.feedback, self.commands = feedback, commands
        self._bus = can.Bus(channel, interface="virtual")
        self._before = self.clock.now()
        self._end: Callable[[], None] = lambda: None

    def __enter__(self) -> FakeArmBus:
        self._before = self.clock.now()
        self._end = self.clock.every(TICK, self._round, f"fake arm on {self.channel}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self.error is not None and error is None:
            raise self.error

    def close(self) -> None:
        """End the thread and this end of the bus."""
        self._end()
        self._bus.shutdown()

    def _round(self) -> None:
        if self.error is not None:
            return
        try:
            while (message := self._bus.recv(timeout=0.0)) is not None:
                frame = Frame(message.arbitration_id, bytes(message.data))
                if self.commands(frame):
                    self.arm.receive(frame)
            now = self.clock.now()
            self.arm.advance(now - self._before)
            self._before = now
            for frame in self.feedback(self.arm.feedback()):
                self._bus.send(can.Message(arbitration_id=frame.can_id, data=frame.data, is_extended_id=False))
        except Exception as error:  # noqa: BLE001 - raised where the context ends
            self.error = error
