"""Where hf-libero, its assets and its initial states are, and how it is imported.

As it comes, hf-libero asks on the terminal for a folder, downloads its assets without asking and writes a log file to ``/tmp``.
Here it does none of that: all that is written goes to :func:`home`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from ast import literal_eval
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rawdream_env.config import parse_choice
from rawdream_env.errors import MissingAssetsError, MissingDependencyError
from rawdream_env.files import atomic_write_text
from rawdream_env.libero import SUITES

ASSETS = "RAWDREAM_LIBERO_ASSETS"
"""Environment variable: the folder of LIBERO's meshes and textures."""
HOME = "RAWDREAM_LIBERO_HOME"
"""Environment variable: the folder that this package writes to for LIBERO."""
_PARTS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)


@dataclass(frozen=True)
class Task:
    """A task of a suite: its files' name, its instruction, its goal and scene (``bddl``), its initial states (a pickle)."""

    name: str
    instruction: str
    bddl: Path
    init_states: Path


def home() -> Path:
    """The folder that is written to: ``$RAWDREAM_LIBERO_HOME``, else ``rawdream/libero`` in the user's cache folder."""
    if given := os.environ.get(HOME):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rawdream" / "libero"


def find_package() -> Path:
    """The folder of hf-libero, which is not imported.

    Raises:
        MissingDependencyError: it is not installed.
    """
    spec = importlib.util.find_spec("libero")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (package := Path(folder) / "libero").joinpath("bddl_files").is_dir():
            return package
    raise MissingDependencyError(
        "the LIBERO simulator is not installed: pip install 'rawdream-env[libero]'; docs/libero.md has a smaller install "
        "without torchvision. A dream with a start pack (starts='goal.safetensors') does not need it."
    )


def find_assets(package: Path) -> Path:
    """The folder of meshes and textures: ``$RAWDREAM_LIBERO_ASSETS``, that of the package, or that of hf-libero's download.

    Raises:
        MissingAssetsError: there is none; nothing is downloaded.
    """
    given = os.environ.get(ASSETS)
    places = [Path(given)] if given else [package / "assets", Path.home() / ".cache" / "libero" / "assets"]
    for place in places:
        if all((place / part).is_dir() for part in _PARTS):
            return place.resolve()
    looked = " and ".join(map(str, places))
    raise MissingAssetsError(
        f"LIBERO's meshes and textures are not in {looked}. Download them (206 MB): hf download lerobot/libero-assets "
        f"--repo-type dataset --local-dir DIR, then set {ASSETS}=DIR."
    )


@lru_cache
def tasks_of(suite: str) -> tuple[Task, ...]:
    """The tasks of a suite in LIBERO's own order.

    Raises:
        InvalidOptionError: no such suite. MissingDependencyError: hf-libero is not installed.
    """
    parse_choice("suite", suite, tuple(SUITES))
    package = find_package()
    text = (package / "benchmark" / "libero_suite_task_map.py").read_text(encoding="utf-8")
    names = literal_eval(text.partition("=")[2].strip())[suite]
    return tuple(
        Task(
            name,
            instruction_of(name),
            package / "bddl_files" / suite / f"{name}.bddl",
            package / "init_files" / suite / f"{name}.pruned_init",
        )
        for name in names
    )


def instruction_of(name: str) -> str:
    """The instruction of a task, which is its name without the scene: ``KITCHEN_SCENE1_open_the_drawer``."""
    words = name.split("_")
    scene = next((i for i, word in enumerate(words) if word.startswith("SCENE")), -1)
    return " ".join(words[scene + 1 :])


@lru_cache
def import_simulator() -> Any:
    """The module ``libero.libero.envs``.

    Raises:
        MissingDependencyError: hf-libero or a package it needs is not installed. MissingAssetsError: no assets.
    """
    package = find_package()
    assets = find_assets(package)
    folder = home()
    folder.mkdir(parents=True, exist_ok=True)
    places = {
        "benchmark_root": package,
        "bddl_files": package / "bddl_files",
        "init_states": package / "init_files",
        "datasets": folder / "datasets",
        "assets": assets,
    }
    atomic_write_text(folder / "config.yaml", "".join(f"{key}: {place}\n" for key, place in places.items()))
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # read once, when mujoco is imported
    settings = {
        "LIBERO_CONFIG_PATH": folder,
        "NUMBA_CACHE_DIR": folder / "numba",
        "MPLCONFIGDIR": folder / "matplotlib",
    }
    try:
        with _environment({key: str(value) for key, value in settings.items()}), _quiet_robosuite():
            import libero.libero
            import libero.libero.envs
    except ImportError as error:
        raise MissingDependencyError(
            f"the LIBERO simulator cannot be imported ({error}); docs/libero.md lists what it needs."
        ) from error
    libero.libero._assets_path_cache = str(assets)  # otherwise it may download them
    return libero.libero.envs


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _quiet_robosuite() -> Iterator[None]:
    """Import robosuite without its log file in ``/tmp`` and without its advice about a private settings file."""
    handler = logging.FileHandler
    if "robosuite" not in sys.modules:
        robosuite = importlib.util.find_spec("robosuite")
        folders = (robosuite and robosuite.submodule_search_locations) or ()
        if not any((Path(folder) / "macros_private.py").exists() for folder in folders):
            sys.modules["robosuite.macros_private"] = ModuleType("robosuite.macros_private")
    logging.FileHandler = lambda *_, **__: logging.NullHandler()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        logging.FileHandler = handler  # type: ignore[misc]
