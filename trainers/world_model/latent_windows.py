"""Windows of a mixture of data sets: the data of the objective "window" (the paper's).

A window has an anchor, R recent latents and the G latents of a chunk: 33 frames at the paper's sizes. The model has to
receive them as in a rollout (``world_models/wan/rollout.py``):

- At autoregressive step s, counted from 0, the first new latent has position min(G s + 1, max_time), the context precedes it
  and the anchor has position 0. In a window with offset o and a whole context (R latents) the first new latent has position
  o + R + 1. Offsets up to max_time - R - 1 therefore cover exactly the positions of a rollout.
- The context has min(G s, R) latents. Behind a far anchor it is always whole (``draw_window_noise``).
- The anchor's four actions are zeros *before* they are normalised.
- In the maps of generated latents, the tool's motion is measured from the end of the context, whose last frame is the base
  that ``warp_last_frame`` shifts. In the maps of context latents it is measured from the start of their own chunk.

Shape letters: B rows, M latents after the anchor, F = 1 + M, R recent latents, G latents of a chunk, K actions of a chunk,
A action dims, P pose dims, C h w latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rawdream_env.data.reader import LeRobotReader
from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.seeding import mix
from rawdream_env.trainers.common.distributed import ProcessGroup
from rawdream_env.trainers.world_model.config import WorldModelTrainConfig
from rawdream_env.trainers.world_model.latent_cache import CacheConfig, cache_latents, codec_fingerprint
from rawdream_env.trainers.world_model.latent_dataset import QuantileBounds
from rawdream_env.trainers.world_model.latent_episodes import episode_focus, model_kinematics
from rawdream_env.trainers.world_model.losses import LossFunction, Sums, WindowBatch, draw_window_noise, window_loss
from rawdream_env.trainers.world_model.mixture import LatentBatch, Mixture, MixtureEntry, normalise_actions
from rawdream_env.world_models.autoencoders import FrameCodec, PackedFrameAutoencoder
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.kinematics import draw_maps, load_kinematics
from rawdream_env.world_models.wan.rollout import RolloutConfig
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer


@dataclass(frozen=True)
class DataEntry:
    """A data set of a mixture: ``FOLDER[,weight=W][,name=N][,camera=C][,embodiment=E]`` on the command
    line.
    """

    path: str
    """LeRobotDataset v3.0 folder."""
    weight: float = 1.0
    """Share of the windows: this weight over the sum of weights, independent of the size of the data set."""
    name: str = ""
    """Name in the saved statistics; by default the folder's name."""
    camera: str = ""
    """Camera to read; by default the first one."""
    embodiment: str = ""
    """Robot and action convention; entries of one embodiment share their action bounds (``action_bounds.py``)."""

    @classmethod
    def parse(cls, text: str) -> DataEntry:
        """Raises ``InvalidOptionError`` for unknown settings."""
        path, *settings = text.split(",")
        values: dict[str, str] = {}
        for setting in settings:
            key, found, value = setting.partition("=")
            if key not in ("weight", "name", "camera", "embodiment") or not found or not value:
                raise InvalidOptionError(
                    f"{setting!r} in the data entry {text!r} is no setting; write FOLDER,weight=2,name=play,camera=front,"
                    "embodiment=NAME (all but the folder may be left out)."
                )
            values[key] = value
        try:
            weight = float(values.pop("weight", "1"))
        except ValueError as error:
            raise InvalidOptionError(f"the weight in the data entry {text!r} is no number; write weight=2.") from error
        return cls(path, weight, **values)

    @property
    def label(self) -> str:
        """``name``, the default filled in."""
        return self.name or Path(self.path).name

    def reader(self, image_size: tuple[int, int] | None = None) -> LeRobotReader:
        """Its reader, which resizes frames to ``image_size``. A named embodiment may have actions in its own units."""
        raw = bool(self.embodiment)
        return LeRobotReader(self.path, image_key=self.camera or None, image_size=image_size, raw_actions=raw)


class _HalfCodec:
    """The bundled codec in bfloat16 autocast, as in its training: several times faster on a CPU."""

    def __init__(self, codec: FrameCodec, device: str) -> None:
        self.codec, self.device = codec, device.split(":")[0]
        self.fingerprint = f"{codec_fingerprint(codec)} bf16"

    def encode_image(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.codec.encode_image(images)

    def encode_video(self, frames: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.codec.encode_video(frames)


def cached_mixture(
    entries: Sequence[DataEntry],
    codec: FrameCodec,
    folder: Path,
    config: WorldModelTrainConfig,
    group: ProcessGroup,
    bounds: Mapping[str, QuantileBounds] | None = None,
) -> Mixture:
    """Encode the data sets into ``folder``, one cache each, and mix them. Process 0 encodes, the other processes wait.

    A latent of Wan's VAE depends on earlier frames, back to the start of the video. In a rollout the video starts at the
    anchor; with ``window_latents="anchored"`` the video of each window does too.
    """
    size = (codec.frame_shape[0], codec.frame_shape[1])
    focused = config.model.residual and config.loss.object_weight > 0
    separate = config.window_latents == "anchored" and not isinstance(codec, PackedFrameAutoencoder)
    chunks = window_chunks(config.model) if separate else 0
    cache = CacheConfig(config.model.chunk_len, window_chunks=chunks, device=group.device, progress=group.first)
    half = config.bf16 and isinstance(codec, PackedFrameAutoencoder)
    source = _HalfCodec(codec, group.device) if half else codec
    kinematics = load_kinematics(config.robot, config.rollout.arm_map) if focused else None
    mixture = []
    for entry in entries:
        cached = cache_latents(
            entry.reader(size),
            source,
            folder / entry.label,
            cache,
            focus=(lambda episode: episode_focus(episode, config.model, kinematics)) if focused else None,
            rank=group.rank,
        )
        mixture.append(MixtureEntry(str(cached), entry.weight, entry.label, entry.embodiment))
    return Mixture(mixture, action_dim=config.model.action_dim, bounds=bounds)


def deployed_entry(entries: Sequence[DataEntry], name: str) -> int:
    """The index of the entry called ``name`` (the first when empty); ``InvalidOptionError`` lists the existing ones."""
    labels = [entry.label for entry in entries]
    if name and name not in labels:
        raise InvalidOptionError(f"deploy={name!r} is not among the data entries; choose from {', '.join(labels)}.")
    return labels.index(name) if name else 0


class WindowObjective:
    """The loss of the rows of a step; a process reads and draws only its own rows.

    ``stream`` separates the uses of one seed; 2 is training.
    """

    def __init__(self, mixture: Mixture, config: WorldModelTrainConfig, *, device: str, stream: int = 2) -> None:
        arch, rollout = config.model, config.rollout
        if mixture.latent_shape != arch.latent_shape:
            raise DatasetError(f"the data's latents are {mixture.latent_shape}, the model's {arch.latent_shape}.")
        self.mixture, self.config, self.device, self.stream = mixture, config, device, stream
        self.chunks = window_chunks(arch)
        self.max_offset = max_window_offset(arch, rollout)
        self.arm_map = model_kinematics(config, mixture.pose_dim)
        self.anchor_actions = torch.zeros(len(mixture.datasets), arch.action_dim)
        for row, (low, high) in enumerate(mixture.bounds):
            zero = normalise_actions(np.zeros(len(low), np.float32), low, high)
            self.anchor_actions[row, : len(low)] = torch.from_numpy(zero)

    def losses(self, step: int, parts: Sequence[Sequence[int]], batch_size: int) -> Iterator[LossFunction]:
        """A loss function for each of ``parts``, the row numbers in the global batch of ``step``."""
        for rows in parts:
            batch = self.draw(step, rows, batch_size)

            def compute(model: WanWorldModelTransformer, batch: WindowBatch = batch) -> tuple[Tensor, Sums]:
                return window_loss(model, batch, self.config.loss)

            yield compute

    def draw(self, step: int, rows: Sequence[int], batch_size: int) -> WindowBatch:
        """Some ``rows`` of the global batch of ``step``; row i is the same on every process."""
        seed, loss = self.config.seed, self.config.loss
        rng = np.random.default_rng(mix(seed, self.stream, step, 0))
        windows = self.mixture.draw(
            rng, batch_size, self.chunks, loss.far_anchor, max_offset=self.max_offset, rows=rows
        )
        seeds = [mix(seed, self.stream, step, 1, row) for row in rows]
        arch = self.config.model
        drawn = draw_window_noise(seeds, windows.far, arch.latent_shape, arch, loss)
        conditions, maps = self.conditions(windows, drawn.context)
        batch = WindowBatch(
            windows.latents, conditions, windows.times, maps, windows.focus if arch.residual else None, drawn
        )
        return batch.to(self.device)

    def conditions(self, windows: LatentBatch, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """Action conditions (B, F, D_c) and maps (B, F, C_m, h, w) of windows with ``context`` (B,) latents of context."""
        arch, actions = self.config.model, windows.actions.clone()
        actions[:, 0] = self.anchor_actions[windows.source][:, None]
        if self.arm_map is None:
            return actions.flatten(2), None
        poses = windows.poses
        parts = [actions, self.arm_map.normalise(poses)] if arch.pose_dim else [actions]
        maps = None
        if arch.arm_map_channels:
            before = poses_before(poses, windows.before[:, : poses.shape[-1]], context, arch.chunk_latents)
            maps = draw_maps(self.arm_map, poses, before, arch.latent_shape[1:], motion=arch.warp_last_frame)
        return torch.cat(parts, -1).flatten(2), maps


def window_chunks(arch: WanConfig) -> int:
    """Chunks in a window: R latents of context and a chunk to generate."""
    return (arch.context_latents + arch.chunk_latents) // arch.chunk_latents


def max_window_offset(arch: WanConfig, rollout: RolloutConfig) -> int:
    """The largest offset of a window's positions, max_time - R - 1 (see the module's docstring)."""
    return rollout.max_time - arch.context_latents - 1


def poses_before(poses: Tensor, start: Tensor, context: Tensor, chunk_latents: int) -> Tensor:
    """The pose from which the tool's motion is measured: ``poses`` (B, F, 4, P), ``start`` (B, P) at the start of the window,
    ``context`` (B,) -> (B, F, P).

    For context latents the pose at the start of their own chunk, for generated latents the pose at the end of the context,
    for the anchor its own pose.
    """
    ends = torch.cat([start[:, None], poses[:, 1:, -1]], 1)  # after 0, 1, 2, ... latents of the window
    latent = torch.arange(1, poses.shape[1])
    own = (latent - 1) // chunk_latents * chunk_latents
    index = torch.where(latent > context[:, None], context[:, None], own)
    return torch.cat([poses[:, :1, -1], ends[torch.arange(len(poses))[:, None], index]], 1)
