"""Starts rendered by the Piper simulator when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rawdream_env.piper.relations import TASKS
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.base import TaskLike, draw_task, find_task, seed_for
from rawdream_env.types import Start

if TYPE_CHECKING:
    from rawdream_env.piper.twin import PiperTwin

TASK_NAMES = tuple(task.name for task in TASKS)
INSTRUCTIONS = tuple(task.instruction for task in TASKS)


def piper_task(key: NoiseKey, task: TaskLike) -> int:
    """The task id of an episode: ``task`` when given, else drawn from the key."""
    return draw_task(key, len(TASKS)) if task is None else find_task(task, TASK_NAMES, INSTRUCTIONS)


class SimStarts:
    """The scenes ``PiperSimVectorEnv`` shows for the same row seed, episode and task; ``Start.seed`` resets to one."""

    def __init__(self, image_size: int = 64, layout: str = "narrow") -> None:
        """``image_size`` in pixels; ``layout`` "narrow" or "wide". The simulator is made on the first ``sample``."""
        self.image_size = image_size
        self.layout = layout
        self._twin: PiperTwin | None = None

    def sample(self, key: NoiseKey, task: TaskLike = None) -> Start:
        """See :class:`StartSource`.

        Raises:
            InvalidOptionError: no such task. RendererError: no working OpenGL renderer.
        """
        index = piper_task(key, task)
        seed = seed_for(key.seed, key.episode)
        if self._twin is None:
            from rawdream_env.piper.twin import PiperTwin

            self._twin = PiperTwin(image_size=self.image_size)
        frame = self._twin.reset(seed, task=TASK_NAMES[index], layout=self.layout)
        proprio = np.asarray(self._twin.proprio(), dtype=np.float32)
        return Start(np.array(frame), INSTRUCTIONS[index], index, proprio.copy(), seed)

    def close(self) -> None:
        """Let the simulator go; a later ``sample`` makes a new one."""
        if self._twin is not None:
            self._twin.close()
            self._twin = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the simulator, which cannot be pickled and is made again when needed."""
        return {**self.__dict__, "_twin": None}
