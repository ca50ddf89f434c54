"""Precision, recall, F1, false-positive rate and INVALID share of a judge against the truth.

RL exploits the errors of its judge. Every rate is therefore reported per group, with n and its Wilson interval, and the
worst mistakes are shown as pictures. INVALID verdicts are counted separately: they never become a reward, so they are neither
right nor wrong.

    report = evaluate(judge, clips)
    print(report.table())
    report.write("out")          # judge_report.json, mistakes.png
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rawdream_env.errors import DatasetError
from rawdream_env.evaluation.reporting.output import writing_results
from rawdream_env.files import atomic_write_bytes, atomic_write_json
from rawdream_env.judges.base import ask
from rawdream_env.judges.verdict import combine_votes
from rawdream_env.media import encode_picture
from rawdream_env.statistics import Confusion, Rate
from rawdream_env.types import Judge, Outcome, UInt8Array, Verdict, Video

SWEEP = tuple(round(0.05 * step, 2) for step in range(1, 20)) + (0.97, 0.99)
"""Thresholds at which a judge with probabilities is evaluated."""

_THUMB = 96
_COLUMNS = 8


@dataclass(frozen=True)
class JudgeClip:
    """A video, its instruction and the true outcome.

    ``relation`` is the goal's name ("on:cup:pot"); its first word is its kind. ``source`` is where the frames come from
    ("simulator", "dream", or the driver). ``held_out`` marks object pairs that are not in the judge's training data. A clip
    of a whole episode has a ``task`` instead of a ``relation``.
    """

    video: Video
    instruction: str
    label: bool
    relation: str = ""
    source: str = "simulator"
    held_out: bool = False
    task: str = ""

    def groups(self) -> tuple[str, ...]:
        """The rows of the table that include this clip."""
        if self.task:
            return "all", f"source {self.source}", f"task {self.task}"
        kind = self.relation.split(":", 1)[0]
        names = ("all", f"source {self.source}", f"kind {kind}", f"relation {self.relation}")
        if self.held_out:
            return names + ("held-out pairs", f"held-out {kind}")
        return names + (("trained pairs",) if self.relation.count(":") == 2 else ())


@dataclass(frozen=True)
class JudgeRow:
    """One group of clips: the confusion over readable verdicts, and the share of INVALID ones."""

    confusion: Confusion
    invalid: Rate

    def as_dict(self) -> dict[str, Any]:
        """JSON form: counts, rates with intervals and n. Both success rates are over the ``judged`` clips."""
        c = self.confusion
        rates = {
            "success": Rate.of(c.true_positive + c.false_positive, c.n),
            "true_success": Rate.of(c.true_positive + c.false_negative, c.n),
            "invalid": self.invalid,
        }
        return {**c.as_dict(), "judged": c.n, **{name: rate.as_dict() for name, rate in rates.items()}}


class JudgeReport:
    """Accumulates verdicts: rates per group, by threshold and by number of votes, and the worst mistakes.

    Only counts and the ``worst`` mistakes are kept, so memory does not grow with the number of clips.

    Args:
        worst: how many mistakes to keep.

    Attributes:
        n: verdicts counted.
        judge_seconds: time that :func:`evaluate` spent inside the judge.
    """

    def __init__(self, worst: int = 12) -> None:
        self.worst, self.n, self.judge_seconds = worst, 0, 0.0
        self._groups: dict[str, Counter[tuple[Outcome, bool]]] = {}
        self._chances: Counter[tuple[int, bool]] = Counter()  # (thresholds of SWEEP that are reached, truth)
        self._votes: Counter[tuple[tuple[Outcome, ...], bool]] = Counter()
        self._mistakes: list[tuple[float, bool, int, JudgeClip, Verdict]] = []  # the worst first

    def add(self, clip: JudgeClip, verdict: Verdict) -> None:
        """Count one verdict."""
        for group in clip.groups():
            self._groups.setdefault(group, Counter())[verdict.outcome, clip.label] += 1
        if verdict.probability is not None and verdict.outcome != Outcome.INVALID:
            self._chances[sum(verdict.probability >= threshold for threshold in SWEEP), clip.label] += 1
        if verdict.votes:
            self._votes[tuple(sorted(verdict.votes)), clip.label] += 1
        if verdict.outcome != Outcome.INVALID and (verdict.outcome == Outcome.SUCCESS) != clip.label:
            # False successes come before missed ones of equal confidence; n keeps the order of equals.
            insort(self._mistakes, (-_confidence(verdict), clip.label, self.n, clip, verdict))
            del self._mistakes[self.worst :]
        self.n += 1

    @property
    def rows(self) -> dict[str, JudgeRow]:
        """The measured rates of every group."""
        return {name: _row(self._groups[name]) for name in sorted(self._groups, key=_group_order)}

    @property
    def sweep(self) -> tuple[dict[str, Any], ...]:
        """Confusion at other thresholds of the probability; empty for judges that give none."""
        swept = []
        for index, threshold in enumerate(SWEEP if self._chances else ()):
            counts: Counter[tuple[Outcome, bool]] = Counter()
            for (reached, label), count in self._chances.items():
                counts[Outcome(int(reached > index)), label] += count
            swept.append({"threshold": threshold, **_row(counts).confusion.as_dict()})
        return tuple(swept)

    @property
    def vote_sweep(self) -> tuple[dict[str, Any], ...]:
        """Confusion and INVALID share by the number of votes that a success needs; empty for judges that do not vote."""
        swept = []
        for need in range(1, max((len(votes) for votes, _ in self._votes), default=0) + 1):
            counts: Counter[tuple[Outcome, bool]] = Counter()
            for (votes, label), count in self._votes.items():
                counts[combine_votes(votes, need).outcome, label] += count
            swept.append({"need": need, **_row(counts).as_dict()})
        return tuple(swept)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "groups": {name: row.as_dict() for name, row in self.rows.items()},
            "threshold_sweep": list(self.sweep),
            "vote_sweep": list(self.vote_sweep),
        }

    def table(self, prefixes: Sequence[str] = ("all", "source", "task", "kind", "trained", "held-out")) -> str:
        """A text table of the groups whose names begin with one of ``prefixes``, with 95 % Wilson intervals."""
        columns = "".join(f"{title:<22}" for title in ("precision", "recall", "false positives"))
        lines = [f"{'group':<28}{'n':>6}  {columns}{'F1':>6}{'INVALID':>9}"]
        for name, row in self.rows.items():
            if not name.startswith(tuple(prefixes)):
                continue
            c = row.confusion
            rates = "".join(f"{_short(rate):<22}" for rate in (c.precision, c.recall, c.false_positive_rate))
            lines.append(f"{name:<28}{row.invalid.n:>6}  {rates}{c.f1:>6.3f}{_percent(row.invalid.value):>9}")
        return "\n".join(lines)

    def mistakes(self) -> list[tuple[JudgeClip, Verdict]]:
        """The most confident wrong verdicts."""
        return [(clip, verdict) for *_, clip, verdict in self._mistakes]

    def write(self, folder: str | Path) -> Path:
        """Write ``judge_report.json`` and, when there are mistakes, ``mistakes.png``; returns the folder."""
        with writing_results(folder) as path:
            atomic_write_json(path / "judge_report.json", self.as_dict())
            if self._mistakes:
                atomic_write_bytes(path / "mistakes.png", encode_picture(contact_sheet(self.mistakes())))
            else:
                (path / "mistakes.png").unlink(missing_ok=True)
        return path


def evaluate(judge: Judge, clips: Iterable[JudgeClip], *, batch_size: int = 32, worst: int = 12) -> JudgeReport:
    """Query the judge about every clip and count its verdicts per group. Clips are read one batch at a time.

    Args:
        judge: any object with the ``Judge`` protocol.
        clips: videos with instructions; ``clip.label`` is the truth.
        batch_size: videos per call.
        worst: mistakes to keep.

    Raises:
        DatasetError: no clips.
        JudgeError: the judge does not return one verdict per video.
    """
    report = JudgeReport(worst)
    source = iter(clips)
    while part := list(islice(source, batch_size)):
        begun = perf_counter()
        verdicts = ask(judge, [clip.video for clip in part], [clip.instruction for clip in part])
        report.judge_seconds += perf_counter() - begun
        for clip, verdict in zip(part, verdicts, strict=True):
            report.add(clip, verdict)
    if not report.n:
        raise DatasetError("there are no clips to evaluate the judge on; collect some episodes first.")
    return report


def contact_sheet(mistakes: Sequence[tuple[JudgeClip, Verdict]]) -> UInt8Array:
    """One row of frames per mistake, from the first to the last frame, with a caption; uint8 (H, W, 3)."""
    line = _THUMB + 18
    sheet = Image.new("RGB", (_COLUMNS * _THUMB, line * len(mistakes)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (clip, verdict) in enumerate(mistakes):
        frames = clip.video.frames
        for column, index in enumerate(np.linspace(0, len(frames) - 1, _COLUMNS).round().astype(int)):
            picture = Image.fromarray(frames[index]).resize((_THUMB, _THUMB), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * _THUMB, row * line + 18))
        chance = "" if verdict.probability is None else f" p={verdict.probability:.2f}"
        answer = f"{verdict.outcome.name.lower()}{chance}"
        truth = "success" if clip.label else "failure"
        text = f"{clip.instruction[:70]} | truth: {truth} | judge: {answer} | {clip.source}"
        draw.text((3, row * line + 3), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return np.asarray(sheet)


def _row(counts: Counter[tuple[Outcome, bool]]) -> JudgeRow:
    """The row of a group, from the counts of (verdict, truth)."""
    yes, no, unread = Outcome.SUCCESS, Outcome.FAILURE, Outcome.INVALID
    confusion = Confusion(counts[yes, True], counts[yes, False], counts[no, True], counts[no, False])
    return JudgeRow(confusion, Rate.of(counts[unread, True] + counts[unread, False], counts.total()))


def _group_order(name: str) -> tuple[int, str]:
    order = ("all", "source", "task", "kind", "trained", "held-out", "relation")
    return next(i for i, prefix in enumerate(order) if name.startswith(prefix)), name


def _confidence(verdict: Verdict) -> float:
    """The judge's confidence in its verdict, in [0, 1]; 0.5 if it gives no probability."""
    if verdict.probability is None:
        return 0.5
    return verdict.probability if verdict.outcome == Outcome.SUCCESS else 1.0 - verdict.probability


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def _short(rate: Rate) -> str:
    return "-" if rate.n == 0 else f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
