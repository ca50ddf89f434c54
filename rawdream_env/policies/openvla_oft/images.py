"""OpenVLA's image pipeline without TensorFlow: JPEG round trip, Lanczos-3 to 224, centre crop of area 0.9, normalisation.

Policies were trained on images that went through TensorFlow's operations; another resize or a missing crop costs success.
Each resize is a few weighted taps per axis here, at TensorFlow's sampling positions and with its rounding. The
result is within 2 grey levels of TensorFlow's.

Frames are upright and as the environment shows them. Shape letters: B rows, H W frame.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rawdream_env.config import parse_workers
from rawdream_env.policies.openvla_oft.jpeg import round_trip
from rawdream_env.policies.openvla_oft.vision import IMAGE_SIZE
from rawdream_env.types import Float32Array, UInt8Array

CROP_AREA = 0.9
_MAX_THREADS = 8
Taps = tuple[NDArray[np.intp], Float32Array]
"""Indices (taps, 224) into an axis, and their weights."""
_MEAN = (0.485, 0.456, 0.406, 0.5, 0.5, 0.5)  # ImageNet's for DINOv2, then SigLIP's
_STD = (0.229, 0.224, 0.225, 0.5, 0.5, 0.5)


def prepare(frames: UInt8Array, *, crop: bool = True) -> UInt8Array:
    """Frames uint8 (B, H, W, 3) of any size -> what the policy sees, uint8 (B, 224, 224, 3); ``crop=False``: before the
    centre crop, which training replaces by random ones.
    """
    function = _prepare if crop else _resized
    workers = min(_MAX_THREADS, len(frames), parse_workers(-1))
    if workers <= 1:
        return np.stack([function(frame) for frame in frames])
    with ThreadPoolExecutor(workers) as pool:  # numpy computes without the interpreter's lock
        return np.stack(list(pool.map(function, frames)))


def _prepare(frame: UInt8Array) -> UInt8Array:
    return centre_crop(_resized(frame))


def _resized(frame: UInt8Array) -> UInt8Array:
    return lanczos(round_trip(frame))


def normalise(images: Tensor) -> Tensor:
    """Prepared images uint8 (B, 224, 224, 3) -> float32 (B, 6, 224, 224): channels for DINOv2, then for SigLIP."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 6, 1, 1) for values in (_MEAN, _STD))
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels.repeat(1, 2, 1, 1) - mean) / std


def lanczos(frame: UInt8Array) -> UInt8Array:
    """A frame (H, W, 3) resized to 224 by an antialiased Lanczos-3 filter."""
    return np.rint(_resize(frame, _lanczos_taps)).clip(0, 255).astype(np.uint8)


def centre_crop(image: UInt8Array) -> UInt8Array:
    """The middle of an image (224, 224, 3), of area 0.9, enlarged to 224 again (bilinear)."""
    scaled = _resize(image, _crop_taps).clip(0, 255) / np.float32(255)
    return (scaled * np.float32(255.5)).astype(np.uint8)  # TensorFlow's conversion of floats in [0, 1] cuts off


def _resize(image: UInt8Array, taps: Callable[[int], Taps]) -> Float32Array:
    """(H, W, 3) -> (224, 224, 3), not rounded: every output row, then column, is a weighted sum of a few."""
    values = image.astype(np.float32)
    for axis in (0, 1):
        index, weight = taps(image.shape[axis])
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        values = sum(w.reshape(shape) * values.take(i, axis) for i, w in zip(index, weight, strict=True))
    return values


@lru_cache(maxsize=16)
def _lanczos_taps(size: int) -> Taps:
    """The kernel is widened when it shrinks the image (antialiasing), and cut at the border."""
    scale = size / IMAGE_SIZE
    width = max(scale, 1.0)
    centre = (np.arange(IMAGE_SIZE) + 0.5) * scale
    first = np.floor(centre - 3 * width).astype(np.intp)
    index = first + np.arange(int(np.ceil(6 * width)) + 1)[:, None]
    distance = (index + 0.5 - centre) / width
    weight = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    weight *= (index >= 0) & (index < size)
    return index.clip(0, size - 1), (weight / weight.sum(0)).astype(np.float32)


@lru_cache(maxsize=16)
def _crop_taps(size: int) -> Taps:
    """Bilinear samples from edge to edge of the crop."""
    side = np.sqrt(CROP_AREA)
    place = ((1 - side) / 2 + side * np.arange(IMAGE_SIZE) / (IMAGE_SIZE - 1)) * (size - 1)
    below = np.floor(place).astype(np.intp)
    return np.stack([below, below + 1]), np.stack([1 - (place - below), place - below]).astype(np.float32)
