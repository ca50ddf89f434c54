"""What all judges share: checking a video, choosing its frames, timing, and reading a judge's folder.

A judge never raises because of one bad item. ``checked_frames`` returns the reason, and the judge returns it as
``Verdict(Outcome.INVALID, reason)``; an INVALID verdict is masked and never becomes a reward.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np

from rawdream_env.errors import CheckpointError, JudgeError
from rawdream_env.files import read_json
from rawdream_env.types import Judge, Outcome, SupportsFramesSeen, UInt8Array, Verdict, Video

MIN_FRAMES = 2
"""The start frame and one more."""

MAX_FRAMES = 100_000
"""Longer than any episode; guards against a transposed or corrupt array."""


class Timer:
    """Wall-clock seconds since it was made."""

    def __init__(self) -> None:
        self._start = perf_counter()

    def seconds(self) -> float:
        """Seconds since the timer was made."""
        return perf_counter() - self._start


def invalid(reason: str, latency_s: float = 0.0) -> Verdict:
    """An INVALID verdict with its (required) reason."""
    return Verdict(Outcome.INVALID, reason=reason, latency_s=latency_s)


def check_pairs(videos: Sequence[Video], instructions: Sequence[str]) -> None:
    """``ValueError`` unless there is one instruction per video: a mistake of the caller, not a bad item."""
    if len(videos) != len(instructions):
        raise ValueError(
            f"{len(videos)} videos but {len(instructions)} instructions; give a judge exactly one instruction per video"
        )


def is_scanning(judge: object) -> bool:
    """Whether a judge looks for the first success in a video (attribute ``scanning``); the frames after it do not count.

    Such a judge is asked after every chunk by default, so that an episode ends at its success (paper, appendices A.6 and
    A.7: "the rest frames are discarded").
    """
    return bool(getattr(judge, "scanning", False))


def says_what_it_sees(judge: object) -> bool:
    """Whether a judge has ``frames_seen``. A subclass that judges in another way, with its own ``__call__``, does not have its
    parent's.
    """
    order = type(judge).__mro__
    said, judges = (
        next((i for i, c in enumerate(order) if name in vars(c)), len(order)) for name in ("frames_seen", "__call__")
    )
    return said <= judges and callable(getattr(judge, "frames_seen", None))


def frames_seen(judge: object, total: int, fps: float) -> Collection[int]:
    """Indices of the frames that ``judge`` looks at in a video of ``total`` frames: all, unless it says which.

    Raises ``JudgeError`` for indices that no such video has; negative ones count from its end.
    """
    every = range(total)
    if not says_what_it_sees(judge):
        return every
    said = cast(SupportsFramesSeen, judge).frames_seen(total, fps)
    try:
        return {every[index] for index in said}
    except (IndexError, TypeError) as error:
        raise JudgeError(
            f"{type(judge).__name__}.frames_seen({total}, {fps:g}) must give indices of a video of {total} frames: {error}."
        ) from None


def ask(judge: Judge, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
    """The verdicts of ``judge``, exactly one ``Verdict`` per video; ``JudgeError`` for anything else it returns.

    The only place where an environment, a wrapper, a trainer or an evaluation calls a judge.
    """
    answers: Any = judge(videos, instructions)
    if not isinstance(answers, Sequence) or len(answers) != len(videos):
        got = f"{len(answers)} verdicts" if isinstance(answers, Sequence) else f"a {type(answers).__name__}"
        raise JudgeError(
            f"{type(judge).__name__} gave {got} for {len(videos)} videos; expected a list with one Verdict per video."
        )
    for answer in answers:
        if not isinstance(answer, Verdict) or not isinstance(answer.outcome, Outcome):
            got = f"outcome {answer.outcome!r}" if isinstance(answer, Verdict) else f"a {type(answer).__name__}"
            raise JudgeError(
                f"{type(judge).__name__} gave {got[:60]} as a verdict; expected one rawdream_env.Verdict per video."
            )
    return list(answers)


def checked_frames(video: Any) -> tuple[UInt8Array | None, str]:
    """The frames of a video; None and the reason if it cannot be judged.

    Accepts numpy arrays and torch tensors, uint8 (F, H, W, 3) with F >= 2. Other dtypes are refused, not cast: a float
    video of unknown range could turn out black.
    """
    if not isinstance(video, Video):
        return None, f"not a Video but {type(video).__name__}"
    frames: Any = video.frames
    if hasattr(frames, "detach"):  # a torch tensor, without importing torch here
        frames = frames.detach().cpu().numpy()
    if not isinstance(frames, np.ndarray):
        return None, f"frames are {type(frames).__name__}, expected a uint8 array (F, H, W, 3)"
    if frames.ndim != 4 or frames.shape[-1] != 3:
        return None, f"frames have shape {frames.shape}, expected (F, H, W, 3)"
    if not MIN_FRAMES <= frames.shape[0] <= MAX_FRAMES:
        return None, f"the video has {frames.shape[0]} frames, expected {MIN_FRAMES} to {MAX_FRAMES}"
    if min(frames.shape[1:3]) < 1:
        return None, f"frames are empty, shape {frames.shape}"
    if np.issubdtype(frames.dtype, np.floating) and not np.isfinite(frames).all():
        bad = int(np.flatnonzero(~np.isfinite(frames).all(axis=(1, 2, 3)))[0])
        return None, f"frame {bad} has values that are not finite"
    if frames.dtype != np.uint8:
        return None, f"frames are {frames.dtype}, expected uint8"
    if not (isinstance(video.fps, (int, float)) and np.isfinite(video.fps) and video.fps > 0):
        return None, f"fps is {video.fps!r}, expected a positive number"
    return frames, ""


def checked_instruction(instruction: Any) -> str:
    """The reason why an instruction cannot be judged; the empty string if it can."""
    if not isinstance(instruction, str):
        return f"the instruction is {type(instruction).__name__}, expected text"
    if not any(character.isalnum() for character in instruction):
        return "the instruction is empty"
    return ""


def spread_indices(num_frames: int, spread: Sequence[float], tail: Sequence[int]) -> list[int]:
    """Frame indices for a video of any length, in time order.

    ``spread`` are positions in [0, 1] along the video (0 is the start frame), ``tail`` are distances from the last frame
    in frames. Short videos repeat frames, so the count is always ``len(spread) + len(tail)``.
    """
    last = num_frames - 1
    picked = [int(place * last) for place in spread] + [max(0, last - distance) for distance in tail]
    return sorted(picked)


def read_config(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The config.json of a judge's folder; ``CheckpointError`` unless it has this kind and format."""
    content = read_json(path, "give a folder written by save_pretrained")
    if content.get("kind") != kind or content.get("format") != version:
        found = {key: content.get(key) for key in ("kind", "format")}
        raise CheckpointError(f"{path} says {found}, expected kind {kind!r} and format {version}")
    return content


def checked_fields(content: Any, config: Any, path: Path, *, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """``content`` if it has exactly the fields of the dataclass ``config``, all positive numbers (``threshold`` a float,
    the others integers) except those named in ``but``; else ``CheckpointError``.
    """
    known = [field.name for field in fields(config)]
    if not isinstance(content, dict) or set(content) != set(known):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: 'model' has {found}, expected exactly {sorted(known)}")
    for name in [name for name in known if name not in but]:
        kind, value = (float if name == "threshold" else int), content[name]
        if type(value) is not kind or not 0 < value <= 4096:
            raise CheckpointError(f"{path}: {name} is {value!r}, expected a positive {kind.__name__} of at most 4096")
    return content
