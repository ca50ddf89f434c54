"""Starts of LIBERO's tasks, rendered by the simulator from the initial states of a protocol."""

from __future__ import annotations

from functools import partial
from typing import Any

from rawdream_env.config import parse_choice
from rawdream_env.libero.install import tasks_of
from rawdream_env.libero.protocols import Protocol, Split, find_protocol, state_number
from rawdream_env.libero.workers import LiberoWorkers, SceneOptions
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.base import TaskLike, draw_task, find_task, seed_for
from rawdream_env.types import Start

DEFAULT_PROTOCOL = "raw-dream"


def task_list(suite: str) -> tuple[tuple[str, str], ...]:
    """(name, instruction) of every task of a suite, in the order of the task ids."""
    return tuple((task.name, task.instruction) for task in tasks_of(suite))


def parse_task(task: TaskLike, tasks: tuple[tuple[str, str], ...]) -> int | None:
    """The id of a task given by name, instruction or id; None for None and "all"."""
    if task is None or task == "all":
        return None
    return find_task(task, [name for name, _ in tasks], [instruction for _, instruction in tasks])


class LiberoStarts:
    """The scenes that ``LiberoSimVectorEnv`` shows for the same row seed, episode, task and protocol.

    Attributes:
        tasks: (name, instruction) of every task.
        image_size: side of the frames in pixels; it may be set before the first ``sample``.
    """

    def __init__(
        self,
        suite: str,
        image_size: int = 256,
        layout: str = "narrow",
        *,
        protocol: str | Protocol = DEFAULT_PROTOCOL,
        init_states: Split = "train",
    ) -> None:
        """``init_states``: "train" or "eval", the protocol's initial states to begin from. ``layout`` has no effect. The
        simulator is made on the first ``sample``.

        Raises:
            InvalidOptionError: no such suite, protocol or split. MissingDependencyError: hf-libero is not installed.
        """
        self.protocol = find_protocol(protocol, suite)
        self.suite, self.image_size = suite, image_size
        self.init_states: Split = parse_choice("init_states", init_states, ("train", "eval"))
        self.tasks = task_list(suite)
        self._workers: LiberoWorkers | None = None

    def sample(self, key: NoiseKey, task: TaskLike = None) -> Start:
        """See :class:`StartSource`."""
        chosen = parse_task(task, self.tasks)
        task_id = draw_task(key, len(self.tasks)) if chosen is None else chosen
        return self.scene(task_id, self.protocol.scene(seed_for(key.seed, key.episode), self.init_states))

    def trial(self, seed: int, task_id: int, index: int) -> Start:
        """Start ``index`` of a task in an evaluation: the initial states in order."""
        return self.scene(task_id, self.protocol.trial(seed, task_id, index, self.init_states))

    @property
    def described(self) -> dict[str, Any]:
        """The protocol, for results."""
        return {**self.protocol.as_dict(), "init_states": self.init_states}

    def scene(self, task_id: int, seed: int) -> Start:
        """The start of a task with a scene seed, which ends with the number of its initial state."""
        if self._workers is None:
            protocol = self.protocol
            options = SceneOptions(self.suite, self.image_size, protocol.scene_seed, protocol.settle_steps, 2)
            self._workers = LiberoWorkers(1, 0, options)
        ((frame, proprio),) = self._workers.reset([0], [task_id], [state_number(seed)])
        return Start(frame, self.tasks[task_id][1], task_id, proprio, seed)

    def close(self) -> None:
        """Free the simulator; a later ``sample`` creates a new one."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the simulator, which is created again when needed."""
        return {**self.__dict__, "_workers": None}


libero_spatial = partial(LiberoStarts, "libero_spatial")
libero_object = partial(LiberoStarts, "libero_object")
libero_goal = partial(LiberoStarts, "libero_goal")
libero_10 = partial(LiberoStarts, "libero_10")
libero_90 = partial(LiberoStarts, "libero_90")
