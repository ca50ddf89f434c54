"""Load and save scene world models: a folder of safetensors and JSON, validated when it is read.

    config.json     format, rollout settings and the robot's name
    reader/  dynamics/  painter/    config.json, model.safetensors and its checksum

Weights may be stored in fp16; the dynamics are always stored in fp32, because motions add up.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import atomic_write_json, load_module, read_json, save_safetensors, sealed_folder
from rawdream_env.robots import Scene, find_robot
from rawdream_env.world_models.pretrained import dataclass_from_json
from rawdream_env.world_models.scene.dynamics import DynamicsConfig, SceneDynamics, Symmetry
from rawdream_env.world_models.scene.painter import PainterConfig, ScenePainter
from rawdream_env.world_models.scene.reader import ReaderConfig, SceneReader
from rawdream_env.world_models.scene.rollout import SceneRolloutConfig, SceneWorldModel

SCENE_FORMAT = "rawdream-scene-world-model-1"
_PARTS = {"reader": SceneReader, "dynamics": SceneDynamics, "painter": ScenePainter}
Config = TypeVar("Config", ReaderConfig, DynamicsConfig, PainterConfig)


def new_dynamics(config: DynamicsConfig, robot: str = "") -> SceneDynamics:
    """An untrained network for a robot's scene; the number of objects is the robot's.

    Raises:
        InvalidOptionError: the robot has no scene, or the sizes are impossible.
    """
    scene: Scene = find_robot(robot).load("scene")
    rotations = [torch.from_numpy(np.asarray(turns, np.float32)) for turns in scene.rotations]
    most = max(map(len, rotations))
    padded = torch.stack([torch.cat([turns, turns[:1].expand(most - len(turns), 3, 3)]) for turns in rotations])
    symmetry = Symmetry(padded, torch.tensor([turns == 0 for turns in scene.symmetry]))
    fixed = torch.tensor([name in scene.fixed for name in scene.objects])
    return SceneDynamics(replace(config, num_objects=len(scene.objects)), scene.shapes, symmetry, fixed)


def save_part(part: SceneReader | SceneDynamics | ScenePainter, folder: Path, *, half: bool = True) -> None:
    """Write a part into its subfolder of a world model's ``folder``; ``half`` stores fp16 (never the dynamics)."""
    half = half and not isinstance(part, SceneDynamics)
    target = folder / next(name for name, kind in _PARTS.items() if isinstance(part, kind))
    tensors = {name: tensor.half() if half else tensor for name, tensor in part.state_dict().items()}
    with sealed_folder(target):
        save_safetensors(target / "model.safetensors", tensors, {})
        atomic_write_json(target / "config.json", asdict(part.config))


def read_reader(folder: Path) -> SceneReader:
    """The reader in a world model's ``folder``.

    Raises:
        CheckpointError: it is missing or damaged. InvalidOptionError: its robot is not registered or has no scene. So for the
            other parts.
    """
    config = _read_config(ReaderConfig, folder / "reader" / "config.json")
    find_robot(config.robot).load("scene")  # before it reads as a damaged file
    return load_module(lambda: SceneReader(config), folder / "reader" / "model.safetensors").eval()


def read_painter(folder: Path) -> ScenePainter:
    """The painter in a world model's ``folder``."""
    config = _read_config(PainterConfig, folder / "painter" / "config.json")
    return load_module(lambda: ScenePainter(config), folder / "painter" / "model.safetensors").eval()


def read_dynamics(folder: Path, robot: str = "") -> SceneDynamics:
    """The dynamics in a world model's ``folder``, for the scene of ``robot``."""
    config = _read_config(DynamicsConfig, folder / "dynamics" / "config.json")
    find_robot(robot).load("scene")
    return load_module(lambda: new_dynamics(config, robot), folder / "dynamics" / "model.safetensors").eval()


def save_scene_world_model(model: SceneWorldModel, folder: str | Path, *, half: bool = False) -> None:
    """Write ``model`` to ``folder`` (created); ``half`` stores fp16. ``config.json`` is written last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in (model.reader, model.dynamics, model.painter):
        save_part(part, folder, half=half)
    content = {"format": SCENE_FORMAT, "rollout": asdict(model.config), "robot": model.robot}
    atomic_write_json(folder / "config.json", content)


def is_scene_world_model(folder: Path) -> bool:
    """Whether ``folder`` says that it holds a scene world model."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("format") == SCENE_FORMAT


def read_scene_world_model(folder: str | Path, *, micro_batch_size: int = 0, **overrides: Any) -> SceneWorldModel:
    """Load a folder; ``overrides`` are fields of its ``SceneRolloutConfig``.

    Raises:
        CheckpointError: a file is missing, damaged or of another format.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = read_json(path)
    if config.get("format") != SCENE_FORMAT or not isinstance(config.get("rollout"), dict):
        raise CheckpointError(
            f"{path} is not a scene world model: expected format {SCENE_FORMAT!r} with rollout settings, found "
            f"{config.get('format')!r}."
        )
    robot = str(config.get("robot", ""))
    settings = dataclass_from_json(SceneRolloutConfig, config["rollout"], str(path))
    try:
        settings = replace(settings, **overrides)
        settings.check()
    except InvalidOptionError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return SceneWorldModel(
        read_reader(folder),
        read_dynamics(folder, robot),
        read_painter(folder),
        settings,
        robot=robot,
        micro_batch_size=micro_batch_size,
    )


def _read_config(kind: type[Config], path: Path) -> Config:
    config = dataclass_from_json(kind, read_json(path), str(path))
    try:
        config.check()
    except InvalidOptionError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return config
