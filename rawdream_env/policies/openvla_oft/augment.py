"""Image augmentation of supervised training, as upstream: a random crop of area 0.9, then color jitter.

At evaluation the centre crop of area 0.9 takes the place of the random one (``images.centre_crop``). Two differences:
upstream draws a crop's two offsets from one seed, so that its crops lie on the image's diagonal, here they are independent;
and saturation and hue change in one pass through HSV.

Shape letters: B rows, C channels, H W image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rawdream_env.policies.openvla_oft.images import CROP_AREA

BRIGHTNESS, HUE = 0.2, 0.05
"""Largest offsets, of colors in [0, 1] and of the hue in turns."""
CONTRAST = SATURATION = (0.8, 1.2)
"""Ranges of factors."""


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Resized images uint8 (B, H, W, 3) -> the same shape, each with its own crop and colors from ``rng``."""

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (len(images), 1, 1, 1)).astype(np.float32)).to(images.device)

    side = float(np.sqrt(CROP_AREA))
    pixels = images.permute(0, 3, 1, 2).float() / 255
    pixels = crop(pixels, draw(0, 1 - side), draw(0, 1 - side), side)
    pixels = (pixels + draw(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 1)
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    pixels = ((pixels - mean) * draw(*CONTRAST) + mean).clamp(0, 1)
    pixels = shift_colors(pixels, draw(*SATURATION), draw(-HUE, HUE))
    return (pixels * 255).to(torch.uint8).permute(0, 2, 3, 1)  # upstream's conversion cuts off as well


def crop(pixels: Tensor, top: Tensor, left: Tensor, side: float) -> Tensor:
    """Squares of ``pixels`` (B, C, H, W), enlarged to (H, W) by bilinear samples from edge to edge.

    ``top``, ``left`` (B, 1, 1, 1) and ``side`` are shares of the image.
    """
    height, width = (torch.linspace(0, side, size, device=pixels.device) for size in pixels.shape[2:])
    y = (top[..., 0] + height[:, None]).expand(-1, -1, len(width))
    x = (left[..., 0] + width).expand(-1, len(height), -1)
    places = torch.stack([x, y], dim=-1) * 2 - 1
    return F.grid_sample(pixels, places, mode="bilinear", padding_mode="border", align_corners=True)


def shift_colors(pixels: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Colors in [0, 1] (B, 3, H, W) with the saturation multiplied and the hue turned, both (B, 1, 1, 1)."""
    red, green, blue = pixels.split(1, dim=1)
    value = pixels.amax(1, keepdim=True)
    chroma = value - pixels.amin(1, keepdim=True)
    safe = chroma.clamp(min=1e-12)
    sector = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sector = torch.where(value == red, (green - blue) / safe, sector) + 6 * hue
    chroma = torch.minimum(chroma * saturation, value)  # the saturation is at most 1
    place = (sector + torch.tensor([5.0, 3.0, 1.0], device=pixels.device).view(1, 3, 1, 1)) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
