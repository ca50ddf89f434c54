"""Batched LIBERO simulation, in this process or in worker processes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rawdream_env.envs.row_workers import RowGroup, RowWorkers
from rawdream_env.errors import SimulatorError
from rawdream_env.libero.scene import LiberoScene, SceneState, SceneTruth, scene_of
from rawdream_env.types import Float32Array, UInt8Array

_Key = tuple[str, str, int, int]
_scenes: OrderedDict[_Key, LiberoScene] = OrderedDict()
"""The scenes of this process, the last used last; all its rows share them."""
_groups = 0
"""Open groups of this process. The scenes are freed with the last one."""


@dataclass(frozen=True)
class SceneOptions:
    """``suite``, ``image_size`` in pixels, ``scene_seed``, ``settle_steps`` and how many scenes a process keeps built."""

    suite: str
    image_size: int
    scene_seed: int
    settle_steps: int
    max_scenes: int


class LiberoRows(RowGroup):
    """The rows of one process: a row is a state of a scene."""

    def __init__(self, options: SceneOptions) -> None:
        global _groups
        super().__init__()
        self._options = options
        self._rows: dict[int, SceneState | None] = {}
        _groups += 1

    def reset(
        self, rows: Sequence[int], tasks: Sequence[int], numbers: Sequence[int]
    ) -> list[tuple[UInt8Array, Float32Array]]:
        """Begin episodes from initial states; returns the first frame and the proprio of each."""
        answers: dict[int, tuple[UInt8Array, Float32Array]] = {}
        for i in self._by_scene(dict(enumerate(tasks))):
            start = self._scene(tasks[i]).begin(tasks[i], numbers[i], self._options.settle_steps)
            self._rows[rows[i]] = start.state
            answers[i] = start.frame.copy(), start.proprio.copy()
        return [answers[i] for i in range(len(rows))]

    def step(
        self, rows: Sequence[int], actions: Sequence[Float32Array], every_frame: bool
    ) -> list[tuple[UInt8Array, Float32Array, bool, bool] | None]:
        """One chunk per row: (frames, proprio, success after some step, success after the last) of each; None where a row
        has no state, because its process is new.
        """
        answers: list[tuple[UInt8Array, Float32Array, bool, bool] | None] = [None] * len(rows)
        known = {i: state for i, row in enumerate(rows) if (state := self._rows.get(row)) is not None}
        for i in self._by_scene({i: state.task for i, state in known.items()}):
            step = self._scene(known[i].task).step(known[i], actions[i], every_frame)
            self._rows[rows[i]] = step.state
            answers[i] = step.frames, step.proprio, step.success_any, step.success_end
        return answers

    def truth(self, rows: Sequence[int]) -> list[SceneTruth | None]:
        """What is behind the picture of every row; None where it has no state."""
        states = [self._rows.get(row) for row in rows]
        return [None if state is None else self._scene(state.task).truth(state) for state in states]

    def state(self, rows: Sequence[int]) -> list[SceneState | None]:
        """The state of every row."""
        return [self._rows.get(row) for row in rows]

    def restore(self, rows: Sequence[int], states: Sequence[SceneState | None]) -> list[None]:
        """Continue from other states."""
        self._rows.update(zip(rows, states, strict=True))
        return [None] * len(rows)

    def close(self) -> None:
        """Free the scenes if no other group uses them."""
        global _groups
        _groups -= 1
        while not _groups and _scenes:
            _scenes.popitem()[1].close()

    def _by_scene(self, tasks: Mapping[int, int]) -> list[int]:
        """Positions, given their tasks, in the order that builds the fewest scenes: those that are built come first."""
        keys = {i: self._key(task) for i, task in tasks.items()}
        return sorted(keys, key=lambda i: (keys[i] not in _scenes, keys[i]))

    def _key(self, task: int) -> _Key:
        options = self._options
        return options.suite, scene_of(options.suite, task), options.image_size, options.scene_seed

    def _scene(self, task: int) -> LiberoScene:
        options, key = self._options, self._key(task)
        if key not in _scenes:
            while len(_scenes) >= options.max_scenes:
                _scenes.popitem(last=False)[1].close()
            _scenes[key] = LiberoScene(options.suite, task, options.image_size, options.scene_seed)
        _scenes.move_to_end(key)
        return _scenes[key]


@dataclass(frozen=True)
class LiberoStep:
    """The result of one chunk for n rows.

    ``frames`` uint8, one (K, H, W, 3) or (1, H, W, 3) per row; ``proprio`` float32 (K, 8) of each;
    ``success_any``, ``success_end`` bool (n,): the goal held after some control step of the chunk, after its last; ``lost``
    bool (n,): the row's worker died, so its episode is void (its frames and proprio are empty).
    """

    frames: list[UInt8Array]
    proprio: list[Float32Array]
    success_any: NDArray[np.bool_]
    success_end: NDArray[np.bool_]
    lost: NDArray[np.bool_]


class LiberoWorkers(RowWorkers):
    """``num_envs`` rows of one suite; each row has its own task.

    A worker that dies or does not answer within ``timeout_s`` is started again: a reset is repeated once, a step reports its
    rows as lost. See :class:`RowWorkers` for the rest.
    """

    _NAME: ClassVar[str] = "libero"
    _RESTARTS: ClassVar[bool] = True

    def __init__(self, num_envs: int, num_workers: int, options: SceneOptions, timeout_s: float = 300.0) -> None:
        self._scene_options = options
        self._tasks = [-1] * num_envs
        super().__init__(num_envs, num_workers, timeout_s)

    def reset(
        self, rows: Sequence[int], tasks: Sequence[int], numbers: Sequence[int]
    ) -> list[tuple[UInt8Array, Float32Array]]:
        """Begin an episode in each of n rows: number of its task, number of its initial state.

        Returns:
            First frame uint8 (H, W, 3) and proprio float32 (8,) of each.

        Raises:
            SimulatorError: a worker died twice.
        """
        rows = self._check_rows(rows)
        for row, task in zip(rows, tasks, strict=True):
            self._tasks[row] = task
        answers = self._call("reset", rows, list(tasks), list(numbers))
        if lost := [i for i, answer in enumerate(answers) if answer is None]:
            again = self._call("reset", [rows[i] for i in lost], [tasks[i] for i in lost], [numbers[i] for i in lost])
            for i, answer in zip(lost, again, strict=True):
                answers[i] = answer
        for row, answer in zip(rows, answers, strict=True):
            if answer is None:
                raise SimulatorError(
                    f"{self._describe(row % self.num_workers)}) died or did not answer within {self._timeout_s:g} s, twice, "
                    "while it began an episode. Use fewer workers if memory ran out, or a longer timeout_s."
                )
        return answers

    def step(self, rows: Sequence[int], actions: Sequence[Float32Array], every_frame: bool = True) -> LiberoStep:
        """Carry out one chunk in each of n rows: actions (K, 7) in [-1, 1] of each. ``every_frame=False`` draws only the
        last frame, which is faster.
        """
        rows = self._check_rows(rows)
        answers = self._call("step", rows, list(actions), every_frame)
        nothing = (np.zeros((0, 0, 0, 3), np.uint8), np.zeros((0, 8), np.float32), False, False)
        frames, proprio, some, end = zip(*(answer or nothing for answer in answers), strict=True)
        lost = np.array([answer is None for answer in answers], np.bool_)
        return LiberoStep(list(frames), list(proprio), np.array(some, np.bool_), np.array(end, np.bool_), lost)

    def truth(self, rows: Sequence[int]) -> list[SceneTruth | None]:
        """What is behind the pictures of n rows; None for a row whose worker died."""
        return self._call("truth", self._check_rows(rows))

    def _group(self, rows: Sequence[int]) -> Callable[[], RowGroup]:
        return partial(LiberoRows, self._scene_options)

    def _options(self) -> tuple[Any, ...]:
        return self.num_envs, self.num_workers, self._scene_options, self._timeout_s

    def _describe(self, worker: int) -> str:
        rows = self._rows_of(worker)
        return f"{self._scene_options.suite} worker {worker} (rows {rows}, tasks {[self._tasks[row] for row in rows]}"
