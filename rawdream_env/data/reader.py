"""Read LeRobotDataset v3.0 folders, this package's own and other people's.

Other people's folders may lack the extra last frame and the privileged columns: an episode of F rows is then F - 1
actions with F frames, and the last action, whose outcome nobody saw, is left out. So the convention is one everywhere:
``frames[t]`` is seen before ``actions[t]`` and ``frames[t + 1]`` after it. They may also have several cameras, pictures of
any size in videos or in the data files, a state of any length or none, and any number of action dimensions.

A data set need not fit in memory: iterating over a reader holds one episode at a time, and one data file without its
pictures.

Shape letters: N actions in an episode, E episodes, R = sum of N + 1 rows, H W image size, A action dims, P proprio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from rawdream_env.data import schema
from rawdream_env.data.images import decode_pictures, resize_frames
from rawdream_env.data.video import decode_video
from rawdream_env.errors import DatasetError
from rawdream_env.types import Float32Array, UInt8Array


@dataclass(frozen=True)
class Episode:
    """One episode: ``frames`` uint8 (N+1, H, W, 3), ``actions`` (N, A), ``state`` (N+1, P), float32.

    P is 0 where the data have no state.
    ``privileged`` maps the name without its prefix to (N+1, ...) float32: empty for data without ground truth.
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
        """The task, by the name the environments use."""
        return self.task

    def __len__(self) -> int:
        """The number of actions."""
        return len(self.actions)


@dataclass(frozen=True)
class EpisodeArrays:
    """Many episodes end to end in memory: row ``offsets[e] + t`` is frame t of episode e.

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
        """First rows (M,) of all windows of ``length`` rows that lie in one episode, every ``stride`` rows of it."""
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


@dataclass(frozen=True)
class _Entry:
    """Where one episode is."""

    length: int
    task: str
    data_file: tuple[int, int]
    video_file: tuple[int, int] | None
    from_timestamp: float


class LeRobotReader:
    """Random access to the episodes of a LeRobotDataset v3.0 folder.

    Args:
        root: the folder that holds ``meta/info.json``.
        image_key: which camera to read, by its feature name or the last part of it (``wrist_image`` for
            ``observation.images.wrist_image``); by default ``observation.image``, else the first one.
        image_size: height and width the frames are resized to (``resize_frames``); by default they stay as they are.
        action_key: the feature that holds the actions.
        state_key: the feature that holds the state. Data without it have episodes with P = 0.

    Attributes:
        info, fps, features, tasks, robot_type ("" where none is named): from ``meta``; stats: feature -> statistic ->
            array (empty when not in the folder).
        image_key: full name of the camera.
        lengths: int64 (E,), the number of actions of every episode.

    Raises:
        DatasetError: a file is missing or damaged, or two files disagree. The message names the file.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_key: str | None = None,
        image_size: tuple[int, int] | None = None,
        action_key: str = schema.ACTION_KEY,
        state_key: str = schema.STATE_KEY,
    ) -> None:
        self.root = Path(root)
        self.image_size = image_size
        self.info = schema.read_json(self.root / schema.INFO_PATH)
        version = str(self.info.get("codebase_version"))
        if not version.startswith("v3"):
            raise DatasetError(
                f"{self.root / schema.INFO_PATH}: codebase_version is {version}, this reads v3.0. Convert the data set "
                "with lerobot's convert_dataset_v21_to_v30 script."
            )
        self.features: dict[str, dict[str, Any]] = self.info.get("features", {})
        if action_key not in self.features:
            raise DatasetError(
                f"{self.root / schema.INFO_PATH}: no feature {action_key}; found {sorted(self.features)}. Name the one "
                "that holds the actions with action_key."
            )
        self.action_key = action_key
        self.state_key = state_key if state_key in self.features else None
        self.fps = float(self.info["fps"])
        self.robot_type = str(self.info.get("robot_type") or "")
        self.image_key = self._pick_camera(image_key)
        self._entries = self._load_entries()
        self.lengths = np.array([entry.length - 1 for entry in self._entries], dtype=np.int64)
        self.tasks = tuple(dict.fromkeys(entry.task for entry in self._entries))
        self.stats: schema.Stats = {}
        if (self.root / schema.STATS_PATH).exists():
            raw = schema.read_json(self.root / schema.STATS_PATH)
            self.stats = {
                name: {statistic: np.asarray(value, dtype=np.float64) for statistic, value in entry.items()}
                for name, entry in raw.items()
            }
        self._cached: tuple[tuple[int, int], pa.Table] | None = None

    def _pick_camera(self, image_key: str | None) -> str:
        cameras = [name for name, feature in self.features.items() if _is_camera(feature)]
        if image_key is None:
            image_key = schema.IMAGE_KEY if schema.IMAGE_KEY in cameras else next(iter(cameras), "")
        if image_key in cameras:
            return image_key
        found = [name for name in cameras if name.rpartition(".")[2] == image_key]
        if len(found) != 1:
            raise DatasetError(f"{self.root / schema.INFO_PATH}: no camera {image_key!r}; it has {cameras}.")
        return found[0]

    def _load_entries(self) -> list[_Entry]:
        paths = sorted(self.root.glob("meta/episodes/chunk-*/file-*.parquet"))
        if not paths:
            raise DatasetError(f"{self.root}/meta/episodes holds no episode table: copy the whole folder again.")
        total = int(self.info["total_episodes"])
        video = f"videos/{self.image_key}"
        is_video = self.features[self.image_key]["dtype"] == "video"
        keys = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
        if is_video:
            keys += [f"{video}/chunk_index", f"{video}/file_index", f"{video}/from_timestamp"]
        found: dict[int, _Entry] = {}
        for path in paths:
            table = schema.read_parquet(path, keys)
            missing = set(keys) - set(table.column_names)
            if missing:
                raise DatasetError(f"{path}: lacks the columns {sorted(missing)}; convert the data set to v3.0 again.")
            for row in table.select(keys).to_pylist():
                found[row["episode_index"]] = _Entry(
                    length=row["length"],
                    task=row["tasks"][0] if row["tasks"] else "",
                    data_file=(row["data/chunk_index"], row["data/file_index"]),
                    video_file=(row[f"{video}/chunk_index"], row[f"{video}/file_index"]) if is_video else None,
                    from_timestamp=row[f"{video}/from_timestamp"] if is_video else 0.0,
                )
        lost = [i for i in range(total) if i not in found]
        if lost:
            raise DatasetError(
                f"{self.root}/meta/episodes: {len(lost)} of the {total} episodes of info.json are missing, the first "
                f"is {lost[0]}. Copy the folder again, or run the same collection command again."
            )
        return [found[i] for i in range(total)]

    def __len__(self) -> int:
        """The number of episodes."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Episode]:
        """All episodes in order; every file is read once."""
        return (self.episode(i) for i in range(len(self)))

    def task(self, index: int) -> str:
        """The instruction of an episode, without reading its data."""
        return self._entries[index].task

    def episode(self, index: int, *, frames: bool = True) -> Episode:
        """Read one episode. With ``frames=False`` its frames are an empty (0, H, W, 3) array and no video is opened."""
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} of {len(self)}")
        table = self._rows(index)
        privileged = [name for name in table.column_names if name.startswith(schema.PRIVILEGED_PREFIX)]
        nothing = np.empty((len(table), 0), np.float32)
        return Episode(
            index=index,
            frames=self._frames(index) if frames else np.empty((0, *self.frame_shape), np.uint8),
            actions=self._column(table, self.action_key)[:-1],
            state=nothing if self.state_key is None else self._column(table, self.state_key),
            task=self._entries[index].task,
            fps=self.fps,
            privileged={name.removeprefix(schema.PRIVILEGED_PREFIX): self._column(table, name) for name in privileged},
        )

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of the frames that are read, whichever order ``info.json`` has it in."""
        if self.image_size is not None:
            return (*self.image_size, 3)
        shape = tuple(int(n) for n in self.features[self.image_key]["shape"])
        height, width = shape[:2] if shape[2] == 3 else shape[1:]
        return height, width, 3

    def _path(self, template: str, file: tuple[int, int]) -> Path:
        name = template.format(video_key=self.image_key, chunk_index=file[0], file_index=file[1])
        return self.root / name

    def _rows(self, index: int) -> pa.Table:
        """The data rows of one episode, without pictures."""
        entry = self._entries[index]
        path = self._data_path(entry)
        if self._cached is None or self._cached[0] != entry.data_file:
            wanted = [self.action_key, "episode_index", *([] if self.state_key is None else [self.state_key])]
            extra = [name for name in self.features if name.startswith(schema.PRIVILEGED_PREFIX)]
            table = schema.read_parquet(path, [*wanted, *extra])
            needed = set(wanted) - set(table.column_names)
            if needed:
                raise DatasetError(
                    f"{path}: lacks the columns {sorted(needed)} that info.json promises. Copy it again."
                )
            self._cached = (entry.data_file, table)
        return self._of_episode(index, self._cached[1])

    def _data_path(self, entry: _Entry) -> Path:
        return self._path(self.info.get("data_path") or schema.DATA_PATH, entry.data_file)

    def _of_episode(self, index: int, table: pa.Table) -> pa.Table:
        """The rows of one episode in the table of its data file."""
        entry = self._entries[index]
        rows = np.flatnonzero(table["episode_index"].to_numpy() == index)
        if len(rows) != entry.length or (len(rows) and rows[-1] - rows[0] + 1 != len(rows)):
            raise DatasetError(
                f"{self._data_path(entry)}: {len(rows)} rows of episode {index}, but the episode table says "
                f"{entry.length}. The two files are from different versions of the data set: copy the whole folder again."
            )
        return table.slice(int(rows[0]), len(rows))

    def _column(self, table: pa.Table, name: str) -> Float32Array:
        values = schema.from_column(table[name], len(table)).astype(np.float32)
        shape = self.features.get(name, {}).get("shape", [values.shape[1]])
        if int(np.prod(shape)) != values.shape[1]:
            raise DatasetError(
                f"{self.root}: {name} is {values.shape[1]} wide in the data and {shape} in info.json. Copy it again."
            )
        return values.reshape(len(table), *shape)

    def _frames(self, index: int) -> UInt8Array:
        entry = self._entries[index]
        if entry.video_file is None:
            frames = decode_pictures(self._pictures(index), self.root)
        else:
            path = self._path(self.info.get("video_path") or schema.VIDEO_PATH, entry.video_file)
            frames = decode_video(path, self.fps, start=entry.from_timestamp, count=entry.length)
        return frames if self.image_size is None else resize_frames(frames, self.image_size)

    def _pictures(self, index: int) -> pa.ChunkedArray:
        """The encoded pictures of one episode, read a row group at a time: a data file may hold gigabytes of them."""
        entry = self._entries[index]
        path = self._data_path(entry)
        groups = schema.read_row_groups(path, [self.image_key, "episode_index"], "episode_index", index)
        if self.image_key not in groups.column_names:
            raise DatasetError(f"{path}: lacks the column {self.image_key} that info.json promises. Copy it again.")
        return self._of_episode(index, groups)[self.image_key]

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
        numbers = [self.episode(i, frames=False) for i in wanted]
        offsets = np.concatenate([[0], np.cumsum([len(e) + 1 for e in numbers], dtype=np.int64)]).astype(np.int64)
        images = np.empty((int(offsets[-1]) if frames else 0, *self.frame_shape), np.uint8)

        def decode(position: int) -> None:
            images[offsets[position] : offsets[position + 1]] = self._frames(wanted[position])

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


def _is_camera(feature: Mapping[str, Any]) -> bool:
    """An RGB camera: depth maps are videos too, but no pictures."""
    info = feature.get("info") or {}
    depth = info.get("is_depth_map") or info.get("video.is_depth_map")
    return feature["dtype"] in ("video", "image") and not depth
