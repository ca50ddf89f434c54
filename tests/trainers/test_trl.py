"""GRPO against TRL: the same numbers from TRL's own loss, and a TRL trainer that rolls out in our environments."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_grpo import show_gripper_env
from torch import Tensor

from rawdream_env.errors import InvalidOptionError
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.seeding import mix
from rawdream_env.trainers.grpo import GRPOConfig, train_grpo
from rawdream_env.trainers.grpo.batch import Batch
from rawdream_env.trainers.grpo.gradients import add_gradients
from rawdream_env.trainers.grpo.losses import LossType, grpo_loss
from rawdream_env.types import Video
from rawdream_env.wrappers import DualNoiseVerification

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'rawdream-env[trl]'")
from rawdream_env.trainers.trl import EnvGRPOTrainer  # noqa: E402


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


def sizes() -> TinyVLAConfig:
    return TinyVLAConfig(image_size=16, stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2)


def flagging_env() -> Any:
    """Hallucinations, which verification flags, so that groups differ in their trusted members; some episodes end early."""
    options: dict[str, Any] = {"task": None, "layout": None, "autoreset_mode": "Disabled"}
    env = show_gripper_env(12, judge=ScriptedJudge(bright_or_not), judge_every="chunk", **options)
    env.world_model.hallucinate = 0.08
    return DualNoiseVerification(env)


def bright_or_not(video: Video, instruction: str) -> bool:
    return bool(video.frames[-1].mean() > 150)


def arguments(folder: Path, **options: Any) -> Any:
    return trl.GRPOConfig(
        str(folder), num_generations=4, per_device_train_batch_size=16, gradient_accumulation_steps=1, temperature=1.2,
        epsilon_high=0.28, learning_rate=1e-3, lr_scheduler_type="constant", max_steps=2, bf16=False, use_cpu=True, seed=3,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_same_rollouts_give_the_same_loss_and_gradients(loss_type: LossType, tmp_path: Path) -> None:
    policy = TinyVLA(sizes())
    trainer = EnvGRPOTrainer(policy, flagging_env(), arguments(tmp_path, loss_type=loss_type))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions([])
    assert trainer.rollouts is not None and trainer.rollouts.counts.flagged > 0
    batch = Batch.of(trainer.rollouts)
    assert len({*torch.bincount(batch.trajectory).tolist()}) > 1 and len({*batch.row_weights.tolist()}) > 1
    with torch.no_grad():  # away from ratio 1, so that the clip cuts
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    config = GRPOConfig(tmp_path, temperature=1.2, loss_type=loss_type)
    ours, pieces = add_gradients(config, policy, batch, *batch.weights(torch.arange(len(batch.advantages)), loss_type))
    assert abs(ours - theirs.item()) < 1e-6 and pieces[0]["clip_frac"] > 0.01
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_training_by_trl_ends_with_our_weights(tmp_path: Path) -> None:
    before, policy = TinyVLA(sizes()), TinyVLA(sizes())
    trainer = EnvGRPOTrainer(policy, flagging_env(), arguments(tmp_path / "trl", loss_type="grpo", weight_decay=0.0))
    trainer.train()
    assert [log["success_rate"] for log in trainer.state.log_history if "success_rate" in log]
    options: dict[str, Any] = {"warmup_steps": 0, "max_kl": None, "ema": 0.0, "minibatches": 1, "progress": False}
    config = GRPOConfig(
        tmp_path / "ours", steps=2, group_size=4, groups_per_step=4, temperature=1.2, lr=1e-3, seed=mix(3, 0),
        tensorboard=False, **options,
    )  # fmt: skip
    result = train_grpo(config, env=flagging_env(), policy=TinyVLA(sizes()))
    start, theirs, ours = (
        torch.cat([p.detach().flatten() for p in x.parameters()]) for x in (before, policy, result.policy)
    )
    assert float((ours - theirs).norm() / (ours - start).norm()) < 0.01  # AdamW's first steps magnify rounding


def test_what_it_does_not_do_is_refused(tmp_path: Path) -> None:
    for options, words in (({"beta": 0.1}, r"beta=0.1 0"), ({"loss_type": "bnpo"}, "loss_type='bnpo'")):
        with pytest.raises(InvalidOptionError, match=words):
            EnvGRPOTrainer(TinyVLA(sizes()), flagging_env(), arguments(tmp_path, **options))
