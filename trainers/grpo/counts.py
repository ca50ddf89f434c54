"""Groups of rollouts, and what became of them in counts: over all and per task, for the log and for the console."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from rawdream_env.envs.episodes import Rollout
from rawdream_env.evaluation.reporting.numbers import aligned
from rawdream_env.judges.ensemble import JudgeGap
from rawdream_env.statistics import Rate
from rawdream_env.trainers.grpo.losses import DropReason, GroupAdvantages
from rawdream_env.types import Outcome, Start


@dataclass(frozen=True)
class Group:
    """G rollouts of one ``start``, with their advantages; ``index`` counts the groups of the step."""

    index: int
    start: Start
    members: tuple[Rollout, ...]
    result: GroupAdvantages

    @property
    def counted(self) -> list[tuple[Rollout, float]]:
        """The members that are trained on, with their advantages: valid and not flagged (R of Eq. 2)."""
        rows = zip(self.members, self.result.advantages.tolist(), self.result.valid.tolist(), strict=True)
        return [(member, advantage) for member, advantage, valid in rows if valid]


@dataclass
class RolloutCounts:
    """Counts over *all* rollouts, those of dropped groups included.

    ``successes`` by the first verdict; ``flagged``: a success whose second dream failed; ``invalid``: no verdict, or a
    success without a second one. The others are ``trusted``, with ``trusted_successes`` among them. ``others``: other
    verdicts of the trusted ones against the judge's, by name. ``tasks``: the same counts per task id.
    """

    rollouts: int = 0
    successes: int = 0
    flagged: int = 0
    invalid: int = 0
    trusted_successes: int = 0
    chunks: int = 0
    groups: int = 0
    dropped: Counter[DropReason] = field(default_factory=Counter)
    others: dict[str, JudgeGap] = field(default_factory=dict)
    tasks: dict[int, RolloutCounts] = field(default_factory=dict)

    @property
    def judged(self) -> int:
        """Rollouts whose verdicts are known, flagged ones included."""
        return self.rollouts - self.invalid

    @property
    def trusted(self) -> int:
        """Rollouts whose reward is known: judged and not flagged."""
        return self.judged - self.flagged

    def add(self, group: Group) -> None:
        """Count a finished group."""
        self._add(group)
        self.tasks.setdefault(group.start.task_id, RolloutCounts())._add(group)

    def _add(self, group: Group) -> None:
        self.groups += 1
        if group.result.dropped:
            self.dropped[group.result.dropped] += 1
        for member in group.members:
            success, trusted = member.verdict == Outcome.SUCCESS, member.valid and not member.flagged
            self.rollouts += 1
            self.successes += success
            self.flagged += member.flagged
            self.invalid += not member.valid and not member.flagged
            self.trusted_successes += success and trusted
            self.chunks += len(member)
            for name, other in member.other_verdicts.items() if trusted else ():
                self.others[name] = self.others.get(name, JudgeGap()) + JudgeGap.of([(success, other)])

    def __iadd__(self, other: RolloutCounts) -> Self:
        for name in ("rollouts", "successes", "flagged", "invalid", "trusted_successes", "chunks", "groups", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, gap in other.others.items():
            self.others[name] = self.others.get(name, JudgeGap()) + gap
        for task, counts in other.tasks.items():
            self.tasks[task] = self.tasks.get(task, RolloutCounts())
            self.tasks[task] += counts
        return self

    def rates(self) -> dict[str, float]:
        """The part of the log that is given for all rollouts and per task; see ``Rollouts.metrics``."""
        return {
            "n": self.rollouts,
            "success_rate": _share(self.successes, self.rollouts),
            "judged": self.judged,
            "flagged": self.flagged,
            "invalid": self.invalid,
            "trusted": self.trusted,
            "flagged_rate": self.flagged / self.successes if self.successes else 0.0,
            "invalid_rate": _share(self.invalid, self.rollouts),
            "trusted_rate": _share(self.trusted, self.rollouts),
            "trusted_success_rate": _share(self.trusted_successes, self.trusted),
            "groups": self.groups,
            "all_success_rate": _share(self.dropped["all_success"], self.groups),
            "all_failure_rate": _share(self.dropped["all_failure"], self.groups),
            **{f"{name}_success_rate": _share(gap.held_out, gap.n) for name, gap in sorted(self.others.items())},
        }

    def __str__(self) -> str:
        rate = f"{100 * self.trusted_successes / self.trusted:.0f} %" if self.trusted else "unknown"
        kept = self.groups - self.dropped.total()
        return (
            f"success {rate} (n={self.trusted}), {self.flagged} flagged, {self.invalid} INVALID, {kept} of {self.groups} "
            "groups kept"
        )


def table(counts: RolloutCounts, names: Mapping[int, str]) -> str:
    """One line per task, and one for all: success over the trusted rollouts, and the groups that give no signal."""
    others = sorted(counts.others)
    rows: list[list[Any]] = [["task", "success, judged and trusted", *others, "flagged", "INVALID"]]
    rows[0] += ["groups", "all success", "all failure"]
    for name, part in [*((names.get(t, str(t)), c) for t, c in sorted(counts.tasks.items())), ("all", counts)]:
        rates = part.rates()
        shares = [rates.get(f"{other}_success_rate", math.nan) for other in others]
        rows.append([name, Rate.of(part.trusted_successes, part.trusted), *map(_percent, shares)])
        rows[-1] += [part.flagged, part.invalid, part.groups]
        rows[-1] += [_percent(rates["all_success_rate"]), _percent(rates["all_failure_rate"])]
    return "\n".join(aligned([[str(cell) for cell in row] for row in rows]))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"
