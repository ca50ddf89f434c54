"""Geometry of grasping and placing, and the waypoints both the expert and the play policy follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rawdream_env.piper import geometry as geo
from rawdream_env.piper.relations import SHAPES, object_index, rotation_from_quaternion
from rawdream_env.piper.simulator.twin import PiperTwin

FloatArray = NDArray[np.floating[Any]]

OPEN: Final = -1.0
CLOSE: Final = 1.0
_TIP_CLEARANCE = 0.004
_HANDLE_GRASP = 0.056
_SPOON_GRASP = 0.008
_SPOON_ASIDE = 0.009


@dataclass(frozen=True)
class Waypoint:
    """Move the commanded tool to ``xyz`` (None: stay) and ``yaw``.

    Done within ``tolerance`` (m), or after ``wait`` steps where that is not 0. ``speed`` in (0, 1] limits the
    translation action. ``max_steps`` limits the steps towards a target that is not reached.
    """

    xyz: FloatArray | None
    yaw: float
    gripper: float
    tolerance: float = 0.004
    wait: int = 0
    speed: float = 1.0
    max_steps: int = 40


def follow(pose: FloatArray, waypoint: Waypoint) -> tuple[FloatArray, bool]:
    """Action (7,) towards a waypoint from a commanded pose (7,), and whether the waypoint was already reached."""
    target = pose[:3] if waypoint.xyz is None else np.clip(waypoint.xyz, geo.WORKSPACE_LOW, geo.WORKSPACE_HIGH)
    gap, turn = target - pose[:3], np.clip(waypoint.yaw, geo.RPY_LOW[2], geo.RPY_HIGH[2]) - pose[5]
    action = np.empty(7)
    action[:3] = np.clip(gap / geo.DPOS, -waypoint.speed, waypoint.speed)
    action[3:5] = np.clip(-pose[3:5] / geo.DROT, -1.0, 1.0)
    action[5] = np.clip(turn / geo.DROT, -1.0, 1.0)
    action[6] = waypoint.gripper
    return action, bool(np.abs(gap).max() < waypoint.tolerance and abs(turn) < 0.08)


def wrap(angle: float, period: float) -> float:
    """The angle modulo ``period``, nearest to zero."""
    return (angle + period / 2) % period - period / 2


def object_position(twin: PiperTwin, name: str) -> FloatArray:
    """Where an object that is present is, xyz (m)."""
    return np.asarray(twin.object_poses()[object_index(name), :3])


def object_yaw(twin: PiperTwin, name: str) -> float:
    """Heading (rad) of the object's x axis, or of its y axis where x points up or down (a block on its side)."""
    rotation = rotation_from_quaternion(twin.object_poses()[object_index(name), 3:])
    column = 0 if abs(rotation[2, 0]) < 0.7 else 1
    return math.atan2(rotation[1, column], rotation[0, column])


def grasp_pose(twin: PiperTwin, name: str) -> tuple[FloatArray, float]:
    """Tool position and yaw at which closing the fingers grasps the object as it lies now."""
    x, y, z = object_position(twin, name)
    yaw = object_yaw(twin, name)
    c, s = math.cos(yaw), math.sin(yaw)
    if name in ("blue_block", "red_block"):
        return np.array([x, y, max(z, 0.012)]), wrap(yaw, math.pi / 2)
    if name == "cup":
        return np.array([x, y, z + 0.006]), float(np.clip(twin.pose[5], -0.3, 0.3))
    if name == "spoon":
        return np.array([x + _SPOON_GRASP * c, y + _SPOON_GRASP * s, z + 0.004]), wrap(yaw, math.pi)
    if name == "pot":
        return np.array([x + _HANDLE_GRASP * c, y + _HANDLE_GRASP * s, z + 0.010]), wrap(yaw, math.pi)
    bearing = math.atan2(-y, -x)  # bowl: the rim nearest to the base, fingers across it
    radius = (SHAPES["bowl"].half[0] + SHAPES["bowl"].inner_radius) / 2
    rim = np.array([x + radius * math.cos(bearing), y + radius * math.sin(bearing), z + 0.008])
    return rim, wrap(bearing + math.pi / 2, math.pi)


def top_height(twin: PiperTwin, name: str) -> float:
    """Height (m) of the object's highest point if it stands as usual."""
    return float(object_position(twin, name)[2] + SHAPES[name].half[2])


def pick_waypoints(
    twin: PiperTwin,
    name: str,
    *,
    offset: FloatArray,
    turn: float = 0.0,
    hover: float = 0.045,
    lift: float = 0.03,
    speed: float = 1.0,
    squeeze: int = 4,
) -> list[Waypoint]:
    """Grasp an object and raise it by ``lift``; ``offset`` (3,) and ``turn`` are deliberate grasping errors."""
    grasp, yaw = grasp_pose(twin, name)
    grasp, yaw = grasp + offset, yaw + turn
    above = grasp + np.array([0.0, 0.0, hover])
    raised = grasp + np.array([0.0, 0.0, lift])
    return [
        Waypoint(above, yaw, OPEN, tolerance=0.012, speed=speed),
        Waypoint(grasp, yaw, OPEN, speed=speed),
        Waypoint(grasp, yaw, CLOSE, wait=squeeze),
        Waypoint(raised, yaw, CLOSE, tolerance=0.012, speed=speed),
    ]


def _spoon_aside(twin: PiperTwin, container: str) -> FloatArray:
    """How far off the middle (2,) a spoon is dropped: dead centre it could lie across the rim; so one end falls in."""
    too_long = SHAPES["spoon"].half[0] - SHAPES[container].inner_radius
    heading = object_yaw(twin, "spoon")
    return (too_long + _SPOON_ASIDE) * np.array([math.cos(heading), math.sin(heading)])


def place_waypoints(
    twin: PiperTwin,
    held: str,
    support: str | None,
    *,
    spot: FloatArray | None = None,
    inside: bool = False,
    error: FloatArray,
    drop: float = 0.004,
    clearance: float = 0.015,
    speed: float = 1.0,
    turn: float = 0.0,
    retreat: float = 0.07,
) -> list[Waypoint]:
    """Put the held object onto or into ``support`` (or at ``spot`` (2,) on the table), release it and retreat upwards.

    ``error`` (2,) misplaces it on purpose; ``drop`` is the height (m) it falls; ``clearance`` (m) how far above the
    support it is carried.
    """
    tool, at = twin.tool_pose()[:3], object_position(twin, held)
    grip = tool - at  # where the tool is relative to the object it holds
    half_height = SHAPES[held].half[2]
    under = 0.0 if support is None else top_height(twin, support)
    target = object_position(twin, support)[:2] if support is not None else spot
    if target is None:
        raise AssertionError("place_waypoints needs a support or a spot")
    xy = target + grip[:2] + error
    if inside and held == "spoon" and support is not None:
        xy = xy + _spoon_aside(twin, support)
    resting = under + half_height + grip[2]
    # Into a container the open fingers must stay above the rim.
    release = under + geo.FINGER_OVERHANG + _TIP_CLEARANCE if inside else resting + drop
    carry = max(resting, release) + clearance
    yaw = float(twin.pose[5]) + turn
    here = np.array([twin.pose[0], twin.pose[1], max(carry, twin.pose[2])])
    aside = float(np.hypot(*(xy - twin.pose[:2])))
    raise_first = [Waypoint(here, yaw - turn, CLOSE, tolerance=0.02, speed=speed)] if aside > 0.02 else []
    return [
        *raise_first,
        Waypoint(np.append(xy, carry), yaw, CLOSE, tolerance=0.006, speed=speed),
        Waypoint(np.append(xy, release), yaw, CLOSE, tolerance=0.003, speed=speed),
        Waypoint(np.append(xy, release), yaw, OPEN, wait=3),
        Waypoint(np.append(xy, release + retreat), yaw, OPEN, tolerance=0.012, speed=speed),
    ]
