"""The state of B imagined episodes in a scene world model.

Shape letters: B rows, O objects of the robot's scene, P command dims, C H W the painter's canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rawdream_env.world_models.row_state import RowState


@dataclass(frozen=True)
class SceneState(RowState):
    """B episodes, in the world frame: metres, radians, seconds. Values of absent objects mean nothing."""

    position: Tensor  # (B, O, 3)
    rotation: Tensor  # (B, O, 3, 3)
    velocity: Tensor  # (B, O, 6): linear, angular
    present: Tensor  # bool (B, O)
    arm: Tensor  # (B, 8): measured tool xyz, roll pitch yaw, finger positions
    arm_before: Tensor  # (B, 8): one frame earlier
    command: Tensor  # (B, P): commanded pose
    heights: Tensor  # (B, O, 2): of the objects' origins at the start, and the highest so far
    canvas: Tensor  # (B, C, H, W): what the painter needs of the start picture

    @property
    def finite(self) -> Tensor:
        """bool (B,): whether every number of a row is finite."""
        values = [self.position, self.rotation, self.velocity, self.arm, self.command]
        return torch.stack([torch.isfinite(x).flatten(1).all(1) for x in values]).all(0)
