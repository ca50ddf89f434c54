"""Where the objects lie when an episode begins: task layouts ("narrow", "wide") and free-play scenes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.relations import MOVABLE, OBJECTS, SHAPES, TASKS, Task, object_index

Pose2D = tuple[float, float, float]
"""x (m), y (m), yaw (rad) on the table."""

LAYOUTS: Final = ("narrow", "wide")
NARROW_XY: Final = 0.03
NARROW_YAW: Final = 0.3
_WIDE_LOW: Final = np.array([0.21, -0.14])
_WIDE_HIGH: Final = np.array([0.36, 0.14])
_CLEARANCE = 0.035
"""Room for a finger between neighbours (m); given up step by step when the table is crowded."""

CANONICAL: Final[dict[str, tuple[Pose2D, Pose2D]]] = {
    "stack_block": ((0.29, 0.09, 0.0), (0.29, -0.08, 0.0)),
    "place_pot": ((0.29, 0.09, -math.pi / 2), (0.29, -0.09, 0.0)),
    "put_spoon": ((0.29, 0.09, 0.0), (0.29, -0.08, 0.0)),
    "place_cup": ((0.29, 0.11, 0.0), (0.29, -0.09, math.pi / 2)),
}
"""Middle of the narrow layout: object a, object b of each task."""


def check_layout(layout: str) -> None:
    """Raise ``InvalidOptionError`` unless the layout exists."""
    if layout not in LAYOUTS:
        raise InvalidOptionError(f"layout {layout!r} does not exist; choose from {', '.join(LAYOUTS)}.")


def sample_task_layout(task: Task, layout: str, rng: np.random.Generator) -> dict[str, Pose2D]:
    """Poses of a task's two objects. Relations that are no task have no canonical place and always lie wide."""
    check_layout(layout)
    if layout == "wide" or task.name not in CANONICAL:
        return sample_wide_layout((task.object_a, task.object_b), rng)
    poses = {}
    for name, (x, y, yaw) in zip((task.object_a, task.object_b), CANONICAL[task.name], strict=True):
        dx, dy = rng.uniform(-NARROW_XY, NARROW_XY, 2)
        turn = 0.0 if name == "stove" else rng.uniform(-NARROW_YAW, NARROW_YAW)
        poses[name] = (x + float(dx), y + float(dy), yaw + float(turn))
    return poses


def sample_tool(rng: np.random.Generator, spread: float = 1.0) -> NDArray[np.float64]:
    """The commanded pose (7,) in which an episode begins; ``spread`` 1 is what ``PiperTwin.reset`` draws."""
    pose = geo.HOME_POSE.copy()
    pose[:3] += spread * rng.uniform(-0.025, 0.025, 3)
    pose[5] += spread * rng.uniform(-0.2, 0.2)
    return pose


def sample_play_objects(rng: np.random.Generator) -> tuple[str, ...]:
    """2 (half of the time), 3 or 4 objects; three scenes in ten hold a task's pair, the others any objects."""
    count = int(rng.choice([2, 3, 4], p=[0.5, 0.35, 0.15]))
    order = [OBJECTS[i] for i in rng.permutation(len(OBJECTS))]
    if rng.random() < 0.3:
        task = TASKS[int(rng.integers(len(TASKS)))]
        order.sort(key=lambda name: name not in (task.object_a, task.object_b))
    return tuple(sorted(order[:count], key=object_index))


def check_objects(objects: Sequence[str]) -> tuple[str, ...]:
    """The objects in table order. Raises ``InvalidOptionError`` for unknown, repeated or only fixed ones."""
    indices = [object_index(name) for name in objects]
    if len(set(indices)) != len(indices) or not 1 <= len(indices) <= 5 or not set(objects) & set(MOVABLE):
        raise InvalidOptionError(
            f"objects={list(objects)} cannot be placed: name 1 to 5 different objects, not the stove alone."
        )
    return tuple(sorted(objects, key=object_index))


def _footprint(name: str, pose: Pose2D) -> list[tuple[float, float, float]]:
    """Circles (x, y, radius) that cover the object on the table."""
    x, y, yaw = pose
    shape = SHAPES[name]
    radius = shape.half[0] * (1.25 if shape.kind == "box" and shape.half[1] == shape.half[0] else 1.0)
    circles = [(x, y, radius)]
    if name == "pot":
        circles.append((x + 0.06 * math.cos(yaw), y + 0.06 * math.sin(yaw), 0.022))
    return circles


def _random_pose(name: str, rng: np.random.Generator) -> Pose2D:
    x, y = rng.uniform(_WIDE_LOW, _WIDE_HIGH)
    yaw = float(rng.uniform(-0.6, 0.6))
    if name == "stove":
        yaw = 0.0
    elif name == "pot":  # the handle points to the middle, where the gripper reaches it on either side
        yaw += -math.pi / 2 if y > 0 else math.pi / 2
    return float(x), float(y), yaw


def sample_wide_layout(objects: Sequence[str], rng: np.random.Generator) -> dict[str, Pose2D]:
    """Random poses over the whole workspace without overlaps."""
    largest_first = sorted(objects, key=lambda name: -SHAPES[name].half[0])
    clearance = _CLEARANCE
    while True:
        poses: dict[str, Pose2D] = {}
        taken: list[tuple[float, float, float]] = []
        for name in largest_first:
            for _ in range(30):
                pose = _random_pose(name, rng)
                circles = _footprint(name, pose)
                if _clear(circles, taken, clearance):
                    poses[name] = pose
                    taken += circles
                    break
        if len(poses) == len(objects):
            return {name: poses[name] for name in objects}
        clearance = max(clearance - 0.004, 0.002)


def _clear(
    circles: list[tuple[float, float, float]], taken: list[tuple[float, float, float]], clearance: float
) -> bool:
    gaps: NDArray[np.float64] = np.array(
        [math.hypot(x - u, y - v) - r - s for x, y, r in circles for u, v, s in taken] or [np.inf]
    )
    return bool(gaps.min() >= clearance)
