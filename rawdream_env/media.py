"""Video, GIF and still pictures: the one module that encodes and decodes them.

MP4 files go through PyAV, because data sets need exact seeking and the same bytes for the same frames. Video files of
unknown kind are read with imageio, still pictures and GIFs with Pillow.

Shape letters: F frames, H W picture size, RGB channels last, uint8.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import av
import imageio.v3 as iio
import numpy as np
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rawdream_env.errors import DatasetError
from rawdream_env.files import require_regular
from rawdream_env.types import UInt8Array

CODEC = "libx264"
MAX_BYTES = 4 * 2**30
"""Limit on the frames of one file: half a million of 64x64 pixels, or eleven minutes of 640x480 at 10 Hz."""


def has_h264() -> bool:
    """Whether PyAV has an H.264 encoder; without one, videos can only be written as GIF."""
    return CODEC in av.codecs_available


def frame_rate(fps: float) -> Fraction:
    """``fps`` as an exact ratio (29.97 becomes 30000/1001)."""
    return Fraction(fps).limit_denominator(1001)


# -- video ------------------------------------------------------------------------------------------------------------


def encode_video(
    clips: Iterable[UInt8Array], fps: float, *, pix_fmt: str = "yuv420p", crf: int = 20, gop: int = 250
) -> bytes:
    """Encode clips one after the other as one H.264 MP4 file and return its bytes.

    Every clip starts with a key frame, so it can be read without decoding the clips before it. One thread and fixed
    settings: the same frames give the same bytes.

    Args:
        clips: uint8 (F, H, W, 3), all of one H and W.
        fps: frames per second.
        pix_fmt: "yuv420p" plays in every browser and player; it needs even sides, so a picture with an odd side repeats
            its last row or column. "yuv444p" keeps the size and the colour of every pixel, but many players refuse it.
        crf: quality, lower is better; 8 is hard to tell from the original.
        gop: largest number of frames between key frames.
    """
    rate = frame_rate(fps)
    buffer = io.BytesIO()
    options = {"crf": str(crf), "preset": "veryfast", "bf": "0", "forced-idr": "1", "threads": "1"}
    # With x264's macroblock tree the same frames occasionally give other bytes (x264 165: in some processes one file in a
    # thousand; never in 89,000 files without it).
    options["x264-params"] = "mbtree=0"
    container = av.open(buffer, mode="w", format="mp4")
    stream: VideoStream | None = None
    count = 0
    for clip in clips:
        even = _even(clip) if pix_fmt == "yuv420p" else clip
        if stream is None:
            stream = cast(VideoStream, container.add_stream(CODEC, rate=rate, options=options))
            stream.height, stream.width = even.shape[1:3]
            stream.pix_fmt = pix_fmt
            stream.gop_size = gop
            stream.time_base = 1 / rate
        for offset, image in enumerate(even):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = count, 1 / rate
            frame.pict_type = PictureType.I if offset == 0 else PictureType.NONE
            container.mux(stream.encode(frame))
            count += 1
    if stream is not None:
        container.mux(stream.encode(None))
    container.close()
    return buffer.getvalue()


def _even(clip: UInt8Array) -> UInt8Array:
    """The clip with even sides."""
    height, width = clip.shape[1:3]
    if height % 2 == width % 2 == 0:
        return clip
    return np.pad(clip, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], mode="edge")


def frames_at(path: Path, times: Sequence[float] | NDArray[np.float64], tolerance: float) -> Iterator[UInt8Array]:
    """Decode the frames (H, W, 3) that are nearest to ``times``, ascending seconds, one for each.

    Raises:
        DatasetError: the file is missing or damaged, or has no frame within ``tolerance`` seconds of a time.
    """
    # One reformatter for all frames: making a new colour converter for every frame costs more than decoding it.
    reformatter = VideoReformatter()
    try:
        require_regular(path)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            if times[0] > 0 and stream.time_base is not None:
                container.seek(int((times[0] - tolerance) / stream.time_base), stream=stream, backward=True)
            frames = (frame for frame in container.decode(stream) if frame.pts is not None)
            best, following = next(frames, None), next(frames, None)
            for row, time in enumerate(times):
                while best and following and abs(following.time - time) < abs(best.time - time):
                    best, following = following, next(frames, None)
                if best is None or not abs(best.time - time) <= tolerance:
                    nearest = "the file has none" if best is None else f"the nearest is at {best.time:.3f} s"
                    raise DatasetError(
                        f"{path}: no frame at {time:.3f} s, where row {row} of {len(times)} of an episode needs one; "
                        f"{nearest}. The video has another frame rate or lacks frames, or it and the tables are from "
                        "different versions of the data set: copy the whole folder again, or convert it again."
                    )
                image = np.asarray(reformatter.reformat(best, format="rgb24").to_ndarray(), np.uint8)
                yield turn_upright(image[None], best.rotation)[0]
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise _unreadable(path, error) from error


def turn_upright(frames: UInt8Array, rotation: float) -> UInt8Array:
    """Frames (F, H, W, 3) as a player shows them; ``rotation`` is the file's, counterclockwise degrees."""
    return np.ascontiguousarray(np.rot90(frames, round(rotation / 90), axes=(1, 2)))


def read_video(path: Path) -> tuple[UInt8Array, float]:
    """All frames (F, H, W, 3) of a video file of any kind (mp4, gif, webm, ...), upright, and its frames per second.

    The rate is 0 where the file does not state one.

    Raises:
        DatasetError: the file is missing, damaged or empty, or its frames need more than ``MAX_BYTES``.
    """
    frames: list[UInt8Array] = []
    size = 0
    try:
        require_regular(path)
        with av.open(str(path)) as container:
            rotation = next(iter(container.decode(video=0))).rotation
        with iio.imopen(path, "r", plugin="pyav") as file:
            rate = float(file.metadata().get("fps") or 0.0)
            for frame in file.iter(format="rgb24"):
                frames.append(np.asarray(frame, np.uint8))
                size += frame.nbytes
                if size > MAX_BYTES or frame.shape != frames[0].shape:
                    raise DatasetError(
                        f"{path}: more than {MAX_BYTES >> 30} GiB of frames, or frames of several sizes; cut it to one "
                        "episode."
                    )
    except StopIteration:
        pass
    except (av.error.FFmpegError, OSError, IndexError, ZeroDivisionError) as error:
        raise _unreadable(path, error) from error
    if not frames:
        raise DatasetError(f"{path} has no frames.")
    return turn_upright(np.stack(frames), rotation), rate


def _unreadable(path: Path, error: Exception) -> DatasetError:
    return DatasetError(
        f"{path}: cannot be read as a video ({type(error).__name__}: {error}). "
        "Copy the file again from its source, or delete it and create it again."
    )


# -- GIF --------------------------------------------------------------------------------------------------------------


def encode_gif(frames: UInt8Array | Sequence[UInt8Array], fps: float) -> bytes:
    """Frames (H, W, 3) of one size as a looping GIF. All frames share one palette, since palettes per frame flicker."""
    sample = [frames[i] for i in range(0, len(frames), max(1, len(frames) // 8))]
    palette = Image.fromarray(np.concatenate(sample)).quantize(colors=255, dither=Image.Dither.NONE)
    first, *rest = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    delay_ms = max(2, round(100 / fps)) * 10  # the format counts in 1/100 s, and players slow down below 2
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=delay_ms, loop=0, optimize=False)
    return buffer.getvalue()


# -- still pictures ---------------------------------------------------------------------------------------------------


def encode_picture(frame: UInt8Array, format: Literal["png", "jpeg"] = "png", **options: Any) -> bytes:
    """One picture (H, W, 3) as a file; ``options`` are Pillow's of the format."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format.upper(), **options)
    return buffer.getvalue()


def read_picture(source: Path | BinaryIO) -> UInt8Array:
    """A picture file as uint8 (H, W, 3), upright: a camera's orientation tag is applied.

    Raises:
        OSError, ValueError: the file is missing, or no picture.
    """
    with Image.open(source) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"), dtype=np.uint8)
