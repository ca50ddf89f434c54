"""GRPO against TRL: the same numbers from TRL's own loss, and a TRL trainer that rolls out in our environments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rawdream_env.trainers.grpo.losses import LossType, grpo_loss

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'rawdream-env[trl]'")


def trl_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, loss_type: str
) -> tuple[Tensor, dict[str, Any]]:
    """``GRPOTrainer._compute_loss`` on given log-probabilities."""
    metrics: dict[str, Any] = {"train": {}, "eval": {}}
    for mode in metrics.values():
        names = ("low_mean", "high_mean", "region_mean", "low_min", "high_max")
        mode |= {name: [] for name in ("entropy", *(f"clip_ratio/{part}" for part in names))}
    same = lambda value, reduction="": value  # noqa: E731
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, -logprobs.detach(), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        beta=0.0, loss_type=loss_type, epsilon_low=0.2, epsilon_high=0.28, use_vllm=False, _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, steps_per_generation=1), model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, _metrics=metrics,
        accelerator=SimpleNamespace(num_processes=1, gather=same, reduce=same),
    )  # fmt: skip
    first = torch.ones(len(mask), 1)
    inputs = {
        "prompt_ids": first, "prompt_mask": first, "completion_ids": mask.float(), "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs), metrics["train"]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_our_loss_and_gradient_are_trl_s(loss_type: LossType) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    old, advantages = draw(6, 10) - 2, draw(6)
    mask = torch.arange(10) < torch.tensor([10, 3, 7, 10, 1, 5])[:, None]
    moved = (old + 0.3 * draw(6, 10)).requires_grad_()
    ours, metrics = grpo_loss(moved, old, advantages, mask, loss_type=loss_type)
    (gradient,) = torch.autograd.grad(ours, moved)
    theirs, logged = trl_loss(moved, old, advantages, mask, loss_type)
    (expected,) = torch.autograd.grad(theirs, moved)
    assert abs(ours.item() - theirs.item()) < 1e-6 and float((gradient - expected).abs().max()) < 1e-6
    assert float(metrics["clip_frac"]) == pytest.approx(logged["clip_ratio/region_mean"][0], abs=1e-6)
    assert float(metrics["clip_frac"]) > 0
    assert float(metrics["entropy"]) == pytest.approx(logged["entropy"][0], abs=1e-6)
