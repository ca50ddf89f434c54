"""The :class:`StartSource` protocol and the random draws that all sources share.

A source receives the episode's :class:`NoiseKey`, never a generator, so that the starts of row i depend only on its own
seed and episode count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rawdream_env.errors import InvalidOptionError
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import Start

TaskLike = str | int | None
"""A task's name, its instruction or its id; None: any task, drawn by the key."""

_STREAM_SCENE = 101
_STREAM_TASK = 102
_STREAM_PICK = 103


@runtime_checkable
class StartSource(Protocol):
    """Provides the first frame and the instruction of an episode.

    A source with a known list of tasks has an attribute ``tasks``: (name, instruction) pairs in the order of the task ids.
    """

    def sample(self, key: NoiseKey, task: TaskLike = None) -> Start:
        """The start drawn with ``key`` (seed and episode); equal keys give equal starts.

        Raises:
            InvalidOptionError: the source has no such task.
        """
        ...


def seed_for(seed: int, episode: int) -> int:
    """The simulator's scene seed (63 bits) for episode ``episode`` of a row with seed ``seed``.

    The simulator environment and simulator-rendered starts both use it, so that equal row seeds give equal scenes.
    """
    return NoiseKey(seed, episode=episode).entropy(_STREAM_SCENE)


def draw_task(key: NoiseKey, count: int) -> int:
    """A task index in [0, count), uniform over keys."""
    return NoiseKey(key.seed, key.env, key.episode).entropy(_STREAM_TASK) % count


def draw_index(key: NoiseKey, count: int) -> int:
    """An index in [0, count) into a source's own list, uniform over keys."""
    return NoiseKey(key.seed, key.env, key.episode).entropy(_STREAM_PICK) % count


def find_task(task: str | int, names: Sequence[str], instructions: Sequence[str]) -> int:
    """The position of ``task`` (name, instruction or position) in the given lists.

    Raises:
        InvalidOptionError: there is no such task; the message lists the names.
    """
    if isinstance(task, int) and not isinstance(task, bool):
        if 0 <= task < len(names):
            return task
    elif isinstance(task, str):
        if task in names:
            return list(names).index(task)
        wanted = task.strip().lower()
        for index, instruction in enumerate(instructions):
            if instruction.strip().lower() == wanted:
                return index
    raise InvalidOptionError(
        f"task={task!r} is unknown; choose one of the names {', '.join(map(repr, names))}, "
        f"its instruction, an id from 0 to {len(names) - 1}, or None for all of them."
    )
