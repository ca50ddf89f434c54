"""Write data sets in the LeRobotDataset v3.0 layout with pyarrow and PyAV; the ``lerobot`` package is not needed.

Episodes are written in *shards*: a data file, a video file and an episode file with the same number. A shard becomes
visible with its episode file, which is written last. All three are renamed into place, so that a crash at any moment
leaves only finished shards.

Shape letters: N actions in an episode (N + 1 frames), F rows, H W image size, A action dimensions, P proprio.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rawdream_env.data import schema
from rawdream_env.data.reader import Episode, EpisodeArrays, LeRobotReader
from rawdream_env.data.video import PIX_FMT, encode_video
from rawdream_env.errors import DatasetError, RawDreamError, shorten
from rawdream_env.files import atomic_write_bytes, atomic_write_json
from rawdream_env.types import Float32Array, UInt8Array

MAX_TASKS = 1_000_000
"""Largest number of tasks of a data set that is resumed."""
__all__ = ["Episode", "EpisodeArrays", "EpisodeData", "LeRobotReader", "LeRobotWriter", "ShardWriter"]


@dataclass(frozen=True)
class EpisodeData:
    """One episode to be written.

    ``frames`` uint8 (N+1, H, W, 3): frame t is seen before action t, and the last one after the last action.
    ``actions`` float32 (N, A); ``state`` float32 (N+1, P); ``privileged`` name -> (N+1, ...) without its prefix.
    ``success``: whether the task was done, None where that is not known.
    """

    frames: UInt8Array
    actions: Float32Array
    state: Float32Array
    task: str
    privileged: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    success: bool | None = None


class ShardWriter:
    """Writes numbered shards of a data set; independent processes may write different shards of one folder.

    Args:
        root: the data set folder.
        fps: frames per second.
        image_shape: (H, W, 3), both even.
        features: the numeric columns, ``{"action": {...}, "observation.state": {...}, "privileged.x": {...}}`` as in
            ``info.json`` (``schema.numeric_feature`` makes one).
    """

    def __init__(
        self, root: str | Path, *, fps: float, image_shape: tuple[int, int, int], features: schema.Features
    ) -> None:
        missing = {schema.ACTION_KEY, schema.STATE_KEY} - set(features)
        if missing:
            raise DatasetError(f"features lack {sorted(missing)}: declare action and observation.state.")
        if image_shape[2] != 3 or image_shape[0] % 2 or image_shape[1] % 2:
            raise DatasetError(f"image_shape {image_shape}: needs to be (H, W, 3) with even H and W.")
        self.root = Path(root)
        self.fps = fps
        self.image_shape = image_shape
        self.numeric: dict[str, dict[str, Any]] = {name: dict(feature) for name, feature in features.items()}
        self.default = dict(schema.DEFAULT_FEATURES)
        if self._has_column(schema.DATA_PATH, schema.PADDING_KEY):
            self.default[schema.PADDING_KEY] = schema.PADDING_FEATURE
        self._flags_success = self._has_column(schema.EPISODES_PATH, schema.SUCCESS_KEY)

    def path(self, template: str, shard: int) -> Path:
        """The file of a shard, for one of the templates of ``schema``."""
        chunk, file = divmod(shard, schema.CHUNKS_SIZE)
        return self.root / template.format(video_key=schema.IMAGE_KEY, chunk_index=chunk, file_index=file)

    def write(
        self, shard: int, episodes: Sequence[EpisodeData], *, first_episode: int, first_row: int, tasks: Sequence[str]
    ) -> None:
        """Write one shard: episodes ``first_episode``, ``first_episode + 1``, ..., their rows from ``first_row`` on.

        ``tasks`` is the current task table of the data set; it must contain the task of every episode.
        """
        for offset, episode in enumerate(episodes):
            self._check(episode, first_episode + offset)
        data = self._data_table(episodes, first_episode, first_row, tasks)
        rows = self._episode_rows(shard, episodes, first_episode, first_row)
        video = encode_video((episode.frames for episode in episodes), self.fps)
        # The episode file comes last: it is what makes the shard exist.
        self._replace(self.path(schema.VIDEO_PATH, shard), video)
        self._replace(self.path(schema.DATA_PATH, shard), schema.parquet_bytes(data))
        self._replace(self.path(schema.EPISODES_PATH, shard), schema.parquet_bytes(pa.Table.from_pylist(rows)))

    def _has_column(self, template: str, name: str) -> bool:
        """All files of a data set have the same columns: one begun by an earlier version lacks ``name``."""
        pattern = re.sub(r"\{[^}]*\}", "*", template)
        first = next(self.root.glob(pattern), None)
        return first is None or name in schema.read_parquet(first, [name]).column_names

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(_no_folder(path), content)

    def _check(self, episode: EpisodeData, index: int) -> None:
        n = len(episode.actions)
        shapes = {
            "frames": (episode.frames.shape, (n + 1, *self.image_shape)),
            "actions": (episode.actions.shape, (n, *self.numeric[schema.ACTION_KEY]["shape"])),
            "state": (episode.state.shape, (n + 1, *self.numeric[schema.STATE_KEY]["shape"])),
        }
        for name, (found, expected) in shapes.items():
            if tuple(found) != tuple(expected):
                raise DatasetError(f"episode {index}: {name} has shape {tuple(found)}, expected {tuple(expected)}.")
        if n == 0 or episode.frames.dtype != np.uint8:
            raise DatasetError(f"episode {index}: needs at least one action and uint8 frames ({episode.frames.dtype}).")
        if not (np.isfinite(episode.actions).all() and np.isfinite(episode.state).all()):
            raise DatasetError(f"episode {index}: non-finite actions or state; nothing was written.")
        declared = {name.removeprefix(schema.PRIVILEGED_PREFIX) for name in self.numeric if _is_privileged(name)}
        if declared != set(episode.privileged):
            raise DatasetError(
                f"episode {index}: privileged columns {sorted(episode.privileged)}, declared {sorted(declared)}."
            )

    def _column(self, episode: EpisodeData, name: str) -> NDArray[Any]:
        """One numeric column of an episode, (N+1, dim)."""
        if name == schema.ACTION_KEY:
            # One extra row with a zero action, marked as padding, carries the frame seen after the last action.
            return np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])])
        values = episode.state if name == schema.STATE_KEY else episode.privileged[_short(name)]
        return np.asarray(values).reshape(len(episode.frames), -1)

    def _data_table(
        self, episodes: Sequence[EpisodeData], first_episode: int, first_row: int, tasks: Sequence[str]
    ) -> pa.Table:
        lengths = [len(episode.frames) for episode in episodes]
        frame_index = np.concatenate([np.arange(length) for length in lengths])
        columns = {name: np.concatenate([self._column(episode, name) for episode in episodes]) for name in self.numeric}
        columns |= {
            "timestamp": frame_index / self.fps,
            "frame_index": frame_index,
            "episode_index": np.repeat(np.arange(len(episodes)) + first_episode, lengths),
            "index": first_row + np.arange(sum(lengths)),
            "task_index": np.repeat([list(tasks).index(episode.task) for episode in episodes], lengths),
        }
        columns[schema.PADDING_KEY] = frame_index == np.repeat(lengths, lengths) - 1
        features = self.numeric | self.default
        return pa.table(
            {name: schema.to_column(values, features[name]) for name, values in columns.items() if name in features}
        )

    def _episode_rows(
        self, shard: int, episodes: Sequence[EpisodeData], first_episode: int, first_row: int
    ) -> list[dict[str, Any]]:
        chunk, file = divmod(shard, schema.CHUNKS_SIZE)
        rows, done = [], 0
        for offset, episode in enumerate(episodes):
            length = len(episode.frames)
            row: dict[str, Any] = {
                "episode_index": first_episode + offset,
                "tasks": [episode.task],
                "length": length,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": first_row + done,
                "dataset_to_index": first_row + done + length,
                f"videos/{schema.IMAGE_KEY}/chunk_index": chunk,
                f"videos/{schema.IMAGE_KEY}/file_index": file,
                f"videos/{schema.IMAGE_KEY}/from_timestamp": done / self.fps,
                f"videos/{schema.IMAGE_KEY}/to_timestamp": (done + length) / self.fps,
                "meta/episodes/chunk_index": chunk,
                "meta/episodes/file_index": file,
            }
            if self._flags_success and episode.success is not None:
                row[schema.SUCCESS_KEY] = episode.success
            columns = {name: self._column(episode, name)[:-1] for name in self.numeric}  # without the padding row
            stats = {name: schema.numeric_stats(values, quantiles=False) for name, values in columns.items()}
            stats[schema.IMAGE_KEY] = schema.image_stats(episode.frames[:-1])
            for name, entry in schema.stats_to_json(stats).items():
                row |= {f"stats/{name}/{statistic}": value for statistic, value in entry.items()}
            rows.append(row)
            done += length
        return rows

    def shard_episodes(self) -> dict[int, int]:
        """Visible shards on disk: shard number -> number of episodes."""
        found = {}
        for path in self.root.glob("meta/episodes/chunk-*/file-*.parquet"):
            shard = schema.CHUNKS_SIZE * int(path.parent.name[6:]) + int(path.stem[5:])
            complete = all(self.path(template, shard).is_file() for template in (schema.DATA_PATH, schema.VIDEO_PATH))
            if complete:
                found[shard] = schema.count_rows(path)
        return found

    def finalize(self, tasks: Sequence[str], *, robot_type: str | None = None) -> int:
        """Write info, tasks and statistics over the shards 0, 1, ... without a gap; returns the number of episodes.

        Call it again when more shards exist; shards after a gap are left out until the gap is filled.
        """
        present = self.shard_episodes()
        shards: list[int] = []
        while len(shards) in present:
            shards.append(len(shards))
        if not shards:
            return 0
        with _intact(self.root):
            episodes = pa.concat_tables([schema.read_parquet(self.path(schema.EPISODES_PATH, s)) for s in shards])
            stats = schema.stats_to_json(self._stats(shards, episodes))
        self._replace(self.root / schema.TASKS_PATH, schema.parquet_bytes(schema.tasks_table(tasks)))
        atomic_write_json(_no_folder(self.root / schema.STATS_PATH), stats)
        video = schema.video_feature(self.image_shape, self.fps, "h264", PIX_FMT)
        info = {
            "codebase_version": schema.CODEBASE_VERSION,
            "robot_type": robot_type,
            "total_episodes": len(episodes),
            "total_frames": sum(episodes["length"].to_pylist()),
            "total_tasks": len(tasks),
            "chunks_size": schema.CHUNKS_SIZE,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": int(self.fps) if float(self.fps).is_integer() else self.fps,
            "splits": {"train": f"0:{len(episodes)}"},
            "data_path": schema.DATA_PATH,
            "video_path": schema.VIDEO_PATH,
            "features": {schema.IMAGE_KEY: video, **self.numeric, **self.default},
        }
        atomic_write_json(_no_folder(self.root / schema.INFO_PATH), info)
        return len(episodes)

    def _stats(self, shards: Sequence[int], episodes: pa.Table) -> schema.Stats:
        """Exact statistics without the padding rows: numbers from the data files (quantiles cannot be merged), images from the
        episode rows (those that an earlier version wrote count the padding row's frame).
        """
        names = [*self.numeric, *schema.DEFAULT_FEATURES]
        data = pa.concat_tables([schema.read_parquet(self.path(schema.DATA_PATH, s), names) for s in shards])
        columns = {name: schema.from_column(data[name], len(data)) for name in names}
        episode = columns["episode_index"].ravel()
        kept = np.append(episode[1:] == episode[:-1], False)  # not the last row of an episode, marked as padding or not
        stats = {name: schema.numeric_stats(values[kept]) for name, values in columns.items()}
        prefix = f"stats/{schema.IMAGE_KEY}/"
        rows = episodes.select([name for name in episodes.column_names if name.startswith(prefix)]).to_pylist()
        parts = [{name.removeprefix(prefix): np.array(value) for name, value in row.items()} for row in rows]
        return stats | {schema.IMAGE_KEY: schema.merge_stats(parts)}


class LeRobotWriter:
    """Append episodes one by one to a LeRobotDataset v3.0 folder.

    Episodes are buffered and written ``episodes_per_shard`` at a time; ``finalize`` writes the rest and the metadata.
    With ``resume=True`` the episodes already in the folder are kept and counted. If the process dies, the buffered episodes
    (at most ``episodes_per_shard - 1``) are lost; none is written in part.

    >>> writer = LeRobotWriter(root, fps=10, image_shape=(64, 64, 3), features=features)  # doctest: +SKIP
    >>> writer.add_episode(frames, actions, state, task="stack the blue block")  # doctest: +SKIP
    >>> writer.finalize()  # doctest: +SKIP

    Raises:
        DatasetError: the folder holds a data set of another fps, image size or columns, or, with ``resume=False``, any
            data set.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float,
        image_shape: tuple[int, int, int],
        features: schema.Features,
        resume: bool = True,
        episodes_per_shard: int = 16,
        robot_type: str | None = None,
    ) -> None:
        self.shards = ShardWriter(root, fps=fps, image_shape=image_shape, features=features)
        self.robot_type = robot_type
        self.episodes_per_shard = episodes_per_shard
        self.tasks: list[str] = []
        self.num_episodes = 0
        self.num_rows = 0
        self._pending: list[EpisodeData] = []
        self._next_shard = 0
        if not resume and (self.shards.root / schema.INFO_PATH).exists():
            raise DatasetError(f"{root} already holds a data set: choose another folder, or resume=True to add to it.")
        self._resume()

    def _resume(self) -> None:
        with _intact(self.shards.root):
            self._check_info()
            present = self.shards.shard_episodes()
            while self._next_shard in present:
                rows = schema.read_parquet(self.shards.path(schema.EPISODES_PATH, self._next_shard))
                data = schema.read_parquet(self.shards.path(schema.DATA_PATH, self._next_shard))
                if sum(rows["length"].to_pylist()) != len(data):
                    raise ValueError(f"shard {self._next_shard} has {len(data)} rows, its episode table another number")
                check_columns(self.shards, data)
                self._recover_tasks(data, rows)
                self.num_episodes += len(rows)
                self.num_rows += len(data)
                self._next_shard += 1

    def _check_info(self) -> None:
        """Refuse a folder of another frame rate or image size."""
        path = self.shards.root / schema.INFO_PATH
        if not path.exists():
            return
        info = schema.read_json(path)
        shape = info["features"].get(schema.IMAGE_KEY, {}).get("shape")
        if info["fps"] != self.shards.fps or shape != list(self.shards.image_shape):
            raise DatasetError(
                f"{path}: the data set has fps {info['fps']} and images {shape}, the new episodes {self.shards.fps} "
                f"and {list(self.shards.image_shape)}. Write them into another folder."
            )

    def _recover_tasks(self, data: pa.Table, rows: pa.Table) -> None:
        """Rebuild from the rows the task table of shards whose process died before ``finalize``."""
        by_episode = dict(zip(data["episode_index"].to_pylist(), data["task_index"].to_pylist(), strict=True))
        for episode, names in zip(rows["episode_index"].to_pylist(), rows["tasks"].to_pylist(), strict=True):
            index = by_episode[episode]
            if type(index) is not int or not 0 <= index < MAX_TASKS or not isinstance(names[0], str):
                raise ValueError(f"episode {episode} has task_index {index!r:.40} and task {names[0]!r:.40}")
            self.tasks += [""] * (index + 1 - len(self.tasks))
            self.tasks[index] = names[0]

    def add_episode(
        self,
        frames: UInt8Array,
        actions: Float32Array,
        state: Float32Array,
        task: str,
        privileged: Mapping[str, NDArray[Any]] | None = None,
    ) -> int:
        """Append an episode (shapes as in ``EpisodeData``); returns its index."""
        episode = EpisodeData(frames, actions, state, task, privileged or {})
        index = self.num_episodes + len(self._pending)
        self.shards._check(episode, index)
        if task not in self.tasks:
            self.tasks.append(task)
        self._pending.append(episode)
        if len(self._pending) >= self.episodes_per_shard:
            self._flush()
        return index

    def _flush(self) -> None:
        if not self._pending:
            return
        self.shards.write(
            self._next_shard, self._pending, first_episode=self.num_episodes, first_row=self.num_rows, tasks=self.tasks
        )
        self.num_episodes += len(self._pending)
        self.num_rows += sum(len(episode.frames) for episode in self._pending)
        self._next_shard += 1
        self._pending = []

    def finalize(self) -> None:
        """Write the buffered episodes and the metadata; more episodes may be added afterwards."""
        self._flush()
        self.shards.finalize(self.tasks, robot_type=self.robot_type)


@contextmanager
def _intact(root: Path) -> Iterator[None]:
    """Any error of files that a writer did not write becomes a ``DatasetError``."""
    try:
        yield
    except RawDreamError:
        raise
    except (pa.ArrowException, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = shorten(" ".join(str(error).split()))
        raise DatasetError(
            f"{root} cannot be continued: a file is altered or damaged ({type(error).__name__}: {reason}). Restore it from a "
            "copy, or collect into another folder."
        ) from error


def check_columns(writer: ShardWriter, data: pa.Table) -> None:
    """Refuse to append to a folder whose data files have other columns or widths."""
    for name, feature in writer.numeric.items():
        width = int(np.prod(feature["shape"]))
        if name not in data.column_names:
            raise DatasetError(f"{writer.root}: its data lack the column {name}. Collect into another folder.")
        found = schema.from_column(data[name].slice(0, 1), 1, f"{writer.root}: {name}").shape[1]
        if found != width:
            raise DatasetError(f"{writer.root}: {name} is {found} wide there and {width} here. Use another folder.")


def _is_privileged(name: str) -> bool:
    return name.startswith(schema.PRIVILEGED_PREFIX)


def _short(name: str) -> str:
    return name.removeprefix(schema.PRIVILEGED_PREFIX)


def _no_folder(path: Path) -> Path:
    """``path``, unless a folder is in the place of that file."""
    if path.is_dir():
        raise DatasetError(f"{path} is a folder where the data set has a file; remove it, or write to another folder.")
    return path
