"""Loading and saving world models: a folder of safetensors and JSON, checked on the way in.

    config.json     format, rollout settings and the robot's name (none: the default robot)
    transformer/    WanWorldModelTransformer in diffusers' layout
    autoencoder/    PackedFrameAutoencoder (embedded size), or
    vae/            AutoencoderKLWan in diffusers' layout (full size)
    taew2_1.*       the tiny decoder, when it is there: .safetensors or .pth

Weights may be stored in fp16; they are loaded as fp32 and cast by ``dtype``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import atomic_write_json, load_weights, read_json, save_safetensors
from rawdream_env.types import WorldModel
from rawdream_env.world_models.autoencoders import AutoencoderConfig, FrameCodec, PackedFrameAutoencoder
from rawdream_env.world_models.pretrained import dataclass_from_json
from rawdream_env.world_models.wan.chunk import ContextCache
from rawdream_env.world_models.wan.fp8 import use_fp8
from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.tiny_decoder import TinyDecoder, TinyDecoderCodec
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer
from rawdream_env.world_models.wan.vae import SPATIAL_STRIDE, WanVAE

FORMAT = "rawdream-world-model-2"
APPROXIMATIONS = ("rolling_cache", "tiny_decoder", "fp8")


def save_codec(codec: FrameCodec, folder: Path, *, half: bool = False) -> None:
    """Write a frame codec into its place in a world model's ``folder``."""
    if isinstance(codec, TinyDecoderCodec):
        codec = codec.base
    if isinstance(codec, WanVAE):
        codec.save_pretrained(folder / "vae")
        return
    assert isinstance(codec, PackedFrameAutoencoder)
    target = folder / "autoencoder"
    target.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in codec.state_dict().items()}
    save_safetensors(target / "model.safetensors", {k: v.half() if half else v for k, v in tensors.items()}, {})
    atomic_write_json(target / "config.json", asdict(codec.config))


def read_codec(folder: Path, latent_size: int, *, tiny: bool = False) -> FrameCodec:
    """The frame codec in a world model's ``folder``, for latents of ``latent_size`` rows and columns.

    ``tiny`` decodes with the tiny decoder that lies beside the VAE; ``CheckpointError`` says where to get it.
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
    codec = PackedFrameAutoencoder(dataclass_from_json(AutoencoderConfig, values, str(path / "config.json")))
    load_weights(codec, path / "model.safetensors")
    return codec


def save_world_model(model: WanWorldModel, folder: str | Path, *, half: bool = False) -> None:
    """Write ``model`` to ``folder`` (created); ``half`` stores fp16. ``config.json`` comes last."""
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
            f"no world model in {folder}: config.json is missing; train one with `rawdream train-world-model`"
        )
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a world model of this package: expected format {FORMAT!r}, found {config.get('format')!r}."
        )
    settings = dataclass_from_json(RolloutConfig, config["rollout"], str(path))
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


def load_world_model(
    spec: str | Path | WorldModel,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    num_inference_steps: int | None = None,
    approximations: Sequence[str] = (),
    micro_batch_size: int = 0,
) -> WorldModel:
    """The world model called ``spec``: "embedded" (shipped with the package), "null", a folder, or an object as it
    is.

    ``approximations`` are opt-in and cost accuracy (their price: docs/world_model.md): "rolling_cache" keeps the context's
    keys and values across chunks, "tiny_decoder" decodes Wan's latents with TAEHV's, "fp8" rounds the blocks' matrix
    products. Fewer evaluations is ``num_inference_steps``. ``micro_batch_size``: rows computed at once, to bound memory;
    0: as many as fit.
    """
    if unknown := sorted(set(approximations) - set(APPROXIMATIONS)):
        raise InvalidOptionError(f"there is no approximation {unknown}; choose among {', '.join(APPROXIMATIONS)}.")
    if not isinstance(spec, str | Path):
        return spec
    if spec == "null":
        from rawdream_env.world_models.null import NullWorldModel

        return NullWorldModel()
    folder = Path(str(resources.files("rawdream_env.assets") / "world_model")) if spec == "embedded" else Path(spec)
    overrides = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    context_cache: ContextCache = "rolling" if "rolling_cache" in approximations else "step"
    tiny = "tiny_decoder" in approximations
    model = read_world_model(
        folder, context_cache=context_cache, tiny_decoder=tiny, micro_batch_size=micro_batch_size, **overrides
    )
    model.to(device, getattr(torch, dtype))
    if "fp8" in approximations:
        use_fp8(model.transformer)
    return model


__all__ = ["load_world_model", "read_world_model", "save_world_model"]
