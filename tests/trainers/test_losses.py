"""GRPO's numbers, against values worked out by hand (float64)."""

from __future__ import annotations

import math

import pytest
import torch

from rawdream_env.errors import InvalidOptionError
from rawdream_env.trainers.grpo.losses import clipped_loss, group_advantages, grpo_loss, merge_metrics, token_weights


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_advantages_of_one_success_in_four() -> None:
    # mean 1/4; squared deviations 9/16 + 3/16 = 3/4; unbiased variance 1/4; std 1/2
    result = group_advantages(t(1, 0, 0, 0))
    assert result.dropped == ""
    close(result.advantages, t(0.75, -0.25, -0.25, -0.25) / (0.5 + 1e-6))


def test_advantages_without_scaling() -> None:
    close(group_advantages(t(1, 0, 0, 0), scale_rewards="none").advantages, t(0.75, -0.25, -0.25, -0.25))


def test_leave_one_out_by_hand() -> None:
    # 1 - (0+0+0)/3 = 1; 0 - (1+0+0)/3 = -1/3. With the flagged member left out: others of (1, 0.2) are 0.2 and 1.
    rloo = group_advantages(t(1, 0, 0, 0), baseline="leave_one_out", scale_rewards="none")
    close(rloo.advantages, t(1, -1 / 3, -1 / 3, -1 / 3))
    flagged = torch.tensor([False, True, False])
    rloo = group_advantages(t(1, 1, 0.2), None, flagged, baseline="leave_one_out", scale_rewards="none")
    close(rloo.advantages, t(0.8, 0, -0.8))
    scaled = group_advantages(t(1, 0, 0, 0), baseline="leave_one_out").advantages  # std 1/2
    close(scaled, t(1, -1 / 3, -1 / 3, -1 / 3) / (0.5 + 1e-6))


def test_flagged_and_invalid_members_leave_the_statistics_and_get_exactly_zero() -> None:
    # Trustworthy: 1, 0, 0, 1 -> mean 1/2, variance 4 * 1/4 / 3 = 1/3. The flagged 1 and the invalid 0 do not count.
    flagged = torch.tensor([False, True, False, False, False, False])
    valid = torch.tensor([True, True, True, False, True, True])
    result = group_advantages(t(1, 1, 0, 0, 0, 1), valid, flagged)
    scale = math.sqrt(1 / 3) + 1e-6
    close(result.advantages, t(0.5, 0, -0.5, 0, -0.5, 0.5) / scale)
    assert result.advantages[1] == 0 and result.advantages[3] == 0
    assert result.valid.tolist() == [True, False, True, False, True, True]


def test_replacing_the_reward_by_the_mean_is_the_same_thing() -> None:
    """The appendix's wording: the flagged reward becomes the mean of the others; the mean does not move."""
    rewards, flagged = t(1, 0, 0, 1, 1), torch.tensor([False, False, False, False, True])
    replaced = torch.where(flagged, rewards[~flagged].mean(), rewards)
    assert replaced.mean() == rewards[~flagged].mean()
    centred = replaced - rewards[~flagged].mean()
    close(group_advantages(rewards, None, flagged, scale_rewards="none").advantages, centred)


@pytest.mark.parametrize(("num_flagged", "dropped"), [(0, ""), (2, ""), (3, "untrustworthy")])
def test_more_than_two_flagged_drop_the_group(num_flagged: int, dropped: str) -> None:
    flagged = torch.arange(8) < num_flagged
    result = group_advantages(t(1, 1, 1, 1, 0, 0, 0, 0), None, flagged, max_flagged=2)
    assert result.dropped == dropped
    assert bool(result.advantages.any()) == (dropped == "")


def test_invalid_counts_like_flagged() -> None:
    flagged, valid = torch.arange(8) < 2, torch.arange(8) < 7
    assert group_advantages(t(1, 1, 1, 1, 0, 0, 0, 0), valid, flagged).dropped == "untrustworthy"


@pytest.mark.parametrize(
    ("rewards", "dropped"), [((1, 1, 1), "all_success"), ((0, 0, 0), "all_failure"), ((0.5, 0.5, 0.5), "all_equal")]
)
def test_equal_rewards_give_nothing(rewards: tuple[float, ...], dropped: str) -> None:
    result = group_advantages(t(*rewards))
    assert result.dropped == dropped and not result.advantages.any()


def test_a_group_equal_but_for_its_flagged_member_gives_nothing() -> None:
    result = group_advantages(t(0, 0, 1, 0), None, torch.tensor([False, False, True, False]))
    assert result.dropped == "all_failure" and not result.advantages.any()


def test_one_valid_member_is_no_group() -> None:
    result = group_advantages(t(0, 1), None, torch.tensor([False, True]))
    assert result.dropped == "untrustworthy" and not result.advantages.any()


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(InvalidOptionError, match=r"valid must be bool \(2,\), got torch.bool \(3,\)"):
        group_advantages(t(1, 0), torch.ones(3, dtype=torch.bool))
    with pytest.raises(InvalidOptionError, match="rewards must be floating"):
        group_advantages(torch.tensor([1, 0]))


MASK = torch.tensor([[True, True, True, True], [True, False, False, False], [False, False, False, False]])


def test_weights_per_trajectory_and_per_token() -> None:
    by_row = token_weights(MASK, "grpo", torch.ones(3, dtype=torch.float64))
    close(by_row, torch.tensor([[1 / 8] * 4, [1 / 2, 0, 0, 0], [0] * 4], dtype=torch.float64))
    by_token = token_weights(MASK, "dapo", torch.ones(3, dtype=torch.float64))
    close(by_token, torch.tensor([[1 / 5] * 4, [1 / 5, 0, 0, 0], [0] * 4], dtype=torch.float64))
    # Two groups with 1 and 2 valid members: each group counts a half.
    weighted = token_weights(torch.ones(3, 2, dtype=torch.bool), "grpo", t(1, 1 / 2, 1 / 2))
    close(weighted.sum(1), t(1 / 2, 1 / 4, 1 / 4))
    with pytest.raises(InvalidOptionError, match="no token"):
        token_weights(MASK[2:])
    with pytest.raises(InvalidOptionError, match="loss_type='sequence'"):
        token_weights(MASK, "sequence")  # type: ignore[arg-type]


def ratios(*rows: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    old = torch.full((len(rows), len(rows[0])), -1.5, dtype=torch.float64)
    return (old + torch.tensor(rows, dtype=torch.float64).log()).requires_grad_(), old


def test_clipping_by_hand() -> None:
    # A = +2: min(1.5 * 2, 1.28 * 2) = 2.56 (cut), min(0.5 * 2, 0.8 * 2) = 1, 1.1 * 2 = 2.2
    # A = -1: min(-1.5, -1.28) = -1.5, min(-0.5, -0.8) = -0.8 (cut), -1.1
    logprobs, old = ratios((1.5, 0.5, 1.1), (1.5, 0.5, 1.1))
    loss, metrics = grpo_loss(logprobs, old, t(2, -1), torch.ones(2, 3, dtype=torch.bool))
    close(loss.detach(), t(-((2.56 + 1 + 2.2) / 3 + (-1.5 - 0.8 - 1.1) / 3) / 2)[0])
    assert float(metrics["clip_frac"]) == pytest.approx(2 / 6)
    assert float(metrics["ratio_mean"]) == pytest.approx(3.1 / 3)
    assert float(metrics["ratio_max"]) == pytest.approx(1.5)
    assert float(metrics["ratio_deviation"]) == pytest.approx(0.5)
    assert float(metrics["ratio_error"]) == pytest.approx(1.1 / 3)
    kl = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)) / 3
    assert float(metrics["approx_kl"]) == pytest.approx(kl)
    assert float(metrics["entropy"]) == pytest.approx(-float(logprobs.detach().mean()))
    loss.backward()  # type: ignore[no-untyped-call]
    # d/dlogp of -(w r A) is -w r A where the clip does not cut, else 0; w = 1/6
    expected = torch.tensor([[0, -0.5 * 2, -1.1 * 2], [1.5, 0, 1.1]], dtype=torch.float64) / 6
    assert logprobs.grad is not None
    close(logprobs.grad, expected)


def test_a_ratio_per_chunk_is_the_product_over_its_tokens() -> None:
    # 1.5 * 0.8 = 1.2 (free for A = 2), 1.1 * 0.5 = 0.55 -> 0.8 (cut for A = -1); the weights are 1/2 each
    logprobs, old = ratios((1.5, 0.8), (1.1, 0.5))
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss, metrics = grpo_loss(logprobs, old, t(2, -1), mask, level="chunk")
    close(loss.detach(), t(-(1.2 * 2 - 0.8) / 2)[0])
    assert float(metrics["clip_frac"]) == 1 / 2 and float(metrics["ratio_max"]) == pytest.approx(1.2)
    assert float(metrics["ratio_deviation"]) == pytest.approx(0.5) and float(metrics["num_tokens"]) == 4
    loss.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    close(logprobs.grad, t(-1.2, -1.2, 0, 0).reshape(2, 2))


def test_mean_over_time_then_over_the_group_against_every_token_alike() -> None:
    logprobs, old = ratios((1.1, 1.1, 1.1, 1.1), (1.2, 9.0, 9.0, 9.0))
    trajectory, _ = grpo_loss(logprobs, old, t(1, -1), MASK[:2])
    close(trajectory.detach(), t(-(1.1 - 1.2) / 2)[0])
    token, _ = grpo_loss(logprobs, old, t(1, -1), MASK[:2], loss_type="dapo")
    close(token.detach(), t(-(4 * 1.1 - 1.2) / 5)[0])


def test_at_the_first_update_the_loss_is_minus_the_mean_advantage_and_its_gradient_the_policy_gradient() -> None:
    logprobs, old = ratios((1, 1), (1, 1))
    loss, metrics = grpo_loss(logprobs, old, t(0.7, -0.2), torch.ones(2, 2, dtype=torch.bool))
    close(loss.detach(), t(-0.25)[0])
    assert float(metrics["approx_kl"]) == 0 and float(metrics["clip_frac"]) == 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    close(logprobs.grad, -torch.tensor([[0.7, 0.7], [-0.2, -0.2]], dtype=torch.float64) / 4)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_tokens_may_hold_anything(poison: float) -> None:
    logprobs, old = ratios((1.1, 1, 1, 1), (1.2, 1, 1, 1))
    mask = torch.tensor([[True, False, False, False]] * 2)
    poisoned = torch.where(mask, logprobs.detach(), poison).requires_grad_()
    loss, metrics = grpo_loss(poisoned, old, t(1, -1), mask)
    close(loss.detach(), t(0.05)[0])
    loss.backward()  # type: ignore[no-untyped-call]
    assert poisoned.grad is not None and bool(poisoned.grad.isfinite().all())
    assert all(math.isfinite(float(value)) for value in metrics.values())


def test_a_batch_cut_into_pieces_gives_the_same_loss_and_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old = (torch.randn(6, 5, generator=generator, dtype=torch.float64) * 0.3 - 1 for _ in range(2))
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    weights = token_weights(torch.rand(6, 5, generator=generator) < 0.7, row_weights=torch.ones(6, dtype=torch.float64))
    whole, metrics = clipped_loss(logprobs, old, advantages, weights)
    parts = [
        clipped_loss(logprobs[i : i + 2], old[i : i + 2], advantages[i : i + 2], weights[i : i + 2]) for i in (0, 2, 4)
    ]
    close(torch.stack([loss for loss, _ in parts]).sum(), whole)
    merged = merge_metrics([part for _, part in parts])
    assert merged == pytest.approx({name: float(value) for name, value in metrics.items()}, abs=1e-12)


def test_the_two_bounds_are_not_exchanged() -> None:
    # low 0.1, high 0.5. A = +1: 1.3 is free, 1.6 is cut to 1.5. A = -1: 0.7 is cut to 0.9, 0.95 is free.
    logprobs, old = ratios((1.3, 1.6), (0.7, 0.95))
    mask, bounds = torch.ones(2, 2, dtype=torch.bool), {"clip_eps_low": 0.1, "clip_eps_high": 0.5}
    wanted = -((1.3 + 1.5) / 2 + (-0.9 - 0.95) / 2) / 2
    for loss, metrics in (
        grpo_loss(logprobs, old, t(1, -1), mask, **bounds),
        clipped_loss(logprobs, old, t(1, -1), torch.full((2, 2), 0.25, dtype=torch.float64), **bounds),
    ):
        close(loss.detach(), t(wanted)[0])
        assert float(metrics["clip_frac"]) == 2 / 4
