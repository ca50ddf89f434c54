"""Train a world model from play data: autoencoder, latent cache, transformer (paper section 3.1, A.2).

    rawdream train-world-model --data DIR --out RUN

What is kept of the paper: rectified flow on clean context and noisy targets, per-position context noise, action AdaLN,
AdamW with warm-up and cosine, EMA. What differs at the embedded size, each an option: every chunk of an episode is a
target in one pass (teacher forcing), the loss weighs cells that change, part of the targets are pure noise (t = 1), and
the last part of training replaces the context by the model's own predictions (self-forcing), so that it learns to live
with its own mistakes.

Every batch and every noise draw is a function of (seed, step): a killed run continues to bit-identical weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rawdream_env.data.reader import LeRobotReader
from rawdream_env.errors import CheckpointError, DatasetError
from rawdream_env.files import load_safetensors, save_safetensors
from rawdream_env.piper_geometry import project
from rawdream_env.seeding import mix
from rawdream_env.trainers.run_dir import RunDir, pack_optimizer, unpack_optimizer
from rawdream_env.world_models.arm_map import ArmMap, draw_maps
from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder, pack_frames
from rawdream_env.world_models.embedded import read_world_model, save_world_model
from rawdream_env.world_models.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.teacher_forcing import EpisodeBatch, denoise_all_chunks
from rawdream_env.world_models.wan import WanWorldModelTransformer
from rawdream_env.world_models.wan_config import WAN_CONFIGS, WanConfig


@dataclass(frozen=True)
class StageConfig:
    """Optimisation of one stage."""

    steps: int
    """Optimiser steps."""
    batch_size: int
    """Autoencoder: groups of four frames; transformer: episodes."""
    lr: float
    """Peak learning rate of AdamW."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.4
    """Share of the steps, at the end, over which the learning rate falls."""
    weight_decay: float = 0.02
    """AdamW weight decay."""
    ema: float = 0.998
    """Decay of the averaged weights that are saved; ramps up from 0."""


@dataclass(frozen=True)
class WorldModelTrainConfig:
    """Everything a world-model run depends on."""

    data: tuple[str, ...]
    """LeRobotDataset v3 folders of play data."""
    out: str
    """Run folder; the same command continues an interrupted run."""
    init: str = ""
    """Folder of a world model to start from: its autoencoder is kept as it is, its transformer trained on."""
    seed: int = 0
    """Seed of initialisation, batches and noise."""
    device: str = "cpu"
    """Device to train on."""
    bf16: bool = True
    """Train in bfloat16 autocast."""
    episode_chunks: int = 8
    """Chunks in a training episode: the horizon of the dream."""
    autoencoder: StageConfig = field(default_factory=lambda: StageConfig(steps=5000, batch_size=16, lr=2e-3, ema=0.99))
    """Stage 1."""
    transformer: StageConfig = field(default_factory=lambda: StageConfig(steps=6000, batch_size=8, lr=6e-4))
    """Stage 2."""
    autoencoder_model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Architecture of the autoencoder; its image size is that of the data."""
    model: WanConfig = field(default_factory=lambda: WAN_CONFIGS["embedded"])
    """Architecture of the transformer."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Rollout settings saved with the model; its arm map is also the one trained on."""
    context_noise: float = 0.3
    """Half of the episodes get context noise of a level drawn per position from U[0, this]; the rest the rollout's
    level.
    """
    pure_noise: float = 0.3
    """Share of target chunks at t = 1."""
    change_weight: float = 3.0
    """Extra loss weight of latent cells that differ from the last context frame."""
    object_weight: float = 12.0
    """Extra loss weight of latent cells in which an object moves or is within reach of the gripper, where the data say
    so (``privileged.object_poses``): a block is a few pixels, and what becomes of it is all that a judge asks about.
    """
    self_forcing: float = 0.4
    """Share of training, at its end, in which the context is the model's own prediction."""
    self_forcing_depth: int = 3
    """Largest number of chunks the self-made context is unrolled."""
    save_every: int = 250
    """Steps between checkpoints."""


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, constant, then a cosine to 2 % of the peak over the last ``decay`` of the steps.

    A run can thus be lengthened or cut short before the decay without having wasted anything.
    """
    progress = max(0.0, (step / stage.steps - 1 + stage.decay) / stage.decay)
    return stage.lr * min(1.0, (step + 1) / stage.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


M = TypeVar("M", bound=nn.Module)


class _Stage(Generic[M]):
    """Optimiser, EMA, log and checkpoints of one stage; ``loop`` yields the steps that remain.

    Weights stay contiguous (only activations are channels-last): AdamW's fused CPU kernel pairs weights and moments element
    by element in memory, and moments read from a checkpoint are contiguous.
    """

    def __init__(self, name: str, config: WorldModelTrainConfig, stage: StageConfig, model: M) -> None:
        self.name, self.config, self.stage, self.model = name, config, stage, model
        self.run = RunDir(
            Path(config.out) / name, asdict(config), may_change=("autoencoder", "transformer", "save_every")
        )
        self.ema: M = copy.deepcopy(model)
        self.ema.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=stage.weight_decay, fused=True
        )
        self.first = 0
        checkpoint = self.run.load_latest()
        if checkpoint is not None:
            self.first = checkpoint.step
            parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
            for key, value in checkpoint.tensors.items():
                part, _, name_ = key.partition("/")
                parts[part][name_] = value
            model.load_state_dict(parts["model"])
            self.ema.load_state_dict(parts["ema"])
            unpack_optimizer(self.optimizer, parts["optimizer"])

    def loop(self) -> Iterator[int]:
        """Steps to do, with the learning rate set, a progress bar and a checkpoint every ``save_every`` steps."""
        with tqdm(total=self.stage.steps, initial=self.first, desc=self.name, unit="step", mininterval=2) as bar:
            for step in range(self.first, self.stage.steps):
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.stage, step)
                yield step
                bar.update()
                if (step + 1) % self.config.save_every == 0 or step + 1 == self.stage.steps:
                    self.save(step + 1)

    def update(self, step: int, loss: Tensor, **scalars: float | Tensor) -> None:
        """One optimiser step with clipping, the EMA, and a log line every 25 steps."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.stage.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        if (step + 1) % 25 == 0:
            values = {key: float(value) for key, value in scalars.items()}
            self.run.log(step + 1, loss=float(loss), grad_norm=float(grad_norm), **values)

    def save(self, step: int) -> None:
        """Write an atomic checkpoint."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.state_dict().items()}
        tensors |= {f"optimizer/{k}": v for k, v in pack_optimizer(self.optimizer).items()}
        self.run.save(step, tensors, {"stage": self.name})


def _generator(config: WorldModelTrainConfig, stage: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    return (
        np.random.default_rng(mix(config.seed, stage, step, 0)),
        torch.Generator().manual_seed(mix(config.seed, stage, step, 1)),
    )


def train_autoencoder(config: WorldModelTrainConfig, frames: list[np.ndarray]) -> PackedFrameAutoencoder:
    """Stage 1. ``frames``: one uint8 (N + 1, H, W, 3) array per episode. Returns the averaged, normalised model."""
    torch.manual_seed(mix(config.seed, 1))
    model = PackedFrameAutoencoder(replace(config.autoencoder_model, image_size=frames[0].shape[1])).to(config.device)
    stage = _Stage("autoencoder", config, config.autoencoder, model)
    background = torch.from_numpy(np.median(np.stack([f[0] for f in frames[:400]]), 0).astype(np.uint8))
    still = pack_frames(background[None, None].expand(1, 4, -1, -1, -1)).to(config.device)
    for step in stage.loop():
        rng, gen = _generator(config, 1, step)
        groups = []
        for episode in rng.integers(len(frames), size=config.autoencoder.batch_size):
            t = rng.integers(len(frames[episode]) - 4)
            groups.append(frames[episode][t : t + 4])
            if rng.random() < 0.1:  # the anchor is a still
                groups[-1] = np.repeat(groups[-1][:1], 4, 0)
        x = pack_frames(torch.from_numpy(np.stack(groups)).to(config.device)).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.bf16):
            z = model.encoder(x)
            noise = torch.randn(z.shape, generator=gen).to(z)
            y = model.decoder(z + 0.05 * noise * z.detach().std())
        y = y.float()
        weight = 1 + 4 * ((x - still).abs() > 0.12).float()
        loss = (weight * (y - x).abs()).mean() + 5 * (weight * (y - x) ** 2).mean() + 1e-3 * z.float().pow(2).mean()
        mse = ((y - x) / 2).pow(2).mean()
        stage.update(step, loss, psnr=-10 * torch.log10(mse.detach()))
    result = stage.ema
    _normalise_latents(result, frames, config)
    return result.eval()


@torch.no_grad()
def _normalise_latents(model: PackedFrameAutoencoder, frames: list[np.ndarray], config: WorldModelTrainConfig) -> None:
    rng = np.random.default_rng(mix(config.seed, 7))
    model.latent_mean.zero_()
    model.latent_std.fill_(1)
    groups = []
    for episode in rng.integers(len(frames), size=512):
        t = rng.integers(len(frames[episode]) - 4)
        groups.append(frames[episode][t : t + 4])
    z = torch.cat(
        [model.encode(torch.from_numpy(np.stack(groups[i : i + 32])).to(config.device)) for i in range(0, 512, 32)]
    )
    model.latent_mean.copy_(z.mean((0, 2, 3)))
    model.latent_std.copy_(z.std((0, 2, 3)))


@dataclass(frozen=True)
class LatentEpisodes:
    """E episodes of whole chunks in latent space, one after the other; episode i has ``chunks[i]`` of them.

    ``chunks`` int64 (E,); ``latents`` fp16 (sum M, C, h, w) with M = G chunks; ``stills`` fp16 (sum chunks + 1, C, h, w),
    the frame before each chunk (and the last frame) encoded as a still; ``actions`` (sum N, 7); ``poses`` (sum N + 1, 7)
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
    frames: list[np.ndarray],
    actions: list[np.ndarray],
    poses: list[np.ndarray],
    cache: Path,
    *,
    chunk_len: int,
    bf16: bool,
) -> LatentEpisodes:
    """Encode every episode once; the cache is reused when it exists."""
    if cache.exists():
        return LatentEpisodes(**load_safetensors(cache))
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
    save_safetensors(cache, {name: x.contiguous() for name, x in vars(result).items() if x is not None}, {})
    return result


def focus_cells(places: np.ndarray | None, poses: np.ndarray, model: WanConfig) -> np.ndarray:
    """Latent cells in which an object moves or is within 5 cm of the tool: uint8 (M, h, w).

    ``places`` (N + 1, O, 3) in metres, NaN for absent objects, or None when they are not known (then nothing is in
    focus); ``poses`` (N + 1, 7) commanded poses. An object is marked where it is in each of a latent's frames and where it
    was before the chunk, from where it may have to vanish.
    """
    _, h, w = model.latent_shape
    n, g = model.actions_per_latent, model.chunk_latents
    cells = np.zeros(((len(poses) - 1) // n, h, w), np.uint8)
    if places is None:
        return cells
    before = np.arange(len(cells)) // g * g * n
    frames = np.arange(len(cells))[:, None] * n + 1 + np.arange(n)
    now, was = places[frames], places[before][:, None]  # (M, n, O, 3), (M, 1, O, 3)
    moved = np.linalg.norm(now - was, axis=-1) > 0.003
    near = np.linalg.norm(now - poses[frames][..., None, :3], axis=-1) < 0.05
    chosen = (moved | near).any(1)  # (M, O); False for absent objects
    shown = np.concatenate([was, now], 1)
    pixels, _ = project(np.nan_to_num(shown.reshape(-1, 3)), w)
    u, v = pixels.reshape(*shown.shape[:3], 2).transpose(3, 0, 1, 2)
    rows, columns = np.arange(h)[:, None] + 0.5, np.arange(w) + 0.5
    reach = 0.9  # cells: an object is smaller than one and marks those it can touch
    hit = (np.abs(u[..., None, None] - columns) < reach) & (np.abs(v[..., None, None] - rows) < reach)
    cells[(hit & chosen[:, None, :, None, None]).any((1, 2))] = 1
    return cells


class EpisodeSampler:
    """Draws training episodes: an anchor still at any chunk boundary and the chunks that follow it."""

    def __init__(self, episodes: LatentEpisodes, config: WorldModelTrainConfig) -> None:
        self.episodes, self.config = episodes, config
        if not (long_enough := episodes.chunks >= config.episode_chunks).any():
            raise DatasetError(
                f"no episode has {config.episode_chunks} chunks of {config.model.chunk_len} steps (the longest has "
                f"{int(episodes.chunks.max())}); collect longer ones or lower episode_chunks."
            )
        self.usable = torch.nonzero(long_enough)[:, 0]
        self.first = torch.cumsum(episodes.chunks, 0) - episodes.chunks  # chunks before each episode
        self.arm_map = ArmMap(config.rollout.arm_map) if config.rollout.arm_map else None
        low, high = torch.tensor(config.rollout.action_low), torch.tensor(config.rollout.action_high)
        self.mid, self.half = (low + high) / 2, (high - low) / 2

    def draw(self, rng: np.random.Generator, batch_size: int) -> EpisodeBatch:
        """A batch of ``batch_size`` episodes of ``episode_chunks`` chunks."""
        e, cfg = self.episodes, self.config
        g, k, c = cfg.model.chunk_latents, cfg.model.chunk_len, cfg.episode_chunks
        index = self.usable[torch.from_numpy(rng.integers(len(self.usable), size=batch_size))]
        start = torch.from_numpy(rng.integers((e.chunks[index] - c + 1).numpy()))
        chunk = self.first[index] + start
        # ``stills`` and ``poses`` have one entry more per episode than there are chunks and steps
        frames = chunk[:, None] * g + torch.arange(c * g)
        latents = torch.cat([e.stills[chunk + index][:, None], e.latents[frames]], 1).float()
        steps = chunk[:, None] * k + torch.arange(c * k)
        actions = e.actions[steps].unflatten(1, (c * g, -1))
        poses = e.poses[steps + index[:, None] + 1].unflatten(1, (c * g, -1))
        held = e.poses[chunk * k + index][:, None, None].expand(-1, 1, poses.shape[2], -1)
        actions = torch.cat([torch.zeros_like(actions[:, :1]), actions], 1)
        poses = torch.cat([held, poses], 1)
        parts = [(actions - self.mid) / self.half]
        maps = None
        if self.arm_map is not None:
            parts.append(self.arm_map.normalise(poses))
            # poses before each frame's chunk: the anchor's own, then the last one of the frame before the chunk
            before = poses[:, torch.arange(c) * g, -1].repeat_interleave(g, 1)
            before = torch.cat([poses[:, :1, -1], before], 1)
            maps = draw_maps(
                self.arm_map, poses, before, (latents.shape[-2], latents.shape[-1]), carry=cfg.model.carry
            ).to(cfg.device)
        focus = None if e.focus is None else e.focus[frames].to(cfg.device)
        conditions = torch.cat(parts, -1).flatten(2).to(cfg.device)
        return EpisodeBatch(latents.to(cfg.device), conditions, maps, focus)


def _noise_levels(config: WorldModelTrainConfig, b: int, m: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Levels of the clean stream (B, M-G+1) and of the targets (B, M)."""
    g = config.model.chunk_latents
    clean = config.context_noise * torch.rand(b, m - g + 1, generator=gen)
    usual = torch.full_like(clean, config.rollout.context_noise)
    usual[:, 0] = 0.0
    clean = torch.where(torch.rand(b, 1, generator=gen) < 0.5, clean, usual)
    level = torch.rand(b, m // g, generator=gen)
    level = torch.where(torch.rand(b, m // g, generator=gen) < config.pure_noise, torch.ones_like(level), level)
    return clean, level.repeat_interleave(g, 1)


def world_model_loss(
    config: WorldModelTrainConfig,
    model: WanWorldModelTransformer,
    batch: EpisodeBatch,
    gen: torch.Generator,
    depth: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rectified-flow loss over all chunks (Eq. 1); ``depth`` > 0 unrolls the context with the model's own predictions.

    Self-forcing in parallel: predicting every chunk from the true context gives a context one chunk deep in the model's
    own world; predicting again from that, two deep; and so on, at one pass each.
    """
    latents = batch.latents
    b, m = latents.shape[0], latents.shape[1] - 1
    g = config.model.chunk_latents
    device = latents.device
    clean_level, level = (x.to(device) for x in _noise_levels(config, b, m, gen))
    lift = (..., None, None, None)

    def normal(n: int) -> Tensor:
        return torch.randn(b, n, *latents.shape[2:], generator=gen).to(device)

    context = latents[:, : m - g + 1]
    if depth:
        with torch.no_grad():
            for _ in range(depth):
                mixed = clean_level[lift]
                clean = (1 - mixed) * context + mixed * normal(m - g + 1)
                own, _ = denoise_all_chunks(model, batch, clean, clean_level, normal(m), torch.ones_like(level))
                context = torch.cat([latents[:, :1], own[:, : m - g].float()], 1)
    mixed = clean_level[lift]
    clean = (1 - mixed) * context + mixed * normal(m - g + 1)
    target, noise = latents[:, 1:], normal(m)
    noisy = (1 - level[lift]) * target + level[lift] * noise
    out, base = denoise_all_chunks(model, batch, clean, clean_level, noisy, level)
    change = (target - base).abs().mean(2, keepdim=True)
    weight = 1 + config.change_weight * (change / 0.5).clamp(max=1)
    if batch.focus is not None:
        weight = weight + config.object_weight * batch.focus[:, :, None]
    if config.model.residual:
        error = (out - target) ** 2
        weight = weight * (0.5 / (level[lift] ** 2 + 0.15))  # near a velocity loss, without its blow-up at t -> 0
    else:
        error = (out - (noise - target)) ** 2
    pure = (level == 1)[lift].float()
    with torch.no_grad():
        mse_pure = (error * pure).sum() / (pure.expand_as(error).sum() + 1e-9)
        copy_pure = (((base - target) ** 2) * pure).sum() / (pure.expand_as(error).sum() + 1e-9)
    return (weight * error).mean(), {"mse_pure_noise": mse_pure, "mse_copy_last": copy_pure}


def train_transformer(config: WorldModelTrainConfig, episodes: LatentEpisodes) -> WanWorldModelTransformer:
    """Stage 2. Returns the averaged model."""
    torch.manual_seed(mix(config.seed, 2))
    model = WanWorldModelTransformer(config.model).to(config.device)
    if config.init:
        model.load_state_dict(_initial(config).transformer.state_dict())
    stage = _Stage("transformer", config, config.transformer, model)
    sampler = EpisodeSampler(episodes, config)
    forcing_from = round(config.transformer.steps * (1 - config.self_forcing))
    for step in stage.loop():
        rng, gen = _generator(config, 2, step)
        batch = sampler.draw(rng, config.transformer.batch_size)
        depth = int(rng.integers(0, config.self_forcing_depth + 1)) if step >= forcing_from else 0
        with torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.bf16):
            loss, scalars = world_model_loss(config, model, batch, gen, depth)
        stage.update(step, loss, depth=depth, **scalars)
    stage.ema.eval()
    return stage.ema


def _initial(config: WorldModelTrainConfig) -> WanWorldModel:
    """The world model named by ``init``; a ``CheckpointError`` unless its architecture is the configured one."""
    initial = read_world_model(config.init)
    if initial.transformer.arch != config.model:
        raise CheckpointError(
            f"{config.init} has another architecture ({initial.transformer.arch}) than this run ({config.model})."
        )
    return initial


def _codec(model: WanWorldModel) -> PackedFrameAutoencoder:
    assert isinstance(model.autoencoder, PackedFrameAutoencoder)
    return model.autoencoder


def train_world_model(config: WorldModelTrainConfig) -> Path:
    """Both stages; returns the folder of the finished world model."""
    initial = _initial(config) if config.init else None  # a wrong folder is noticed before the data are read
    frames: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    poses: list[np.ndarray] = []
    focus: list[np.ndarray] = []
    chunk = config.model.chunk_len
    for root in config.data:
        arrays = LeRobotReader(root).load_all(workers=2, progress=True)
        for index in range(len(arrays)):
            episode = arrays.episode(index)
            steps = len(episode.actions) // chunk * chunk
            frames.append(episode.frames[: steps + 1])
            actions.append(episode.actions[:steps])
            poses.append(episode.state[: steps + 1])
            objects = episode.privileged.get("object_poses")
            places = None if objects is None else objects[: steps + 1].reshape(steps + 1, -1, 7)[..., :3]
            focus.append(focus_cells(places, poses[-1], config.model))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    autoencoder = _codec(initial).to(config.device).eval() if initial else train_autoencoder(config, frames)
    cache = Path(config.out) / "latents.safetensors"
    episodes = encode_episodes(autoencoder, frames, actions, poses, cache, chunk_len=chunk, bf16=config.bf16)
    if config.object_weight:
        episodes = replace(episodes, focus=torch.from_numpy(np.concatenate(focus)))
    del frames
    transformer = train_transformer(config, episodes)
    target = Path(config.out) / "world_model"
    save_world_model(WanWorldModel(transformer, autoencoder, config.rollout), target)
    return target
