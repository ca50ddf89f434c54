"""Encode a data set once: latents of all episodes in safetensors shards, which training reads by rows.

``latent_dataset.py`` describes the files. Each shard is written atomically and then added to the index with its SHA-256: an
interrupted run resumes after the last entry and produces the same bytes. One process writes; the other ranks wait for it.

Shape letters: K actions in a chunk, G = K / 4 latents in a chunk, T chunks and M = G T latents of an episode, W chunks in a
window, C h w latent, H W frame, A action dims, P state dims.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from rawdream_env.data import schema
from rawdream_env.data.reader import Episode, LeRobotReader
from rawdream_env.errors import DatasetError
from rawdream_env.files import atomic_write_bytes, lock_file, remove_litter, serialize_safetensors
from rawdream_env.trainers.common.run_dir import to_json
from rawdream_env.trainers.world_model.latent_dataset import FORMAT, INDEX, read_index, verify_shard, write_index
from rawdream_env.world_models.autoencoders import FRAMES_PER_LATENT


class FrameEncoder(Protocol):
    """The encoding methods of ``FrameCodec``. Frames are uint8, on the device of ``CacheConfig``."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Still images (N, H, W, 3) -> (N, C, h, w)."""
        ...

    def encode_video(self, frames: Tensor) -> Tensor:
        """Videos (N, 1 + 4 M, H, W, 3) -> (N, 1 + M, C, h, w)."""
        ...


FocusFunction = Callable[[Episode], NDArray[np.uint8]]
"""An episode, cut to whole chunks -> cells (M, h, w), 1 where the loss has a larger weight.

The index records only whether there is such a function: use another folder to change it.
"""


@dataclass(frozen=True)
class CacheConfig:
    """Settings of a cache, in addition to data and codec."""

    chunk_len: int = 8
    """Number of actions in a chunk, K; a multiple of 4."""
    shard_bytes: int = 256 * 2**20
    """Size at which a shard is closed."""
    window_chunks: int = 0
    """Chunks of a training window, W. Above 0, every window is also encoded as a video that starts at its own anchor, as a
    rollout starts: for codecs whose latents depend on earlier ones, at W times the work and space."""
    still_batch: int = 16
    """Number of still images encoded at a time."""
    device: str = "cpu"
    """Device of the codec."""
    progress: bool = True
    """Show a progress bar."""


def codec_fingerprint(codec: FrameEncoder) -> str:
    """SHA-256 of a codec's configuration and weights.

    The codec's own ``fingerprint`` (a string or a method) if it has one; else a hash of the ``config`` of the module and of
    all its submodules, and of their tensors. Configuration keys that start with an underscore (paths, versions) are ignored.
    """
    own = getattr(codec, "fingerprint", None)
    if own is not None:
        return str(own() if callable(own) else own)
    if not isinstance(codec, nn.Module):
        raise TypeError(
            f"{type(codec).__name__} is no torch module: give it a `fingerprint`, a string that identifies it."
        )
    configs = {name: to_json(part.config) for name, part in codec.named_modules() if hasattr(part, "config")}
    plain = {name: {k: v for k, v in config.items() if k[0] != "_"} for name, config in configs.items()}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(codec.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source_fingerprint(reader: LeRobotReader, episodes: Sequence[int]) -> str:
    """SHA-256 of a data set's metadata, the names and sizes of its files, and the settings of the reader."""
    how = [reader.image_key, reader.image_size, reader.action_key, reader.state_key, list(episodes)]
    digest = hashlib.sha256(json.dumps(how).encode())
    for path in sorted(reader.root.glob("meta/**/*.parquet")) + [reader.root / schema.INFO_PATH]:
        digest.update(path.relative_to(reader.root).as_posix().encode() + path.read_bytes())
    for path in sorted(
        [*reader.root.glob("data/**/*.parquet"), *reader.root.glob(f"videos/{reader.image_key}/**/*.mp4")]
    ):
        digest.update(f"{path.relative_to(reader.root).as_posix()} {path.stat().st_size}".encode())
    return digest.hexdigest()


def cache_latents(
    reader: LeRobotReader,
    codec: FrameEncoder,
    folder: str | Path,
    config: CacheConfig = CacheConfig(),
    *,
    episodes: Sequence[int] | None = None,
    focus: FocusFunction | None = None,
    rank: int = 0,
    patience_s: float = 86400.0,
) -> Path:
    """Encode ``episodes`` (default: all) of a data set into ``folder``; a finished cache is reused.

    Rank 0 encodes; other ranks wait for it for at most ``patience_s`` seconds. Episodes shorter than a chunk are skipped.

    Raises:
        DatasetError: the frames do not have the codec's size, the folder is in use or holds a cache of other data or
            settings, a shard is damaged, or values are not finite.
    """
    folder = Path(folder)
    if config.chunk_len < 1 or config.chunk_len % FRAMES_PER_LATENT:
        raise DatasetError(f"chunk_len {config.chunk_len} has to be a multiple of {FRAMES_PER_LATENT} frames.")
    shape = getattr(codec, "frame_shape", reader.frame_shape)
    if tuple(shape) != reader.frame_shape:
        raise DatasetError(
            f"{reader.root} is read as frames {reader.frame_shape}, the codec encodes {tuple(shape)}. Open the data set "
            f"with LeRobotReader(..., image_size={tuple(shape[:2])})."
        )
    wanted = list(range(len(reader)) if episodes is None else dict.fromkeys(episodes))
    identity = {
        "format": FORMAT,
        "codec": codec_fingerprint(codec),
        "source": source_fingerprint(reader, wanted),
        "chunk_len": config.chunk_len,
        "shard_bytes": config.shard_bytes,
        "focus": focus is not None,
        "window_chunks": config.window_chunks,
    }
    if rank:
        _wait(folder, identity, patience_s)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        index = _begin(folder, identity)
        if not index["complete"]:
            index |= {"camera": reader.image_key, "fps": reader.fps, "data": str(reader.root)}
            _encode_all(reader, codec, folder, config, wanted, focus, index)
    return folder


def check_identity(folder: Path, index: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise ``DatasetError`` when the cache is of other data or settings; the message names the difference."""
    names = {
        "codec": "another codec",
        "source": "other data",
        "chunk_len": "another chunk_len",
        "format": "another format",
        "window_chunks": "other windows (option window_latents)",
    }
    index = {"window_chunks": 0} | index  # earlier versions had none
    for name, value in identity.items():
        if index.get(name) != value:
            was, now = (x[:12] if isinstance(x, str) else x for x in (index.get(name), value))
            raise DatasetError(
                f"{folder} is a latent cache of {names.get(name, f'another {name}')} ({name} {was}, now {now}). Delete the "
                "folder to cache again, or give another one."
            )


def _begin(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The index to resume from, or a new one."""
    remove_litter(folder)
    if not (folder / INDEX).exists():
        return identity | {"complete": False, "skipped": [], "shards": []}
    index = read_index(folder)
    check_identity(folder, index, identity)
    if not index["complete"]:
        for shard in index["shards"]:
            verify_shard(folder, shard)
    return index


def _wait(folder: Path, identity: dict[str, Any], patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while True:
        if (folder / INDEX).exists():
            index = read_index(folder)
            check_identity(folder, index, identity)  # rank 0 raises the same error
            if index["complete"]:
                return
        if time.monotonic() > end:
            raise DatasetError(
                f"{folder} was not finished by rank 0 within {patience_s:.0f} s; see the output of rank 0."
            )
        time.sleep(min(5.0, patience_s / 10))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        lock = lock_file(folder / ".lock")
    except BlockingIOError as error:
        raise DatasetError(f"{folder} is being written by another process. Wait for it, or give rank=1.") from error
    with lock:
        yield


def _encode_all(
    reader: LeRobotReader,
    codec: FrameEncoder,
    folder: Path,
    config: CacheConfig,
    wanted: list[int],
    focus: FocusFunction | None,
    index: dict[str, Any],
) -> None:
    index["skipped"] = [e for e in wanted if reader.lengths[e] < config.chunk_len]
    usable = [e for e in wanted if reader.lengths[e] >= config.chunk_len]
    if not usable:
        raise DatasetError(
            f"{reader.root}: none of {len(wanted)} episodes is {config.chunk_len} steps long. Lower chunk_len."
        )
    done = sum(len(shard["episodes"]) for shard in index["shards"])
    parts: list[dict[str, Tensor]] = []
    numbers: list[int] = []
    with tqdm(total=len(usable), initial=done, desc="encode", unit="ep", disable=not config.progress) as bar:
        for episode in _ahead(reader, usable[done:]):
            parts.append(_encode(reader, codec, episode, config, focus))
            numbers.append(episode.index)
            bar.update()
            size = sum(tensor.nbytes for part in parts for tensor in part.values())
            if size >= config.shard_bytes or episode.index == usable[-1]:
                _write_shard(folder, index, parts, numbers, config)
                parts, numbers = [], []
    actions = []
    for shard in index["shards"]:
        with safe_open(folder / shard["file"], framework="pt") as file:
            actions.append(file.get_tensor("actions"))
    stats = schema.stats_to_json({"action": schema.numeric_stats(torch.cat(actions).numpy())})["action"]
    write_index(folder, index | {"complete": True, "statistics": stats})


def _ahead(reader: LeRobotReader, episodes: Sequence[int]) -> Iterator[Episode]:
    """The episodes in order; the next one is decoded while the codec encodes this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(reader.episode, episodes[0]) if episodes else None
        for number in range(len(episodes)):
            assert following is not None
            current = following.result()
            following = pool.submit(reader.episode, episodes[number + 1]) if number + 1 < len(episodes) else None
            yield current


@torch.no_grad()
def _encode(
    reader: LeRobotReader, codec: FrameEncoder, episode: Episode, config: CacheConfig, focus: FocusFunction | None
) -> dict[str, Tensor]:
    """The tensors of one episode, cut to whole chunks."""
    n = len(episode) // config.chunk_len * config.chunk_len
    cut = Episode(
        index=episode.index,
        frames=episode.frames[: n + 1],
        actions=episode.actions[:n],
        state=episode.state[: n + 1],
        task=episode.task,
        fps=episode.fps,
        privileged={name: values[: n + 1] for name, values in episode.privileged.items()},
    )
    frames = torch.from_numpy(np.ascontiguousarray(cut.frames)).to(config.device)
    stills = frames[:: config.chunk_len].split(config.still_batch)
    tensors = {
        "latents": codec.encode_video(frames[None])[0, 1:].half().cpu(),
        "stills": torch.cat([codec.encode_image(x).half().cpu() for x in stills]),
        "actions": torch.from_numpy(np.ascontiguousarray(cut.actions, np.float32)),
        "poses": torch.from_numpy(np.ascontiguousarray(cut.state, np.float32)),
    }
    if config.window_chunks:
        length = config.window_chunks * config.chunk_len
        starts = range(0, n - length + 1, config.chunk_len)
        windows = [codec.encode_video(frames[None, s : s + length + 1])[0, 1:].half().cpu() for s in starts]
        tensors["windows"] = torch.cat([tensors["latents"][:0], *windows])
    if focus is not None:
        tensors["focus"] = torch.from_numpy(focus(cut))
    _check(tensors, n, config, f"{reader.root}, episode {episode.index}")
    return tensors


def _check(tensors: dict[str, Tensor], n: int, config: CacheConfig, where: str) -> None:
    m = n // FRAMES_PER_LATENT
    chunks = n // config.chunk_len
    lengths = {"latents": m, "stills": chunks + 1, "actions": n, "poses": n + 1, "focus": m}
    lengths["windows"] = max(chunks - config.window_chunks + 1, 0) * config.window_chunks * (m // chunks)
    for name, tensor in tensors.items():
        if len(tensor) != lengths[name]:
            raise DatasetError(f"{where}: {len(tensor)} rows of {name}, expected {lengths[name]} of {n} steps.")
        bad = 0 if name == "focus" else int((~tensor.isfinite()).sum())
        if bad:
            encoded = name in ("latents", "stills", "windows")
            cause = "The codec overflows in fp16 or diverged" if encoded else "The data are damaged"
            raise DatasetError(
                f"{where}: {bad} of {tensor.numel()} {name} are not finite. {cause}; leave the episode out."
            )


def _write_shard(
    folder: Path, index: dict[str, Any], parts: list[dict[str, Tensor]], numbers: list[int], config: CacheConfig
) -> None:
    name = f"shard-{len(index['shards']):05d}.safetensors"
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    content = serialize_safetensors(tensors, where=folder / name)
    atomic_write_bytes(folder / name, content)
    chunks = [len(part["actions"]) // config.chunk_len for part in parts]
    shard = {
        "file": name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "episodes": numbers,
        "chunks": chunks,
    }
    index["latent_shape"], index["action_dim"], index["pose_dim"] = (
        list(tensors["latents"].shape[1:]),
        tensors["actions"].shape[1],
        tensors["poses"].shape[1],
    )
    index["shards"].append(shard)
    write_index(folder, index)
