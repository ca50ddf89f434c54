"""Loading and saving world models: a folder of safetensors and config.json, checked on the way in.

Folder: ``config.json``, ``transformer.safetensors``, ``autoencoder.safetensors``. Weights may be stored in fp16; they
are loaded as fp32 and cast by ``dtype``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from rawdream_env.errors import CheckpointError
from rawdream_env.files import atomic_write_json, load_weights, save_safetensors
from rawdream_env.types import WorldModel
from rawdream_env.world_models.arm_map import ArmMapConfig
from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder
from rawdream_env.world_models.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan import WanConfig, WanWorldModelTransformer

FORMAT = "rawdream-world-model-1"
T = TypeVar("T")


def dataclass_from_json(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build a frozen dataclass from JSON (lists become tuples); unknown keys are a ``CheckpointError``."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise CheckpointError(
            f"{where} has unknown settings {unknown}: it was written by another version of the package"
        )
    hints = get_type_hints(cls)
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, dict):
            nested = [t for t in (hints[name], *getattr(hints[name], "__args__", ())) if is_dataclass(t)]
            value = dataclass_from_json(nested[0], value, where)  # type: ignore[arg-type]
        out[name] = value
    return cls(**out)


def save_world_model(model: WanWorldModel, folder: str | Path, *, half: bool = False) -> None:
    """Write ``model`` to ``folder`` (created); ``half`` stores fp16."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in (("transformer", model.transformer), ("autoencoder", model.autoencoder)):
        tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
        save_safetensors(folder / f"{name}.safetensors", {k: v.half() if half else v for k, v in tensors.items()}, {})
    config = {
        "format": FORMAT,
        "transformer": asdict(model.transformer.config),
        "autoencoder": asdict(model.autoencoder.config),
        "rollout": asdict(model.config),
    }
    atomic_write_json(folder / "config.json", config)


def read_world_model(folder: str | Path, **rollout: Any) -> WanWorldModel:
    """Load a world model folder; ``rollout`` overrides fields of its ``RolloutConfig`` (``num_inference_steps=1``)."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"no world model in {folder}: config.json is missing; train one with `rawdream train-world-model`"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a world model of this package (expected format {FORMAT!r})")
    transformer = WanWorldModelTransformer(dataclass_from_json(WanConfig, config["transformer"], str(path)))
    autoencoder = PackedFrameAutoencoder(dataclass_from_json(AutoencoderConfig, config["autoencoder"], str(path)))
    load_weights(transformer, folder / "transformer.safetensors")
    load_weights(autoencoder, folder / "autoencoder.safetensors")
    settings = dataclass_from_json(RolloutConfig, config["rollout"], str(path))
    return WanWorldModel(transformer, autoencoder, replace(settings, **rollout))


def load_world_model(
    spec: str | Path | WorldModel,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    num_inference_steps: int | None = None,
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
    model = read_world_model(folder, **overrides)
    return model.to(device, getattr(torch, dtype))


__all__ = ["ArmMapConfig", "load_world_model", "read_world_model", "save_world_model"]
