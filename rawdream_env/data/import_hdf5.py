"""Turn LIBERO and robomimic demonstration files into a LeRobotDataset v3.0 folder.

    rawdream import-hdf5 --src datasets/libero_90 --root data/libero_90

The files are looked through before anything is written, so that a missing camera or an incomplete file is known at once.
Episodes are written in whole shards: what is on the disk after a crash or Ctrl-C is complete, and the same command goes on
with the shards that are missing and ends with the same bytes. What is read how is told in ``hdf5.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rawdream_env.data import schema
from rawdream_env.data.hdf5 import Demo, Flip, Timing, list_demos, read_demo
from rawdream_env.data.lerobot import ShardWriter
from rawdream_env.data.parallel import run_pieces
from rawdream_env.errors import DatasetError
from rawdream_env.files import atomic_write_json

_CONFIG_PATH = "meta/import.json"
_ENDINGS = (".hdf5", ".h5")


@dataclass(frozen=True)
class ImportConfig:
    """What to import, and where to."""

    src: str
    """An HDF5 file, or a folder that is searched for them."""
    root: str
    """Folder of the data set. An interrupted import into it is continued."""
    camera: str = "agentview"
    """Which camera: agentview or eye_in_hand (LIBERO), agentview or robot0_eye_in_hand (robomimic), or a full name."""
    flip: Flip = "auto"
    """How pictures are turned. auto: rotate180 where they are stored upside down, as published LIBERO policies see them."""
    timing: Timing = "auto"
    """Whether a row's picture was taken before or after its action. auto: measured on the arm's joints."""
    image_size: int = 256
    """Height and width of the frames in pixels (even)."""
    task: str = ""
    """The instruction of files that hold none."""
    skip: tuple[str, ...] = ()
    """Demonstrations to leave out, as error messages name them: file.hdf5:demo_3."""
    workers: int = 0
    """Worker processes; 0 imports in this process. The result does not depend on it."""
    episodes_per_shard: int = 8
    """Episodes in one file, the unit of work and of loss when a process dies."""
    progress: bool = True
    """Show a progress bar."""


def import_hdf5(config: ImportConfig) -> Path:
    """Import all demonstrations and return the folder of the data set.

    Raises:
        DatasetError: a file cannot be read or lacks something, or the folder holds another import.
        MissingDependencyError: h5py is not installed.
    """
    if config.image_size < 2 or config.image_size % 2 or config.episodes_per_shard < 1 or config.workers < 0:
        raise DatasetError(
            f"image_size {config.image_size} has to be even, episodes_per_shard {config.episodes_per_shard} at least 1 "
            f"and workers {config.workers} at least 0."
        )
    demos = plan(config)
    _claim_folder(config, demos)
    job = _ShardJob(config, demos)
    present = job.writer.shard_episodes()
    shards = range(-(-len(demos) // config.episodes_per_shard))
    todo = [shard for shard in shards if present.get(shard, 0) < len(job.indices(shard))]
    kept = len(demos) - sum(len(job.indices(shard)) for shard in todo)
    with tqdm(total=len(demos), initial=kept, desc="import", unit="ep", disable=not config.progress) as bar:
        try:
            for _ in run_pieces(todo, _Factory(config, demos), workers=config.workers, count=bar.update):
                pass
        except BrokenProcessPool as error:
            raise DatasetError(
                f"an import worker died (out of memory?). Finished episodes are kept in {config.root}; run the same "
                "command again to continue, with fewer workers if it happens again."
            ) from error
        finally:
            job.writer.finalize(job.tasks)
    return Path(config.root)


def plan(config: ImportConfig) -> list[Demo]:
    """All demonstrations in the order of file name and number; one episode each.

    Raises:
        DatasetError: no file, a file that cannot be used, or files that do not fit together.
    """
    src = Path(config.src)
    found = [path for path in sorted(src.rglob("*")) if path.suffix in _ENDINGS] if src.is_dir() else [src]
    if not found or not src.exists():
        raise DatasetError(f"{src}: no {' or '.join(_ENDINGS)} file there. Check the path.")
    demos: list[Demo] = []
    for path in tqdm(found, desc="look through", unit="file", disable=not config.progress):
        label = path.relative_to(src).as_posix() if src.is_dir() else path.name
        demos += list_demos(path, camera=config.camera, task=config.task, label=label, skip=config.skip)
    if not demos:
        raise DatasetError(f"{src}: skip leaves none of the demonstrations of its {len(found)} files.")
    first = demos[0]
    for demo in demos:
        for name in ("fps", "action_dim", "state_dim"):
            if getattr(demo, name) != getattr(first, name):
                raise DatasetError(
                    f"{demo.label} has {name} {getattr(demo, name)}, {first.label} {getattr(first, name)}: they do not "
                    "fit into one data set. Import them into two folders."
                )
    return demos


def _claim_folder(config: ImportConfig, demos: list[Demo]) -> None:
    """Refuse to mix imports in one folder; remember this one."""
    wanted: dict[str, Any] = {
        name: getattr(config, name) for name in ("camera", "flip", "timing", "image_size", "task", "episodes_per_shard")
    }
    wanted |= {"demonstrations": [demo.label for demo in demos], "steps": [demo.steps for demo in demos]}
    path = Path(config.root) / _CONFIG_PATH
    if not path.exists():
        if (Path(config.root) / schema.INFO_PATH).exists():
            raise DatasetError(f"{config.root} holds a data set that was not imported here. Give another folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, wanted)
        return
    stored = schema.read_json(path)
    for name, value in wanted.items():
        old = stored.get(name)
        if isinstance(value, list) and old != value:
            raise DatasetError(
                f"{config.root} was imported from {len(old or ())} demonstrations, now there are {len(value)} and their "
                f"{name} differ. Import into another folder, or give the old files and skips to continue."
            )
        if old != value:
            raise DatasetError(
                f"{config.root} was imported with {name}={old!r}, now it is {value!r}. Import into another folder, or "
                "repeat the old setting to continue."
            )


class _ShardJob:
    """Reads and writes whole shards; one in every process."""

    def __init__(self, config: ImportConfig, demos: list[Demo]) -> None:
        self.config, self.demos = config, demos
        self.tasks = list(dict.fromkeys(demo.task for demo in demos))
        self.first_row = np.cumsum([0, *(demo.steps + 1 for demo in demos)])
        features = {
            schema.STATE_KEY: schema.numeric_feature(demos[0].state_dim),
            schema.ACTION_KEY: schema.numeric_feature(demos[0].action_dim),
        }
        shape = (config.image_size, config.image_size, 3)
        self.writer = ShardWriter(config.root, fps=demos[0].fps, image_shape=shape, features=features)

    def indices(self, shard: int) -> range:
        """The episodes of a shard."""
        size = self.config.episodes_per_shard
        return range(shard * size, min((shard + 1) * size, len(self.demos)))

    def __call__(self, piece: int, tick: Callable[[], None], stopped: Callable[[], bool]) -> None:
        """Write shard ``piece``, or nothing at all when stopped half-way."""
        config, episodes = self.config, []
        for index in self.indices(piece):
            if stopped():
                return
            demo = self.demos[index]
            episodes.append(read_demo(demo, image_size=config.image_size, flip=config.flip, timing=config.timing))
            tick()
        first = self.indices(piece)[0]
        self.writer.write(piece, episodes, first_episode=first, first_row=int(self.first_row[first]), tasks=self.tasks)

    def close(self) -> None:
        """Nothing is held open between shards."""


@dataclass(frozen=True)
class _Factory:
    """Makes the job of a worker process."""

    config: ImportConfig
    demos: list[Demo]

    def __call__(self) -> _ShardJob:
        return _ShardJob(self.config, self.demos)
