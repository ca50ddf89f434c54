"""Torch tensors in and out of a vector environment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rawdream_env.wrappers.base import AnyVectorEnv, ForwardingVectorWrapper, as_numpy


class TorchIO(ForwardingVectorWrapper):
    """Observations, rewards, terminations and truncations as torch tensors; actions may be tensors.

    Only numeric leaves are converted: strings stay strings, and ``final_obs`` of SAME_STEP autoreset (an object array
    with one observation per ended row) gets its leaves converted too. Everything else in ``infos`` stays numpy, as
    libraries expect. Gymnasium's own ``NumpyToTorch`` fails on both.

    A dream made with ``output="torch"`` needs no wrapper; use this one for backends that compute in numpy.

    Args:
        env: any vector environment.
        device: where the tensors go, for example "cpu" or "cuda:0". Tensors are copies: nothing aliases the
            environment's arrays.
    """

    def __init__(self, env: AnyVectorEnv, device: str | torch.device = "cpu") -> None:
        super().__init__(env)
        self.device = torch.device(device)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; observations as tensors."""
        with self.all_or_nothing():  # a device may run out of memory
            observations, infos = self.env.reset(seed=seed, options=options)
            return to_torch(observations, self.device), self._infos(infos)

    def step(self, actions: Any) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Step with ``actions`` (B, K, A), a tensor on any device or an array."""
        with self.all_or_nothing():
            observations, *outcome, infos = self.env.step(as_numpy(actions))
            rewards, terminations, truncations = (to_torch(value, self.device) for value in outcome)
            return to_torch(observations, self.device), rewards, terminations, truncations, self._infos(infos)

    def _infos(self, infos: dict[str, Any]) -> dict[str, Any]:
        if "final_obs" not in infos:
            return infos
        return {**infos, "final_obs": to_torch(infos["final_obs"], self.device)}


def to_torch(tree: Any, device: str | torch.device = "cpu") -> Any:
    """Copy numbers and numeric arrays anywhere in dicts, lists, tuples and object arrays to tensors; keep the rest."""
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, np.ndarray) and tree.dtype == object:
        out = np.empty(tree.shape, dtype=object)
        for index in np.ndindex(tree.shape):
            out[index] = to_torch(tree[index], device)
        return out
    if isinstance(tree, np.ndarray | np.generic | bool | int | float):
        array = np.asarray(tree)
        return torch.tensor(array, device=device) if array.dtype.kind in "biufc" else tree
    if isinstance(tree, dict):
        return {key: to_torch(value, device) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(to_torch(value, device) for value in tree)
    return tree
