"""Loading and saving world models: a folder of safetensors and JSON, checked on the way in.

    config.json     format, kind of frame codec, rollout settings
    transformer/    WanWorldModelTransformer in diffusers' layout
    autoencoder/    PackedFrameAutoencoder (embedded size), or
    vae/            AutoencoderKLWan in diffusers' layout (full size)

Weights may be stored in fp16; they are loaded as fp32 and cast by ``dtype``.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from rawdream_env.errors import CheckpointError
from rawdream_env.files import atomic_write_json, load_weights, save_safetensors
from rawdream_env.types import WorldModel
from rawdream_env.world_models.arm_map import ArmMapConfig
from rawdream_env.world_models.autoencoders import AutoencoderConfig, FrameCodec, PackedFrameAutoencoder
from rawdream_env.world_models.chunk import Reuse
from rawdream_env.world_models.pretrained import dataclass_from_json, read_json
from rawdream_env.world_models.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan import WanWorldModelTransformer

FORMAT = "rawdream-world-model-2"


def save_codec(codec: FrameCodec, folder: Path, *, half: bool = False) -> None:
    """Write a frame codec into its place in a world model's ``folder``."""
    assert isinstance(codec, PackedFrameAutoencoder)
    target = folder / "autoencoder"
    target.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in codec.state_dict().items()}
    save_safetensors(target / "model.safetensors", {k: v.half() if half else v for k, v in tensors.items()}, {})
    atomic_write_json(target / "config.json", asdict(codec.config))


def read_codec(folder: Path) -> FrameCodec:
    """The frame codec in a world model's ``folder``."""
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
    atomic_write_json(folder / "config.json", {"format": FORMAT, "rollout": asdict(model.config)})


def read_world_model(folder: str | Path, *, reuse: Reuse = "step", **rollout: Any) -> WanWorldModel:
    """Load a world model folder; ``rollout`` overrides fields of its ``RolloutConfig`` (``num_inference_steps=1``)."""
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
    return WanWorldModel(transformer, read_codec(folder), replace(settings, **rollout), reuse=reuse)


def load_world_model(
    spec: str | Path | WorldModel,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    num_inference_steps: int | None = None,
    reuse: Reuse = "step",
) -> WorldModel:
    """The world model called ``spec``: "embedded" (shipped with the package), "null", a folder, or an object as it
    is.
    """
    if not isinstance(spec, str | Path):
        return spec
    if spec == "null":
        from rawdream_env.world_models.null import NullWorldModel

        return NullWorldModel()
    folder = Path(str(resources.files("rawdream_env.assets") / "world_model")) if spec == "embedded" else Path(spec)
    overrides = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    model = read_world_model(folder, reuse=reuse, **overrides)
    return model.to(device, getattr(torch, dtype))


__all__ = ["ArmMapConfig", "load_world_model", "read_world_model", "save_world_model"]
