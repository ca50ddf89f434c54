"""The state of B imagined episodes of the video model: latents, conditions and caches.

Shape letters: B rows, R recent latent frames, C H W latent frame, P pose dims.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rawdream_env.world_models.row_state import RowState


@dataclass(frozen=True)
class DreamState(RowState):
    """B episodes in latent space. ``recent`` is right-aligned: only the last min(R, G * chunk) frames are valid."""

    anchor: Tensor  # (B, C, H, W)
    recent: Tensor  # (B, R, C, H, W)
    conditions: Tensor  # (B, R + 1, D_c): the anchor's first
    arm_maps: Tensor  # (B, R + 1, C_m, H, W): the anchor's first
    pose: Tensor  # (B, P) commanded pose, on the CPU
    anchors: tuple[int, ...]  # names of the anchors: rows that start from the same picture have the same name
    decoder: tuple[Tensor, ...] = ()  # the frame codec's decoding state, each batched along dim 0
    cache: tuple[Tensor, ...] = ()  # rolling cache: keys, values of each block (B, N, R * tokens, D/N); () without
