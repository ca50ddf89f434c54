"""Supervised fine-tuning of the policy: pre-training on play, then a few demonstrations (paper section 4.1).

    rawdream policy sft --stage pretrain --data PLAY --run-dir RUN1
    rawdream policy sft --stage fewshot --data EXPERT --init RUN1/policy --replay PLAY --run-dir RUN2
    rawdream policy sft --data EXPERT --init OPENVLA_OFT --demos-per-task 1 --run-dir RUN3

As in the paper: a generalist that is not trained on any target task (paper: pre-trained on LIBERO-90, or the arm's
pre-training; here: segments of play labelled in hindsight, without the target object pairs) is fine-tuned on a few
demonstrations of each target task (1 on LIBERO, 3 on the arm) with cross-entropy on the action tokens.

OpenVLA-OFT learns as upstream: all tokens of a chunk in one pass, one-hot labels, LoRA of rank 32 on every linear layer, random
crops and colors, actions scaled by the quantiles of the demonstrations. Not as upstream: the cross-entropy is over the 256
action columns, from which the policy samples, instead of the whole vocabulary. Added for a small TinyVLA: labels smoothed over
neighbouring bins, an auxiliary position read-out, EMA, and an optional share of play in the few-shot batches to limit
forgetting.

With ``--parallel ddp`` or ``fsdp2`` under torchrun, process r of w computes the rows r, r + w, ... of every batch; process 0
validates and writes.

Every batch is a function of (seed, step): an interrupted run resumes to bit-identical weights (CPU, float32, without a
budget of ``minutes``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rawdream_env.errors import InvalidOptionError
from rawdream_env.policies import load_policy
from rawdream_env.policies.openvla_oft.policy import OpenVLAOFT
from rawdream_env.policies.openvla_oft.statistics import measure_statistics
from rawdream_env.policies.tiny_vla import TinyVLA
from rawdream_env.robots import find_robot, sim_options
from rawdream_env.statistics import Rate
from rawdream_env.trainers.common.distributed import ALONE, ProcessGroup, gathered, join, shard_policy, share_of, whole
from rawdream_env.trainers.common.schedule import Schedule
from rawdream_env.trainers.common.training_loop import TrainingLoop
from rawdream_env.trainers.policy.batches import Augment, Batch, Source, draw_batch, jitter_and_blur, load_sources
from rawdream_env.trainers.policy.config import ADDED, OPENVLA_OFT_DEFAULTS, TINY_VLA_DEFAULTS, SFTConfig
from rawdream_env.trainers.policy.losses import readout_loss, token_loss
from rawdream_env.trainers.policy.validation import simulator_success, validate

_MAY_CHANGE = (
    "minutes", "sim_episodes", "sim_env", "layout", "microbatch_size", "gradient_checkpointing", "parallel",
)  # fmt: skip

_FORWARDS = {TinyVLA: ("forward_train",), OpenVLAOFT: ("image_logits", "logits")}
"""Methods that compute scores."""


@dataclass(frozen=True)
class SFTResult:
    """The trained policy (its average, if there is one), the steps taken, the last validation and the simulator's success. Of
    several processes, only process 0 has averages, validation and success.
    """

    policy: TinyVLA | OpenVLAOFT
    steps: int
    validation: dict[str, float]
    success: dict[str, Rate]


def train_sft(config: SFTConfig, *, progress: bool = True) -> SFTResult:
    """Train or resume the run described by ``config``; see the module's docstring.

    Raises:
        DatasetError: the data cannot be used.
        CheckpointError: ``init`` is not a policy, or the run's checkpoints are damaged.
        RunDirError: ``run_dir`` holds another run.
        InvalidOptionError: options that do not fit each other or the number of processes.
    """
    with join(config.parallel, config.device) as group:
        return _train(replace(config, device=group.device), progress, group, stored_device=config.device)


def _train(config: SFTConfig, progress: bool, group: ProcessGroup, stored_device: str) -> SFTResult:
    """One process's part of ``train_sft``."""
    if config.batch_size < group.size:
        raise InvalidOptionError(f"batch_size={config.batch_size} is too small for {group.size} processes; raise it.")
    policy = _initial_policy(config)
    config = config.filled(OPENVLA_OFT_DEFAULTS if isinstance(policy, OpenVLAOFT) else TINY_VLA_DEFAULTS)
    sources, held_out = load_sources(config, policy.chunk_len)
    if isinstance(policy, OpenVLAOFT):
        _prepare(policy, sources, config)
    augment = _augmentation(policy, config)
    averaged = copy.deepcopy(policy).eval() if config.ema else None
    shard_policy(policy, group, _FORWARDS[type(policy)])
    with TrainingLoop(
        config.run_dir,
        {**asdict(config), "device": stored_device},
        policy,
        torch.optim.AdamW(_parameter_groups(policy, config.weight_decay), betas=(0.9, 0.98), fused=True),
        Schedule(config.lr or 0.0, config.steps, config.warmup, config.minutes or 0.0),
        ema=config.ema or None,
        trained_only=True,
        save_every=config.save_every,
        may_change=_MAY_CHANGE,
        added=ADDED,
        timed=True,
        name=config.stage,
        group=group,
        progress=progress,
    ) as loop:

        def evaluated() -> TinyVLA | OpenVLAOFT:
            if averaged is None:
                return policy.eval()
            weights = loop.averaged()  # on process 0
            if group.first:
                averaged.load_state_dict(weights)
            return averaged

        for step in loop:
            policy.train()
            losses = add_gradients(policy, draw_batch(sources, config, step, augment), config, group)
            group.sum_gradients(p for p in policy.parameters() if p.requires_grad)
            norm = loop.update()
            if loop.every(config.log_every):
                loop.log(lr=loop.rate, **losses, grad_norm=whole(norm))
                loop.log_timings(samples_per_s=loop.steps_per_s * config.batch_size)
            if loop.every(config.save_every):
                latest = evaluated()
                with gathered(latest):
                    loop.log(**(validate(latest, held_out, config) if group.first else {}))
        trained, validation, success = evaluated(), dict[str, float](), dict[str, Rate]()
        with gathered(trained):
            if group.first:
                validation = validate(trained, held_out, config)
                success = _simulated(trained, config, loop)
                described = {"stage": config.stage, "steps": loop.step, "validation": validation}
                trained.save_pretrained(Path(config.run_dir) / "policy", metadata=described)
                if isinstance(trained, OpenVLAOFT) and config.lora_rank:
                    trained.save_adapters(Path(config.run_dir) / "adapters")
            group.wait()
    return SFTResult(trained, loop.step, validation, success)


def _simulated(policy: TinyVLA | OpenVLAOFT, config: SFTConfig, loop: TrainingLoop) -> dict[str, Rate]:
    """Success rates in the simulator by task, logged; {} without ``sim_episodes``."""
    if not config.sim_episodes:
        return {}
    sim_env = config.sim_env or find_robot().sim_env
    options = sim_options(sim_env, layout=config.layout)
    success = simulator_success(policy, config.sim_episodes, sim_env=sim_env, **options)
    loop.log(**{f"sim_success/{name}": rate.value for name, rate in success.items()})
    return success


def _initial_policy(config: SFTConfig) -> TinyVLA | OpenVLAOFT:
    if config.init is None:
        return TinyVLA(config.model, seed=config.seed).to(config.device)
    dtype = config.dtype or (None if config.lora_rank else "float32")
    policy = load_policy(config.init, device=config.device, dtype=dtype, unnorm_key=config.unnorm_key)
    if not isinstance(policy, TinyVLA | OpenVLAOFT):
        raise InvalidOptionError(
            f"init={config.init!r} is a {type(policy).__name__}, expected a TinyVLA or an OpenVLAOFT; give another policy."
        )
    return policy


def _prepare(policy: OpenVLAOFT, sources: Sequence[Source], config: SFTConfig) -> None:
    """Statistics of the demonstrations, and what is trained: adapters or weights, with or without the vision towers."""
    if not config.keep_statistics:
        actions = np.concatenate([source.demos.actions[:, 0] for source in sources])
        episodes = sum(len(np.unique(source.demos.episode)) for source in sources)
        name = "+".join(Path(folder).name for folder in config.data)
        policy.set_statistics(name, measure_statistics(actions, episodes))
    if config.lora_rank:
        policy.add_lora(config.lora_rank, vision=config.train_vision, seed=config.seed)
    elif not config.train_vision:
        policy.freeze_vision()
    if config.gradient_checkpointing:
        policy.enable_gradient_checkpointing()


def _augmentation(policy: TinyVLA | OpenVLAOFT, config: SFTConfig) -> Augment | None:
    if isinstance(policy, OpenVLAOFT):
        return policy.training_images if config.image_aug else None
    return partial(jitter_and_blur, jitter=config.jitter, blur_share=config.blur_share)


def _parameter_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups of the trained weights, with weight decay on matrices and kernels only."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def add_gradients(
    policy: TinyVLA | OpenVLAOFT, batch: Batch, config: SFTConfig, group: ProcessGroup = ALONE
) -> dict[str, Tensor]:
    """Add the gradients of the batch's loss, one microbatch of this process's rows after another; returns the losses of the
    whole batch.

    A mean over the batch is the sum of the microbatches' means, each times its share of what is averaged: rows for the
    tokens, known positions for the read-out.
    """
    every = torch.arange(len(batch))
    sums: dict[str, Tensor] = {}
    for rows in share_of(every, config.microbatch_size or -(-len(batch) // group.size), group):
        part = batch.part(rows if len(rows) else every[:1])  # the others have a row more
        losses = compute_losses(policy, part, config)
        losses["loss"] = losses["loss"] * (len(rows) / len(batch))
        total = losses["loss"]
        if "readout_loss" in losses:
            share = _known(part) / _known(batch).clamp(min=1) * (len(rows) > 0)
            losses["readout_loss"] = losses["readout_loss"] * share
            total = total + config.readout_weight * losses["readout_loss"]
        (group.loss_factor * total).backward()
        sums = {name: sums.get(name, 0.0) + loss.detach() for name, loss in losses.items()}
    return {name: group.total(loss) for name, loss in sums.items()}


def _known(batch: Batch) -> Tensor:
    return batch.readout.isfinite().sum()


def compute_losses(policy: TinyVLA | OpenVLAOFT, batch: Batch, config: SFTConfig) -> dict[str, Tensor]:
    """``loss`` of the action tokens and, for a TinyVLA if its weight is above 0, ``readout_loss`` of the positions."""
    readout: Tensor | None = None
    with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
        if isinstance(policy, TinyVLA):
            logits, readout = policy.forward_train(batch.frames, policy.word_ids(batch.instructions))
        else:
            score = policy.image_logits if config.image_aug else policy.logits
            logits = score(batch.frames, batch.instructions)
    losses = {"loss": token_loss(logits, policy.encode_actions(batch.actions), config.label_sigma or 0.0)}
    if readout is not None and config.readout_weight > 0:
        losses["readout_loss"] = readout_loss(readout, batch.readout)
    return losses
