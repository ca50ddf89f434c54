"""One minibatch of GRPO's update: its gradient, and how far the policy is from the one that sampled, in microbatches and over
processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rawdream_env.errors import RawDreamError
from rawdream_env.trainers.common.distributed import ALONE, ProcessGroup, share_of
from rawdream_env.trainers.grpo.batch import Batch
from rawdream_env.trainers.grpo.config import GRPOConfig
from rawdream_env.trainers.grpo.losses import approx_kl, clipped_loss


class TrainingDivergedError(RawDreamError, RuntimeError):
    """The loss or its gradient is not finite, or training and sampling disagree about the log-probabilities."""


def add_gradients(
    config: GRPOConfig, policy: Any, batch: Batch, chunks: Tensor, weights: Tensor, group: ProcessGroup = ALONE
) -> tuple[float, list[dict[str, Tensor]]]:
    """Accumulate the gradient of one minibatch, ``microbatch_size`` chunks at a time and per process.

    Returns loss and metrics of all processes.
    """
    total, metrics = 0.0, list[dict[str, Tensor]]()
    parts = (share_of(tensor, config.microbatch_size, group) for tensor in (chunks, weights))
    for rows, weight in zip(*parts, strict=True):
        if not len(rows):  # the others have a chunk more
            (0 * policy.logprobs(*batch.inputs(chunks[:1]), temperature=config.temperature)).sum().backward()
            continue
        entropy: Tensor | None = None
        if hasattr(policy, "logprobs_and_entropy"):
            logprobs, entropy = policy.logprobs_and_entropy(*batch.inputs(rows), temperature=config.temperature)
        else:
            logprobs = policy.logprobs(*batch.inputs(rows), temperature=config.temperature)
        loss, part = clipped_loss(
            logprobs,
            batch.old_logprobs[rows].to(logprobs.device),
            batch.advantages[batch.trajectory[rows]].to(logprobs.device),
            weight[:, None].expand(-1, logprobs.shape[1]).to(logprobs.device),
            clip_eps_low=config.clip_eps_low,
            clip_eps_high=config.clip_eps_high,
            level=config.importance_sampling_level,
            entropy=entropy,
        )
        (group.loss_factor * loss).backward()
        total += float(loss.detach())
        metrics.append({name: value.cpu() for name, value in part.items()})
    everything = group.everyone((total, metrics))
    return sum(part for part, _ in everything), [piece for _, pieces in everything for piece in pieces]


@torch.no_grad()
def distance(config: GRPOConfig, policy: Any, batch: Batch, chunks: Tensor, group: ProcessGroup = ALONE) -> float:
    """approx_kl of the policy as it is now from the one that sampled, over the tokens of one minibatch."""
    total = 0.0
    for rows in share_of(chunks, config.microbatch_size, group):
        logprobs = policy.logprobs(*batch.inputs(rows if len(rows) else chunks[:1]), temperature=config.temperature)
        logprobs = logprobs[: len(rows)]
        total += float(approx_kl(logprobs, batch.old_logprobs[rows].to(logprobs.device)).sum(dtype=torch.float64))
    total = sum(group.everyone(total))
    return total / batch.old_logprobs[chunks].numel() if math.isfinite(total) else math.inf


def check_on_policy(error: float, policy: nn.Module, step: int, continuous: bool) -> None:
    """Before any update the ratio must be 1 up to rounding, on average over the tokens: 1e-5 in float32 on a CPU, or 1e-3 where
    a narrow density magnifies rounding.
    """
    exact = all(p.dtype in (torch.float32, torch.float64) for p in policy.parameters())
    on_cpu = all(p.device.type == "cpu" for p in policy.parameters())
    limit = (1e-3 if continuous else 1e-5) if exact and on_cpu else 1e-2 if exact else 0.5
    if not error <= limit:
        raise TrainingDivergedError(
            f"Step {step + 1}: before the first update the probability ratio is off 1 by {error:.3g} (limit "
            f"{limit:g}): act() and logprobs() disagree. Look for dropout left on, another temperature, or other image "
            "processing."
        )
