"""Pictures of the Piper's scene with the states they show, to train the reader and the painter of a scene world model.

Scripted drivers act on scenes of play and on relations that are no task: play, noisy experts, and grasps that nearly
miss. An episode ends before the relation of a task comes true, so no picture shows one.

``pictures-00000.safetensors`` holds E episodes with K random frames each; absent objects are zero::

    start              uint8 (E, H, W, 3)     frame     uint8 (E, K, H, W, 3)
    start_position     (E, O, 3) metres       position  (E, K, O, 3)
    start_rotation     (E, O, 3, 3)           rotation  (E, K, O, 3, 3)
    start_arm          (E, 7)                 arm       (E, K, 7)
    present            bool (E, O)

``starts-00000.safetensors`` holds the left column and ``present`` of E starts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rawdream_env.files import save_safetensors
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.relations import (
    MOVABLE,
    OBJECTS,
    PLACE_RELATIONS,
    TASKS,
    find_task,
    relation_index,
    rotation_from_quaternion,
)
from rawdream_env.piper.scene import arm_state
from rawdream_env.piper.simulator import layouts
from rawdream_env.piper.simulator.motions import CLOSE, OPEN, Waypoint, follow, pick_waypoints, place_waypoints
from rawdream_env.piper.simulator.skills import PlayPolicy, ScriptedExpert
from rawdream_env.piper.simulator.twin import PiperTwin, TwinState
from rawdream_env.seeding import mix
from rawdream_env.types import Float32Array

Arrays = dict[str, NDArray[Any]]

_TASK_RELATIONS = [relation_index(task.relation) for task in TASKS]
_OTHER_RELATIONS = [name for name in PLACE_RELATIONS if name not in {task.relation for task in TASKS}]
_KINDS = {"play": 0.35, "practice": 0.4, "expert": 0.25}
"""Shares of the drivers."""
_STEPS = 72
_PER_SHARD = {"pictures": 500, "starts": 4000}
FRAMES = 8
"""Frames of an episode."""
_HARD = {"pot": 3.0, "spoon": 3.0}
"""How much more often these are grasped in ``GraspPractice``: their grasps slip."""


def collect_pictures(folder: Path, episodes: int, *, frames: int = FRAMES, seed: int = 0, image_size: int = 64) -> None:
    """Write shards of ``episodes`` episodes with ``frames`` random frames each. A shard that exists is not made again."""
    twin = PiperTwin(image_size)

    def one(i: int) -> Arrays:
        return _episode(twin, mix(seed, 1, i), frames)

    _write_shards(folder, "pictures", episodes, one)
    twin.close()


def collect_starts(folder: Path, count: int, *, seed: int = 0, image_size: int = 64) -> None:
    """Write shards of ``count`` starts: the pictures and states in which episodes begin."""
    twin = PiperTwin(image_size)

    def one(i: int) -> Arrays:
        rng = np.random.default_rng(mix(seed, 2, i))
        start = twin.set_scene(_places(rng), _tool(rng, spread=1.0 if rng.random() < 0.7 else 2.0))
        return _start(twin, start)

    _write_shards(folder, "starts", count, one)
    twin.close()


def shard_paths(folder: Path, kind: str, count: int) -> tuple[Path, ...]:
    """The files of ``count`` episodes (``kind`` "pictures") or starts ("starts")."""
    return tuple(folder / f"{kind}-{i:05d}.safetensors" for i in range(-(-count // _PER_SHARD[kind])))


def _write_shards(folder: Path, kind: str, count: int, one: Callable[[int], Arrays]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = _PER_SHARD[kind]
    for shard, path in enumerate(shard_paths(folder, kind, count)):
        if not path.exists():
            rows = [one(i) for i in range(shard * size, min((shard + 1) * size, count))]
            save_safetensors(path, {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]})


def _places(rng: np.random.Generator) -> dict[str, layouts.Pose2D]:
    """A wide layout: objects of play, or the pair of a relation that is no task."""
    if rng.random() < 0.6:
        return layouts.sample_wide_layout(layouts.sample_play_objects(rng), rng)
    task = find_task(_OTHER_RELATIONS[int(rng.integers(len(_OTHER_RELATIONS)))])
    return layouts.sample_task_layout(task, "wide", rng)


def _tool(rng: np.random.Generator, spread: float = 1.0) -> NDArray[np.float64]:
    """A commanded pose near home; ``spread`` 1 is that of ``PiperTwin.reset``."""
    pose = geo.HOME_POSE.copy()
    pose[:3] += spread * rng.uniform(-0.025, 0.025, 3)
    pose[5] += spread * rng.uniform(-0.2, 0.2)
    return pose


def _state(twin: PiperTwin) -> Arrays:
    poses = np.nan_to_num(twin.object_poses())
    here = np.array([name in twin.present for name in OBJECTS])
    rotation = rotation_from_quaternion(poses[:, 3:]) * here[:, None, None]
    arm = arm_state(twin.tool_pose(), twin.gripper_opening())
    values = {"position": poses[:, :3], "rotation": rotation, "arm": arm}
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def _start(twin: PiperTwin, picture: NDArray[np.uint8]) -> Arrays:
    states = {f"start_{name}": value for name, value in _state(twin).items()}
    return {"start": picture, **states, "present": np.array([name in twin.present for name in OBJECTS])}


def _episode(twin: PiperTwin, seed: int, frames: int) -> Arrays:
    """A start and ``frames`` random later frames of one scripted episode."""
    for attempt in range(100):
        rng = np.random.default_rng(mix(seed, attempt))
        act, start = begin_scripted(twin, rng)
        first, states = _start(twin, start), list[TwinState]()
        for _ in range(_STEPS):
            twin.step(act(), render=False)
            if twin.relations()[_TASK_RELATIONS].any():
                break
            states.append(twin.state())
        if len(states) >= frames:
            break
    shots = []
    for i in np.sort(rng.choice(len(states), frames, replace=False)):
        twin.restore(states[i])
        shots.append({"frame": twin.frame(), **_state(twin)})
    return first | {name: np.stack([shot[name] for shot in shots]) for name in shots[0]}


def begin_scripted(twin: PiperTwin, rng: np.random.Generator) -> tuple[Callable[[], Float32Array], NDArray[np.uint8]]:
    """A new scene, its driver and its first picture."""
    kind = str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
    if kind != "expert":
        start = twin.set_scene(_places(rng), _tool(rng))
        return (PlayPolicy(twin, rng) if kind == "play" else GraspPractice(twin, rng)).act, start
    task = find_task(_OTHER_RELATIONS[int(rng.integers(len(_OTHER_RELATIONS)))])
    start = twin.set_scene(layouts.sample_task_layout(task, "wide", rng), _tool(rng))
    return ScriptedExpert(twin, task, rng, noise=float(rng.choice([0.0, 0.1, 0.2, 0.3]))).act, start


class GraspPractice:
    """Grasps objects with small random errors, carries what it holds and lets it go over another object or the table."""

    def __init__(self, twin: PiperTwin, rng: np.random.Generator) -> None:
        self._twin, self._rng = twin, rng
        self._queue: list[Waypoint] = []
        self._steps = 0
        self._noise = float(rng.choice([0.0, 0.05, 0.12, 0.25]))

    def act(self) -> Float32Array:
        """Next action (7,)."""
        if not self._queue:
            held = [name for name in self._movable() if self._twin.relations()[relation_index(f"holding:{name}")]]
            self._queue = self._release(held[0]) if held and self._twin.pose[6] > 0 else self._grasp()
        waypoint = self._queue[0]
        action, reached = follow(self._twin.pose, waypoint)
        self._steps += 1
        if self._steps >= (waypoint.wait or waypoint.max_steps) or (reached and not waypoint.wait):
            self._queue.pop(0)
            self._steps = 0
        action[:6] += self._rng.normal(0.0, self._noise, 6) * np.array([1, 1, 1, 0.3, 0.3, 0.3])
        return np.clip(action, -1.0, 1.0).astype(np.float32)

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
