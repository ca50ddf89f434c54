"""Image metrics in numpy: PSNR and SSIM as defined by scikit-image, over the whole image or part of it.

Shape letters: F frames, H W C image. All computations use float64.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from rawdream_env.types import UInt8Array

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

PSNR_CAP_DB = 60.0
"""Cap of the PSNR of a frame before averaging: equal frames have infinite PSNR, 8-bit rounding gives about 59 dB."""

MOVING_LEVELS = 16
"""A pixel moves when a channel differs from the reference image by more than this many of 255 levels."""


def psnr(prediction: UInt8Array, truth: UInt8Array, mask: BoolArray | None = None) -> Float64Array:
    """Peak signal-to-noise ratio in dB of each frame: (..., H, W, 3) uint8 -> (...).

    ``mask`` (..., H, W) restricts it to some pixels: NaN where it selects none. Equal frames give infinity. Agrees with
    ``skimage.metrics.peak_signal_noise_ratio(data_range=255)``.
    """
    error = (prediction.astype(np.float64) - truth.astype(np.float64)) ** 2
    per_pixel = error.mean(-1)
    if mask is None:
        mse = per_pixel.mean((-1, -2))
    else:
        count = mask.sum((-1, -2))
        mse = np.where(count > 0, (per_pixel * mask).sum((-1, -2)) / np.maximum(count, 1), np.nan)
    with np.errstate(divide="ignore"):
        return np.asarray(10.0 * np.log10(255.0**2 / mse))


def _window_mean(x: Float64Array, size: int) -> Float64Array:
    """Mean over every full ``size`` x ``size`` window of (..., H, W): (..., H-size+1, W-size+1)."""
    # Windowed sums rather than one cumulative sum: no loss of precision on large images.
    height, width = x.shape[-2] - size + 1, x.shape[-1] - size + 1
    rows = np.zeros((*x.shape[:-2], height, x.shape[-1]))
    for i in range(size):
        rows += x[..., i : i + height, :]
    both = np.zeros((*x.shape[:-2], height, width))
    for i in range(size):
        both += rows[..., i : i + width]
    return both / size**2


_WINDOW = 7
"""Side of the windows of SSIM in pixels."""


def ssim(prediction: UInt8Array, truth: UInt8Array, mask: BoolArray | None = None) -> Float64Array:
    """Structural similarity of each frame, (..., H, W, 3) uint8 -> (...), with the 7 x 7 uniform window.

    The defaults of ``skimage.metrics.structural_similarity(data_range=255, channel_axis=-1)``: K1 0.01, K2 0.03, sample
    covariance, mean over channels and over positions whose window fits. ``mask`` (..., H, W) averages over the windows
    centred on its pixels; NaN where there are none.
    """
    return _mean_of_windows(_ssim_windows(prediction, truth), mask)


def _ssim_windows(prediction: UInt8Array, truth: UInt8Array) -> Float64Array:
    """The SSIM of every full window, (..., H - 6, W - 6)."""
    win = _WINDOW
    if min(prediction.shape[-3:-1]) < win:
        raise ValueError(f"SSIM needs images of at least {win}x{win} pixels, got {prediction.shape[-3:-1]}")
    x = np.moveaxis(prediction.astype(np.float64), -1, -3)
    y = np.moveaxis(truth.astype(np.float64), -1, -3)
    ux, uy = _window_mean(x, win), _window_mean(y, win)
    unbiased = win * win / (win * win - 1)
    vx = unbiased * (_window_mean(x * x, win) - ux * ux)
    vy = unbiased * (_window_mean(y * y, win) - uy * uy)
    vxy = unbiased * (_window_mean(x * y, win) - ux * uy)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return np.asarray(((2 * ux * uy + c1) * (2 * vxy + c2) / ((ux * ux + uy * uy + c1) * (vx + vy + c2))).mean(-3))


def _mean_of_windows(score: Float64Array, mask: BoolArray | None) -> Float64Array:
    """Mean over the windows, or over those centred on the pixels of ``mask``."""
    if mask is None:
        return np.asarray(score.mean((-1, -2)))
    pad = _WINDOW // 2
    inner = mask[..., pad : mask.shape[-2] - pad, pad : mask.shape[-1] - pad]
    count = inner.sum((-1, -2))
    return np.where(count > 0, (score * inner).sum((-1, -2)) / np.maximum(count, 1), np.nan)


def moving_region(frames: UInt8Array, reference: UInt8Array, levels: int = MOVING_LEVELS) -> BoolArray:
    """Pixels of ``frames`` (F, H, W, 3) that differ from ``reference`` (H, W, 3) in any channel: bool (F, H, W).

    With the start frame as reference, this is where something arrived or left; with the median image, the foreground.
    """
    difference = np.abs(frames.astype(np.int16) - reference.astype(np.int16))
    return np.asarray((difference > levels).any(-1))


def buckets(num_frames: int, chunk_len: int) -> list[tuple[int, int]]:
    """Horizon buckets [0, K), [K, 2K), [2K, 4K), [4K, 8K), ... up to ``num_frames``; the last one may be cut short."""
    edges = [0, chunk_len]
    while edges[-1] < num_frames:
        edges.append(2 * edges[-1])
    return [(a, min(b, num_frames)) for a, b in itertools.pairwise(edges) if a < num_frames]


METRICS = ("psnr", "ssim", "psnr_moving", "ssim_moving")


_FRAMES_AT_ONCE = 8
"""So that the intermediate values of small pictures stay in the cache of the processor."""


def frame_scores(prediction: UInt8Array, truth: UInt8Array, region: BoolArray) -> Float64Array:
    """The four metrics of METRICS for every frame: (F, H, W, 3) twice and bool (F, H, W) -> (F, 4)."""
    scores = np.empty((len(prediction), len(METRICS)))
    for first in range(0, len(prediction), _FRAMES_AT_ONCE):
        part = slice(first, first + _FRAMES_AT_ONCE)
        ours, theirs, moving = prediction[part], truth[part], region[part]
        windows = _ssim_windows(ours, theirs)
        scores[part, 0] = np.minimum(psnr(ours, theirs), PSNR_CAP_DB)
        scores[part, 1] = _mean_of_windows(windows, None)
        scores[part, 2] = np.minimum(psnr(ours, theirs, moving), PSNR_CAP_DB)
        scores[part, 3] = _mean_of_windows(windows, moving)
    return scores
