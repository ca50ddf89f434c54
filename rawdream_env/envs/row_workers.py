"""Simulators of many rows, in this process or in worker processes, with calls that can be taken back.

A simulator defines a :class:`RowGroup` (the rows of one process) and a :class:`RowWorkers` (all rows, the public part). Calls
are numbered, so that an interrupted call of several processes leaves no row behind.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, ClassVar, Self

from rawdream_env.errors import ClosedEnvironmentError, InvalidOptionError, RawDreamError, SimulatorError
from rawdream_env.processes import follow_parent, starting_children

_log = logging.getLogger(__name__)
_CLOSE_S = 5.0
"""How long workers may take to end before they are killed."""
_SLICES = 60


@dataclass(frozen=True)
class Request:
    """One call for the rows of one process.

    ``counted`` is the number of the last call to this process whose answer counts: later ones were interrupted, failed or
    were taken back. Calls up to ``settled`` can no longer be taken back.
    """

    number: int
    counted: int
    settled: int
    name: str
    rows: list[int]
    args: tuple[Any, ...]


class RowGroup:
    """The rows of one process. A call is a method with the row numbers as its first argument; list arguments have one entry
    per row, and so has the list it returns.
    """

    _CHANGING: ClassVar[tuple[str, ...]] = ("reset", "step", "restore")
    """Calls that change rows, and are undone when they do not count."""

    def __init__(self) -> None:
        self._undo: list[tuple[int, list[int], list[Any]]] = []

    def call(self, request: Request) -> list[Any]:
        """Do what ``request`` asks for, after the calls that its sender does not count have been taken back."""
        while self._undo and self._undo[-1][0] > request.counted:
            _, rows, states = self._undo.pop()
            self.restore(rows, states)
        self._undo = [entry for entry in self._undo if entry[0] > request.settled]
        if request.name in self._CHANGING:
            self._undo.append((request.number, request.rows, self.state(request.rows)))
        answers: list[Any] = getattr(self, request.name)(request.rows, *request.args)
        return answers

    def state(self, rows: Sequence[int]) -> list[Any]:
        """The state of every row."""
        raise NotImplementedError

    def restore(self, rows: Sequence[int], states: Sequence[Any]) -> list[None]:
        """Continue from other states."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what the rows hold."""


def serve(pipe: Connection, make: Callable[[], RowGroup]) -> None:
    """A worker's life: answer every request with (number, True, result) or (number, False, error) until the pipe closes."""
    follow_parent()
    group: RowGroup | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = pipe.recv()
            try:
                group = group or make()
                answer: tuple[int, bool, Any] = (request.number, True, group.call(request))
            except RawDreamError as error:
                answer = (request.number, False, error)
            pipe.send(answer)
    if group is not None:
        group.close()


class _LostWorkerError(Exception):
    """A worker died, or did not answer in time."""


def _bound(pipe: Connection, timeout_s: float) -> None:
    """Let a send or receive fail that does not move for ``timeout_s``: a stopped process neither reads nor writes."""
    if os.name != "posix":
        return
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:  # the option belongs to the socket, not to this descriptor
        limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _stop(processes: Sequence[Any], pipes: Sequence[Connection]) -> None:
    """Close the pipes, on which workers end; kill those that have not ended soon."""
    try:
        for pipe in pipes:
            pipe.close()
        deadline = time.monotonic() + _CLOSE_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join(_CLOSE_S)
            with contextlib.suppress(ValueError):  # still running: the kernel holds it
                process.close()  # frees its descriptors


class RowWorkers:
    """``num_envs`` simulated rows. Subclasses add the calls.

    Args:
        num_envs: number of rows.
        num_workers: 0 simulates in this process; otherwise the rows are split among that many processes (spawned, so a
            script needs the usual ``if __name__ == "__main__"`` guard). Row i is the same whatever their number.
        timeout_s: how long a worker may take to answer.

    A call happens wholly or not at all: after an error or Ctrl-C the rows are where they were before it. ``mark`` and
    ``take_back`` do the same for several calls. Pickles and copies continue from the same state, with workers of their own.

    A worker that dies or does not answer in time: with ``_RESTARTS`` it is killed and started again, and its rows answer None
    until they are reset; otherwise all workers are closed and ``SimulatorError`` is raised.
    """

    _NAME: ClassVar[str] = "simulator"
    _RESTARTS: ClassVar[bool] = False

    def __init__(self, num_envs: int, num_workers: int, timeout_s: float) -> None:
        if num_envs < 1 or num_workers < 0 or timeout_s <= 0:
            raise InvalidOptionError(
                f"num_envs={num_envs} must be at least 1, num_workers={num_workers} at least 0 and "
                f"timeout_s={timeout_s} positive."
            )
        self.num_envs, self.num_workers = num_envs, min(num_workers, num_envs)
        self._timeout_s = timeout_s
        self._closed = False
        self._local: RowGroup | None = None
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._number = self._settled = 0
        self._counted = [0] * max(1, self.num_workers)
        if not num_workers:
            self._local = self._group(range(num_envs))()
            return
        # Runs at exit as well, before multiprocessing joins the processes without a limit.
        self._stop = Finalize(self, _stop, args=(self._processes, self._pipes), exitpriority=10)
        for worker in range(self.num_workers):
            self._start(worker)

    # --- for subclasses ----------------------------------------------------------------------------------------------
    def _group(self, rows: Sequence[int]) -> Callable[[], RowGroup]:
        """What makes the group of ``rows``, in its process; it is pickled."""
        raise NotImplementedError

    def _options(self) -> tuple[Any, ...]:
        """The arguments that make the same workers again."""
        raise NotImplementedError

    def _describe(self, worker: int) -> str:
        """A worker, for messages."""
        return f"simulator worker {worker} (rows {self._rows_of(worker)}"

    # --- public ------------------------------------------------------------------------------------------------------
    def mark(self) -> int:
        """Where ``take_back`` returns to. Calls made before it can no longer be taken back."""
        self._settled = self._number
        return self._number

    def take_back(self, mark: int) -> None:
        """Undo the calls made since ``mark`` (each process does so before its next call)."""
        self._counted = [min(number, mark) for number in self._counted]

    def close(self) -> None:
        """Stop the workers and free the renderers. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._local is not None:
            self._local.close()
        else:
            self._stop()

    def __getstate__(self) -> dict[str, Any]:
        """The options and the state of every row."""
        rows = list(range(self.num_envs))
        return {"options": self._options(), "states": None if self._closed else self._call("state", rows)}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        """Rows in the pickled state, with workers of their own."""
        self.__init__(*pickled["options"])  # type: ignore[misc]
        if pickled["states"] is None:
            self.close()
        else:
            self._call("restore", list(range(self.num_envs)), pickled["states"])

    def __enter__(self) -> Self:
        """Usable as a context manager: closes at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    # --- inside ------------------------------------------------------------------------------------------------------
    def _start(self, worker: int) -> None:
        """Start worker number ``worker``, in place of an earlier one if there was one."""
        context = multiprocessing.get_context("spawn")
        with starting_children():
            ours, theirs = context.Pipe()
            _bound(ours, self._timeout_s)
            process = context.Process(
                target=serve,
                args=(theirs, self._group(self._rows_of(worker))),
                name=f"{self._NAME}-worker-{worker}",
                daemon=True,
            )
            self._pipes[worker : worker + 1] = [ours]
            process.start()
            theirs.close()  # so that a dead worker shows as end of file
            self._processes[worker : worker + 1] = [process]

    def _rows_of(self, worker: int) -> list[int]:
        return list(range(worker, self.num_envs, self.num_workers))

    def _check_rows(self, rows: Sequence[int]) -> list[int]:
        if self._closed:
            raise ClosedEnvironmentError(f"these {type(self).__name__} are closed; create new ones.")
        out = [int(row) for row in rows]
        if not out or len(set(out)) != len(out) or min(out) < 0 or max(out) >= self.num_envs:
            raise InvalidOptionError(f"rows {out} must be distinct numbers from 0 to {self.num_envs - 1}.")
        return out

    def _call(self, name: str, rows: list[int], *args: Any) -> list[Any]:
        """Do ``name`` for rows; list arguments are per row and are split among the workers."""
        self._number = number = self._number + 1
        if self._local is not None:
            local = self._local.call(Request(number, self._counted[0], self._settled, name, rows, args))
            self._counted = [number]
            return local
        shares: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            shares.setdefault(row % self.num_workers, []).append(position)
        lost: dict[int, str] = {}
        for worker, positions in shares.items():
            mine = tuple([arg[p] for p in positions] if isinstance(arg, list) else arg for arg in args)
            share = [rows[p] for p in positions]
            with self._noting(lost, worker):
                self._send(worker, Request(number, self._counted[worker], self._settled, name, share, mine))
        results: list[Any] = [None] * len(rows)
        for worker, positions in shares.items():
            if worker in lost:
                continue
            with self._noting(lost, worker):
                for position, answer in zip(positions, self._receive(worker, number), strict=True):
                    results[position] = answer
        for worker, what in lost.items():
            self._replace(worker, what)
        self._counted = [number if worker in shares else old for worker, old in enumerate(self._counted)]
        return results

    @contextlib.contextmanager
    def _noting(self, lost: dict[int, str], worker: int) -> Iterator[None]:
        try:
            yield
        except _LostWorkerError as error:
            if not self._RESTARTS:
                raise self._dead(worker, str(error)) from error.__cause__
            lost[worker] = str(error)

    def _send(self, worker: int, request: Request) -> None:
        try:
            self._pipes[worker].send(request)
        except BlockingIOError as error:
            raise _LostWorkerError(f"did not read its request within {self._timeout_s:g} s") from error
        except OSError as error:
            raise _LostWorkerError("has ended") from error
        except BaseException:  # half a request would be read as the beginning of the next
            self.close()
            raise

    def _receive(self, worker: int, number: int) -> list[Any]:
        """The worker's answer to call ``number``; answers to earlier calls, which were given up, are dropped."""
        try:
            while True:
                answered, good, result = self._next_answer(worker)
                if answered == number:
                    break
        except (BlockingIOError, TimeoutError) as error:
            raise _LostWorkerError(f"did not answer within {self._timeout_s:g} s") from error
        except (EOFError, OSError) as error:
            raise _LostWorkerError("has ended") from error
        if not good:
            raise result
        answers: list[Any] = result
        return answers

    def _next_answer(self, worker: int) -> tuple[int, bool, Any]:
        pipe = self._pipes[worker]
        # In slices, so that time in which this process itself is stopped (Ctrl-Z) hardly counts.
        if not any(pipe.poll(self._timeout_s / _SLICES) for _ in range(_SLICES)):
            raise TimeoutError
        try:
            answer: tuple[int, bool, Any] = pipe.recv()
        except (EOFError, OSError):
            raise
        except BaseException:  # half an answer was read: the rest would be taken for the next
            self.close()
            raise
        return answer

    def _dead(self, worker: int, what: str) -> SimulatorError:
        process = self._processes[worker]
        process.join(timeout=0.5)
        code = process.exitcode
        self.close()
        return SimulatorError(
            f"{self._describe(worker)}, exit code {code}) {what}, so all workers were "
            "closed. Create a new environment" + (", with fewer workers if memory ran out." if code == -9 else ".")
        )

    def _replace(self, worker: int, what: str) -> None:
        """Kill a worker and start it again; its rows have no state until they are reset."""
        process = self._processes[worker]
        process.join(timeout=0.5)
        code = process.exitcode
        process.kill()
        process.join(_CLOSE_S)
        with contextlib.suppress(ValueError):  # still running: the kernel holds it
            process.close()
        self._pipes[worker].close()
        _log.warning("%s, exit code %s) %s; it was started again.", self._describe(worker), code, what)
        self._start(worker)
