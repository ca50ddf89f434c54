r"""Train a world model: frame codec, latents, transformer (paper section 3.1, A.2). One trainer for both sizes.

    rawdream train-world-model --data data/play --out runs/world_model
    torchrun --nproc-per-node 8 -m rawdream_env train-world-model --parallel fsdp2 --objective window \
        --init models/wan --model-name wan2.1-1.3b --data data/libero_90 --out runs/zero_shot

The codec is trained (the embedded size), or that of ``init`` or ``codec`` (Wan's VAE); the transformer begins with the
weights of ``init`` or at random. Then one of two objectives:

- "window" (the paper's): 33-frame windows of a weighted mixture of data sets, a random part of each its context, kept on
  disk as latents (``latent_windows.py``);
- "episode" (the embedded size): every chunk of an episode is a target in one pass, and the last part of training replaces
  the context by the model's own predictions, so that it learns to live with its own mistakes (``latent_episodes.py``).

Of the paper are AdamW with warm-up and cosine, rectified flow, context noise per position and EMA. Ours, each an option:
part of the targets are pure noise, the residual models' loss weighs cells that change, far anchors.

Every batch and every noise draw is a function of (seed, step, row): a killed run continues to bit-identical weights on a
CPU, and the number of processes changes nothing but the order of sums.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import nn

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.seeding import mix
from rawdream_env.trainers.common.distributed import Parallel, ProcessGroup, accumulating, join, micro_batches, spread
from rawdream_env.trainers.common.training_stage import StageConfig, TrainingStage, learning_rate
from rawdream_env.trainers.world_model.autoencoder import MAY_CHANGE, train_autoencoder
from rawdream_env.trainers.world_model.latent_episodes import (
    EpisodeObjective,
    EpisodeSampler,
    LatentEpisodes,
    RawEpisodes,
    encode_episodes,
    read_episodes,
    with_robot,
)
from rawdream_env.trainers.world_model.latent_windows import (
    DataEntry,
    WindowObjective,
    cached_mixture,
    deployed_entry,
    rollout_bounds,
)
from rawdream_env.trainers.world_model.losses import LossConfig
from rawdream_env.trainers.world_model.validation import Validation, assembled
from rawdream_env.world_models.autoencoders import AutoencoderConfig, FrameCodec, PackedFrameAutoencoder
from rawdream_env.world_models.loading import read_world_model, save_world_model
from rawdream_env.world_models.memory import require_memory, training_memory
from rawdream_env.world_models.wan.config import WAN_CONFIGS, WanConfig, wan_config
from rawdream_env.world_models.wan.kinematics import load_kinematics
from rawdream_env.world_models.wan.rollout import WAN_ROLLOUT, RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

__all__ = [
    "DataEntry",
    "EpisodeSampler",
    "LatentEpisodes",
    "LossConfig",
    "StageConfig",
    "WorldModelTrainConfig",
    "learning_rate",
    "train_world_model",
]


@dataclass(frozen=True)
class WorldModelTrainConfig:
    """Everything a world-model run depends on."""

    data: tuple[str, ...]
    """LeRobotDataset v3 folders. With objective "window" each may have settings:
    FOLDER[,weight=W][,name=N][,camera=C]."""
    out: str
    """Run folder; the same command continues an interrupted run."""
    init: str = ""
    """World model to start from, a folder or "embedded": its codec is kept as it is, its transformer trained on.
    Architecture and rollout settings are its own, unless others are given."""
    codec: str = ""
    """World model, a folder or "embedded", whose frame codec is used; the transformer starts from scratch."""
    validation: tuple[str, ...] = ()
    """Data folders of held-out episodes, written like ``data``."""
    deploy: str = ""
    """Data entry whose action statistics the saved model acts by; the first one by default (objective "window")."""
    robot: str = ""
    """Robot whose kinematics the model uses; by default the one that the data name."""
    seed: int = 0
    """Seed of initialisation, batches and noise."""
    device: str = "cpu"
    """Device to train on; "cuda" is a GPU for each process under torchrun."""
    parallel: Parallel = "none"
    """Under torchrun: ddp (everything on every process) or fsdp2 (weights and optimiser spread over them)."""
    bf16: bool = True
    """Train in bfloat16 autocast."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: a third more time, a fraction of the memory."""
    micro_batch_size: int = 0
    """Rows a process computes at a time, adding up gradients; 0: all of its rows."""
    offload: bool = False
    """Keep optimiser state and averaged weights in the host's memory: slower steps, 12 bytes less per weight."""
    objective: Literal["episode", "window"] = "episode"
    """The loss: over whole episodes (embedded size), or over windows with random context (the paper's)."""
    episode_chunks: int = 8
    """Objective "episode": chunks in a training episode, the horizon of the dream."""
    autoencoder: StageConfig = field(default_factory=lambda: StageConfig(steps=5000, batch_size=16, lr=2e-3, ema=0.99))
    """Stage 1, unless ``init`` or ``codec`` gives the frame codec."""
    transformer: StageConfig = field(default_factory=lambda: StageConfig(steps=6000, batch_size=8, lr=6e-4))
    """Stage 2."""
    autoencoder_model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Architecture of the autoencoder; its image size is that of the data."""
    model_name: str = ""
    """A named architecture, "embedded" or "wan2.1-1.3b", instead of ``model``."""
    model: WanConfig = field(default_factory=lambda: WAN_CONFIGS["embedded"])
    """Architecture of the transformer; with ``init`` left as it is, that of ``init``."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Rollout settings saved with the model; its arm map is also the one trained on. Frames per second are those of the
    data; objective "window" replaces the action bounds by those of the data as well."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is drawn and what weighs how much."""
    log_every: int = 25
    """Steps between lines of metrics."""
    save_every: int = 250
    """Steps between checkpoints."""
    validate_every: int = 1000
    """Steps between validations, where there are ``validation`` data."""
    validation_episodes: int = 8
    """Held-out episodes imagined at each."""
    validation_windows: int = 32
    """Held-out windows or episodes whose loss is measured at each."""


def train_world_model(config: WorldModelTrainConfig) -> Path:
    """All stages; returns the folder of the finished world model.

    Raises:
        InvalidOptionError: options that do not fit each other, the machine or the processes there are.
        CheckpointError: ``init`` or ``codec`` is missing, damaged or of another architecture.
        DatasetError: data that are missing, damaged or lack what the model takes.
        NotEnoughMemoryError: the transformer and its optimiser do not fit; raised before they are made.
        RunDirError: ``out`` holds a run with other settings.
    """
    with join(config.parallel, config.device) as world:
        config, initial = _resolved(replace(config, device=world.device))
        _check(config, world)
        _require_memory(config, world)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        train = _train_windows if config.objective == "window" else _train_episodes
        target = train(config, initial, world)
        world.wait()
    return target


# -- from the data to the objective ------------------------------------------------------------------------------------


def _train_windows(config: WorldModelTrainConfig, initial: WanWorldModel | None, world: ProcessGroup) -> Path:
    """The paper's objective on a mixture of data sets, each with its own action statistics."""
    entries = [DataEntry.parse(text) for text in config.data]
    config = with_robot(config, [entry.reader() for entry in entries])
    out = Path(config.out)
    codec = _codec(config, initial)
    if codec is None:
        codec = _trained_codec(config, read_episodes([entry.reader() for entry in entries], config.model), world)
    _fits(codec, config)
    mixture = cached_mixture(entries, codec, out / "latents", config, world)
    deployed = deployed_entry(mixture, config.deploy)
    bounds, fps = mixture.bounds[deployed], float(mixture.datasets[deployed].index["fps"])
    low, high = rollout_bounds(bounds, config.model.action_dim)
    rollout = replace(config.rollout, action_low=low, action_high=high, fps=fps)
    objective = WindowObjective(mixture, config, device=config.device)
    validation = None
    if config.validation:
        held_out = [DataEntry.parse(text) for text in config.validation]
        unseen = cached_mixture(held_out, codec, out / "validation_latents", config, world, bounds)
        measured = WindowObjective(unseen, config, device=config.device, stream=9)
        validation = Validation(config, rollout, codec, held_out, measured)
    transformer = train_transformer(config, initial, objective, validation, world)
    target = _save(config, transformer, codec, rollout)
    if world.first:
        mixture.save_statistics(target / "statistics.json")
    return target


def _train_episodes(config: WorldModelTrainConfig, initial: WanWorldModel | None, world: ProcessGroup) -> Path:
    """Teacher forcing over whole episodes in memory, whose actions are in the rollout's bounds."""
    entries = [DataEntry.parse(text) for text in config.data]
    readers = [entry.reader() for entry in entries]
    config = with_robot(replace(config, rollout=replace(config.rollout, fps=readers[0].fps)), readers)
    kinematics = load_kinematics(config.robot, config.rollout.arm_map)
    codec = _codec(config, initial)
    raw = read_episodes(readers, config.model, kinematics)
    codec = _trained_codec(config, raw, world) if codec is None else codec
    episodes = _latent_episodes(config, codec, raw, "latents.safetensors", world)
    del raw
    validation = None
    if config.validation:
        held_out = [DataEntry.parse(text) for text in config.validation]
        unseen = read_episodes([entry.reader() for entry in held_out], config.model, kinematics)
        latents = _latent_episodes(config, codec, unseen, "validation_latents.safetensors", world)
        validation = Validation(config, config.rollout, codec, held_out, EpisodeObjective(latents, config, stream=9))
    transformer = train_transformer(config, initial, EpisodeObjective(episodes, config), validation, world)
    return _save(config, transformer, codec, config.rollout)


def _latent_episodes(
    config: WorldModelTrainConfig, codec: FrameCodec, raw: RawEpisodes, name: str, world: ProcessGroup
) -> LatentEpisodes:
    """Encoded by process 0; the others wait and read what it has written."""
    if not isinstance(codec, PackedFrameAutoencoder):
        raise InvalidOptionError(
            'objective "episode" needs the embedded codec; give objective="window" for Wan\'s VAE.'
        )
    _fits(codec, config)
    if not world.first:
        world.wait()
    cache, chunk_len = Path(config.out) / name, config.model.chunk_len
    episodes = encode_episodes(codec, raw.frames, raw.actions, raw.poses, cache, chunk_len=chunk_len, bf16=config.bf16)
    if world.first:
        world.wait()
    if config.loss.object_weight:
        episodes = replace(episodes, focus=torch.from_numpy(np.concatenate(raw.focus)))
    return episodes


# -- the transformer ---------------------------------------------------------------------------------------------------


def train_transformer(
    config: WorldModelTrainConfig,
    initial: WanWorldModel | None,
    objective: WindowObjective | EpisodeObjective,
    validation: Validation | None,
    world: ProcessGroup,
) -> WanWorldModelTransformer | None:
    """Stage 2. Returns the averaged model (on process 0; None elsewhere)."""
    model = _new_transformer(config, initial)
    stage = TrainingStage(
        Path(config.out) / "transformer",
        asdict(config),
        config.transformer,
        model,
        spread(model, world),
        world=world,
        log_every=config.log_every,
        save_every=config.save_every,
        may_change=MAY_CHANGE,
        offload=config.offload,
    )
    if validation is not None and not stage.first:
        validation.begin(stage)
    batch_size = config.transformer.batch_size
    rows = world.rows(batch_size)
    parts = micro_batches(rows, config.micro_batch_size)
    for step in stage.loop():
        for part, compute in zip(parts, objective.losses(step, parts, batch_size), strict=True):
            with accumulating(stage.module, last=part is parts[-1]):
                with torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.bf16):
                    loss, sums = stage.module(compute)
                stage.backward(loss, len(part) / len(rows), sums)
        stage.update(step)
        if validation is not None and ((step + 1) % config.validate_every == 0 or step + 1 == config.transformer.steps):
            validation.run(step + 1, stage)
    averaged = stage.averaged()
    stage.close()
    return assembled(config.model, averaged).to(config.device) if world.first else None


def _new_transformer(config: WorldModelTrainConfig, initial: WanWorldModel | None) -> WanWorldModelTransformer:
    """With the weights of ``initial`` or random ones; parameters that cannot have a gradient are frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, 2))
        model = WanWorldModelTransformer(config.model)
    if initial is not None:
        model.load_state_dict(initial.transformer.state_dict())
    for parameter in model.unused_parameters():
        parameter.requires_grad_(False)
    if config.checkpointing:
        model.enable_gradient_checkpointing()
    return model.to(config.device)


# -- what a run begins and ends with -----------------------------------------------------------------------------------


def _check(config: WorldModelTrainConfig, world: ProcessGroup) -> None:
    """Refuse options that do not fit each other."""
    batch, arch = config.transformer.batch_size, config.model
    if batch % world.size:
        raise InvalidOptionError(
            f"transformer.batch_size {batch} cannot be divided among {world.size} processes; make it a multiple of "
            f"{world.size}, say {-(-batch // world.size) * world.size}."
        )
    if config.offload and config.parallel == "fsdp2":
        raise InvalidOptionError(
            "offload is for a device that holds a whole optimiser: fsdp2 spreads it over the devices already; leave one out."
        )
    if config.objective == "window" and arch.context_latents % arch.chunk_latents:
        raise InvalidOptionError(
            f"context_latents {arch.context_latents} is no multiple of chunk_latents {arch.chunk_latents}, as objective "
            '"window" needs it to be.'
        )
    if config.objective == "episode" and (config.deploy or any(DataEntry.parse(x).weight != 1 for x in config.data)):
        raise InvalidOptionError('weights of data entries and deploy are for objective="window"; add it.')


def _require_memory(config: WorldModelTrainConfig, world: ProcessGroup) -> None:
    """Raise ``NotEnoughMemoryError`` when training does not fit on this process's device."""
    arch, rows = config.model, config.transformer.batch_size // world.size
    rows = min(config.micro_batch_size or rows, rows)
    frames = 1 + arch.context_latents + arch.chunk_latents
    if config.objective == "episode":  # teacher forcing: the clean frames, and as many noisy ones
        frames = 1 + 2 * config.episode_chunks * arch.chunk_latents
    shards = world.size if config.parallel == "fsdp2" else 1
    parts = training_memory(
        arch, rows, frames, shards=shards, checkpointing=config.checkpointing, offload=config.offload
    )
    if world.device == "cpu":  # all processes share the host's memory
        parts = {name: size * world.size for name, size in parts.items()}
    advice = "lower micro_batch_size, add checkpointing or offload, or use more devices (parallel='fsdp2')"
    require_memory(parts, world.device, f"Training {rows} rows at a time", advice)


def _read(folder: str) -> WanWorldModel:
    """The world model in a folder, or the one that ships with the package."""
    return read_world_model(
        str(resources.files("rawdream_env.assets") / "world_model") if folder == "embedded" else folder
    )


def _resolved(config: WorldModelTrainConfig) -> tuple[WorldModelTrainConfig, WanWorldModel | None]:
    """The configuration with architecture and rollout filled in, and the world model named by ``init``.

    What is not given comes from ``init``, else from the named architecture. A wrong folder is noticed here, before the data
    are read: ``CheckpointError``, also when its architecture is not the one asked for.
    """
    if config.init and config.codec:
        raise InvalidOptionError("init brings its own codec: give init or codec, not both.")
    initial = _read(config.init) if config.init else None
    model, rollout = config.model, config.rollout
    if config.model_name:
        model = wan_config(config.model_name)
    elif initial is not None and model == WAN_CONFIGS["embedded"]:
        model = initial.transformer.arch
    if initial is not None and initial.transformer.arch != model:
        raise CheckpointError(
            f"{config.init} has another architecture ({initial.transformer.arch}) than this run ({model})."
        )
    pictures_alone = not (model.pose_dim or model.map_channels)
    if rollout == RolloutConfig():
        rollout = initial.config if initial is not None else WAN_ROLLOUT if pictures_alone else rollout
    if pictures_alone:
        rollout = replace(rollout, arm_map=None)
    return replace(config, model=model, rollout=rollout, model_name=""), initial


def _codec(config: WorldModelTrainConfig, initial: WanWorldModel | None) -> FrameCodec | None:
    """The frame codec that is given; None when it has to be trained."""
    source = _read(config.codec) if config.codec else initial
    if source is None:
        return None
    cast(nn.Module, source.autoencoder).to(config.device)
    return source.autoencoder


def _trained_codec(config: WorldModelTrainConfig, raw: RawEpisodes, world: ProcessGroup) -> PackedFrameAutoencoder:
    """Stage 1, on process 0; the others wait for its weights."""
    if world.first:
        codec = train_autoencoder(config, raw.frames)
    else:
        size = raw.frames[0].shape[1]
        codec = PackedFrameAutoencoder(replace(config.autoencoder_model, image_size=size)).to(config.device).eval()
    world.share(codec)
    return codec


def _fits(codec: FrameCodec, config: WorldModelTrainConfig) -> None:
    if codec.latent_shape != config.model.latent_shape:
        raise CheckpointError(
            f"the frame codec makes latents {codec.latent_shape} of {codec.frame_shape[0]}-pixel frames, the transformer "
            f"takes {config.model.latent_shape}; use another codec, or set model.latent_shape."
        )


def _save(
    config: WorldModelTrainConfig,
    transformer: WanWorldModelTransformer | None,
    codec: FrameCodec,
    rollout: RolloutConfig,
) -> Path:
    target = Path(config.out) / "world_model"
    if transformer is not None:
        save_world_model(WanWorldModel(transformer, codec, rollout, robot=config.robot), target)
    return target
