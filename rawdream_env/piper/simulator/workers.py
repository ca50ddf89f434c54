"""Batched Piper simulation, in this process or in worker processes.

Row i is the same whatever the number of workers: an episode depends only on its seed, task and actions. Each process
draws all its rows with one renderer.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any

import numpy as np

from rawdream_env.errors import (
    ClosedEnvironmentError,
    InvalidActionError,
    InvalidOptionError,
    ResetNeededError,
    SimulatorError,
)
from rawdream_env.piper.geometry import check_image_size
from rawdream_env.piper.relations import BoolArray, find_task
from rawdream_env.piper.simulator.layouts import check_layout
from rawdream_env.piper.simulator.rows import Request, Rows, serve
from rawdream_env.processes import starting_children
from rawdream_env.types import ACTION_DIM, Float32Array, UInt8Array

_CLOSE_S = 5.0
"""How long workers may take to end before they are killed."""
_SLICES = 60


@dataclass(frozen=True)
class PiperStep:
    """The result of one chunk for n rows.

    ``frames`` uint8 (n, K, H, W, 3), or (n, 1, H, W, 3) for the last one alone; ``success`` bool (n,):
    the task's relation holds at the end of the chunk; ``proprio`` float32 (n, 7); ``relations`` bool (n, R);
    ``lifted`` bool (n,): the object that the task moves has been picked up in the episode so far.
    """

    frames: UInt8Array
    success: BoolArray
    proprio: Float32Array
    relations: BoolArray
    lifted: BoolArray


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


class PiperWorkers:
    """``num_envs`` twins with a batched interface.

    Args:
        num_envs: number of rows.
        num_workers: 0 simulates in this process; otherwise the rows are split among that many processes (spawned, so a
            script needs the usual ``if __name__ == "__main__"`` guard).
        image_size: side of the frames in pixels.
        layout: "narrow" or "wide" (see ``PiperTwin.reset``).
        timeout_s: how long a worker may take to answer.

    A call happens wholly or not at all: after an error or Ctrl-C the rows are where they were before it. ``mark`` and
    ``take_back`` do the same for several calls. Pickles and copies continue from the same state, with workers of their own.

    Raises:
        SimulatorError: a worker died or did not answer. RendererError, at the first frame: no OpenGL.
    """

    def __init__(
        self,
        num_envs: int,
        num_workers: int = 0,
        image_size: int = 64,
        layout: str = "narrow",
        timeout_s: float = 120.0,
    ) -> None:
        check_layout(layout)
        check_image_size(image_size)
        if num_envs < 1 or num_workers < 0 or timeout_s <= 0:
            raise InvalidOptionError(
                f"num_envs={num_envs} must be at least 1, num_workers={num_workers} at least 0 and "
                f"timeout_s={timeout_s} positive."
            )
        self.num_envs, self.num_workers, self.image_size = num_envs, min(num_workers, num_envs), image_size
        self._timeout_s = timeout_s
        self._closed = False
        self._started = np.zeros(num_envs, bool)
        self._layout = layout
        self._local: Rows | None = None
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._number = self._settled = 0
        self._counted = [0] * max(1, self.num_workers)
        if not num_workers:
            self._local = Rows(range(num_envs), image_size, layout)
            return
        context = multiprocessing.get_context("spawn")
        # Runs at exit as well, before multiprocessing joins the processes without a limit.
        self._stop = Finalize(self, _stop, args=(self._processes, self._pipes), exitpriority=10)
        with starting_children():
            for w in range(self.num_workers):
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                _bound(ours, timeout_s)
                process = context.Process(
                    target=serve,
                    args=(theirs, self._rows_of(w), image_size, layout),
                    name=f"piper-worker-{w}",
                    daemon=True,
                )
                process.start()
                theirs.close()  # so that a dead worker shows as end of file
                self._processes.append(process)

    # --- public ------------------------------------------------------------------------------------------------------
    def reset(self, rows: Sequence[int], seeds: Sequence[int], tasks: Sequence[str | None]) -> UInt8Array:
        """Begin an episode in each of n rows (task None: free play); returns first frames uint8 (n, H, W, 3)."""
        rows = self._check_rows(rows)
        if not len(rows) == len(seeds) == len(tasks):
            raise InvalidOptionError(
                f"{len(rows)} rows but {len(seeds)} seeds and {len(tasks)} tasks; pass one of each per row."
            )
        for task in tasks:
            if task is not None:
                find_task(task)
        frames = self._call("reset", rows, [int(seed) for seed in seeds], list(tasks))
        self._started[rows] = True
        return np.stack(frames)

    def step(self, rows: Sequence[int], actions: Any, every_frame: bool = True) -> PiperStep:
        """Carry out one chunk in each of n rows: ``actions`` (n, K, 7) in [-1, 1].

        ``every_frame=False`` draws only the last frame of the chunk, which is faster.
        """
        rows = self._check_rows(rows)
        acts = np.asarray(actions, dtype=np.float64)
        if acts.ndim != 3 or acts.shape[0] != len(rows) or acts.shape[1] < 1 or acts.shape[2] != ACTION_DIM:
            raise InvalidActionError(f"actions of shape {acts.shape} must be ({len(rows)}, K, {ACTION_DIM}).")
        if not np.isfinite(acts).all() or np.abs(acts).max() > 1.0 + 1e-4:
            bad = [row for row, act in zip(rows, acts, strict=True) if not (np.abs(act) <= 1.0 + 1e-4).all()]
            raise InvalidActionError(f"actions of rows {bad} are not finite or leave [-1, 1]; clip them first.")
        fresh = [row for row in rows if not self._started[row]]
        if fresh:
            raise ResetNeededError(f"rows {fresh} have no episode; call reset for them before step.")
        results = self._call("step", rows, list(acts), every_frame)
        frames, success, proprio, truth, lifted = zip(*results, strict=True)
        done, up = np.array(success, bool), np.array(lifted, bool)
        return PiperStep(np.stack(frames), done, np.stack(proprio), np.stack(truth), up)

    def proprio(self, rows: Sequence[int]) -> Float32Array:
        """Commanded tool poses float32 (n, 7)."""
        return np.stack(self._call("proprio", self._check_rows(rows)))

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
        return {
            "options": (self.num_envs, self.num_workers, self.image_size, self._layout, self._timeout_s),
            "started": self._started,
            "states": None if self._closed else self._call("state", rows),
        }

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        """Rows in the pickled state, with workers of their own."""
        self.__init__(*pickled["options"])  # type: ignore[misc]
        if pickled["states"] is None:
            self.close()
            return
        self._started = pickled["started"].copy()
        self._call("restore", list(range(self.num_envs)), pickled["states"])

    def __enter__(self) -> PiperWorkers:
        """Usable as a context manager: closes at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    # --- inside ------------------------------------------------------------------------------------------------------
    def _rows_of(self, worker: int) -> list[int]:
        return list(range(worker, self.num_envs, self.num_workers))

    def _check_rows(self, rows: Sequence[int]) -> list[int]:
        if self._closed:
            raise ClosedEnvironmentError("these PiperWorkers are closed; create new ones.")
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
        for worker, positions in shares.items():
            mine = tuple([arg[p] for p in positions] if isinstance(arg, list) else arg for arg in args)
            share = [rows[p] for p in positions]
            self._send(worker, Request(number, self._counted[worker], self._settled, name, share, mine))
        results: list[Any] = [None] * len(rows)
        for worker, positions in shares.items():
            for position, answer in zip(positions, self._receive(worker, number), strict=True):
                results[position] = answer
        self._counted = [number if worker in shares else old for worker, old in enumerate(self._counted)]
        return results

    def _send(self, worker: int, request: Request) -> None:
        try:
            self._pipes[worker].send(request)
        except BlockingIOError as error:
            raise self._dead(worker, f"did not read its request within {self._timeout_s:g} s") from error
        except OSError as error:
            raise self._dead(worker, "has ended") from error
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
            raise self._dead(worker, f"did not answer within {self._timeout_s:g} s") from error
        except (EOFError, OSError) as error:
            raise self._dead(worker, "has ended") from error
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
            f"simulator worker {worker} (rows {self._rows_of(worker)}, exit code {code}) {what}, so all workers were "
            "closed. Create a new environment" + (", with fewer workers if memory ran out." if code == -9 else ".")
        )
