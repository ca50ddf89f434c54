"""A judge that follows a rule: a small implementation of the ``Judge`` protocol for tests, timing and examples."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from rawdream_env.errors import InvalidOptionError
from rawdream_env.types import Outcome, Verdict, Video

Rule = Callable[[Video, str], "Verdict | Outcome | bool | float"]


class ScriptedJudge:
    """Judges by ``rule``, or by a hash of the frames and the instruction when there is none.

    ``rule(video, instruction)`` may return a ``Verdict``, an ``Outcome``, a bool, or a probability of success (a float;
    success from 0.5 on, NaN is INVALID). A rule that raises gives INVALID with the reason: a judge never raises for a
    bad video. Without a rule a share ``invalid_rate`` of the videos is INVALID and a share ``success_rate`` of the rest
    successful; equal frames get equal verdicts.

    Attributes:
        calls: number of calls.
        videos: number of videos seen.
    """

    def __init__(self, rule: Rule | None = None, *, success_rate: float = 0.5, invalid_rate: float = 0.0) -> None:
        """Rates are in [0, 1] and used only if ``rule`` is None."""
        for name, rate in (("success_rate", success_rate), ("invalid_rate", invalid_rate)):
            if not 0.0 <= rate <= 1.0:
                raise InvalidOptionError(f"{name}={rate} must lie between 0 and 1.")
        self.rule = rule
        self.success_rate = success_rate
        self.invalid_rate = invalid_rate
        self.calls = 0
        self.videos = 0

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """See :class:`Judge`."""
        self.calls += 1
        self.videos += len(videos)
        return [self._one(video, text) for video, text in zip(videos, instructions, strict=True)]

    def _one(self, video: Video, instruction: str) -> Verdict:
        frames = np.asarray(video.frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or len(frames) == 0:
            return Verdict(Outcome.INVALID, f"frames of shape {frames.shape} and dtype {frames.dtype} cannot be judged")
        if self.rule is None:
            return self._by_hash(frames, instruction)
        try:
            return as_verdict(self.rule(video, instruction))
        except Exception as error:  # noqa: BLE001 (a judge never raises for one video)
            return Verdict(Outcome.INVALID, f"rule failed: {type(error).__name__}: {error}")

    def _by_hash(self, frames: np.ndarray, instruction: str) -> Verdict:
        digest = zlib.crc32(np.ascontiguousarray(frames).data, zlib.crc32(instruction.encode()))
        if (digest >> 16) / 2**16 < self.invalid_rate:
            return Verdict(Outcome.INVALID, "scripted outage")
        success = (digest & 0xFFFF) / 2**16 < self.success_rate
        return Verdict(Outcome.SUCCESS if success else Outcome.FAILURE, "by hash")


def as_verdict(answer: Verdict | Outcome | bool | float) -> Verdict:
    """A rule's answer as a ``Verdict``."""
    if isinstance(answer, Verdict):
        return answer
    if isinstance(answer, Outcome):
        return Verdict(answer, "by rule")
    if isinstance(answer, bool | np.bool_):
        return Verdict(Outcome.SUCCESS if answer else Outcome.FAILURE, "by rule")
    probability = float(answer)
    if not 0.0 <= probability <= 1.0:
        return Verdict(Outcome.INVALID, f"rule gave the probability {probability}")
    return Verdict(Outcome.SUCCESS if probability >= 0.5 else Outcome.FAILURE, "by rule", probability)
