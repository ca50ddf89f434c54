"""Objects that overlap are pushed apart.

The dynamics see contacts, but nothing in a network forbids a spoon to sink into the wall of a bowl, or a state that no
training data resemble to drift there. Shapes are known, so after each frame overlaps are projected out: the deepest point of
each pair is moved to the surface by the smallest translation and rotation of both objects, weighted by their masses and
inertias ("Position based dynamics", Mueller et al. 2007; for rigid bodies Mueller et al. 2020). What the hand
holds and what never moves stays where it is.

A point inside a thin wall or floor is pushed to the side on which its object's center is, not to the nearest face: an object
that went halfway through comes back.

All arithmetic is elementwise, so that a row is computed alike in any batch of the same size.

Shape letters: B rows, N objects of a row, M ordered pairs of near objects, P points of an object, S parts of a shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rawdream_env.robots import Box, Ring
from rawdream_env.world_models.scene.contact import Shape, contact_points, part_tables, wall
from rawdream_env.world_models.scene.rotations import apply, compose, rotate

_SLENDER_SPACING = 0.004
"""Distance of the points along slender boxes (m): below the thickness of a wall."""
_ITERATIONS = 4
_MARGIN = 0.005
"""Objects may be pushed towards each other by this (m)."""
_FAR = 1.0


class Separation(nn.Module):
    """Pushes the objects of a scene apart.

    Args:
        shapes: of the robot's objects.
        fixed: bool (O,): objects that never move.
    """

    def __init__(self, shapes: Sequence[Shape], fixed: Tensor) -> None:
        super().__init__()
        clouds = [contact_points(shape, _SLENDER_SPACING) for shape in shapes]
        points = np.zeros((len(shapes), max(map(len, clouds)), 3), np.float32)
        for row, cloud in zip(points, clouds, strict=True):
            row[:] = np.resize(cloud, row.shape)  # shapes with fewer points repeat theirs
        boxes, rings = part_tables(shapes)
        mass = np.array([sum(_volume(part) for part in shape) for shape in shapes])
        gyration = [2 / 3 * np.square(cloud).sum(-1).mean() for cloud in clouds]  # of a hollow body, about any axis
        radius = [np.linalg.norm(cloud, axis=-1).max() for cloud in clouds]
        tables = {"inverse_mass": mass.min() / mass, "gyration": gyration, "radius": radius}
        self.register_buffer("fixed", fixed, persistent=False)
        self.fixed: Tensor
        self.points: Tensor
        self.boxes: Tensor
        self.rings: Tensor
        self.inverse_mass: Tensor
        self.gyration: Tensor
        self.radius: Tensor
        for name, table in {"points": points, "boxes": boxes, "rings": rings, **tables}.items():
            self.register_buffer(name, torch.from_numpy(np.asarray(table, np.float32)), persistent=False)

    def forward(
        self, which: Tensor, position: Tensor, rotation: Tensor, held: Tensor, allowed: float
    ) -> tuple[Tensor, Tensor]:
        """Positions and rotations without overlaps of more than ``allowed`` (m), or with smaller ones.

        Args:
            which: int64 (B, N), the objects.
            position: (B, N, 3).
            rotation: (B, N, 3, 3).
            held: bool (B, N), objects that the hand moves.
            allowed: overlaps of resting objects in a simulator with soft contacts.
        """
        weight = self.inverse_mass[which].masked_fill(held | self.fixed[which], 0.0)  # (B, N)
        row, one, two = self._near(which, position)
        for _ in range(_ITERATIONS):
            depth, push, at = self._deepest(which, position, rotation, row, one, two)
            depth = (depth - allowed).clamp_min(0)
            lever_one, lever_two = at - position[row, one], at - position[row, two]
            turn_one, turn_two = _cross(lever_one, push), _cross(lever_two, push)
            size_one, size_two = self.gyration[which[row, one]], self.gyration[which[row, two]]
            w_one, w_two = weight[row, one], weight[row, two]
            resists = w_one * (1 + _square(turn_one) / size_one) + w_two * (1 + _square(turn_two) / size_two)
            force = torch.where((depth > 0) & (resists > 0), depth / resists.clamp_min(1e-9), 0.0)
            if not bool((force > 0).any()):
                break
            index = torch.cat([torch.stack([row, one]), torch.stack([row, two])], 1)
            steps = [(force * w_one)[:, None] * push, -(force * w_two)[:, None] * push]
            turns = [(force * w_one / size_one)[:, None] * turn_one, -(force * w_two / size_two)[:, None] * turn_two]
            touched = torch.zeros_like(weight).index_put((index[0], index[1]), (force > 0).float().repeat(2), True)
            share = touched.clamp_min(1)[..., None]
            step = torch.zeros_like(position).index_put((index[0], index[1]), torch.cat(steps), True) / share
            angle = torch.zeros_like(position).index_put((index[0], index[1]), torch.cat(turns), True) / share
            moved = (touched > 0)[..., None]
            position = torch.where(moved, position + step, position)
            rotation = torch.where(moved[..., None], compose(rotate(angle), rotation), rotation)
            again = moved.flatten(1).any(1)[row]
            row, one, two = row[again], one[again], two[again]
        return position, rotation

    def _near(self, which: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ordered pairs whose bounding spheres meet: rows, first and second objects, each (M,)."""
        apart = (_square(position[:, :, None] - position[:, None])).sqrt()
        radius = self.radius[which]
        near = apart < radius[:, :, None] + radius[:, None] + _MARGIN
        near &= ~torch.eye(which.shape[1], dtype=torch.bool, device=which.device)
        row, one, two = near.nonzero(as_tuple=True)
        return row, one, two

    def _deepest(
        self, which: Tensor, position: Tensor, rotation: Tensor, row: Tensor, one: Tensor, two: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The point of the first object that is deepest in the second: its depth (M,), 0 for none; the direction in which the
        first object is pushed and the point, (M, 3) in the world.
        """
        turn = rotation[row, two]
        back = turn.transpose(-1, -2)
        own = apply(rotation[row, one][:, None], self.points[which[row, one]]) + position[row, one][:, None]
        local = apply(back[:, None], own - position[row, two][:, None])  # (M, P, 3)
        center = apply(back, position[row, one] - position[row, two])[:, None]  # (M, 1, 3)
        boxes, rings = self.boxes[which[row, two]][:, None], self.rings[which[row, two]][:, None]  # (M, 1, S, 6 | 4)
        middle = boxes[..., :3]
        box_depth, axis, sign = _inside(local[..., None, :] - middle, center[..., None, :] - middle, boxes[..., 3:])
        box_push = torch.stack([(axis == k) * sign for k in range(3)], -1)
        mean, thickness = wall(rings)
        half = torch.cat([thickness, rings[..., 3:]], -1)

        def across(x: Tensor) -> tuple[Tensor, Tensor]:
            """(M, ., 3) -> distance from the middle of each ring, radially and along its axis, and radius."""
            radius = (x[..., 0] * x[..., 0] + x[..., 1] * x[..., 1]).clamp_min(1e-12).sqrt()[..., None]
            return torch.stack([radius - mean[..., 0], x[..., 2:] - rings[..., 0]], -1), radius

        offset, radius = across(local)
        ring_depth, axis, sign = _inside(offset, across(center)[0], half)
        radial = (axis == 0) * sign / radius
        ring_push = torch.stack([radial * local[..., :1], radial * local[..., 1:2], (axis == 1) * sign], -1)
        depth, push = (
            torch.cat([box_depth, ring_depth], -1),
            torch.cat([box_push, ring_push], -2),
        )  # (M, P, S), (..., 3)
        deepest, index = depth.flatten(1).max(1)
        pair = torch.arange(len(index), device=index.device)
        return deepest, apply(turn, push.flatten(1, 2)[pair, index]), own[pair, index // depth.shape[-1]]


def _inside(offset: Tensor, center: Tensor, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depth of points in box-like parts, 0 outside; the axis (...) and sign of the way out, which leads to a face beyond which
    the object's center is, or else to the nearest. All arguments are (..., k), relative to the middle of the part.
    """
    beyond = center.abs() > half
    beyond, offset, half = torch.broadcast_tensors(beyond | ~beyond.any(-1, keepdim=True), offset, half)
    sign = torch.where(center.abs() > half, center.sign(), torch.where(offset < 0, -1.0, 1.0))
    depth, axis = torch.where(beyond, half - sign * offset, _FAR).min(-1)
    within = (offset.abs() < half).all(-1)
    return torch.where(within, depth, 0.0), axis, sign.gather(-1, axis[..., None])[..., 0]


def _volume(part: Box | Ring) -> float:
    if isinstance(part, Box):
        return float(8 * np.prod(part.half))
    return float(2 * np.pi * (part.outer**2 - part.inner**2) * part.half_height)


def _square(x: Tensor) -> Tensor:
    return x[..., 0] * x[..., 0] + x[..., 1] * x[..., 1] + x[..., 2] * x[..., 2]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    (x, y, z), (u, v, w) = a.unbind(-1), b.unbind(-1)
    return torch.stack([y * w - z * v, z * u - x * w, x * v - y * u], -1)
