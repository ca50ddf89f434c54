"""The videos of a data set: H.264 in 4:4:4, so that small coloured objects keep their colour.

The usual 4:2:0 chroma halves the colour resolution: at 64 pixels it paints a block of five pixels with its neighbour's
colour. Shape letters: F frames, H W image size, RGB channels last, uint8.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rawdream_env import media
from rawdream_env.errors import DatasetError
from rawdream_env.types import UInt8Array

PIX_FMT = "yuv444p"


def encode_video(clips: Iterable[UInt8Array], fps: float) -> bytes:
    """Encode episodes, uint8 (F, H, W, 3) each, as one MP4 file in which each of them can be read alone."""
    return media.encode_video(clips, fps, pix_fmt=PIX_FMT, crf=8, gop=8)


def decode_video(path: Path, fps: float, *, start: float = 0.0, count: int) -> UInt8Array:
    """Decode ``count`` frames from the one nearest to ``start`` seconds on, as uint8 (count, H, W, 3).

    Raises:
        DatasetError: the file is missing or damaged, or holds fewer frames than asked for.
    """
    out: UInt8Array | None = None
    done = 0
    for frame in media.iterate_video(path, fps, start=start):
        if out is None:
            out = np.empty((count, *frame.shape), dtype=np.uint8)
        out[done] = frame
        done += 1
        if done == count:
            return out
    raise DatasetError(
        f"{path}: {done} frames from {start:.3f} s on, but the episode table promises {count}. "
        "The video and the tables are from different versions of the data set: copy the whole folder again."
    )
