"""Rewards at every chunk and a predicted end, from a judge's success probabilities (World-Env, arXiv 2509.24948).

A :class:`Reflector` sits inside an environment: after every chunk it judges the episodes that advanced and returns
verdicts, rewards and predicted ends. Autoreset, infos and recordings are the environment's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError
from rawdream_env.judges.base import ask, invalid
from rawdream_env.types import Judge, Outcome, Start, SupportsClose, UInt8Array, Verdict, Video


@dataclass
class Reflection:
    """Turns the success probabilities of one episode into rewards and a predicted end.

    ``threshold`` None follows the judge's own decision. The rewards of an episode sum to its last known probability
    minus the initial ``probability``.
    """

    threshold: float | None
    patience: int
    probability: float = 0.0
    streak: int = 0

    def add(self, verdict: Verdict) -> tuple[float, bool]:
        """Reward of a chunk with this verdict, and whether the episode is finished.

        An INVALID verdict has reward 0 and neither continues nor breaks a streak of finished chunks; the next known
        probability is compared with the last known one. Without a probability a success counts 1, a failure 0.
        """
        if verdict.outcome == Outcome.INVALID:
            return 0.0, False
        chance = float(verdict.outcome) if verdict.probability is None else float(verdict.probability)
        reward, self.probability = chance - self.probability, chance
        self.streak = self.streak + 1 if is_done(verdict, self.threshold) else 0
        return reward, self.streak >= self.patience


def is_done(verdict: Verdict, threshold: float | None) -> bool:
    """Whether a verdict that is not INVALID means that the task is done."""
    if threshold is None or verdict.probability is None:
        return verdict.outcome == Outcome.SUCCESS
    return verdict.probability >= threshold


@dataclass(frozen=True)
class Reflected:
    """The reflector's answer for n rows: ``verdicts``; ``rewards`` float64 (n,); ``done`` bool (n,), the predicted
    ends; ``probability`` float64 (n,), NaN where the verdict is INVALID.
    """

    verdicts: list[Verdict]
    rewards: NDArray[np.float64]
    done: NDArray[np.bool_]
    probability: NDArray[np.float64]


class _ThresholdJudge:
    """``judge`` on the last ``last_frames`` of every video, deciding at ``threshold``."""

    def __init__(self, judge: Judge, threshold: float | None, last_frames: int | None) -> None:
        self.judge, self.threshold, self.last_frames = judge, threshold, last_frames

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        if self.last_frames is not None:
            videos = [Video(video.frames[-self.last_frames :], video.fps) for video in videos]
        return [self._decided(verdict) for verdict in ask(self.judge, videos, instructions)]

    def _decided(self, verdict: Verdict) -> Verdict:
        if verdict.outcome == Outcome.INVALID:
            return verdict
        done = is_done(verdict, self.threshold)
        return replace(verdict, outcome=Outcome.SUCCESS if done else Outcome.FAILURE)


class Reflector:
    """Success probability after every chunk as reward, and an end when the task looks done.

    Args:
        judge: asked after every chunk about all frames since the start; its name, its folder, its options, or itself.
        threshold: probability from which a task counts as done; None: the judge's own decision.
        patience: number of consecutive chunks that must count as done.
        initial: probability before the first chunk.
        last_frames: show the judge only this many frames (judges of short windows); None: all since the start.
        device: where a judge that is loaded here runs.

    Raises:
        InvalidOptionError: no judge, or an option out of range.
    """

    def __init__(
        self,
        judge: Any,
        *,
        threshold: float | None = None,
        patience: int = 1,
        initial: float = 0.0,
        last_frames: int | None = None,
        device: str = "cpu",
    ) -> None:
        if judge is None or (isinstance(judge, str) and judge == "none"):
            raise InvalidOptionError("a reflector needs a judge: pass one, such as judge='embedded'.")
        if threshold is not None and not 0.0 < threshold <= 1.0:
            raise InvalidOptionError(f"threshold={threshold} must be above 0 and at most 1, or None.")
        if patience < 1 or not 0.0 <= initial <= 1.0 or (last_frames is not None and last_frames < 2):
            raise InvalidOptionError(
                f"patience={patience} must be at least 1, initial={initial} between 0 and 1 and "
                f"last_frames={last_frames} at least 2, or None."
            )
        from rawdream_env.judges import load_judge

        self._owned = isinstance(judge, str) or not callable(judge)
        self._judge = load_judge(judge, device=device)
        self.threshold, self.patience, self.initial = threshold, patience, initial
        self.judge: Judge = _ThresholdJudge(self._judge, threshold, last_frames)
        """The judge as this reflector uses it: its verdicts are decided at ``threshold``."""
        self._episodes: dict[int, tuple[Reflection, Start, list[UInt8Array]]] = {}

    def begin(self, row: int, start: Start) -> None:
        """A new episode begins on ``row``."""
        rule = Reflection(self.threshold, self.patience, self.initial)
        self._episodes[row] = (rule, start, [start.frame[None].copy()])

    def reflect(self, rows: Sequence[int], frames: UInt8Array, valid: NDArray[np.bool_], fps: float) -> Reflected:
        """Judge the episodes of ``rows`` after a chunk of ``frames`` (n, K, H, W, 3).

        Rows that are not ``valid`` (n,) are INVALID without being shown. An unreachable judge makes the rows INVALID:
        the chunk has happened and must be returned.
        """
        for i, row in enumerate(rows):
            self._episodes[row][2].append(frames[i].copy())
        asked = [row for row, ok in zip(rows, valid, strict=True) if ok]
        videos = [Video(np.concatenate(self._episodes[row][2]), fps) for row in asked]
        try:
            answers = self.judge(videos, [self._episodes[row][1].instruction for row in asked]) if asked else []
        except JudgeUnavailableError as error:
            answers = [invalid(f"judge unavailable: {error}")] * len(asked)
        known = dict(zip(asked, answers, strict=True))
        verdicts = [known.get(row) or invalid("the environment reports this chunk as not valid") for row in rows]
        added = [self._episodes[row][0].add(verdict) for row, verdict in zip(rows, verdicts, strict=True)]
        chances = [
            np.nan if verdict.outcome == Outcome.INVALID else self._episodes[row][0].probability
            for row, verdict in zip(rows, verdicts, strict=True)
        ]
        return Reflected(
            verdicts,
            np.array([reward for reward, _ in added], np.float64),
            np.array([done for _, done in added], np.bool_),
            np.array(chances, np.float64),
        )

    def save(self) -> dict[int, tuple[Reflection, Start, list[UInt8Array]]]:
        """The episodes so far, for ``restore``."""
        return {row: (replace(rule), start, list(frames)) for row, (rule, start, frames) in self._episodes.items()}

    def restore(self, saved: dict[int, tuple[Reflection, Start, list[UInt8Array]]]) -> None:
        """Go back to saved episodes."""
        self._episodes = saved

    def close(self) -> None:
        """Close the judge if it was loaded here."""
        if self._owned and isinstance(self._judge, SupportsClose):
            self._judge.close()


def make_reflector(options: Mapping[str, Any] | Reflector) -> Reflector:
    """A reflector from its options, or itself.

    Raises:
        InvalidOptionError: an option is unknown, or ``judge`` is missing.
    """
    if isinstance(options, Reflector):
        return options
    known = list(inspect.signature(Reflector).parameters)
    unknown = sorted(set(options) - set(known)) if isinstance(options, Mapping) else [type(options).__name__]
    if unknown or "judge" not in options:
        found = f"has unknown options {unknown}" if unknown else "has no judge"
        raise InvalidOptionError(
            f"reflector {found}; pass a Reflector or a dict with judge and, if needed, {', '.join(known[1:])}."
        )
    return Reflector(**options)
