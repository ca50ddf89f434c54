"""OpenVLA's vision backbone: patch features of DINOv2 and SigLIP, concatenated, and the projector to the language model.

Both towers compute what timm 0.9 computes for ``vit_large_patch14_reg4_dinov2`` and ``vit_so400m_patch14_siglip_224``, under
timm's names. Features are those of the second-to-last block, without the final norm. The towers are written out here because
timm needs torchvision. transformers' SigLIP differs in one point: its MLP uses the tanh approximation of GELU.

Shape letters: B rows, C H W image, N = 256 patches, D width of a tower, L width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE, PATCH = 224, 14
NUM_PATCHES = (IMAGE_SIZE // PATCH) ** 2


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of a vision tower, under the names of timm's arguments."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    reg_tokens: int = 0
    """Register tokens; with any, there is also a class token, and blocks are scaled (DINOv2)."""


DINOV2_L = TowerConfig(embed_dim=1024, depth=24, num_heads=16, reg_tokens=4)
SIGLIP_SO400M = TowerConfig(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362)


class VisionTower(nn.Module):
    """A vision transformer up to its second-to-last block: pixels (B, 3, 224, 224) -> patch features (B, N, D)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.embed_dim, PATCH, stride=PATCH)})
        self.pos_embed = nn.Parameter(torch.zeros(1, NUM_PATCHES, config.embed_dim))
        self.num_prefix = 0
        if config.reg_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
            self.reg_token = nn.Parameter(torch.zeros(1, config.reg_tokens, config.embed_dim))
            self.num_prefix = 1 + config.reg_tokens
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth - 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels -> features of the second-to-last block."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed
        if self.num_prefix:
            prefix = torch.cat([self.cls_token, self.reg_token], dim=1)
            x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.num_prefix :]  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm attention and MLP; with registers each branch is scaled."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = Attention(config.embed_dim, config.num_heads)
        self.ls1 = LayerScale(config.embed_dim) if config.reg_tokens else nn.Identity()
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = MLP(config.embed_dim, int(config.embed_dim * config.mlp_ratio))
        self.ls2 = LayerScale(config.embed_dim) if config.reg_tokens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, D) -> the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention with one linear map for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, D) -> the same shape."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, d))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two layers with the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned factor per channel. OpenVLA's checkpoints call it ``scale_factor``, timm ``gamma``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> the same shape."""
        return x * self.scale_factor


class VisionBackbone(nn.Module):
    """DINOv2 (``featurizer``) and SigLIP (``fused_featurizer``) side by side: (B, 6, 224, 224) -> (B, N, D1 + D2)."""

    def __init__(self, dinov2: TowerConfig, siglip: TowerConfig) -> None:
        super().__init__()
        self.featurizer = VisionTower(dinov2)
        self.fused_featurizer = VisionTower(siglip)

    def forward(self, pixels: Tensor) -> Tensor:
        """``pixels``: three channels normalised for DINOv2, then three for SigLIP (``images.normalise``)."""
        return torch.cat([self.featurizer(pixels[:, :3]), self.fused_featurizer(pixels[:, 3:])], dim=-1)


class Projector(nn.Module):
    """Three layers from patch features (B, N, D1 + D2) to embeddings of the language model (B, N, L)."""

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, language_width)
        self.fc3 = nn.Linear(language_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Patch features -> embeddings."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))  # type: ignore[no-any-return]
