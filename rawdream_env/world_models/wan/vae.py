"""Wan 2.1's causal 3-D VAE as a ``FrameCodec``: C = 16, stride (4, 8, 8), a decoder that continues from a state.

The network is diffusers' ``AutoencoderKLWan`` (paper, appendix A.1). This file adds normalised latents, strict loading, and
a decoder whose state is outside the module, so that episodes at different steps share a batch; decoding one chunk costs a
quarter of decoding its window again.

The state has one tensor per causal convolution over three frames: the last two frames of its input. After the anchor there
is only one such frame; the other is zero, like the convolution's padding. The two layers that double the frame rate skip the
anchor and pad with zeros afterwards, so their state starts at zero. A state therefore has the same shapes at every step, and
decoding from it equals decoding the whole video.

Two layouts are read: diffusers' folder and Wan's own single file (``Wan2.1_VAE.pth``).

Shape letters: N rows, G latents of a chunk, C channels, H W frame size, h w latent size, F frames.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import (
    atomic_write_json,
    check_weights,
    load_tensors,
    read_json,
    save_safetensors,
    sealed_folder,
)
from rawdream_env.world_models.autoencoders import DecoderState, check_frames, check_latents
from rawdream_env.world_models.pretrained import WEIGHTS, read_folder

SPATIAL_STRIDE = 8
ORIGINAL_BASE_DIM = 96


class WanVAE(nn.Module):
    """Wan's VAE, frozen, with normalised latents: (posterior mode - latents_mean) / latents_std.

    Args:
        vae: the network, an ``AutoencoderKLWan`` of the Wan 2.1 kind.
        image_size: height and width of the frames in pixels, a multiple of 16 (8 for the VAE, 2 for the transformer's
            patches).

    Raises:
        InvalidOptionError: ``image_size`` does not fit.
        CheckpointError: the network is another kind of Wan VAE, or its normalisation cannot be used.
    """

    def __init__(self, vae: Any, image_size: int = 256) -> None:
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise InvalidOptionError(f"image_size must be a multiple of 16, got {image_size}; the paper uses 256.")
        config: Mapping[str, Any] = vae.config
        _check_config(config, "this network")
        self.vae = vae.eval().requires_grad_(False)
        self.image_size = image_size
        self._statistics = torch.tensor([config["latents_mean"], config["latents_std"]])

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.image_size, self.image_size, 3

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H/8, W/8)."""
        side = self.image_size // SPATIAL_STRIDE
        return int(self.vae.config["z_dim"]), side, side

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) -> normalised latents fp32 (N, C, h, w): the anchor."""
        check_frames(images, self.frame_shape)
        return self._encode(images[:, None])[:, 0]

    @torch.no_grad()
    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 (N, 1 + 4M, H, W, 3) -> (N, 1 + M, C, h, w), the anchor first.

        diffusers encodes four frames at a time, so that activations do not grow with the length of the video.
        """
        check_frames(frames, self.frame_shape, video=True)
        return self._encode(frames)

    @torch.no_grad()
    def start_decoding(self, anchors: Tensor) -> DecoderState:
        """Anchors (N, C, h, w) -> one tensor (N, channels, 2, height, width) per causal convolution of the decoder."""
        check_latents(anchors, self.latent_shape)
        cache, used = self._empty_cache(), [0]
        self.vae.decoder(self._unnormalised(anchors[:, None]), feat_cache=cache, feat_idx=used, first_chunk=True)
        state: list[Tensor] = []
        for entry in cache[: used[0]]:
            if isinstance(
                entry, str
            ):  # a layer that doubles the frame rate; its input has the shape of the previous entry
                state.append(torch.zeros_like(state[-1]))
            else:
                state.append(F.pad(entry, (0, 0, 0, 0, 2 - entry.shape[2], 0)))
        return tuple(state)

    @torch.no_grad()
    def decode_next(self, state: DecoderState, latents: Tensor) -> tuple[DecoderState, Tensor]:
        """Latents (N, G, C, h, w) -> next state, uint8 (N, 4G, H, W, 3)."""
        state, video = self.decode_pixels(state, latents)
        return state, ((video.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().to(torch.uint8)

    @torch.no_grad()
    def decode_pixels(self, state: DecoderState, latents: Tensor) -> tuple[DecoderState, Tensor]:
        """Latents (N, G, C, h, w) -> next state, fp32 (N, 3, 4G, H, W) in [-1, 1]: ``decode_next`` before rounding."""
        check_latents(latents, self.latent_shape, len(state[0]))
        cache, x = self._empty_cache(), self._unnormalised(latents)
        cache[: len(state)] = state
        parts = [self.vae.decoder(part, feat_cache=cache, feat_idx=[0]) for part in x.split(1, 2)]
        return tuple(cache[: len(state)]), torch.cat(parts, 2).float().clamp(-1, 1)

    @classmethod
    def from_pretrained(cls, path: str | Path, image_size: int = 256) -> WanVAE:
        """Load a checkpoint in fp32, completely or not at all.

        Args:
            path: a folder in diffusers' layout (config.json and diffusion_pytorch_model.safetensors, or its shards
                with their index), or Wan's own single file (``Wan2.1_VAE.pth`` or the same as safetensors).
            image_size: as for the class.

        Raises:
            InvalidOptionError: ``image_size`` does not fit.
            CheckpointError: something is missing or damaged; one error names every tensor that is missing, unknown,
                wrongly shaped or not finite.
        """
        import diffusers

        path, build = Path(path), cast(Any, diffusers.AutoencoderKLWan.from_config)
        if path.is_file():
            tensors, where = load_tensors(path), path
            first = tensors.get("encoder.conv1.weight")
            config = {"base_dim": ORIGINAL_BASE_DIM if first is None or first.dim() != 5 else len(first)}
        else:
            config = _read_config(path)
            _check_kind(config, str(path))  # before it is built: its counts bound the network
            tensors, where = read_folder(path)
        try:
            with torch.device("meta"):  # no memory and no random numbers for weights that are replaced below
                vae = build(config)
        except (TypeError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
            raise CheckpointError(f"{path / 'config.json'} describes no Wan VAE ({error}); restore it") from error
        _check_config(vae.config, str(path))
        names = {name: original_name(name) if path.is_file() else name for name in vae.state_dict()}
        wanted = {names[name]: tensor for name, tensor in vae.state_dict().items()}
        check_weights(tensors, wanted, where, "architecture (Wan 2.1)" if path.is_file() else "config.json")
        vae.load_state_dict({ours: tensors[theirs].float() for ours, theirs in names.items()}, assign=True)
        return cls(vae, image_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write diffusers' layout to ``folder`` (created); ``AutoencoderKLWan.from_pretrained`` reads it too."""
        folder = Path(folder)
        with sealed_folder(folder):
            save_safetensors(folder / WEIGHTS, self.vae.state_dict(), {"format": "pt"})
            atomic_write_json(folder / "config.json", json.loads(self.vae.to_json_string()))

    def _encode(self, frames: Tensor) -> Tensor:
        """uint8 (N, F, H, W, 3) -> normalised latents fp32 (N, 1 + (F - 1) / 4, C, h, w)."""
        video = (frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(self._dtype).contiguous()
        latents: Tensor = self.vae.encode(video).latent_dist.mode().float().transpose(1, 2)
        mean, std = self._mean_and_std(latents.device)
        return (latents - mean) / std

    def _unnormalised(self, latents: Tensor) -> Tensor:
        """Normalised latents (N, G, C, h, w) -> what the decoder takes, (N, C, G, h, w)."""
        mean, std = self._mean_and_std(latents.device)
        x: Tensor = self.vae.post_quant_conv((latents * std + mean).transpose(1, 2).to(self._dtype))
        return x

    def _mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """fp32 (C, 1, 1) each. No buffers: ``to(bfloat16)`` would round them."""
        self._statistics = self._statistics.to(device)
        mean, std = self._statistics[:, :, None, None]
        return mean, std

    def _empty_cache(self) -> list[Any]:
        """diffusers' feature cache, an entry for every causal convolution (those of a single frame leave theirs)."""
        return [None] * sum(isinstance(module, nn.Conv3d) for module in self.vae.decoder.modules())

    @property
    def _dtype(self) -> torch.dtype:
        weight = self.vae.post_quant_conv.weight
        assert isinstance(weight, Tensor)
        return weight.dtype


def original_name(name: str) -> str:
    """Name of a tensor in Wan's own file. There encoder and decoder are flat lists of layers, and the parts of a
    residual block are numbered; in the decoder each level has three residual blocks and one upsampler.
    """
    middle = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
    name = re.sub(r"mid_block\.(\w+\.\d)", lambda m: f"middle.{middle[m[1]]}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"downsamples.\1", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)
    for ours, theirs in _PARTS.items():
        name = re.sub(rf"(^|\.){ours}\.", rf"\g<1>{theirs}.", name)
    return name


_PARTS = {
    "conv1": "residual.2",  # before those that become conv1
    "conv2": "residual.6",
    "norm1": "residual.0",
    "norm2": "residual.3",
    "conv_shortcut": "shortcut",
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
}


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    """Refuse what is no Wan 2.1 VAE (Wan 2.2's has 48 channels and stride 16)."""
    wanted = {
        "is_residual": False,
        "patch_size": None,
        "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
        "num_res_blocks": 2,
        "attn_scales": [],
    }
    other = {name: config[name] for name, value in wanted.items() if config.get(name, value) != value}
    if other:
        raise CheckpointError(
            f"{where} is not the VAE of Wan 2.1: {other}, expected { {name: wanted[name] for name in other} }. "
            "Use the VAE of Wan2.1-T2V-1.3B."
        )
    if infinite := [name for name, value in config.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise CheckpointError(f"{where} describes no Wan VAE: {infinite[0]} is {config[infinite[0]]}; restore it.")
    for name in ("base_dim", "z_dim"):
        size = config.get(name, 16)
        if not isinstance(size, int) or not 1 <= size <= 1024:
            raise CheckpointError(f"{where} describes no Wan VAE: {name} is {size!r}, expected 1 to 1024; restore it.")


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse another kind of VAE and statistics that do not fit."""
    _check_kind(config, where)
    mean, std, channels = config["latents_mean"], config["latents_std"], config["z_dim"]
    try:
        numbers = torch.tensor([mean, std], dtype=torch.float64)
        usable = numbers.shape == (2, channels) and bool(numbers.isfinite().all()) and bool((numbers[1] > 0).all())
    except (TypeError, ValueError, OverflowError):  # not numbers, or of different lengths
        usable = False
    if not usable:
        raise CheckpointError(
            f"{where} has latents_mean {mean} and latents_std {std}, expected {channels} finite numbers each, the "
            "second above 0; restore its config.json"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"no VAE in {folder}: config.json is missing; download the folder vae of Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    config = read_json(path)
    if config.get("_class_name") != "AutoencoderKLWan":
        raise CheckpointError(f"{path} describes {config.get('_class_name')!r}, expected 'AutoencoderKLWan'")
    return config
