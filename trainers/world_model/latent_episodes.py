"""Whole episodes in latent space, in memory: the data of the objective "episode" (the bundled size).

Shape letters: E episodes, N actions of an episode, M latents after the anchor, G latents of a chunk, C h w latent, H W
frame, O objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rawdream_env.data.reader import Episode, LeRobotReader
from rawdream_env.errors import DatasetError
from rawdream_env.files import load_sealed, save_sealed
from rawdream_env.robots import Kinematics, find_robot, is_registered
from rawdream_env.seeding import mix
from rawdream_env.trainers.world_model.config import WorldModelTrainConfig
from rawdream_env.trainers.world_model.losses import BatchNoise, LossFunction, episode_loss
from rawdream_env.trainers.world_model.teacher_forcing import EpisodeBatch
from rawdream_env.types import Float32Array, UInt8Array
from rawdream_env.world_models.autoencoders import PackedFrameAutoencoder
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.kinematics import draw_maps, load_kinematics
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer


@dataclass(frozen=True)
class RawEpisodes:
    """Episodes cut to whole chunks, a list entry each: ``frames`` uint8 (N+1, H, W, 3), ``actions`` (N, A), ``poses`` (N+1, P)
    and ``focus`` uint8 (M, h, w).
    """

    frames: list[UInt8Array]
    actions: list[Float32Array]
    poses: list[Float32Array]
    focus: list[UInt8Array]


def model_kinematics(config: WorldModelTrainConfig, pose_dim: int) -> Kinematics | None:
    """The kinematics of the data's robot, when the model takes poses or maps.

    Raises:
        DatasetError: ``pose_dim``, the width of the data's states, is not the width of the robot's poses.
    """
    arch, rollout = config.model, config.rollout
    if not (arch.pose_dim or arch.map_channels):
        return None
    kinematics = load_kinematics(config.robot, rollout.arm_map)
    if kinematics is None or {pose_dim, arch.pose_dim or pose_dim} != {kinematics.state_dim}:
        raise DatasetError(
            f"the model takes {arch.pose_dim} pose dimensions and {arch.map_channels} map channels, but the data's states "
            f"have {pose_dim} dimensions (arm map: {rollout.arm_map}). Use data of the robot, or --model.pose-dim 0 "
            "--model.arm-map-channels 0 --model.no-warp-last-frame."
        )
    return kinematics


def with_robot(config: WorldModelTrainConfig, readers: Sequence[LeRobotReader]) -> WorldModelTrainConfig:
    """The configuration with the robot named in the data, unless one is given.

    Raises:
        DatasetError: the model takes poses or maps, and the data are of several robots or of a robot without kinematics.
    """
    names = sorted({reader.robot_type for reader in readers} - {""})
    if config.robot or not names:
        return config
    arch = config.model
    known = [name for name in names if is_registered(name) and find_robot(name).kinematics]
    if (arch.pose_dim or arch.map_channels) and not len(names) == len(known) == 1:
        raise DatasetError(
            f"the model takes {arch.pose_dim} pose dimensions and {arch.map_channels} map channels, for data of one robot "
            f"with kinematics; the data are of {names}, of which {known} have kinematics. Register the robot, or "
            "--model.pose-dim 0 --model.arm-map-channels 0 --model.no-warp-last-frame."
        )
    return replace(config, robot=names[0] if len(names) == 1 else "")


def read_episodes(
    readers: Sequence[LeRobotReader], model: WanConfig, kinematics: Kinematics | None = None
) -> RawEpisodes:
    """All episodes of some data sets, in memory."""
    result = RawEpisodes([], [], [], [])
    for reader in readers:
        arrays = reader.load_all(workers=2, progress=True)
        for index in range(len(arrays)):
            episode = arrays.episode(index)
            steps = len(episode.actions) // model.chunk_len * model.chunk_len
            result.frames.append(episode.frames[: steps + 1])
            result.actions.append(episode.actions[:steps])
            result.poses.append(episode.state[: steps + 1])
            result.focus.append(episode_focus(episode, model, kinematics))
    return result


def episode_focus(episode: Episode, model: WanConfig, kinematics: Kinematics | None) -> UInt8Array:
    """``focus_cells`` of an episode, up to its last whole chunk."""
    steps = len(episode.actions) // model.chunk_len * model.chunk_len
    objects = episode.privileged.get("object_poses")
    places = None if objects is None else objects[: steps + 1].reshape(steps + 1, -1, 7)[..., :3]
    return focus_cells(places, episode.state[: steps + 1], model, kinematics)


@dataclass(frozen=True)
class LatentEpisodes:
    """E episodes of whole chunks in latent space, one after the other; episode i has ``chunks[i]`` of them.

    ``chunks`` int64 (E,); ``latents`` fp16 (sum M, C, h, w) with M = G chunks; ``stills`` fp16 (sum chunks + 1, C, h, w),
    the frame before each chunk (and the last frame), encoded as a still image; ``actions`` (sum N, A); ``poses`` (sum N + 1, P)
    commanded poses, before each action; ``focus`` uint8 (sum M, h, w), 1 where ``object_weight`` applies.
    """

    chunks: Tensor
    latents: Tensor
    stills: Tensor
    actions: Tensor
    poses: Tensor
    focus: Tensor | None = None


@torch.no_grad()
def encode_episodes(
    model: PackedFrameAutoencoder,
    frames: Sequence[UInt8Array],
    actions: Sequence[Float32Array],
    poses: Sequence[Float32Array],
    cache: Path,
    *,
    chunk_len: int,
    bf16: bool,
) -> LatentEpisodes:
    """Encode every episode once; an existing ``cache`` file is read instead."""
    if cache.exists():
        return LatentEpisodes(**load_sealed(cache)[0])
    device = model.latent_mean.device
    latents, stills = [], []
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for episode in tqdm(frames, desc="encode", unit="episode", mininterval=2):
            x = torch.from_numpy(episode).to(device)
            latents.append(model.encode(x[1:].unflatten(0, (-1, 4))).half().cpu())
            stills.append(model.encode_image(x[::chunk_len]).half().cpu())
    result = LatentEpisodes(
        torch.tensor([len(a) // chunk_len for a in actions]),
        torch.cat(latents),
        torch.cat(stills),
        torch.from_numpy(np.concatenate(actions)),
        torch.from_numpy(np.concatenate(poses)),
    )
    save_sealed(cache, {name: x.contiguous() for name, x in vars(result).items() if x is not None})
    return result


def focus_cells(
    places: Float32Array | None, poses: Float32Array, model: WanConfig, kinematics: Kinematics | None
) -> UInt8Array:
    """Latent cells in which an object moves or is within 5 cm of the tool: uint8 (M, h, w).

    ``places`` (N + 1, O, 3): object positions in metres, NaN for absent objects, or None when unknown; ``poses`` (N + 1, P)
    commanded poses. Without places or kinematics no cell is in focus. An object marks the cells of its positions in each of
    a latent's frames and at the start of the chunk, where it may have to be erased.
    """
    _, h, w = model.latent_shape
    n, g = model.actions_per_latent, model.chunk_latents
    cells = np.zeros(((len(poses) - 1) // n, h, w), np.uint8)
    if places is None or kinematics is None:
        return cells
    before = np.arange(len(cells)) // g * g * n
    frames = np.arange(len(cells))[:, None] * n + 1 + np.arange(n)
    now, was = places[frames], places[before][:, None]  # (M, n, O, 3), (M, 1, O, 3)
    moved = np.linalg.norm(now - was, axis=-1) > 0.003
    near = np.linalg.norm(now - kinematics.tool(poses[frames])[..., None, :], axis=-1) < 0.05
    chosen = (moved | near).any(1)  # (M, O); False for absent objects
    shown = np.concatenate([was, now], 1)
    pixels = kinematics.project(np.nan_to_num(shown.reshape(-1, 3)), w)
    u, v = pixels.reshape(*shown.shape[:3], 2).transpose(3, 0, 1, 2)
    rows, columns = np.arange(h)[:, None] + 0.5, np.arange(w) + 0.5
    reach = 0.9  # cells: objects are smaller than a cell and mark all cells that they can touch
    hit = (np.abs(u[..., None, None] - columns) < reach) & (np.abs(v[..., None, None] - rows) < reach)
    cells[(hit & chosen[:, None, :, None, None]).any((1, 2))] = 1
    return cells


class EpisodeSampler:
    """Draws training episodes: an anchor at any chunk boundary and the chunks that follow it."""

    def __init__(self, episodes: LatentEpisodes, config: WorldModelTrainConfig) -> None:
        self.episodes, self.config = episodes, config
        if not (long_enough := episodes.chunks >= config.episode_chunks).any():
            raise DatasetError(
                f"no episode has {config.episode_chunks} chunks of {config.model.chunk_len} steps (the longest has "
                f"{int(episodes.chunks.max())}); collect longer ones or lower episode_chunks."
            )
        self.usable = torch.nonzero(long_enough)[:, 0]
        self.first = torch.cumsum(episodes.chunks, 0) - episodes.chunks  # chunks before each episode
        self.arm_map = model_kinematics(config, episodes.poses.shape[1])
        low, high = torch.tensor(config.rollout.action_low), torch.tensor(config.rollout.action_high)
        self.mid, self.half = (low + high) / 2, (high - low) / 2

    def draw(self, rng: np.random.Generator, batch_size: int) -> EpisodeBatch:
        """A batch of ``batch_size`` episodes of ``episode_chunks`` chunks."""
        e, cfg = self.episodes, self.config
        g, k, c = cfg.model.chunk_latents, cfg.model.chunk_len, cfg.episode_chunks
        index = self.usable[torch.from_numpy(rng.integers(len(self.usable), size=batch_size))]
        start = torch.from_numpy(rng.integers((e.chunks[index] - c + 1).numpy()))
        chunk = self.first[index] + start
        # ``stills`` and ``poses`` have one more entry per episode than chunks and steps
        frames = chunk[:, None] * g + torch.arange(c * g)
        latents = torch.cat([e.stills[chunk + index][:, None], e.latents[frames]], 1).float()
        steps = chunk[:, None] * k + torch.arange(c * k)
        actions = e.actions[steps].unflatten(1, (c * g, -1))
        poses = e.poses[steps + index[:, None] + 1].unflatten(1, (c * g, -1))
        held = e.poses[chunk * k + index][:, None, None].expand(-1, 1, poses.shape[2], -1)
        actions = torch.cat([torch.zeros_like(actions[:, :1]), actions], 1)
        poses = torch.cat([held, poses], 1)
        parts = [((actions - self.mid) / self.half).clamp(-1, 1)]  # as in a rollout
        maps = None
        if self.arm_map is not None:
            parts.append(self.arm_map.normalise(poses))
            # pose before each latent's chunk: for the anchor its own, else the last pose of the latent before the chunk
            before = poses[:, torch.arange(c) * g, -1].repeat_interleave(g, 1)
            before = torch.cat([poses[:, :1, -1], before], 1)
            maps = draw_maps(
                self.arm_map, poses, before, (latents.shape[-2], latents.shape[-1]), motion=cfg.model.warp_last_frame
            ).to(cfg.device)
        focus = None if e.focus is None else e.focus[frames].to(cfg.device)
        conditions = torch.cat(parts, -1).flatten(2).to(cfg.device)
        return EpisodeBatch(latents.to(cfg.device), conditions, maps, focus)


def _rows(batch: EpisodeBatch, rows: list[int]) -> EpisodeBatch:
    """Some rows of a batch."""
    maps = None if batch.arm_maps is None else batch.arm_maps[rows]
    focus = None if batch.focus is None else batch.focus[rows]
    return EpisodeBatch(batch.latents[rows], batch.conditions[rows], maps, focus)


class EpisodeObjective:
    """The loss of the rows of a step; every process draws the whole batch and its noise and keeps its own rows.

    ``stream`` separates the uses of one seed; 2 is training.
    """

    def __init__(self, episodes: LatentEpisodes, config: WorldModelTrainConfig, *, stream: int = 2) -> None:
        self.sampler, self.config, self.stream = EpisodeSampler(episodes, config), config, stream
        self.forcing_from = round(config.transformer.steps * (1 - config.loss.self_forcing))

    def losses(self, step: int, parts: Sequence[Sequence[int]], batch_size: int) -> Iterator[LossFunction]:
        """A loss function for each of ``parts``, the row numbers in the global batch of ``step``."""
        seed, loss = self.config.seed, self.config.loss
        rng = np.random.default_rng(mix(seed, self.stream, step, 0))
        batch = self.sampler.draw(rng, batch_size)
        depth = int(rng.integers(0, loss.self_forcing_depth + 1)) if step >= self.forcing_from else 0
        for rows in parts:
            chosen = _rows(batch, list(rows))
            noise = BatchNoise(torch.Generator().manual_seed(mix(seed, self.stream, step, 1)), batch_size, rows)

            def compute(
                model: WanWorldModelTransformer, chosen: EpisodeBatch = chosen, noise: BatchNoise = noise
            ) -> tuple[Tensor, dict[str, Tensor]]:
                usual = self.config.rollout.context_noise
                return episode_loss(model, chosen, noise, loss, depth=depth, usual_noise=usual)

            yield compute
