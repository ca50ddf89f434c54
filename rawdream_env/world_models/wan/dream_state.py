"""The state of B imagined episodes: latents, conditions and caches, batched along dim 0.

Rows can be selected, mixed and joined without an effect on other rows: ``DreamState.where`` resets some rows,
``state[rows]`` removes finished episodes, and ``DreamState.cat`` adds replays.

Shape letters: B rows, R recent latent frames, C H W latent frame, P pose dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from rawdream_env.seeding import NoiseKey

Rows = Sequence[int] | np.ndarray | Tensor | slice


@dataclass(frozen=True)
class DreamState:
    """B episodes in latent space. ``recent`` is right-aligned: only the last min(R, G * chunk) frames are valid."""

    anchor: Tensor  # (B, C, H, W)
    recent: Tensor  # (B, R, C, H, W)
    conditions: Tensor  # (B, R + 1, D_c): the anchor's first
    arm_maps: Tensor  # (B, R + 1, C_m, H, W): the anchor's first
    pose: Tensor  # (B, P) commanded pose, on the CPU
    keys: tuple[NoiseKey, ...]
    chunks: tuple[int, ...]
    anchors: tuple[int, ...]  # names of the anchors: rows that start from the same picture have the same name
    decoder: tuple[Tensor, ...] = ()  # the frame codec's decoding state, each batched along dim 0
    cache: tuple[Tensor, ...] = ()  # rolling cache: keys, values of each block (B, N, R * tokens, D/N); () without

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Rows) -> DreamState:
        """The chosen rows (indices, slice or boolean mask) as a state of their own."""
        index = np.arange(len(self))[rows.numpy() if isinstance(rows, Tensor) else rows]
        picked = torch.as_tensor(np.atleast_1d(index))
        chosen = picked.tolist()
        return _build([self], lambda x: x[0][picked.to(x[0].device)], lambda x: tuple(x[0][i] for i in chosen))

    @staticmethod
    def where(mask: Sequence[bool] | np.ndarray | Tensor, a: DreamState, b: DreamState) -> DreamState:
        """Row by row ``a`` where ``mask`` (B,) is true, else ``b``."""
        chosen = [bool(m) for m in mask]
        pick = torch.tensor(chosen)

        def mix(x: Sequence[Tensor]) -> Tensor:
            return torch.where(pick.to(x[0].device).view(-1, *[1] * (x[0].dim() - 1)), x[0], x[1])

        return _build([a, b], mix, lambda x: tuple(p if m else q for m, p, q in zip(chosen, x[0], x[1], strict=True)))

    @staticmethod
    def cat(states: Sequence[DreamState]) -> DreamState:
        """Join states along the rows."""
        return _build(list(states), torch.cat, lambda x: sum(x, ()))


_TENSORS = ("anchor", "recent", "conditions", "arm_maps", "pose")
_GROUPS = ("decoder", "cache")
_LABELS = ("keys", "chunks", "anchors")
assert {*_TENSORS, *_GROUPS, *_LABELS} == {f.name for f in fields(DreamState)}


def _build(
    states: list[DreamState],
    tensor: Callable[[list[Tensor]], Tensor],
    label: Callable[[list[tuple[object, ...]]], tuple[object, ...]],
) -> DreamState:
    """A state whose fields are computed from the same fields of ``states``."""
    out: dict[str, object] = {name: tensor([getattr(s, name) for s in states]) for name in _TENSORS}
    for name in _GROUPS:
        groups = zip(*(getattr(s, name) for s in states), strict=True)
        out[name] = tuple(tensor(list(group)) for group in groups)
    out |= {name: label([getattr(s, name) for s in states]) for name in _LABELS}
    return DreamState(**out)  # type: ignore[arg-type]
