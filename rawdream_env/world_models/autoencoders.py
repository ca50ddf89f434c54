"""The embedded autoencoder: four frames packed in the channels, 2-D convolutions, stride (4, 8, 8), C = 16.

It stands where the full-size model has Wan's causal 3-D VAE, which is about a hundred times too slow for a CPU. Same
contract: a latent frame covers four video frames, and the first latent of an episode is the start frame four times.

Shape letters: N latent frames, C channels, H W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rawdream_env.world_models.layers import ResBlock, RowExactConv2d

FRAMES_PER_LATENT = 4


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of the packed-frame autoencoder."""

    image_size: int = 64
    """Height and width in pixels; a multiple of 8."""
    latent_channels: int = 16
    """Channels C of a latent frame."""
    widths: tuple[int, int] = (96, 160)
    """Channels at 1/4 and 1/8 resolution."""
    encoder_blocks: tuple[int, int] = (1, 2)
    """Residual blocks at 1/4 and 1/8 resolution of the encoder."""
    decoder_blocks: tuple[int, int] = (2, 2)
    """Residual blocks at 1/4 and 1/8 resolution of the decoder."""


def pack_frames(frames: Tensor) -> Tensor:
    """uint8 (N, 4, H, W, 3) -> float (N, 12, H, W) in [-1, 1]."""
    n, f, h, w, c = frames.shape
    return (frames.float() / 127.5 - 1).permute(0, 1, 4, 2, 3).reshape(n, f * c, h, w)


def unpack_frames(packed: Tensor) -> Tensor:
    """Float (N, 12, H, W) in [-1, 1] -> uint8 (N, 4, H, W, 3)."""
    n, _, h, w = packed.shape
    frames = packed.float().reshape(n, FRAMES_PER_LATENT, 3, h, w).permute(0, 1, 3, 4, 2)
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class PackedFrameAutoencoder(nn.Module):
    """Encodes four frames into one latent frame and back; latents are normalised to zero mean, unit variance."""

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()) -> None:
        super().__init__()
        self.config = config
        (w0, w1), c = config.widths, config.latent_channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            RowExactConv2d(192, w0, 3, padding=1),
            *[ResBlock(w0) for _ in range(config.encoder_blocks[0])],
            RowExactConv2d(w0, w1, 4, stride=2, padding=1),
            *[ResBlock(w1) for _ in range(config.encoder_blocks[1])],
            nn.GroupNorm(8, w1),
            nn.SiLU(),
            RowExactConv2d(w1, c, 1),
        )
        self.decoder = nn.Sequential(
            RowExactConv2d(c, w1, 3, padding=1),
            *[ResBlock(w1) for _ in range(config.decoder_blocks[1])],
            RowExactConv2d(w1, 4 * w0, 3, padding=1),
            nn.PixelShuffle(2),
            *[ResBlock(w0) for _ in range(config.decoder_blocks[0])],
            nn.GroupNorm(8, w0),
            nn.SiLU(),
            RowExactConv2d(w0, 192, 3, padding=1),
            nn.PixelShuffle(4),
        )
        self.register_buffer("latent_mean", torch.zeros(c))
        self.register_buffer("latent_std", torch.ones(c))
        self.latent_mean: Tensor
        self.latent_std: Tensor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H/8, W/8)."""
        side = self.config.image_size // 8
        return self.config.latent_channels, side, side

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 (N, 4, H, W, 3) -> normalised latents fp32 (N, C, H/8, W/8)."""
        z: Tensor = self.encoder(pack_frames(frames).to(self._dtype)).float()
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) -> latents of a still: the image four times."""
        return self.encode(images[:, None].expand(-1, FRAMES_PER_LATENT, -1, -1, -1))

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (N, C, h, w) -> packed frames float (N, 12, H, W), nominally in [-1, 1]."""
        z = latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        packed: Tensor = self.decoder(z.to(self._dtype))
        return packed

    def decode_frames(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> uint8 (N, 4, H, W, 3)."""
        return unpack_frames(self.decode(latents))

    @property
    def _dtype(self) -> torch.dtype:
        weight = self.decoder[0].weight
        assert isinstance(weight, Tensor)
        return weight.dtype
