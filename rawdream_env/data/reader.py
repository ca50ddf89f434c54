"""Read LeRobotDataset v3.0 folders, this package's own and other people's.

Other people's folders may lack the extra last frame and the privileged columns: an episode of F rows is then F - 1
actions with F frames, and the last action, whose outcome was not recorded, is left out. The convention is the same in all
data sets: ``frames[t]`` is seen before ``actions[t]`` and ``frames[t + 1]`` after it. These folders may also have several
cameras, pictures of any size in videos or in the data files, a state of any length or none, and any number of action
dimensions.

A data set does not have to fit in memory: iteration over a reader holds one episode and one data file without its
pictures.

Shape letters: N actions in an episode, E episodes, R = sum of N + 1 rows, H W image size, A action dims, P proprio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from rawdream_env.data import schema
from rawdream_env.data.images import decode_pictures, resize_frames
from rawdream_env.data.metadata import read_metadata
from rawdream_env.data.video import FRAME_TOLERANCE, decode_video
from rawdream_env.errors import DatasetError, shorten
from rawdream_env.types import Float32Array, UInt8Array

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Episode:
    """One episode: ``frames`` uint8 (N+1, H, W, 3), ``actions`` (N, A), ``state`` (N+1, P), float32.

    P is 0 where the data have no state.
    ``privileged`` maps a name without its prefix to (N+1, ...) float32. It is empty for data without ground truth.
    """

    index: int
    frames: UInt8Array
    actions: Float32Array
    state: Float32Array
    task: str
    fps: float
    privileged: Mapping[str, Float32Array] = field(default_factory=dict)

    @property
    def instruction(self) -> str:
        """The task, under the name that the environments use."""
        return self.task

    def __len__(self) -> int:
        """The number of actions."""
        return len(self.actions)


@dataclass(frozen=True)
class EpisodeArrays:
    """Many episodes concatenated in memory: row ``offsets[e] + t`` is frame t of episode e.

    ``frames`` uint8 (R, H, W, 3), empty (0, H, W, 3) when they were not loaded; ``actions`` (R, A) with a zero action
    in every episode's last row; ``state`` (R, P); ``privileged`` name -> (R, ...); ``offsets`` int64 (E+1,);
    ``episodes`` the E episode indices; ``tasks`` their E instructions; ``robot_type`` "" where none is named.
    """

    frames: UInt8Array
    actions: Float32Array
    state: Float32Array
    privileged: Mapping[str, Float32Array]
    offsets: NDArray[np.int64]
    episodes: NDArray[np.int64]
    tasks: tuple[str, ...]
    fps: float
    robot_type: str = ""

    def __len__(self) -> int:
        """The number of episodes."""
        return len(self.tasks)

    def windows(self, length: int, stride: int = 1) -> NDArray[np.int64]:
        """First rows (M,) of the windows of ``length`` rows inside one episode, every ``stride`` rows."""
        lengths = np.diff(self.offsets)
        return np.concatenate(
            [np.arange(o, o + n - length + 1, stride) for o, n in zip(self.offsets, lengths, strict=False)]
            or [np.empty(0, np.int64)]
        ).astype(np.int64)

    def episode(self, position: int) -> Episode:
        """A view of the episode at ``position`` in [0, E)."""
        rows = slice(self.offsets[position], self.offsets[position + 1])
        return Episode(
            index=int(self.episodes[position]),
            frames=self.frames[rows],
            actions=self.actions[rows][:-1],
            state=self.state[rows],
            task=self.tasks[position],
            fps=self.fps,
            privileged={name: values[rows] for name, values in self.privileged.items()},
        )


class LeRobotReader:
    """Random access to the episodes of a LeRobotDataset v3.0 folder.

    Args:
        root: the folder that holds ``meta/info.json``.
        image_key: the camera, by its feature name or the last part of it (``wrist_image`` for
            ``observation.images.wrist_image``); by default ``observation.image``, else the first camera.
        image_size: height and width to which frames are resized (``resize_frames``); by default they keep their size.
        action_key: the feature that holds the actions.
        state_key: the feature that holds the state. Data without it have episodes with P = 0.
        raw_actions: accept actions outside [-1, 1], such as joint angles in degrees: for readers that do not use the
            actions, or normalise them.

    Attributes:
        meta: the validated metadata (``Metadata``).
        info, fps, features, tasks, robot_type ("" where none is named): from ``meta``; stats: feature -> statistic ->
            array (empty when not in the folder).
        image_key: full name of the camera.
        lengths: int64 (E,), the number of actions of every episode.

    Raises:
        DatasetError: a file is missing or damaged, two files disagree, a frame is not within a tenth of a frame of its
            timestamp, or a value is out of range. The message names the file or the episode.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_key: str | None = None,
        image_size: tuple[int, int] | None = None,
        action_key: str = schema.ACTION_KEY,
        state_key: str = schema.STATE_KEY,
        raw_actions: bool = False,
    ) -> None:
        self.root = Path(root)
        self.image_size = image_size
        self.raw_actions = raw_actions
        self.meta = read_metadata(self.root, image_key, action_key, state_key)
        self.info, self.features, self.stats = self.meta.info, self.meta.features, self.meta.stats
        self.fps, self.robot_type = self.meta.fps, self.meta.robot_type
        self.image_key, self.action_key, self.state_key = self.meta.image_key, action_key, self.meta.state_key
        self.lengths = np.array([entry.length - 1 for entry in self.meta.entries], dtype=np.int64)
        self.tasks = tuple(dict.fromkeys(entry.task for entry in self.meta.entries))
        self._cached: tuple[Path, pa.Table] | None = None

    def __len__(self) -> int:
        """The number of episodes."""
        return len(self.meta.entries)

    def __iter__(self) -> Iterator[Episode]:
        """All episodes in order; each data file is read once."""
        return (self.episode(i) for i in range(len(self)))

    def task(self, index: int) -> str:
        """The instruction of an episode, without reading its data."""
        return self.meta.entries[index].task

    def episode(self, index: int, *, frames: bool = True) -> Episode:
        """Read one episode. With ``frames=False`` its frames are an empty (0, H, W, 3) array and no video is opened."""
        episode, times = self._numbers(index)
        return replace(episode, frames=self._frames(index, times)) if frames else episode

    def _numbers(self, index: int) -> tuple[Episode, Float64Array]:
        """An episode without its frames, and the times (F,) of its frames in their video."""
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} of {len(self)}")
        table = self._rows(index)
        privileged = [name for name in table.column_names if name.startswith(schema.PRIVILEGED_PREFIX)]
        nothing = np.empty((len(table), 0), np.float32)
        actions = self._column(table, self.action_key)[:-1]
        state = nothing if self.state_key is None else self._column(table, self.state_key)
        where = f"{self.root}, episode {index}"
        schema.check_finite({self.action_key: actions, str(self.state_key): state}, where)
        if not self.raw_actions:
            schema.check_range(actions, where)
        episode = Episode(
            index=index,
            frames=np.empty((0, *self.frame_shape), np.uint8),
            actions=actions,
            state=state,
            task=self.task(index),
            fps=self.fps,
            privileged={name.removeprefix(schema.PRIVILEGED_PREFIX): self._column(table, name) for name in privileged},
        )
        return episode, self._times(index, table)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of the frames that are read, whichever order ``info.json`` has it in."""
        return self.meta.image_shape if self.image_size is None else (*self.image_size, 3)

    @property
    def state_dim(self) -> int:
        """Width of the state, 0 where the data have none."""
        return 0 if self.state_key is None else int(np.prod(self.features[self.state_key]["shape"]))

    def _rows(self, index: int) -> pa.Table:
        """The data rows of one episode, without pictures."""
        columns = [self.action_key, "episode_index", *([] if self.state_key is None else [self.state_key])]
        columns += [name for name in self.features if name.startswith(schema.PRIVILEGED_PREFIX)]

        def read(path: Path) -> pa.Table:
            if self._cached is None or self._cached[0] != path:
                table = schema.read_parquet(path, [*columns, "timestamp"])
                _check_columns(path, table, columns)
                self._cached = path, table
            return self._cached[1]

        return self._of_episode(index, read)

    def _of_episode(self, index: int, read: Callable[[Path], pa.Table]) -> pa.Table:
        """The rows of one episode, from the file that the episode table names or, where it has none, from another."""
        entry = self.meta.entries[index]
        path = entry.data_file
        if (not path.is_file() or not _rows_of(read(path), index).size) and index in self._files_by_episode:
            path = self._files_by_episode[index]
        table = read(path)
        rows = _rows_of(table, index)
        if len(rows) != entry.length or rows[-1] - rows[0] + 1 != len(rows):
            raise DatasetError(
                f"{path}: {len(rows)} rows of episode {index}, but the episode table says {entry.length}. The two files "
                "are from different versions of the data set: copy the whole folder again."
            )
        return table.slice(int(rows[0]), len(rows))

    @cached_property
    def _files_by_episode(self) -> dict[int, Path]:
        """Where the rows of each episode really are: for tables whose file indices are stale."""
        found: dict[int, Path] = {}
        for path in sorted(self.root.glob(self.meta.data_files)):
            table = schema.read_parquet(path, ["episode_index"])
            _check_columns(path, table, ["episode_index"])
            found |= dict.fromkeys(np.unique(_episode_indices(table)).tolist(), path)
        return found

    def _column(self, table: pa.Table, name: str) -> Float32Array:
        values = schema.from_column(table[name], len(table), f"{self.root}: {name}").astype(np.float32)
        shape = self.features.get(name, {}).get("shape", [values.shape[1]])
        if int(np.prod(shape)) != values.shape[1]:
            raise DatasetError(
                f"{self.root}: {name} is {values.shape[1]} wide in the data and {shape} in info.json. Copy it again."
            )
        return values.reshape(len(table), *shape)

    def _times(self, index: int, table: pa.Table) -> Float64Array:
        """When the frames (F,) of an episode are shown in its video, in seconds."""
        entry, offsets = self.meta.entries[index], np.arange(len(table)) / self.fps
        if "timestamp" in table.column_names:
            column = schema.from_column(table["timestamp"], len(table), f"{self.root}: timestamp")
            offsets = column[:, 0].astype(np.float64)
        steps = np.diff(offsets) * self.fps
        wrong = np.flatnonzero(~(np.abs(steps - 1) <= FRAME_TOLERANCE))
        if len(wrong):
            raise DatasetError(
                f"{self.root}, episode {index}: rows {wrong[0]} and {wrong[0] + 1} are {steps[wrong[0]] / self.fps:.4g} s "
                f"apart, but info.json has {self.fps:g} frames per second. Resample the data set to one rate."
            )
        times = entry.start + offsets
        if times[-1] > entry.end - 0.5 / self.fps:
            raise DatasetError(
                f"{entry.video_file}: episode {index} has {len(times)} rows at {self.fps:g} frames per second, up to "
                f"{times[-1]:.3f} s, but its video ends at {entry.end:.3f} s. Frames are missing, or the video has "
                "another rate: convert the data set again."
            )
        return times

    def _frames(self, index: int, times: Float64Array) -> UInt8Array:
        entry = self.meta.entries[index]
        if entry.video_file is None:
            frames = decode_pictures(self._pictures(index), self.root)
        else:
            frames = decode_video(entry.video_file, times, FRAME_TOLERANCE / self.fps)
        if self.image_size is not None:
            return resize_frames(frames, self.image_size)
        if frames.shape[1:] != self.frame_shape:
            raise DatasetError(
                f"{self.root}, episode {index}: frames are {frames.shape[1:]}, but info.json has {self.frame_shape}. Set "
                "image_size to resize them, or correct the shape in info.json."
            )
        return frames

    def _pictures(self, index: int) -> pa.ChunkedArray:
        """The encoded pictures of one episode, read a row group at a time: a data file may hold gigabytes of them."""
        columns = [self.image_key, "episode_index"]

        def read(path: Path) -> pa.Table:
            groups = schema.read_row_groups(path, columns, "episode_index", index)
            _check_columns(path, groups, columns)
            return groups

        return self._of_episode(index, read)[self.image_key]

    def windows(self, length: int, stride: int = 1, episodes: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Windows of ``length`` frames inside one episode, every ``stride`` frames: (M, 2) of (episode, first)."""
        parts = [
            np.stack(np.broadcast_arrays(e, np.arange(0, self.lengths[e] + 2 - length, stride)), axis=1)
            for e in (range(len(self)) if episodes is None else episodes)
        ]
        return np.concatenate(parts or [np.empty((0, 2))]).astype(np.int64)

    def load_all(
        self,
        episodes: Sequence[int] | None = None,
        *,
        frames: bool = True,
        workers: int = 1,
        progress: bool = False,
    ) -> EpisodeArrays:
        """Read episodes (default: all) into memory, decoding with ``workers`` threads.

        Costs H * W * 3 bytes a frame (64 px: 1.2 GB per 100 000 frames); ``frames=False`` leaves the pictures out.
        """
        wanted = list(range(len(self)) if episodes is None else episodes)
        read = [self._numbers(i) for i in wanted]
        numbers, times = [episode for episode, _ in read], [times for _, times in read]
        offsets = np.concatenate([[0], np.cumsum([len(e) + 1 for e in numbers], dtype=np.int64)]).astype(np.int64)
        images = np.empty((int(offsets[-1]) if frames else 0, *self.frame_shape), np.uint8)

        def decode(position: int) -> None:
            images[offsets[position] : offsets[position + 1]] = self._frames(wanted[position], times[position])

        if frames:
            with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
                done = pool.map(decode, range(len(wanted)))
                list(tqdm(done, total=len(wanted), desc="decoding", unit="ep", disable=not progress))
        names = list(numbers[0].privileged) if numbers else []
        zero = np.zeros((1, *self.features[self.action_key]["shape"]), np.float32)
        return EpisodeArrays(
            frames=images,
            actions=np.concatenate([part for e in numbers for part in (e.actions, zero)] or [zero[:0]]),
            state=np.concatenate([e.state for e in numbers] or [np.empty((0, 0), np.float32)]),
            privileged={name: np.concatenate([e.privileged[name] for e in numbers]) for name in names},
            offsets=offsets,
            episodes=np.array(wanted, dtype=np.int64),
            tasks=tuple(e.task for e in numbers),
            fps=self.fps,
            robot_type=self.robot_type,
        )


def _check_columns(path: Path, table: pa.Table, columns: Sequence[str]) -> None:
    if missing := set(columns) - set(table.column_names):
        raise DatasetError(
            f"{path}: lacks the columns {shorten(sorted(missing))} that info.json promises. Copy the file again."
        )


def _episode_indices(table: pa.Table) -> NDArray[np.int64]:
    values = schema.from_column(table["episode_index"], len(table), "the column episode_index")
    if values.shape[1] > 1:
        raise DatasetError("the column episode_index has several numbers in a row. Copy the data set again.")
    return values.ravel()


def _rows_of(table: pa.Table, index: int) -> NDArray[np.int64]:
    return np.flatnonzero(_episode_indices(table) == index)
