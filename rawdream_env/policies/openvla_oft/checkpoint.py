"""Weights in safetensors files under upstream's names: one file, or shards with an index.

Headers are read and compared with the model before anything is allocated; then tensors are read one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rawdream_env.errors import CheckpointError
from rawdream_env.files import atomic_write_json, check_sha256, printable, read_json, save_safetensors, sealed_folder

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 * 10**9
"""A larger checkpoint is written in shards of at most this size."""
_MAX_HEADER = 100 * 2**20
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by name, from headers alone.

    Raises:
        CheckpointError: no weights, a shard that is missing or truncated, or a tensor that is not in the shard listed.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder} has neither {WEIGHTS} nor {INDEX}; only safetensors are read. Download the checkpoint again."
            )
        return _header(folder / WEIGHTS)
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) and "/" not in file for file in listed.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files of its folder; download it again.")
    shards = {file: _header(folder / file) for file in sorted(set(listed.values()))}
    if lost := sorted(name for name, file in listed.items() if name not in shards[file]):
        raise CheckpointError(
            f"{folder / listed[lost[0]]} lacks {len(lost)} tensors that {INDEX} lists, first {printable(lost[0])}; download it "
            "again."
        )
    return {name: shards[file][name] for name, file in listed.items()}


def _header(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the shard.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            stored = {n: StoredTensor(path, tuple(e["shape"]), str(e["dtype"])) for n, e in entries.items()}
            end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); download it again.") from error
    if size < end:
        raise CheckpointError(f"{path} is truncated: it has {size} of {end} bytes; download it again.")
    return stored


def check_tensors(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor], unused: re.Pattern[str], where: Path
) -> None:
    """``CheckpointError`` when tensors are missing, unknown (those that match ``unused`` are not), of another shape, or no
    floating-point numbers.
    """
    missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    unknown = [name for name in unknown if not unused.match(name)]
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(wanted)} tensors, first {missing[0]}; its config.json describes another "
            "model, or the checkpoint is incomplete."
        )
    if unknown:
        raise CheckpointError(
            f"{where} has {len(unknown)} tensors that this model has not, first {printable(unknown[0])}; its config.json "
            "describes another model."
        )
    for name, tensor in sorted(wanted.items()):
        if stored[name].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{where}: {name} has shape {stored[name].shape}, expected {tuple(tensor.shape)} by its config.json."
            )
        if stored[name].dtype not in _FLOATS:
            raise CheckpointError(
                f"{where}: {name} has type {stored[name].dtype}; quantised checkpoints are not read, use one in bfloat16."
            )


def read_tensors(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors on the CPU, file by file.

    Raises:
        CheckpointError: a file is altered or damaged, or a tensor is not finite.
    """
    from safetensors import SafetensorError, safe_open

    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(stored[name].file, []).append(name)
    for path, members in sorted(by_file.items()):
        check_sha256(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in members:
                    tensor = file.get_tensor(name)
                    if not bool(tensor.isfinite().all()):
                        raise CheckpointError(
                            f"{path}: {printable(name)} has values that are not finite; use an earlier one."
                        )
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); download it again.") from error


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``tensors`` in order of their names: ``model.safetensors``, or shards with an index when they are larger than
    ``shard_bytes``. Weights that were in the folder are replaced.
    """
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in sorted(tensors.items()):
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    with sealed_folder(folder):
        (folder / INDEX).unlink(missing_ok=True)
        for file, shard in zip(files, shards, strict=True):
            save_safetensors(folder / file, shard, {"format": "pt"})
        for path in folder.glob("model*.safetensors"):
            if path.name not in files and (path.name == WEIGHTS or _SHARD.fullmatch(path.name)):
                path.unlink()
        if count > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            atomic_write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
