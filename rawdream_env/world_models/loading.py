"""Load and save world models: a folder of safetensors and JSON, validated when it is read.

    config.json     format, rollout settings and the robot's name (default robot when it is absent)
    transformer/    WanWorldModelTransformer in diffusers' layout
    autoencoder/    PackedFrameAutoencoder (embedded size), or
    vae/            AutoencoderKLWan in diffusers' layout (full size)
    taew2_1.*       the tiny decoder, optional: .safetensors or .pth

Weights may be stored in fp16; they are loaded in fp32 and cast to ``dtype``.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import atomic_write_json, load_module, read_json, save_safetensors, sealed_folder
from rawdream_env.world_models.autoencoders import AutoencoderConfig, FrameCodec, PackedFrameAutoencoder
from rawdream_env.world_models.pretrained import dataclass_from_json
from rawdream_env.world_models.wan.chunk import ContextCache
from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.tiny_decoder import TinyDecoder, TinyDecoderCodec
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer
from rawdream_env.world_models.wan.vae import SPATIAL_STRIDE, WanVAE

FORMAT = "rawdream-world-model-2"


def save_codec(codec: FrameCodec, folder: Path, *, half: bool = False) -> None:
    """Write a frame codec into its subfolder of a world model's ``folder``."""
    if isinstance(codec, TinyDecoderCodec):
        codec = codec.base
    if isinstance(codec, WanVAE):
        codec.save_pretrained(folder / "vae")
        return
    assert isinstance(codec, PackedFrameAutoencoder)
    target = folder / "autoencoder"
    tensors = {k: v.detach().cpu().contiguous() for k, v in codec.state_dict().items()}
    with sealed_folder(target):
        save_safetensors(target / "model.safetensors", {k: v.half() if half else v for k, v in tensors.items()}, {})
        atomic_write_json(target / "config.json", asdict(codec.config))


def read_codec(folder: Path, latent_size: int, *, tiny: bool = False) -> FrameCodec:
    """The frame codec in a world model's ``folder``, for latents of ``latent_size`` rows and columns.

    ``tiny``: decode with the tiny decoder beside the VAE; when it is missing, ``CheckpointError`` names its source.
    """
    if (folder / "vae").is_dir():
        vae = WanVAE.from_pretrained(folder / "vae", latent_size * SPATIAL_STRIDE)
        if not tiny:
            return vae
        files = sorted(folder.glob("taew2_1.*"))
        return TinyDecoderCodec(vae, TinyDecoder.from_pretrained(files[0] if files else folder / "taew2_1.safetensors"))
    if tiny:
        raise CheckpointError(f"the tiny decoder is for the VAE of Wan 2.1, but {folder} has another frame codec.")
    path = folder / "autoencoder"
    values = read_json(path / "config.json")
    config = dataclass_from_json(AutoencoderConfig, values, str(path / "config.json"))
    return load_module(lambda: PackedFrameAutoencoder(config), path / "model.safetensors")


def save_world_model(model: WanWorldModel, folder: str | Path, *, half: bool = False) -> None:
    """Write ``model`` to ``folder`` (created); ``half`` stores fp16. ``config.json`` is written last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.transformer.save_pretrained(folder / "transformer", half=half)
    save_codec(model.autoencoder, folder, half=half)
    named = {"robot": model.robot} if model.robot else {}
    atomic_write_json(folder / "config.json", {"format": FORMAT, "rollout": asdict(model.config), **named})


def read_world_model(
    folder: str | Path,
    *,
    context_cache: ContextCache = "step",
    tiny_decoder: bool = False,
    micro_batch_size: int = 0,
    **overrides: Any,
) -> WanWorldModel:
    """Load a world model folder; ``overrides`` are fields of its ``RolloutConfig`` (``num_inference_steps=1``)."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"no world model in {folder}: config.json is missing; train one with `rawdream world-model train`."
        )
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a world model of this package: expected format {FORMAT!r}, found {config.get('format')!r}."
        )
    if not isinstance(config.get("rollout"), dict):
        raise CheckpointError(f"{path} has no rollout settings; restore it from a copy.")
    settings = dataclass_from_json(RolloutConfig, config["rollout"], str(path))
    try:
        settings.check()
    except InvalidOptionError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    transformer = WanWorldModelTransformer.from_pretrained(folder / "transformer")
    codec = read_codec(folder, transformer.arch.latent_shape[1], tiny=tiny_decoder)
    return WanWorldModel(
        transformer,
        codec,
        replace(settings, **overrides),
        robot=str(config.get("robot", "")),
        context_cache=context_cache,
        micro_batch_size=micro_batch_size,
    )


__all__ = ["read_world_model", "save_world_model"]
