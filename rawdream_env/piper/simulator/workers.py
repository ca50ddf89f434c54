"""Batched Piper simulation, in this process or in worker processes.

Row i is the same whatever the number of workers: an episode depends only on its seed, task and actions. Each process
draws all its rows with one renderer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from rawdream_env.envs.row_workers import RowGroup, RowWorkers
from rawdream_env.errors import InvalidActionError, InvalidOptionError, ResetNeededError
from rawdream_env.piper.geometry import check_image_size
from rawdream_env.piper.relations import BoolArray, find_task
from rawdream_env.piper.simulator.layouts import check_layout
from rawdream_env.piper.simulator.rows import Rows
from rawdream_env.types import ACTION_DIM, Float32Array, UInt8Array


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


class PiperWorkers(RowWorkers):
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

    _NAME: ClassVar[str] = "piper"

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
        self.image_size, self._layout = image_size, layout
        super().__init__(num_envs, num_workers, timeout_s)
        self._started = np.zeros(num_envs, bool)

    def _group(self, rows: Sequence[int]) -> Callable[[], RowGroup]:
        return partial(Rows, rows, self.image_size, self._layout)

    def _options(self) -> tuple[Any, ...]:
        return self.num_envs, self.num_workers, self.image_size, self._layout, self._timeout_s

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

    def __getstate__(self) -> dict[str, Any]:
        """The options and the state of every row."""
        return {**super().__getstate__(), "started": self._started}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        """Rows in the pickled state, with workers of their own."""
        super().__setstate__(pickled)
        self._started = pickled["started"].copy()
