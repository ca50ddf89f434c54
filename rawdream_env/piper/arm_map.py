"""The arm map: where the commanded pose puts the arm in the picture, drawn without a renderer.

Actions are small changes of pose; a picture model has to integrate them before it knows where the arm is. Drawing the
commanded arm into the camera plane hands it that knowledge in its own coordinates (as World-Env's base model and
Ctrl-World do). On a small training budget it is the difference between an arm that dissolves and one that is right to
the end.

The same kinematics give the motion of the tool in the picture. Shifting the last context frame by that much shows the
model what a held object would look like now (the idea of warping the previous frame by predicted motions: Finn et al.
2016, "Unsupervised learning for physical interaction through video prediction"), so that carrying has to be recognised
rather than drawn anew.

Shape letters: B batch, F latent frames, S segments, R map resolution, H W latent height and width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rawdream_env.piper import geometry as piper
from rawdream_env.robots import ArmMapConfig, FloatArray

CHANNELS = 6
"""Links, hand, left finger, right finger, height of the tool, its shadow on the table."""

_POINT = {name: i for i, name in enumerate(piper.ARM_POINT_NAMES)}
_RADII = (0.032, 0.026, 0.026, 0.022, 0.009, 0.009)  # metres: upper arm, forearm, wrist, hand, left and right finger
_FINGER_LENGTH, _HAND_HALF_WIDTH, _HAND_HEIGHT, _SHADOW = 0.09, 0.04, 0.022, 0.02


class ArmMap:
    """The Piper's kinematics: integrates actions into commanded poses (see ``geometry``) and draws them."""

    state_dim = 7

    def __init__(self, config: ArmMapConfig = ArmMapConfig()) -> None:
        self.config = config
        self.camera = piper.Camera.of_numbers(config.camera) if config.camera else None
        middle = (piper.WORKSPACE_LOW + piper.WORKSPACE_HIGH) / 2
        half = (piper.WORKSPACE_HIGH - piper.WORKSPACE_LOW) / 2
        self._mid = torch.tensor([*middle, 0, 0, 0, 0], dtype=torch.float32)
        self._half = torch.tensor([*half, *piper.RPY_HIGH, 1], dtype=torch.float32)
        grid = torch.arange(config.resolution, dtype=torch.float32) + 0.5
        self._pixels = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).reshape(-1, 2)  # (R*R, 2): u, v

    def integrate(self, pose: Tensor, actions: Tensor) -> Tensor:
        """Commanded pose (B, 7) and actions (B, K, 7) -> poses after each action (B, K, 7), as the simulator does."""
        return torch.from_numpy(piper.integrate_actions(pose.numpy(), actions.numpy()).astype(np.float32))

    def normalise(self, poses: Tensor) -> Tensor:
        """Poses (..., 7) scaled to about [-1, 1] over the workspace."""
        return (poses - self._mid) / self._half

    def draw(self, poses: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """Poses (B, F, 4, 7) -> maps (B, F, 4 * 6 * (R/H) * (R/W), H, W) in [0, 1]."""
        b, f, n, _ = poses.shape
        r, (h, w) = self.config.resolution, latent_size
        flat = poses.reshape(-1, poses.shape[-1])
        maps = self._channels(flat)  # (N, 6, R, R)
        folded = F.pixel_unshuffle(maps, r // h) if r // h > 1 else maps
        assert folded.shape[-1] == w
        return folded.reshape(b, f, n * folded.shape[1], h, w)

    def motion(self, poses: Tensor, reference: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """How far the tool has moved in the picture since ``reference``, the pose before the chunk.

        ``poses`` (B, F, 4, 7), ``reference`` (B, F, 7) -> (B, F, 4): u, v at the first and at the last of a latent's four
        frames, in latent cells.
        """
        h, w = latent_size
        assert h == w
        stacked = torch.stack([reference, poses[:, :, 0], poses[:, :, -1]], 2)  # (B, F, 3, 7)
        tool = piper.arm_points(stacked.reshape(-1, 7).numpy().astype(np.float64))[:, _POINT["tool"]]
        place = torch.from_numpy(piper.project(tool, w, self.camera)[0].astype(np.float32)).view(*stacked.shape[:3], 2)
        return (place[:, :, 1:] - place[:, :, :1]).flatten(2)

    def tool(self, poses: FloatArray) -> FloatArray:
        """The tool point (..., 3) of poses (..., 7), in metres."""
        return poses[..., :3]

    def project(self, points: FloatArray, image_size: int) -> FloatArray:
        """Points (..., 3) in metres -> pixels (..., 2)."""
        return piper.project(points, image_size, self.camera)[0]

    def _channels(self, poses: Tensor) -> Tensor:
        pose = poses.numpy().astype(np.float64)
        points, r = piper.arm_points(pose), self.config.resolution
        rotation = piper.tool_rotation(pose)
        axis, side = rotation[..., :, 2], rotation[..., :, 1]

        def at(name: str) -> np.ndarray:
            return points[:, _POINT[name]]

        hand = at("flange") + _HAND_HEIGHT * axis
        starts = [at("shoulder"), at("elbow"), at("wrist"), hand - _HAND_HALF_WIDTH * side]
        starts += [at(tip) - _FINGER_LENGTH * axis for tip in ("finger_left", "finger_right")]
        ends = [at("elbow"), at("wrist"), hand, hand + _HAND_HALF_WIDTH * side, at("finger_left"), at("finger_right")]
        a, depth_a = piper.project(np.stack(starts, 1), r, self.camera)
        b, depth_b = piper.project(np.stack(ends, 1), r, self.camera)
        focal = piper.focal_length(r, self.camera)
        radius = np.array(_RADII) * focal / np.maximum((depth_a + depth_b) / 2, 0.05)
        masks = self._capsules(*(torch.from_numpy(x.astype(np.float32)) for x in (a, b, radius)))  # (N, 6, R*R)
        foot, foot_depth = piper.project(at("tool") * np.array([1.0, 1.0, 0.0]), r, self.camera)
        spread = torch.from_numpy((_SHADOW * focal / foot_depth).astype(np.float32))[:, None]
        offset = self._pixels[None] - torch.from_numpy(foot.astype(np.float32))[:, None]
        shadow = torch.exp(-0.5 * offset.square().sum(-1) / spread.square())
        height = (poses[:, 2:3] - float(piper.WORKSPACE_LOW[2])) / float(
            piper.WORKSPACE_HIGH[2] - piper.WORKSPACE_LOW[2]
        )
        gripper = masks[:, 3:].amax(1)
        stacked = [masks[:, :2].amax(1), masks[:, 2:4].amax(1), masks[:, 4], masks[:, 5], gripper * height, shadow]
        return torch.stack(stacked, 1).view(-1, CHANNELS, r, r)

    def _capsules(self, a: Tensor, b: Tensor, radius: Tensor) -> Tensor:
        """Soft masks (N, S, R*R) of segments ``a``-``b`` (N, S, 2) with ``radius`` (N, S), all in pixels."""
        along = b - a
        length2 = along.square().sum(-1, keepdim=True).clamp(min=1e-6)
        du = self._pixels[:, 0] - a[..., 0:1]
        dv = self._pixels[:, 1] - a[..., 1:2]
        t = ((du * along[..., 0:1] + dv * along[..., 1:2]) / length2).clamp(0, 1)
        distance = torch.hypot(du - t * along[..., 0:1], dv - t * along[..., 1:2])
        return torch.sigmoid((radius[..., None] - distance) / self.config.softness)
