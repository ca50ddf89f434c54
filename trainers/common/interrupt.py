"""Ctrl-C: finish the current update, save, then stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rawdream_env.processes import stopped_children

_logger = logging.getLogger(__name__)


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no update is interrupted; a second Ctrl-C interrupts as usual.

    While a child process is stopped by a signal, the first interrupts as well: what the run waits for may never come.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers only there
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)
        if stopped_children():
            raise KeyboardInterrupt
        _logger.warning("Stopping after the current update or chunk, then saving; press Ctrl-C again to stop at once.")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
