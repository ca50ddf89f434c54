"""The twins of one process, and the worker process that serves them.

Calls are numbered, and the last ones can be taken back: an interrupted call of several processes leaves no row behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from rawdream_env.errors import RawDreamError
from rawdream_env.piper.relations import relation_index
from rawdream_env.piper.simulator.renderer import PiperRenderer
from rawdream_env.piper.simulator.twin import PiperTwin, TwinState
from rawdream_env.processes import follow_parent
from rawdream_env.types import Float32Array, UInt8Array


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


class Rows:
    """The twins of one process, by row number. Calls are numbered, and the last ones can be taken back."""

    def __init__(self, rows: Sequence[int], image_size: int, layout: str) -> None:
        self._renderer = PiperRenderer(image_size)
        self._layout = layout
        self._twins = {row: PiperTwin(renderer=self._renderer) for row in rows}
        self._undo: list[tuple[int, dict[int, TwinState]]] = []
        self._calls: dict[str, Callable[..., list[Any]]] = {
            "reset": self.reset,
            "step": self.step,
            "proprio": self.proprio,
            "state": self.state,
            "restore": self.restore,
        }

    def call(self, request: Request) -> list[Any]:
        """Do what ``request`` asks for, after the calls that its sender does not count have been taken back."""
        while self._undo and self._undo[-1][0] > request.counted:
            for row, state in self._undo.pop()[1].items():
                self._twins[row].restore(state)
        self._undo = [entry for entry in self._undo if entry[0] > request.settled]
        if request.name in ("reset", "step", "restore"):
            self._undo.append((request.number, {row: self._twins[row].state() for row in request.rows}))
        return self._calls[request.name](request.rows, *request.args)

    def reset(self, rows: Sequence[int], seeds: Sequence[int], tasks: Sequence[str | None]) -> list[UInt8Array]:
        """Begin episodes; returns the first frames."""
        return [
            self._twins[row].reset(seed, task=task, layout=self._layout)
            for row, seed, task in zip(rows, seeds, tasks, strict=True)
        ]

    def step(self, rows: Sequence[int], actions: Any, every_frame: bool) -> list[tuple[Any, ...]]:
        """One chunk per row: (frames, success, proprio, relations, lifted) of each."""
        results = []
        for row, chunk in zip(rows, actions, strict=True):
            twin = self._twins[row]
            if every_frame:
                frames = twin.step_chunk(chunk)
            else:
                for action in chunk:
                    twin.step(action, render=False)
                frames = twin.frame()[None]
            truth, task = twin.relations(), twin.task
            success = task is not None and bool(truth[relation_index(task.relation)])
            lifted = task is not None and twin.lifted(task.object_a)
            results.append((frames, success, twin.proprio(), truth, lifted))
        return results

    def proprio(self, rows: Sequence[int]) -> list[Float32Array]:
        """Commanded tool poses."""
        return [self._twins[row].proprio() for row in rows]

    def state(self, rows: Sequence[int]) -> list[TwinState]:
        """The state of every row."""
        return [self._twins[row].state() for row in rows]

    def restore(self, rows: Sequence[int], states: Sequence[TwinState]) -> list[None]:
        """Continue from other states."""
        for row, state in zip(rows, states, strict=True):
            self._twins[row].restore(state)
        return [None] * len(rows)

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()


def serve(pipe: Connection, rows: Sequence[int], image_size: int, layout: str) -> None:
    """A worker's life: answer every request with (number, True, result) or (number, False, error) until the pipe closes."""
    follow_parent()
    twins = Rows(rows, image_size, layout)
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = pipe.recv()
            try:
                answer: tuple[int, bool, Any] = (request.number, True, twins.call(request))
            except RawDreamError as error:
                answer = (request.number, False, error)
            pipe.send(answer)
    twins.close()
