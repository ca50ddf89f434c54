"""Maps of a scene's state in the camera plane: where every object is, how high, and where the arm is.

An object map is made of the projected points of the object's surface, each spread over the four nearest pixels, so that
it moves smoothly with the object. Row i of a result depends on row i of the state alone, bit for bit.

Shape letters: B rows, O objects, P surface points, M objects that are present, S picture size, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rawdream_env.robots import ArmMapConfig, FloatArray, Kinematics, Scene, find_robot

FOLD = 2
"""Maps are drawn at picture size and folded by this into channels; indices are computed for 2."""
_PER_OBJECT = 2 * FOLD**2
_HEIGHT_SCALE = 8.0
"""A height of 0.125 m is 1 in the map."""


class SceneMaps:
    """Draws the maps of a robot's scene for pictures of ``image_size`` pixels.

    Raises:
        InvalidOptionError: the robot has no scene or no kinematics.
    """

    def __init__(self, robot: str = "", image_size: int = 64) -> None:
        found = find_robot(robot)
        self.scene: Scene = found.load("scene")
        self.kinematics: Kinematics = found.load("kinematics")(ArmMapConfig(resolution=image_size // FOLD))
        self.image_size = image_size
        self._surface = _float(self.scene.surface).transpose(1, 2).contiguous()  # (O, 3, P)
        self._camera = [[float(value) for value in row] for row in self.scene.camera]
        self.channels = _PER_OBJECT * len(self.scene.objects) + self._arm(torch.zeros(1, 7)).shape[1]

    def draw(self, position: Tensor, rotation: Tensor, present: Tensor, arm: Tensor) -> Tensor:
        """Positions (B, O, 3), rotations (B, O, 3, 3), ``present`` bool (B, O) and arm states (B, 7) -> maps
        (B, C, S/2, S/2), channels last in memory. Of every object: the share of a pixel it covers, then its mean height.
        """
        b, side, c = len(arm), self.image_size // FOLD, self.channels
        maps = torch.zeros(b, side, side, c)
        cells, weights, heights = self._splat(position, rotation, present)
        flat = maps.view(-1)
        covered = flat.scatter_add_(0, cells, weights)[cells]
        flat.scatter_(0, cells, covered.clamp(max=1))
        flat.scatter_add_(0, cells + FOLD**2, weights * heights / covered.clamp(min=1))
        maps[..., _PER_OBJECT * present.shape[1] :] = self._arm(arm).permute(0, 2, 3, 1)
        return maps.permute(0, 3, 1, 2)

    def cover(self, maps: Tensor) -> Tensor:
        """How far objects cover each pixel: maps (B, C, S/2, S/2) -> (B, 1, S, S) in [0, 1]."""
        objects = maps[:, : _PER_OBJECT * len(self.scene.objects)].unflatten(1, (-1, 2, FOLD**2))[:, :, 0]
        return F.pixel_shuffle(objects.amax(1), FOLD)

    def _arm(self, arm: Tensor) -> Tensor:
        side = self.image_size // FOLD
        return self.kinematics.draw(self.scene.arm_pose(arm)[:, None, None], (side, side))[:, 0]

    def _splat(self, position: Tensor, rotation: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each of the four pixels around each point: its index in the maps' memory, its weight, the scaled height."""
        row, which = present.nonzero(as_tuple=True)  # (M,)
        u, v, depth, height = self._project(position[row, which], rotation[row, which], self._surface[which])
        left, top = (u - 0.5).floor(), (v - 0.5).floor()
        front, side = depth > 0, self.image_size // FOLD
        columns = self._share(left, u - 0.5 - left, front, self.channels, 1)
        rows = self._share(top, v - 0.5 - top, front, side * self.channels, FOLD)
        first = (row * (side * side * self.channels) + which * _PER_OBJECT)[:, None]
        cells = torch.stack([first + y + x for y, _ in rows for x, _ in columns])
        weights = torch.stack([in_y * in_x for _, in_y in rows for _, in_x in columns])
        height = torch.where(front, height * _HEIGHT_SCALE, 0).expand(4, -1, -1)
        return cells.flatten(), weights.flatten(), height.flatten()

    def _share(self, near: Tensor, share: Tensor, front: Tensor, stride: int, step: int) -> list[tuple[Tensor, Tensor]]:
        """Along one axis, for pixels ``near`` and ``near + 1``: what they add to the index in memory, where the folded map
        has ``stride`` and a channel ``step``, and the weight, 0 outside the picture.
        """
        shares = []
        for pixel, weight in ((near, 1 - share), (near + 1, share)):
            seen = (pixel >= 0) & (pixel < self.image_size) & front
            at = torch.where(seen, pixel, 0).long()
            shares.append(((at >> 1) * stride + (at & 1) * step, torch.where(seen, weight, 0)))
        return shares

    def _project(self, position: Tensor, rotation: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points (M, 3, P) of objects at (M, 3), (M, 3, 3) -> pixels u and v, depth and height in metres, each (M, P).

        Only elementwise arithmetic: matrix products round differently depending on the number of rows.
        """
        x, y, z = (
            rotation[:, k, 0:1] * points[:, 0]
            + rotation[:, k, 1:2] * points[:, 1]
            + rotation[:, k, 2:3] * points[:, 2]
            + position[:, k : k + 1]
            for k in range(3)
        )
        uw, vw, w = (r[0] * x + r[1] * y + r[2] * z + r[3] for r in self._camera)
        return uw / w * self.image_size, vw / w * self.image_size, w, z


def project(camera: Tensor, points: Tensor) -> Tensor:
    """World points (..., 3) -> u and v (..., 2) in picture widths; ``camera`` (3, 4) as in ``Scene``."""
    uvw = (camera[:, :3] * points[..., None, :]).sum(-1) + camera[:, 3]
    return uvw[..., :2] / uvw[..., 2:]


def unproject(camera: Tensor, uv: Tensor, height: Tensor) -> Tensor:
    """Where the view rays through ``uv`` (..., 2) are at ``height`` (...) in metres: world points (..., 3)."""
    rows = camera[:2] - uv[..., None] * camera[2]  # (..., 2, 4): two planes through the ray
    a, b = rows[..., 0], rows[..., 1]
    c = -(rows[..., 2] * height[..., None] + rows[..., 3])
    det = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    x = (c[..., 0] * b[..., 1] - c[..., 1] * b[..., 0]) / det
    y = (a[..., 0] * c[..., 1] - a[..., 1] * c[..., 0]) / det
    return torch.stack([x, y, height], -1)


def canonical_rotation(rotation: Tensor, symmetry: Tensor) -> Tensor:
    """The rotation (..., O, 3, 3) with the smallest turn about z among those that look the same; ``symmetry`` (O,) as in
    ``Scene``.
    """
    yaw = torch.atan2(rotation[..., 1, 0], rotation[..., 0, 0])
    period = 2 * torch.pi / symmetry.clamp(min=1)
    turn = -torch.where(symmetry > 0, (yaw / period).round() * period, yaw)
    c, s, o = turn.cos(), turn.sin(), torch.zeros_like(turn)
    turned: Tensor = torch.stack([c, -s, o, s, c, o, o, o, o + 1], -1).unflatten(-1, (3, 3))
    return rotation @ turned


def _float(values: FloatArray) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
