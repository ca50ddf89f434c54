"""Losses of the policy's supervised fine-tuning.

Shape letters: B rows, L tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rawdream_env.policies.action_tokens import log_distribution, smoothed_targets

READOUT_SCALE = (0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 1.0) + (0.1,) * 6
"""Metres, radians and gripper command of the auxiliary read-out per unit of the head's output."""


def token_loss(logits: Tensor, tokens: Tensor, label_sigma: float) -> Tensor:
    """Mean cross-entropy in nats of ``logits`` (B, L, 256) against ``tokens`` (B, L), smoothed over neighbouring bins."""
    targets = smoothed_targets(tokens, label_sigma)
    return -(targets * log_distribution(logits, 1.0)).sum(-1).mean()


def readout_loss(readout: Tensor, target: Tensor) -> Tensor:
    """Huber loss of the scaled positions, averaged over known values: ``target`` (B, 13) in SI units, NaN where unknown."""
    known = ~torch.isnan(target)
    scaled = torch.nan_to_num(target) / target.new_tensor(READOUT_SCALE)
    loss = F.smooth_l1_loss(readout.float(), scaled, beta=0.2, reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)
