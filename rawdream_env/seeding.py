"""Keyed noise: every random draw has a key, so that any row, chunk or episode can be reproduced alone.

The package never draws from a global generator. A ``NoiseKey`` is hashed with SplitMix64 into one 64-bit seed; the
draw index 1 is the second draw of dual-noise verification (paper section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def mix(*parts: int) -> int:
    """Hash integers (any sign) into one 63-bit seed; order matters."""
    state = 0x243F6A8885A308D3
    for part in parts:
        state = _splitmix64(state ^ (part & _MASK))
    return state >> 1


@dataclass(frozen=True, order=True)
class NoiseKey:
    """Names one draw: ``seed`` of the env row, ``env`` row label, ``episode`` count, ``chunk`` index, ``draw`` index.

    An environment sets ``env=0`` and gives each row its own ``seed``, so that a row can be replayed alone.
    """

    seed: int
    env: int = 0
    episode: int = 0
    chunk: int = 0
    draw: int = 0

    def at(self, *, chunk: int | None = None, draw: int | None = None) -> NoiseKey:
        """The same episode at another chunk or draw."""
        return replace(self, chunk=self.chunk if chunk is None else chunk, draw=self.draw if draw is None else draw)

    def entropy(self, *stream: int) -> int:
        """A 63-bit seed; ``stream`` separates independent uses of one key (latent noise, context noise, sampling)."""
        return mix(self.seed, self.env, self.episode, self.chunk, self.draw, *stream)

    def generator(self, *stream: int) -> torch.Generator:
        """A fresh CPU generator. Draw on the CPU and copy, so that values do not depend on the device."""
        import torch

        return torch.Generator().manual_seed(self.entropy(*stream))

    def numpy(self, *stream: int) -> np.random.Generator:
        """A fresh numpy generator."""
        return np.random.default_rng(self.entropy(*stream))


def keyed_normal(keys: Sequence[NoiseKey], shape: tuple[int, ...], *stream: int) -> torch.Tensor:
    """Standard normal (len(keys), *shape) fp32 on the CPU; row i depends on keys[i] alone."""
    import torch

    return torch.stack([torch.randn(shape, generator=key.generator(*stream)) for key in keys])
