"""Several judges as one, and a hold-out judge that never rewards.

Reinforcement learning exploits the errors of a judge. A second judge whose verdicts are not rewarded makes that visible:
the success rates of both judges rise together while the policy improves; a policy that exploits the first judge opens a
gap between them. ``HoldOutJudge`` measures the gap and warns when it is statistically certain.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from rawdream_env.errors import InvalidOptionError, JudgeError
from rawdream_env.judges.base import ask, check_pairs, invalid, is_scanning
from rawdream_env.judges.overlap import is_remote
from rawdream_env.judges.verdict import combine_votes
from rawdream_env.statistics import paired_interval
from rawdream_env.types import Judge, Outcome, SupportsClose, Verdict, Video

RULES = ("all", "any", "majority")


class JudgeGapWarning(UserWarning):
    """The rewarding judge reports more successes than the hold-out judge, by more than chance explains."""


class EnsembleJudge:
    """Asks several judges about every video and combines their verdicts by ``rule``.

    "all": a success if every judge reports one (the strictest); "any": if one does; "majority": if more than half do. An
    INVALID verdict is a missing vote: the outcome is INVALID unless the other votes decide it. ``probability`` is the
    mean over the judges (a success without a probability counts 1), ``votes`` are their outcomes.

    Raises:
        InvalidOptionError: fewer than two judges, or an unknown rule.
    """

    def __init__(self, judges: Sequence[Judge], rule: str = "all") -> None:
        if len(judges) < 2 or rule not in RULES:
            raise InvalidOptionError(f"an ensemble needs 2 judges or more and a rule among {', '.join(RULES)}.")
        self.judges, self.rule = tuple(judges), rule
        self.need = {"all": len(judges), "any": 1, "majority": len(judges) // 2 + 1}[rule]
        self.remote = all(is_remote(judge) for judge in judges)
        self.scanning = all(is_scanning(judge) for judge in judges)

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """One verdict per video, in order."""
        check_pairs(videos, instructions)
        answers = [_answers(judge, videos, instructions) for judge in self.judges]
        return [self._combined(verdicts) for verdicts in zip(*answers, strict=True)]

    def _combined(self, verdicts: tuple[Verdict, ...]) -> Verdict:
        combined = combine_votes([verdict.outcome for verdict in verdicts], self.need)
        names = [f"{type(j).__name__}: {v.reason}" for j, v in zip(self.judges, verdicts, strict=True)]
        chances = [_chance(verdict) for verdict in verdicts if verdict.outcome != Outcome.INVALID]
        return Verdict(
            combined.outcome,
            f"{combined.reason} ({'; '.join(names)})"[:500],
            sum(chances) / len(chances) if chances else None,
            combined.votes,
            max(verdict.latency_s for verdict in verdicts),
            tuple(reply for verdict in verdicts for reply in verdict.raw),
        )

    def close(self) -> None:
        """Close the judges that can be closed."""
        _close(self.judges)


@dataclass(frozen=True)
class JudgeGap:
    """Both judges on the same ``n`` videos (those that both could judge), and the gap between their success rates.

    ``gap`` is rewarding minus hold-out, with its 95 % interval; NaN while n is 0. ``only_rewarding`` and
    ``only_held_out`` count the videos on which only that judge reports a success.
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
        """Rates, gap and interval for logs; only ``judge_gap_n`` while n is 0."""
        if not self.n:
            return {"judge_gap_n": 0}
        low, high = self.interval
        rates = {"success_rate_rewarding": self.rewarding / self.n, "success_rate_held_out": self.held_out / self.n}
        return {"judge_gap": self.gap, "judge_gap_low": low, "judge_gap_high": high, "judge_gap_n": self.n, **rates}


class HoldOutJudge:
    """Returns the verdicts of ``rewarding``; ``held_out`` judges the same videos without rewarding.

    ``gap`` (a ``JudgeGap``) is over the last ``window`` videos that both could judge; trainers log it. A
    ``JudgeGapWarning`` is issued when its whole interval is above ``alarm``, and again only after the gap has closed.

    Args:
        rewarding: its verdicts are returned unchanged.
        held_out: asked about the same videos. If it fails, those videos are left out of the gap.
        alarm: gap of success rates that is too large, in (0, 1).
        window: number of videos in the gap.
    """

    def __init__(self, rewarding: Judge, held_out: Judge, *, alarm: float = 0.1, window: int = 512) -> None:
        if not 0 < alarm < 1 or window < 1:
            raise InvalidOptionError(f"alarm={alarm} must lie between 0 and 1 and window={window} be at least 1.")
        self.rewarding, self.held_out, self.alarm, self.window = rewarding, held_out, alarm, window
        self.remote = is_remote(rewarding) and is_remote(held_out)
        self.scanning = is_scanning(rewarding)
        self.alarmed = False
        self._pairs: list[tuple[bool, bool]] = []
        self._lock = threading.Lock()

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """The verdicts of the rewarding judge."""
        check_pairs(videos, instructions)
        verdicts = ask(self.rewarding, videos, instructions)
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
                f"the rewarding judge reports {100 * gap.gap:.0f} points more successes than the hold-out judge "
                f"[{100 * low:.0f}, {100 * high:.0f}] over the last {gap.n} videos, more than {100 * self.alarm:.0f}: the "
                "policy may exploit it. Look at videos that only one of the judges calls a success.",
                JudgeGapWarning,
                stacklevel=3,
            )
        elif low <= self.alarm:
            self.alarmed = False

    def close(self) -> None:
        """Close the judges that can be closed."""
        _close((self.rewarding, self.held_out))


def _answers(judge: Judge, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
    """A judge's verdicts; INVALID for all when it fails as a whole, so that the other judges still count.

    A judge that returns something else than verdicts is a programming error and raises ``JudgeError``.
    """
    try:
        return ask(judge, videos, instructions)
    except JudgeError:
        raise
    except Exception as error:  # noqa: BLE001
        return [invalid(f"{type(judge).__name__} failed: {type(error).__name__}: {error}"[:200])] * len(videos)


def _chance(verdict: Verdict) -> float:
    return float(verdict.outcome) if verdict.probability is None else verdict.probability


def _close(judges: Sequence[Judge]) -> None:
    for judge in judges:
        if isinstance(judge, SupportsClose):
            judge.close()
