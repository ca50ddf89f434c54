"""Draw training batches from a mixture of latent caches.

Data sets of one embodiment share their action bounds (``action_bounds.py``). The bounds are saved with the checkpoint; a
rollout uses those of one entry.

A batch is a pure function of its random generator: a trainer that seeds the generator with ``mix(seed, step)`` can draw
any batch again.

Shape letters: B batch, K actions in a chunk, G = K / 4 latents in a chunk, T chunks of an episode, M latents of a window,
C h w latent, A action dims, P state dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rawdream_env.errors import DatasetError
from rawdream_env.files import atomic_write_json
from rawdream_env.trainers.world_model.action_bounds import bounds_of_data
from rawdream_env.trainers.world_model.latent_dataset import LatentDataset, QuantileBounds
from rawdream_env.types import Float32Array
from rawdream_env.world_models.autoencoders import FRAMES_PER_LATENT


def normalise_actions(actions: Float32Array, low: NDArray[np.float64], high: NDArray[np.float64]) -> Float32Array:
    """Map raw actions (..., A) from [low, high] to [-1, 1], clipped (paper, appendix A.1).

    A dimension that never moves (high = low) becomes 0.
    """
    width = high - low
    still = width < 1e-6
    scaled = (actions - low) / np.where(still, 1.0, width) * 2 - 1
    return np.where(still, 0.0, scaled).clip(-1, 1).astype(np.float32)


@dataclass(frozen=True)
class MixtureEntry:
    """One data set of a mixture."""

    path: str
    """Folder of its latent cache."""
    weight: float = 1.0
    """Share of the draws: this weight over the sum of weights, independent of the size of the data set."""
    name: str = ""
    """Name in the saved statistics; by default the folder's name."""
    embodiment: str = ""
    """Robot and action convention of the data; entries of one embodiment share action bounds."""

    @property
    def label(self) -> str:
        """``name``, the default filled in."""
        return self.name or Path(self.path).name


@dataclass(frozen=True)
class LatentBatch:
    """B windows, each from one data set. Index 0 of the time axis is the anchor.

    ``latents`` fp32 (B, 1+M, C, h, w); ``actions`` fp32 (B, 1+M, 4, A) in [-1, 1], the four actions that lead to each latent,
    zero for the anchor and in dimensions that the data set does not have; ``poses`` fp32 (B, 1+M, 4, P), after each of these
    actions, for the anchor its own pose four times, zero-padded; ``times`` int64 (B, 1+M), positions in latents, 0 for the
    anchor; ``before`` fp32 (B, P), the state at the start of the window; ``focus`` uint8 (B, M, h, w), zero where a data set
    has none; ``source`` int64 (B,), index of the entry; ``places`` int64 (B, 3): episode, first chunk, and the chunk boundary
    of the anchor.
    """

    latents: Tensor
    actions: Tensor
    poses: Tensor
    times: Tensor
    before: Tensor
    focus: Tensor
    source: Tensor
    places: Tensor

    @property
    def far(self) -> Tensor:
        """bool (B,): the anchor is an earlier frame than the one before the window."""
        return self.places[:, 2] < self.places[:, 1]

    def to(self, device: str | torch.device) -> LatentBatch:
        """The same batch on another device."""
        return LatentBatch(**{name: value.to(device) for name, value in vars(self).items()})


class Mixture:
    """A weighted mixture of latent caches with one codec and chunk length.

    Args:
        entries: the data sets and their weights.
        action_dim: A of the model; data with fewer dimensions are padded with zeros. Default: the largest.
        bounds: action bounds by embodiment: of a model that is trained further, or of the training data for held-out
            data. An embodiment without given bounds gets those of all its data together.
        verify: as in ``LatentDataset``.

    Attributes:
        bounds: the action bounds that normalise each entry's actions.

    Raises:
        DatasetError: caches that do not fit together, more action dimensions than the model has, different action
            dimensions in one embodiment, two entries of one name or no positive weight.
    """

    def __init__(
        self,
        entries: Sequence[MixtureEntry],
        *,
        action_dim: int | None = None,
        bounds: Mapping[str, QuantileBounds] | None = None,
        verify: bool = True,
    ) -> None:
        if not entries or any(not (0 < entry.weight < float("inf")) for entry in entries):
            raise DatasetError(f"a mixture needs entries, all of positive weight; got {[e.weight for e in entries]}.")
        labels = [entry.label for entry in entries]
        if len(set(labels)) < len(labels):
            raise DatasetError(f"two entries of the mixture have one name: {labels}. Give each its own with name=.")
        self.entries = tuple(entries)
        self.datasets = tuple(LatentDataset(entry.path, verify=verify) for entry in entries)
        self.action_dim = max(d.action_dim for d in self.datasets) if action_dim is None else action_dim
        self.pose_dim = max(d.pose_dim for d in self.datasets)
        first = self.datasets[0]
        for entry, dataset in zip(entries, self.datasets, strict=True):
            for name in ("codec", "chunk_len", "latent_shape"):
                if dataset.index[name] != first.index[name]:
                    raise DatasetError(
                        f"{entry.path} has {name} {str(dataset.index[name])[:16]}, {entries[0].path} "
                        f"{str(first.index[name])[:16]}: they cannot be mixed. Cache both with the same settings."
                    )
            if dataset.action_dim > self.action_dim:
                raise DatasetError(
                    f"{entry.path} has {dataset.action_dim} action dimensions, the model {self.action_dim}. Raise the "
                    "model's action_dim, or leave the data set out."
                )
        self.chunk_len, self.latent_shape = first.chunk_len, first.latent_shape
        weights = np.array([entry.weight for entry in entries], np.float64)
        self._upto = np.cumsum(weights / weights.sum())[:-1]
        self.bounds = bounds_of_data(self.datasets, [entry.embodiment for entry in entries], bounds or {})
        self._windows: dict[int, list[NDArray[np.int64]]] = {}

    def statistics(self) -> dict[str, Any]:
        """The content of ``save_statistics``: weight, cache, own action statistics and action bounds of each entry."""
        return {
            entry.label: {"path": entry.path, "weight": entry.weight, "embodiment": entry.embodiment}
            | {"action_low": low.tolist(), "action_high": high.tolist()}
            | dataset.index["statistics"]
            for entry, dataset, (low, high) in zip(self.entries, self.datasets, self.bounds, strict=True)
        }

    def save_statistics(self, path: str | Path) -> None:
        """Write the action statistics of all entries, beside the checkpoint."""
        atomic_write_json(path, self.statistics())

    def draw(
        self,
        rng: np.random.Generator,
        batch_size: int,
        num_chunks: int,
        far_anchor: float = 0.0,
        *,
        max_offset: int = 64,
        rows: Sequence[int] | None = None,
    ) -> LatentBatch:
        """Draw windows of ``num_chunks`` chunks: a data set by weight, then one of its windows with equal probability.

        With probability ``far_anchor`` the anchor is an earlier chunk boundary of the episode (with equal probability)
        instead of the frame just before the window, as late in a rollout. A window at the start of an episode has no
        earlier boundary. In a cache with separate windows the far anchor is always the first frame of the episode, whose
        video has the latents of the whole episode. The positions of the window then start at 1 + the gap in latents, at most
        1 + ``max_offset``, as in a rollout.

        The result depends only on the state of ``rng`` and the arguments; the choice of windows does not depend on
        ``far_anchor`` or ``max_offset``. ``rows``: read and return only these of the ``batch_size`` rows.
        """
        ends = self._ends(num_chunks)
        source = np.searchsorted(self._upto, rng.random(batch_size), side="right")
        window = rng.integers(np.array([int(e[-1]) for e in ends])[source])
        far = rng.random(batch_size) < far_anchor
        share = rng.random(batch_size)
        places = np.empty((batch_size, 3), np.int64)
        for row, (s, number) in enumerate(zip(source, window, strict=True)):
            episode = int(np.searchsorted(ends[s], number, side="right"))
            first = int(number - (ends[s][episode - 1] if episode else 0))
            earlier = 0 if self.datasets[s].window_chunks else int(share[row] * first)
            places[row] = episode, first, earlier if far[row] and first else first
        if rows is not None:
            source, places = source[list(rows)], places[list(rows)]
        read = [self._row(s, e, c, a, num_chunks) for s, (e, c, a) in zip(source, places.tolist(), strict=True)]
        latents, actions, poses, before, focus = (torch.stack(parts) for parts in zip(*read, strict=True))
        gap = (places[:, 1] - places[:, 2]) * (self.chunk_len // FRAMES_PER_LATENT)
        times = 1 + np.minimum(gap, max_offset)[:, None] + np.arange(latents.shape[1] - 1)
        return LatentBatch(
            latents=latents,
            actions=actions,
            poses=poses,
            times=torch.from_numpy(np.pad(times.astype(np.int64), ((0, 0), (1, 0)))),
            before=before,
            focus=focus,
            source=torch.from_numpy(source.astype(np.int64)),
            places=torch.from_numpy(places),
        )

    def _ends(self, num_chunks: int) -> list[NDArray[np.int64]]:
        """For each data set, the cumulative number of windows of its episodes."""
        if num_chunks not in self._windows:
            counts = [np.maximum(d.chunks - num_chunks + 1, 0) for d in self.datasets]
            for entry, dataset, count in zip(self.entries, self.datasets, counts, strict=True):
                if not count.any():
                    raise DatasetError(
                        f"{entry.path}: no episode has {num_chunks} chunks of {self.chunk_len} steps (the longest has "
                        f"{dataset.chunks.max()}). Draw shorter windows, or leave the data set out."
                    )
            self._windows[num_chunks] = [np.cumsum(count) for count in counts]
        return self._windows[num_chunks]

    def _row(
        self, source: int, episode: int, first: int, anchor: int, num_chunks: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One window (latents, actions, poses, state before it, focus), with the still at chunk boundary ``anchor``."""
        dataset = self.datasets[source]
        window = dataset.window(episode, first, num_chunks)
        near = anchor == first
        still = window.anchor if near else dataset.still(episode, anchor)
        latents = dataset.latents_from_anchor(episode, first, num_chunks) if near else window.latents
        held = window.poses[0] if near else dataset.pose(episode, anchor)
        m = len(latents)
        actions = torch.zeros(1 + m, FRAMES_PER_LATENT, self.action_dim)
        poses = torch.zeros(1 + m, FRAMES_PER_LATENT, self.pose_dim)
        normal = torch.from_numpy(normalise_actions(window.actions.numpy(), *self.bounds[source]))
        actions[1:, :, : dataset.action_dim] = normal.unflatten(0, (m, FRAMES_PER_LATENT))
        poses[0, :, : dataset.pose_dim] = held
        poses[1:, :, : dataset.pose_dim] = window.poses[1:].unflatten(0, (m, FRAMES_PER_LATENT))
        focus = torch.zeros(m, *self.latent_shape[1:], dtype=torch.uint8) if window.focus is None else window.focus
        before = torch.zeros(self.pose_dim)
        before[: dataset.pose_dim] = window.poses[0]
        return torch.cat([still[None], latents]).float(), actions, poses, before, focus
