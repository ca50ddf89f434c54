"""Kept groups of rollouts as tensors to train on, weighted as in Eq. 2.

Shape letters: N trajectories, M chunks of all of them, m chunks of a minibatch, L tokens of a chunk, H W image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rawdream_env.trainers.grpo.groups import Rollouts
from rawdream_env.trainers.grpo.losses import LossType, token_weights


@dataclass(frozen=True)
class Batch:
    """A step's training data: N trajectories cut into M chunks of L tokens; ``trajectory`` (M,) says whose."""

    images: Tensor  # uint8 (M, H, W, 3)
    instructions: list[str]
    tokens: Tensor  # int64 (M, L)
    old_logprobs: Tensor  # fp32 (M, L)
    trajectory: Tensor  # int64 (M,)
    advantages: Tensor  # fp32 (N,)
    row_weights: Tensor  # fp32 (N,), 1/G_R of the trajectory's group

    @classmethod
    def of(cls, rollouts: Rollouts) -> Batch:
        """The trustworthy members of the kept groups; the others have advantage 0 and weight 0 (Eq. 2) and stay out."""
        chosen = [
            (group, member, float(advantage), 1.0 / int(group.result.trustworthy.sum()))
            for group in rollouts.groups
            for member, advantage, trusted in zip(
                group.members, group.result.advantages, group.result.trustworthy, strict=True
            )
            if trusted
        ]
        lengths = torch.tensor([len(member) for _, member, _, _ in chosen])
        return cls(
            images=torch.cat([torch.from_numpy(member.images) for _, member, _, _ in chosen]),
            instructions=[group.start.instruction for group, member, _, _ in chosen for _ in range(len(member))],
            tokens=torch.cat([member.tokens for _, member, _, _ in chosen]),
            old_logprobs=torch.cat([member.logprobs for _, member, _, _ in chosen]),
            trajectory=torch.repeat_interleave(torch.arange(len(chosen)), lengths),
            advantages=torch.tensor([advantage for _, _, advantage, _ in chosen]),
            row_weights=torch.tensor([weight for _, _, _, weight in chosen]),
        )

    def weights(self, trajectories: Tensor, loss_type: LossType) -> tuple[Tensor, Tensor]:
        """Chunks (m,) of the given trajectories and the weight (m,) of each of their tokens; all tokens sum to 1."""
        chunks = torch.isin(self.trajectory, trajectories).nonzero().squeeze(1)
        owner = self.trajectory[chunks]
        counts = torch.bincount(owner, minlength=len(self.advantages))
        mask = torch.arange(int(counts.max())) < counts[:, None]  # every chunk has L tokens: weigh chunks, share out
        per_chunk = token_weights(mask, loss_type, self.row_weights).amax(1)
        return chunks, per_chunk[owner] / self.tokens.shape[1]
