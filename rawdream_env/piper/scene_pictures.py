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
from rawdream_env.piper.relations import OBJECTS, rotation_from_quaternion
from rawdream_env.piper.scene import arm_state
from rawdream_env.piper.simulator import layouts
from rawdream_env.piper.simulator.practice import TASK_RELATIONS, begin_scripted, sample_scene
from rawdream_env.piper.simulator.twin import PiperTwin, TwinState
from rawdream_env.seeding import mix

Arrays = dict[str, NDArray[Any]]

_STEPS = 72
_PER_SHARD = {"pictures": 500, "starts": 4000}
FRAMES = 8
"""Frames of an episode."""


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
        start = twin.set_scene(sample_scene(rng), layouts.sample_tool(rng, spread=1.0 if rng.random() < 0.7 else 2.0))
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
            if twin.relations()[TASK_RELATIONS].any():
                break
            states.append(twin.state())
        if len(states) >= frames:
            break
    shots = []
    for i in np.sort(rng.choice(len(states), frames, replace=False)):
        twin.restore(states[i])
        shots.append({"frame": twin.frame(), **_state(twin)})
    return first | {name: np.stack([shot[name] for shot in shots]) for name in shots[0]}
