"""Child processes: Ctrl-C is for the parent alone, and no child outlives its parent, whatever ended it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import connection, resource_tracker, spawn
from pathlib import Path
from typing import Any, TypeVar

from rawdream_env.errors import WorkerStoppedError

T = TypeVar("T")

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")
_TIED = "import ctypes, os; ctypes.CDLL(None).prctl({option}, {signal}); os.getppid() == {parent} or os._exit(1); "
_PR_SET_PDEATHSIG = 1
_WATCH_S = 0.5
_GRACE_S = 10.0
PATIENCE_S = 300.0
"""How long a worker of a pool may show no sign of life."""


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
    Ctrl-C in the meantime reaches the parent at the end of the block. On Linux the kernel kills the children with the parent,
    stopped or not, if the block runs in the main thread.
    """
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    if os.name == "posix":
        resource_tracker.ensure_running()  # it unblocks SIGINT when it starts, so it must run before
    try:
        with interrupts_held(), _tied_to_this_process():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _tied_to_this_process() -> Iterator[None]:
    """Children of ``multiprocessing`` begin, before any import of their own, by asking Linux to kill them with this process.

    The request is for the end of the *thread* that starts them, so it is made in the main thread alone. A child that is
    stopped before its interpreter runs (a few hundredths of a second) has not made it and can outlive a killed parent.
    """
    plain = spawn.get_command_line
    thread, main = threading.current_thread(), threading.main_thread()

    def command_line(**options: Any) -> list[str]:
        line: list[str] = plain(**options)
        if "-c" in line and threading.current_thread() is thread:
            program = line.index("-c") + 1
            line[program] = (
                _TIED.format(option=_PR_SET_PDEATHSIG, signal=int(signal.SIGKILL), parent=os.getpid()) + line[program]
            )
        return line

    if sys.platform == "linux" and thread is main:
        spawn.get_command_line = command_line
    try:
        yield
    finally:
        spawn.get_command_line = plain


def follow_parent(pulse: Callable[[], None] = lambda: None) -> None:
    """Call first in a child process of ``multiprocessing``: it ignores Ctrl-C and ends when its parent does.

    A thread watches the parent and ends this process within half a second; it calls ``pulse`` each time. What Linux does
    without it, also for a stopped child, is in ``starting_children``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        # Another child of the parent may hold the sentinel's pipe open, so look at the process id as well.
        while os.name != "posix" or os.getppid() == parent.pid:
            pulse()
            if connection.wait([parent.sentinel], _WATCH_S):
                break
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def stopped_children() -> list[int]:
    """Process ids of the children of ``multiprocessing`` that a signal has stopped, where Linux tells them: they answer no
    call.
    """
    pids = [child.pid for child in multiprocessing.active_children()]
    return [pid for pid in pids if pid is not None and _state(pid) == "T"]


def _state(pid: int | None) -> str:
    """State letter of a process, "" where Linux does not tell it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


class WorkerPool:
    """Spawned processes for submitted calls. They never see Ctrl-C and end with this process.

    Each counts up twice a second (and Linux tells the processor time of one that still starts on a busy machine). One that
    shows no such sign of life for ``PATIENCE_S`` while the caller waits is stopped or stuck: the wait ends with an error that
    names it. A long call alone is no reason.

    Args:
        workers: number of processes, started as they are needed.
        initializer, arguments: called first in each process.
    """

    def __init__(
        self,
        workers: int,
        initializer: Callable[..., None] | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        context = multiprocessing.get_context(
            "spawn"
        )  # a forked OpenGL context or thread pool does not work in the child
        self._pids, self._beats = context.RawArray("q", workers), context.RawArray("q", workers)
        self._silent: dict[int, tuple[Any, float]] = {}  # process id -> (sign of life, for how many seconds the same)
        self._looked = time.monotonic()
        begin = (context.Value("i", 0), self._pids, self._beats, initializer, arguments)
        self._pool = ProcessPoolExecutor(workers, context, _begin_worker, begin)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call ``function`` in one of the processes."""
        with starting_children():
            return self._pool.submit(function, *arguments)

    def wait(self, running: Iterable[Future[T]]) -> tuple[set[Future[T]], set[Future[T]]]:
        """Wait for half a second at most; returns the calls that are done and the others.

        Raises:
            WorkerStoppedError: a worker shows no sign of life.
        """
        done, others = wait(running, _WATCH_S, FIRST_COMPLETED)
        now = time.monotonic()
        if others:
            self._look(
                min(now - self._looked, 2 * _WATCH_S)
            )  # time in which this process is stopped (Ctrl-Z) hardly counts
        self._looked = now
        return done, others

    def result(self, call: Future[T]) -> T:
        """The result of a call; errors as ``wait``."""
        while not call.done():
            self.wait([call])
        return call.result()

    def _look(self, seconds: float) -> None:
        """Count ``seconds`` for every worker that has not moved since the last look."""
        beats = dict(zip(self._pids, self._beats, strict=True))
        for number, pid in enumerate(list(self._pool._processes or {})):
            sign = beats.get(pid, 0), _processor_time(pid)
            before, silent = self._silent.get(pid, (None, 0.0))
            silent = silent + seconds if sign == before else 0.0
            self._silent[pid] = sign, silent
            if silent > PATIENCE_S:
                raise WorkerStoppedError(
                    f"worker {number} (process {pid}) has shown no sign of life for {silent:.0f} s, so all workers were "
                    "ended. It was stopped or is stuck; finished work is kept, rerun the same command to resume."
                )

    def close(self) -> None:
        """End the processes: they have ten seconds to finish the calls under way, then they are killed; stopped ones at once,
        which ends the others as well.

        ``ProcessPoolExecutor.shutdown`` alone waits without limit for a process that is stopped or stuck.
        """
        processes = list((self._pool._processes or {}).values())
        manager: Any = self._pool._executor_manager_thread
        try:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                if _state(process.pid) == "T":
                    process.kill()
            if manager is not None:
                manager.join(_GRACE_S)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()


def _processor_time(pid: int) -> str:
    """What the main thread of a process has used, where Linux tells it; else ""."""
    try:
        return Path(f"/proc/{pid}/schedstat").read_text().split()[0]
    except (OSError, IndexError):
        return ""


def _begin_worker(
    count: Any, pids: Any, beats: Any, initializer: Callable[..., None] | None, arguments: tuple[Any, ...]
) -> None:
    with count.get_lock():
        number = count.value
        count.value += 1
    pids[number] = os.getpid()

    def pulse() -> None:
        beats[number] += 1

    follow_parent(pulse)
    if initializer is not None:
        initializer(*arguments)
