"""Batches of demonstrations, drawn by source, with augmented frames. A batch is a function of (seed, step).

Shape letters: B rows, H W image, K actions in a chunk, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rawdream_env.seeding import mix
from rawdream_env.trainers.policy.config import SFTConfig
from rawdream_env.trainers.policy.demonstrations import Demonstrations, load_experts, load_play

Augment = Callable[[Tensor, np.random.Generator], Tensor]
"""Frames uint8 (B, H, W, 3) and a generator -> what the policy is trained on."""


@dataclass(frozen=True)
class Source:
    """Demonstrations that fill ``share`` of every batch, drawn uniformly."""

    demos: Demonstrations
    share: float


@dataclass(frozen=True)
class Batch:
    """``frames`` uint8 (B, H, W, 3), ``actions`` (B, K, A) and ``readout`` (B, 13) in SI units, NaN where unknown."""

    frames: Tensor
    instructions: list[str]
    actions: Tensor
    readout: Tensor

    def __len__(self) -> int:
        """B."""
        return len(self.actions)

    def rows(self, first: int, count: int) -> Batch:
        """At most ``count`` rows from ``first`` on."""
        return self.part(slice(first, first + count))

    def part(self, rows: slice | Tensor) -> Batch:
        """The given rows, as a slice or indices."""
        chosen = (
            self.instructions[rows] if isinstance(rows, slice) else [self.instructions[row] for row in rows.tolist()]
        )
        return Batch(self.frames[rows], chosen, self.actions[rows], self.readout[rows])


def load_sources(config: SFTConfig, chunk_len: int) -> tuple[list[Source], Demonstrations]:
    """Training sources and held-out samples: of play or of further demonstrations, else the demonstrations themselves."""
    if config.stage == "pretrain":
        play = load_play(config.data, chunk_len)
        total = sum(len(d) for d in play)
        split = [d.split(config.held_out, config.seed) for d in play]
        return [Source(s[0], len(d) / total) for s, d in zip(split, play, strict=True)], split[0][1]
    count, further = config.demos_per_task, config.val_demos_per_task
    experts = load_experts(config.data, chunk_len, demos_per_task=count, seed=config.demos_seed)
    replay = load_play(config.replay, chunk_len) if config.replay_share > 0 else []
    own = 1.0 - (config.replay_share if replay else 0.0)
    sources = [Source(d, own / len(experts)) for d in experts]
    split = [d.split(config.held_out, config.seed) for d in replay]
    sources += [Source(s[0], config.replay_share / len(replay)) for s in split]
    if further:
        return sources, load_experts(
            config.data[:1], chunk_len, demos_per_task=further, skip=count, seed=config.demos_seed
        )[0]
    return sources, split[0][1] if split else experts[0]


def draw_batch(sources: Sequence[Source], config: SFTConfig, step: int, augment: Augment | None = None) -> Batch:
    """The batch of ``step``."""
    rng = np.random.default_rng(mix(config.seed, 0xBA7C, step))
    counts = np.diff(np.round(np.cumsum([0.0] + [s.share for s in sources]) * config.batch_size)).astype(int)
    parts = [(s.demos, rng.integers(0, len(s.demos), n)) for s, n in zip(sources, counts, strict=True) if n]
    batch = gather_batch(parts, rng, config.device)
    return batch if augment is None else replace(batch, frames=augment(batch.frames, rng))


def gather_batch(
    parts: Sequence[tuple[Demonstrations, NDArray[np.int64]]], rng: np.random.Generator, device: str
) -> Batch:
    """The chosen samples of each part; ``rng`` chooses the paraphrase of each instruction."""

    def cat(arrays: list[NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    return Batch(
        frames=cat([d.frames[d.rows[i]] for d, i in parts]),
        instructions=[d.instruction(int(s), rng) for d, i in parts for s in i],
        actions=cat([d.actions[i] for d, i in parts]),
        readout=cat([d.readout[i] for d, i in parts]),
    )


def jitter_and_blur(frames: Tensor, rng: np.random.Generator, *, jitter: float, blur_share: float) -> Tensor:
    """Color gain and offset on uint8 frames (B, H, W, 3), and a slight blur on a share of them. Geometry is not changed.

    Shifting or cropping would move the gripper and the objects in the image while the actions stay the same.
    """
    b = len(frames)
    image = frames.permute(0, 3, 1, 2).float()
    if jitter > 0:
        gain = torch.from_numpy(1 + jitter * rng.standard_normal((b, 3, 1, 1), dtype=np.float32)).to(image)
        offset = torch.from_numpy(127 * jitter * rng.standard_normal((b, 3, 1, 1), dtype=np.float32)).to(image)
        image = image * gain + offset
    if blur_share > 0:
        chosen = torch.from_numpy(rng.random(b) < blur_share).to(image.device)
        if chosen.any():
            padded = F.pad(image[chosen], (1, 1, 1, 1), mode="replicate")
            image[chosen] = F.avg_pool2d(padded, 3, stride=1)
    return image.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
