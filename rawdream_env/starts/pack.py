"""Start packs: many starts in one safetensors file, so that an environment needs neither a simulator nor a renderer.

Tensors (N starts): ``frames`` uint8 (N, H, W, 3), ``task_id`` int64 (N,), ``seed`` int64 (N,) (-1: unknown) and, when
the starts have one, ``proprio`` float32 (N, P). Metadata: ``format``, ``layout``, and ``tasks``, a JSON list of
``{"name", "instruction"}`` in the order of the task ids, ``provenance``, a JSON object that says where the starts come from,
and ``sha256`` (``files.save_sealed``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import load_safetensors_metadata, load_sealed, save_sealed
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.base import TaskLike, draw_index, find_task
from rawdream_env.types import Start

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "rawdream start pack 1"


class PackStarts:
    """Draws from a start pack; keeps the frames as one uint8 array (12 kB per 64x64 start)."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """Read a pack.

        Raises:
            CheckpointError: missing, damaged, or not a start pack.
        """
        if not Path(path).is_file():
            raise CheckpointError(
                f"there is no start pack {path}. Choose another one (starts='my_pack.safetensors'), write one with "
                "rawdream_env.starts.pack.save_start_pack, or render starts on demand (starts='sim')."
            )
        found = load_safetensors_metadata(path).get("format")
        if found != FORMAT:
            raise CheckpointError(f"{path} is not a start pack: its format is {found!r}, not {FORMAT!r}.")
        tensors, metadata = load_sealed(path)
        _check_tensors(path, tensors)
        try:
            tasks = json.loads(metadata["tasks"])
            self.task_names = tuple(str(task["name"]) for task in tasks)
            self.instructions = tuple(str(task["instruction"]) for task in tasks)
            self.tasks = tuple(zip(self.task_names, self.instructions, strict=True))
            self.provenance: dict[str, Any] = dict(json.loads(metadata.get("provenance", "{}")))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} has no readable list of tasks or no provenance in its metadata ({error!r})."
            ) from error
        self.layout = metadata.get("layout", "")
        self.frames = tensors["frames"].numpy()
        self.task_ids = tensors["task_id"].numpy()
        self.seeds = tensors["seed"].numpy()
        self.proprio = tensors["proprio"].numpy() if "proprio" in tensors else None
        if len(self.task_ids) and not (self.task_ids.min() >= 0 and self.task_ids.max() < len(self.task_names)):
            raise CheckpointError(f"{path} has task ids outside its list of {len(self.task_names)} tasks.")

    def __len__(self) -> int:
        """Number of starts."""
        return len(self.frames)

    def __getitem__(self, index: int) -> Start:
        """Start number ``index``, with its own copies of frame and proprio."""
        task_id, seed = int(self.task_ids[index]), int(self.seeds[index])
        proprio = None if self.proprio is None else self.proprio[index].copy()
        frame = self.frames[index].copy()
        return Start(frame, self.instructions[task_id], task_id, proprio, None if seed < 0 else seed)

    def sample(self, key: NoiseKey, task: TaskLike = None) -> Start:
        """See :class:`StartSource`."""
        if task is None:
            chosen = np.arange(len(self))
        else:
            chosen = np.flatnonzero(self.task_ids == find_task(task, self.task_names, self.instructions))
        if not len(chosen):
            raise InvalidOptionError(f"the start pack has no start for task={task!r}.")
        return self[int(chosen[draw_index(key, len(chosen))])]


def _check_tensors(path: str | PathLike[str], tensors: dict[str, Tensor]) -> None:
    wanted = {"frames": ("uint8", 4), "task_id": ("int64", 1), "seed": ("int64", 1)}
    if "proprio" in tensors:
        wanted["proprio"] = ("float32", 2)
    for name, (dtype, ndim) in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or str(tensor.dtype) != f"torch.{dtype}" or tensor.ndim != ndim:
            got = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: tensor {name!r} is {got}; {dtype} with {ndim} dimensions is needed.")
    sizes = {len(tensors[name]) for name in wanted}
    if len(sizes) != 1 or 0 in sizes or tensors["frames"].shape[-1] != 3:
        shapes = {name: tuple(tensors[name].shape) for name in wanted}
        raise CheckpointError(f"{path}: tensors do not fit together: {shapes}.")


def save_start_pack(
    path: str | PathLike[str],
    starts: Sequence[Start],
    tasks: Sequence[tuple[str, str]],
    *,
    layout: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a pack; ``tasks`` are (name, instruction) pairs in the order of the starts' task ids; ``provenance`` is JSON.

    Raises:
        InvalidOptionError: no starts, frames of different sizes, unknown task ids, or proprio on some starts only.
    """
    import torch

    with_proprio = [start.proprio for start in starts if start.proprio is not None]
    if not starts or len({start.frame.shape for start in starts}) != 1 or len(with_proprio) not in (0, len(starts)):
        raise InvalidOptionError(
            "a pack needs at least one start, equal frame shapes, and proprio for all or for none."
        )
    for index, start in enumerate(starts):
        if not 0 <= start.task_id < len(tasks) or tasks[start.task_id][1] != start.instruction:
            raise InvalidOptionError(
                f"start {index} has task_id {start.task_id} and instruction {start.instruction!r}: not in tasks."
            )
    tensors = {
        "frames": torch.from_numpy(np.stack([start.frame for start in starts])),
        "task_id": torch.tensor([start.task_id for start in starts], dtype=torch.int64),
        "seed": torch.tensor([-1 if s.seed is None else s.seed for s in starts], dtype=torch.int64),
    }
    if with_proprio:
        tensors["proprio"] = torch.from_numpy(np.stack(with_proprio).astype(np.float32))
    listed = json.dumps([{"name": name, "instruction": instruction} for name, instruction in tasks])
    origin = {} if provenance is None else {"provenance": json.dumps(provenance)}
    save_sealed(path, tensors, {"format": FORMAT, "layout": layout, "tasks": listed, **origin})
