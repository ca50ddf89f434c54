r"""Train a world model: frame codec, latents, transformer (paper, section 3.1 and appendix A.1). One trainer for both sizes.

    rawdream world-model train --data data/play --run-dir runs/world_model
    torchrun --nproc-per-node 8 -m rawdream_env world-model train --parallel fsdp2 --objective window \
        --init models/wan --model-name wan2.1-1.3b --data data/libero_90 --run-dir runs/zero_shot

The codec is trained (the bundled size) or taken from ``init`` or ``codec`` (Wan's VAE); the transformer starts from the
weights of ``init`` or from scratch. There are two objectives:

- "window" (the paper's): 33-frame windows of a weighted mixture of data sets, with a random context length; latents are kept
  on disk (``latent_windows.py``);
- "episode" (the bundled size): every chunk of an episode is a target in one pass. The last part of training replaces the
  context by the model's own predictions, so that the model learns to correct its own errors (``latent_episodes.py``).

From the paper: AdamW with warm-up and cosine, rectified flow, context noise per position. Added, each with an option:
averaged weights (EMA), targets of pure noise, larger loss weights for cells that change (residual models), far anchors.

Every batch and every noise draw is a function of (seed, step, row): on a CPU an interrupted run resumes to bit-identical
weights, and the number of processes changes only the order of sums.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError, InvalidOptionError, RunDirError
from rawdream_env.files import lock_file, remove_litter
from rawdream_env.resolve import bundled_folder
from rawdream_env.robots import read_camera
from rawdream_env.seeding import mix
from rawdream_env.trainers.common.distributed import ProcessGroup, accumulating, join, micro_batches, spread, whole
from rawdream_env.trainers.common.offload import HostCopies
from rawdream_env.trainers.world_model.action_bounds import (
    STATISTICS,
    action_path_is_new,
    bounds_of_model,
    rollout_bounds,
)
from rawdream_env.trainers.world_model.autoencoder import train_autoencoder
from rawdream_env.trainers.world_model.config import WorldModelTrainConfig
from rawdream_env.trainers.world_model.latent_episodes import (
    EpisodeObjective,
    LatentEpisodes,
    RawEpisodes,
    encode_episodes,
    model_kinematics,
    read_episodes,
    with_robot,
)
from rawdream_env.trainers.world_model.latent_windows import (
    DataEntry,
    WindowObjective,
    cached_mixture,
    deployed_entry,
)
from rawdream_env.trainers.world_model.stage import stage_loop
from rawdream_env.trainers.world_model.validation import Validation, assembled
from rawdream_env.world_models import EMBEDDED_VIDEO
from rawdream_env.world_models.autoencoders import FrameCodec, PackedFrameAutoencoder
from rawdream_env.world_models.loading import read_world_model, save_world_model
from rawdream_env.world_models.memory import require_memory, training_memory
from rawdream_env.world_models.wan.config import WAN_CONFIGS, wan_config
from rawdream_env.world_models.wan.kinematics import load_kinematics
from rawdream_env.world_models.wan.rollout import WAN_ROLLOUT, RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer


def train_world_model(config: WorldModelTrainConfig) -> Path:
    """Run all stages; returns the folder of the finished world model.

    Raises:
        InvalidOptionError: options that do not fit each other, the machine or the number of processes.
        CheckpointError: ``init`` or ``codec`` is missing, damaged or of another architecture.
        DatasetError: data are missing or damaged, or lack inputs of the model.
        NotEnoughMemoryError: the transformer and its optimizer do not fit; raised before anything is allocated.
        RunDirError: ``run_dir`` holds a run with other settings.
    """
    with join(config.parallel, config.device) as group:
        config, initial = _resolved(replace(config, device=group.device))
        _check(config, group)
        _require_memory(config, group)
        for text in (*config.data, *config.validation):
            DataEntry.parse(text).reader()  # before the run folder is created
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        train = _train_windows if config.objective == "window" else _train_episodes
        target = train(config, initial, group)
        group.wait()
    return target


# -- from the data to the objective ------------------------------------------------------------------------------------


def _train_windows(config: WorldModelTrainConfig, initial: WanWorldModel | None, group: ProcessGroup) -> Path:
    """The paper's objective on a mixture of data sets; those of one embodiment share their action bounds."""
    entries = [DataEntry.parse(text) for text in config.data]
    readers = [entry.reader() for entry in entries]
    config = with_robot(config, readers)
    model_kinematics(config, max(reader.state_dim for reader in readers))  # before the autoencoder is trained
    run_dir = Path(config.run_dir)
    codec = _codec(config, initial)
    if codec is None:
        codec = _trained_codec(config, read_episodes([entry.reader() for entry in entries], config.model), group)
    _fits(codec, config)
    known = bounds_of_model(initial, _folder(config.init))
    mixture = cached_mixture(entries, codec, run_dir / "latents", config, group, known)
    deployed = deployed_entry(entries, config.deploy)
    bounds = mixture.bounds[deployed]
    low, high = rollout_bounds(bounds, config.model.action_dim)
    fps = float(mixture.datasets[deployed].index["fps"])
    rollout = replace(config.rollout, action_low=low, action_high=high, fps=fps)
    objective = WindowObjective(mixture, config, device=config.device)
    validation = None
    if config.validation:
        held_out = [DataEntry.parse(text) for text in config.validation]
        shared = {"": bounds, entries[deployed].embodiment: bounds}
        unseen = cached_mixture(held_out, codec, run_dir / "validation_latents", config, group, shared)
        measured = WindowObjective(unseen, config, device=config.device, stream=9)
        validation = Validation(config, rollout, codec, held_out, measured)
    transformer = train_transformer(config, initial, objective, validation, group)
    target = _save(config, transformer, codec, rollout)
    if group.first:
        mixture.save_statistics(target / STATISTICS)
    return target


def _train_episodes(config: WorldModelTrainConfig, initial: WanWorldModel | None, group: ProcessGroup) -> Path:
    """Teacher forcing over whole episodes in memory, with the action bounds of the rollout settings."""
    entries = [DataEntry.parse(text) for text in config.data]
    readers = [entry.reader() for entry in entries]
    config = with_robot(replace(config, rollout=replace(config.rollout, fps=readers[0].fps)), readers)
    model_kinematics(config, max(reader.state_dim for reader in readers))  # before the autoencoder is trained
    kinematics = load_kinematics(config.robot, config.rollout.arm_map)
    codec = _codec(config, initial)
    raw = read_episodes(readers, config.model, kinematics)
    codec = _trained_codec(config, raw, group) if codec is None else codec
    episodes = _latent_episodes(config, codec, raw, "latents.safetensors", group)
    del raw
    validation = None
    if config.validation:
        held_out = [DataEntry.parse(text) for text in config.validation]
        unseen = read_episodes([entry.reader() for entry in held_out], config.model, kinematics)
        latents = _latent_episodes(config, codec, unseen, "validation_latents.safetensors", group)
        validation = Validation(config, config.rollout, codec, held_out, EpisodeObjective(latents, config, stream=9))
    transformer = train_transformer(config, initial, EpisodeObjective(episodes, config), validation, group)
    return _save(config, transformer, codec, config.rollout)


def _latent_episodes(
    config: WorldModelTrainConfig, codec: FrameCodec, raw: RawEpisodes, name: str, group: ProcessGroup
) -> LatentEpisodes:
    """The episodes in latent space: process 0 encodes and writes them, the other processes wait and read."""
    if not isinstance(codec, PackedFrameAutoencoder):
        raise InvalidOptionError('objective "episode" needs the bundled codec; give objective="window" for Wan\'s VAE.')
    _fits(codec, config)
    if not group.first:
        group.wait()
    cache, chunk_len = Path(config.run_dir) / name, config.model.chunk_len
    episodes = encode_episodes(codec, raw.frames, raw.actions, raw.poses, cache, chunk_len=chunk_len, bf16=config.bf16)
    if group.first:
        group.wait()
    if config.loss.object_weight:
        episodes = replace(episodes, focus=torch.from_numpy(np.concatenate(raw.focus)))
    return episodes


# -- the transformer ---------------------------------------------------------------------------------------------------


def train_transformer(
    config: WorldModelTrainConfig,
    initial: WanWorldModel | None,
    objective: WindowObjective | EpisodeObjective,
    validation: Validation | None,
    group: ProcessGroup,
) -> WanWorldModelTransformer | None:
    """Stage 2. Returns the averaged model (on process 0; None elsewhere)."""
    stage = config.transformer
    model = _new_transformer(config, initial)
    module = spread(model, group)
    host = HostCopies(dict(model.named_parameters())) if config.offload else None
    weights = list(model.parameters()) if host is None else list(host.copies.values())
    rows = group.rows(stage.batch_size)
    parts = micro_batches(rows, config.micro_batch_size)
    with stage_loop(config, "transformer", model, weights, group=group, host=host) as loop:
        if validation is not None and not loop.step:
            validation.begin(loop)
        for step in loop:
            totals: dict[str, Tensor] = {}
            for part, compute in zip(parts, objective.losses(step, parts, stage.batch_size), strict=True):
                with accumulating(module, last=part is parts[-1]):
                    with torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.bf16):
                        loss, sums = module(compute)
                    loss = loss * (len(part) / len(rows))
                    loss.backward()
                for name, value in {"loss": loss.detach(), **sums}.items():
                    totals[name] = totals[name] + value if name in totals else value
            norm = loop.update()
            if loop.every(config.log_every):
                totals = {name: group.total(value) for name, value in totals.items()}
                loss = totals.pop("loss") / group.size
                means = {name: value[0] / (value[1] + 1e-9) for name, value in totals.items()}
                loop.log(loss=loss, grad_norm=whole(norm), **means)
            if validation is not None and (loop.every(config.validate_every) or loop.last):
                validation.run(loop)
        averaged = loop.averaged()
    return assembled(config.model, averaged).to(config.device) if group.first else None


def _new_transformer(config: WorldModelTrainConfig, initial: WanWorldModel | None) -> WanWorldModelTransformer:
    """A transformer with the weights of ``initial`` or random weights; parameters that never get a gradient are frozen."""
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


# -- options, codec, saving --------------------------------------------------------------------------------------------


def _check(config: WorldModelTrainConfig, group: ProcessGroup) -> None:
    """Raise ``InvalidOptionError`` for options that do not fit each other."""
    batch, arch = config.transformer.batch_size, config.model
    if batch % group.size:
        raise InvalidOptionError(
            f"transformer.batch_size {batch} cannot be divided among {group.size} processes; make it a multiple of "
            f"{group.size}, say {-(-batch // group.size) * group.size}."
        )
    if config.offload and config.parallel == "fsdp2":
        raise InvalidOptionError(
            "offload is for a device that holds a whole optimizer, but fsdp2 spreads it over the devices already; "
            "use one of the two."
        )
    if config.objective == "window" and arch.context_latents % arch.chunk_latents:
        raise InvalidOptionError(
            f"context_latents {arch.context_latents} is no multiple of chunk_latents {arch.chunk_latents}, which objective "
            '"window" requires; change --model.context-latents.'
        )
    entries = [DataEntry.parse(text) for text in config.data]
    if config.objective == "episode" and (config.deploy or any(x.weight != 1 or x.embodiment for x in entries)):
        raise InvalidOptionError(
            'weights and embodiments of data entries and deploy are for objective="window"; add --objective window.'
        )
    deployed = entries[deployed_entry(entries, config.deploy)].embodiment
    if other := sorted({DataEntry.parse(text).embodiment for text in config.validation} - {deployed, ""}):
        raise InvalidOptionError(
            f"validation data are of embodiment {', '.join(other)}, the saved model is for {deployed or 'the unnamed one'}; "
            "choose the embodiment with deploy, or leave these data out."
        )


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


def _folder(name: str) -> str:
    """A folder, or that of the bundled video model."""
    return str(bundled_folder("video_world_model")) if name in ("embedded", EMBEDDED_VIDEO) else name


def _resolved(config: WorldModelTrainConfig) -> tuple[WorldModelTrainConfig, WanWorldModel | None]:
    """The configuration with architecture and rollout filled in, and the world model named by ``init``.

    Settings that are not given come from ``init``, else from the named architecture. ``CheckpointError``, before the data are
    read, when the folder of ``init`` is unusable or has another architecture than the run.
    """
    if config.init and config.codec:
        raise InvalidOptionError("init has its own codec: give init or codec, not both.")
    initial = read_world_model(_folder(config.init)) if config.init else None
    model, rollout = config.model, config.rollout
    if config.model_name:
        model = wan_config(config.model_name)
    elif initial is not None and model == WAN_CONFIGS["embedded"]:
        model = initial.transformer.arch
    if initial is not None and initial.transformer.arch != model:
        theirs, ours = asdict(initial.transformer.arch), asdict(model)
        other = ", ".join(f"{name}: {theirs[name]} -> {ours[name]}" for name in ours if theirs[name] != ours[name])
        raise CheckpointError(
            f"{config.init} has another architecture than this run ({other}). Leave the architecture out to use that of init."
        )
    pictures_alone = not (model.pose_dim or model.map_channels)
    if rollout == RolloutConfig():
        rollout = initial.config if initial is not None else WAN_ROLLOUT if pictures_alone else rollout
    if pictures_alone:
        rollout = replace(rollout, arm_map=None)
    if config.camera:
        if rollout.arm_map is None:
            raise InvalidOptionError("camera is for the arm map, and this model has none; leave it out.")
        rollout = replace(rollout, arm_map=replace(rollout.arm_map, camera=read_camera(config.camera)))
    if initial is not None and not action_path_is_new(initial):
        rollout = _with_bounds_of(initial, rollout, config.init)
    return replace(config, model=model, rollout=rollout, model_name=""), initial


def _with_bounds_of(initial: WanWorldModel, rollout: RolloutConfig, name: str) -> RolloutConfig:
    """``rollout`` with the action bounds that ``initial`` was trained with; ``InvalidOptionError`` for others."""
    given, default, own = (
        (config.action_low, config.action_high) for config in (rollout, RolloutConfig(), initial.config)
    )
    if given not in (default, own):
        raise InvalidOptionError(
            f"{name} was trained with action bounds {own}, the run gives {given}: the same action would mean another "
            "condition. Leave rollout.action-low and rollout.action-high out."
        )
    return replace(rollout, action_low=own[0], action_high=own[1])


def _codec(config: WorldModelTrainConfig, initial: WanWorldModel | None) -> FrameCodec | None:
    """The given frame codec; None when it has to be trained."""
    source = read_world_model(_folder(config.codec)) if config.codec else initial
    if source is None:
        return None
    cast(nn.Module, source.autoencoder).to(config.device)
    return source.autoencoder


def _trained_codec(config: WorldModelTrainConfig, raw: RawEpisodes, group: ProcessGroup) -> PackedFrameAutoencoder:
    """Stage 1, on process 0; the other processes wait for its weights."""
    if group.first:
        codec = train_autoencoder(config, raw.frames)
    else:
        size = raw.frames[0].shape[1]
        codec = PackedFrameAutoencoder(replace(config.autoencoder_model, image_size=size)).to(config.device).eval()
    group.share(codec)
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
    target = Path(config.run_dir) / "world_model"
    if transformer is None:
        return target
    try:
        lock = lock_file(Path(config.run_dir) / ".save.lock")
    except BlockingIOError as error:
        raise RunDirError(
            f"{target} is being written by another process. Wait for it, then rerun the command."
        ) from error
    with lock:
        remove_litter(target)  # of a process that was killed while it saved
        save_world_model(WanWorldModel(transformer, codec, rollout, robot=config.robot), target)
    return target
