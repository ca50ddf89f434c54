"""Process numbered pieces of work in this process or in several, interruptible and with progress counts."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from multiprocessing.util import Finalize
from typing import Any, Protocol

from rawdream_env.processes import WorkerPool


class Worker(Protocol):
    """Processes one piece of work after the other; created once per process."""

    def __call__(self, piece: int, tick: Callable[[], None], stopped: Callable[[], bool]) -> None:
        """Process ``piece``: call ``tick`` after every small step, and return early when ``stopped()`` is true."""
        ...

    def close(self) -> None:
        """Free the worker's resources."""
        ...


WorkerFactory = Callable[[], Worker]


def run_pieces(
    pieces: Sequence[int], factory: WorkerFactory, *, workers: int, count: Callable[[int], Any]
) -> Iterator[int]:
    """Process all pieces; after each one, yield the number of finished pieces.

    Args:
        pieces: numbers of the pieces, started in this order.
        factory: creates a ``Worker``; must be picklable when ``workers`` > 0.
        workers: number of processes; 0 works in this process.
        count: called periodically with the number of ticks since the last call.

    Raises:
        BrokenProcessPool: a process died. WorkerStoppedError: one is stopped or stuck. Other errors of a worker are raised
            unchanged.

    When the caller is interrupted or closes the iterator, workers return the next time they check ``stopped``. A worker that
    does not return within seconds is killed.
    """
    if not pieces:
        return
    yield from _run_here(pieces, factory, count) if workers == 0 else _run_processes(pieces, factory, workers, count)


def _run_here(pieces: Sequence[int], factory: WorkerFactory, count: Callable[[int], Any]) -> Iterator[int]:
    worker = factory()
    try:
        for finished, piece in enumerate(pieces, start=1):
            worker(piece, lambda: count(1), lambda: False)
            yield finished
    finally:
        worker.close()


def _run_processes(
    pieces: Sequence[int], factory: WorkerFactory, workers: int, count: Callable[[int], Any]
) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    stop, ticks = context.RawValue("b", 0), context.Value("q", 0)  # no lock on stop: a killed worker might hold it
    pool = WorkerPool(min(workers, len(pieces)), _start_process, (factory, stop, ticks))
    try:
        running: set[Future[None]] = {pool.submit(_do_piece, piece) for piece in pieces}
        finished = shown = 0
        while running:
            ready, running = pool.wait(running)
            now = ticks.get_obj().value  # without the lock, which a killed worker may hold
            count(now - shown)
            shown = now
            for future in ready:
                future.result()
                finished += 1
                yield finished
    finally:
        stop.value = 1
        pool.close()


# One per worker process, set by _start_process.
_PROCESS: dict[str, Any] = {}


def _start_process(factory: WorkerFactory, stop: Any, ticks: Any) -> None:
    _PROCESS.update(factory=factory, stop=stop, ticks=ticks)


def _do_piece(piece: int) -> None:
    if "worker" not in _PROCESS:  # not in _start_process, so that an error such as "no renderer" reaches the user
        worker = _PROCESS["worker"] = _PROCESS["factory"]()
        Finalize(None, worker.close, exitpriority=10)  # an OpenGL context left open complains when the process ends

    def tick() -> None:
        with _PROCESS["ticks"].get_lock():
            _PROCESS["ticks"].value += 1

    _PROCESS["worker"](piece, tick, lambda: bool(_PROCESS["stop"].value))
