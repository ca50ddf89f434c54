"""One video file, one instruction, any judge: ``rawdream judge watch episode.mp4 --instruction "put ..."``.

``--judge "vlm_server:http://localhost:8000/v1"`` asks a vision-language model; ``judges.load_judge`` lists the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import tyro
from av.video.reformatter import VideoReformatter

from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.judges import load_judge
from rawdream_env.types import Outcome, UInt8Array, Verdict, Video

MAX_BYTES = 4 * 2**30
"""Of decoded frames: half a million of 64x64 pixels, or eleven minutes of 640x480 at 10 Hz."""


@dataclass(frozen=True)
class WatchConfig:
    """Options of ``rawdream judge watch``."""

    video: Annotated[str, tyro.conf.Positional]
    """A video file (mp4, gif, ...), the start frame first."""
    instruction: str
    """What the robot was asked to do."""
    judge: str = "embedded"
    """ "embedded", a folder, a .json file of options, "vlm_server:http://host:8000/v1", "vlm_local:FOLDER"."""
    fps: float = 0.0
    """Frames a second; 0: as the file says."""
    device: str = "cpu"
    """torch device of a judge that computes here."""


@dataclass(frozen=True)
class Watched:
    """A verdict and what it is about."""

    config: WatchConfig
    video: Video
    verdict: Verdict


def read_video(path: str | Path, fps: float = 0.0) -> Video:
    """All frames of a video file; ``fps`` in Hz where the file's own rate is wrong.

    Raises:
        DatasetError: the file is missing, damaged, or does not say how fast it is.
    """
    frames: list[UInt8Array] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = fps or float(stream.average_rate or 0)
            reformatter, size = VideoReformatter(), 0
            for frame in container.decode(stream):
                frames.append(reformatter.reformat(frame, format="rgb24").to_ndarray().astype(np.uint8, copy=False))
                size += frames[-1].nbytes
                if size > MAX_BYTES or frames[-1].shape != frames[0].shape:
                    raise DatasetError(
                        f"{path}: more than {MAX_BYTES >> 30} GiB of frames, or frames of several sizes; cut it to one episode."
                    )
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise DatasetError(f"{path} cannot be read as a video ({type(error).__name__}: {error}).") from error
    if not frames:
        raise DatasetError(f"{path} has no frames.")
    if rate <= 0:
        raise DatasetError(f"{path} does not say how many frames a second it has; give --fps.")
    return Video(np.stack(frames), rate)


def watch(config: WatchConfig) -> Watched:
    """Judge one file.

    Raises:
        DatasetError: the file cannot be read.
        InvalidOptionError: no such judge, or ``fps`` is negative.
        JudgeUnavailableError: the judge's server cannot be reached.
    """
    if not 0 <= config.fps < float("inf"):
        raise InvalidOptionError(f"fps={config.fps} must be a positive number, or 0 for the file's own.")
    video = read_video(config.video, config.fps)
    judge = load_judge(config.judge, device=config.device)
    return Watched(config, video, judge([video], [config.instruction])[0])


def summary(watched: Watched) -> tuple[str, int]:
    """What to print: verdict, votes, reason. The exit code is 0 for a verdict, 1 for INVALID."""
    video, verdict = watched.video, watched.verdict
    count, height, width = video.frames.shape[:3]
    lines = [
        f"{watched.config.video}: {count} frames of {width}x{height} at {video.fps:g} Hz, {watched.config.instruction!r}",
        f"verdict: {verdict.outcome.name} in {verdict.latency_s:.2f} s",
    ]
    if verdict.probability is not None:
        lines.append(f"probability of success: {verdict.probability:.3f}")
    if verdict.votes:
        lines.append(f"votes: {', '.join(vote.name.lower() for vote in verdict.votes)}")
    if verdict.reason:
        lines.append(f"reason: {verdict.reason}")
    return "\n".join(lines), int(verdict.outcome == Outcome.INVALID)
