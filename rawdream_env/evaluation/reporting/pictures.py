"""Borders and tiles for the films of the reports.

Shapes: F frames, H W height and width; all pictures uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from rawdream_env.types import UInt8Array


def upscale(frames: UInt8Array, factor: int) -> UInt8Array:
    """Nearest-neighbour enlargement of (..., H, W, 3) by a whole ``factor``."""
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def border(frames: UInt8Array, colour: tuple[int, int, int], width: int = 4) -> UInt8Array:
    """Frames (..., H, W, 3) with a coloured frame of ``width`` pixels around them (the picture grows)."""
    *lead, h, w, c = frames.shape
    out = np.empty((*lead, h + 2 * width, w + 2 * width, c), dtype=np.uint8)
    out[...] = np.array(colour, dtype=np.uint8)
    out[..., width : width + h, width : width + w, :] = frames
    return out


def pad_time(frames: UInt8Array, length: int) -> UInt8Array:
    """Repeat the last frame of (F, H, W, 3) up to ``length`` frames."""
    missing = length - len(frames)
    return frames if missing <= 0 else np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])


def beside(left: UInt8Array, right: UInt8Array, gap: int = 4, gap_level: int = 255) -> UInt8Array:
    """Two clips (F, H, W, 3) side by side; the shorter one holds its last frame."""
    length = max(len(left), len(right))
    a, b = pad_time(left, length), pad_time(right, length)
    gutter = np.full((length, a.shape[1], gap, 3), gap_level, dtype=np.uint8)
    return np.concatenate([a, gutter, b], axis=2)


def grid(cells: Sequence[Sequence[UInt8Array]], gap: int = 2, gap_level: int = 255) -> UInt8Array:
    """Tile rows of equally sized cells (..., H, W, 3) into one picture or clip with ``gap`` pixels between them."""
    rows = []
    for row in cells:
        parts: list[UInt8Array] = []
        for cell in row:
            if parts:
                parts.append(np.full((*cell.shape[:-2], gap, 3), gap_level, dtype=np.uint8))
            parts.append(cell)
        rows.append(np.concatenate(parts, axis=-2))
    stack: list[UInt8Array] = []
    for line in rows:
        if stack:
            stack.append(np.full((*line.shape[:-3], gap, line.shape[-2], 3), gap_level, dtype=np.uint8))
        stack.append(line)
    return np.concatenate(stack, axis=-3)


def headed(frames: UInt8Array, titles: Sequence[str], height: int = 16) -> UInt8Array:
    """Frames (..., H, W, 3) under a white strip of ``height`` pixels with ``titles`` spread evenly over the width."""
    strip = Image.new("RGB", (frames.shape[-2], height), "white")
    draw = ImageDraw.Draw(strip)
    for i, title in enumerate(titles):
        draw.text((frames.shape[-2] * i // len(titles) + 2, 2), title, fill="black")
    head = np.broadcast_to(np.asarray(strip, np.uint8), (*frames.shape[:-3], height, frames.shape[-2], 3))
    return np.concatenate([head, frames], axis=-3)
