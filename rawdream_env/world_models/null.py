"""A world model of a few integer operations: the small twin behind the ``WorldModel`` protocol, for tests.

It has no physics, but the contract of a real one: noise is keyed; draws, keys, start frames, proprio and every action
change the frames; a row does not depend on other rows; rows of a state can be selected and merged. All arithmetic is on
integers, so that results are exact on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rawdream_env.errors import InvalidOptionError
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import ACTION_DIM

_NOISE_SIZE = 8


@dataclass(frozen=True)
class NullState:
    """B episodes: ``keys`` at the next chunk, start ``frame`` uint8 (B, H, W, 3), int64 ``trace`` (B,) of the past."""

    keys: tuple[NoiseKey, ...]
    frame: Tensor
    trace: Tensor

    def __len__(self) -> int:
        """Number of rows B."""
        return len(self.keys)

    def __getitem__(self, rows: Any) -> NullState:
        """The given rows: a slice, a boolean mask or indices (which may repeat)."""
        index = torch.arange(len(self))[torch.as_tensor(rows) if not isinstance(rows, slice) else rows]
        return NullState(tuple(self.keys[i] for i in index.tolist()), self.frame[index], self.trace[index])

    @staticmethod
    def where(mask: Any, a: NullState, b: NullState) -> NullState:
        """Row by row: ``a`` where ``mask`` (B,) is true, else ``b``."""
        chosen = torch.as_tensor(mask, dtype=torch.bool)
        keys = tuple(x if m else y for m, x, y in zip(chosen.tolist(), a.keys, b.keys, strict=True))
        frame = torch.where(chosen[:, None, None, None], a.frame, b.frame)
        return NullState(keys, frame, torch.where(chosen, a.trace, b.trace))


class NullWorldModel:
    """Deterministic and fast: frames are the start frame plus keyed coarse noise plus a brightness from the actions."""

    def __init__(
        self,
        frame_shape: tuple[int, int, int] = (64, 64, 3),
        chunk_len: int = 8,
        action_dim: int = ACTION_DIM,
        fps: float = 10.0,
    ) -> None:
        """``frame_shape`` (H, W, 3) with H and W multiples of 8; ``fps`` in Hz."""
        if len(frame_shape) != 3 or frame_shape[2] != 3 or frame_shape[0] % _NOISE_SIZE or frame_shape[1] % _NOISE_SIZE:
            raise InvalidOptionError(
                f"frame_shape={frame_shape} must be (H, W, 3), H and W multiples of {_NOISE_SIZE}."
            )
        self.frame_shape = frame_shape
        self.chunk_len = chunk_len
        self.action_dim = action_dim
        self.fps = fps

    def start(self, frames: Tensor, keys: Sequence[NoiseKey], proprio: Tensor | None = None) -> NullState:
        """See :class:`WorldModel`: ``frames`` uint8 (B, H, W, 3), one key per row, ``proprio`` (B, P) or None."""
        trace = torch.zeros(len(keys), dtype=torch.int64)
        if proprio is not None:
            trace = _digest(proprio.reshape(len(keys), -1))
        return NullState(tuple(keys), frames.clone(), trace)

    def imagine(self, state: NullState, actions: Tensor) -> tuple[NullState, Tensor]:
        """See :class:`WorldModel`: ``actions`` (B, K, A) -> next state, frames uint8 (B, K, H, W, 3)."""
        rows, chunk_len = len(state), self.chunk_len
        height, width, channels = self.frame_shape
        digests = _digest(actions.reshape(rows * chunk_len, -1)).reshape(rows, chunk_len)
        trace = state.trace
        traces = []
        for k in range(chunk_len):
            trace = (trace * 31 + digests[:, k]) % 1_000_003
            traces.append(trace)
        shade = (torch.stack(traces, dim=1) % 64).to(torch.uint8)
        noise_shape = (chunk_len, _NOISE_SIZE, 1, _NOISE_SIZE, channels)
        noise = torch.stack(
            [torch.randint(0, 64, noise_shape, generator=key.generator(), dtype=torch.uint8) for key in state.keys]
        )
        coarse = (noise + shade[:, :, None, None, None, None]).repeat_interleave(width // _NOISE_SIZE, dim=4)
        bands = (state.frame >> 1).reshape(rows, 1, _NOISE_SIZE, height // _NOISE_SIZE, width * channels)
        frames = (bands + coarse.reshape(rows, chunk_len, _NOISE_SIZE, 1, width * channels)).reshape(
            rows, chunk_len, height, width, channels
        )
        keys = tuple(key.at(chunk=key.chunk + 1) for key in state.keys)
        return NullState(keys, state.frame, trace), frames


def _digest(values: Tensor) -> Tensor:
    """(B, N) floats -> (B,) integers in [0, 10007); changes above 1e-4 show. Integer sums do not depend on order."""
    whole = torch.round(values.detach().cpu().to(torch.float64) * 10_000).to(torch.int64)
    weights = torch.arange(1, whole.shape[1] + 1) * 7919 + 1
    return (whole * weights).sum(dim=1) % 10_007
