"""The action-conditioned, block-causal Wan diffusion transformer (paper section 3.1).

One implementation, two sizes: ``wan2.1-1.3b`` is the paper's, ``embedded`` the small one that ships with the package.
Module names follow diffusers' ``WanTransformer3DModel``. What is added to Wan 2.1:

- per-frame timesteps: each latent frame has its own noise level, so clean context and noisy targets share one pass;
- actions by AdaLN: an MLP over the actions of a latent frame is added to the timestep modulation of every block;
- block-causal attention: full inside a latent frame, causal across frames;
- optional levers of the embedded size: a convolutional stem, the arm map and the last context frame as extra input
  channels, and the clean sample predicted as a residual over that last frame.

The action path starts at zero: with pre-trained weights, full attention and one noise level for all frames the model is
Wan 2.1 itself.

Shape letters: B batch, F latent frames, C latent channels, H W latent height and width, P tokens in a frame, D width,
N heads, U different prompt rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.world_models.pretrained import (
    dataclass_from_json,
    find_folder,
    load_pretrained,
    read_config,
    write_pretrained,
)
from rawdream_env.world_models.wan.attention import (
    KeyValue,
    KeyValues,
    Mask,
    PromptKeys,
    Rope,
    WanAttention,
    WanCrossAttention,
    collapse_prompt,
    frame_mask,
    rope_tables,
)
from rawdream_env.world_models.wan.config import PROMPT_ROWS, WanConfig
from rawdream_env.world_models.wan.layers import ResBlock, RowExactConv2d, each_row


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
    """The feed-forward layers of a block (diffusers keeps a dropout, of no effect, between the two)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Projection(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = self.net[2](self.net[0](x))
        return y


@dataclass(frozen=True)
class Condition:
    """What conditions latent frames: ``vector`` (B, F, D) for the ends of the model, ``modulation`` (B, F, 6, D) for the
    blocks. Conditions on time and on action add up; dims of size 1 are broadcast.
    """

    vector: Tensor
    modulation: Tensor

    def __add__(self, other: Condition) -> Condition:
        return Condition(self.vector + other.vector, self.modulation + other.modulation)

    def __getitem__(self, frames: slice) -> Condition:
        return Condition(self.vector[:, frames], self.modulation[:, frames])


class ConditionEmbedder(nn.Module):
    """Noise levels, actions and the prompt -> what the blocks take."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.freq_dim = config.freq_dim
        self.time_embedder = MLP(config.freq_dim, d, nn.SiLU())
        self.time_proj = nn.Linear(d, 6 * d)
        self.text_embedder = MLP(config.text_dim, d, nn.GELU(approximate="tanh")) if config.text_dim else None
        self.action_embedder = MLP(config.condition_dim, d, nn.SiLU())
        self.action_proj = nn.Linear(d, 7 * d)
        nn.init.zeros_(self.action_proj.weight)  # a new action path changes nothing
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
        """Own keys and values alone: all that the last block owes to a context."""
        shift, scale = self._table(modulation, x.dtype)[:2]
        return self.attn1.project((self.norm1(x) * (1 + scale) + shift).flatten(1, 2))

    def _table(self, modulation: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (modulation + self.scale_shift_table)[:, :, :, None].to(dtype).unbind(2)


class WanWorldModelTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Denoises latent frames given earlier ones, actions and noise levels.

    ``embed`` -> ``run_blocks`` -> ``predict`` are separate so that a rollout computes the context's keys and values
    once per chunk and only the new frames at each evaluation of the sampler; ``forward`` is all of it in one pass.

    A ``ModelMixin`` of diffusers: ``from_pretrained``, ``save_pretrained``, ``enable_gradient_checkpointing``. ``arch``
    is its ``WanConfig``; ``config`` is the same as diffusers keeps it.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["WanBlock"]

    def __init__(self, config: WanConfig | None = None) -> None:
        super().__init__()
        config = WanConfig() if config is None else config
        config.check()
        self.register_to_config(**asdict(config))
        self.arch = config
        self.gradient_checkpointing = False
        c = config.latent_shape[0]
        d, p = config.width, config.patch_size
        channels = c * (2 if config.residual else 1) + config.map_channels + (2 * c if config.warp_last_frame else 0)
        s = config.stem_channels
        self.condition_embedder = ConditionEmbedder(config)
        self.stem_in = RowExactConv2d(channels, s, 3, padding=1) if s else None
        self.stem = nn.ModuleList([ResBlock(s, d) for _ in range(config.stem_blocks if s else 0)])
        self.patch_embedding = RowExactConv2d(s or channels, d, p, stride=p)
        self.blocks: Any = nn.ModuleList([WanBlock(config) for _ in range(config.num_layers)])
        self.norm_out = nn.LayerNorm(d, eps=config.eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, d) / d**0.5)
        self.proj_out = nn.Linear(d, p * p * (s or c))
        self.head = nn.ModuleList([ResBlock(s, d) for _ in range(config.head_blocks if s else 0)])
        self.head_norm = nn.GroupNorm(8, s) if s else None
        self.head_out = RowExactConv2d(s, c, 3, padding=1) if s else None
        if self.head_out is not None:
            nn.init.zeros_(self.head_out.weight)
            assert self.head_out.bias is not None
            nn.init.zeros_(self.head_out.bias)
        if config.text_dim:
            self.register_buffer("prompt_rows", torch.zeros(config.text_rows, config.text_dim))
            self.register_buffer("prompt_counts", torch.full((config.text_rows,), PROMPT_ROWS // config.text_rows))
        self.prompt_rows: Tensor
        self.prompt_counts: Tensor

    def to(self, *args: Any, **kwargs: Any) -> WanWorldModelTransformer:
        """As of any module; diffusers' own warns of modules that it would rather keep in fp32, of which there are none."""
        nn.Module.to(self, *args, **kwargs)
        return self

    def set_prompt(self, embeds: Tensor) -> None:
        """Fix the prompt: its text embedding (L, text_dim) with Wan's padding; ``text_rows`` different rows.

        ``ValueError`` when the number of different rows is not the configured one.
        """
        rows, counts = collapse_prompt(embeds)
        if rows.shape != self.prompt_rows.shape:
            raise ValueError(
                f"the prompt embedding has {len(rows)} different rows of width {rows.shape[1]}, but the model is "
                f"configured for {tuple(self.prompt_rows.shape)}; set text_rows={len(rows)}."
            )
        self.prompt_rows.copy_(rows)
        self.prompt_counts.copy_(counts)

    def prompt_keys(self) -> Sequence[PromptKeys | None]:
        """What each block's cross-attention reads, from the fixed prompt; constant while the weights are."""
        embedder = self.condition_embedder.text_embedder
        if embedder is None:
            return [None] * len(self.blocks)
        rows = embedder(self.prompt_rows.to(self.proj_out.weight.dtype))
        return [block.attn2.prepare(rows, self.prompt_counts) for block in self.blocks]

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that cannot have a gradient: queries and keys of an attention to a single prompt row."""
        if not self.arch.text_dim or self.arch.text_rows > 1:
            return []
        parts = [[b.norm2, b.attn2.to_q, b.attn2.to_k, b.attn2.norm_q, b.attn2.norm_k] for b in self.blocks]
        return [parameter for block in parts for module in block for parameter in module.parameters()]

    def forward(
        self,
        latents: Tensor,
        noise_level: Tensor,
        conditions: Tensor,
        arm_map: Tensor | None = None,
        base: Tensor | None = None,
        times: Tensor | None = None,
        *,
        causal: bool = True,
    ) -> Tensor:
        """All frames in one pass: what ``predict`` returns, (B, F, C, H, W).

        ``latents``, ``noise_level``, ``conditions``, ``arm_map`` and ``base`` as for ``embed``; ``times`` (F,) or (B, F)
        positions of the frames, 0, 1, 2, ... by default; ``causal=False`` lets every frame see every other, as in Wan.
        """
        f, device, arch = latents.shape[1], latents.device, self.arch
        if times is None:
            times = torch.arange(f, device=device)
        if times.dim() == 1:
            rope = rope_tables(times, arch.grid, arch.attention_head_dim)
        else:
            tables = [rope_tables(row, arch.grid, arch.attention_head_dim) for row in times]
            rope = (torch.stack([t[0] for t in tables])[:, None], torch.stack([t[1] for t in tables])[:, None])
        visible = torch.ones(f, f, dtype=torch.bool)
        mask = frame_mask(visible.tril() if causal else visible, arch.tokens_per_frame, device)
        condition = self.condition_embedder.time(noise_level) + self.condition_embedder.action(conditions)
        tokens, stem = self.embed(latents, base, arm_map, condition)
        tokens, _ = self.run_blocks(tokens, condition, rope, mask, keep=False)
        return self.predict(tokens, stem, condition, base)

    def embed(
        self, latents: Tensor, base: Tensor | None, arm_map: Tensor | None, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """Inputs of F frames -> tokens (B, F, P, D) and stem features (B*F, s, H, W).

        ``latents`` (B, F, C, H, W); ``base`` the last context frame for frames to be imagined, zeros for context
        frames; ``arm_map`` (B, F, map_channels, H, W).
        """
        b, f = latents.shape[:2]
        parts = [latents]
        if self.arch.residual:
            parts.append(torch.zeros_like(latents) if base is None else base)
        if self.arch.arm_map_channels:
            assert arm_map is not None
            parts.append(arm_map.to(latents.dtype))
        if self.arch.warp_last_frame:
            assert arm_map is not None
            motion = arm_map[:, :, self.arch.arm_map_channels :, 0, 0]
            parts += [shifted(parts[1], motion[..., :2]), shifted(parts[1], motion[..., 2:])]
        x = torch.cat(parts, 2).flatten(0, 1).to(self.patch_embedding.weight.dtype)
        if x.dtype != torch.float32 or torch.is_grad_enabled():
            x = x.contiguous(memory_format=torch.channels_last)
        if self.stem_in is not None:
            x = self.stem_in(x)
            for block in self.stem:
                x = block(x, condition.vector)
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()  # a linear layer sums others otherwise
        return tokens.reshape(b, f, -1, tokens.shape[-1]), x

    def run_blocks(
        self,
        tokens: Tensor,
        condition: Condition,
        rope: Rope,
        mask: Mask,
        context: KeyValues | None = None,
        prompt: Sequence[PromptKeys | None] | None = None,
        *,
        keys_only: bool = False,
        keep: bool = True,
    ) -> tuple[Tensor, KeyValues]:
        """All blocks over (B, F, P, D); returns features and each block's own keys (not rotated) and values.

        ``context``: rotated keys and values that come first; ``prompt``: ``prompt_keys()`` when already known.
        ``keys_only`` stops in the last block once its keys and values are there; the features are then of no use.
        ``keep=False`` returns no keys and values, which would fill the memory for nothing.
        """
        caches: KeyValues = []
        prompt = self.prompt_keys() if prompt is None else prompt
        for i, block in enumerate(self.blocks):
            if keys_only and i + 1 == len(self.blocks):
                caches.append(block.keys_values(tokens, condition.modulation))
                break
            inputs = (tokens, condition.modulation, rope, mask, None if context is None else context[i], prompt[i])
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens, own = self._gradient_checkpointing_func(block, *inputs)
            else:
                tokens, own = block(*inputs)
            if keep:
                caches.append(own)
        return tokens, caches

    def predict(self, tokens: Tensor, stem: Tensor, condition: Condition, base: Tensor | None) -> Tensor:
        """Features of F frames -> clean-sample estimate (``residual``) or velocity, fp32 (B, F, C, H, W)."""
        c, h, w = self.arch.latent_shape
        p = self.arch.patch_size
        b, f = tokens.shape[:2]
        shift, scale = (condition.vector[:, :, None] + self.scale_shift_table).to(tokens.dtype).chunk(2, 2)
        x = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        x = x.reshape(b * f, h // p, w // p, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(b * f, -1, h, w)
        if self.head_out is not None:
            assert self.head_norm is not None
            if x.dtype != torch.float32 or torch.is_grad_enabled():
                x = x.contiguous(memory_format=torch.channels_last)
            x = x + stem
            for block in self.head:
                x = block(x, condition.vector)
            x = self.head_out(F.silu(self.head_norm(x)))
        out: Tensor = x if x.dtype == torch.float64 else x.float()
        out = out.reshape(b, f, c, h, w)
        return out if base is None or not self.arch.residual else base.to(out.dtype) + out

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> WanWorldModelTransformer:
        """A model with random weights from what ``config.json`` holds."""
        values = {k: v for k, v in {**dict(config or {}), **kwargs}.items() if not k.startswith("_")}
        if "carry" in values:  # the name of earlier versions
            values["warp_last_frame"] = values.pop("carry")
        return cls(dataclass_from_json(WanConfig, values, "the transformer's configuration"))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> WanWorldModelTransformer:
        """Load a folder written by ``save_pretrained``, or a repository of a model hub, strictly and wholly.

        ``torch_dtype`` chooses the precision (fp32 by default); ``subfolder``, ``revision`` and ``local_files_only`` as in
        diffusers. ``CheckpointError`` names every tensor that does not fit; nothing is loaded then.
        """
        dtype = kwargs.pop("torch_dtype", torch.float32)
        path = find_folder(folder, **kwargs)
        with torch.device("meta"):  # neither memory nor random numbers for weights that are about to be replaced
            model = cls.from_config(read_config(path, cls.__name__))
        load_pretrained(model, path)
        model.to(dtype).eval()
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, half: bool = False, **kwargs: Any) -> None:
        """Write ``config.json`` and ``diffusion_pytorch_model.safetensors`` (sharded when large); ``half`` stores fp16.

        Files are replaced whole, the configuration last.
        """
        write_pretrained(self, Path(save_directory), half=half, **kwargs)
