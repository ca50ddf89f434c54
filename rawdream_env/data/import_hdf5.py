"""Convert LIBERO and robomimic demonstration files into a LeRobotDataset v3.0 folder.

    rawdream data import-hdf5 --src datasets/libero_90 --out data/libero_90
    rawdream data import-hdf5 --src datasets/libero_goal --out data/one_shot --per-task 1

All files are checked before anything is written, so that a missing camera or an incomplete file is reported at once.
Sharding and resuming are in ``recording``, the reading of the files in ``hdf5``.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rawdream_env.data import schema
from rawdream_env.data.hdf5 import Demo, Flip, Timing, list_demos, read_demo
from rawdream_env.data.lerobot import EpisodeData
from rawdream_env.data.recording import claim_folder, record
from rawdream_env.errors import DatasetError
from rawdream_env.files import sha256_file
from rawdream_env.seeding import mix

_CONFIG_PATH = "meta/import.json"
_VERSION = 2
"""Of the rules by which timing="auto" pairs pictures and actions; imports before version 2 could mix both conventions."""
_ENDINGS = (".hdf5", ".h5")


@dataclass(frozen=True)
class ImportConfig:
    """What to import, and into which folder."""

    src: str
    """An HDF5 file, or a folder that is searched for them."""
    out: str
    """Folder of the data set. Rerun the same command to resume an interrupted import."""
    camera: str = "agentview"
    """Which camera: agentview or eye_in_hand (LIBERO), agentview or robot0_eye_in_hand (robomimic), or a full name."""
    flip: Flip = "auto"
    """How pictures are turned. auto: rotate180 if they are stored upside down, as published LIBERO policies see them."""
    timing: Timing = "auto"
    """Whether a row's picture was taken before or after its action. auto: measured from the joints, once per file."""
    image_size: int = 256
    """Height and width of the frames in pixels (even)."""
    task: str = ""
    """The instruction of demonstrations that hold none."""
    skip: tuple[str, ...] = ()
    """Demonstrations to leave out, by the names in error messages: file.hdf5:demo_3."""
    per_task: int | None = None
    """Import this many demonstrations of every task, drawn with ``seed``; None: all."""
    seed: int = 0
    """Seed of ``per_task``. What is drawn for a task does not depend on the other tasks."""
    workers: int = 0
    """Worker processes; 0 imports in this process. The result does not depend on their number."""
    episodes_per_shard: int = 8
    """Episodes per file. If the process dies, at most one unfinished file per worker is lost."""
    progress: bool = True
    """Show a progress bar."""


def import_hdf5(config: ImportConfig) -> Path:
    """Import the demonstrations and return the folder of the data set.

    Raises:
        DatasetError: a file cannot be read or lacks something, or the folder holds another import, one of these files
            before they were changed, or one by an earlier version that measured the timing otherwise.
        MissingDependencyError: h5py is not installed.
    """
    if config.image_size < 2 or config.image_size % 2 or config.episodes_per_shard < 1 or config.workers < 0:
        raise DatasetError(
            f"image_size {config.image_size} has to be even, episodes_per_shard {config.episodes_per_shard} at least 1 "
            f"and workers {config.workers} at least 0."
        )
    if config.per_task is not None and config.per_task < 1:
        raise DatasetError(f"per_task is {config.per_task}, expected at least 1, or None for all demonstrations.")
    source = DemoSource(config, plan(config))
    names = ("camera", "flip", "timing", "image_size", "task", "episodes_per_shard")
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    settings |= {
        "demonstrations": [demo.label for demo in source.demos],
        "steps": [demo.steps for demo in source.demos],
        "files": _fingerprints(source.demos, config.progress),
        "version": _VERSION,
    }
    _check_version(config)
    claim_folder(config.out, _CONFIG_PATH, settings, "imported", added=("files", "version"))
    return record(
        source,
        config.out,
        episodes=len(source.demos),
        episodes_per_shard=config.episodes_per_shard,
        workers=config.workers,
        desc="import",
        progress=config.progress,
        worker_died=lambda text: DatasetError(f"an import {text}"),
    )


def _check_version(config: ImportConfig) -> None:
    path = Path(config.out) / _CONFIG_PATH
    if config.timing == "auto" and path.exists() and (found := schema.read_json(path).get("version")) != _VERSION:
        raise DatasetError(
            f"{config.out} was imported by another version (rules {found or 1}, now {_VERSION}), whose timing='auto' could "
            "pair pictures with the wrong actions. Import again into another folder, and train on that one."
        )


def _fingerprints(demos: list[Demo], progress: bool) -> list[str]:
    """Label and SHA-256 of every source file: an import of changed files is another data set."""
    labels = {demo.path: demo.label.rpartition(":")[0] for demo in demos}
    bar = tqdm(labels.items(), desc="fingerprint", unit="file", disable=not progress)
    return [f"{label} sha256:{sha256_file(path)}" for path, label in bar]


def plan(config: ImportConfig) -> list[Demo]:
    """The demonstrations in the order of file name and number; one episode each.

    Raises:
        DatasetError: no file, a file that cannot be used, files that do not fit together, or too few for ``per_task``.
    """
    src = Path(config.src)
    found = [path for path in sorted(src.rglob("*")) if path.suffix in _ENDINGS] if src.is_dir() else [src]
    if not found or not src.exists():
        raise DatasetError(f"{src}: no {' or '.join(_ENDINGS)} file found. Check the path.")
    demos: list[Demo] = []
    for path in tqdm(found, desc="check", unit="file", delay=0.5, disable=not config.progress):
        label = path.relative_to(src).as_posix() if src.is_dir() else path.name
        demos += list_demos(
            path, camera=config.camera, task=config.task, label=label, skip=config.skip, timing=config.timing
        )
    if not demos:
        raise DatasetError(f"{src}: skip excludes all demonstrations of its {len(found)} files.")
    first = demos[0]
    for demo in demos:
        for name in ("fps", "action_dim", "state_dim"):
            if getattr(demo, name) != getattr(first, name):
                raise DatasetError(
                    f"{demo.label} has {name} {getattr(demo, name)}, {first.label} {getattr(first, name)}: they do not "
                    "fit into one data set. Import them into two folders."
                )
    return demos if config.per_task is None else choose(demos, config.per_task, config.seed)


def choose(demos: list[Demo], per_task: int, seed: int) -> list[Demo]:
    """``per_task`` demonstrations of every task, in the order of ``demos``.

    Raises:
        DatasetError: a task has fewer.
    """
    kept: list[int] = []
    for task in dict.fromkeys(demo.task for demo in demos):
        places = [i for i, demo in enumerate(demos) if demo.task == task]
        if len(places) < per_task:
            raise DatasetError(f"per_task is {per_task}, but {task!r} has {len(places)} demonstrations. Lower it.")
        rng = np.random.default_rng(mix(seed, zlib.crc32(task.encode())))
        kept += rng.permutation(places)[:per_task].tolist()
    return [demos[i] for i in sorted(kept)]


class DemoSource:
    """Demonstrations as the episodes of a data set, in their order."""

    robot_type = None

    def __init__(self, config: ImportConfig, demos: list[Demo]) -> None:
        self.config, self.demos = config, demos
        self.fps = demos[0].fps
        self.image_shape = (config.image_size, config.image_size, 3)
        self.instructions = list(dict.fromkeys(demo.task for demo in demos))
        self.features: schema.Features = {
            schema.STATE_KEY: schema.numeric_feature(demos[0].state_dim),
            schema.ACTION_KEY: schema.numeric_feature(demos[0].action_dim),
        }

    def steps(self, index: int) -> int:
        """Actions of a demonstration's episode."""
        return self.demos[index].steps

    def __call__(self, index: int) -> EpisodeData:
        """Read a demonstration."""
        config = self.config
        return read_demo(self.demos[index], image_size=config.image_size, flip=config.flip, timing=config.timing)

    def close(self) -> None:
        """Nothing is held open between episodes."""
