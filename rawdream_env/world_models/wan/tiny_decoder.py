"""An opt-in tiny decoder for Wan 2.1's latents: a twenty-fifth of the VAE decoder's cost, slightly blurred frames.

Reads the decoder of TAEHV (madebyollin/taehv, weights "taew2_1") with its own tensor names. That format:

- Inputs are the normalised latents of the transformer: "TAEHV does not use any latent scales / shifts" (its README).
  Unlike for the VAE, latents_mean and latents_std are *not* applied.
- Output is RGB in [0, 1]. Every latent is decoded to four frames; the first three of a video are dropped, so that the
  anchor is one frame and 1 + M latents are 1 + 4M frames, as with the VAE.
- Convolutions are 2-D. The memory blocks also take their input of the previous frame (zeros before the first one), and
  other layers turn one frame into two.

The decoder's state is the last input of each of its nine memory blocks.

Shape letters: N rows, G latents of a chunk, F frames, C channels, H W frame size, h w latent size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError
from rawdream_env.files import check_weights, load_tensors
from rawdream_env.world_models.autoencoders import DecoderState, check_latents
from rawdream_env.world_models.wan.layers import RowExactConv2d
from rawdream_env.world_models.wan.vae import WanVAE

SOURCE = "https://github.com/madebyollin/taehv"


class SoftClamp(nn.Module):
    """Maps values smoothly into (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Residual block that also takes its input of the previous frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            RowExactConv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(),
            RowExactConv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            RowExactConv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Two (NF, C, H, W) -> (NF, C, H, W)."""
        return torch.relu(self.conv(torch.cat([x, before], 1)) + x)


class TimeGrow(nn.Module):
    """Turns each frame into ``times`` frames."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = RowExactConv2d(channels, channels * times, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(NF, C, H, W) -> (NF * times, C, H, W)."""
        y: Tensor = self.conv(x).unflatten(1, (self.times, -1)).flatten(0, 1)
        return y


class TinyDecoder(nn.Module):
    """TAEHV's decoder with its tensor names. On a CPU in fp32 rows do not depend on their neighbours.

    Args:
        latent_channels: C of the latents; 16 for Wan 2.1.
        widths: channels at 1/8, 1/4 and 1/2 of the frame size, and at the full one.
    """

    def __init__(self, latent_channels: int = 16, widths: tuple[int, int, int, int] = (256, 128, 64, 64)) -> None:
        super().__init__()
        self.latent_channels, self.widths = latent_channels, widths
        layers: list[nn.Module] = [SoftClamp(), RowExactConv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for width, wider, times in zip(widths, widths[1:], (1, 2, 2), strict=False):
            layers += [MemoryBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), TimeGrow(width, times)]
            layers += [RowExactConv2d(width, wider, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), RowExactConv2d(widths[3], 3, 3, padding=1))

    def empty_state(self, latents: Tensor) -> DecoderState:
        """The state before a video begins, for ``latents`` (N, ..., h, w): zeros."""
        n, (h, w), weight = len(latents), latents.shape[-2:], self.decoder[1].weight
        assert isinstance(weight, Tensor)
        return tuple(
            weight.new_zeros(n, width, h * 2**level, w * 2**level)
            for level, width in enumerate(self.widths[:3])
            for _ in range(3)
        )

    def forward(self, state: DecoderState, latents: Tensor) -> tuple[DecoderState, Tensor]:
        """Normalised latents (N, G, C, h, w) -> next state, fp32 (N, 4G, 3, H, W) in [0, 1].

        After ``empty_state``, the first three frames precede the anchor's and are to be dropped.
        """
        n, memories, remembered = len(latents), iter(state), []
        x = latents.flatten(0, 1).to(state[0].dtype)
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                frames = x.unflatten(0, (n, -1))
                before = torch.cat([next(memories)[:, None], frames[:, :-1]], 1)
                remembered.append(frames[:, -1].clone())  # a view would keep the whole chunk in memory
                x = layer(x, before.flatten(0, 1))
            else:
                x = layer(x)
        return tuple(remembered), x.unflatten(0, (n, -1)).float().clamp(0, 1)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, latent_channels: int = 16, widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    ) -> TinyDecoder:
        """Load taew2_1.safetensors or taew2_1.pth in fp32, completely or not at all; an encoder in the file is ignored.

        Raises:
            CheckpointError: the file is missing or damaged; one error names every decoder tensor that is missing,
                unknown, wrongly shaped or not finite.
        """
        if not Path(path).is_file():
            raise CheckpointError(
                f"There is no file {path}. Download safetensors/taew2_1.safetensors (or taew2_1.pth) from {SOURCE}; "
                "it belongs to Wan 2.1."
            )
        tensors = {name: tensor for name, tensor in load_tensors(path).items() if not name.startswith("encoder.")}
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced below
            decoder = cls(latent_channels, widths)
        check_weights(tensors, decoder.state_dict(), path, "architecture (TAEHV's taew2_1)")
        decoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return decoder.eval().requires_grad_(False)


class TinyDecoderCodec(nn.Module):
    """A ``FrameCodec`` that encodes with Wan's VAE and decodes with the tiny decoder.

    Approximate: latents are the VAE's own, only the decoded frames differ.

    Raises:
        ValueError: ``decoder`` is for latents of another number of channels.
    """

    def __init__(self, base: WanVAE, decoder: TinyDecoder) -> None:
        super().__init__()
        if decoder.latent_channels != base.latent_shape[0]:
            raise ValueError(
                f"the tiny decoder takes {decoder.latent_channels} latent channels, the VAE makes "
                f"{base.latent_shape[0]}; use taew2_1 with the VAE of Wan 2.1"
            )
        self.base, self.decoder = base, decoder.eval().requires_grad_(False)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.base.frame_shape

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H/8, W/8)."""
        return self.base.latent_shape

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) -> normalised latents fp32 (N, C, h, w): the anchor."""
        return self.base.encode_image(images)

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 (N, 1 + 4M, H, W, 3) -> (N, 1 + M, C, h, w), the anchor first."""
        return self.base.encode_video(frames)

    @torch.no_grad()
    def start_decoding(self, anchors: Tensor) -> DecoderState:
        """Anchors (N, C, h, w) -> nine tensors (N, channels, height, width)."""
        check_latents(anchors, self.latent_shape)
        state, _ = self.decoder(self.decoder.empty_state(anchors), anchors[:, None])
        return tuple(state)

    @torch.no_grad()
    def decode_next(self, state: DecoderState, latents: Tensor) -> tuple[DecoderState, Tensor]:
        """Latents (N, G, C, h, w) -> next state, uint8 (N, 4G, H, W, 3)."""
        check_latents(latents, self.latent_shape, len(state[0]))
        state, video = self.decoder(state, latents)
        return state, (video.permute(0, 1, 3, 4, 2) * 255).round().to(torch.uint8)
