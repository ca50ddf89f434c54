"""Attention of the world-model transformer: block-causal over latent frames, rotary in time, row and column.

Module names follow diffusers' ``WanTransformer3DModel``. ``WanAttention.project`` returns keys that are normalised but not
rotated, so that a cache can be read at other positions than it was written at.

The prompt of a world model is fixed, so the inputs of Wan's cross-attention are known in advance. Equal rows are merged: n
equal keys have the weight of one key whose score is raised by log(n), which is exact. Wan pads every prompt to 512 rows and
does not mask the padding: an empty prompt has two different rows, an all-zero prompt has one, and its attention is a
constant per layer, independent of the query.

Shape letters: B batch, F latent frames, P tokens in a frame, L = F P tokens, D width, N heads, U different prompt rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.layers import RMSNorm

KeyValue = tuple[Tensor, Tensor]
"""Keys and values (B, N, L, D/N)."""
KeyValues = list[KeyValue]
"""One ``KeyValue`` per block."""
Rope = tuple[Tensor, Tensor]
"""cos and sin, each (L, D/N/2) or broadcastable to (B, N, L, D/N/2)."""
Mask = Tensor | BlockMask | None
"""Visible keys: boolean (..., Lq, Lk), a FlexAttention block mask, or None for all."""
PromptKeys = Tensor | tuple[Tensor, Tensor, Tensor]
"""The prompt in a block's cross-attention: keys, values (N, U, D/N) and log counts (1, U); or, for a single row, the
constant (D,) that it adds."""

_FLEX_BLOCK = 128


def rope_tables(frames: Tensor, grid: tuple[int, int], head_dim: int) -> Rope:
    """Wan's 3-D rotary tables over time, row and column: ``frames`` (F,) integer times -> cos, sin (F*P, head_dim/2)."""
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


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate neighbouring pairs of the last dim: (B, N, L, Dh) with tables (L, Dh/2)."""
    cos, sin = rope[0].to(x.dtype), rope[1].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def token_mask(visible: Tensor, tokens: int) -> Tensor:
    """Frame-level (Fq, Fk) visibility -> token-level (Fq*P, Fk*P) boolean attention mask."""
    return visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


@lru_cache(maxsize=64)
def _block_mask(visible: tuple[tuple[bool, ...], ...], tokens: int, device: str) -> BlockMask:
    table = torch.tensor(visible, device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[query // tokens, key // tokens]

    lengths = len(visible) * tokens, len(visible[0]) * tokens
    return create_block_mask(sees, None, None, *lengths, device=device, BLOCK_SIZE=_FLEX_BLOCK)


def frame_mask(visible: Tensor, tokens: int, device: torch.device, *, flex: bool | None = None) -> Mask:
    """The attention mask of frame-level visibility (Fq, Fk), in the form that is fastest on ``device``.

    On a CPU the mask is always dense, so that results do not depend on which frames share a call. On a GPU it is None when
    everything is visible, a FlexAttention block mask when a frame is a multiple of the block size (256 tokens are), and
    dense otherwise. ``flex`` overrides the choice.
    """
    if flex is None:
        if device.type != "cpu" and bool(visible.all()):
            return None
        flex = device.type == "cuda" and tokens % _FLEX_BLOCK == 0
    if not flex:
        return token_mask(visible.to(device), tokens)
    return _block_mask(tuple(map(tuple, visible.tolist())), tokens, str(device))


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Scaled dot-product attention (B, N, Lq, Dh) under ``mask``; FlexAttention for a block mask."""
    if not isinstance(mask, BlockMask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    compiled = q.device.type == "cuda" and not torch.compiler.is_compiling()  # a compiled caller compiles it too
    flex = _compiled_flex() if compiled else flex_attention
    out: Tensor = flex(q, k, v, block_mask=mask)
    return out


class WanAttention(nn.Module):
    """Self-attention with RMS-normalised queries and keys (over the whole width, as in Wan) and rotary positions."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.to_out = nn.ModuleList([nn.Linear(d, d)])
        self.norm_q, self.norm_k = RMSNorm(d, eps=config.eps), RMSNorm(d, eps=config.eps)

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        return heads

    def project(self, x: Tensor) -> KeyValue:
        """(B, L, D) -> keys (normalised, not rotated) and values (B, N, L, Dh)."""
        return self._split(self.norm_k(self.to_k(x))), self._split(self.to_v(x))

    def forward(self, x: Tensor, rope: Rope, mask: Mask, context: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """(B, L, D) -> (B, L, D) and this pass's own keys (not rotated) and values. ``context`` holds rotated keys and
        values that come first.
        """
        own = self.project(x)
        q = self._split(self.norm_q(self.to_q(x)))
        k, v = own
        q, k = rotate(q, rope).to(v.dtype), rotate(k, rope).to(v.dtype)
        if context is not None:
            k, v = torch.cat([context[0], k], 2), torch.cat([context[1], v], 2)
        out = attend(q, k, v, mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2)), own


class WanCrossAttention(WanAttention):
    """Attention to the different rows of the prompt, each with the weight of the rows it replaces."""

    def prepare(self, rows: Tensor, counts: Tensor) -> PromptKeys:
        """Embedded rows (U, D) and their counts, integers (U,) -> the argument ``prompt`` of ``add``."""
        if len(rows) == 1:
            constant: Tensor = self.to_out[0](self.to_v(rows))[0]
            return constant
        k, v = self.project(rows)
        exact = torch.float64 if k.dtype == torch.float64 else torch.float32  # bfloat16 rounds 511 to 512
        return k, v, counts.to(exact).log()[None]

    def add(self, x: Tensor, normed: nn.Module, prompt: PromptKeys) -> Tensor:
        """(B, L, D) -> ``x`` plus its attention to the prompt; ``normed`` is the norm of the queries."""
        if isinstance(prompt, Tensor):
            return x + prompt.to(x.dtype)
        k, v, log_counts = prompt
        q = self._split(self.norm_q(self.to_q(normed(x))))
        if q.dtype == log_counts.dtype:
            size = (len(x), -1, -1, -1)
            out = F.scaled_dot_product_attention(q, k.expand(size), v.expand(size), log_counts)
        else:  # the kernel would round the counts; with few rows the explicit form is cheap
            scores = (q @ k.to(q.dtype).transpose(-1, -2)).float() / q.shape[-1] ** 0.5 + log_counts
            out = scores.softmax(-1).to(q.dtype) @ v.to(q.dtype)
        y: Tensor = x + self.to_out[0](out.transpose(1, 2).flatten(2))
        return y


def collapse_prompt(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """A prompt's embedding (L, text_dim), padding included -> its different rows (U, text_dim) and counts (U,).

    Attention does not depend on the order of keys.
    """
    rows, counts = torch.unique(embeds, dim=0, return_counts=True)
    return rows, counts
