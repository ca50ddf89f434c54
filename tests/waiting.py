"""Waits for events with deadlines that no machine is too slow for."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait until ``condition`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited for {seconds:g} s"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a killed child has ended: freeing its memory takes a while."""
    multiprocessing.active_children()  # collects those that have ended
    return not os.path.exists(f"/proc/{pid}")
