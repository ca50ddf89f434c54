"""Supervised fine-tuning of the policy: pre-training on play, then a few demonstrations (paper section 4.1).

    rawdream policy sft --stage pretrain --data PLAY --run-dir RUN1
    rawdream policy sft --stage fewshot --data EXPERT --init RUN1/policy --replay PLAY --run-dir RUN2

As in the paper: a generalist that is not trained on any target task (paper: pre-trained on LIBERO-90, or the arm's
pre-training; here: segments of play labelled in hindsight, without the target object pairs) is fine-tuned on a few
demonstrations of each target task (1 on LIBERO, 3 on the arm) with cross-entropy on the action tokens. Added for a small
model: labels smoothed over neighbouring bins, an auxiliary position read-out, EMA, and an optional share of play in the
few-shot batches to limit forgetting.

Every batch is a function of (seed, step): an interrupted run resumes to bit-identical weights (CPU, float32, without a
budget of ``minutes``).
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rawdream_env.errors import InvalidOptionError
from rawdream_env.policies import load_policy
from rawdream_env.policies.tiny_vla import TinyVLA
from rawdream_env.robots import find_robot, sim_options
from rawdream_env.statistics import Rate
from rawdream_env.trainers.common.schedule import Schedule
from rawdream_env.trainers.common.training_loop import TrainingLoop
from rawdream_env.trainers.policy.batches import Batch, draw_batch, load_sources
from rawdream_env.trainers.policy.config import SFTConfig
from rawdream_env.trainers.policy.losses import readout_loss, token_loss
from rawdream_env.trainers.policy.validation import simulator_success, validate


@dataclass(frozen=True)
class SFTResult:
    """The trained (averaged) policy, the steps taken, the last validation and the simulator's success per task."""

    policy: TinyVLA
    steps: int
    validation: dict[str, float]
    success: dict[str, Rate]


def train_sft(config: SFTConfig, *, progress: bool = True) -> SFTResult:
    """Train or resume the run described by ``config``; see the module's docstring.

    Raises:
        DatasetError: the data cannot be used.
        CheckpointError: ``init`` is not a policy, or the run's checkpoints are damaged.
        RunDirError: ``run_dir`` holds another run.
    """
    policy = _initial_policy(config)
    sources, held_out = load_sources(config, policy.chunk_len)
    averaged = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        _parameter_groups(policy, config.weight_decay), lr=config.lr, betas=(0.9, 0.98), fused=True
    )
    with TrainingLoop(
        config.run_dir,
        asdict(config),
        policy,
        optimizer,
        Schedule(config.lr, config.steps, config.warmup, config.minutes or 0.0),
        ema=config.ema,
        save_every=config.save_every,
        may_change=("minutes", "sim_episodes", "sim_env", "layout"),
        timed=True,
        name=config.stage,
        progress=progress,
    ) as loop:
        policy.train()
        for step in loop:
            losses = compute_losses(policy, draw_batch(sources, config, step), config)
            total = losses["loss"]
            if config.readout_weight > 0:
                total = total + config.readout_weight * losses["readout_loss"]
            total.backward()
            norm = loop.update()
            if loop.every(config.log_every):
                loop.log(lr=loop.rate, **losses, grad_norm=norm)
                loop.log_timings(samples_per_s=loop.steps_per_s * config.batch_size)
            if loop.every(config.save_every):
                averaged.load_state_dict(loop.averaged())
                loop.log(**validate(averaged, held_out, config))
        averaged.load_state_dict(loop.averaged())
        validation = validate(averaged, held_out, config)
        success = {}
        if config.sim_episodes:
            sim_env = config.sim_env or find_robot().sim_env
            options = sim_options(sim_env, layout=config.layout)
            success = simulator_success(averaged, config.sim_episodes, sim_env=sim_env, **options)
            loop.log(**{f"sim_success/{name}": rate.value for name, rate in success.items()})
        described = {"stage": config.stage, "steps": loop.step, "validation": validation}
        averaged.save_pretrained(Path(config.run_dir) / "policy", metadata=described)
    return SFTResult(averaged, loop.step, validation, success)


def _initial_policy(config: SFTConfig) -> TinyVLA:
    if config.init is None:
        return TinyVLA(config.model, seed=config.seed).to(config.device)
    policy = load_policy(config.init, device=config.device)
    if not isinstance(policy, TinyVLA):
        raise InvalidOptionError(
            f"init={config.init!r} is a {type(policy).__name__}, expected a TinyVLA; give another policy."
        )
    return policy


def _parameter_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups with weight decay on matrices and kernels only."""
    parameters = list(policy.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def compute_losses(policy: TinyVLA, batch: Batch, config: SFTConfig) -> dict[str, Tensor]:
    """``loss`` of the action tokens and, if its weight is above 0, ``readout_loss`` of the positions."""
    with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
        logits, readout = policy.forward_train(batch.frames, policy.word_ids(batch.instructions))
    losses = {"loss": token_loss(logits, batch.actions, config.label_sigma)}
    if config.readout_weight > 0:
        losses["readout_loss"] = readout_loss(readout, batch.readout)
    return losses
