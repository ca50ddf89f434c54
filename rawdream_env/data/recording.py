"""Write a data set shard by shard, in this process or in several, so that it can be interrupted and resumed.

Episode i depends only on its number, so the files depend neither on the number of workers nor on interruptions. A shard
of ``episodes_per_shard`` episodes is written whole or not at all; rerun the same command to write the missing ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from rawdream_env.data import schema
from rawdream_env.data.lerobot import EpisodeData, ShardWriter
from rawdream_env.data.parallel import run_pieces
from rawdream_env.errors import DatasetError, RawDreamError
from rawdream_env.files import atomic_write_json, lock_file, remove_litter

FINALIZE_EVERY = 32
"""Number of shards after which the metadata are written, so that training can start on an unfinished data set."""


class EpisodeSource(Protocol):
    """Produces the episodes of a data set by their number.

    Cheap to create and to pickle: a simulator or a policy is opened at the first episode, in the worker's process.
    """

    @property
    def fps(self) -> float:
        """Frames per second."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of the frames."""
        ...

    @property
    def features(self) -> schema.Features:
        """Numeric columns (``schema.numeric_feature``): state, action, and any ``privileged.`` ones."""
        ...

    @property
    def instructions(self) -> Sequence[str]:
        """The instructions of all episodes, each once."""
        ...

    @property
    def robot_type(self) -> str | None:
        """Name of the robot, for ``info.json``."""
        ...

    def steps(self, index: int) -> int:
        """Number of actions of episode ``index``, known before it is produced."""
        ...

    def __call__(self, index: int) -> EpisodeData:
        """Episode ``index``; it does not depend on the episodes produced before it."""
        ...

    def close(self) -> None:
        """Free the resources that were opened."""
        ...


def claim_folder(
    out: str | Path, config_path: str, settings: Mapping[str, Any], done: str, *, added: Sequence[str] = ()
) -> None:
    """Store the ``settings`` of a data set (JSON values) in its folder, or compare them with those stored.

    Settings named in ``added`` may be missing in folders of earlier versions, which do not say what they were.

    Raises:
        DatasetError: the folder holds a data set with other settings, or one that was not ``done`` ("collected") by this
            package.
    """
    path = Path(out) / config_path
    if not path.exists():
        if (Path(out) / schema.INFO_PATH).exists():
            raise DatasetError(f"{out} holds a data set that was not {done} by this command. Choose another folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, dict(settings))
        return
    stored = schema.read_json(path)
    for name in {**settings, **stored}:
        value, old = settings.get(name), stored.get(name)
        if old == value or (name in added and name not in stored):
            continue
        was, now = f"with {name}={old!r}", f"now it is {value!r}"
        if isinstance(value, list):
            first = next(f"{a!r} -> {b!r}" for a, b in zip_longest(old or (), value) if a != b)
            was, now = f"from {len(old or ())} {name}", f"now there are {len(value)} (the first that differs: {first})"
        raise DatasetError(f"{out} was {done} {was}, {now}. Choose another folder, or the old setting to resume.")


def record(
    source: EpisodeSource,
    out: str | Path,
    *,
    episodes: int,
    episodes_per_shard: int,
    workers: int,
    desc: str,
    progress: bool,
    worker_died: Callable[[str], RawDreamError],
) -> Path:
    """Write those of the episodes 0 .. ``episodes - 1`` that ``out`` does not hold yet; returns the folder.

    ``worker_died`` creates the error for a worker process that ends without one. In that case and after Ctrl-C, finished
    shards are kept.
    """
    job = partial(_ShardJob, source, str(out), episodes, episodes_per_shard)
    writer = _writer(source, out)
    present = writer.shard_episodes()
    sizes = {
        shard: len(_indices(shard, episodes, episodes_per_shard)) for shard in range(-(-episodes // episodes_per_shard))
    }
    todo = [shard for shard, size in sizes.items() if present.get(shard, 0) < size]
    kept = episodes - sum(sizes[shard] for shard in todo)
    with only_writer(out), tqdm(total=episodes, initial=kept, desc=desc, unit="ep", disable=not progress) as bar:
        try:
            for finished in run_pieces(todo, job, workers=workers, count=bar.update):
                if finished % FINALIZE_EVERY == 0:
                    writer.finalize(source.instructions, robot_type=source.robot_type)
        except BrokenProcessPool as error:
            raise worker_died(
                f"worker died (out of memory?). Finished episodes are kept in {out}; rerun the same command to resume, "
                "with fewer workers if it happens again."
            ) from error
        finally:
            writer.finalize(source.instructions, robot_type=source.robot_type)
    return Path(out)


@contextmanager
def only_writer(out: str | Path) -> Iterator[None]:
    """Keep other writers out of ``out``, and remove the temporary files of killed ones."""
    try:
        lock = lock_file(Path(out) / ".lock")
    except BlockingIOError as error:
        raise DatasetError(
            f"{out} is being written by another process. Wait for it, or choose another folder."
        ) from error
    with lock:
        remove_litter(out)
        yield


def _indices(shard: int, episodes: int, size: int) -> range:
    """The episodes of a shard."""
    return range(shard * size, min((shard + 1) * size, episodes))


def _writer(source: EpisodeSource, out: str | Path) -> ShardWriter:
    return ShardWriter(out, fps=source.fps, image_shape=source.image_shape, features=source.features)


class _ShardJob:
    """Produces and writes whole shards; one in every process."""

    def __init__(self, source: EpisodeSource, out: str, episodes: int, episodes_per_shard: int) -> None:
        self.source, self.out, self.episodes, self.size = source, out, episodes, episodes_per_shard

    def __call__(self, piece: int, tick: Callable[[], None], stopped: Callable[[], bool]) -> None:
        """Write shard ``piece``, or nothing when stopped before it is complete."""
        source, made = self.source, []
        indices = _indices(piece, self.episodes, self.size)
        for index in indices:
            if stopped():
                return
            made.append(source(index))
            tick()
        first = indices[0]
        first_row = sum(source.steps(index) + 1 for index in range(first))
        _writer(source, self.out).write(
            piece, made, first_episode=first, first_row=first_row, tasks=list(source.instructions)
        )

    def close(self) -> None:
        """Close the source."""
        self.source.close()
