"""Several judges as one, and a hold-out judge that never rewards.

Reinforcement learning exploits the errors of a judge. A second judge whose verdicts are not rewarded makes that visible:
the success rates of both judges rise together while the policy improves; a policy that exploits the first judge opens a
gap between them. ``HoldOutJudge`` measures the gap and warns when it is statistically certain.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, replace

from rawdream_env.errors import InvalidOptionError, JudgeError
from rawdream_env.judges.base import ask, check_pairs, frames_seen, invalid, is_scanning
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

    def frames_seen(self, total: int, fps: float) -> set[int]:
        """Those that any of the judges looks at."""
        return {index for judge in self.judges for index in frames_seen(judge, total, fps)}

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
    """Two verdicts of the same ``n`` videos (those that have both), and the gap between the success rates.

    ``rewarding`` are the successes of the judge that rewards, ``held_out`` those of another judge, or of another source.

    ``gap`` is rewarding minus hold-out, with its 95 % interval; NaN while n is 0. ``only_rewarding`` and
    ``only_held_out`` count the videos on which only that judge reports a success.
    """

    n: int = 0
    rewarding: int = 0
    held_out: int = 0
    only_rewarding: int = 0
    only_held_out: int = 0

    @classmethod
    def of(cls, pairs: Collection[tuple[bool, bool]]) -> JudgeGap:
        """From (rewarding, held out) successes of every video."""
        ours, theirs = sum(a for a, _ in pairs), sum(b for _, b in pairs)
        return cls(len(pairs), ours, theirs, sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))

    def __add__(self, other: JudgeGap) -> JudgeGap:
        return JudgeGap(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

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

    def as_dict(self, name: str = "judge") -> dict[str, float]:
        """Gap and interval for logs as ``NAME_gap``, ``_low``, ``_high`` and ``_n``; only ``NAME_gap_n`` while n is 0."""
        if not self.n:
            return {f"{name}_gap_n": 0}
        low, high = self.interval
        return {f"{name}_gap": self.gap, f"{name}_gap_low": low, f"{name}_gap_high": high, f"{name}_gap_n": self.n}


def watch_gap(gap: JudgeGap, margin: float, raised: bool, other: str, where: str) -> bool:
    """Whether the alarm is raised now that ``gap`` was seen; ``raised``: whether it was before.

    It is raised, with a ``JudgeGapWarning``, when the whole interval is above ``margin``, and cleared when the gap is not.
    """
    if not gap.n or raised:
        return raised and not gap.gap <= margin
    low, high = gap.interval
    if low <= margin:
        return False
    warnings.warn(
        f"the judge reports {100 * gap.gap:.0f} points more successes than {other} [{100 * low:.0f}, {100 * high:.0f}] "
        f"{where}, more than {100 * margin:.0f}: the policy may exploit it. Look at videos that only one of them calls a "
        "success.",
        JudgeGapWarning,
        stacklevel=4,
    )
    return True


class HoldOutJudge:
    """Returns the verdicts of ``rewarding``; ``held_out`` judges the same videos without rewarding.

    ``Verdict.held_out`` is the other judge's outcome. ``gap`` (a ``JudgeGap``) is over the last ``window`` videos that both
    could judge. A ``JudgeGapWarning`` is issued when its whole interval is above ``alarm``, and again only after the gap has
    closed. GRPO has an alarm of its own, over episodes, and sets ``alarm`` to None.

    Args:
        rewarding: its verdicts are returned unchanged.
        held_out: asked about the same videos. If it fails, those videos are left out of the gap.
        alarm: gap of success rates that is too large, in (0, 1); None: no warnings.
        window: number of videos in the gap.
    """

    def __init__(self, rewarding: Judge, held_out: Judge, *, alarm: float | None = 0.1, window: int = 512) -> None:
        if not (alarm is None or 0 < alarm < 1) or window < 1:
            raise InvalidOptionError(f"alarm={alarm} must lie between 0 and 1 and window={window} be at least 1.")
        self.rewarding, self.held_out, self.alarm, self.window = rewarding, held_out, alarm, window
        self.remote = is_remote(rewarding) and is_remote(held_out)
        self.scanning = is_scanning(rewarding)
        self.alarmed = False
        self._pairs: list[tuple[bool, bool]] = []
        self._lock = threading.Lock()

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """The verdicts of the rewarding judge, each with the other judge's outcome."""
        check_pairs(videos, instructions)
        verdicts = ask(self.rewarding, videos, instructions)
        others = _answers(self.held_out, videos, instructions)
        with self._lock:  # remote judges are called from several threads
            for ours, theirs in zip(verdicts, others, strict=True):
                if Outcome.INVALID not in (ours.outcome, theirs.outcome):
                    self._pairs.append((ours.outcome == Outcome.SUCCESS, theirs.outcome == Outcome.SUCCESS))
            del self._pairs[: -self.window]
        if self.alarm is not None:
            gap = self.gap
            self.alarmed = watch_gap(
                gap, self.alarm, self.alarmed, "the hold-out judge", f"over the last {gap.n} videos"
            )
        return [replace(ours, held_out=theirs.outcome) for ours, theirs in zip(verdicts, others, strict=True)]

    def frames_seen(self, total: int, fps: float) -> set[int]:
        """Those that either judge looks at."""
        return {*frames_seen(self.rewarding, total, fps), *frames_seen(self.held_out, total, fps)}

    @property
    def gap(self) -> JudgeGap:
        """The gap over the last ``window`` videos."""
        with self._lock:
            return JudgeGap.of(self._pairs)

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
