"""The objects, the four tasks and the relations between objects of a tabletop scene.

One definition, numpy only: the simulator's success, the data set's labels and the hindsight instructions all read it.
A relation is named ``on:a:b``, ``in:a:b``, ``lifted:a`` or ``holding:a``. ``on`` and ``in`` are physical resting
states: the height fits the support, the centre lies over it, the object stands as it should and the gripper has let go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]

OBJECTS: Final = ("blue_block", "red_block", "pot", "stove", "spoon", "bowl", "cup")
MOVABLE: Final = tuple(name for name in OBJECTS if name != "stove")
CONTAINERS: Final = ("pot", "bowl")


@dataclass(frozen=True)
class ObjectShape:
    """Size of an object in metres, in its own frame (z up, origin at half its height).

    ``half`` are half extents (radius, radius, half height for round things); ``inner_radius`` and ``floor_z`` describe
    the cavity of a container; ``grip_width`` is the finger distance while it is held (thickness of the rim for a
    bowl), ``grip_slack`` how much wider a crooked grasp can be.
    """

    kind: str  # "box", "cylinder" or "container"
    half: tuple[float, float, float]
    grip_width: float
    grip_slack: float = 0.006
    inner_radius: float = 0.0
    floor_z: float = 0.0


SHAPES: Final[dict[str, ObjectShape]] = {
    "blue_block": ObjectShape("box", (0.015, 0.015, 0.015), grip_width=0.030, grip_slack=0.010),
    "red_block": ObjectShape("box", (0.018, 0.018, 0.018), grip_width=0.036, grip_slack=0.012),
    "pot": ObjectShape("container", (0.038, 0.038, 0.018), grip_width=0.014, inner_radius=0.033, floor_z=-0.012),
    "stove": ObjectShape("box", (0.055, 0.055, 0.006), grip_width=0.110),
    "spoon": ObjectShape("box", (0.0475, 0.006, 0.006), grip_width=0.012),
    "bowl": ObjectShape("container", (0.052, 0.052, 0.013), grip_width=0.005, inner_radius=0.047, floor_z=-0.007),
    "cup": ObjectShape("cylinder", (0.017, 0.017, 0.020), grip_width=0.034, grip_slack=0.008),
}
POT_HANDLE: Final = ((0.058, 0.0, 0.009), (0.022, 0.007, 0.007))
"""Centre and half extents of the pot's handle in the pot's frame (m)."""

_ON_PAIRS: Final = (
    ("blue_block", "red_block"),
    ("blue_block", "cup"),
    ("blue_block", "stove"),
    ("red_block", "blue_block"),
    ("red_block", "cup"),
    ("red_block", "stove"),
    ("cup", "blue_block"),
    ("cup", "red_block"),
    ("cup", "stove"),
    ("pot", "stove"),
    ("spoon", "stove"),
    ("bowl", "stove"),
)
_IN_PAIRS: Final = tuple((a, b) for b in CONTAINERS for a in ("blue_block", "red_block", "spoon", "cup"))

RELATION_NAMES: Final[tuple[str, ...]] = (
    *(f"on:{a}:{b}" for a, b in _ON_PAIRS),
    *(f"in:{a}:{b}" for a, b in _IN_PAIRS),
    *(f"lifted:{a}" for a in MOVABLE),
    *(f"holding:{a}" for a in MOVABLE),
)
"""Order of the relation vector."""
PLACE_RELATIONS: Final[tuple[str, ...]] = RELATION_NAMES[: len(_ON_PAIRS) + len(_IN_PAIRS)]
"""The ``on`` and ``in`` relations: everything a pick-and-place can be asked to establish."""

HEIGHT_TOLERANCE: Final = 0.006
UPRIGHT_COS: Final = float(np.cos(np.deg2rad(15.0)))
CONTAINER_COS: Final = float(np.cos(np.deg2rad(25.0)))
RIM_DEPTH: Final = 0.005
LIFT_HEIGHT: Final = 0.020
HOLD_DISTANCE: Final = 0.012
_STOVE_MARGIN = 0.005


@dataclass(frozen=True)
class Task:
    """A commanded goal: its success predicate is ``relation``, one of ``RELATION_NAMES``."""

    name: str
    instruction: str
    relation: str
    object_a: str
    object_b: str


TASKS: Final = (
    Task(
        name="stack_block",
        instruction="stack the blue block onto the red block",
        relation="on:blue_block:red_block",
        object_a="blue_block",
        object_b="red_block",
    ),
    Task("place_pot", "place the pot on the stove", "on:pot:stove", "pot", "stove"),
    Task("put_spoon", "put the spoon into the bowl", "in:spoon:bowl", "spoon", "bowl"),
    Task("place_cup", "place the cup into the pot", "in:cup:pot", "cup", "pot"),
)
"""The four tasks; ``task_id`` is the index."""
TASK_NAMES: Final = tuple(task.name for task in TASKS)
NON_TASK_RELATIONS: Final = tuple(name for name in PLACE_RELATIONS if name not in {task.relation for task in TASKS})
"""The placing relations that are no task's."""


def words(name: str) -> str:
    """The words for an object name: ``blue_block`` -> "blue block"."""
    return name.replace("_", " ")


def find_task(name: str | Task) -> Task:
    """The task of that name, or a task made for a ``on:a:b`` / ``in:a:b`` relation name.

    Raises:
        InvalidOptionError: neither a task nor a placing relation.
    """
    if isinstance(name, Task):
        return name
    for task in TASKS:
        if name == task.name:
            return task
    if name not in PLACE_RELATIONS:
        raise InvalidOptionError(
            f"task {name!r} does not exist; choose one of {', '.join(TASK_NAMES)} or a placing relation such as "
            f"{PLACE_RELATIONS[0]!r} (all {len(PLACE_RELATIONS)} are in relations.PLACE_RELATIONS)."
        )
    kind, a, b = name.split(":")
    return Task(name, f"put the {words(a)} {'into' if kind == 'in' else 'onto'} the {words(b)}", name, a, b)


def relation_index(name: str) -> int:
    """Column of a relation in the vector of ``relations``."""
    try:
        return RELATION_NAMES.index(name)
    except ValueError:
        raise InvalidOptionError(f"relation {name!r} does not exist; see relations.RELATION_NAMES.") from None


def object_index(name: str) -> int:
    """Row of an object in ``object_poses``."""
    try:
        return OBJECTS.index(name)
    except ValueError:
        raise InvalidOptionError(f"object {name!r} does not exist; choose from {', '.join(OBJECTS)}.") from None


def rotation_from_quaternion(quat: FloatArray) -> FloatArray:
    """Rotation matrices ``(..., 3, 3)`` of unit quaternions wxyz ``(..., 4)``."""
    w, x, y, z = np.moveaxis(quat, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


@dataclass(frozen=True)
class _Body:
    """One object in every scene of the batch: ``position`` (..., 3), ``rotation`` (..., 3, 3)."""

    shape: ObjectShape
    position: FloatArray
    rotation: FloatArray

    def local(self, point: FloatArray) -> FloatArray:
        """A world point in the body's frame."""
        return np.asarray(np.einsum("...ij,...i->...j", self.rotation, point - self.position))

    def extent(self) -> FloatArray:
        """How far the body reaches below (and above) its origin, whichever way it lies."""
        down = np.abs(self.rotation[..., 2, :])
        half = np.array(self.shape.half)
        if self.shape.kind == "box":
            return np.asarray(down @ half)
        return np.asarray(down[..., 2] * half[2] + half[0] * np.sqrt(np.clip(1.0 - down[..., 2] ** 2, 0.0, None)))

    def settled(self) -> BoolArray:
        """Stands or lies the way it rests: any face of a block, either end of a cup, a container upright."""
        up = self.rotation[..., 2, :]
        half = self.shape.half
        if self.shape.kind == "container":
            return np.asarray(up[..., 2] >= UPRIGHT_COS)
        if self.shape.kind == "cylinder":
            return np.asarray(np.abs(up[..., 2]) >= UPRIGHT_COS)
        if half[0] > 2 * half[1]:  # long and thin: lies flat
            return np.asarray(np.abs(up[..., 0]) <= np.sqrt(1 - UPRIGHT_COS**2))
        return np.asarray(np.max(np.abs(up), axis=-1) >= UPRIGHT_COS)


def _tool_distance(name: str, body: _Body, tool: FloatArray) -> FloatArray:
    """Distance from the tool point to the part of the object that can be gripped (m)."""
    point = body.local(tool)
    if body.shape.kind != "container":
        outside = np.clip(np.abs(point) - np.array(body.shape.half), 0.0, None)
        return np.asarray(np.linalg.norm(outside, axis=-1))
    wall = (body.shape.half[0] + body.shape.inner_radius) / 2
    radial = np.hypot(point[..., 0], point[..., 1]) - wall
    distance = np.hypot(radial, np.clip(np.abs(point[..., 2]) - body.shape.half[2], 0.0, None))
    if name == "pot":
        centre, half = (np.array(v) for v in POT_HANDLE)
        handle = np.linalg.norm(np.clip(np.abs(point - centre) - half, 0.0, None), axis=-1)
        distance = np.minimum(distance, handle)
    return distance


def _on(a: _Body, b: _Body) -> BoolArray:
    gap = (a.position[..., 2] - a.extent()) - (b.position[..., 2] + b.extent())
    offset = a.position - b.position
    offset = np.concatenate([offset[..., :2], np.zeros_like(offset[..., :1])], axis=-1)
    if b.shape.kind == "cylinder":
        over = np.linalg.norm(offset, axis=-1) <= b.shape.half[0]
    else:
        limit = b.shape.half[0] - (_STOVE_MARGIN if b.shape.half[0] > 0.05 else 0.0)
        over = np.max(np.abs(np.einsum("...ij,...i->...j", b.rotation, offset)), axis=-1) <= limit
    return np.asarray((np.abs(gap) <= HEIGHT_TOLERANCE) & over & a.settled() & b.settled())


def _lowest_point(a: _Body) -> FloatArray:
    """World point of the body that is lowest (m)."""
    half = np.array(a.shape.half)
    if a.shape.kind == "box":
        corner = -np.sign(a.rotation[..., 2, :]) * half
    else:
        up = a.rotation[..., 2, :]
        flat = np.linalg.norm(up[..., :2], axis=-1, keepdims=True)
        rim = -up[..., :2] / np.maximum(flat, 1e-9) * half[0] * (flat > 0.05)
        corner = np.concatenate([rim, -np.sign(up[..., 2:]) * half[2]], axis=-1)
    return np.asarray(a.position + np.einsum("...ij,...j->...i", a.rotation, corner))


def _in(a: _Body, b: _Body) -> BoolArray:
    """Centre over the cavity and the lowest point clearly below the rim, in an upright container."""
    centre, low = b.local(a.position), b.local(_lowest_point(a))
    inside = np.hypot(centre[..., 0], centre[..., 1]) <= b.shape.inner_radius
    low_inside = np.hypot(low[..., 0], low[..., 1]) <= b.shape.half[0]
    deep = (low[..., 2] <= b.shape.half[2] - RIM_DEPTH) & (low[..., 2] >= b.shape.floor_z - HEIGHT_TOLERANCE)
    return inside & low_inside & deep & (b.rotation[..., 2, 2] >= CONTAINER_COS)


def _widest_grip(name: str) -> float:
    return SHAPES[name].grip_width + SHAPES[name].grip_slack


def _holding(distance: dict[str, FloatArray], opening: FloatArray) -> dict[str, BoolArray]:
    """The fingers are as wide apart as the object asks and no other such object is nearer to the tool point."""
    grip = {}
    for n in MOVABLE:
        fits = (opening >= 0.6 * SHAPES[n].grip_width) & (opening <= _widest_grip(n)) & (distance[n] <= HOLD_DISTANCE)
        grip[n] = np.where(fits, distance[n], np.inf)
    nearest = np.min(np.stack(list(grip.values())), axis=0)
    return {n: np.isfinite(d) & (d <= nearest) for n, d in grip.items()}


def relations(object_poses: FloatArray, gripper_opening: FloatArray | float, tool_position: FloatArray) -> BoolArray:
    """Which relations hold, for one scene or any batch of scenes.

    Args:
        object_poses: ``(..., 7, 7)``, rows as ``OBJECTS``: xyz (m) and quaternion wxyz; NaN rows are absent objects.
        gripper_opening: ``(...)`` measured distance between the finger faces (m).
        tool_position: ``(..., 3)`` measured tool point (m).

    Returns:
        bool ``(..., R)`` in the order of ``RELATION_NAMES``; relations of absent objects are False.
    """
    poses = np.asarray(object_poses, dtype=np.float64)
    opening = np.asarray(gripper_opening, dtype=np.float64)
    tool = np.asarray(tool_position, dtype=np.float64)
    rotation = rotation_from_quaternion(poses[..., 3:])
    bodies = {n: _Body(SHAPES[n], poses[..., i, :3], rotation[..., i, :, :]) for i, n in enumerate(OBJECTS)}
    distance = {n: _tool_distance(n, bodies[n], tool) for n in MOVABLE}
    holding = _holding(distance, opening)
    free = {n: (opening >= _widest_grip(n)) | (distance[n] > 2 * HOLD_DISTANCE) for n in MOVABLE}
    columns = []
    for name in RELATION_NAMES:
        kind, *names = name.split(":")
        a = bodies[names[0]]
        if kind == "on":
            columns.append(_on(a, bodies[names[1]]) & free[names[0]])
        elif kind == "in":
            columns.append(_in(a, bodies[names[1]]) & free[names[0]])
        elif kind == "lifted":
            columns.append(holding[names[0]] & (a.position[..., 2] - a.extent() >= LIFT_HEIGHT))
        else:
            columns.append(holding[names[0]])
    return np.stack(columns, axis=-1)


def as_dict(vector: BoolArray) -> dict[str, bool]:
    """A relation vector ``(R,)`` by name."""
    return {name: bool(value) for name, value in zip(RELATION_NAMES, vector, strict=True)}
