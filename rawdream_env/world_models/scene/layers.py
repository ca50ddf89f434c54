"""Layers of the reader and the painter.

Shape letters: B rows, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.world_models.wan.layers import needs_exact_rows


class Block(nn.Module):
    """Pre-norm residual block of two 3x3 convolutions; a new one is the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y


def exact_rows(compute: Callable[..., tuple[Tensor, ...]], weight: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """``compute(*inputs)``; row by row in CPU fp32 inference (by the type of ``weight``), where CPU kernels would round
    differently depending on the number of rows. In these small networks that costs little: a row stays in the cache.
    """
    if len(inputs[0]) == 1 or not needs_exact_rows(weight):
        return compute(*inputs)
    rows = [compute(*row) for row in zip(*(x.split(1) for x in inputs), strict=True)]
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
