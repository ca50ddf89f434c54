"""Frames to latents and back: the ``FrameCodec`` protocol and the bundled implementation.

The stride is (4, 8, 8): the first latent, the anchor, is one frame; each later latent covers four frames, so that 1 + 4M
frames are 1 + M latents (paper, appendix A.1). Decoding continues from an explicit state: an episode can stop, restart or
move to another row of the batch without an effect on the other rows.

``PackedFrameAutoencoder`` packs four frames into the channels of 2-D convolutions; its anchor is the start frame, repeated
four times. It takes the place of Wan's causal 3-D VAE (``wan/vae.py``; ``wan/tiny_decoder.py`` is a fast approximate
decoder), which is about a hundred times too slow for a CPU.

Shape letters: N rows, M latents after the anchor, G latents of a chunk, C channels, H W frame size, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rawdream_env.errors import InvalidOptionError
from rawdream_env.world_models.wan.layers import ResBlock, RowExactConv2d

FRAMES_PER_LATENT = 4

DecoderState = tuple[Tensor, ...]
"""What a decoder keeps of earlier latents. Dim 0 of every tensor is the rows: apply the same index, ``torch.where`` or
``torch.cat`` to all tensors to drop, restart or join rows. Rows at different steps can share a batch.
"""


class FrameCodec(Protocol):
    """Frames to latents and back, causal in time. Each row of a result depends only on the same row of the input."""

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) -> normalised latents fp32 (N, C, h, w): the anchor."""

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 (N, 1 + 4M, H, W, 3) -> (N, 1 + M, C, h, w), the anchor first."""

    def start_decoding(self, anchors: Tensor) -> DecoderState:
        """Anchors (N, C, h, w) -> the state from which the latents after them are decoded."""

    def decode_next(self, state: DecoderState, latents: Tensor) -> tuple[DecoderState, Tensor]:
        """Latents (N, G, C, h, w) -> next state, uint8 (N, 4G, H, W, 3). ``state`` is not modified."""


def check_frames(frames: Tensor, frame_shape: tuple[int, int, int], video: bool = False) -> None:
    """``ValueError`` unless ``frames`` is uint8 (N, H, W, 3), or (N, 1 + 4M, H, W, 3) for a ``video``."""
    wanted = ("N", "1 + 4M", *frame_shape) if video else ("N", *frame_shape)
    whole = not video or (frames.dim() == 5 and frames.shape[1] % FRAMES_PER_LATENT == 1)
    if frames.dtype != torch.uint8 or frames.dim() != len(wanted) or frames.shape[-3:] != frame_shape or not whole:
        shape = ", ".join(map(str, wanted))
        raise ValueError(
            f"frames must be uint8 ({shape}), got {frames.dtype} {tuple(frames.shape)}; resize them"
            + (" and cut the video to 1 + 4M frames" if video else "")
        )


def check_latents(latents: Tensor, latent_shape: tuple[int, int, int], rows: int | None = None) -> None:
    """``ValueError`` unless ``latents`` is (N, C, h, w), or (N, G, C, h, w) with as many ``rows`` as the state has."""
    chunk = () if rows is None else ("G",)
    wanted = ("N" if rows is None else rows, *chunk, *latent_shape)
    fits = latents.dim() == len(wanted) and latents.shape[-3:] == latent_shape and rows in (None, len(latents))
    if not fits:
        raise ValueError(f"latents must have shape ({', '.join(map(str, wanted))}), got {tuple(latents.shape)}")


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

    def check(self) -> None:
        """Raise ``InvalidOptionError`` for sizes that are out of range or that no layer can have."""
        widths, blocks = self.widths, (*self.encoder_blocks, *self.decoder_blocks)
        if self.image_size % 8 or not 8 <= self.image_size <= 8192:
            raise InvalidOptionError(f"image_size {self.image_size} must be a multiple of 8, at most 8192.")
        if not 1 <= self.latent_channels <= 1024 or any(w % 8 or not 8 <= w <= 8192 for w in widths):
            raise InvalidOptionError(
                f"latent_channels {self.latent_channels} must be between 1 and 1024, widths {widths} multiples of 8 up to 8192."
            )
        if any(not 0 <= n <= 1000 for n in blocks):
            raise InvalidOptionError(f"encoder_blocks and decoder_blocks {blocks} must be between 0 and 1000.")


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
    """Encodes four frames into one latent frame and back; latents have zero mean and unit variance."""

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()) -> None:
        super().__init__()
        config.check()
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
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.config.image_size, self.config.image_size, 3

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

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 (N, 1 + 4M, H, W, 3) -> (N, 1 + M, C, h, w): a still of the first frame, then groups of four."""
        check_frames(frames, self.frame_shape, video=True)
        still = frames[:, :1].expand(-1, FRAMES_PER_LATENT, -1, -1, -1)
        groups = torch.cat([still, frames[:, 1:]], 1).unflatten(1, (-1, FRAMES_PER_LATENT))
        latents: Tensor = self.encode(groups.flatten(0, 1)).unflatten(0, groups.shape[:2])
        return latents

    def start_decoding(self, anchors: Tensor) -> DecoderState:
        """The empty state: every latent is decoded on its own."""
        check_latents(anchors, self.latent_shape)
        return ()

    def decode_next(self, state: DecoderState, latents: Tensor) -> tuple[DecoderState, Tensor]:
        """Latents (N, G, C, h, w) -> the empty state, uint8 (N, 4G, H, W, 3)."""
        check_latents(latents, self.latent_shape, len(latents))
        frames = self.decode_frames(latents.flatten(0, 1))
        return state, frames.unflatten(0, latents.shape[:2]).flatten(1, 2)

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
