"""Reads object states from a start picture: which objects are there, where, and how they are turned.

Coarse to fine: a map of every object over the whole picture finds its cell; a window of pixels and features around that
cell gives the offset from it in the picture, the height and the rotation. The camera turns these into a position.

Shape letters: B rows, O objects, S picture size, h cells of a side (S/2), K cells of a window, W features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.errors import InvalidOptionError
from rawdream_env.robots import find_robot
from rawdream_env.world_models.scene.layers import Block, exact_rows
from rawdream_env.world_models.scene.maps import FOLD, unproject


@dataclass(frozen=True)
class ReaderConfig:
    """Architecture of the reader."""

    image_size: int = 64
    """Height and width in pixels; a multiple of 4."""
    objects: int = 7
    """Objects of the robot's scene."""
    robot: str = ""
    """Name of the robot, whose scene has the camera; empty: the default robot."""
    widths: tuple[int, int] = (32, 64)
    """Channels at 1/2 and 1/4 resolution; multiples of 8."""
    window: int = 14
    """Cells (two pixels) of the window's side; even. An object should fit into it."""
    window_width: int = 48
    """Channels of the convolutions in the window."""
    hidden: int = 128
    """Width of each object's read-out."""

    def check(self) -> None:
        """Raise ``InvalidOptionError`` for sizes that no layer can have."""
        if self.image_size % 4 or not 8 <= self.image_size <= 1024:
            raise InvalidOptionError(f"image_size {self.image_size} must be a multiple of 4 from 8 to 1024.")
        if any(w % 8 or not 8 <= w <= 4096 for w in (*self.widths, self.window_width, self.hidden)):
            raise InvalidOptionError(
                f"widths {self.widths}, window_width {self.window_width} and hidden {self.hidden} must be multiples of 8."
            )
        if self.window % 2 or not 2 <= self.window <= self.image_size // FOLD or not 1 <= self.objects <= 1000:
            raise InvalidOptionError(
                f"window {self.window} must be even and at most {self.image_size // FOLD}, objects {self.objects} positive."
            )


@dataclass(frozen=True)
class Reading:
    """What a picture shows; for absent objects only ``present`` means something."""

    present: Tensor
    """(B, O): logit of being there."""
    position: Tensor
    """(B, O, 3) in metres."""
    rotation: Tensor
    """(B, O, 3, 3); the canonical one where several look the same."""
    position_std: Tensor
    """(B, O, 3): expected error in metres."""
    rotation_std: Tensor
    """(B, O): expected error in radians."""
    heat: Tensor
    """(B, O, h, h): log probability of the object's cell."""


class SceneReader(nn.Module):
    """Start pictures uint8 (B, S, S, 3) -> ``Reading``."""

    def __init__(self, config: ReaderConfig = ReaderConfig()) -> None:
        super().__init__()
        config.check()
        self.config = config
        (w, deep), o, side = config.widths, config.objects, config.image_size // FOLD
        camera = torch.tensor(np.asarray(find_robot(config.robot).load("scene").camera, np.float32))
        self.register_buffer("camera", camera, persistent=False)
        self.camera: Tensor
        self.place = nn.Parameter(torch.zeros(w, side, side))
        self.stem = nn.Sequential(nn.Conv2d(3 * FOLD**2, w, 3, padding=1), nn.SiLU(), Block(w))
        self.down = nn.Conv2d(w, deep, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(Block(deep), Block(deep))
        self.up = nn.Conv2d(deep, w, 1)
        self.fine = nn.Sequential(Block(w), nn.GroupNorm(8, w), nn.SiLU())
        self.heat = nn.Conv2d(w, o, 1)
        self.present = nn.Parameter(torch.randn(o, w + 1) * w**-0.5)
        self.present_bias = nn.Parameter(torch.zeros(o))
        self.identity = nn.Parameter(torch.randn(o, config.window_width) * 0.1)
        v = config.window_width
        self.window_in = nn.Conv2d(3 * FOLD**2 + w, v, 3, padding=1)
        self.window_down = nn.Conv2d(v, v, 3, stride=2, padding=1)
        numbers = v * ((config.window + 1) // 2) ** 2
        self.read1 = nn.Parameter(torch.randn(o, numbers, config.hidden) * numbers**-0.5)
        self.read1_bias = nn.Parameter(torch.zeros(o, config.hidden))
        self.read2 = nn.Parameter(torch.randn(o, config.hidden, 9) * 0.1 * config.hidden**-0.5)
        self.read2_bias = nn.Parameter(torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 1, 0]).repeat(o, 1))
        self.doubt = nn.Parameter(torch.zeros(o, config.hidden, 4))
        self.doubt_bias = nn.Parameter(torch.zeros(o, 4))

    def forward(self, frames: Tensor, wanted: Tensor | None = None) -> Reading:
        """Read pictures. ``wanted`` bool (B, O): the objects whose position and rotation are needed; None: all. In training it
        saves the work for absent ones.

        Raises:
            ValueError: another shape or type.
        """
        size = self.config.image_size
        if frames.dtype != torch.uint8 or frames.shape[1:] != (size, size, 3):
            raise ValueError(f"frames must be uint8 (B, {size}, {size}, 3), got {frames.dtype} {tuple(frames.shape)}")
        if wanted is None:
            wanted = torch.ones(len(frames), self.config.objects, dtype=torch.bool, device=frames.device)
        return Reading(*exact_rows(self._read, self.place, frames, wanted))

    def _read(self, frames: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        folded = F.pixel_unshuffle(frames.permute(0, 3, 1, 2).float() / 127.5 - 1, FOLD)
        folded = folded.contiguous(memory_format=torch.channels_last)
        x = self.stem(folded) + self.place
        y = self.coarse(self.down(x))
        x = self.fine(x + F.interpolate(self.up(y), scale_factor=2.0))
        heat = self.heat(x).float().flatten(2)  # (B, O, h * h)
        logs = heat.log_softmax(-1)
        pooled = logs.exp() @ x.float().flatten(2).transpose(1, 2)
        present = (torch.cat([pooled, heat.amax(-1, keepdim=True)], -1) * self.present).sum(-1) + self.present_bias
        best, side = heat.argmax(-1), x.shape[-1]
        cells = torch.stack([best % side, best // side], -1)  # (B, O, 2): u, v
        hidden = self._look(torch.cat([folded.to(x.dtype), x], 1), cells, wanted)
        numbers = _per_object(hidden, self.read2) + self.read2_bias
        doubt = (_per_object(hidden.detach(), self.doubt) + self.doubt_bias).clamp(-5, 5).exp()
        return (
            present,
            unproject(self.camera, (cells + 0.5 + numbers[..., :2]) / side, numbers[..., 2] * 0.1),
            rotation_from_columns(numbers[..., 3:]),
            doubt[..., :3] * 1e-3,
            doubt[..., 3] * 1e-2,
            logs.unflatten(-1, (side, side)),
        )

    def _look(self, features: Tensor, cells: Tensor, wanted: Tensor) -> Tensor:
        """Features (B, C, h, h) around the cells (B, O, 2) of the wanted objects (B, O) -> (B, O, hidden)."""
        k = self.config.window
        padded = F.pad(features, (k // 2,) * 4).permute(0, 2, 3, 1)
        row, which = wanted.nonzero(as_tuple=True)  # (M,)
        offsets = torch.arange(k, device=cells.device)
        columns, rows = (cells[row, which, i, None] + offsets for i in (0, 1))  # (M, K)
        windows = padded[row[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
        x = self.window_in(windows) + self.identity[which][..., None, None]
        x = F.silu(self.window_down(F.silu(x))).float().flatten(1)
        seen = x.new_zeros(*wanted.shape, x.shape[-1]).index_put((row, which), x)
        return F.silu(_per_object(seen, self.read1) + self.read1_bias)


def _per_object(x: Tensor, weight: Tensor) -> Tensor:
    """An own linear layer for each object: (B, O, D), (O, D, D') -> (B, O, D') in fp32: millimetres need it."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("bod,ode->boe", x.float(), weight.float())


def rotation_from_columns(columns: Tensor) -> Tensor:
    """Six numbers (..., 6), roughly the first two columns of a rotation, -> the rotation (..., 3, 3)."""
    x = F.normalize(columns[..., :3], dim=-1)
    y = F.normalize(columns[..., 3:] - (x * columns[..., 3:]).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y, dim=-1)], -1)
