"""Process numbered pieces of work in this process or in several, interruptible and with progress counts."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.util import Finalize
from typing import Any, Protocol

from rawdream_env.processes import follow_parent, in_main_thread, starting_children, stop_pool


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
        BrokenProcessPool: a process died. Other errors of a worker are raised unchanged.

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
    context = mp.get_context("spawn")  # a forked OpenGL context or thread pool does not work in the child
    stop, ticks = context.RawValue("b", 0), context.Value("q", 0)  # no lock on stop: a killed worker might hold it
    pool = ProcessPoolExecutor(
        max_workers=min(workers, len(pieces)),
        mp_context=context,
        initializer=_start_process,
        initargs=(factory, stop, ticks, in_main_thread()),
    )
    try:
        with starting_children():
            running: set[Future[None]] = {pool.submit(_do_piece, piece) for piece in pieces}
        finished = shown = 0
        while running:
            ready, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            now = ticks.get_obj().value  # without the lock, which a killed worker may hold
            count(now - shown)
            shown = now
            for future in ready:
                future.result()
                finished += 1
                yield finished
    finally:
        stop.value = 1
        stop_pool(pool)


# One per worker process, set by _start_process.
_PROCESS: dict[str, Any] = {}


def _start_process(factory: WorkerFactory, stop: Any, ticks: Any, from_main_thread: bool) -> None:
    follow_parent(from_main_thread)  # on Ctrl-C the parent asks its workers to stop at their next step
    _PROCESS.update(factory=factory, stop=stop, ticks=ticks)


def _do_piece(piece: int) -> None:
    if "worker" not in _PROCESS:  # not in _start_process, so that an error such as "no renderer" reaches the user
        worker = _PROCESS["worker"] = _PROCESS["factory"]()
        Finalize(None, worker.close, exitpriority=10)  # an OpenGL context left open complains when the process ends

    def tick() -> None:
        with _PROCESS["ticks"].get_lock():
            _PROCESS["ticks"].value += 1

    _PROCESS["worker"](piece, tick, lambda: bool(_PROCESS["stop"].value))
