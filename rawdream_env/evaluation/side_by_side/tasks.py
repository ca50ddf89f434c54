"""Tasks of an environment, and the starts that every policy and every backend gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rawdream_env.errors import InvalidOptionError
from rawdream_env.seeding import mix
from rawdream_env.types import Start


def task_list(simulator: Any) -> tuple[tuple[str, str], ...]:
    """(name, instruction) of every task, in the order of the task ids."""
    tasks: tuple[tuple[str, str], ...] = tuple(getattr(simulator.unwrapped, "tasks", ()))
    if not tasks:
        raise InvalidOptionError(
            f"{type(simulator.unwrapped).__name__} does not list its tasks; add an attribute 'tasks' with one "
            "(name, instruction) pair per task id."
        )
    return tasks


def task_names(simulator: Any, chosen: Sequence[str]) -> tuple[str, ...]:
    """The chosen tasks; default: all."""
    known = [name for name, _ in task_list(simulator)]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InvalidOptionError(f"task {unknown[0]!r} does not exist; choose among {', '.join(known)}.")
    return tuple(chosen or known)


def make_starts(simulator: Any, pairs: Sequence[tuple[str, int]], seed: int) -> list[Start]:
    """One start per (task, index) pair, without its frame: the simulator makes the scene from the task id and the seed
    ``mix(seed, task id, index)``, or what its ``trial_seed`` returns for these numbers.
    """
    trial_seed = getattr(simulator.unwrapped, "trial_seed", mix)
    tasks = task_list(simulator)
    ids = {name: task_id for task_id, (name, _) in enumerate(tasks)}
    blank = np.zeros(simulator.single_observation_space["image"].shape, np.uint8)
    return [
        Start(blank, tasks[ids[task]][1], ids[task], None, trial_seed(seed, ids[task], index)) for task, index in pairs
    ]
