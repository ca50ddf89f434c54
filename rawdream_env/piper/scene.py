"""The Piper's scene for world models of object states: shapes as surface points, symmetries, camera, arm states."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import permutations, product
from typing import Final

import numpy as np
import torch
from torch import Tensor

from rawdream_env.piper import geometry as geo
from rawdream_env.piper.relations import (
    OBJECTS,
    POT_HANDLE,
    SHAPES,
    ObjectShape,
    relations,
    rotation_from_quaternion,
)
from rawdream_env.robots import BoolArray, Box, FloatArray, Ring

_SPACING: Final = 0.006
"""Distance of neighbouring surface points (m): about a pixel of a picture of 64 pixels."""
_WIDE_SPACING: Final = 0.008
"""The same for large flat objects and containers, whose number of points sets that of all."""
_SYMMETRY: Final = {"blue_block": 4, "red_block": 4, "pot": 1, "stove": 4, "spoon": 1, "bowl": 0, "cup": 0}


def _box(half: FloatArray, spacing: float) -> FloatArray:
    """A lattice on the six faces of a box, (P, 3)."""
    axes = [np.linspace(-h, h, max(2, round(2 * h / spacing) + 1)) for h in half]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return np.asarray(points[(np.abs(points) > half - 1e-9).any(-1)])


def _rings(radii: FloatArray, heights: FloatArray, spacing: float) -> FloatArray:
    """Circles of ``radii`` at ``heights`` about z, (P, 3)."""
    circles = []
    for radius, height in zip(radii, heights, strict=True):
        angle = np.linspace(0, 2 * np.pi, max(1, round(2 * np.pi * radius / spacing)), endpoint=False)
        circles.append(np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(len(angle), height)], -1))
    return np.concatenate(circles)


def _round(shape: ObjectShape) -> FloatArray:
    """Wall and end discs of a cylinder, or wall and floor of a container."""
    radius, top = shape.half[0], shape.half[2]
    ends = [shape.floor_z] if shape.kind == "container" else [top, -top]
    levels = np.linspace(-top, top, max(2, round(2 * top / _WIDE_SPACING) + 1))
    inside = np.arange(radius - _SPACING, 0, -_WIDE_SPACING)
    discs = [_rings(inside, np.full(len(inside), height), _WIDE_SPACING) for height in ends]
    return np.concatenate([_rings(np.full(len(levels), radius), levels, _SPACING), *discs])


def _surface(name: str) -> FloatArray:
    shape = SHAPES[name]
    if shape.kind != "box":
        handles = [np.array(POT_HANDLE[0]) + _box(np.array(POT_HANDLE[1]), _SPACING)] if name == "pot" else []
        return np.concatenate([_round(shape), *handles])
    if name == "spoon":  # a wide bowl at its -x end, a thin handle
        bowl = _rings(np.array([0.014, 0.008, 0.0]), np.zeros(3), _SPACING) * np.array([1.1, 0.85, 1.0])
        handle = _box(np.array([0.033, 0.006, 0.006]), _SPACING)
        return np.concatenate([bowl + np.array([-0.0315, 0, 0]), handle + np.array([0.0145, 0, 0])])
    return _box(np.array(shape.half), _WIDE_SPACING if name == "stove" else _SPACING)


def _parts(name: str) -> list[Box | Ring]:
    shape = SHAPES[name]
    radius, top = shape.half[0], shape.half[2]
    if name == "spoon":
        return [Box((0.0145, 0, 0), (0.033, 0.006, 0.006)), Box((-0.033, 0, 0), (0.012, 0.009, 0.005))]
    if shape.kind == "box":
        return [Box((0, 0, 0), shape.half)]
    if shape.kind == "cylinder":
        return [Ring(0.0, 0.0, radius, top)]
    floor = Ring((shape.floor_z - top) / 2, 0.0, radius - 0.002, (top + shape.floor_z) / 2)
    wall = Ring(0.0005, shape.inner_radius, radius, top - 0.0005)
    return [floor, wall, *([Box(*POT_HANDLE)] if name == "pot" else [])]


def _quaternion(rotation: FloatArray) -> FloatArray:
    """Rotation matrices (N, 3, 3) -> unit quaternions wxyz (N, 4)."""
    m = rotation.astype(np.float64)
    diagonal = np.diagonal(m, axis1=-2, axis2=-1)
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    size = np.sqrt(np.maximum(0, 1 + diagonal @ signs.T)) / 2  # absolute values of w, x, y, z
    cross = {(0, 1): m[:, 2, 1] - m[:, 1, 2], (0, 2): m[:, 0, 2] - m[:, 2, 0], (0, 3): m[:, 1, 0] - m[:, 0, 1]}
    cross |= {(1, 2): m[:, 0, 1] + m[:, 1, 0], (1, 3): m[:, 0, 2] + m[:, 2, 0], (2, 3): m[:, 1, 2] + m[:, 2, 1]}
    rows = [[size[:, i] ** 2 if i == j else cross[min(i, j), max(i, j)] / 4 for j in range(4)] for i in range(4)]
    products = np.stack([np.stack(row, -1) for row in rows], -2)
    best = products[np.arange(len(m)), size.argmax(-1)]
    return np.asarray(best / np.linalg.norm(best, axis=-1, keepdims=True))


def _cube_rotations() -> FloatArray:
    """The 24 rotations of a cube onto itself."""
    signed = [
        np.array(signs)[:, None] * np.eye(3)[list(order)]
        for order in permutations(range(3))
        for signs in product((1, -1), repeat=3)
    ]
    return np.stack([matrix for matrix in signed if np.linalg.det(matrix) > 0])


class PiperScene:
    """``rawdream_env.robots.Scene`` of the Piper tabletop."""

    objects: Final = OBJECTS
    fixed: Final = ("stove",)
    symmetry: Final = tuple(_SYMMETRY[name] for name in OBJECTS)

    @cached_property
    def surface(self) -> FloatArray:
        """(7, P, 3) in metres; shapes with fewer points repeat theirs."""
        shapes = [_surface(name) for name in OBJECTS]
        return np.stack([np.resize(points, (max(map(len, shapes)), 3)) for points in shapes])

    @cached_property
    def camera(self) -> FloatArray:
        """(3, 4); the same projection as ``geometry.project``."""
        right, up, back = geo.camera_rotation().T
        focal = 0.5 / np.tan(np.deg2rad(geo.CAMERA_FOVY) / 2)
        rows = np.stack([focal * right - 0.5 * back, -focal * up - 0.5 * back, -back])
        return np.concatenate([rows, -rows @ geo.CAMERA_POSITION[:, None]], axis=1)

    @cached_property
    def shapes(self) -> Sequence[Sequence[Box | Ring]]:
        """The collision shapes of the simulator; the ring of boxes of a container as a tube, a spoon's bowl as a disc."""
        return tuple(_parts(name) for name in OBJECTS)

    @cached_property
    def rotations(self) -> Sequence[FloatArray]:
        """Per object (G, 3, 3). A spoon's handle is as thick as wide; a cup stands on either end."""
        half_turn = np.stack([np.eye(3), np.diag([1.0, -1.0, -1.0])])
        stove = np.stack([geo.rotation_from_rpy(np.array([0, 0, k * np.pi / 2])) for k in range(4)])
        cube = _cube_rotations()
        groups = {"blue_block": cube, "red_block": cube, "stove": stove, "spoon": half_turn, "cup": half_turn}
        return tuple(groups.get(name, np.eye(3)[None]) for name in OBJECTS)

    def truth(self, position: Tensor, rotation: Tensor, present: Tensor, arm: Tensor) -> tuple[FloatArray, BoolArray]:
        """Object poses of scenes (B,), and their relations in the order of ``relations.RELATION_NAMES``."""
        poses = np.full((*present.shape, 7), np.nan)
        here = present.numpy()
        poses[here, :3], poses[here, 3:] = position.numpy()[here], _quaternion(rotation.numpy()[here])
        return poses, relations(poses, arm[:, 6:].sum(-1).numpy(), arm[:, :3].numpy())

    def arm_at_rest(self, command: Tensor) -> Tensor:
        """Commanded poses (..., 7) -> states of an arm that has settled there (..., 8)."""
        opening = torch.from_numpy(geo.finger_opening(command[..., 6:].numpy()))
        return torch.cat([command[..., :6], opening.expand(*command.shape[:-1], 2) / 2], -1)

    def arm_pose(self, arm: Tensor) -> Tensor:
        """Arm states (..., 7) -> commanded poses whose settled finger opening is the measured one."""
        pose = arm.clone()
        pose[..., 6] = 1 - 2 * (arm[..., 6].clamp(0, geo.MAX_OPENING) + 0.01) / (geo.MAX_OPENING + 0.01)
        return pose


def arm_state(tool_pose: FloatArray, opening: FloatArray | float) -> FloatArray:
    """Measured tool poses (..., 7), xyz and quaternion wxyz, and finger openings (...) in metres -> arm states (..., 7):
    xyz, roll pitch yaw (zero: pointing down), opening.
    """
    m = rotation_from_quaternion(tool_pose[..., 3:]) @ geo.tool_rotation(np.zeros(7)).T
    roll, yaw = np.arctan2(m[..., 2, 1], m[..., 2, 2]), np.arctan2(m[..., 1, 0], m[..., 0, 0])
    pitch = -np.arcsin(np.clip(m[..., 2, 0], -1.0, 1.0))
    rest = np.stack([roll, pitch, yaw, np.broadcast_to(opening, roll.shape)], axis=-1)
    return np.concatenate([tool_pose[..., :3], rest], axis=-1)


SCENE: Final = PiperScene()
