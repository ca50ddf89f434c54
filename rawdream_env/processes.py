"""Child processes: Ctrl-C is for the parent alone, and no child outlives its parent, whatever ended it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, resource_tracker
from typing import Any

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")
_PR_SET_PDEATHSIG = 1
_WATCH_S = 0.5
_GRACE_S = 10.0


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """A Ctrl-C inside the block reaches this thread at the end of the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def starting_children() -> Iterator[None]:
    """Start child processes inside: each computes with one thread and never sees Ctrl-C.

    SIGINT is blocked while they start, because a child inherits the mask: it is protected from its first instruction on. A
    Ctrl-C in the meantime reaches the parent at the end of the block.
    """
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    if os.name == "posix":
        resource_tracker.ensure_running()  # it unblocks SIGINT when it starts, so it must run before
    try:
        with interrupts_held():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def in_main_thread() -> bool:
    """Whether the caller runs in the main thread of its process."""
    return threading.current_thread() is threading.main_thread()


def follow_parent(from_main_thread: bool = False) -> None:
    """Call first in a child process of ``multiprocessing``: it ignores Ctrl-C and ends when its parent does.

    A thread watches the parent and ends this process within half a second. With ``from_main_thread`` (the parent started it
    there) the Linux kernel kills it as well, even while it is stopped. That signal is sent when the thread ends which started
    the child, so it is no use to a child that another thread started.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        # Another child of the parent may hold the sentinel's pipe open, so look at the process id as well.
        while os.name != "posix" or os.getppid() == parent.pid:
            if connection.wait([parent.sentinel], _WATCH_S):
                break
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()
    if from_main_thread and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_pool(pool: ProcessPoolExecutor) -> None:
    """Shut a pool down: its processes have ten seconds to finish the pieces under way, then they are killed.

    ``ProcessPoolExecutor.shutdown`` alone waits without limit for a process that is stopped or stuck.
    """
    processes = list((pool._processes or {}).values())
    manager: Any = pool._executor_manager_thread
    try:
        pool.shutdown(wait=False, cancel_futures=True)
        if manager is not None:
            manager.join(_GRACE_S)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
