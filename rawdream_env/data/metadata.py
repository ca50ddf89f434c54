"""The metadata of a LeRobotDataset v3.0 folder: validated once, when the folder is opened, into typed records.

Other people's folders are foreign input. After ``read_metadata`` every number is in its range, every path lies inside the
folder, and every episode has a length, an instruction and a file; everything else is a ``DatasetError``.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rawdream_env.data import schema
from rawdream_env.errors import DatasetError, shorten
from rawdream_env.text import clean_instruction

MAX_FILES = 1_000_000
"""Largest chunk or file index."""
MAX_ROWS = 10_000_000
"""Largest number of rows of an episode."""
MAX_SIDE = 16_384
"""Largest height or width (pixels) of a frame."""
MAX_SECONDS = 1e7
"""Largest time in a video file."""


@dataclass(frozen=True)
class Entry:
    """Where one episode is."""

    length: int
    """Rows, one more than actions."""
    task: str
    data_file: Path
    video_file: Path | None
    """None for pictures inside the data file."""
    start: float
    """Time (s) of its first frame in the video file."""
    end: float
    """Time (s) at which its last frame ends; infinite where the table does not state it."""
    success: bool | None = None
    """Whether the task was done; None where the table does not say."""


@dataclass(frozen=True)
class Metadata:
    """A data set's ``meta`` folder."""

    info: dict[str, Any]
    fps: float
    features: dict[str, dict[str, Any]]
    robot_type: str
    image_key: str
    image_shape: tuple[int, int, int]
    action_key: str
    state_key: str | None
    data_files: str
    """Template of the data files, as a pattern of ``Path.glob``."""
    entries: tuple[Entry, ...]
    stats: schema.Stats


def read_metadata(root: Path, image_key: str | None, action_key: str, state_key: str) -> Metadata:
    """Read and validate; arguments as ``LeRobotReader``."""
    path = root / schema.INFO_PATH
    info = schema.read_json(path)
    version = str(info.get("codebase_version"))
    if not version.startswith("v3"):
        raise DatasetError(
            f"{path}: codebase_version is {clean_instruction(version)}, this reads v3.0. Convert the data set with lerobot's "
            "convert_dataset_v21_to_v30 script."
        )
    features = _features(path, info.get("features"))
    if action_key not in features:
        raise DatasetError(
            f"{path}: no feature {action_key}; found {shorten(sorted(features))}. Set action_key to the one that holds "
            "the actions."
        )
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= schema.MAX_FPS:
        raise DatasetError(f"{path}: fps is {shorten(fps)}, expected Hz in (0, {schema.MAX_FPS}].")
    camera = _pick_camera(path, features, image_key)
    data_path = _template(path, "data_path", info.get("data_path") or schema.DATA_PATH)
    video_path = _template(path, "video_path", info.get("video_path") or schema.VIDEO_PATH)
    is_video = features[camera]["dtype"] == "video"
    return Metadata(
        info=info,
        fps=float(fps),
        features=features,
        robot_type=str(info.get("robot_type") or ""),
        image_key=camera,
        image_shape=_image_shape(path, camera, features[camera]["shape"]),
        action_key=action_key,
        state_key=state_key if state_key in features else None,
        data_files=re.sub(r"\{[^}]*\}", "*", data_path),
        entries=_entries(root, info, data_path, video_path, camera, is_video),
        stats=_stats(root / schema.STATS_PATH),
    )


def _features(path: Path, value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise DatasetError(f"{path}: features is {shorten(value)}, expected an object. Copy the data set again.")
    for name, feature in value.items():
        shape = feature.get("shape") if isinstance(feature, dict) else None
        dims_fit = (
            isinstance(shape, list)
            and len(shape) <= 8
            and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= MAX_ROWS for n in shape)
        )
        if not dims_fit or not isinstance(feature.get("dtype"), str):
            raise DatasetError(
                f"{path}: feature {shorten(name)} is {shorten(feature)}, expected a dtype and a shape of positive whole "
                "numbers. Convert the data set again."
            )
    return value


def _is_camera(feature: Mapping[str, Any]) -> bool:
    """Whether a feature is an RGB camera: depth maps are videos too."""
    info = feature.get("info")
    info = info if isinstance(info, dict) else {}
    depth = info.get("is_depth_map") or info.get("video.is_depth_map")
    return feature["dtype"] in ("video", "image") and not depth


def _pick_camera(path: Path, features: Mapping[str, Mapping[str, Any]], image_key: str | None) -> str:
    cameras = [name for name, feature in features.items() if _is_camera(feature)]
    if image_key is None:
        image_key = schema.IMAGE_KEY if schema.IMAGE_KEY in cameras else next(iter(cameras), "")
    found = [name for name in cameras if image_key in (name, name.rpartition(".")[2])]
    found = [image_key] if image_key in found else found
    if len(found) != 1:
        raise DatasetError(f"{path}: no camera {shorten(image_key)}; it has {shorten(cameras)}.")
    if not _is_inside(found[0]) or "/" in found[0]:
        raise DatasetError(f"{path}: the camera {shorten(found[0])} is no name of a folder. Rename the feature.")
    return found[0]


def _image_shape(path: Path, camera: str, shape: list[int]) -> tuple[int, int, int]:
    """(H, W, 3), whichever order ``info.json`` has it in."""
    if len(shape) == 3 and 3 in (shape[0], shape[2]):
        height, width = shape[:2] if shape[2] == 3 else shape[1:]
        if max(height, width) <= MAX_SIDE:
            return height, width, 3
    raise DatasetError(
        f"{path}: the frames of {camera} have shape {shorten(shape)}, expected (height, width, 3) or (3, height, width) "
        f"with sides of at most {MAX_SIDE} pixels. Choose another camera, or convert the data set again."
    )


def _template(path: Path, name: str, value: Any) -> str:
    """A path template with the three fields of v3.0 and no others, which cannot leave the folder."""
    advice = f"Expected a template like {schema.DATA_PATH}"
    if not isinstance(value, str) or len(value) > 500:
        raise DatasetError(f"{path}: {name} is {shorten(value)}. {advice}.")
    try:
        fields = [part[1:] for part in string.Formatter().parse(value) if part[1] is not None]
    except ValueError as error:
        raise DatasetError(f"{path}: {name} is {shorten(value)} ({error}). {advice}.") from error
    if any(field in ("episode_chunk", "episode_index") for field, *_ in fields):
        raise DatasetError(
            f"{path}: {name} is the v2.1 template {shorten(value)} in a v3.0 folder. Convert the data set with lerobot's "
            "convert_dataset_v21_to_v30 script."
        )
    allowed = {"chunk_index": r"(0?\d)?d?", "file_index": r"(0?\d)?d?", "video_key": "s?"}
    for field, width, conversion in fields:
        if conversion or not re.fullmatch(allowed.get(str(field), "(?!)"), width or ""):
            raise DatasetError(f"{path}: {name} is {shorten(value)}, with an unknown field {shorten(field)}. {advice}.")
    if not _is_inside(value):
        raise DatasetError(f"{path}: {name} is {shorten(value)}, which leaves the data set's folder. {advice}.")
    return value


def _is_inside(name: str) -> bool:
    """Whether a relative path stays below its folder."""
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set("\\\0") & set(name)


def inside(root: Path, name: Any) -> Path:
    """A path below ``root`` that a data file names; ``DatasetError`` when it leaves the folder."""
    if not isinstance(name, str) or not _is_inside(name):
        raise DatasetError(f"{root}: a picture has the path {shorten(name)}, expected one inside the folder.")
    return root / name


def _entries(
    root: Path, info: Mapping[str, Any], data_path: str, video_path: str, camera: str, is_video: bool
) -> tuple[Entry, ...]:
    paths = sorted(root.glob("meta/episodes/chunk-*/file-*.parquet"))
    if not paths:
        raise DatasetError(f"{root}/meta/episodes holds no episode table: copy the whole folder again.")
    video = f"videos/{camera}"
    keys = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    keys += [f"{video}/{name}" for name in ("chunk_index", "file_index", "from_timestamp") if is_video]
    found: dict[int, Entry] = {}
    unclear: set[int] = set()
    for path in paths:
        table = schema.read_parquet(path, [*keys, f"{video}/to_timestamp", schema.SUCCESS_KEY])
        if missing := set(keys) - set(table.column_names):
            raise DatasetError(
                f"{path}: lacks the columns {shorten(sorted(missing))}; convert the data set to v3.0 again."
            )
        for row in table.to_pylist():
            take = _Row(path, row)
            index = take.whole("episode_index", 0, MAX_ROWS)
            names = row["tasks"] if isinstance(row["tasks"], list) else [row["tasks"]]
            tasks = [name for name in names if isinstance(name, str)]
            if len(tasks) != 1:
                unclear.add(index)
            place = {"chunk_index": take.file("data/chunk_index"), "file_index": take.file("data/file_index")}
            file, start, end = None, 0.0, np.inf
            if is_video:
                at = {name: take.file(f"{video}/{name}") for name in ("chunk_index", "file_index")}
                file = root / video_path.format(video_key=camera, **at)
                start = take.seconds(f"{video}/from_timestamp")
                if row.get(f"{video}/to_timestamp") is not None:
                    end = take.seconds(f"{video}/to_timestamp")
            found[index] = Entry(
                length=take.whole("length", 1, MAX_ROWS),
                task=tasks[0] if tasks else "",
                data_file=root / data_path.format(video_key=camera, **place),
                video_file=file,
                start=start,
                end=end,
                success=success if isinstance(success := row.get(schema.SUCCESS_KEY), bool) else None,
            )
    total = info.get("total_episodes")
    if isinstance(total, bool) or not isinstance(total, int) or not 1 <= total <= 10**15:
        raise DatasetError(
            f"{root / schema.INFO_PATH}: total_episodes is {shorten(total)}, expected a positive whole number; the "
            f"tables hold {len(found)} episodes. Copy the folder again."
        )
    lost = next((i for i in range(total) if i not in found), None)  # ends after len(found) steps at the latest
    if lost is not None:
        missing_count = total - sum(i < total for i in found)
        raise DatasetError(
            f"{root}/meta/episodes: {missing_count} of the {total} episodes of info.json are missing, the first is "
            f"{lost}. Copy the folder again, or rerun the same collection command."
        )
    if unclear := unclear & set(range(total)):
        names_of = _named_by_rows(root, found, unclear)
        found |= {i: replace(found[i], task=names_of[i]) for i in unclear}
    return tuple(found[i] for i in range(total))


@dataclass(frozen=True)
class _Row:
    """One row of an episode table, whose values are checked as they are taken."""

    path: Path
    values: Mapping[str, Any]

    def whole(self, name: str, low: int, high: int) -> int:
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._error(name, f"a whole number in [{low}, {high}]")
        return value

    def file(self, name: str) -> int:
        return self.whole(name, 0, MAX_FILES)

    def seconds(self, name: str) -> float:
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SECONDS:
            raise self._error(name, f"seconds in [0, {MAX_SECONDS:.0e}]")
        return float(value)

    def _error(self, name: str, wanted: str) -> DatasetError:
        where = f"{self.path}: the row of episode {shorten(self.values['episode_index'])} has {name}"
        return DatasetError(f"{where} {shorten(self.values[name])}, expected {wanted}. Copy the file again.")


def _named_by_rows(root: Path, entries: Mapping[int, Entry], episodes: Iterable[int]) -> dict[int, str]:
    """The instructions of episodes whose table row does not have exactly one: that of their first data row.

    The list in the episode table is not ordered.
    """
    path = root / schema.TASKS_PATH
    if not path.exists():  # a single unnamed task
        episodes = list(episodes)
        if several := [i for i in episodes if entries[i].task]:
            raise DatasetError(f"{path} is missing, but episode {min(several)} has several tasks. Copy it again.")
        return dict.fromkeys(episodes, "")
    table = schema.read_parquet(path)
    column = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if column is None or "task_index" not in table.column_names:
        raise DatasetError(f"{path}: columns {shorten(table.column_names)}, expected task_index and task.")
    tasks = dict(zip(table["task_index"].to_pylist(), table[column].to_pylist(), strict=True))
    found: dict[int, str] = {}
    by_file: dict[Path, list[int]] = {}
    for index in episodes:
        by_file.setdefault(entries[index].data_file, []).append(index)
    for file, wanted in sorted(by_file.items()):
        rows = schema.read_parquet(file, ["episode_index", "task_index"])
        if len(rows.column_names) < 2:
            raise DatasetError(f"{file}: lacks task_index, which names the task of each row. Copy the file again.")
        first = dict(zip(rows["episode_index"].to_pylist()[::-1], rows["task_index"].to_pylist()[::-1], strict=True))
        for index in wanted:
            name = tasks.get(first.get(index))
            if not isinstance(name, str):
                raise DatasetError(
                    f"{file}: episode {index} has task_index {shorten(first.get(index))}, which {path} does not name."
                )
            found[index] = name
    return found


def _stats(path: Path) -> schema.Stats:
    if not path.exists():
        return {}
    try:
        return {
            name: {statistic: np.asarray(value, dtype=np.float64) for statistic, value in entry.items()}
            for name, entry in schema.read_json(path).items()
        }
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path}: holds values that are no arrays of numbers ({shorten(error)}). Copy the file again."
        ) from error
