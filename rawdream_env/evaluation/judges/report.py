"""How far a judge can be trusted: precision, recall, F1, false-positive rate and INVALID share against the truth.

The judge is the part reinforcement learning attacks, so every rate comes per relation with its n and Wilson interval,
and the worst mistakes come as pictures. INVALID verdicts are counted apart: they are neither right nor wrong, because
they never become a reward.

    report = evaluate(judge, clips)
    print(report.table())
    report.write("out")          # judge_report.json, mistakes.png
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rawdream_env.files import atomic_write_bytes, atomic_write_json
from rawdream_env.judges.verdict import combine_votes
from rawdream_env.statistics import Confusion, Rate
from rawdream_env.types import Judge, Outcome, UInt8Array, Verdict, Video

SWEEP = tuple(round(0.05 * step, 2) for step in range(1, 20)) + (0.97, 0.99)
"""Thresholds at which a judge with probabilities is measured again."""

_THUMB = 96
_COLUMNS = 8


@dataclass(frozen=True)
class JudgeClip:
    """A video, what was asked about it, and the truth.

    ``relation`` is the goal's name ("on:cup:pot"); its first word is the kind under which it is summed. ``source`` says
    whose frames they are ("simulator", "dream", or who drove); ``held_out`` marks object pairs the judge never trained
    on. A clip of a whole episode has a ``task`` instead, and counts under that.
    """

    video: Video
    instruction: str
    label: bool
    relation: str = ""
    source: str = "simulator"
    held_out: bool = False
    task: str = ""

    def groups(self) -> tuple[str, ...]:
        """The rows of the table this clip counts in."""
        if self.task:
            return "all", f"source {self.source}", f"task {self.task}"
        kind = self.relation.split(":", 1)[0]
        names = ("all", f"source {self.source}", f"kind {kind}", f"relation {self.relation}")
        if self.held_out:
            return names + ("held-out pairs", f"held-out {kind}")
        return names + (("trained pairs",) if self.relation.count(":") == 2 else ())


@dataclass(frozen=True)
class JudgeRow:
    """One group of clips: the confusion over readable verdicts and how many were INVALID."""

    confusion: Confusion
    invalid: Rate

    def as_dict(self) -> dict[str, Any]:
        """JSON form: counts, rates with intervals and n."""
        return {**self.confusion.as_dict(), "invalid": self.invalid.as_dict()}


@dataclass(frozen=True)
class JudgeReport:
    """Measured rates per group, what other thresholds would have given, and clips with verdicts for the pictures.

    ``sweep`` is over thresholds of the probability, ``vote_sweep`` over the number of votes a success needs; each is
    empty for judges without.
    """

    rows: dict[str, JudgeRow]
    sweep: tuple[dict[str, Any], ...]
    clips: tuple[JudgeClip, ...]
    verdicts: tuple[Verdict, ...]
    vote_sweep: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "groups": {name: row.as_dict() for name, row in self.rows.items()},
            "threshold_sweep": list(self.sweep),
            "vote_sweep": list(self.vote_sweep),
        }

    def table(self, prefixes: Sequence[str] = ("all", "source", "task", "kind", "trained", "held-out")) -> str:
        """A text table of the groups whose names begin with one of ``prefixes``; intervals are 95 % Wilson."""
        columns = "".join(f"{title:<22}" for title in ("precision", "recall", "false positives"))
        lines = [f"{'group':<28}{'n':>6}  {columns}{'F1':>6}{'INVALID':>9}"]
        for name, row in self.rows.items():
            if not name.startswith(tuple(prefixes)):
                continue
            c = row.confusion
            rates = "".join(f"{_short(rate):<22}" for rate in (c.precision, c.recall, c.false_positive_rate))
            lines.append(f"{name:<28}{row.invalid.n:>6}  {rates}{c.f1:>6.3f}{_percent(row.invalid.value):>9}")
        return "\n".join(lines)

    def mistakes(self, limit: int = 12) -> list[tuple[JudgeClip, Verdict]]:
        """The most confident wrong verdicts; false successes come before missed ones of equal confidence."""
        wrong = [pair for pair in zip(self.clips, self.verdicts, strict=True) if _is_wrong(*pair)]
        return sorted(wrong, key=lambda pair: (-_confidence(pair[1]), pair[0].label))[:limit]

    def write(self, folder: str | Path, *, limit: int = 12) -> Path:
        """Write ``judge_report.json`` and, when there are mistakes, ``mistakes.png``; returns the folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path / "judge_report.json", self.as_dict())
        mistakes = self.mistakes(limit)
        if mistakes:
            picture = io.BytesIO()
            Image.fromarray(contact_sheet(mistakes)).save(picture, format="PNG")
            atomic_write_bytes(path / "mistakes.png", picture.getvalue())
        else:
            (path / "mistakes.png").unlink(missing_ok=True)
        return path


def evaluate(judge: Judge, clips: Iterable[JudgeClip], *, batch_size: int = 32) -> JudgeReport:
    """Ask the judge about every clip and count its answers per group.

    Args:
        judge: any object with the ``Judge`` protocol.
        clips: what to ask; the truth is ``clip.label``.
        batch_size: videos per call.

    Raises:
        ValueError: no clips, or a judge that returns another number of verdicts than it was asked for.
    """
    asked = tuple(clips)
    if not asked:
        raise ValueError("there are no clips to evaluate the judge on; collect some episodes first")
    verdicts: list[Verdict] = []
    for begin in range(0, len(asked), batch_size):
        part = asked[begin : begin + batch_size]
        answers = judge([clip.video for clip in part], [clip.instruction for clip in part])
        if len(answers) != len(part):
            raise ValueError(f"the judge returned {len(answers)} verdicts for {len(part)} videos")
        verdicts += answers
    return report_on(asked, verdicts)


def report_on(clips: Sequence[JudgeClip], verdicts: Sequence[Verdict]) -> JudgeReport:
    """Count verdicts that were given already, one for each clip."""
    outcomes = np.array([int(verdict.outcome) for verdict in verdicts])
    labels = np.array([clip.label for clip in clips])
    members: dict[str, list[int]] = {}
    for index, clip in enumerate(clips):
        for group in clip.groups():
            members.setdefault(group, []).append(index)
    rows = {name: _row(outcomes[members[name]], labels[members[name]]) for name in sorted(members, key=_group_order)}
    return JudgeReport(rows, _sweep(verdicts, labels), tuple(clips), tuple(verdicts), _vote_sweep(verdicts, labels))


def contact_sheet(mistakes: Sequence[tuple[JudgeClip, Verdict]]) -> UInt8Array:
    """One line of pictures per mistake, the start frame left and the last frame right, captioned; uint8 (H, W, 3)."""
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


def _row(outcomes: np.ndarray, labels: np.ndarray) -> JudgeRow:
    readable = outcomes != Outcome.INVALID
    confusion = Confusion.over(outcomes[readable] == Outcome.SUCCESS, labels[readable])
    return JudgeRow(confusion, Rate.of(int((~readable).sum()), len(outcomes)))


def _sweep(verdicts: Sequence[Verdict], labels: np.ndarray) -> tuple[dict[str, Any], ...]:
    """Confusion at other thresholds, where the judge gives probabilities."""
    known = np.array([v.probability is not None and v.outcome != Outcome.INVALID for v in verdicts])
    if not known.any():
        return ()
    probabilities = np.array([v.probability for v, k in zip(verdicts, known, strict=True) if k], dtype=np.float64)
    truth = labels[known]
    return tuple({"threshold": t, **Confusion.over(probabilities >= t, truth).as_dict()} for t in SWEEP)


def _vote_sweep(verdicts: Sequence[Verdict], labels: np.ndarray) -> tuple[dict[str, Any], ...]:
    """Confusion and INVALID share if a success needed other numbers of votes, where the judge votes."""
    counted = [index for index, verdict in enumerate(verdicts) if verdict.votes]
    if not counted:
        return ()
    swept = []
    for need in range(1, max(len(verdicts[index].votes) for index in counted) + 1):
        outcomes = np.array([int(combine_votes(verdicts[index].votes, need).outcome) for index in counted])
        swept.append({"need": need, **_row(outcomes, labels[counted]).as_dict()})
    return tuple(swept)


def _group_order(name: str) -> tuple[int, str]:
    order = ("all", "source", "task", "kind", "trained", "held-out", "relation")
    return next(i for i, prefix in enumerate(order) if name.startswith(prefix)), name


def _is_wrong(clip: JudgeClip, verdict: Verdict) -> bool:
    return verdict.outcome != Outcome.INVALID and (verdict.outcome == Outcome.SUCCESS) != clip.label


def _confidence(verdict: Verdict) -> float:
    """How sure the judge was of its answer, in [0, 1]; 0.5 where it does not say."""
    if verdict.probability is None:
        return 0.5
    return verdict.probability if verdict.outcome == Outcome.SUCCESS else 1.0 - verdict.probability


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def _short(rate: Rate) -> str:
    return "-" if rate.n == 0 else f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
