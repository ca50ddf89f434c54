"""What is computed from a frame alone, computed once per frame.

A rollout prepares every frame it sees and, with frozen towers, computes its features. The policy update needs the same again,
in every epoch. Results are kept by the content of the frame, up to a number of bytes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


class FrameCache:
    """Tensors on the CPU by frame; the least recently used are dropped beyond ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        """Number of frames kept."""
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything: what computes the tensors has changed."""
        self._kept.clear()
        self._bytes = 0

    def look_up(self, frames: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows (B, ...) for ``frames`` uint8 (B, H, W, 3) on the CPU; ``compute`` is asked for new frames, each once."""
        keys = [_key(frame) for frame in frames]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        new = list(dict.fromkeys(key for key in keys if key not in found))
        if new:
            rows = compute(frames[[keys.index(key) for key in new]]).cpu()
            found |= {key: row.clone() for key, row in zip(new, rows, strict=True)}
        for key, row in found.items():
            self._keep(key, row)
        return torch.stack([found[key] for key in keys])

    def _keep(self, key: bytes, row: Tensor) -> None:
        if key not in self._kept:
            self._bytes += row.nbytes
        self._kept[key] = row
        self._kept.move_to_end(key)
        while self._bytes > self.max_bytes and self._kept:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


def _key(frame: Tensor) -> bytes:
    digest = hashlib.blake2b(repr(tuple(frame.shape)).encode(), digest_size=16)
    digest.update(frame.contiguous().numpy().data)
    return digest.digest()
