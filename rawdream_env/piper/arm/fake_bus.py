"""The fake arm on a virtual CAN bus of python-can, so that the manufacturer's SDK can drive it (extra ``piper``)."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rawdream_env.errors import MissingDependencyError
from rawdream_env.piper.arm.fake import FakeArm
from rawdream_env.piper.arm.frames import Frame

try:
    import can
except ModuleNotFoundError as error:
    raise MissingDependencyError("the CAN bus needs python-can: pip install 'rawdream-env[piper]'.") from error

_PERIOD = 0.005
"""Between two rounds of feedback (s); about that of the arm."""


class FakeArmBus:
    """Runs a fake arm in a thread while the context is open.

    Owns: its end of the bus, and the thread. The other end, in the same process, is
    ``can.Bus(channel, interface="virtual")`` or the SDK with ``CreateCanBus(channel, bustype="virtual", judge_flag=False)``.

    Args:
        channel: name of the virtual bus.
        arm: default one at the home pose. Its attributes may be read at any time.

    Attributes:
        error: what ended the thread early, or None.
    """

    def __init__(self, channel: str, arm: FakeArm | None = None) -> None:
        self.arm = arm or FakeArm()
        self.error: Exception | None = None
        self._bus = can.Bus(channel, interface="virtual")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"fake arm on {channel}", daemon=True)

    def __enter__(self) -> FakeArmBus:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=2.0)
        self._bus.shutdown()
        if self.error is not None and error is None:
            raise self.error

    def _run(self) -> None:
        try:
            before = time.monotonic()
            while not self._stop.is_set():
                message = self._bus.recv(timeout=_PERIOD)
                while message is not None:
                    self.arm.receive(Frame(message.arbitration_id, bytes(message.data)))
                    message = self._bus.recv(timeout=0.0)
                now = time.monotonic()
                self.arm.advance(now - before)
                before = now
                for frame in self.arm.feedback():
                    self._bus.send(can.Message(arbitration_id=frame.can_id, data=frame.data, is_extended_id=False))
        except Exception as error:  # noqa: BLE001 - raised where the context ends
            self.error = error
