"""Rotations of any batch shape."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(vector: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3) in radians."""
    square = vector.square().sum(-1, keepdim=True).clamp_min(1e-12)
    angle = square.sqrt()
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    identity = torch.eye(3, dtype=vector.dtype, device=vector.device)
    linear, quadratic = (angle.sin() / angle)[..., None], ((1 - angle.cos()) / square)[..., None]
    matrix: Tensor = identity + linear * cross + quadratic * compose(cross, cross)
    return matrix


# Products of 3x3 matrices by elementwise arithmetic: batched matrix kernels round differently depending on the batch.


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """(..., 3, 3), (..., 3) -> (..., 3)."""
    return matrix[..., 0] * vector[..., 0:1] + matrix[..., 1] * vector[..., 1:2] + matrix[..., 2] * vector[..., 2:3]


def compose(first: Tensor, second: Tensor) -> Tensor:
    """(..., 3, 3), (..., 3, 3) -> their product (..., 3, 3)."""
    return (
        first[..., :, 0:1] * second[..., 0:1, :]
        + first[..., :, 1:2] * second[..., 1:2, :]
        + first[..., :, 2:3] * second[..., 2:3, :]
    )
