"""What a step of GRPO has rolled out: episodes, groups of them, and counts over everything.

Shape letters: T chunks in an episode, L tokens of a chunk, H W image, G members of a group.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from rawdream_env.trainers.grpo.losses import DropReason, GroupAdvantages
from rawdream_env.types import Outcome, Start, UInt8Array


@dataclass(frozen=True)
class Rollout:
    """One episode: ``images`` uint8 (T, H, W, 3), what the policy saw before each chunk; ``tokens`` int64 (T, L);
    ``logprobs`` fp32 (T, L) at the sampling temperature; ``reward`` summed over the episode.

    ``verdict`` of the episode's end; ``valid`` False where nothing trustworthy is known; ``flagged`` by dual-noise
    verification. ``seed`` is the environment row's seed: with the start it names the episode's noise.
    """

    images: UInt8Array
    tokens: Tensor
    logprobs: Tensor
    reward: float
    verdict: Outcome
    valid: bool
    flagged: bool
    seed: int

    def __len__(self) -> int:
        """Chunks T."""
        return len(self.images)


@dataclass(frozen=True)
class Group:
    """G rollouts of one ``start``, with their advantages; ``index`` counts the groups of the step."""

    index: int
    start: Start
    members: tuple[Rollout, ...]
    result: GroupAdvantages


@dataclass
class RolloutCounts:
    """Counts over *all* rollouts of a step, also those of dropped groups."""

    rollouts: int = 0
    successes: int = 0
    flagged: int = 0
    invalid: int = 0
    chunks: int = 0
    groups: int = 0
    dropped: Counter[DropReason] = field(default_factory=Counter)
    task_rollouts: Counter[int] = field(default_factory=Counter)
    task_successes: Counter[int] = field(default_factory=Counter)

    def add(self, group: Group) -> None:
        """Count a finished group."""
        self.groups += 1
        if group.result.dropped:
            self.dropped[group.result.dropped] += 1
        for member in group.members:
            success = member.verdict == Outcome.SUCCESS
            self.rollouts += 1
            self.successes += success
            self.flagged += member.flagged
            self.invalid += not member.valid and not member.flagged
            self.chunks += len(member)
            self.task_rollouts[group.start.task_id] += 1
            self.task_successes[group.start.task_id] += success


@dataclass(frozen=True)
class Rollouts:
    """The ``groups`` to train on, in order of their index, and the counts over everything that was rolled out."""

    groups: tuple[Group, ...]
    counts: RolloutCounts


def why_none(counts: RolloutCounts, max_flagged: int) -> str:
    """One sentence on why every group of a step was dropped, and what to change."""
    reasons = ", ".join(f"{count} {name}" for name, count in sorted(counts.dropped.items()))
    rate = f"{counts.successes} of {counts.rollouts} rollouts succeeded"
    most = counts.dropped.most_common(1)[0][0]
    advice = {
        "all_success": "the policy solves these starts: stop here, choose harder ones (layout, task), raise temperature",
        "all_failure": "the policy never succeeds: give it more demonstrations first, choose easier starts (layout, "
        "task), change temperature, or raise group_size or max_groups_per_step",
        "untrustworthy": f"more than max_flagged={max_flagged} members of a group were flagged or invalid: look at the "
        "judge, train the world model longer, or raise max_flagged",
        "all_equal": "all rewards of a group are the same: raise temperature or group_size",
    }
    return f"None of {counts.groups} groups can be trained on ({reasons}; {rate}); {advice.get(most, '')}."
