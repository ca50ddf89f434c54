"""Stage 1 of training the bundled world model: the autoencoder of packed frames, and the scale of its latents.

Pixels that differ from the background (the arm and a few small objects) have five times the weight of the others. A little
noise on the latents makes the decoder robust to small errors of the transformer.

Shape letters: N frames of an episode, H W frame size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rawdream_env.seeding import mix
from rawdream_env.trainers.world_model.config import WorldModelTrainConfig
from rawdream_env.trainers.world_model.stage import stage_loop
from rawdream_env.types import UInt8Array
from rawdream_env.world_models.autoencoders import PackedFrameAutoencoder, pack_frames


def train_autoencoder(config: WorldModelTrainConfig, frames: Sequence[UInt8Array]) -> PackedFrameAutoencoder:
    """Stage 1; returns the averaged model, with normalised latents. ``frames``: a uint8 (N + 1, H, W, 3) array per episode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, 1))
        model = PackedFrameAutoencoder(replace(config.autoencoder_model, image_size=frames[0].shape[1]))
    model.to(config.device)
    background = torch.from_numpy(np.median(np.stack([f[0] for f in frames[:400]]), 0).astype(np.uint8))
    still = pack_frames(background[None, None].expand(1, 4, -1, -1, -1)).to(config.device)
    with stage_loop(config, "autoencoder", model, list(model.parameters())) as loop:
        for step in loop:
            x, gen = _draw_groups(config, frames, step)
            with torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.bf16):
                z = model.encoder(x)
                noise = torch.randn(z.shape, generator=gen).to(z)
                y = model.decoder(z + 0.05 * noise * z.detach().std())
            y = y.float()
            weight = 1 + 4 * ((x - still).abs() > 0.12).float()
            loss = (weight * (y - x).abs()).mean() + 5 * (weight * (y - x) ** 2).mean() + 1e-3 * z.float().pow(2).mean()
            loss.backward()
            norm = loop.update()
            if loop.every(config.log_every):
                mse = ((y - x) / 2).pow(2).mean()
                loop.log(loss=loss, grad_norm=norm, psnr=-10 * torch.log10(mse))
        model.load_state_dict(loop.averaged())
    model.requires_grad_(False)
    _normalize_latents(model, frames, config)
    return model.eval()


def _draw_groups(
    config: WorldModelTrainConfig, frames: Sequence[UInt8Array], step: int
) -> tuple[Tensor, torch.Generator]:
    """The packed groups of four frames of a step, and the generator of its noise."""
    rng = np.random.default_rng(mix(config.seed, 1, step, 0))
    groups = []
    for episode in rng.integers(len(frames), size=config.autoencoder.batch_size):
        t = rng.integers(len(frames[episode]) - 4)
        groups.append(frames[episode][t : t + 4])
        if rng.random() < 0.1:  # the anchor is a still
            groups[-1] = np.repeat(groups[-1][:1], 4, 0)
    packed = pack_frames(torch.from_numpy(np.stack(groups)).to(config.device))
    generator = torch.Generator().manual_seed(mix(config.seed, 1, step, 1))
    return packed.contiguous(memory_format=torch.channels_last), generator


@torch.no_grad()
def _normalize_latents(
    model: PackedFrameAutoencoder, frames: Sequence[UInt8Array], config: WorldModelTrainConfig
) -> None:
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
