"""Many twins behind one batched interface, in this process or spread over worker processes.

Row i is the same whatever the number of workers: an episode depends only on its seed, task and actions. Each process
opens one OpenGL context for all its rows; in a worker it is opened inside the worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from rawdream_env.errors import (
    ClosedEnvironmentError,
    InvalidActionError,
    InvalidOptionError,
    RawDreamError,
    ResetNeededError,
    SimulatorError,
)
from rawdream_env.piper.layouts import check_layout
from rawdream_env.piper.relations import BoolArray, find_task
from rawdream_env.types import ACTION_DIM, Float32Array, UInt8Array


@dataclass(frozen=True)
class PiperStep:
    """What one chunk led to, for n rows.

    ``frames`` uint8 (n, K, H, W, 3), or (n, 1, H, W, 3) when only the last was asked for; ``success`` bool (n,):
    the task's relation holds at the end of the chunk; ``proprio`` float32 (n, 7); ``relations`` bool (n, R).
    """

    frames: UInt8Array
    success: BoolArray
    proprio: Float32Array
    relations: BoolArray


class _Rows:
    """The twins of one process, by row number."""

    def __init__(self, rows: Sequence[int], image_size: int, layout: str) -> None:
        from rawdream_env.piper.twin import PiperRenderer, PiperTwin

        self._renderer = PiperRenderer(image_size)
        self._layout = layout
        self._twins = {row: PiperTwin(renderer=self._renderer) for row in rows}

    def reset(self, rows: Sequence[int], seeds: Sequence[int], tasks: Sequence[str | None]) -> list[UInt8Array]:
        return [
            self._twins[row].reset(seed, task=task, layout=self._layout)
            for row, seed, task in zip(rows, seeds, tasks, strict=True)
        ]

    def step(self, rows: Sequence[int], actions: Any, every_frame: bool) -> list[tuple[Any, ...]]:
        results = []
        for row, chunk in zip(rows, actions, strict=True):
            twin = self._twins[row]
            if every_frame:
                frames = twin.step_chunk(chunk)
            else:
                for action in chunk:
                    twin.step(action, render=False)
                frames = twin.frame()[None]
            results.append((frames, twin.task is not None and twin.success(), twin.proprio(), twin.relations()))
        return results

    def proprio(self, rows: Sequence[int]) -> list[Float32Array]:
        return [self._twins[row].proprio() for row in rows]

    def close(self) -> None:
        self._renderer.close()


def _serve(pipe: Connection, rows: Sequence[int], image_size: int, layout: str) -> None:
    """A worker's life: answer ("name", args) with (True, result) or (False, error) until "close" arrives."""
    os.environ.setdefault("LP_NUM_THREADS", "1")  # software OpenGL: one thread a worker
    try:
        twins = _Rows(rows, image_size, layout)
    except RawDreamError as error:
        pipe.send((False, error))
        return
    pipe.send((True, None))
    calls: dict[str, Callable[..., Any]] = {"reset": twins.reset, "step": twins.step, "proprio": twins.proprio}
    while True:
        try:
            name, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):  # the parent is gone or stopping
            break
        if name == "close":
            break
        try:
            pipe.send((True, calls[name](*args)))
        except RawDreamError as error:
            pipe.send((False, error))
    twins.close()


class PiperWorkers:
    """``num_envs`` twins with a batched interface.

    Args:
        num_envs: number of rows.
        num_workers: 0 keeps them in this process; otherwise rows are dealt out to that many processes (spawned, so a
            script needs the usual ``if __name__ == "__main__"`` guard).
        image_size: side of the frames in pixels.
        layout: "narrow" or "wide" (see ``PiperTwin.reset``).
        timeout_s: how long a worker may take to answer.

    Raises:
        RendererError: no OpenGL. SimulatorError: a worker died or did not answer.
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
        if num_envs < 1 or num_workers < 0 or timeout_s <= 0:
            raise InvalidOptionError(
                f"num_envs={num_envs} must be at least 1, num_workers={num_workers} at least 0 and "
                f"timeout_s={timeout_s} positive."
            )
        self.num_envs, self.num_workers, self.image_size = num_envs, min(num_workers, num_envs), image_size
        self._timeout_s = timeout_s
        self._closed = False
        self._started = np.zeros(num_envs, bool)
        self._local: _Rows | None = None
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        if not num_workers:
            self._local = _Rows(range(num_envs), image_size, layout)
            return
        context = multiprocessing.get_context("spawn")
        for w in range(self.num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, self._rows_of(w), image_size, layout),
                name=f"piper-worker-{w}",
                daemon=True,
            )
            process.start()
            theirs.close()  # so that a dead worker shows as end of file
            self._processes.append(process)
            self._pipes.append(ours)
        for w in range(self.num_workers):
            self._receive(w)

    # --- public ------------------------------------------------------------------------------------------------------
    def reset(self, rows: Sequence[int], seeds: Sequence[int], tasks: Sequence[str | None]) -> UInt8Array:
        """Begin an episode in each of n rows (task None: free play); returns first frames uint8 (n, H, W, 3)."""
        rows = self._check_rows(rows)
        if not len(rows) == len(seeds) == len(tasks):
            raise InvalidOptionError(f"{len(rows)} rows but {len(seeds)} seeds and {len(tasks)} tasks; give one each.")
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
        frames, success, proprio, truth = zip(*results, strict=True)
        return PiperStep(np.stack(frames), np.array(success, bool), np.stack(proprio), np.stack(truth))

    def proprio(self, rows: Sequence[int]) -> Float32Array:
        """Commanded tool poses float32 (n, 7)."""
        return np.stack(self._call("proprio", self._check_rows(rows)))

    def close(self) -> None:
        """Stop the workers and free the renderers; again is harmless."""
        if self._closed:
            return
        self._closed = True
        if self._local is not None:
            self._local.close()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # already dead
                pipe.send(("close", ()))
        for process in self._processes:
            process.join(timeout=5.0)
            if process.is_alive():
                process.terminate()
                process.join(timeout=5.0)
        for pipe in self._pipes:
            pipe.close()

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
            raise ClosedEnvironmentError("these PiperWorkers are closed; make new ones.")
        out = [int(row) for row in rows]
        if not out or len(set(out)) != len(out) or min(out) < 0 or max(out) >= self.num_envs:
            raise InvalidOptionError(f"rows {out} must be different numbers in 0..{self.num_envs - 1}.")
        return out

    def _call(self, name: str, rows: list[int], *args: Any) -> list[Any]:
        """Do ``name`` for rows; list arguments are per row and are split among the workers."""
        if self._local is not None:
            local: list[Any] = getattr(self._local, name)(rows, *args)
            return local
        shares: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            shares.setdefault(row % self.num_workers, []).append(position)
        for worker, positions in shares.items():
            mine = [[arg[p] for p in positions] if isinstance(arg, list) else arg for arg in args]
            self._send(worker, (name, ([rows[p] for p in positions], *mine)))
        results: list[Any] = [None] * len(rows)
        failure: RawDreamError | None = None
        for worker, positions in shares.items():  # hear every worker out, or the next call reads a stale answer
            try:
                answers = self._receive(worker)
            except RawDreamError as error:
                failure = failure or error
                continue
            for position, answer in zip(positions, answers, strict=True):
                results[position] = answer
        if failure is not None:
            raise failure
        return results

    def _send(self, worker: int, message: Any) -> None:
        try:
            self._pipes[worker].send(message)
        except OSError as error:
            raise self._dead(worker, "is gone") from error

    def _receive(self, worker: int) -> Any:
        pipe = self._pipes[worker]
        try:
            if not pipe.poll(self._timeout_s):
                raise self._dead(worker, f"did not answer within {self._timeout_s:g} s")
            good, result = pipe.recv()
        except (EOFError, OSError) as error:
            raise self._dead(worker, "died") from error
        if not good:
            raise result
        return result

    def _dead(self, worker: int, what: str) -> SimulatorError:
        process = self._processes[worker]
        process.join(timeout=0.5)
        code = process.exitcode
        self.close()
        return SimulatorError(
            f"simulator worker {worker} (rows {self._rows_of(worker)}, exit code {code}) {what}; all workers are "
            "closed: make a new PiperWorkers (with fewer workers or more memory if it was killed)."
        )
