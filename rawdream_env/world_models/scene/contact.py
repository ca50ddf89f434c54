"""Contact between objects, from their shapes.

What two objects do to each other follows from where their surfaces touch, not from which objects they are. So the network
is shown contact points: points of one object's surface near the other's, with the gap, the direction in which it pushes and
the lever arms. It has then seen contacts like those of two objects that never touched in its data, such as a pot on a stove.

Distances are exact for shapes made of boxes and rings (``robots.Box``, ``robots.Ring``), negative inside.

Shape letters: B rows, N objects of a row, E = N (N - 1) ordered pairs, M unordered pairs, P points of a shape, Q contact
points, S parts of a shape, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.robots import Box, FloatArray, Ring
from rawdream_env.world_models.scene.rotations import apply

_SPACING = 0.015
"""Distance of contact points along an edge (m), about; an edge has 2 to 6."""
_SLENDER = 0.01
"""A box is slender if both its half extents across are at most this (m)."""
_SLENDER_POINTS = 40
"""At most so many points along the edge of a slender box."""
_ANGLES = 10
_REACH = 0.012
"""A contact point counts from this gap on (m), more the smaller it is."""
_POINTS_AT_ONCE = 512
"""Contact points that inference on a CPU computes at once, fillers included: always the same number, so that a point is rounded
alike among any others.
"""
_FEATURES = 16
_FAR = 1.0

Shape = Sequence[Box | Ring]


def contact_points(shape: Shape, slender_spacing: float = _SPACING) -> FloatArray:
    """Points (P, 3) on the edges of a shape, and the middles of its faces.

    ``slender_spacing``: distance (m), about, of the points along slender boxes.
    """
    points = []
    for part in shape:
        if isinstance(part, Box):
            half = np.asarray(part.half)
            counts = [min(6, max(2, round(2 * h / _SPACING) + 1)) for h in half]
            for axis in range(3):
                if slender_spacing < _SPACING and np.delete(half, axis).max() <= _SLENDER:
                    counts[axis] = max(counts[axis], min(_SLENDER_POINTS, round(2 * half[axis] / slender_spacing) + 1))
            axes = [np.linspace(-h, h, n) for h, n in zip(half, counts, strict=True)]
            lattice = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
            edges = lattice[(np.abs(lattice) > half - 1e-9).sum(-1) >= 2]
            faces = np.concatenate([np.diag(half), -np.diag(half)])
            points.append(np.concatenate([edges, faces]) + part.center)
        else:
            angle = np.linspace(0, 2 * np.pi, _ANGLES, endpoint=False)
            circle = np.stack([np.cos(angle), np.sin(angle)], -1)
            radius = (part.inner + part.outer) / 2 if part.inner > 0 else part.outer
            for height in (part.z - part.half_height, part.z + part.half_height):
                points.append(np.concatenate([radius * circle, np.full((_ANGLES, 1), height)], -1))
                if part.inner == 0:
                    points.append(np.array([[0.0, 0.0, height]]))
    return np.concatenate(points)


class ContactNetwork(nn.Module):
    """What every object of a scene feels from every other, as a vector for each ordered pair.

    Args:
        shapes: of the robot's objects.
        fixed: bool (O,): objects that never move.
        width: D.
        slender_spacing: see :func:`contact_points`.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        fixed: Tensor,
        width: int,
        hidden: int = 48,
        *,
        slender_spacing: float = _SPACING,
    ) -> None:
        super().__init__()
        clouds = [contact_points(shape, slender_spacing) for shape in shapes]
        most = max(map(len, clouds))
        points = np.zeros((len(shapes), most, 3), np.float32)
        real = np.zeros((len(shapes), most), bool)
        for i, cloud in enumerate(clouds):
            points[i, : len(cloud)], real[i, : len(cloud)] = cloud, True
        boxes, rings = part_tables(shapes)
        radius = np.array([np.linalg.norm(cloud, axis=-1).max() for cloud in clouds], np.float32)
        tables = {"points": points, "real": real, "boxes": boxes, "rings": rings, "radius": radius}
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)
        self.register_buffer("fixed", fixed, persistent=False)
        self.points: Tensor
        self.real: Tensor
        self.boxes: Tensor
        self.rings: Tensor
        self.radius: Tensor
        self.fixed: Tensor
        self.point_net = nn.Sequential(nn.Linear(_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.out = nn.Linear(hidden + 2, width)

    def forward(self, which: Tensor, place: Tensor, rotation: Tensor, velocity: Tensor) -> Tensor:
        """Objects (B, N), centres (B, N, 3), rotations (B, N, 3, 3), velocities (B, N, 6: linear, angular), all in one frame
        -> (B, E, D), pairs ordered by the first object, which feels, then the second.
        """
        b, n = which.shape
        lower, upper = [], []
        for i in range(n):
            for j in range(i + 1, n):
                lower.append(i)
                upper.append(j)
        near = self._near(which, place, rotation, lower, upper)
        row, pair = near.nonzero(as_tuple=True)  # (M,)
        ends = torch.tensor([lower, upper], device=which.device).T[pair]  # (M, 2)
        index = row[:, None]
        felt = self._pairs(which[index, ends], place[index, ends], rotation[index, ends], velocity[index, ends])
        order = torch.full((n, n), -1)
        order[~torch.eye(n, dtype=torch.bool)] = torch.arange(n * (n - 1))
        order = order.to(which.device)
        out = felt.new_zeros(b, n * (n - 1), felt.shape[-1])
        out[row, order[ends[:, 0], ends[:, 1]]] = felt[:, 0]
        out[row, order[ends[:, 1], ends[:, 0]]] = felt[:, 1]
        pairs: Tensor = self.out(torch.cat([out, self._second(which)], -1))
        return pairs

    @torch.no_grad()
    def _near(self, which: Tensor, place: Tensor, rotation: Tensor, lower: list[int], upper: list[int]) -> Tensor:
        """Pairs (B, M) that may touch; outside training all, so that every row is computed alike."""
        if not self.training:
            return torch.ones(len(which), len(lower), dtype=torch.bool, device=which.device)
        near = torch.ones(len(which), len(lower), dtype=torch.bool, device=which.device)
        for mine, other in ((lower, upper), (upper, lower)):
            local = apply(rotation[:, other].transpose(-1, -2), place[:, mine] - place[:, other])
            near &= self.distance(which[:, other], local[:, :, None])[0][..., 0] < self.radius[which[:, mine]] + _REACH
        return near

    def _second(self, which: Tensor) -> Tensor:
        """Whether the second object of each ordered pair is fixed, and its size: (B, E, 2)."""
        n = which.shape[1]
        second = [j for i in range(n) for j in range(n) if i != j]
        other = which[:, second]
        return torch.stack([self.fixed[other].float(), self.radius[other] * 20], -1)

    def _pairs(self, which: Tensor, place: Tensor, rotation: Tensor, velocity: Tensor) -> Tensor:
        """What the two objects of M pairs feel, (M, 2, hidden); all arguments are (M, 2, ...)."""
        own = apply(rotation[:, :, None], self.points[which]) + place[:, :, None]  # (M, 2, P, 3)
        other = which.flip(1)
        turned = rotation.flip(1)[:, :, None]
        local = apply(turned.transpose(-1, -2), own - place.flip(1)[:, :, None])
        gap, normal = self.distance(other, local)
        normal = apply(turned, normal)
        gap = torch.where(self.real[which], gap, _FAR)
        # Each object feels its own points on the other, then the other's points on it, which push the other way.
        gaps = torch.stack([gap, gap.flip(1)], 2)  # (M, 2, 2, P)
        near = (gaps < _REACH).nonzero()  # (Q, 4): contact points; from further away nothing is felt
        exact = not self.training and near.device.type == "cpu"
        summed = gaps.new_zeros(len(which) * 2, self.out.in_features - 2)
        for block in near.split(_POINTS_AT_ONCE) if exact else [near]:
            filled = F.pad(block, (0, 0, 0, -len(block) % _POINTS_AT_ONCE)) if exact else block
            felt = self._felt(filled, gaps, own, normal, place, velocity)[: len(block)]
            summed = summed.to(felt.dtype).index_add(0, block[:, 0] * 2 + block[:, 1], felt)
        out: Tensor = summed.unflatten(0, (-1, 2))
        return out

    def _felt(
        self, points: Tensor, gaps: Tensor, own: Tensor, normal: Tensor, place: Tensor, velocity: Tensor
    ) -> Tensor:
        """What each contact point (Q, 4: pair, object that feels, side, point) adds, (Q, hidden)."""
        pair, mine, side, point = points.unbind(1)
        whose = (mine + side) % 2
        at, push = own[pair, whose, point], normal[pair, whose, point] * (1 - 2 * side[:, None])
        lever, far_lever = at - place[pair, mine], at - place[pair, 1 - mine]
        speed = _speed(velocity[pair, 1 - mine], far_lever) - _speed(velocity[pair, mine], lever)
        gap = gaps[pair, mine, side, point][:, None]
        close = [gap.clamp(max=0.05) * 50, (gap / 0.002).tanh(), (gap / 0.0006).tanh()]
        features = torch.cat(
            [lever * 30, far_lever * 30, push, *close, speed.clamp(-2, 2) * 3, side[:, None].to(gap.dtype)], -1
        )
        felt: Tensor = self.point_net(features) * (0.2 * (1 - gap / _REACH).clamp(0, 1).square())
        return felt

    def distance(self, which: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Signed distance (m) of points (M, 2, P, 3), in the objects' own frames, to the shapes of objects (M, 2), and the
        direction in which it grows.
        """
        boxes, rings = self.boxes[which][:, :, None], self.rings[which][:, :, None]  # (M, 2, 1, S, 6 | 4)
        offset = points[..., None, :] - boxes[..., :3]
        box_gap, box_normal = _outside(offset.abs() - boxes[..., 3:], offset.sign())
        flat = points[..., None, :2]
        radius = flat.square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt()
        middle, half = wall(rings)
        across, along = radius - middle, points[..., None, 2:] - rings[..., :1]
        beyond = torch.cat([across.abs() - half, along.abs() - rings[..., 3:]], -1)
        ring_gap, normal = _outside(beyond, torch.cat([across.sign(), along.sign()], -1))
        ring_normal = torch.cat([normal[..., :1] * flat / radius, normal[..., 1:]], -1)
        gap, normal = torch.cat([box_gap, ring_gap], -1), torch.cat([box_normal, ring_normal], -2)
        nearest = gap.argmin(-1, keepdim=True)
        normal = normal.gather(-2, nearest[..., None].expand(*nearest.shape, 3))
        return gap.gather(-1, nearest)[..., 0], normal[..., 0, :]


def _outside(beyond: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to a box and its gradient from the excess (..., k) over each half extent."""
    out = beyond.clamp_min(0)
    distance = out.square().sum(-1).clamp_min(1e-14).sqrt()
    deepest = beyond.amax(-1)
    inside = deepest <= 0
    face = (beyond == deepest[..., None]).to(sign.dtype) * sign
    normal = torch.where(inside[..., None], face, out / distance[..., None] * sign)
    return torch.where(inside, deepest, distance), normal


def _speed(velocity: Tensor, lever: Tensor) -> Tensor:
    """Velocity (Q, 3) of points at ``lever`` (Q, 3) of bodies with ``velocity`` (Q, 6)."""
    speed: Tensor = velocity[:, :3] + torch.linalg.cross(velocity[:, 3:], lever)
    return speed


def wall(rings: Tensor) -> tuple[Tensor, Tensor]:
    """Middle radius and half thickness (..., 1) of the walls of rings (..., 4); of a disc: 0 and its radius."""
    inner, outer = rings[..., 1:2], rings[..., 2:3]
    return (inner + outer) / 2 * (inner > 0), torch.where(inner > 0, (outer - inner) / 2, outer)


def part_tables(shapes: Sequence[Shape]) -> tuple[FloatArray, FloatArray]:
    """Boxes (O, S, 6): centre, half extents. Rings (O, S', 4): z, inner and outer radius, half height. Fillers are far away."""
    boxes = [[(*part.center, *part.half) for part in shape if isinstance(part, Box)] for shape in shapes]
    rings = [[(p.z, p.inner, p.outer, p.half_height) for p in shape if isinstance(p, Ring)] for shape in shapes]
    box_table = np.full((len(shapes), max(1, *map(len, boxes)), 6), 1e-3, np.float32)
    ring_table = np.full((len(shapes), max(1, *map(len, rings)), 4), 1e-3, np.float32)
    box_table[..., :3], ring_table[..., 0] = 50.0, 50.0
    for i, (b, r) in enumerate(zip(boxes, rings, strict=True)):
        box_table[i, : len(b)] = np.array(b, np.float32).reshape(-1, 6)
        ring_table[i, : len(r)] = np.array(r, np.float32).reshape(-1, 4)
    return box_table, ring_table
