"""Layers shared by the transformer and the autoencoder.

Shape letters: B batch, C channels, H W height and width, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def needs_exact_rows(x: Tensor) -> bool:
    """Whether results must not depend on the batch: CPU fp32/fp64 inference (training and bf16 take the fast path)."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def each_row(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply ``function`` to each element of dim 0 separately where rows must not depend on the batch, else to all at once.

    For small inputs: matrix products of few rows, and elementwise functions at the end of a vector, round differently
    depending on the position of a row in the batch.
    """
    if not needs_exact_rows(x) or len(x) == 1:
        return function(x)
    return torch.cat([function(row) for row in x.split(1)])


class RowExactConv2d(nn.Conv2d):
    """``Conv2d`` whose row i is bit-identical for any batch size in CPU fp32 inference.

    CPU convolution kernels choose their algorithm, and so their summation order, by batch size; a matrix product over
    unfolded patches does not. Elsewhere (GPU, bf16, training) this is an ordinary convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not needs_exact_rows(x):
            return super().forward(x)
        kernel, stride, padding = self.kernel_size, self.stride, self.padding
        assert not isinstance(padding, str)
        height = (x.shape[2] + 2 * padding[0] - kernel[0]) // stride[0] + 1
        width = (x.shape[3] + 2 * padding[1] - kernel[1]) // stride[1] + 1
        patches = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2).contiguous()  # (B, H'W', C*k*k)
        y = F.linear(patches, self.weight.flatten(1), self.bias)
        # Plain NCHW: with other strides GroupNorm takes a path that depends on the batch size.
        return y.transpose(1, 2).contiguous().view(x.shape[0], self.out_channels, height, width)


class RowExactLinear(nn.Linear):
    """``Linear`` for inputs with few rows, where the result of CPU kernels depends on the number of rows.

    In CPU fp32 inference each row is multiplied separately; elsewhere it is an ordinary ``Linear``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        return each_row(super().forward, x.flatten(0, -2)).view(*x.shape[:-1], self.out_features)


class RMSNorm(nn.RMSNorm):
    """RMS norm in the precision of its input (under autocast the weight is fp32, which would take a slow path)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ResBlock(nn.Module):
    """Pre-norm residual block of two 3x3 convolutions, optionally modulated by a vector (FiLM).

    The last convolution starts at zero, so that a new block is the identity.
    """

    def __init__(self, channels: int, condition_dim: int | None = None, groups: int = 8) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = RowExactConv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, affine=condition_dim is None)
        self.conv2 = RowExactConv2d(channels, channels, 3, padding=1)
        self.film = None if condition_dim is None else RowExactLinear(condition_dim, 2 * channels)
        nn.init.zeros_(self.conv2.weight)
        if self.conv2.bias is not None:
            nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``x`` (N, C, H, W); ``condition`` (B, F, D) with B*F = N, or None."""
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.film is not None:
            assert condition is not None
            scale, shift = self.film(condition).flatten(0, 1)[:, :, None, None].to(h.dtype).chunk(2, 1)
            h = h * (1 + scale) + shift
        y: Tensor = x + self.conv2(F.silu(h))
        return y
