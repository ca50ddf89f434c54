"""The optimizer and training loop of the autoencoder and of the transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rawdream_env.trainers.common.distributed import ALONE, ProcessGroup
from rawdream_env.trainers.common.offload import HostCopies
from rawdream_env.trainers.common.schedule import Schedule
from rawdream_env.trainers.common.training_loop import TrainingLoop
from rawdream_env.trainers.world_model.config import MAY_CHANGE, StageConfig, WorldModelTrainConfig


def stage_loop(
    config: WorldModelTrainConfig,
    name: Literal["autoencoder", "transformer"],
    model: nn.Module,
    weights: Sequence[Tensor],
    *,
    group: ProcessGroup = ALONE,
    host: HostCopies | None = None,
) -> TrainingLoop:
    """The training loop of one stage, in the folder ``name`` of the run; it trains the ``weights`` that require gradients."""
    stage: StageConfig = getattr(config, name)
    optimizer = torch.optim.AdamW(
        [weight for weight in weights if weight.requires_grad],
        lr=stage.lr,
        betas=(0.9, 0.95),
        weight_decay=stage.weight_decay,
        fused=True,
    )
    return TrainingLoop(
        Path(config.run_dir) / name,
        _stored(config),
        model,
        optimizer,
        Schedule(stage.lr, stage.steps, stage.warmup, decay=stage.decay),
        ema=stage.ema,
        save_every=config.save_every,
        may_change=MAY_CHANGE,
        group=group,
        host=host,
        name=name,
    )


def _stored(config: WorldModelTrainConfig) -> dict[str, Any]:
    """The configuration without the camera that is not there, so that runs of earlier versions resume."""
    stored = asdict(config)
    del stored["camera"]  # its numbers are in the arm map
    arm_map = stored["rollout"]["arm_map"]
    if arm_map is not None and not arm_map["camera"]:
        del arm_map["camera"]
    return stored
