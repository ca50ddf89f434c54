"""Several judges as one, and a hold-out judge that never rewards.

Reinforcement learning finds what a judge gets wrong. One way to see it happen is a second judge whose verdicts are not
rewarded: as long as both mean the same thing their success rates move together; a policy that learns to please the first
one alone opens a gap between them. ``HoldOutJudge`` measures that gap and raises a named warning when it is certain.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from rawdream_env.errors import InvalidOptionError
from rawdream_env.judges.base import check_pairs, invalid
from rawdream_env.judges.overlap import is_remote
from rawdream_env.judges.verdict import combine_votes
from rawdream_env.statistics import paired_interval
from rawdream_env.types import Judge, Outcome, SupportsClose, Verdict, Video

RULES = ("all", "any", "majority")


class JudgeGapWarning(UserWarning):
    """The rewarding judge is kinder than the hold-out judge, by more than chance explains."""


class EnsembleJudge:
    """Asks several judges about every video and combines their verdicts by ``rule``.

    "all": a success when every judge says so (the strict one); "any": when one does; "majority": when more than half do.
    An INVALID verdict is a vote that is missing: the outcome is INVALID unless the others decide whatever it would have
    been. ``probability`` is the mean of the judges' (a success without one counts 1), ``votes`` are their outcomes.

    Raises:
        InvalidOptionError: fewer than two judges, or an unknown rule.
    """

    def __init__(self, judges: Sequence[Judge], rule: str = "all") -> None:
        if len(judges) < 2 or rule not in RULES:
            raise InvalidOptionError(f"an ensemble needs 2 judges or more and a rule among {', '.join(RULES)}.")
        self.judges, self.rule = tuple(judges), rule
        self.need = {"all": len(judges), "any": 1, "majority": len(judges) // 2 + 1}[rule]
        self.remote = all(is_remote(judge) for judge in judges)

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """One verdict per video, in order."""
        check_pairs(videos, instructions)
        answers = [_answers(judge, videos, instructions) for judge in self.judges]
        return [self._combined(verdicts) for verdicts in zip(*answers, strict=True)]

    def _combined(self, verdicts: tuple[Verdict, ...]) -> Verdict:
        told = combine_votes([verdict.outcome for verdict in verdicts], self.need)
        names = [f"{type(j).__name__}: {v.reason}" for j, v in zip(self.judges, verdicts, strict=True)]
        chances = [_chance(verdict) for verdict in verdicts if verdict.outcome != Outcome.INVALID]
        return Verdict(
            told.outcome,
            f"{told.reason} ({'; '.join(names)})"[:500],
            sum(chances) / len(chances) if chances else None,
            told.votes,
            max(verdict.latency_s for verdict in verdicts),
            tuple(reply for verdict in verdicts for reply in verdict.raw),
        )

    def close(self) -> None:
        """Close the judges that can be closed."""
        _close(self.judges)


@dataclass(frozen=True)
class JudgeGap:
    """Both judges over the same ``n`` videos (those readable by both), and the gap between their success rates.

    ``gap`` is rewarding minus hold-out, with its 95 % interval ``low`` to ``high``; NaN while n is 0. ``only_rewarding``
    and ``only_held_out`` count the videos on which one of them alone said success.
    """

    n: int = 0
    rewarding: int = 0
    held_out: int = 0
    only_rewarding: int = 0
    only_held_out: int = 0

    @property
    def gap(self) -> float:
        """Difference of the success rates."""
        return (self.rewarding - self.held_out) / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the gap, see :func:`rawdream_env.statistics.paired_interval`."""
        if not self.n:
            return math.nan, math.nan
        return paired_interval(self.only_rewarding, self.only_held_out, self.n)

    def as_dict(self) -> dict[str, float]:
        """For logs: rates, gap and interval; None where not known."""
        if not self.n:
            return {"judge_gap_n": 0}
        low, high = self.interval
        rates = {"success_rate_rewarding": self.rewarding / self.n, "success_rate_held_out": self.held_out / self.n}
        return {"judge_gap": self.gap, "judge_gap_low": low, "judge_gap_high": high, "judge_gap_n": self.n, **rates}


class HoldOutJudge:
    """The verdicts of ``rewarding``, while ``held_out`` watches the same videos and rewards nothing.

    ``gap`` (a ``JudgeGap``) is over the last ``window`` videos that both could read; trainers log it. When its whole
    interval is above ``alarm`` a ``JudgeGapWarning`` says so, once until the gap has closed again.

    Args:
        rewarding: its verdicts are returned, unchanged.
        held_out: asked about the same videos. Should it fail, only the gap knows less.
        alarm: a gap of success rates that is too much, in (0, 1).
        window: videos the gap is taken over.
    """

    def __init__(self, rewarding: Judge, held_out: Judge, *, alarm: float = 0.1, window: int = 512) -> None:
        if not 0 < alarm < 1 or window < 1:
            raise InvalidOptionError(f"alarm={alarm} must lie between 0 and 1 and window={window} be at least 1.")
        self.rewarding, self.held_out, self.alarm, self.window = rewarding, held_out, alarm, window
        self.remote = is_remote(rewarding) and is_remote(held_out)
        self.alarmed = False
        self._pairs: list[tuple[bool, bool]] = []
        self._lock = threading.Lock()

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """What the rewarding judge says."""
        check_pairs(videos, instructions)
        verdicts = self.rewarding(videos, instructions)
        others = _answers(self.held_out, videos, instructions)
        with self._lock:  # remote judges are called from several threads
            for ours, theirs in zip(verdicts, others, strict=True):
                if Outcome.INVALID not in (ours.outcome, theirs.outcome):
                    self._pairs.append((ours.outcome == Outcome.SUCCESS, theirs.outcome == Outcome.SUCCESS))
            del self._pairs[: -self.window]
        self._look()
        return verdicts

    @property
    def gap(self) -> JudgeGap:
        """The gap over the last ``window`` videos."""
        with self._lock:
            pairs = list(self._pairs)
        return JudgeGap(
            len(pairs),
            sum(ours for ours, _ in pairs),
            sum(theirs for _, theirs in pairs),
            sum(ours and not theirs for ours, theirs in pairs),
            sum(theirs and not ours for ours, theirs in pairs),
        )

    def _look(self) -> None:
        gap = self.gap
        if not gap.n:
            return
        low, high = gap.interval
        if low > self.alarm and not self.alarmed:
            self.alarmed = True
            warnings.warn(
                f"the rewarding judge sees {100 * gap.gap:.0f} points more successes than the hold-out judge "
                f"[{100 * low:.0f}, {100 * high:.0f}] over the last {gap.n} videos, more than {100 * self.alarm:.0f}: the "
                "policy may be learning to please it. Look at videos that only one of them calls a success.",
                JudgeGapWarning,
                stacklevel=3,
            )
        elif low <= self.alarm:
            self.alarmed = False

    def close(self) -> None:
        """Close the judges that can be closed."""
        _close((self.rewarding, self.held_out))


def _answers(judge: Judge, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
    """A judge's verdicts; INVALID for all when it fails as a whole: one judge must not take the others with it."""
    try:
        verdicts = judge(videos, instructions)
    except Exception as error:  # noqa: BLE001
        return [invalid(f"{type(judge).__name__} failed: {type(error).__name__}: {error}"[:200])] * len(videos)
    if len(verdicts) != len(videos):
        return [invalid(f"{type(judge).__name__} gave {len(verdicts)} verdicts for {len(videos)} videos")] * len(videos)
    return verdicts


def _chance(verdict: Verdict) -> float:
    return float(verdict.outcome) if verdict.probability is None else verdict.probability


def _close(judges: Sequence[Judge]) -> None:
    for judge in judges:
        if isinstance(judge, SupportsClose):
            judge.close()
