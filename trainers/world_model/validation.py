"""Validation of the world model while it trains: held-out loss, open-loop rollouts with PSNR and SSIM by horizon, a video.

Validation uses the averaged weights, on process 0, with the same noise each time, so that two validations differ only in
the weights. Rollouts start from the first frame and recorded actions (``evaluation/world_model/fidelity.py``); the video
shows the real episode above the imagined one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rawdream_env.data.recorded import StoredEpisode, episodes_from_dataset
from rawdream_env.errors import DatasetError
from rawdream_env.evaluation.world_model.fidelity import Fidelity, evaluate_fidelity
from rawdream_env.evaluation.world_model.metrics import METRICS
from rawdream_env.files import atomic_write_bytes
from rawdream_env.media import encode_video
from rawdream_env.trainers.common.training_loop import TrainingLoop
from rawdream_env.trainers.world_model.config import WorldModelTrainConfig
from rawdream_env.trainers.world_model.latent_windows import DataEntry
from rawdream_env.trainers.world_model.losses import LossFunction
from rawdream_env.world_models.autoencoders import FrameCodec
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer


class LossSource(Protocol):
    """An objective on held-out data."""

    def losses(self, step: int, parts: Sequence[Sequence[int]], batch_size: int) -> Iterator[LossFunction]:
        """One loss function for each of ``parts``."""
        ...


def assembled(arch: WanConfig, tensors: Mapping[str, Tensor]) -> WanWorldModelTransformer:
    """A transformer that uses these tensors as weights, without a copy."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced below
        model = WanWorldModelTransformer(arch)
    model.load_state_dict(dict(tensors), assign=True)
    model.eval().requires_grad_(False)
    return model


class Validation:
    """``run`` writes the metrics ``val_...`` to the log of the run and a video to its folder ``validation``.

    Args:
        config: configuration of the run.
        rollout: rollout settings of the saved model, with its action bounds.
        codec: frames to latents and back.
        entries: held-out data sets; the first episodes of each are imagined.
        objective: the training objective on the held-out latents.
    """

    def __init__(
        self,
        config: WorldModelTrainConfig,
        rollout: RolloutConfig,
        codec: FrameCodec,
        entries: Sequence[DataEntry],
        objective: LossSource,
    ) -> None:
        self.config, self.rollout, self.codec, self.objective = config, rollout, codec, objective
        size = (codec.frame_shape[0], codec.frame_shape[1])
        each = max(1, config.validation_episodes // len(entries))
        recorded = (e for entry in entries for e in episodes_from_dataset(entry.reader(size), limit=each))
        dims = config.model.action_dim
        self.episodes = [_padded(e, dims) for e in recorded if len(e.actions) >= config.model.chunk_len]
        if not self.episodes:
            raise DatasetError(f"no validation episode is {config.model.chunk_len} steps long; use longer episodes.")

    def begin(self, loop: TrainingLoop) -> None:
        """Log the held-out loss before the first step. Call it on every process."""
        tensors = loop.averaged()
        if loop.group.first:
            loop.log(val_loss=self.loss(assembled(self.config.model, tensors).to(self.config.device)))

    def run(self, loop: TrainingLoop) -> None:
        """Evaluate the averaged weights. Call it on every process."""
        tensors = loop.averaged()
        if not loop.group.first:
            return
        transformer = assembled(self.config.model, tensors).to(self.config.device)
        loss = self.loss(transformer)
        model = WanWorldModel(transformer, self.codec, self.rollout, robot=self.config.robot)
        fidelity = evaluate_fidelity(model, self.episodes, batch_size=4, sensitivity_episodes=0, samples=4)
        loop.log(val_loss=loss, **horizon_scalars(fidelity))
        folder = loop.folder / "validation"
        folder.mkdir(exist_ok=True)
        film = encode_video([fidelity.clip()], fidelity.fps)
        atomic_write_bytes(folder / f"step_{loop.step:08d}.mp4", film)

    @torch.no_grad()
    def loss(self, model: WanWorldModelTransformer) -> float:
        """Mean loss of ``validation_windows`` held-out rows with fixed noise and the true context."""
        total, n = 0.0, self.config.validation_windows
        parts = [list(range(i, min(i + 4, n))) for i in range(0, n, 4)]
        for part, compute in zip(parts, self.objective.losses(0, parts, n), strict=True):
            with torch.autocast(self.config.device.split(":")[0], torch.bfloat16, enabled=self.config.bf16):
                total += float(compute(model)[0]) * len(part)
        return total / n


def horizon_scalars(fidelity: Fidelity) -> dict[str, float]:
    """``val_<source>_<metric>_<first>_<last>`` for every horizon bucket; buckets without measurements are left out."""
    return {
        f"val_{source}_{metric}_{row['frames'][0]}_{row['frames'][1]}": float(row[source][metric]["value"])
        for row in fidelity.table
        for source in ("dream", "copy_last")
        for metric in METRICS
        if row[source][metric]["value"] is not None
    }


def _padded(episode: StoredEpisode, action_dim: int) -> StoredEpisode:
    """The episode with zeros in action dimensions that the data do not have."""
    missing = action_dim - episode.actions.shape[1]
    return replace(episode, actions=np.pad(episode.actions, ((0, 0), (0, missing))))
