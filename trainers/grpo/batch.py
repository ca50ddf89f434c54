"""What a step of rollouts gives: the groups to train on with their counts, and the same as one batch of chunks.

Shape letters: G members of a group, N trajectories, M chunks of all of them, m chunks of a minibatch, L tokens of a chunk,
H W image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rawdream_env.statistics import wilson_interval
from rawdream_env.trainers.common.distributed import ProcessGroup
from rawdream_env.trainers.grpo.counts import Group, RolloutCounts
from rawdream_env.trainers.grpo.losses import DROP_REASONS, LossType, token_weights


@dataclass(frozen=True)
class Rollouts:
    """The ``groups`` to train on, in order of their index, and the counts over everything that was rolled out."""

    groups: tuple[Group, ...]
    counts: RolloutCounts

    def everywhere(self, group: ProcessGroup) -> Rollouts:
        """The groups and counts of all processes, on each of them."""
        if group.size == 1:
            return self
        light = [
            replace(g, members=tuple(replace(m, frames=None, trajectory=None) for m in g.members)) for g in self.groups
        ]
        counts, groups = RolloutCounts(), list[Group]()
        for theirs, count in group.everyone((light, self.counts)):
            groups += theirs
            counts += count
        return Rollouts(tuple(sorted(groups, key=lambda g: g.index)), counts)

    def metrics(self) -> dict[str, float]:
        """For the log, over all rollouts of the step, those of dropped groups included.

        ======================  ======================================================================================
        n                       rollouts
        success_rate            first verdicts that are SUCCESS / n: flagged ones are successes, INVALID ones failures
        judged, invalid         rollouts with and without a verdict (or a success without a second one)
        flagged, trusted        judged rollouts whose success did not repeat, and the others
        flagged_rate            flagged / successes
        invalid_rate            invalid / n
        trusted_rate            trusted / n
        trusted_success_rate    successes among the trusted / trusted
        held_out_success_rate   the hold-out judge's, over the trusted that it could judge
        state_success_rate      the same by ``info["state_success"]``
        groups                  groups rolled out
        all_success_rate        groups of which every trusted member succeeds / groups; they give no gradient
        all_failure_rate        groups of which none does / groups
        ======================  ======================================================================================

        These are also logged per task, as ``KEY/task_ID``; a share of nothing is null. Besides: ``success_low``,
        ``success_high``, ``trusted_success_low`` and ``trusted_success_high``, 95 % Wilson intervals; ``reward``, the mean
        over what is trained on; ``chunks_per_rollout``; ``groups_kept``; ``dropped_REASON``, numbers of dropped groups.
        """
        counts = self.counts
        low, high = wilson_interval(counts.successes, counts.rollouts)
        trusted_low, trusted_high = wilson_interval(counts.trusted_successes, counts.trusted)
        rewards = [member.reward for group in self.groups for member, _ in group.counted]
        tasks = sorted(counts.tasks.items())
        return {
            **counts.rates(),
            "success_low": low,
            "success_high": high,
            "trusted_success_low": trusted_low,
            "trusted_success_high": trusted_high,
            "reward": sum(rewards) / len(rewards),
            "chunks_per_rollout": counts.chunks / counts.rollouts,
            "groups_kept": len(self.groups),
            **{f"dropped_{reason}": counts.dropped[reason] for reason in DROP_REASONS},
            **{f"{key}/task_{task}": value for task, part in tasks for key, value in part.rates().items()},
        }


@dataclass(frozen=True)
class Batch:
    """A step's training data: N trajectories cut into M chunks of L tokens; ``trajectory`` (M,) is a chunk's trajectory."""

    images: Tensor  # uint8 (M, H, W, 3)
    instructions: list[str]
    tokens: Tensor  # int64 (M, L)
    old_logprobs: Tensor  # fp32 (M, L)
    trajectory: Tensor  # int64 (M,)
    advantages: Tensor  # fp32 (N,)
    row_weights: Tensor  # fp32 (N,), 1/G_R of the trajectory's group

    @classmethod
    def of(cls, rollouts: Rollouts) -> Batch:
        """The counted members of the kept groups; the others have advantage 0 and weight 0 (Eq. 2) and are left out."""
        chosen = [
            (member, advantage, 1.0 / len(counted))
            for counted in (group.counted for group in rollouts.groups)
            for member, advantage in counted
        ]
        members = [member for member, _, _ in chosen]
        return cls(
            images=torch.cat([torch.from_numpy(member.images) for member in members]),
            instructions=[member.start.instruction for member in members for _ in range(len(member))],
            tokens=torch.cat([member.tokens for member in members]),
            old_logprobs=torch.cat([member.logprobs for member in members]),
            trajectory=torch.repeat_interleave(torch.arange(len(members)), torch.tensor([len(m) for m in members])),
            advantages=torch.tensor([advantage for _, advantage, _ in chosen]),
            row_weights=torch.tensor([weight for _, _, weight in chosen]),
        )

    def inputs(self, rows: Tensor) -> tuple[Tensor, list[str], Tensor]:
        """Images, instructions and tokens of the chunks ``rows``."""
        return self.images[rows], [self.instructions[row] for row in rows.tolist()], self.tokens[rows]

    def weights(self, trajectories: Tensor, loss_type: LossType) -> tuple[Tensor, Tensor]:
        """Chunks (m,) of the given trajectories and the weight (m,) of each of their tokens; all tokens sum to 1."""
        chunks = torch.isin(self.trajectory, trajectories).nonzero().squeeze(1)
        owner = self.trajectory[chunks]
        counts = torch.bincount(owner, minlength=len(self.advantages))
        mask = torch.arange(int(counts.max())) < counts[:, None]  # every chunk has L tokens: weigh chunks, share out
        per_chunk = token_weights(mask, loss_type, self.row_weights).amax(1)
        return chunks, per_chunk[owner] / self.tokens.shape[1]
