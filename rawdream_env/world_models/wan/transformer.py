"""The action-conditioned, block-causal Wan diffusion transformer (paper section 3.1).

One implementation, two sizes: ``wan2.1-1.3b`` is the paper's, ``embedded`` the bundled one. Module names follow diffusers'
``WanTransformer3DModel``. Additions to Wan 2.1:

- per-frame timesteps: each latent frame has its own noise level, so clean context and noisy targets share one pass;
- actions by AdaLN: an MLP over the actions of a latent frame is added to the timestep modulation of every block;
- block-causal attention: full inside a latent frame, causal across frames;
- options of the embedded size: a convolutional stem, the arm map and the last context frame as extra input
  channels, and the clean sample predicted as a residual over that last frame.

The action path starts at zero: with pre-trained weights, full attention and one noise level for all frames, the model
computes what Wan 2.1 does.

Shape letters: B batch, F latent frames, C latent channels, H W latent height and width, P tokens in a frame, D width,
N heads, U different prompt rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.world_models.pretrained import (
    dataclass_from_json,
    find_folder,
    load_pretrained,
    read_config,
    write_pretrained,
)
from rawdream_env.world_models.wan.attention import (
    KeyValues,
    Mask,
    PromptKeys,
    Rope,
    collapse_prompt,
    frame_mask,
    rope_tables,
)
from rawdream_env.world_models.wan.blocks import Condition, ConditionEmbedder, WanBlock
from rawdream_env.world_models.wan.config import PROMPT_ROWS, WanConfig
from rawdream_env.world_models.wan.layers import ResBlock, RowExactConv2d


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


class WanWorldModelTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Denoises latent frames given earlier ones, actions and noise levels.

    ``embed`` -> ``run_blocks`` -> ``predict`` are separate so that a rollout computes the context's keys and values once per
    chunk, and only the new frames at each evaluation of the sampler. ``forward`` runs all three in one pass.

    A ``ModelMixin`` of diffusers: ``from_pretrained``, ``save_pretrained``, ``enable_gradient_checkpointing``. ``arch``
    is its ``WanConfig``; ``config`` is diffusers' copy of it.
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
        """As for any module. diffusers' version warns about modules to keep in fp32; there are none."""
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
        """Inputs of each block's cross-attention from the fixed prompt; constant for given weights."""
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
        positions of the frames, 0, 1, 2, ... by default; ``causal=False``: every frame attends to every other, as in Wan.
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
        tokens = (
            self.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
        )  # other strides change the summation order
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

        ``context``: rotated keys and values that come first; ``prompt``: the result of ``prompt_keys()``, when it is known.
        ``keys_only``: stop after the keys and values of the last block; the features are then not usable.
        ``keep=False``: return no keys and values, to save memory.
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
        """A model with random weights from the content of ``config.json``."""
        values = {k: v for k, v in {**dict(config or {}), **kwargs}.items() if not k.startswith("_")}
        if "carry" in values:  # the name of earlier versions
            values["warp_last_frame"] = values.pop("carry")
        arch = dataclass_from_json(WanConfig, values, "the transformer's configuration")
        try:
            return cls(arch)
        except InvalidOptionError as error:
            raise CheckpointError(f"the transformer's configuration cannot be used: {error}") from error

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> WanWorldModelTransformer:
        """Load a folder written by ``save_pretrained``, or a repository of a model hub, strictly and completely.

        ``torch_dtype`` chooses the precision (fp32 by default); ``subfolder``, ``revision`` and ``local_files_only`` as in
        diffusers. ``CheckpointError`` names every tensor that does not fit; nothing is loaded then.
        """
        dtype = kwargs.pop("torch_dtype", torch.float32)
        path = find_folder(folder, **kwargs)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced below
            model: WanWorldModelTransformer = _from_config(cls, path)
        load_pretrained(model, path)
        model.to(dtype).eval()
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, half: bool = False, **kwargs: Any) -> None:
        """Write ``config.json`` and ``diffusion_pytorch_model.safetensors`` (sharded when large); ``half`` stores fp16.

        Files are replaced whole, the configuration last.
        """
        write_pretrained(self, Path(save_directory), half=half, **kwargs)


def _from_config(cls: Any, folder: Path) -> Any:
    """The model that a folder's configuration describes; ``CheckpointError`` for sizes that no layer can have."""
    config = read_config(folder, cls.__name__)
    try:
        return cls.from_config(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}; restore it from a copy.") from error
