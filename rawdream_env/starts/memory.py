"""Starts in memory: a list of :class:`Start`, and the null source for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rawdream_env.errors import InvalidOptionError
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.base import TaskLike, draw_index, draw_task, find_task
from rawdream_env.types import Start


class ListStarts:
    """Draws from a list of starts; ``task`` selects by instruction or by ``task_id``."""

    def __init__(self, starts: Sequence[Start]) -> None:
        """Keep ``starts`` (at least one).

        Raises:
            InvalidOptionError: the list is empty, an entry is no ``Start``, or a frame is not uint8 (H, W, 3).
        """
        if not starts:
            raise InvalidOptionError("starts is an empty list; an episode needs at least one Start.")
        for index, start in enumerate(starts):
            if not isinstance(start, Start):
                raise InvalidOptionError(f"starts[{index}] is a {type(start).__name__}; a Start is needed.")
            frame = np.asarray(start.frame)
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise InvalidOptionError(
                    f"starts[{index}].frame has shape {frame.shape} and dtype {frame.dtype}; uint8 (H, W, 3) is needed."
                )
        self.starts = tuple(starts)
        numbered = {start.task_id: start.instruction for start in self.starts}
        self.tasks: tuple[tuple[str, str], ...] = ()
        if sorted(numbered) == list(range(len(numbered))):  # the ids are positions in a list of tasks
            self.tasks = tuple((numbered[i], numbered[i]) for i in range(len(numbered)))

    def sample(self, key: NoiseKey, task: TaskLike = None) -> Start:
        """See :class:`StartSource`."""
        chosen = self.starts if task is None else self._of_task(task)
        return chosen[draw_index(key, len(chosen))]

    def _of_task(self, task: str | int) -> tuple[Start, ...]:
        by_id = isinstance(task, int) and not isinstance(task, bool)
        chosen = tuple(s for s in self.starts if (s.task_id if by_id else s.instruction) == task)
        if not chosen:
            known = sorted({s.task_id if by_id else s.instruction for s in self.starts}, key=str)
            raise InvalidOptionError(f"no start in the list has task={task!r}; it has {known}.")
        return chosen


class NullStarts:
    """Random frames with invented instructions: the small twin of the real sources, for tests and timing."""

    TASKS = ("null_left", "null_right", "null_up", "null_down")
    INSTRUCTIONS = tuple(f"move the block {name.removeprefix('null_')}" for name in TASKS)
    tasks = tuple(zip(TASKS, INSTRUCTIONS, strict=True))

    def __init__(self, frame_shape: tuple[int, int, int] = (64, 64, 3)) -> None:
        """``frame_shape``: (H, W, 3) of the frames."""
        self.frame_shape = frame_shape

    def sample(self, key: NoiseKey, task: TaskLike = None) -> Start:
        """See :class:`StartSource`."""
        index = draw_task(key, len(self.TASKS)) if task is None else find_task(task, self.TASKS, self.INSTRUCTIONS)
        rng = NoiseKey(key.seed, key.env, key.episode).numpy(index)
        seed = int(rng.integers(2**31))
        frame = rng.integers(0, 256, self.frame_shape, dtype=np.uint8)
        proprio = rng.uniform(-1, 1, 7).astype(np.float32)
        return Start(frame, self.INSTRUCTIONS[index], index, proprio, seed)
