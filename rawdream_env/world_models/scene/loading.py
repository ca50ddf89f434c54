"""Save and load the parts of a scene world model: ``reader/`` and ``painter/``, each model.safetensors and config.json.

Weights may be stored in fp16; they are loaded in fp32.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import atomic_write_json, load_module, read_json, save_safetensors, sealed_folder
from rawdream_env.world_models.pretrained import dataclass_from_json
from rawdream_env.world_models.scene.painter import PainterConfig, ScenePainter
from rawdream_env.world_models.scene.reader import ReaderConfig, SceneReader

Config = TypeVar("Config", ReaderConfig, PainterConfig)


def save_part(part: SceneReader | ScenePainter, folder: Path, *, half: bool = True) -> None:
    """Write a reader or painter into its subfolder of a world model's ``folder``; ``half`` stores fp16."""
    target = folder / ("reader" if isinstance(part, SceneReader) else "painter")
    tensors = {name: tensor.half() if half else tensor for name, tensor in part.state_dict().items()}
    with sealed_folder(target):
        save_safetensors(target / "model.safetensors", tensors, {})
        atomic_write_json(target / "config.json", asdict(part.config))


def read_reader(folder: Path) -> SceneReader:
    """The reader in a world model's ``folder``.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    config = _read_config(ReaderConfig, folder / "reader" / "config.json")
    return load_module(lambda: SceneReader(config), folder / "reader" / "model.safetensors").eval()


def read_painter(folder: Path) -> ScenePainter:
    """The painter in a world model's ``folder``.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    config = _read_config(PainterConfig, folder / "painter" / "config.json")
    return load_module(lambda: ScenePainter(config), folder / "painter" / "model.safetensors").eval()


def _read_config(kind: type[Config], path: Path) -> Config:
    config = dataclass_from_json(kind, read_json(path), str(path))
    try:
        config.check()
    except InvalidOptionError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return config
