"""An optimizer's state as named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rawdream_env.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


def pack_optimizer(optimizer: Optimizer, prefix: str = "optimizer.") -> dict[str, Tensor]:
    """An optimizer's state and its numeric hyper-parameters (lr, ...) as named tensors, without pickle."""
    import torch

    stored = optimizer.state_dict()
    packed: dict[str, Tensor] = {}
    for index, entry in stored["state"].items():
        for name, value in entry.items():
            packed[f"{prefix}state.{index}.{name}"] = torch.as_tensor(value)
    for index, group in enumerate(stored["param_groups"]):
        for name, value in group.items():
            if isinstance(value, float):
                packed[f"{prefix}group.{index}.{name}"] = torch.tensor(value, dtype=torch.float64)
    return packed


def unpack_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], prefix: str = "optimizer.") -> None:
    """Restore the state written by ``pack_optimizer``. ``CheckpointError`` when parameters or shapes do not match."""
    stored = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(prefix):
            continue
        kind, index, name = key.removeprefix(prefix).split(".", 2)
        limit = len(parameters) if kind == "state" else len(stored["param_groups"])
        if int(index) >= limit:
            raise CheckpointError(
                f"The optimizer has {limit} {kind} entries but the checkpoint holds {key!r}: it belongs to another model."
            )
        if kind == "group":
            stored["param_groups"][int(index)][name] = tensor.item()
            continue
        if tensor.ndim and tensor.shape != parameters[int(index)].shape:
            raise CheckpointError(
                f"{key!r} has shape {tuple(tensor.shape)}, its parameter {tuple(parameters[int(index)].shape)}: "
                "the checkpoint belongs to another model."
            )
        state.setdefault(int(index), {})[name] = tensor.clone()
    stored["state"] = state
    optimizer.load_state_dict(stored)
