"""The LeRobotDataset v3.0 layout: names of paths and columns, statistics, reading and writing of its tables.

The layout, as written by ``lerobot`` for data sets of version 3.0::

    meta/info.json                                  fps, features, totals, path templates
    meta/stats.json                                 per feature: min, max, mean, std, count and quantiles
    meta/tasks.parquet                              task (pandas index), task_index
    meta/episodes/chunk-000/file-000.parquet        one row per episode: where its rows and its video are
    data/chunk-000/file-000.parquet                 one row per frame, many episodes per file
    videos/<feature>/chunk-000/file-000.mp4         the same episodes one after the other

Data sets of this package have one more row than actions in every episode: the last row has the last frame and a zero
action, and is marked by ``is_padding``. Statistics leave it out. To train on them with ``lerobot``, leave these rows out
too (a sampler's ``drop_n_last_frames=1``). A ``stats.json`` of an earlier version counts them; it is written anew, without
them, when the command that made the data set is rerun.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rawdream_env import files
from rawdream_env.errors import DatasetError, shorten
from rawdream_env.types import Float32Array, UInt8Array

CODEBASE_VERSION = "v3.0"
CHUNKS_SIZE = 1000
MAX_ACTION = 1.001
"""Largest size of an action, with room for rounding."""
MAX_FPS = 10_000
"""Largest frame rate (Hz) that is believed."""
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
TASKS_PATH = "meta/tasks.parquet"
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"

IMAGE_KEY = "observation.image"
STATE_KEY = "observation.state"
ACTION_KEY = "action"
PRIVILEGED_PREFIX = "privileged."
PADDING_KEY = "is_padding"
"""True in the last row of an episode, which carries the last frame and a zero action; training on actions skips it."""
SUCCESS_KEY = "success"
"""In the episode table: whether the task was done."""

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

Features = Mapping[str, Mapping[str, Any]]
"""Feature name -> {"dtype", "shape", "names"}, exactly as in ``info.json``."""

Stats = dict[str, dict[str, NDArray[np.float64]]]
"""Feature name -> statistic name -> array of the feature's shape (``count``: shape (1,))."""

DEFAULT_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


PADDING_FEATURE: dict[str, Any] = {"dtype": "bool", "shape": [1], "names": None}


def numeric_feature(dim: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    """A float32 vector column."""
    return {"dtype": "float32", "shape": [dim], "names": None if names is None else list(names)}


def video_feature(image_shape: tuple[int, int, int], fps: float, codec: str, pix_fmt: str) -> dict[str, Any]:
    """The entry of an RGB camera; ``image_shape`` is (H, W, 3)."""
    height, width, channels = image_shape
    return {
        "dtype": "video",
        "shape": [height, width, channels],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.codec": codec,
            "video.pix_fmt": pix_fmt,
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": channels,
            "has_audio": False,
        },
    }


def to_column(values: NDArray[Any], feature: Mapping[str, Any]) -> pa.Array:
    """An array (rows, ...) as one Parquet column: a plain value for shape [1], a fixed-size list otherwise."""
    flat = np.ascontiguousarray(values, dtype=feature["dtype"]).reshape(len(values), -1)
    column = pa.array(flat.ravel())
    return column if flat.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(column, flat.shape[1])


def from_column(column: pa.ChunkedArray, rows: int, where: str = "a column") -> NDArray[Any]:
    """The inverse of ``to_column``: (rows, dim). Nested lists are flattened.

    Raises:
        DatasetError: a value is null or no number, or rows have different lengths; the message begins with ``where``.
    """
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    types, nulls, even = pa.types, array.null_count, True
    while types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        even = even and len(pc.unique(pc.list_value_length(array))) <= 1
        array = array.flatten()
        nulls += array.null_count
    numeric = types.is_integer(array.type) or types.is_floating(array.type) or types.is_boolean(array.type)
    if nulls or not numeric or not even or len(array) % max(rows, 1):
        raise DatasetError(
            f"{where} has {nulls} null values of type {shorten(str(column.type))} in {rows} rows"
            f"{'' if even else ' of different lengths'}, expected equally many numbers in every row. Copy the file again."
        )
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(rows, len(array) // max(rows, 1))


def check_finite(columns: Mapping[str, Float32Array], where: str) -> None:
    """Refuse columns (rows, ...) with NaN or infinity."""
    for name, values in columns.items():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
        if len(bad):
            raise DatasetError(
                f"{where}: {name} of {len(bad)} of {len(values)} rows are not finite, the first in row {bad[0]}."
            )


def check_range(actions: Float32Array, where: str) -> None:
    """Refuse actions outside [-1, 1]. A value slightly above 1 is rounding; a large one is not a delta action."""
    if actions.size and (most := float(np.abs(actions).max())) > MAX_ACTION:
        raise DatasetError(
            f"{where}: actions reach {most:.3g}, but delta actions lie in [-1, 1]. These look like absolute poses or "
            "angles: convert the data set with delta actions."
        )


def numeric_stats(values: NDArray[Any], *, quantiles: bool = True) -> dict[str, NDArray[np.float64]]:
    """Statistics over the rows of (rows, dim). NaN (an object that is not in the scene) is left out.

    A column that holds only NaN has statistics 0, since JSON has no NaN.
    """
    values = values.astype(np.float64)
    gone = np.isnan(values)
    if gone.any():
        values = np.where(gone.all(0), 0.0, values)
        reduce: Any = {"min": np.nanmin, "max": np.nanmax, "mean": np.nanmean, "std": np.nanstd, "q": np.nanquantile}
    else:
        reduce = {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std, "q": np.quantile}
    stats = {name: reduce[name](values, axis=0) for name in ("min", "max", "mean", "std")}
    stats["count"] = np.array([len(values)], dtype=np.float64)
    if quantiles:
        stats |= dict(zip(QUANTILES, reduce["q"](values, list(QUANTILES.values()), axis=0), strict=True))
    return stats


def image_stats(frames: UInt8Array) -> dict[str, NDArray[np.float64]]:
    """Statistics of frames (F, H, W, 3) per channel, scaled to [0, 1], in LeRobot's shape (3, 1, 1).

    They come from a histogram of the 256 levels. All sums are exact integers, so that the same frames give the same bytes
    on every machine, and no float copy of the frames is needed.
    """
    levels = np.arange(256)
    columns = []
    for channel in range(3):
        histogram = np.bincount(frames[..., channel].ravel(), minlength=256)
        seen = np.flatnonzero(histogram)
        count, first, second = (int((histogram * levels**power).sum()) for power in (0, 1, 2))
        variance = (count * second - first**2) / count**2  # Python integers do not overflow
        columns.append((seen[0] / 255.0, seen[-1] / 255.0, first / count / 255.0, variance**0.5 / 255.0))
    table = np.array(columns).T[:, :, None, None]
    stats = dict(zip(("min", "max", "mean", "std"), table, strict=True))
    return stats | {"count": np.array([len(frames)], dtype=np.float64)}


def merge_stats(parts: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """Exact min, max, mean, std and count of a whole from those of its parts."""
    counts = np.array([float(part["count"][0]) for part in parts])
    weights = (counts / counts.sum()).reshape(-1, *[1] * parts[0]["mean"].ndim)
    means = np.stack([part["mean"] for part in parts])
    mean = (weights * means).sum(0)
    second = np.stack([part["std"] ** 2 for part in parts]) + (means - mean) ** 2
    return {
        "min": np.stack([part["min"] for part in parts]).min(0),
        "max": np.stack([part["max"] for part in parts]).max(0),
        "mean": mean,
        "std": np.sqrt((weights * second).sum(0)),
        "count": np.array([counts.sum()]),
    }


def stats_to_json(stats: Stats) -> dict[str, dict[str, Any]]:
    """Nested lists, ``count`` as integers."""
    return {
        feature: {name: value.astype(np.int64).tolist() if name == "count" else value.tolist()
                  for name, value in entry.items()}
        for feature, entry in stats.items()
    }  # fmt: skip


def tasks_table(tasks: Sequence[str]) -> pa.Table:
    """``tasks.parquet`` with the pandas metadata that makes ``task`` the index, as LeRobot expects."""
    column = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index", **column, "pandas_type": "int64", "numpy_type": "int64"},
            {"name": "task", "field_name": "task", **column},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file in memory, to be written in one atomic step."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file; ``DatasetError`` names it when it is missing or damaged.

    Those of ``columns`` that the file lacks are left out of the table.
    """
    try:
        return _open_parquet(path).read(columns=None if columns is None else list(columns))
    except _PARQUET_ERRORS as error:
        raise _unreadable(path, error) from error


def count_rows(path: Path) -> int:
    """The rows of a Parquet file, from its footer; errors as ``read_parquet``."""
    try:
        return int(_open_parquet(path).metadata.num_rows)
    except _PARQUET_ERRORS as error:
        raise _unreadable(path, error) from error


def read_row_groups(path: Path, columns: Sequence[str], key: str, value: int) -> pa.Table:
    """Read the row groups of a Parquet file whose column ``key`` may hold ``value``; errors as ``read_parquet``."""
    try:
        file = _open_parquet(path)
        leaves = [file.schema.column(i).path for i in range(len(file.schema.names))]
        wanted = []
        for group in range(file.num_row_groups):
            bounds = file.metadata.row_group(group).column(leaves.index(key)).statistics if key in leaves else None
            if bounds is None or not bounds.has_min_max or bounds.min <= value <= bounds.max:
                wanted.append(group)
        return file.read_row_groups(wanted, columns=list(columns))
    except _PARQUET_ERRORS as error:
        raise _unreadable(path, error) from error


_PARQUET_ERRORS = (OSError, pa.ArrowException, ValueError, TypeError, OverflowError)
"""What pyarrow raises for files that are damaged."""


def _open_parquet(path: Path) -> pq.ParquetFile:
    files.require_regular(path)
    file = pq.ParquetFile(path, page_checksum_verification=True)
    if len(set(names := file.schema_arrow.names)) < len(names):
        raise ValueError(f"two columns of {len(names)} have the same name")
    return file


def _unreadable(path: Path, error: Exception) -> DatasetError:
    what = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({str(error)[:200]})"
    return DatasetError(
        f"{path}: {what}. Copy the file again from its source; in a data set collected here, delete the three "
        "files of that number (data, videos, meta/episodes) and rerun the same collection command."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a data set; ``DatasetError`` when it is missing or damaged."""
    return files.read_json(
        path,
        "check the path to the LeRobotDataset v3.0 folder, or copy it again (a data set that is being collected has the "
        "file once its first part is finished)",
        DatasetError,
    )
