"""The kinematics of a world model's robot: loaded by the robot's name, drawn into the transformer's map tensor.

Shape letters: B batch, F latent frames, P pose dims, C_m map channels, H W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rawdream_env.robots import ArmMapConfig, Kinematics, find_robot


def load_kinematics(robot: str, config: ArmMapConfig | None) -> Kinematics | None:
    """The kinematics of ``robot`` (empty: the default robot); None without an arm map.

    Raises:
        InvalidOptionError: the robot is not registered or has no kinematics.
    """
    if config is None:
        return None
    kinematics: Kinematics = find_robot(robot).load("kinematics")(config)
    return kinematics


def draw_maps(
    arm_map: Kinematics, poses: Tensor, before: Tensor, latent_size: tuple[int, int], *, motion: bool
) -> Tensor:
    """The map tensor of ``WanConfig``: the arm map and, with ``motion``, the tool's motion in every cell.

    ``poses`` (B, F, 4, P), ``before`` (B, F, P) the pose before each frame's chunk -> (B, F, C_m, H, W).
    """
    maps = arm_map.draw(poses, latent_size)
    if not motion:
        return maps
    moved = arm_map.motion(poses, before, latent_size)[..., None, None]
    return torch.cat([maps, moved.expand(-1, -1, -1, *latent_size)], 2)
