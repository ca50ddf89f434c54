"""Two clocks with one interface: real time, and lockstep time for a fake arm.

In lockstep nothing runs beside the caller. Time passes in ``sleep`` alone, which calls what is due, in order. A test or a
fake episode is then exact to the tick, the same every time, and as fast as the computer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

TICK = 0.005
"""Shortest period of anything (s)."""


class Clock(Protocol):
    """Time, and calls at regular times."""

    lockstep: bool

    def now(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        ...

    def every(self, period: float, call: Callable[[], None], name: str) -> Callable[[], None]:
        """Call ``call`` every ``period`` seconds from now on. Returns the function that ends this."""
        ...


class WallClock:
    """Real time; every regular call has a thread of its own. A call that raises ends its thread."""

    lockstep = False

    def now(self) -> float:
        """Seconds of the monotonic clock, as ``time.monotonic``."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        if seconds > 0:
            time.sleep(seconds)

    def every(self, period: float, call: Callable[[], None], name: str) -> Callable[[], None]:
        """Call in a thread; late calls are not made up for. The function returned waits for a call that is running."""
        stop = threading.Event()

        def run() -> None:
            due = time.monotonic()
            while not stop.is_set():
                call()
                due = max(due + period, time.monotonic())
                stop.wait(max(due - time.monotonic(), 0.0005))  # let others run, even when late

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()

        def end() -> None:
            stop.set()
            if thread is not threading.current_thread():
                thread.join(timeout=2.0)

        return end


class LockstepClock:
    """Time that stands still except in ``sleep``."""

    lockstep = True

    def __init__(self) -> None:
        self._ticks = 0
        self._calls: list[tuple[int, Callable[[], None]]] = []

    def now(self) -> float:
        """Seconds slept so far."""
        return self._ticks * TICK

    def sleep(self, seconds: float) -> None:
        """Pass whole ticks, and make the calls that are due at each, in the order in which they were asked for."""
        for _ in range(round(seconds / TICK)):
            self._ticks += 1
            for period, call in list(self._calls):
                if self._ticks % period == 0:
                    call()

    def every(self, period: float, call: Callable[[], None], name: str) -> Callable[[], None]:
        """Call at multiples of ``period``, a whole number of ticks."""
        entry = (max(round(period / TICK), 1), call)
        self._calls.append(entry)
        return lambda: self._calls.remove(entry) if entry in self._calls else None
