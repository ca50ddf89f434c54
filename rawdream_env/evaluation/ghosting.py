"""Ghosting: does what has moved away reappear where it was at the start?

A world model that keeps looking at its first frame may bring back from it what has long been moved (first-frame
ghosting; the paper's anchor noise is there against it, section A.3). A pixel is *vacated* in a frame when the truth differs
there from the start and shows the background, the median picture of the fixed camera: something was there, and is gone.
The ghosting of a dream is the share of vacated pixels at which it is closer to the start than to the truth: 0 for a
perfect model, 1 for one that repeats its first frame. Objects count, and so does the arm.

Shape letters: F frames, H W C picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rawdream_env.evaluation.metrics import moving_region
from rawdream_env.types import UInt8Array

BoolArray = NDArray[np.bool_]


def vacated(truth: UInt8Array, start: UInt8Array, background: UInt8Array) -> BoolArray:
    """Where ``truth`` (F, H, W, 3) has lost what ``start`` (H, W, 3) had before ``background``: bool (F, H, W)."""
    return moving_region(truth, start) & ~moving_region(truth, background)


def ghost_counts(
    dream: UInt8Array, truth: UInt8Array, start: UInt8Array, background: UInt8Array
) -> NDArray[np.float64]:
    """Ghosts and vacated pixels of every frame: (F, H, W, 3) twice -> (F, 2)."""
    gone = vacated(truth, start, background)
    seen = dream.astype(np.int16)
    to_start, to_truth = np.abs(seen - start).sum(-1), np.abs(seen - truth.astype(np.int16)).sum(-1)
    return np.stack([((to_start < to_truth) & gone).sum((1, 2)), gone.sum((1, 2))], -1).astype(np.float64)
