"""Small videos in and out of MP4 files: H.264 in 4:4:4, so that five-pixel coloured objects keep their colour.

The usual 4:2:0 chroma halves the colour resolution, which at 64 pixels paints a block with its neighbour's colour.
Shape letters: F frames, H W image size, RGB channels last, uint8.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from rawdream_env.errors import DatasetError
from rawdream_env.types import UInt8Array

CODEC = "libx264"
PIX_FMT = "yuv444p"
CRF = 8
GOP = 8


def frame_rate(fps: float) -> Fraction:
    """``fps`` as an exact ratio (29.97 becomes 30000/1001)."""
    return Fraction(fps).limit_denominator(1001)


def encode_video(clips: Iterable[UInt8Array], fps: float, *, crf: int = CRF, gop: int = GOP) -> bytes:
    """Encode clips one after the other as one MP4 file and return its bytes.

    ``clips`` uint8 (F, H, W, 3), all of one H and W, both even. Every clip starts with a key frame, so it can be read
    without decoding its predecessors. One thread and fixed settings: the same frames give the same bytes.
    """
    rate = frame_rate(fps)
    buffer = io.BytesIO()
    options = {"crf": str(crf), "preset": "veryfast", "bf": "0", "forced-idr": "1", "threads": "1"}
    # x264's macroblock tree gives other bytes for the same frames now and then (x264 165: in some processes once in a
    # thousand files; never in 89,000 without it).
    options["x264-params"] = "mbtree=0"
    container = av.open(buffer, mode="w", format="mp4")
    stream: VideoStream | None = None
    count = 0
    for clip in clips:
        if stream is None:
            stream = cast(VideoStream, container.add_stream(CODEC, rate=rate, options=options))
            stream.height, stream.width = clip.shape[1:3]
            stream.pix_fmt = PIX_FMT
            stream.gop_size = gop
            stream.time_base = 1 / rate
        for offset, image in enumerate(clip):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = count, 1 / rate
            frame.pict_type = PictureType.I if offset == 0 else PictureType.NONE
            container.mux(stream.encode(frame))
            count += 1
    if stream is not None:
        container.mux(stream.encode(None))
    container.close()
    return buffer.getvalue()


def decode_video(path: Path, fps: float, *, start: float = 0.0, count: int) -> UInt8Array:
    """Decode ``count`` frames from the one nearest to ``start`` seconds on, as uint8 (count, H, W, 3).

    Raises:
        DatasetError: the file is missing or damaged, or holds fewer frames than asked for.
    """
    try:
        frames = _decode(path, fps, start, count)
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise DatasetError(
            f"{path}: cannot be read as a video ({type(error).__name__}: {error}). "
            "Copy the file again from its source, or delete its data set shard and collect it again."
        ) from error
    if isinstance(frames, int):
        raise DatasetError(
            f"{path}: {frames} frames from {start:.3f} s on, but the episode table promises {count}. "
            "The video and the tables are from different versions of the data set: copy the whole folder again."
        )
    return frames


def _decode(path: Path, fps: float, start: float, count: int) -> UInt8Array | int:
    """The frames, or how many there were when there were too few."""
    out: UInt8Array | None = None
    done = 0
    # One reformatter for all frames: making a new colour converter for every frame costs more than decoding it.
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        if start > 0 and stream.time_base is not None:
            container.seek(int((start - 0.5 / fps) / stream.time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts is None or round((frame.time - start) * fps) < 0:
                continue
            rgb = reformatter.reformat(frame, format="rgb24").to_ndarray()
            if out is None:
                out = np.empty((count, *rgb.shape), dtype=np.uint8)
            out[done] = rgb
            done += 1
            if done == count:
                return out
    return done


def psnr(a: UInt8Array, b: UInt8Array) -> float:
    """Peak signal-to-noise ratio in dB between two uint8 arrays of one shape; ``inf`` when they are equal."""
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if mse == 0 else 10 * float(np.log10(255.0**2 / mse))
