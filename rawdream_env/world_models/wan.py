"""The action-conditioned, block-causal Wan diffusion transformer (paper section 3.1).

One implementation, two sizes: ``wan2.1-1.3b`` is the paper's, ``embedded`` the small one that ships with the package.
Module names follow diffusers' ``WanTransformer3DModel``. What is added to Wan 2.1:

- per-frame timesteps: each latent frame has its own noise level, so clean context and noisy targets share one pass;
- actions by AdaLN: an MLP over the actions of a latent frame is added to the timestep modulation of every block;
- block-causal attention: full inside a latent frame, causal across frames;
- optional levers of the embedded size: a convolutional stem, the arm map and the last context frame as extra input
  channels, and the clean sample predicted as a residual over that last frame.

Shape letters: B batch, F latent frames, C latent channels, H W latent height and width, P tokens in a frame, D width,
N heads, S noise level in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.world_models.layers import ResBlock, RowExactConv2d, RowExactLinear

MOTION_CHANNELS = 4
"""The tool's motion since the last context frame: u, v in latent cells at a latent's first and last video frame."""
KeyValues = list[tuple[Tensor, Tensor]]
"""Per block: keys and values (B, N, F*P, D/N), rotated."""


@dataclass(frozen=True)
class WanConfig:
    """Architecture of the world-model transformer; the defaults are the ``embedded`` size."""

    latent_shape: tuple[int, int, int] = (16, 8, 8)
    """C, H, W of a latent frame."""
    num_layers: int = 6
    """Transformer blocks."""
    num_attention_heads: int = 4
    """Attention heads N."""
    attention_head_dim: int = 64
    """Width of a head; D = heads * head width."""
    ffn_dim: int = 1024
    """Hidden width of the feed-forward layers."""
    patch_size: int = 2
    """Spatial patch; the temporal patch is always 1."""
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    action_dim: int = 7
    """Action dimensions A."""
    actions_per_latent: int = 4
    """Actions, and video frames, that one latent frame covers."""
    pose_dim: int = 7
    """Commanded-pose dimensions added to the action condition; 0 for actions alone, as in the paper."""
    arm_map_channels: int = 0
    """Channels of the arm map at latent resolution, per latent frame; 0 for none."""
    carry: bool = False
    """Show each new frame the last context frame shifted with the tool, to its first and last video frame, beside the
    shift itself (4 more map channels, then 2 C of picture); needs the arm map and ``residual``."""
    stem_channels: int = 96
    """Width of the convolutional stem and head; 0 for Wan's plain patch embedding."""
    stem_blocks: int = 2
    """Residual blocks of the stem."""
    head_blocks: int = 3
    """Residual blocks of the head."""
    context_latents: int = 6
    """Most recent latent frames in the context, besides the anchor."""
    chunk_latents: int = 2
    """Latent frames imagined per action chunk (G in the paper)."""
    residual: bool = True
    """Predict the clean sample as a residual over the last context frame, which is also given as input channels;
    False predicts the velocity, as Wan does."""
    eps: float = 1e-6
    """Epsilon of the normalisations."""

    @property
    def width(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def condition_dim(self) -> int:
        """Numbers in a latent frame's action condition."""
        return self.actions_per_latent * (self.action_dim + self.pose_dim)

    @property
    def map_channels(self) -> int:
        """Channels of the map tensor: the arm map and, with ``carry``, the tool's motion."""
        return self.arm_map_channels + (MOTION_CHANNELS if self.carry else 0)

    @property
    def chunk_len(self) -> int:
        """Actions in a chunk K."""
        return self.chunk_latents * self.actions_per_latent

    @property
    def tokens_per_frame(self) -> int:
        """P."""
        return (self.latent_shape[1] // self.patch_size) * (self.latent_shape[2] // self.patch_size)


def shifted(pictures: Tensor, motion: Tensor) -> Tensor:
    """Move (B, F, C, H, W) by (u, v) cells, ``motion`` (B, F, 2); bilinear, zeros come in at the border."""
    b, f, _, h, w = pictures.shape
    rows = (torch.arange(h, device=pictures.device) * 2 + 1) / h - 1
    cols = (torch.arange(w, device=pictures.device) * 2 + 1) / w - 1
    grid = torch.stack(torch.meshgrid(cols, rows, indexing="xy"), -1)
    scale = torch.tensor([2 / w, 2 / h], device=pictures.device)
    grid = grid - (motion.float() * scale).view(b * f, 1, 1, 2)
    moved = F.grid_sample(pictures.flatten(0, 1).float(), grid, align_corners=False)
    return moved.view(pictures.shape).to(pictures.dtype)


def timestep_embedding(noise_level: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of noise levels in [0, 1] (scaled to Wan's 0..1000): (...,) -> (..., dim), cosine first."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=noise_level.device, dtype=torch.float32) / half)
    angles = noise_level.float()[..., None] * 1000 * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


def rope_tables(frames: Tensor, grid: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor]:
    """Wan's 3-D rotary tables. ``frames`` (F,) integer times -> cos, sin (F*P, head_dim/2), time, row, column."""
    dim_hw = 2 * (head_dim // 6)
    dims = (head_dim - 2 * dim_hw, dim_hw, dim_hw)
    rows, cols = torch.arange(grid[0], device=frames.device), torch.arange(grid[1], device=frames.device)
    positions = torch.meshgrid(frames, rows, cols, indexing="ij")
    angles = []
    for position, dim in zip(positions, dims, strict=True):
        freqs = 1.0 / 10000 ** (torch.arange(0, dim, 2, device=frames.device, dtype=torch.float64) / dim)
        angles.append(position.reshape(-1, 1).double() * freqs)
    table = torch.cat(angles, -1)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring pairs of the last dim: (B, N, L, Dh) with tables (L, Dh/2)."""
    cos, sin = rope[0].to(x.dtype), rope[1].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def frame_mask(visible: Tensor, tokens: int) -> Tensor:
    """Frame-level (Fq, Fk) visibility -> token-level (Fq*P, Fk*P) boolean attention mask."""
    return visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


class RMSNorm(nn.RMSNorm):
    """RMS norm in the precision of its input (under autocast the weight is fp32, which would take a slow path)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class WanAttention(nn.Module):
    """Self-attention with RMS-normalised queries and keys (over the whole width, as in Wan) and rotary positions."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.to_out = nn.ModuleList([nn.Linear(d, d)])
        self.norm_q, self.norm_k = RMSNorm(d, eps=config.eps), RMSNorm(d, eps=config.eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        context: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, L, D) -> (B, L, D) and this pass's own keys, values. ``context`` keys and values come first."""
        b, n, d = x.shape
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x)), self.to_v(x)
        q, k, v = (t.view(b, n, self.heads, d // self.heads).transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, rope).to(v.dtype), rotate(k, rope).to(v.dtype)
        own = (k, v)
        if context is not None:
            k, v = torch.cat([context[0], k], 2), torch.cat([context[1], v], 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](out.transpose(1, 2).reshape(b, n, d)), own


class WanBlock(nn.Module):
    """Self-attention and feed-forward, each modulated per latent frame by timestep and action (AdaLN)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.norm1 = nn.LayerNorm(d, eps=config.eps, elementwise_affine=False)
        self.attn1 = WanAttention(config)
        self.norm3 = nn.LayerNorm(d, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(d, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, d)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(6, d) / d**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        context: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``x`` (B, F, P, D), ``modulation`` (B, F, 6, D) -> (B, F, P, D) and own keys, values."""
        table = (modulation + self.scale_shift_table)[:, :, :, None].to(x.dtype)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unbind(2)
        h = self.norm1(x) * (1 + scale_a) + shift_a
        h, own = self.attn1(h.flatten(1, 2), rope, mask, context)
        x = x + h.view(x.shape) * gate_a
        h = self.norm3(x) * (1 + scale_f) + shift_f
        return x + self.ffn(h) * gate_f, own


class ConditionEmbedder(nn.Module):
    """Noise level and action of each latent frame -> condition vector (B, F, D) and modulation (B, F, 6, D)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.freq_dim = config.freq_dim
        self.time_embedder = nn.Sequential(RowExactLinear(config.freq_dim, d), nn.SiLU(), RowExactLinear(d, d))
        self.time_proj = RowExactLinear(d, 6 * d)
        self.action_embedder = nn.Sequential(RowExactLinear(config.condition_dim, d), nn.SiLU(), RowExactLinear(d, d))
        self.action_proj = RowExactLinear(d, 6 * d)
        nn.init.zeros_(
            self.action_proj.weight
        )  # a new action path changes nothing: step 0 equals the pre-trained model
        nn.init.zeros_(self.action_proj.bias)

    def forward(self, noise_level: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """``noise_level`` (B, F) in [0, 1]; ``conditions`` (B, F, condition_dim), normalised."""
        dtype = self.time_proj.weight.dtype
        time = self.time_embedder(timestep_embedding(noise_level, self.freq_dim).to(dtype))
        action = F.silu(self.action_embedder(conditions.to(dtype)))
        modulation = self.time_proj(F.silu(time)) + self.action_proj(action)
        return time + action, modulation.unflatten(-1, (6, -1))


class WanWorldModelTransformer(nn.Module):
    """Denoises latent frames given earlier ones, actions and noise levels.

    ``embed`` -> ``run_blocks`` -> ``predict`` are separate so that a rollout computes the context's keys and values
    once per chunk and only the new frames at each evaluation of the sampler.
    """

    def __init__(self, config: WanConfig = WanConfig()) -> None:
        super().__init__()
        self.config = config
        c, h, w = config.latent_shape
        d, p = config.width, config.patch_size
        if h % p or w % p:
            raise ValueError(f"latent_shape {config.latent_shape} is not a multiple of patch_size {p}")
        if config.carry and not (config.residual and config.arm_map_channels):
            raise ValueError("carry shifts the last context frame with the arm: it needs residual and arm_map_channels")
        channels = c * (2 if config.residual else 1) + config.map_channels + (2 * c if config.carry else 0)
        s = config.stem_channels
        self.condition_embedder = ConditionEmbedder(config)
        self.stem_in = RowExactConv2d(channels, s, 3, padding=1) if s else None
        self.stem = nn.ModuleList([ResBlock(s, d) for _ in range(config.stem_blocks if s else 0)])
        self.patch_embedding = RowExactConv2d(s or channels, d, p, stride=p)
        self.blocks = nn.ModuleList([WanBlock(config) for _ in range(config.num_layers)])
        self.norm_out = nn.LayerNorm(d, eps=config.eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, d) / d**0.5)
        self.proj_out = nn.Linear(d, p * p * (s or c))
        self.head = nn.ModuleList([ResBlock(s, d) for _ in range(config.head_blocks if s else 0)])
        self.head_norm = nn.GroupNorm(8, s) if s else None
        self.head_out = RowExactConv2d(s, c, 3, padding=1) if s else None
        if self.head_out is not None:
            nn.init.zeros_(self.head_out.weight)
            assert self.head_out.bias is not None
            nn.init.zeros_(self.head_out.bias)

    def embed(
        self, latents: Tensor, base: Tensor | None, arm_map: Tensor | None, noise_level: Tensor, conditions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of F frames -> tokens (B, F, P, D), stem features (B*F, s, H, W), condition (B, F, D), modulation.

        ``latents`` (B, F, C, H, W); ``base`` the last context frame for frames to be imagined, zeros for context
        frames; ``arm_map`` (B, F, map_channels, H, W); ``noise_level`` (B, F); ``conditions`` (B, F, condition_dim).
        """
        b, f = latents.shape[:2]
        vector, modulation = self.condition_embedder(noise_level, conditions)
        parts = [latents]
        if self.config.residual:
            parts.append(torch.zeros_like(latents) if base is None else base)
        if self.config.arm_map_channels:
            assert arm_map is not None
            parts.append(arm_map.to(latents.dtype))
        if self.config.carry:
            assert arm_map is not None
            motion = arm_map[:, :, self.config.arm_map_channels :, 0, 0]
            parts += [shifted(parts[1], motion[..., :2]), shifted(parts[1], motion[..., 2:])]
        x = torch.cat(parts, 2).flatten(0, 1).to(self.patch_embedding.weight.dtype)
        if x.dtype != torch.float32 or torch.is_grad_enabled():
            x = x.contiguous(memory_format=torch.channels_last)
        if self.stem_in is not None:
            x = self.stem_in(x)
            for block in self.stem:
                x = block(x, vector)
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)
        return tokens.reshape(b, f, -1, tokens.shape[-1]), x, vector, modulation

    def run_blocks(
        self,
        tokens: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        context: KeyValues | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """All blocks over (B, F, P, D); returns features and each block's own keys and values."""
        caches: KeyValues = []
        for i, block in enumerate(self.blocks):
            tokens, own = block(tokens, modulation, rope, mask, None if context is None else context[i])
            caches.append(own)
        return tokens, caches

    def predict(self, tokens: Tensor, stem: Tensor, vector: Tensor, base: Tensor | None) -> Tensor:
        """Features of F frames -> clean-sample estimate (``residual``) or velocity, fp32 (B, F, C, H, W)."""
        c, h, w = self.config.latent_shape
        p = self.config.patch_size
        b, f = tokens.shape[:2]
        shift, scale = (vector[:, :, None] + self.scale_shift_table).to(tokens.dtype).chunk(2, 2)
        x = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        x = x.reshape(b * f, h // p, w // p, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(b * f, -1, h, w)
        if self.head_out is not None:
            assert self.head_norm is not None
            if x.dtype != torch.float32 or torch.is_grad_enabled():
                x = x.contiguous(memory_format=torch.channels_last)
            x = x + stem
            for block in self.head:
                x = block(x, vector)
            x = self.head_out(F.silu(self.head_norm(x)))
        out: Tensor = x.float().reshape(b, f, c, h, w)
        return out if base is None or not self.config.residual else base.float() + out
