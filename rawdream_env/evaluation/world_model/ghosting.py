"""First-frame ghosting: does an object that was moved away reappear where it was at the start?

Measured from the frames of a fixed camera. Objects must lie in different places in different episodes; otherwise they become
part of the background. In each episode

- an *object's place* is what differs from the background (the median image) in the start frame and rests during the
  first chunk: a patch of foreground that moves in that time, even in part, counts as the arm and is excluded;
- a pixel of it is *vacated* at frame t when the truth there differs from the start frame and is background again;
- a vacated pixel is a *ghost* when the imagined frame is closer to the start frame than to the truth.

The ghosting rate is ghosts over vacated pixels, by horizon bucket. Copying the first frame scores 1, the truth 0. Two
stricter shares are reported as well. A ghost is *alike* the start when its distance to the start frame is below half of the
distance from there to the truth: another object in a vacated place, such as a dark arm over a bright table, can also be closer
to the object than to the table. A ghost *reappeared* when an earlier imagined frame showed the vacated pixel without it; the
other ghosts never left, for example when the imagined arm misses an object.

Shape letters: F frames after the start, E episodes, H W C image.
The anchor noise of RAW-Dream (arXiv 2605.12334, section 3.1) is meant to prevent ghosting; the metric is not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.evaluation.world_model.metrics import MOVING_LEVELS
from rawdream_env.statistics import bootstrap_ratio
from rawdream_env.types import UInt8Array

BoolArray = NDArray[np.bool_]
Counts = NDArray[np.int64]
"""(F, 4): vacated pixels, ghosts, those alike the start, those that reappeared, of every frame."""


def _differs(a: UInt8Array, b: UInt8Array, levels: int = MOVING_LEVELS) -> BoolArray:
    """Where two images (..., H, W, 3) differ by more than ``levels`` in a channel: (..., H, W)."""
    return np.asarray((np.abs(a.astype(np.int16) - b.astype(np.int16)) > levels).any(-1))


def _grow(seeds: BoolArray, inside: BoolArray) -> BoolArray:
    """The connected patches (8 neighbours) of ``inside`` that contain a seed, all (H, W)."""
    grown = seeds & inside
    while True:
        padded = np.pad(grown, 1)
        h, w = grown.shape
        near = np.logical_or.reduce([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)])
        larger = near & inside
        if np.array_equal(larger, grown):
            return grown
        grown = larger


def object_places(truth: UInt8Array, background: UInt8Array, still_frames: int) -> BoolArray:
    """Where objects are at the start of ``truth`` (F+1, H, W, 3) that rest for ``still_frames`` frames: (H, W)."""
    foreground = _differs(truth[0], background)
    moved = np.asarray(_differs(truth[1 : still_frames + 1], truth[0]).any(0))
    return foreground & ~_grow(moved, foreground)


def vacated_pixels(truth: UInt8Array, background: UInt8Array, still_frames: int) -> BoolArray:
    """Pixels of objects' places that are background again: bool (F, H, W) for the frames after the start."""
    left = _differs(truth[1:], truth[0]) & ~_differs(truth[1:], background)
    return left & object_places(truth, background, still_frames)


def ghost_counts(frames: UInt8Array, truth: UInt8Array, vacated: BoolArray) -> Counts:
    """Count ghosts in ``frames`` (F, H, W, 3) against ``truth`` (F+1 or more, start first), ``vacated`` (F, H, W)."""
    n = len(frames)
    shown, start, real = (x.astype(np.int32) for x in (frames, truth[0], truth[1 : n + 1]))
    to_start, to_truth = ((shown - start) ** 2).sum(-1), ((shown - real) ** 2).sum(-1)
    ghost = vacated[:n] & (to_start < to_truth)
    alike = ghost & (4 * to_start < ((start - real) ** 2).sum(-1))
    gone_before = np.logical_or.accumulate(vacated[:n] & ~ghost, axis=0)
    kinds = (vacated[:n], ghost, alike, ghost & gone_before)
    return np.stack([kind.sum((1, 2)) for kind in kinds], axis=-1).astype(np.int64)


def episode_ghosts(
    dream: UInt8Array, truth: UInt8Array, background: UInt8Array, still_frames: int
) -> dict[str, Counts]:
    """Counts of the ``dream`` (F, H, W, 3), of the copied first frame and of the truth itself."""
    n = len(dream)
    vacated = vacated_pixels(truth[: n + 1], background, still_frames)
    target = truth[1 : n + 1]
    sources = {"dream": dream, "copy_first": np.broadcast_to(truth[0], target.shape), "truth": target}
    return {name: ghost_counts(frames, truth, vacated) for name, frames in sources.items()}


def summarise_ghosts(counts: Mapping[str, Counts]) -> dict[str, Any]:
    """Shares with bootstrap intervals over the episodes in which a pixel was vacated. ``counts``: source -> the sums over the
    frames of E episodes, (E, 4) or flat.

    Returns:
        ``{"dream", "alike", "reappeared", "copy_first", "truth": estimate, "pixels": vacated pixels of all frames}``;
        ``alike`` and ``reappeared`` are of the dream.
    """
    sums = {name: np.reshape(counts[name], (-1, 4)) for name in ("dream", "copy_first", "truth")}
    some = sums["dream"][:, 0] > 0
    vacated = sums["dream"][some, 0]

    def share(source: str, column: int) -> dict[str, Any]:
        return bootstrap_ratio(sums[source][some, column], vacated, resamples=1000).as_dict()

    return {
        "dream": share("dream", 1),
        "alike": share("dream", 2),
        "reappeared": share("dream", 3),
        "copy_first": share("copy_first", 1),
        "truth": share("truth", 1),
        "pixels": int(vacated.sum()),
    }
