"""Open-loop fidelity: replay recorded actions in a world model and compare its frames with the recorded ones.

The model receives the first recorded frame, the first proprioception and then only actions. PSNR, SSIM and, with a feature
extractor, LPIPS are reported per *horizon bucket* (frames 0-8, 8-16, 16-32, 32-64, ... after the start) and over all frames,
for the whole image and for the *moving region*; FVD, with an extractor, for the whole image. Two baselines ignore the
actions:

- ``copy_first``: the start frame, repeated;
- ``copy_last``: the last *true* frame before the current chunk. It receives the true frame at every chunk and the model does
  not, so it is hard to beat late in an episode. At 0-8 both have the same information; a useful model is better there.

Values are averaged over the frames of an episode, then over episodes; intervals are bootstrapped over episodes. PSNR is
capped at 60 dB per frame, about the quantisation noise of 8-bit frames, because an exact copy has infinite PSNR. See also
:mod:`rawdream_env.evaluation.world_model.ghosting`, and :mod:`rawdream_env.evaluation.world_model.replay` for the replay and
the sensitivity to actions.

Shape letters: E episodes, K actions in a chunk, F frames, M metrics, H W C image.
Paper: table of world-model fidelity (PSNR, SSIM, LPIPS, FVD); the horizon, the moving region, the baselines and
ghosting are additions.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.data.recorded import Recording
from rawdream_env.errors import DatasetError
from rawdream_env.evaluation.reporting import pictures
from rawdream_env.evaluation.world_model.ghosting import episode_ghosts, summarise_ghosts
from rawdream_env.evaluation.world_model.horizon import HorizonScores
from rawdream_env.evaluation.world_model.metrics import PSNR_CAP_DB, buckets, frame_scores, moving_region
from rawdream_env.evaluation.world_model.replay import (
    SOURCES,
    action_sensitivity,
    action_sensitivity_warning,
    background,
    baselines,
    dream_episodes,
)
from rawdream_env.media import encode_gif, encode_picture
from rawdream_env.types import UInt8Array, WorldModel

if TYPE_CHECKING:
    from rawdream_env.evaluation.world_model.fvd import FrechetVideoDistances, VideoFeatures
    from rawdream_env.evaluation.world_model.lpips import FrameFeatures

__all__ = [
    "Fidelity",
    "action_sensitivity",
    "background",
    "compare_episode",
    "dream_episodes",
    "evaluate_fidelity",
]

Float64Array = NDArray[np.float64]


def compare_episode(
    dream: UInt8Array,
    truth: UInt8Array,
    chunk_len: int,
    reference: UInt8Array | None = None,
    features: FrameFeatures | None = None,
) -> dict[str, Float64Array]:
    """Scores (F, 4) of the dream (F, H, W, 3) and of both baselines against ``truth`` (F+1 or more frames, start
    first); (F, 6) with LPIPS when ``features`` are given.

    The moving region is where the truth differs from ``reference`` (H, W, 3); default: the start frame.
    """
    n = len(dream)
    target = truth[1 : n + 1]
    region = moving_region(target, truth[0] if reference is None else reference)
    clips = {"dream": dream, **baselines(truth, n, chunk_len)}
    scores = {name: frame_scores(clip, target, region) for name, clip in clips.items()}
    if features is None:
        return scores
    perceptual = _lpips_scores(dream, truth, chunk_len, region, features)
    return {name: np.concatenate([scores[name], perceptual[name]], axis=1) for name in scores}


def _lpips_scores(
    dream: UInt8Array, truth: UInt8Array, chunk_len: int, region: NDArray[np.bool_], features: FrameFeatures
) -> dict[str, Float64Array]:
    """LPIPS (F, 2), whole image and moving region. The baselines reuse the features of the true frames."""
    from rawdream_env.evaluation.world_model.lpips import distance

    parts: dict[str, list[Float64Array]] = {name: [] for name in SOURCES}
    first = features(truth[:1])
    for lo in range(0, len(dream), chunk_len):  # a chunk at a time: feature maps are large
        rows = slice(lo, min(lo + chunk_len, len(dream)))
        target = features(truth[rows.start + 1 : rows.stop + 1])
        maps = {"dream": features(dream[rows]), "copy_first": first, "copy_last": features(truth[lo : lo + 1])}
        for name, own in maps.items():
            same = [layer.expand(rows.stop - lo, *layer.shape[1:]) for layer in own]
            pair = [distance(same, target, features.weights, mask) for mask in (None, region[rows])]
            parts[name].append(np.stack(pair, axis=-1))
    return {name: np.concatenate(part) if part else np.empty((0, 2)) for name, part in parts.items()}


@dataclass(frozen=True)
class Fidelity:
    """The result: ``table`` (see :class:`HorizonScores`; with ``ghosting`` and, if measured, ``fvd``), ``sensitivity`` (see
    :func:`~rawdream_env.evaluation.world_model.replay.action_sensitivity`), number of episodes, a few (truth, dream) clips
    for the pictures, ``overall`` (one more row, of all frames) and ``notes`` (warnings).
    """

    table: list[dict[str, Any]]
    sensitivity: dict[str, Any] | None
    episodes: int
    fps: float
    samples: list[tuple[UInt8Array, UInt8Array]]
    overall: dict[str, Any]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON form, without images."""
        return {
            "episodes": self.episodes,
            "psnr_cap_db": PSNR_CAP_DB,
            "horizon": self.table,
            "overall": self.overall,
            "action_sensitivity": self.sensitivity,
            "notes": list(self.notes),
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

    def comparison(self, scale: int = 1) -> UInt8Array:
        """Moving grid (F, H', W', 3): a row per sample episode, real | imagined | difference times 3. A shorter episode
        repeats its last frame.
        """
        length = max(len(dream) for _, dream in self.samples)
        rows = []
        for pair in self.samples:
            real, dream = (pictures.pad_time(clip, length) for clip in pair)
            difference = 3 * np.abs(dream.astype(np.int16) - real.astype(np.int16))
            clips = (real, dream, difference.clip(0, 255).astype(np.uint8))
            rows.append([pictures.upscale(clip, scale) for clip in clips])
        return pictures.headed(pictures.grid(rows), ("real", "imagined", "difference x3"))

    def save(self, folder: str | Path) -> None:
        """Write ``fidelity.json``, ``fidelity.png`` and ``fidelity.gif`` into ``folder``."""
        from rawdream_env.evaluation.reporting.output import writing_results
        from rawdream_env.files import atomic_write_bytes, atomic_write_json

        with writing_results(folder) as path:
            atomic_write_json(path / "fidelity.json", self.as_dict())
            if self.samples:
                atomic_write_bytes(path / "fidelity.png", encode_picture(self.picture(), optimize=True))
                atomic_write_bytes(path / "fidelity.gif", encode_gif(self.clip(), self.fps))


def evaluate_fidelity(
    world_model: WorldModel,
    episodes: Iterable[Recording],
    *,
    seed: int = 0,
    batch_size: int = 16,
    region: str = "start",
    sensitivity_episodes: int = 32,
    samples: int = 6,
    frame_features: FrameFeatures | None = None,
    video_features: VideoFeatures | None = None,
    progress: bool = False,
) -> Fidelity:
    """Replay ``episodes`` through ``world_model`` and score every frame.

    Frames are not kept once an episode is scored: with ``episodes_from_dataset`` memory grows by a few kB per episode.

    Args:
        world_model: the model to evaluate.
        episodes: recorded episodes; those shorter than a chunk are skipped.
        seed: seed of the noise.
        batch_size: number of episodes imagined in parallel.
        region: reference of the moving region, "start" (each episode's first frame) or "background" (the median image
            of its camera).
        sensitivity_episodes: number of episodes for the sensitivity ratio, with three more replays of each; 0: skip it.
        samples: number of clips to keep for the pictures.
        frame_features: extractor for LPIPS, for example ``LpipsAlex``.
        video_features: extractor for FVD, for example ``I3DTorchScript``.
        progress: show progress bars.

    Raises:
        DatasetError: no episode has at least one chunk.
        ValueError: ``region`` is neither of the two.
    """
    from tqdm import tqdm

    if region not in ("start", "background"):
        raise ValueError(f'region must be "start" or "background", got {region!r}')
    k = world_model.chunk_len
    usable = [e for e in episodes if len(e.actions) >= k]
    if not usable:
        raise DatasetError(f"no episode is at least one chunk ({k} actions) long; collect longer episodes.")
    chosen = usable[:sensitivity_episodes] if sensitivity_episodes > 1 else []
    chosen = chosen if len(chosen) > 1 else []
    cameras = dict.fromkeys(e.camera for e in usable)
    backgrounds = {camera: background([e for e in usable if e.camera == camera]) for camera in cameras}
    longest = max(len(e.actions) // k * k for e in usable)
    scores = _Scores(longest, k, region, frame_features, video_features)
    chunks = sum(len(e.actions) // k for e in usable)
    more = 3 * sum(len(e.actions) // k for e in chosen)  # swapped, zeroed, fresh noise
    dreams: list[UInt8Array] = []  # of the chosen episodes; the others are not kept
    shown: list[tuple[UInt8Array, UInt8Array]] = []
    with tqdm(total=chunks + more, desc="imagining", unit="chunk", disable=not progress) as bar:

        def count(chunks: int) -> None:
            bar.update(chunks)

        replayed = dream_episodes(world_model, usable, seed=seed, batch_size=batch_size, progress=count)
        for episode, dream in zip(usable, replayed, strict=True):
            truth = episode.frames
            scores.add(dream, truth, backgrounds[episode.camera])
            if len(dreams) < len(chosen):
                dreams.append(dream)
            if len(shown) < samples:
                shown.append((truth[1 : len(dream) + 1], dream))
        sensitivity = None
        if chosen:
            sensitivity = action_sensitivity(
                world_model, chosen, seed=seed, batch_size=batch_size, recorded=dreams, progress=count
            )
    *table, overall = scores.rows()
    notes = _notes(overall, sensitivity)
    return Fidelity(table, sensitivity, len(usable), world_model.fps, shown, overall, notes)


class _Scores:
    """Accumulates the scores, the ghosts and, with an extractor, the video features of every episode."""

    def __init__(
        self,
        longest: int,
        chunk_len: int,
        region: str,
        frame_features: FrameFeatures | None,
        video_features: VideoFeatures | None,
    ) -> None:
        self.spans = [*buckets(longest, chunk_len), (0, longest)]
        self.chunk_len, self.region, self.frame_features = chunk_len, region, frame_features
        self.frames = HorizonScores(chunk_len)
        self.ghosts: dict[tuple[str, int], array[int]] = {}  # (source, number of the span) -> counts of all episodes
        self.videos: FrechetVideoDistances | None = None
        if video_features is not None:
            from rawdream_env.evaluation.world_model.fvd import FrechetVideoDistances

            self.videos = FrechetVideoDistances(self.spans, chunk_len, video_features)

    def add(self, dream: UInt8Array, truth: UInt8Array, behind: UInt8Array) -> None:
        """Score an episode; ``behind`` is the background image of its camera."""
        reference = behind if self.region == "background" else None
        self.frames.add(compare_episode(dream, truth, self.chunk_len, reference, self.frame_features))
        for source, counts in episode_ghosts(dream, truth, behind, self.chunk_len).items():
            for i, (lo, hi) in enumerate(self.spans):
                self.ghosts.setdefault((source, i), array("q")).extend(counts[lo:hi].sum(0))
        if self.videos is not None:
            self.videos.add(dream, truth)

    def rows(self) -> list[dict[str, Any]]:
        """One row per horizon bucket, and one of all frames."""
        rows = [*self.frames.rows(), self.frames.overall()]
        for i, (row, span) in enumerate(zip(rows, self.spans, strict=True)):
            row["ghosting"] = summarise_ghosts(
                {s: np.array(counts) for (s, at), counts in self.ghosts.items() if at == i}
            )
            if self.videos is not None:
                for source, distance in self.videos.over(*span).items():
                    row[source]["fvd"] = distance
        return rows


def _notes(overall: dict[str, Any], sensitivity: dict[str, Any] | None) -> tuple[str, ...]:
    """Warnings, one sentence each."""
    from rawdream_env.evaluation.world_model import fvd, lpips

    notes = [action_sensitivity_warning(sensitivity)] if sensitivity is not None else []
    if sensitivity is None:
        notes.append(
            "The effect of the actions is not measured: the test swaps actions between episodes and needs at least two."
        )
    if overall["ghosting"]["pixels"] == 0:
        notes.append("Ghosting is not measured: no object that rests at the start leaves its place in these episodes.")
    if "lpips" not in overall["dream"]:
        notes.append(lpips.HOW_TO_GET)
    if "fvd" not in overall["dream"]:
        notes.append(fvd.HOW_TO_GET)
    else:
        notes.append(fvd.caution(overall["dream"]["fvd"]))
    return tuple(note for note in notes if note)
