"""The videos of a data set: H.264 in 4:4:4, so that small coloured objects keep their colour.

The usual 4:2:0 chroma halves the colour resolution: at 64 pixels it paints a block of five pixels with its neighbour's
colour. Shape letters: F frames, H W image size, RGB channels last, uint8.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rawdream_env import media
from rawdream_env.errors import DatasetError
from rawdream_env.types import UInt8Array

PIX_FMT = "yuv444p"
FRAME_TOLERANCE = 0.1
"""How far a frame may be from its timestamp, in frames."""


def encode_video(clips: Iterable[UInt8Array], fps: float) -> bytes:
    """Encode episodes, uint8 (F, H, W, 3) each, as one MP4 file in which each episode can be read alone."""
    return media.encode_video(clips, fps, pix_fmt=PIX_FMT, crf=8, gop=8)


def decode_video(path: Path, times: NDArray[np.float64], tolerance: float) -> UInt8Array:
    """Decode the frames shown at ``times`` (F,), ascending seconds, as uint8 (F, H, W, 3).

    Raises:
        DatasetError: the file is missing or damaged, its frames have several sizes, or it has no frame within
            ``tolerance`` seconds of one of the times.
    """
    out: UInt8Array | None = None
    for row, frame in enumerate(media.frames_at(path, times, tolerance)):
        if out is None:
            out = np.empty((len(times), *frame.shape), dtype=np.uint8)
        if frame.shape != out.shape[1:]:
            raise DatasetError(f"{path}: frames of {out.shape[1:]} and {frame.shape} in one episode; encode it again.")
        out[row] = frame
    if out is None:
        raise ValueError("no times were given")
    return out
