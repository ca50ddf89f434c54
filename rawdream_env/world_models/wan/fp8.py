"""Eight-bit floating-point matrix products in the transformer's blocks: an opt-in approximation.

Weights are e4m3 with one scale per output channel, activations e4m3 with one dynamic scale per token. On an NVIDIA GPU of
compute capability 8.9 or more the product runs in fp8. Elsewhere both factors are rounded in the same way and multiplied in
the original precision: the loss of accuracy can be measured on any device, without the gain in speed.

Shape letters: M tokens, K in, N out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> e4m3 (M, K) and fp32 scales (M, 1); ``quantised * scale`` is close to ``x``."""
    scale = x.detach().abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


class Float8Linear(nn.Module):
    """A frozen ``Linear`` whose factors are rounded to e4m3."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        rows, scale = quantise(x.reshape(-1, self.in_features))
        if has_fp8(x.device):
            y: Tensor = torch._scaled_mm(
                rows, self.weight.t(), scale_a=scale, scale_b=self.scale.t(), out_dtype=torch.bfloat16
            ).to(x.dtype)
        else:
            y = F.linear((rows.float() * scale).to(x.dtype), (self.weight.float() * self.scale).to(x.dtype))
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def has_fp8(device: torch.device) -> bool:
    """Whether ``device`` multiplies in fp8 (Ada, Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def use_fp8(model: WanWorldModelTransformer) -> int:
    """Replace the linear layers of all blocks in place; returns their number. Call it after ``to``, which would cast the
    weights back.

    Layers whose sizes are not multiples of 16 are not replaced: the hardware cannot multiply them.
    """
    count = 0
    for block in model.blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child.in_features % 16 == 0 and child.out_features % 16 == 0:
                    setattr(parent, name, Float8Linear(child))
                    count += 1
    return count
