"""Paints pictures of a scene's state. Each picture is made from the start picture and the maps of the state it shows, never
from an earlier painted picture, so nothing fades or drifts.

Shape letters: B rows, S picture size, C map channels, W features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.errors import InvalidOptionError
from rawdream_env.world_models.scene.layers import Block, exact_rows
from rawdream_env.world_models.scene.maps import FOLD


@dataclass(frozen=True)
class PainterConfig:
    """Architecture of the painter."""

    image_size: int = 64
    """Height and width in pixels; a multiple of 4."""
    map_channels: int = 62
    """Channels of the scene's maps, ``SceneMaps.channels``."""
    widths: tuple[int, int] = (48, 96)
    """Channels at 1/2 and 1/4 resolution; multiples of 8."""
    blocks: tuple[int, int] = (2, 2)
    """Residual blocks at 1/2 (half of them after the coarse ones) and 1/4 resolution."""

    def check(self) -> None:
        """Raise ``InvalidOptionError`` for sizes that no layer can have."""
        if self.image_size % 4 or not 8 <= self.image_size <= 1024:
            raise InvalidOptionError(f"image_size {self.image_size} must be a multiple of 4 from 8 to 1024.")
        if any(w % 8 or not 8 <= w <= 4096 for w in self.widths) or not 1 <= self.map_channels <= 4096:
            raise InvalidOptionError(
                f"widths {self.widths} must be multiples of 8 up to 4096, map_channels {self.map_channels} from 1 to 4096."
            )
        if any(not 0 <= n <= 100 for n in self.blocks):
            raise InvalidOptionError(f"blocks {self.blocks} must be from 0 to 100.")


class ScenePainter(nn.Module):
    """(start picture and its maps) -> canvas, once an episode; (canvas, maps) -> picture, for each picture.

    A picture is a learned background, blended with the start picture where that still holds, plus what is painted over.
    """

    def __init__(self, config: PainterConfig = PainterConfig()) -> None:
        super().__init__()
        config.check()
        self.config = config
        (w, deep), (fine, coarse), c = config.widths, config.blocks, config.map_channels
        side = config.image_size // FOLD
        self.background = nn.Parameter(torch.zeros(3, config.image_size, config.image_size))
        self.place = nn.Parameter(torch.zeros(w, side, side))
        self.start_in = nn.Conv2d(3 * FOLD**2 + c, w, 3, padding=1)
        self.start_block = Block(w)
        self.maps_in = nn.Conv2d(c, w, 3, padding=1)
        self.before = nn.ModuleList(Block(w) for _ in range(fine - fine // 2))
        self.down = nn.Conv2d(w, deep, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList(Block(deep) for _ in range(coarse))
        self.up = nn.Conv2d(deep, w, 1)
        self.after = nn.ModuleList(Block(w) for _ in range(fine // 2))
        self.out = nn.Conv2d(w, 4 * FOLD**2, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def start(self, frames: Tensor, maps: Tensor) -> Tensor:
        """Start pictures uint8 (B, S, S, 3) and their maps (B, C, S/2, S/2) -> canvas (B, W + 12, S/2, S/2): features of
        the start, and the picture itself.

        Raises:
            ValueError: another shape or type.
        """
        size = self.config.image_size
        if frames.dtype != torch.uint8 or frames.shape[1:] != (size, size, 3):
            raise ValueError(f"frames must be uint8 (B, {size}, {size}, 3), got {frames.dtype} {tuple(frames.shape)}")
        return exact_rows(self._start, self.place, frames, self._checked(maps, len(frames)))[0]

    def forward(self, canvas: Tensor, maps: Tensor) -> Tensor:
        """Canvas (B, W + 12, S/2, S/2) and the maps (B, C, S/2, S/2) of the state to paint -> pictures (B, 3, S, S), float,
        nominally in [-1, 1].
        """
        return F.pixel_shuffle(self._folded(canvas, maps), FOLD)

    def _folded(self, canvas: Tensor, maps: Tensor) -> Tensor:
        """The pictures of ``forward``, folded: (B, 12, S/2, S/2)."""
        return exact_rows(self._forward, self.place, canvas, self._checked(maps, len(canvas)))[0]

    def _start(self, frames: Tensor, maps: Tensor) -> tuple[Tensor]:
        folded = F.pixel_unshuffle(to_signed(frames), FOLD).to(self.place.dtype)
        x = torch.cat([folded, maps], 1).contiguous(memory_format=torch.channels_last)
        return (torch.cat([self.start_block(self.start_in(x) + self.place), folded], 1),)

    def _forward(self, canvas: Tensor, maps: Tensor) -> tuple[Tensor]:
        start, still = canvas[:, : self.config.widths[0]], canvas[:, self.config.widths[0] :]
        x = self.maps_in(maps.contiguous(memory_format=torch.channels_last))
        x = x + start.contiguous(memory_format=torch.channels_last)
        for block in self.before:
            x = block(x)
        y = self.down(x)
        for block in self.coarse:
            y = block(y)
        x = x + F.interpolate(self.up(y), scale_factor=2.0)
        for block in self.after:
            x = block(x)
        # Colours and the share of the start picture that is kept, for each of the FOLD x FOLD pixels.
        *colours, kept = self.out(x).float().split(FOLD**2, 1)
        background = F.pixel_unshuffle(self.background.float(), FOLD)
        kept = kept.sigmoid().repeat(1, 3, 1, 1)
        return (background + kept * (still.float() - background) + torch.cat(colours, 1),)

    def paint(self, canvas: Tensor, maps: Tensor) -> Tensor:
        """``forward`` as pictures uint8 (B, S, S, 3)."""
        folded = ((self._folded(canvas, maps).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return F.pixel_shuffle(folded, FOLD).permute(0, 2, 3, 1)

    def _checked(self, maps: Tensor, rows: int) -> Tensor:
        side = self.config.image_size // FOLD
        if maps.shape != (rows, self.config.map_channels, side, side):
            raise ValueError(
                f"maps must have shape ({rows}, {self.config.map_channels}, {side}, {side}), got {tuple(maps.shape)}"
            )
        return maps.to(self.place.dtype)


def to_signed(frames: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1
