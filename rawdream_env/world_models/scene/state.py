"""The state of B imagined episodes in a scene world model, batched along dim 0.

Shape letters: B rows, O objects of the robot's scene, P command dims, C H W the painter's canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rawdream_env.seeding import NoiseKey


@dataclass(frozen=True)
class SceneState:
    """B episodes, in the world frame: metres, radians, seconds. Values of absent objects mean nothing."""

    position: Tensor  # (B, O, 3)
    rotation: Tensor  # (B, O, 3, 3)
    velocity: Tensor  # (B, O, 6): linear, angular
    present: Tensor  # bool (B, O)
    arm: Tensor  # (B, 8): measured tool xyz, roll pitch yaw, finger positions
    arm_before: Tensor  # (B, 8): one frame earlier
    command: Tensor  # (B, P): commanded pose
    canvas: Tensor  # (B, C, H, W): what the painter needs of the start picture
    keys: tuple[NoiseKey, ...]
    chunks: tuple[int, ...]

    @property
    def finite(self) -> Tensor:
        """bool (B,): whether every number of a row is finite."""
        values = [self.position, self.rotation, self.velocity, self.arm, self.command]
        return torch.stack([torch.isfinite(x).flatten(1).all(1) for x in values]).all(0)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Any) -> SceneState:
        """The chosen rows (indices, which may repeat, a slice or a boolean mask) as a state of their own."""
        index = np.arange(len(self))[rows.numpy() if isinstance(rows, Tensor) else rows]
        picked = torch.as_tensor(np.atleast_1d(index))
        chosen = picked.tolist()
        return _build([self], lambda x: x[0][picked.to(x[0].device)], lambda x: tuple(x[0][i] for i in chosen))

    @staticmethod
    def where(mask: Any, a: SceneState, b: SceneState) -> SceneState:
        """Row by row ``a`` where ``mask`` (B,) is true, else ``b``."""
        chosen = [bool(m) for m in mask]
        pick = torch.tensor(chosen)

        def mix(x: Sequence[Tensor]) -> Tensor:
            return torch.where(pick.to(x[0].device).view(-1, *[1] * (x[0].dim() - 1)), x[0], x[1])

        return _build([a, b], mix, lambda x: tuple(p if m else q for m, p, q in zip(chosen, x[0], x[1], strict=True)))


_LABELS = ("keys", "chunks")


def _build(
    states: list[SceneState],
    tensor: Callable[[list[Tensor]], Tensor],
    label: Callable[[list[tuple[Any, ...]]], tuple[Any, ...]],
) -> SceneState:
    """A state whose fields are computed from the same fields of ``states``."""
    out: dict[str, Any] = {}
    for name in (field.name for field in fields(SceneState)):
        values = [getattr(state, name) for state in states]
        out[name] = label(values) if name in _LABELS else tensor(values)
    return SceneState(**out)
