"""Read a latent cache, written by ``latent_cache.py``, by rows.

A cache folder::

    index.json             identity of the cache (codec, data, chunk length), action statistics, the episodes of each shard
    shard-00000.safetensors ...  about 256 MB each, with the episodes concatenated

Tensors of a shard, over its episodes with T whole chunks each (the remainder of an episode is dropped):

    latents  fp16  (sum G T, C, h, w)   4 frames each; without the frame before the first chunk, the anchor
    windows  fp16  (sum (T - W + 1) G W, C, h, w)  each window of W chunks, encoded from its own anchor; only if asked for
    stills   fp16  (sum T + 1, C, h, w) the frame before each chunk, and the last one, encoded as still images: anchors
    actions  fp32  (sum K T, A)         raw
    poses    fp32  (sum K T + 1, P)     the state before each action, and after the last; P may be 0
    focus    uint8 (sum G T, h, w)      1 where the loss has a larger weight; only if asked for

Shape letters: K actions in a chunk, G = K / 4 latents in a chunk, T chunks and M = G T latents of an episode (in a window, M
latents of the window), C h w latent, A action dims, P state dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rawdream_env.data import schema
from rawdream_env.errors import DatasetError
from rawdream_env.files import atomic_write_json, json_sha256, sha256_file
from rawdream_env.types import Float32Array
from rawdream_env.world_models.autoencoders import FRAMES_PER_LATENT

FORMAT = 1
INDEX = "index.json"


QuantileBounds = tuple[NDArray[np.float64], NDArray[np.float64]]
"""The quantiles q01 and q99 of every action dimension, (A,) each."""


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a cache; ``DatasetError`` when it is missing or damaged. Those of earlier versions have no checksum."""
    if not (folder / INDEX).is_file():
        raise DatasetError(f"{folder / INDEX} is missing: {folder} is no latent cache. Create one with cache_latents.")
    index = schema.read_json(folder / INDEX)
    seal = index.pop("sha256", None)
    if seal is not None and seal != json_sha256(index):
        raise DatasetError(
            f"{folder / INDEX} does not match the SHA-256 inside it. Copy it again, or cache the data again."
        )
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Replace the index of a cache."""
    atomic_write_json(folder / INDEX, {**index, "sha256": json_sha256(index)})


def verify_shard(folder: Path, shard: dict[str, Any]) -> Path:
    """The path of a shard that matches the index; ``DatasetError`` when it is missing or damaged."""
    path: Path = folder / shard["file"]
    size = path.stat().st_size if path.is_file() else None
    try:
        same = size == shard["bytes"] and sha256_file(path) == shard["sha256"]
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error}). Copy it again.") from error
    if not same:
        size_is = f"{size} bytes instead of {shard['bytes']}" if size != shard["bytes"] else "another SHA-256"
        what = "is missing" if size is None else f"is damaged: {size_is}"
        raise DatasetError(f"{path} {what}. Copy it again, or delete it and {folder / INDEX} and cache the data again.")
    return path


def _check_index(path: Path, index: dict[str, Any]) -> None:
    """Refuse an index whose values have other types, or that names files outside of its folder."""

    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**31 for value in values)

    def fits(shard: Any) -> bool:
        names = ("chunks", "episodes")
        return (
            isinstance(shard, dict)
            and all(whole(shard.get(name)) for name in names)
            and len(shard["chunks"]) == len(shard["episodes"]) > 0
            and isinstance(shard.get("file"), str)
            and Path(shard["file"]).name == shard["file"]
            and {"bytes", "sha256"} <= shard.keys()
        )

    shards, shape = index.get("shards"), index.get("latent_shape")
    sizes: list[Any] = [index.get(name) for name in ("chunk_len", "action_dim", "pose_dim")]
    usable = isinstance(shards, list) and all(map(fits, shards)) and (shards or not index.get("complete"))
    usable = (
        usable
        and isinstance(shape, list)
        and whole(shape)
        and len(shape) == 3
        and whole([*sizes, index.get("window_chunks", 0)])
    )
    usable = usable and sizes[0] >= FRAMES_PER_LATENT and "focus" in index
    try:
        bounds = [np.asarray(index["statistics"][name], np.float64) for name in ("q01", "q99")]
        usable = usable and all(bound.shape == (sizes[1],) and np.isfinite(bound).all() for bound in bounds)
    except (LookupError, TypeError, ValueError, OverflowError):
        usable = usable and not index.get("complete")
    if not usable:
        raise DatasetError(f"{path} has values that no latent cache has. Copy it again, or cache the data again.")


@dataclass(frozen=True)
class LatentWindow:
    """Consecutive chunks of one episode, as stored in the cache.

    ``anchor`` fp16 (C, h, w): the frame before the window as a still; ``latents`` fp16 (M, C, h, w); ``actions`` fp32
    (4 M, A), raw; ``poses`` fp32 (4 M + 1, P), before each action and after the last; ``focus`` uint8 (M, h, w) or None.
    """

    anchor: Tensor
    latents: Tensor
    actions: Tensor
    poses: Tensor
    focus: Tensor | None


class LatentDataset:
    """A finished latent cache. Only requested rows are read; a shard is checked when it is first opened.

    Args:
        folder: the result of ``cache_latents``.
        verify: compare every shard with its SHA-256 at its first use (reads the whole file, about 0.2 s for 256 MB).

    Attributes:
        chunks: int64 (E,), whole chunks of each episode; episodes: int64 (E,), their numbers in the data set.
        index: ``index.json``. latent_shape: (C, h, w). chunk_len, action_dim, pose_dim: K, A, P.

    Raises:
        DatasetError: there is no cache, it is unfinished, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder, self.verify = Path(folder), verify
        self.index = read_index(self.folder)
        _check_index(self.folder / INDEX, self.index)
        shards: list[dict[str, Any]] = self.index["shards"]
        if not self.index["complete"]:
            raise DatasetError(
                f"{folder} is an unfinished latent cache ({sum(len(s['episodes']) for s in shards)} episodes so far). "
                "Rerun the same command to resume it."
            )
        self.chunks = np.concatenate([s["chunks"] for s in shards]).astype(np.int64)
        self.episodes = np.concatenate([s["episodes"] for s in shards]).astype(np.int64)
        self.latent_shape: tuple[int, int, int] = tuple(self.index["latent_shape"])
        self.window_chunks = int(self.index.get("window_chunks", 0))
        self.chunk_len, self.action_dim, self.pose_dim = (
            int(self.index[name]) for name in ("chunk_len", "action_dim", "pose_dim")
        )
        self._shard = np.repeat(np.arange(len(shards)), [len(s["chunks"]) for s in shards])
        # Number of chunks and episodes before each episode in its shard, for the offsets of its rows.
        self._before = np.concatenate([np.cumsum(s["chunks"]) - s["chunks"] for s in shards]).astype(np.int64)
        self._place = np.concatenate([np.arange(len(s["chunks"])) for s in shards])
        windows = [np.maximum(np.asarray(s["chunks"], np.int64) - self.window_chunks + 1, 0) for s in shards]
        self._windows_before = np.concatenate([np.cumsum(count) - count for count in windows])
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        """The number of episodes E."""
        return len(self.chunks)

    def __getstate__(self) -> dict[str, Any]:
        """Open files are not pickled with a dataset."""
        return self.__dict__ | {"_files": {}}

    @property
    def bounds(self) -> QuantileBounds:
        """The action quantiles q01 and q99 of this data set."""
        low, high = (np.asarray(self.index["statistics"][name], np.float64) for name in ("q01", "q99"))
        return low, high

    def latents_from_anchor(self, episode: int, first_chunk: int, num_chunks: int) -> Tensor:
        """The latents of a window, encoded as a video that starts at the window's own anchor: fp16 (M, C, h, w).

        When the cache has no separate windows, these are the latents of the episode, which are the same for a codec whose
        latents do not depend on earlier frames.
        """
        g = self.chunk_len // FRAMES_PER_LATENT
        if not self.window_chunks:
            begin = int(self._before[episode]) + first_chunk
            return self._rows(episode, "latents", begin * g, (begin + num_chunks) * g)
        if num_chunks != self.window_chunks:
            raise DatasetError(
                f"{self.folder} has windows of {self.window_chunks} chunks, asked for {num_chunks}; cache the data again."
            )
        row = (int(self._windows_before[episode]) + first_chunk) * num_chunks * g
        return self._rows(episode, "windows", row, row + num_chunks * g)

    def all_actions(self) -> Float32Array:
        """The raw actions of all episodes: (N, A)."""
        files = [self._file(number) for number in range(len(self.index["shards"]))]
        try:
            return np.concatenate([file.get_tensor("actions").numpy() for file in files])
        except (SafetensorError, ValueError, TypeError) as error:
            raise DatasetError(f"{self.folder}: 'actions' cannot be read ({error}). Cache the data again.") from error

    def still(self, episode: int, boundary: int) -> Tensor:
        """The frame at chunk boundary 0 ... T of an episode, encoded as a picture: fp16 (C, h, w)."""
        row = int(self._before[episode] + self._place[episode]) + boundary
        return self._rows(episode, "stills", row, row + 1)[0]

    def pose(self, episode: int, boundary: int) -> Tensor:
        """The state at chunk boundary 0 ... T of an episode: fp32 (P,)."""
        row = self._first_pose(episode) + boundary * self.chunk_len
        return self._rows(episode, "poses", row, row + 1)[0]

    def window(self, episode: int, first_chunk: int, num_chunks: int) -> LatentWindow:
        """The chunks ``first_chunk`` ... ``first_chunk + num_chunks - 1`` of an episode in [0, E)."""
        if first_chunk < 0 or num_chunks < 1 or first_chunk + num_chunks > self.chunks[episode]:
            raise IndexError(
                f"chunks {first_chunk} to {first_chunk + num_chunks - 1} of an episode of {self.chunks[episode]}"
            )
        k, g = self.chunk_len, self.chunk_len // FRAMES_PER_LATENT
        begin = int(self._before[episode]) + first_chunk
        end = begin + num_chunks
        pose = self._first_pose(episode) + first_chunk * k
        return LatentWindow(
            anchor=self.still(episode, first_chunk),
            latents=self._rows(episode, "latents", begin * g, end * g),
            actions=self._rows(episode, "actions", begin * k, end * k),
            poses=self._rows(episode, "poses", pose, pose + num_chunks * k + 1),
            focus=self._rows(episode, "focus", begin * g, end * g) if self.index["focus"] else None,
        )

    def _first_pose(self, episode: int) -> int:
        return int(self._before[episode]) * self.chunk_len + int(self._place[episode])

    def _rows(self, episode: int, name: str, begin: int, end: int) -> Tensor:
        try:
            rows: Tensor = self._file(int(self._shard[episode])).get_slice(name)[begin:end]
        except SafetensorError as error:
            raise DatasetError(
                f"{self.folder}: rows of {name!r} cannot be read ({error}). Cache the data again."
            ) from error
        if len(rows) != end - begin:
            raise DatasetError(
                f"{self.folder}: {name!r} has no rows {begin} to {end - 1} of episode {episode}. Cache the data again."
            )
        return rows

    def _file(self, number: int) -> Any:
        """A shard, checked and opened at its first use."""
        shard = self.index["shards"][number]
        try:
            if number not in self._files:
                path = verify_shard(self.folder, shard) if self.verify else self.folder / shard["file"]
                self._files[number] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DatasetError(
                f"{self.folder / shard['file']} is missing or damaged ({error}). Copy it again, or delete the folder and "
                "cache the data again."
            ) from error
        return self._files[number]
