"""Starts of the Piper tabletop: rendered by the simulator when they are asked for, and the bundled packs."""

from __future__ import annotations

from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rawdream_env.config import parse_choice, parse_positive_int
from rawdream_env.piper.relations import TASKS
from rawdream_env.piper.simulator.layouts import LAYOUTS
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.base import TaskLike, draw_task, find_task, seed_for
from rawdream_env.starts.pack import save_start_pack
from rawdream_env.types import Start

if TYPE_CHECKING:
    from rawdream_env.piper.simulator.twin import PiperTwin

TASK_NAMES = tuple(task.name for task in TASKS)
INSTRUCTIONS = tuple(task.instruction for task in TASKS)
TASK_LIST = tuple(zip(TASK_NAMES, INSTRUCTIONS, strict=True))


def piper_task(key: NoiseKey, task: TaskLike) -> int:
    """The task id of an episode: ``task`` when given, else drawn from the key."""
    return draw_task(key, len(TASKS)) if task is None else find_task(task, TASK_NAMES, INSTRUCTIONS)


class SimStarts:
    """The scenes ``PiperSimVectorEnv`` shows for the same row seed, episode and task; ``Start.seed`` resets to one."""

    tasks = TASK_LIST

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
            from rawdream_env.piper.simulator.twin import PiperTwin

            self._twin = PiperTwin(image_size=self.image_size)
        frame = self._twin.reset(seed, task=TASK_NAMES[index], layout=self.layout)
        proprio = np.asarray(self._twin.proprio(), dtype=np.float32)
        return Start(np.array(frame), INSTRUCTIONS[index], index, proprio.copy(), seed)

    def close(self) -> None:
        """Free the simulator; a later ``sample`` creates a new one."""
        if self._twin is not None:
            self._twin.close()
            self._twin = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the simulator, which is created again when needed."""
        return {**self.__dict__, "_twin": None}


def bundled_pack(layout: str) -> Path:
    """The bundled start pack of a layout, "narrow" or "wide"."""
    name = f"starts_{parse_choice('layout', layout, LAYOUTS)}.safetensors"
    return Path(str(files("rawdream_env.assets"))) / name


def make_start_pack(
    path: str | PathLike[str], n_per_task: int = 64, layout: str = "narrow", seed: int = 0, *, image_size: int = 64
) -> int:
    """Render ``n_per_task`` starts of each Piper task in the simulator into ``path``; returns their number.

    Start i of task t is the scene of row seed ``seed``, episode ``t * n_per_task + i``: other seeds, other scenes.
    """
    count = parse_positive_int("n_per_task", n_per_task)
    source = SimStarts(image_size=image_size, layout=parse_choice("layout", layout, LAYOUTS))
    try:
        starts = [
            source.sample(NoiseKey(seed, episode=task * count + i), task)
            for task in range(len(TASK_NAMES))
            for i in range(count)
        ]
    finally:
        source.close()
    save_start_pack(path, starts, TASK_LIST, layout=layout)
    return len(starts)
