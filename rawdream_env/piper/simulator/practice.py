"""Scripted episodes for the data of a scene world model: scenes in which no task is at hand, and drivers that grasp and place
with errors of all sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rawdream_env.piper.relations import MOVABLE, NON_TASK_RELATIONS, TASKS, Task, find_task, relation_index
from rawdream_env.piper.simulator import layouts
from rawdream_env.piper.simulator.motions import CLOSE, OPEN, Waypoint, follow, pick_waypoints, place_waypoints
from rawdream_env.piper.simulator.skills import NOISE_SCALE, PlayPolicy, ScriptedExpert
from rawdream_env.piper.simulator.twin import PiperTwin
from rawdream_env.types import Float32Array

TASK_RELATIONS: Final = [relation_index(task.relation) for task in TASKS]
"""Columns of the tasks' relations."""
_KINDS: Final = {"play": 0.35, "practice": 0.4, "expert": 0.25}
"""Shares of the drivers."""
_HARD: Final = {"pot": 3.0, "spoon": 3.0}
"""How much more often these are grasped in ``GraspPractice``: their grasps slip."""


def sample_other_task(rng: np.random.Generator) -> Task:
    """A placing relation that is no task's, as a task."""
    return find_task(NON_TASK_RELATIONS[int(rng.integers(len(NON_TASK_RELATIONS)))])


def sample_scene(rng: np.random.Generator) -> dict[str, layouts.Pose2D]:
    """A wide layout: objects of play, or the pair of a relation that is no task."""
    if rng.random() < 0.6:
        return layouts.sample_wide_layout(layouts.sample_play_objects(rng), rng)
    task = sample_other_task(rng)
    return layouts.sample_task_layout(task, "wide", rng)


def begin_scripted(twin: PiperTwin, rng: np.random.Generator) -> tuple[Callable[[], Float32Array], NDArray[np.uint8]]:
    """A new scene, its driver and its first picture."""
    kind = str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
    if kind != "expert":
        start = twin.set_scene(sample_scene(rng), layouts.sample_tool(rng))
        return (PlayPolicy(twin, rng) if kind == "play" else GraspPractice(twin, rng)).act, start
    task = sample_other_task(rng)
    start = twin.set_scene(layouts.sample_task_layout(task, "wide", rng), layouts.sample_tool(rng))
    return ScriptedExpert(twin, task, rng, noise=float(rng.choice([0.0, 0.1, 0.2, 0.3]))).act, start


class _Practice:
    """Follows waypoints, with the noise of one episode, and plans the next ones when they are done."""

    def __init__(self, twin: PiperTwin, rng: np.random.Generator) -> None:
        self._twin, self._rng = twin, rng
        self._queue: list[Waypoint] = []
        self._steps = 0
        self._noise = float(rng.choice([0.0, 0.05, 0.12, 0.25]))

    def act(self) -> Float32Array:
        """Next action (7,)."""
        if not self._queue:
            self._queue = self._plan()
        waypoint = self._queue[0]
        action, reached = follow(self._twin.pose, waypoint)
        self._steps += 1
        if self._steps >= (waypoint.wait or waypoint.max_steps) or (reached and not waypoint.wait):
            self._queue.pop(0)
            self._steps = 0
        action[:6] += self._noise * self._rng.normal(size=6) * NOISE_SCALE
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _plan(self) -> list[Waypoint]:
        raise NotImplementedError

    def _holds(self, name: str) -> bool:
        return bool(self._twin.relations()[relation_index(f"holding:{name}")])


class GraspPractice(_Practice):
    """Grasps objects with small random errors, carries what it holds and lets it go over another object or the table."""

    def _plan(self) -> list[Waypoint]:
        held = [name for name in self._movable() if self._holds(name)]
        return self._release(held[0]) if held and self._twin.pose[6] > 0 else self._grasp()

    def _movable(self) -> list[str]:
        return [name for name in self._twin.present if name in MOVABLE]

    def _grasp(self) -> list[Waypoint]:
        rng, names = self._rng, self._movable()
        weights = np.array([_HARD.get(name, 1.0) for name in names])
        return pick_waypoints(
            self._twin,
            str(rng.choice(names, p=weights / weights.sum())),
            offset=rng.normal(0.0, [0.005, 0.005, 0.003]),
            turn=float(rng.normal(0.0, 0.2)),
            hover=float(rng.uniform(0.03, 0.05)),
            lift=float(rng.uniform(0.02, 0.08)),
            squeeze=int(rng.integers(2, 6)),
        )

    def _release(self, held: str) -> list[Waypoint]:
        rng = self._rng
        spot = np.array([rng.uniform(0.21, 0.36), rng.uniform(-0.14, 0.14)])
        if rng.random() < 0.25:
            above = np.append(spot, rng.uniform(0.04, 0.14))
            yaw = float(self._twin.pose[5] + rng.normal(0.0, 0.4))
            return [Waypoint(above, yaw, CLOSE, tolerance=0.01), Waypoint(None, yaw, OPEN, wait=3)]
        others = [name for name in self._twin.present if name != held]
        support = str(rng.choice(others)) if others and rng.random() < 0.75 else None
        return place_waypoints(
            self._twin,
            held,
            support,
            spot=spot,
            inside=support in ("pot", "bowl"),
            error=rng.normal(0.0, 0.006, 2),
            drop=float(rng.uniform(0.0, 0.02)),
            turn=float(rng.normal(0.0, 0.3)),
        )


class PlacePractice(_Practice):
    """Grasps the first object of a relation well, and lets it go on or in the second, off its middle and from some height,
    again and again: what rests, what tips and what slides off is learned here.
    """

    def __init__(self, twin: PiperTwin, task: Task, rng: np.random.Generator) -> None:
        super().__init__(twin, rng)
        self._task = task

    def _plan(self) -> list[Waypoint]:
        return self._place() if self._holds(self._task.object_a) and self._twin.pose[6] > 0 else self._pick()

    def _pick(self) -> list[Waypoint]:
        rng = self._rng
        return pick_waypoints(
            self._twin,
            self._task.object_a,
            offset=rng.normal(0.0, [0.002, 0.002, 0.001]),
            turn=float(rng.normal(0.0, 0.1)),
            lift=float(rng.uniform(0.03, 0.06)),
            squeeze=int(rng.integers(2, 5)),
        )

    def _place(self) -> list[Waypoint]:
        rng = self._rng
        return place_waypoints(
            self._twin,
            self._task.object_a,
            self._task.object_b,
            inside=self._task.relation.startswith("in:"),
            error=rng.normal(0.0, rng.choice([0.003, 0.006, 0.012]), 2),
            drop=float(rng.uniform(0.0, 0.012)),
            turn=float(rng.normal(0.0, 0.2)),
            retreat=float(rng.uniform(0.03, 0.08)),
        )
