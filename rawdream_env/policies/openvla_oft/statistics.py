"""Between the model's actions in [-1, 1] and the environment's.

The model's actions are normalised by the quantiles q01 and q99 of its training data (``dataset_statistics.json``), where the
mask is set. The gripper is not: the model says 0 for close and 1 for open, the environment -1 for open and +1 for close.

Shape letters: K actions in a chunk, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import read_json
from rawdream_env.types import ACTION_DIM, Float32Array

STATISTICS = "dataset_statistics.json"
_SUFFIX = "_no_noops"
"""LIBERO's data sets without idle steps are named so; evaluations ask for the plain name."""


@dataclass(frozen=True)
class ActionStatistics:
    """``low`` q01, ``high`` q99 and ``mask`` (A,): which dimensions are normalised."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]

    def unnormalise(self, actions: Tensor) -> Tensor:
        """The model's actions (..., A) in [-1, 1] -> the training data's units, its gripper included."""
        low, high, mask = self._tensors(actions)
        return torch.where(mask, 0.5 * (actions + 1) * (high - low + 1e-8) + low, actions)

    def to_environment(self, actions: Tensor) -> Tensor:
        """The model's actions (..., A) -> the environment's, in [-1, 1]; its gripper is -1 or +1."""
        values = self.unnormalise(actions)
        gripper = -torch.sign(2 * values[..., -1:] - 1)
        return torch.cat([values[..., :-1], gripper], dim=-1).clamp(-1, 1)

    def from_environment(self, actions: Tensor) -> Tensor:
        """The environment's actions (..., A) -> the model's, clipped to [-1, 1]: labels of supervised training."""
        low, high, mask = self._tensors(actions)
        values = torch.cat([actions[..., :-1], (1 - actions[..., -1:]) / 2], dim=-1)
        return torch.where(mask, 2 * (values - low) / (high - low + 1e-8) - 1, values).clamp(-1, 1)

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = (torch.tensor(values, dtype=like.dtype, device=like.device) for values in (self.low, self.high))
        return low, high, torch.tensor(self.mask, device=like.device)


def read_statistics(folder: Path) -> dict[str, Any]:
    """``dataset_statistics.json``: per data set, quantiles of its actions.

    Raises:
        CheckpointError: it is missing.
    """
    advice = "without the action statistics of its training data a policy cannot act; copy the file from its checkpoint"
    return read_json(folder / STATISTICS, advice)


def measure_statistics(actions: Float32Array, num_trajectories: int) -> dict[str, Any]:
    """The entry of ``dataset_statistics.json`` for a data set with the environment's ``actions`` (T, A), under upstream's
    names; all dimensions but the gripper are normalised.
    """
    values = actions.astype(np.float64)
    values[:, -1] = (1 - values[:, -1]) / 2
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    rows = {
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
        "q01": low,
        "q99": high,
    }
    action = {name: row.tolist() for name, row in rows.items()}
    mask = [True] * (values.shape[1] - 1) + [False]
    return {
        "action": {**action, "mask": mask},
        "num_transitions": len(values),
        "num_trajectories": num_trajectories,
    }


def choose_statistics(statistics: Mapping[str, Any], key: str | None, where: str) -> tuple[str, ActionStatistics]:
    """The statistics under ``key``, with or without ``_no_noops``; None: the only ones. Returns the key that was found.

    Raises:
        InvalidOptionError: several data sets and no key, or no such key.
        CheckpointError: the statistics are not those of 7 action dimensions.
    """
    names = list(statistics)
    if key is None and len(names) == 1:
        key = names[0]
    found = next((name for name in (key, f"{key}{_SUFFIX}") if name in statistics), None)
    if found is None:
        said = "has statistics of several data sets" if key is None else f"has no statistics of {key!r}"
        raise InvalidOptionError(f"{where} {said}; choose one by unnorm_key: {', '.join(sorted(names)[:12])}.")
    try:
        action = statistics[found]["action"]
        low, high = (np.asarray(action[name], np.float64) for name in ("q01", "q99"))
        mask = np.asarray(action.get("mask", [True] * len(low)), np.bool_)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: the statistics of {found!r} lack action q01, q99 or mask ({error!r})."
        ) from error
    if not (low.shape == high.shape == mask.shape == (ACTION_DIM,) and np.isfinite([low, high]).all()):
        raise CheckpointError(
            f"{where}: the statistics of {found!r} have q01 {low.shape}, q99 {high.shape} and mask {mask.shape}, expected "
            f"finite ({ACTION_DIM},)."
        )
    return found, ActionStatistics(tuple(low.tolist()), tuple(high.tolist()), tuple(mask.tolist()))
