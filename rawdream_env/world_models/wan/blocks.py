"""Parts of the Wan transformer: conditions on noise level and action, feed-forward layers, the block.

Module names follow diffusers' ``WanTransformer3DModel``, so that its weights load without conversion.

Shape letters: B batch, F latent frames, P tokens in a frame, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.world_models.wan.attention import KeyValue, Mask, PromptKeys, Rope, WanAttention, WanCrossAttention
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.layers import each_row


def timestep_embedding(noise_level: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of noise levels in [0, 1] (scaled to Wan's 0..1000): (...,) -> (..., dim), cosine first."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=noise_level.device, dtype=torch.float32) / half)
    angles = noise_level.float()[..., None] * 1000 * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


class MLP(nn.Module):
    """Two linear layers, named as in diffusers."""

    def __init__(self, in_dim: int, out_dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.activation = activation
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        y: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return y


class _Projection(nn.Module):
    """Linear layer and tanh-GELU; ``proj`` is diffusers' name."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The feed-forward layers of a block. The ``Identity`` is at the index of diffusers' dropout."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Projection(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = self.net[2](self.net[0](x))
        return y


@dataclass(frozen=True)
class Condition:
    """Conditions of latent frames: ``vector`` (B, F, D) for the ends of the model, ``modulation`` (B, F, 6, D) for the
    blocks. Conditions on time and on action add up; dims of size 1 are broadcast.
    """

    vector: Tensor
    modulation: Tensor

    def __add__(self, other: Condition) -> Condition:
        return Condition(self.vector + other.vector, self.modulation + other.modulation)

    def __getitem__(self, frames: slice) -> Condition:
        return Condition(self.vector[:, frames], self.modulation[:, frames])


class ConditionEmbedder(nn.Module):
    """Embeds noise levels, actions and the prompt for the blocks."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.freq_dim = config.freq_dim
        self.time_embedder = MLP(config.freq_dim, d, nn.SiLU())
        self.time_proj = nn.Linear(d, 6 * d)
        self.text_embedder = MLP(config.text_dim, d, nn.GELU(approximate="tanh")) if config.text_dim else None
        self.action_embedder = MLP(config.condition_dim, d, nn.SiLU())
        self.action_proj = nn.Linear(d, 7 * d)
        nn.init.zeros_(self.action_proj.weight)  # a new action path has no effect
        nn.init.zeros_(self.action_proj.bias)

    def time(self, noise_level: Tensor) -> Condition:
        """``noise_level`` (B, F) in [0, 1]."""
        dtype = self.time_proj.weight.dtype

        def embed(row: Tensor) -> Tensor:
            vector = self.time_embedder(timestep_embedding(row, self.freq_dim).to(dtype))
            return torch.cat([self.time_proj(F.silu(vector)), vector], -1)

        return self._split(each_row(embed, noise_level))

    def action(self, conditions: Tensor) -> Condition:
        """``conditions`` (B, F, condition_dim), normalised."""

        def embed(row: Tensor) -> Tensor:
            out: Tensor = self.action_proj(F.silu(self.action_embedder(row)))
            return out

        return self._split(each_row(embed, conditions.to(self.action_proj.weight.dtype)))

    @staticmethod
    def _split(x: Tensor) -> Condition:
        parts = x.unflatten(-1, (7, -1))
        return Condition(parts[..., 6, :], parts[..., :6, :])


class WanBlock(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; the first and last modulated per latent frame (AdaLN)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.norm1 = nn.LayerNorm(d, eps=config.eps, elementwise_affine=False)
        self.attn1 = WanAttention(config)
        self.attn2 = WanCrossAttention(config) if config.text_dim else None
        self.norm2 = nn.LayerNorm(d, eps=config.eps) if config.text_dim else None
        self.norm3 = nn.LayerNorm(d, eps=config.eps, elementwise_affine=False)
        self.ffn = FeedForward(d, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, d) / d**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Rope,
        mask: Mask,
        context: KeyValue | None,
        prompt: PromptKeys | None,
    ) -> tuple[Tensor, KeyValue]:
        """``x`` (B, F, P, D), ``modulation`` (B, F, 6, D) -> (B, F, P, D) and own keys (not rotated), values."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self._table(modulation, x.dtype)
        h, own = self.attn1((self.norm1(x) * (1 + scale_a) + shift_a).flatten(1, 2), rope, mask, context)
        x = x + h.view(x.shape) * gate_a
        if self.attn2 is not None:
            assert self.norm2 is not None and prompt is not None
            x = self.attn2.add(x.flatten(1, 2), self.norm2, prompt).view(x.shape)
        return x + self.ffn(self.norm3(x) * (1 + scale_f) + shift_f) * gate_f, own

    def keys_values(self, x: Tensor, modulation: Tensor) -> KeyValue:
        """Only this block's keys and values, which is all that a context needs from the last block."""
        shift, scale = self._table(modulation, x.dtype)[:2]
        return self.attn1.project((self.norm1(x) * (1 + scale) + shift).flatten(1, 2))

    def _table(self, modulation: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (modulation + self.scale_shift_table)[:, :, :, None].to(dtype).unbind(2)
