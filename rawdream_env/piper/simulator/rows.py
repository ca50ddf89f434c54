"""The twins of one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rawdream_env.envs.row_workers import RowGroup
from rawdream_env.piper.relations import relation_index
from rawdream_env.piper.simulator.renderer import PiperRenderer
from rawdream_env.piper.simulator.twin import PiperTwin, TwinState
from rawdream_env.types import Float32Array, UInt8Array


class Rows(RowGroup):
    """The twins of one process, by row number; one renderer draws them all."""

    def __init__(self, rows: Sequence[int], image_size: int, layout: str) -> None:
        super().__init__()
        self._renderer = PiperRenderer(image_size)
        self._layout = layout
        self._twins = {row: PiperTwin(renderer=self._renderer) for row in rows}

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
