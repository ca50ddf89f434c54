"""The formulas of GRPO as pure functions (RAW-Dream section 3.2, Eq. 2 and 3, appendix A.2).

Shape letters: G members of a group, N rows (trajectories, or chunks of them), S tokens in a row. ``loss_type``,
``scale_rewards`` and ``importance_sampling_level`` are TRL's options; ``clip_eps_low`` is TRL's ``epsilon``,
``clip_eps_high`` its ``epsilon_high``, ``group_size`` its ``num_generations``. There is no ``beta``: the paper has no KL term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rawdream_env.errors import InvalidOptionError

LossType = Literal["grpo", "dapo", "trajectory", "token"]
""""trajectory" and "token" are former names of "grpo" and "dapo"."""
ScaleRewards = Literal["group", "none"]
RatioLevel = Literal["token", "chunk"]
Baseline = Literal["mean", "leave_one_out"]
DropReason = Literal["", "untrustworthy", "all_success", "all_failure", "all_equal"]

DROP_REASONS: tuple[DropReason, ...] = ("untrustworthy", "all_success", "all_failure", "all_equal")
"""Why a group is dropped: too many flagged or invalid members, or no difference between its rewards."""

STD_EPS = 1e-6
"""Added to the standard deviation of the rewards."""


@dataclass(frozen=True)
class GroupAdvantages:
    """``advantages`` (G,), 0 for members that are not ``valid`` (G,) bool, which includes flagged ones; ``dropped``: why
    the group is not used, or "".
    """

    advantages: Tensor
    valid: Tensor
    dropped: DropReason = ""


def group_advantages(
    rewards: Tensor,
    valid: Tensor | None = None,
    flagged: Tensor | None = None,
    *,
    max_flagged: int = 2,
    scale_rewards: ScaleRewards = "group",
    baseline: Baseline = "mean",
) -> GroupAdvantages:
    """Advantages of one group over its valid, unflagged members R (Eq. 3): (R_i - mean_R) / (std_R + 1e-6).

    The standard deviation is the unbiased one, over all of R.

    Args:
        rewards: floating (G,), finite for members of R.
        valid: bool (G,), False for members whose verdict is INVALID; None: all are valid.
        flagged: bool (G,), True where dual-noise verification disagreed; None: none is.
        max_flagged: a group with more members outside R than this is dropped. An INVALID member counts like a
            flagged one.
        scale_rewards: "group" divides by the standard deviation, "none" only subtracts the baseline.
        baseline: "mean" of R, or "leave_one_out": the mean of the other members of R (RLOO), which is the mean's advantage
            times n / (n - 1) for n members.

    A flagged or invalid member's reward is replaced by the mean of the others (appendix A.2), so its advantage is
    exactly 0. Groups with fewer than two members in R, or with equal rewards in R, are dropped: all advantages 0.
    ``InvalidOptionError`` for shapes that do not fit.
    """
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise InvalidOptionError(f"rewards must be floating (G,), got {rewards.dtype} {tuple(rewards.shape)}.")
    counted = torch.ones_like(rewards, dtype=torch.bool)
    for name, mask, wanted in (("valid", valid, True), ("flagged", flagged, False)):
        if mask is None:
            continue
        if mask.shape != rewards.shape or mask.dtype != torch.bool:
            raise InvalidOptionError(
                f"{name} must be bool {tuple(rewards.shape)}, got {mask.dtype} {tuple(mask.shape)}."
            )
        counted = counted & (mask == wanted)
    nothing = torch.zeros_like(rewards)
    chosen = rewards[counted]
    if len(rewards) - len(chosen) > max_flagged or len(chosen) < 2:
        return GroupAdvantages(nothing, counted, "untrustworthy")
    if bool((chosen == chosen[0]).all()):
        value = float(chosen[0])
        return GroupAdvantages(
            nothing, counted, "all_success" if value == 1 else "all_failure" if value == 0 else "all_equal"
        )
    centred = rewards - chosen.mean()
    if baseline == "leave_one_out":
        centred = centred * len(chosen) / (len(chosen) - 1)
    scale = chosen.std(correction=1) + STD_EPS if scale_rewards == "group" else torch.ones_like(chosen[0])
    return GroupAdvantages(torch.where(counted, centred / scale, nothing), counted)


def token_weights(mask: Tensor, loss_type: LossType = "grpo", row_weights: Tensor | None = None) -> Tensor:
    """Weight of each of (N, S) tokens. The weights sum to 1, so the losses of parts of a batch can be added.

    "grpo" (paper, Eq. 2): mean over a row's tokens, then over rows in proportion to ``row_weights`` (N,) (default
    equal; 1/G_R per row gives Eq. 2 for groups with different numbers G_R of members in R). "dapo": every token counts
    equally, times its row's weight. Rows whose ``mask`` (N, S) is False throughout have weight 0.
    """
    if loss_type not in get_args(LossType):
        raise InvalidOptionError(f"loss_type={loss_type!r} is not known; choose 'grpo' or 'dapo'.")
    weights = mask.to(torch.get_default_dtype() if row_weights is None else row_weights.dtype)
    if loss_type in ("grpo", "trajectory"):
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    if row_weights is not None:
        weights = weights * row_weights[:, None]
    total = weights.sum()
    if not bool(total > 0):
        raise InvalidOptionError("mask leaves no token to train on.")
    return weights / total


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Estimate (r - 1) - ln r of the divergence from the policy that sampled, per token; never negative."""
    log_ratio = logprobs - old_logprobs
    return log_ratio.exp() - 1 - log_ratio


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.28,
    level: RatioLevel = "token",
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the clipped objective of Eq. 2, weighted: ``-sum(w * min(r A, clip(r, 1-eps_low, 1+eps_high) A))``.

    With ``level`` "token" the ratio r is that of one token, and each token is clipped by itself. With "chunk", rows are chunks:
    r is the product of the ratios of a row's tokens, clipped once, and its weight the sum of theirs.

    Args:
        logprobs: (N, S) under the current policy, differentiable. old_logprobs: (N, S), recorded when sampling.
        advantages: (N,), one per row. weights: (N, S) from :func:`token_weights`; 0 masks a token.
        entropy: (N, S) in nats, for the metric only; without it the metric is the sampled estimate ``-logprobs``.

    Returns:
        The scalar loss and detached metrics over the tokens with weight > 0: ``approx_kl`` (the estimate
        (r - 1) - ln r, never negative), ``ratio_error`` (of |r - 1|), ``entropy``: plain means; ``ratio_deviation`` (of
        |r - 1|): the largest; ``num_tokens``. Over the ratios of ``level``: ``clip_frac`` (share without a gradient because of
        the clip), ``ratio_mean``, ``ratio_max``.
    """
    counted = weights > 0
    # Masked tokens may have any value, including -inf and NaN, and must not reach the gradient: 0 * inf is NaN.
    log_ratio = torch.where(counted, logprobs - old_logprobs.detach(), torch.zeros_like(logprobs))
    token_log_ratio = log_ratio.detach()[counted]
    if level == "chunk":
        log_ratio, weights = log_ratio.sum(-1, keepdim=True), weights.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    signed = advantages.detach()[:, None]
    clipped = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    loss = -(weights * torch.minimum(ratio * signed, clipped * signed)).sum()
    with torch.no_grad():
        r, by_token = ratio[weights > 0], token_log_ratio.exp()
        sign = signed.expand_as(ratio)[weights > 0]
        cut = ((r > 1 + clip_eps_high) & (sign > 0)) | ((r < 1 - clip_eps_low) & (sign < 0))
        metrics = {
            "approx_kl": (by_token - 1 - token_log_ratio).mean(),
            "clip_frac": cut.to(r.dtype).mean(),
            "ratio_mean": r.mean(),
            "ratio_error": (by_token - 1).abs().mean(),
            "entropy": (-logprobs if entropy is None else entropy)[counted].mean(),
            "ratio_max": r.max(),
            "ratio_deviation": (by_token - 1).abs().max(),
            "num_tokens": counted.sum(),
        }
    return loss, metrics


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.28,
    loss_type: LossType = "grpo",
    *,
    level: RatioLevel = "token",
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 2 for N trajectories of S padded tokens; ``mask`` (N, S) is True on real tokens. See ``clipped_loss``."""
    weights = token_weights(mask, loss_type, torch.ones_like(logprobs[:, 0]).detach())
    return clipped_loss(
        logprobs,
        old_logprobs,
        advantages,
        weights,
        clip_eps_low=clip_eps_low,
        clip_eps_high=clip_eps_high,
        level=level,
        entropy=entropy,
    )


def merge_metrics(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """The metrics of several ``clipped_loss`` calls, as if one call had seen all their tokens."""
    counts = torch.stack([part["num_tokens"] for part in parts]).double()
    merged: dict[str, float] = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts]).double()
        if name == "num_tokens":
            merged[name] = float(values.sum())
        elif name in ("ratio_max", "ratio_deviation"):
            merged[name] = float(values.max())
        else:
            merged[name] = float((values * counts).sum() / counts.sum())
    return merged
