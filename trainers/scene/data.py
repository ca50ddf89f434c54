"""Pictures of a scene with the states they show, read from safetensors shards (``pictures-*`` and ``starts-*``).

Shape letters: E episodes or starts, K frames of an episode, O objects, S picture size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rawdream_env.errors import CheckpointError, DatasetError
from rawdream_env.files import load_safetensors

STARTS = ("start", "start_position", "start_rotation", "start_arm", "present")
PICTURES = (*STARTS, "frame", "position", "rotation", "arm")


def load_shards(folders: Sequence[str | Path], kind: str, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors ``names`` of all shards ``kind-*.safetensors`` in ``folders``, joined along E.

    Raises:
        DatasetError: there are no shards, or one is damaged, lacks a tensor or has another shape.
    """
    paths = [path for folder in folders for path in sorted(Path(folder).glob(f"{kind}-*.safetensors"))]
    if not paths:
        raise DatasetError(f"no {kind}-*.safetensors in {', '.join(map(str, folders))}; collect them first.")
    shards: list[dict[str, Tensor]] = []
    for path in paths:
        try:
            shard = load_safetensors(path)
        except CheckpointError as error:
            raise DatasetError(f"{error}") from error
        if missing := sorted(set(names) - set(shard)):
            raise DatasetError(f"{path} lacks {', '.join(missing)}; collect it again.")
        _check(shard, path, shards[0] if shards else None)
        shards.append({name: shard[name] for name in names})
    return {name: torch.cat([shard[name] for shard in shards]) for name in names}


def _check(shard: dict[str, Tensor], path: Path, first: dict[str, Tensor] | None) -> None:
    e, o = shard["present"].shape[0], shard["present"].shape[-1]
    wanted = {"start_position": (e, o, 3), "start_rotation": (e, o, 3, 3), "start_arm": (e, 7)}
    if "frame" in shard:
        k = shard["frame"].shape[1]
        wanted |= {"position": (e, k, o, 3), "rotation": (e, k, o, 3, 3), "arm": (e, k, 7)}
    for name, shape in wanted.items():
        if shard[name].shape != shape:
            raise DatasetError(f"{path} has {name} of shape {tuple(shard[name].shape)}, expected {shape}.")
    pictures = [shard[name] for name in ("start", "frame") if name in shard]
    if any(x.dtype != torch.uint8 or x.shape[-3:] != pictures[0].shape[-3:] for x in pictures):
        raise DatasetError(f"{path} must hold uint8 pictures of one size.")
    for name, tensor in (first or {}).items():
        if tensor.shape[1:] != shard[name].shape[1:]:
            raise DatasetError(f"{path} has {name} of another shape than the shards before it.")
