"""``rawdream judge watch episode.mp4 --instruction "put ..."``: judge one video file.

``--judge "vlm_server:http://localhost:8000/v1"`` uses a vision-language model; ``judges.load_judge`` lists all judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rawdream_env import media
from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.judges import load_judge
from rawdream_env.judges.base import ask
from rawdream_env.types import Outcome, Verdict, Video


@dataclass(frozen=True)
class WatchConfig:
    """Options of ``rawdream judge watch``."""

    video: Annotated[str, tyro.conf.Positional]
    """Video file (mp4, gif, ...) that begins with the start frame."""
    instruction: str
    """The instruction that the robot was given."""
    judge: str = "embedded"
    """Judge: "embedded", a folder, a .json file of options, "vlm_server:http://host:8000/v1", "vlm_local:FOLDER"."""
    fps: float = 0.0
    """Frames per second; 0: the frame rate of the file."""
    device: str = "cpu"
    """Torch device of a judge that runs in this process."""


@dataclass(frozen=True)
class Watched:
    """A verdict with its video and options."""

    config: WatchConfig
    video: Video
    verdict: Verdict


def read_video(path: str | Path, fps: float = 0.0) -> Video:
    """All frames of a video file; ``fps`` (Hz) overrides the frame rate of the file.

    Raises:
        DatasetError: the file is missing or damaged, or has no frame rate.
    """
    file = Path(path)
    if not file.is_file():
        raise DatasetError(f"{path} does not exist; pass the path of a video file.")
    frames, rate = media.read_video(file)
    if fps <= 0 and rate <= 0:
        raise DatasetError(f"{path} has no frame rate; set one with --fps.")
    return Video(frames, fps or rate)


def watch(config: WatchConfig) -> Watched:
    """Judge one video file.

    Raises:
        DatasetError: the file cannot be read.
        InvalidOptionError: no such judge, or ``fps`` is negative.
        JudgeUnavailableError: the judge's server cannot be reached.
    """
    if not 0 <= config.fps < float("inf"):
        raise InvalidOptionError(f"fps={config.fps} must be a positive number, or 0 for the frame rate of the file.")
    video = read_video(config.video, config.fps)
    judge = load_judge(config.judge, device=config.device)
    return Watched(config, video, ask(judge, [video], [config.instruction])[0])


def summary(watched: Watched) -> tuple[str, int]:
    """The printed text (verdict, votes, reason) and the exit code: 0 for a verdict, 1 for INVALID."""
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
