"""Read and write model folders in diffusers' layout, strictly: completely or not at all.

A folder holds ``config.json`` and ``diffusion_pytorch_model.safetensors``, or numbered shards with an index. diffusers'
own loader only warns about missing and unknown tensors; here one error names them all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError
from rawdream_env.files import check_weights, fsync_folder, load_tensors, read_json, sealed_folder
from rawdream_env.resolve import hub_folder, is_hub_id

WEIGHTS = "diffusion_pytorch_model.safetensors"
T = TypeVar("T")


def dataclass_from_json(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a frozen dataclass from JSON (lists become tuples); unknown keys and wrong types are a ``CheckpointError``."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise CheckpointError(
            f"{where} has unknown settings {unknown}: it was written by another version of the package"
        )
    hints = get_type_hints(cls)
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, dict):
            for nested in (hints[name], *get_args(hints[name])):
                if is_dataclass(nested):
                    value = dataclass_from_json(nested, value, where)  # type: ignore[arg-type]
        if not _is_a(value, hints[name]):
            kind = getattr(hints[name], "__name__", None) if not get_args(hints[name]) else None
            raise CheckpointError(
                f"{where} has {name} {str(value)[:80]!r}, expected {kind or hints[name]}; restore it."
            )
        out[name] = value
    return cls(**out)


def _is_a(value: object, hint: Any) -> bool:
    """Whether a value read from JSON has a dataclass field's type; whole numbers are floats too."""
    args = get_args(hint)
    if get_origin(hint) is tuple:
        items = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(value) == len(items) and all(map(_is_a, value, items))
    if args:
        return any(_is_a(value, arg) for arg in args)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and -(2**63) < value < 2**63
    return isinstance(value, hint)


def find_folder(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a checkpoint; ``owner/name`` is downloaded from the Hugging Face hub when there is no such folder."""
    path = Path(source)
    if not path.is_dir():
        if not is_hub_id(str(source)):
            raise CheckpointError(f"there is no folder {source}; check the path.")
        wanted = [f"{subfolder or ''}{'/' if subfolder else ''}{kind}" for kind in ("*.json", "*.safetensors")]
        path = hub_folder(str(source), revision=revision, local_files_only=local_files_only, allow_patterns=wanted)
    return path / subfolder if subfolder else path


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """``config.json`` of a model of class ``class_name``."""
    config = read_json(folder / "config.json")
    if config.get("_class_name", class_name) != class_name:
        raise CheckpointError(f"{folder} holds a {config['_class_name']}, expected a {class_name}.")
    return config


def read_folder(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """Every tensor of a folder, on the CPU, from one safetensors file or numbered shards; and the file that lists them.

    Values are not checked here (``check_weights`` does). ``CheckpointError`` when a file is missing or damaged.
    """
    whole, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return load_tensors(whole), whole
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files beside it; restore it from a copy.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= load_tensors(folder / shard)
    return tensors, index


def load_pretrained(model: nn.Module, folder: Path) -> None:
    """Load all tensors of a folder into ``model``, in the model's precision, or none (``CheckpointError``).

    ``model`` may be on the meta device: its tensors are replaced, not overwritten.
    """
    tensors, where = read_folder(folder)
    wanted = model.state_dict()
    check_weights(tensors, wanted, where)
    # Copies: CPU kernels may round differently on unaligned memory, such as a mapped file.
    own = {name: tensor.to(wanted[name].dtype, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(own, assign=True)


def write_pretrained(model: Any, folder: Path, *, half: bool = False, max_shard_size: str = "5GB") -> None:
    """Write a diffusers model's folder; ``half`` stores fp16. ``CheckpointError`` when a tensor is not finite.

    All files are first written beside the folder and then moved into it, the configuration last.
    """
    state = {k: v.detach().to("cpu", torch.float16 if half and v.is_floating_point() else v.dtype) for k, v in
             model.state_dict().items()}  # fmt: skip
    check_weights(state, state, f"will not write {folder}: a diverged model")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        from huggingface_hub import save_torch_state_dict

        save_torch_state_dict(
            state,
            temporary,
            filename_pattern=Path(WEIGHTS).stem + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        (temporary / "config.json").write_text(model.to_json_string(), encoding="utf-8")
        fresh = sorted(temporary.iterdir(), key=lambda path: path.name == "config.json")
        with sealed_folder(folder):
            for path in fresh:
                path.chmod(0o666 & ~_umask())
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(path, folder / path.name)
            for stale in folder.glob(f"{Path(WEIGHTS).stem}*"):
                if stale.name not in {path.name for path in fresh}:
                    stale.unlink()
            fsync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """The umask of the process, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
