"""Scores of imagined frames by horizon: means over an episode's frames, then over episodes, with bootstrap intervals.

Shape letters: E episodes, F frames, M metrics.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.evaluation.world_model.metrics import METRICS, buckets
from rawdream_env.statistics import Estimate, bootstrap_ratio

Float64Array = NDArray[np.float64]

ALL_METRICS = (*METRICS, "lpips", "lpips_moving")
"""Columns of the scores of an episode; the last two need an extractor."""


class HorizonScores:
    """Collects the scores of episodes. Of each only its means over the buckets are kept, 1 kB for 220 frames, not the
    scores of its frames.

    Args:
        chunk_len: frames in the first bucket, see ``metrics.buckets``.
    """

    def __init__(self, chunk_len: int) -> None:
        self.chunk_len = chunk_len
        self._longest = 0
        self._metrics: tuple[str, ...] = ()
        # (source, number of the bucket, or -1 for all frames) -> E * M means. One array for all episodes: small ones between
        # the frames that are freed would hold the memory around them.
        self._means: dict[tuple[str, int], array[float]] = {}

    def add(self, scores: Mapping[str, Float64Array]) -> None:
        """Add an episode: source ("dream", "copy_first", "copy_last") -> scores (F, M) of its frames."""
        n = len(scores["dream"])
        self._longest = max(self._longest, n)
        for source, frames in scores.items():
            for i, (lo, hi) in [*enumerate(buckets(n, self.chunk_len)), (-1, (0, n))]:
                self._means.setdefault((source, i), array("d")).extend(_mean(frames[lo:hi]))
            self._metrics = ALL_METRICS[: frames.shape[1]]

    def rows(self) -> list[dict[str, Any]]:
        """One row per bucket: ``{"frames": [lo, hi], "dream": {"psnr": {...}, ...}, "copy_first": ...}``."""
        return [self._row(i, span) for i, span in enumerate(buckets(self._longest, self.chunk_len))]

    def overall(self) -> dict[str, Any]:
        """The row of all frames."""
        return self._row(-1, (0, self._longest))

    def _row(self, bucket: int, span: tuple[int, int]) -> dict[str, Any]:
        row: dict[str, Any] = {"frames": list(span)}
        for source, i in self._means:
            if i == bucket:
                columns = np.reshape(self._means[source, i], (-1, len(self._metrics))).T
                row[source] = {
                    name: _interval(column).as_dict() for name, column in zip(self._metrics, columns, strict=True)
                }
        return row


def _mean(scores: Float64Array) -> Float64Array:
    """Mean (M,) over frames (F, M); NaN where none is finite."""
    good = np.isfinite(scores)
    count = good.sum(0)
    return np.where(count > 0, np.where(good, scores, 0.0).sum(0) / np.maximum(count, 1), np.nan)


def _interval(values: Float64Array) -> Estimate:
    return bootstrap_ratio(values[np.isfinite(values)], resamples=1000)
