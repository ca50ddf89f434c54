"""Open-loop fidelity: recorded actions through a world model, its frames against what the camera really saw.

The model gets the first recorded frame, the first proprioception and then only actions; nothing recorded later reaches
it. PSNR and SSIM are reported per *horizon bucket* (frames 0-8, 8-16, 16-32, 32-64, ... after the start), over the
whole picture and over the *moving region*, beside two baselines that know nothing about actions:

- ``copy_first``: the start frame for ever;
- ``copy_last``: the last *true* frame before the current chunk. It is told the truth every chunk, which the model never
  is, so it is a hard baseline late in an episode; beating it at 0-8 (where both know the same) is the minimum.

Averages are of per-frame values (PSNR capped at 60 dB, about the quantisation noise of 8-bit frames, since a still
frame copied exactly has infinite PSNR), first within an episode, then over episodes; intervals are bootstrapped over
episodes.

Shape letters: B episodes, N actions in an episode, K actions in a chunk, F frames, H W C picture.
Paper: table of world-model fidelity (PSNR, SSIM); ours adds the horizon, the moving region and the baselines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import DatasetError
from rawdream_env.evaluation import pictures
from rawdream_env.evaluation.metrics import METRICS, PSNR_CAP_DB, buckets, frame_scores, moving_region
from rawdream_env.evaluation.statistics import Estimate, bootstrap_ratio
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import Float32Array, UInt8Array, WorldModel

if TYPE_CHECKING:
    from rawdream_env.data.reader import LeRobotReader

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class RecordedEpisode:
    """What really happened: ``frames`` uint8 (N+1, H, W, 3), frame t seen before action t; ``actions`` float32 (N, A);
    ``proprio`` float32 (P,) at the start, or None.
    """

    frames: UInt8Array
    actions: Float32Array
    proprio: Float32Array | None = None
    name: str = ""


def background(episodes: Sequence[RecordedEpisode], samples: int = 200) -> UInt8Array:
    """Median picture of a fixed camera over frames spread across the episodes: uint8 (H, W, 3)."""
    every = max(1, sum(len(e.frames) for e in episodes) // samples)
    sample = np.concatenate([e.frames[::every] for e in episodes])
    return np.asarray(np.median(sample, axis=0).astype(np.uint8))


def dream_episodes(
    world_model: WorldModel,
    episodes: Sequence[RecordedEpisode],
    *,
    seed: int = 0,
    draw: int = 0,
    batch_size: int = 16,
    change_actions: Callable[[int, Float32Array], Float32Array] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[UInt8Array]:
    """Imagine each episode's actions from its first frame; yields (N', H, W, 3) in order, N' = N rounded down to
    chunks.

    Episode i uses noise key ``NoiseKey(seed, episode=i, draw=draw)`` whatever the batch. Shorter episodes leave the
    batch when they end. ``change_actions(i, actions)`` replaces the actions (used for the sensitivity ratio).
    """
    import torch

    k = world_model.chunk_len
    device = getattr(world_model, "device", "cpu")
    for first in range(0, len(episodes), batch_size):
        batch = episodes[first : first + batch_size]
        actions = [
            e.actions if change_actions is None else change_actions(first + i, e.actions) for i, e in enumerate(batch)
        ]
        chunks = np.array([len(a) // k for a in actions])
        proprio = [e.proprio for e in batch if e.proprio is not None]
        known = torch.from_numpy(np.stack(proprio)).to(device) if len(proprio) == len(batch) else None
        frames = torch.from_numpy(np.stack([e.frames[0] for e in batch])).to(device)
        keys = [NoiseKey(seed, episode=first + i, draw=draw) for i in range(len(batch))]
        imagined: list[list[UInt8Array]] = [[] for _ in batch]
        with torch.inference_mode():
            state = world_model.start(frames, keys, known)
            rows = np.arange(len(batch))
            for c in range(int(chunks.max(initial=0))):
                keep = np.flatnonzero(chunks[rows] > c)
                if len(keep) < len(rows):
                    state, rows = state[torch.from_numpy(keep)], rows[keep]
                part = np.stack([actions[r][c * k : (c + 1) * k] for r in rows]).astype(np.float32)
                state, out = world_model.imagine(state, torch.from_numpy(part).to(device))
                for r, clip in zip(rows, out.cpu().numpy(), strict=True):
                    imagined[r].append(clip)
        for clips, episode in zip(imagined, batch, strict=True):
            yield np.concatenate(clips) if clips else np.empty((0, *episode.frames.shape[1:]), np.uint8)
        if progress is not None:
            progress(len(batch))


def compare_episode(
    dream: UInt8Array, truth: UInt8Array, chunk_len: int, reference: UInt8Array | None = None
) -> dict[str, Float64Array]:
    """Scores (F, 4) of the dream (F, H, W, 3) and of both baselines against ``truth`` (F+1 or more frames, start
    first).

    ``reference`` (H, W, 3) is what the moving region is measured against; the start frame when None.
    """
    n = len(dream)
    target = truth[1 : n + 1]
    region = moving_region(target, truth[0] if reference is None else reference)
    last = truth[(np.arange(n) // chunk_len) * chunk_len]
    copies = {"copy_first": np.broadcast_to(truth[0], target.shape), "copy_last": last}
    return {name: frame_scores(clip, target, region) for name, clip in {"dream": dream, **copies}.items()}


def _bucket_means(scores: Sequence[Float64Array], lo: int, hi: int) -> Float64Array:
    """Per-episode means (E, 4) over frames lo..hi; NaN where an episode is too short or nothing moves."""
    rows = []
    for s in scores:
        part = s[lo:hi]
        good = np.isfinite(part)
        count = good.sum(0)
        rows.append(np.where(count > 0, np.where(good, part, 0.0).sum(0) / np.maximum(count, 1), np.nan))
    return np.asarray(rows)


def summarise(per_episode: Sequence[dict[str, Float64Array]], chunk_len: int) -> list[dict[str, Any]]:
    """One row per horizon bucket: ``{"frames": [lo, hi], "dream": {"psnr": {...}, ...}, "copy_first": ...}``."""
    longest = max((len(p["dream"]) for p in per_episode), default=0)
    table = []
    for lo, hi in buckets(longest, chunk_len):
        row: dict[str, Any] = {"frames": [lo, hi]}
        for source in ("dream", "copy_first", "copy_last"):
            means = _bucket_means([p[source] for p in per_episode], lo, hi)
            row[source] = {metric: _mean_interval(means[:, i]).as_dict() for i, metric in enumerate(METRICS)}
        table.append(row)
    return table


def _mean_interval(values: Float64Array) -> Estimate:
    return bootstrap_ratio(values[np.isfinite(values)], resamples=1000)


def action_sensitivity(
    world_model: WorldModel,
    episodes: Sequence[RecordedEpisode],
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """How much the dream listens to its actions, relative to how much it changes with noise alone.

    Mean absolute pixel change (0-255) of the imagined frames when the actions are *swapped* with the next episode's and
    when motion is *zeroed* (the gripper command, which is absolute, is kept), divided by the change between noise draws
    0 and 1 under the recorded actions. Well above 1: actions steer. About 1: noise does. ``ratio`` is None when the
    draws are identical (a deterministic model). Needs at least two episodes; each is replayed four times.
    """
    if len(episodes) < 2:
        raise DatasetError(
            f"the action-sensitivity ratio swaps actions between episodes: need at least 2, got {len(episodes)}"
        )

    def swapped(i: int, actions: Float32Array) -> Float32Array:
        other = episodes[(i + 1) % len(episodes)].actions
        return np.resize(other, actions.shape) if len(other) < len(actions) else other[: len(actions)]

    def zeroed(_: int, actions: Float32Array) -> Float32Array:
        still = np.zeros_like(actions)
        still[:, -1] = actions[:, -1]
        return still

    def clips(draw: int, change: Callable[[int, Float32Array], Float32Array] | None = None) -> list[UInt8Array]:
        return list(
            dream_episodes(
                world_model,
                episodes,
                seed=seed,
                draw=draw,
                batch_size=batch_size,
                change_actions=change,
                progress=progress,
            )
        )

    recorded = clips(0)

    def change(other: list[UInt8Array]) -> Float64Array:
        return np.array(
            [
                np.abs(a.astype(np.int16) - b.astype(np.int16)).mean()
                for a, b in zip(recorded, other, strict=True)
                if len(a)
            ]
        )

    noise = change(clips(1))
    result: dict[str, Any] = {"noise_change": float(noise.mean()), "n": len(noise)}
    for name, function in (("swapped", swapped), ("zeroed", zeroed)):
        changed = change(clips(0, function))
        ratio = bootstrap_ratio(changed, noise, resamples=1000).as_dict() if noise.any() else None
        result[name] = {"change": float(changed.mean()), "ratio": ratio}
    return result


@dataclass(frozen=True)
class Fidelity:
    """The result: ``table`` (see :func:`summarise`), ``sensitivity`` (see :func:`action_sensitivity`), number of
    episodes and a few (truth, dream) clips for the pictures.
    """

    table: list[dict[str, Any]]
    sensitivity: dict[str, Any] | None
    episodes: int
    fps: float
    samples: list[tuple[UInt8Array, UInt8Array]]

    def as_dict(self) -> dict[str, Any]:
        """JSON form, without the pictures."""
        return {
            "episodes": self.episodes,
            "psnr_cap_db": PSNR_CAP_DB,
            "horizon": self.table,
            "action_sensitivity": self.sensitivity,
        }

    def picture(self, columns: int = 9, scale: int = 2) -> UInt8Array:
        """Still grid: two lines per sample episode, truth over dream; columns spread over the horizon."""
        cells: list[list[UInt8Array]] = []
        for truth, dream in self.samples:
            at = np.unique(np.linspace(0, len(dream) - 1, columns).round().astype(int))
            cells += [list(pictures.upscale(clip[at], scale)) for clip in (truth, dream)]
        return pictures.grid(cells)

    def clip(self, scale: int = 2) -> UInt8Array:
        """Moving grid: a column per sample episode, truth over dream, (F, H', W', 3)."""
        length = max(len(dream) for _, dream in self.samples)
        rows = [[pictures.upscale(pictures.pad_time(pair[i], length), scale) for pair in self.samples] for i in (0, 1)]
        return pictures.grid(rows)

    def save(self, folder: str | Path) -> None:
        """Write ``fidelity.json``, ``fidelity.png`` and ``fidelity.gif`` into ``folder``."""
        from rawdream_env.files import atomic_write_bytes, atomic_write_json

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(folder / "fidelity.json", self.as_dict())
        if self.samples:
            atomic_write_bytes(folder / "fidelity.png", pictures.png_bytes(self.picture()))
            atomic_write_bytes(folder / "fidelity.gif", pictures.gif_bytes(self.clip(), self.fps))


def evaluate_fidelity(
    world_model: WorldModel,
    episodes: Iterable[RecordedEpisode],
    *,
    seed: int = 0,
    batch_size: int = 16,
    region: str = "start",
    sensitivity_episodes: int = 32,
    samples: int = 6,
    progress: bool = False,
    watch: Callable[[RecordedEpisode, UInt8Array], None] | None = None,
) -> Fidelity:
    """Replay ``episodes`` through ``world_model`` and score every frame.

    ``region``: what the moving region is measured against, "start" (each episode's first frame) or "background" (the
    median picture). ``sensitivity_episodes``: how many episodes the sensitivity ratio uses (0: none; it costs four more
    replays of each). ``watch`` is shown every episode with its dream. Raises DatasetError when there is no episode of at
    least one chunk.
    """
    from tqdm import tqdm

    if region not in ("start", "background"):
        raise ValueError(f'region must be "start" or "background", got {region!r}')
    k = world_model.chunk_len
    usable = [e for e in episodes if len(e.actions) >= k]
    if not usable:
        raise DatasetError(f"no episode is at least one chunk ({k} actions) long; collect longer episodes")
    reference = background(usable) if region == "background" else None
    scores: list[dict[str, Float64Array]] = []
    shown: list[tuple[UInt8Array, UInt8Array]] = []
    with tqdm(total=len(usable), desc="fidelity", unit="episode", disable=not progress) as bar:
        stream = dream_episodes(
            world_model, usable, seed=seed, batch_size=batch_size, progress=lambda n: bar.update(n) and None
        )
        for episode, dream in zip(usable, stream, strict=True):
            scores.append(compare_episode(dream, episode.frames, k, reference))
            if watch is not None:
                watch(episode, dream)
            if len(shown) < samples:
                shown.append((episode.frames[1 : len(dream) + 1], dream))
    chosen = usable[:sensitivity_episodes]
    listens = None
    if len(chosen) > 1:
        with tqdm(total=4 * len(chosen), desc="action sensitivity", unit="replay", disable=not progress) as bar:
            listens = action_sensitivity(
                world_model, chosen, seed=seed, batch_size=batch_size, progress=lambda n: bar.update(n) and None
            )
    return Fidelity(summarise(scores, k), listens, len(usable), world_model.fps, shown)


def episodes_from_dataset(
    reader: LeRobotReader, indices: Iterable[int] | None = None, limit: int | None = None
) -> Iterator[RecordedEpisode]:
    """Recorded episodes of a data set; ``indices`` (say, the held-out ones) or all, at most ``limit``."""
    for index in itertools.islice(range(len(reader)) if indices is None else indices, limit):
        episode = reader.episode(index)
        yield RecordedEpisode(episode.frames, episode.actions, episode.state[0], f"{index}: {episode.task}")
