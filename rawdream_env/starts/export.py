"""``rawdream starts export``: starts rendered by a robot's simulator, in a file, for machines without the simulator."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rawdream_env.config import parse_positive_int
from rawdream_env.errors import InvalidOptionError
from rawdream_env.robots import DEFAULT_ROBOT, find_robot
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.base import find_task
from rawdream_env.starts.pack import save_start_pack
from rawdream_env.types import SupportsClose

_PACKAGES = ("rawdream-env", "mujoco", "hf-libero")


@dataclass(frozen=True)
class ExportStartsConfig:
    """Options of ``rawdream starts export``."""

    out: Path = Path("starts.safetensors")
    """File to write; it is read with starts=FILE."""
    robot: str = DEFAULT_ROBOT
    """Robot whose simulator renders the starts, such as libero_goal."""
    tasks: tuple[str, ...] = ()
    """Tasks, by name; default: all."""
    per_task: int = 25
    """Starts per task."""
    image_size: int = 256
    """Side of the frames in pixels: that of the world model."""
    layout: str = "narrow"
    """Start positions of objects: "narrow" or "wide"; no effect on LIBERO, whose initial states are given."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further options of the start source as KEY VALUE pairs; for LIBERO "protocol" and "init_states"."""
    seed: int = 0
    """Seed of the starts."""


def export_starts(config: ExportStartsConfig) -> Path:
    """Write the pack and return its path. LIBERO's initial states are taken in order, other scenes are drawn by the seed.

    Raises:
        InvalidOptionError: an option is wrong, or the robot has no simulator. RendererError: no OpenGL.
        MissingDependencyError, MissingAssetsError: the simulator is not installed, or not whole.
    """
    if config.out.suffix != ".safetensors":
        raise InvalidOptionError(f"out={str(config.out)!r} must end with .safetensors.")
    count = parse_positive_int("per_task", config.per_task)
    size = parse_positive_int("image_size", config.image_size)
    try:
        source: Any = find_robot(config.robot).load("sim_starts")(size, config.layout, **config.options)
    except TypeError as error:
        raise InvalidOptionError(f"the options do not fit the starts of {config.robot!r}: {error}.") from error
    names, instructions = zip(*source.tasks, strict=True)
    chosen = [find_task(name, names, instructions) for name in config.tasks] or range(len(names))

    def start(task: int, index: int) -> Any:
        if hasattr(source, "trial"):
            return source.trial(config.seed, task, index)
        return source.sample(NoiseKey(config.seed, episode=task * count + index), task)

    try:
        starts = [start(task, index) for task in chosen for index in range(count)]
    finally:
        if isinstance(source, SupportsClose):
            source.close()
    provenance = {
        "robot": config.robot,
        "seed": config.seed,
        "protocol": getattr(source, "described", None),
        "versions": _versions(),
    }
    config.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    save_start_pack(config.out, starts, source.tasks, layout=config.layout, provenance=provenance)
    return config.out


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
