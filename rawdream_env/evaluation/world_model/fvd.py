"""FVD: the Fréchet distance between the features of recorded and imagined clips, for any feature extractor.

Two sets of clips become two Gaussians in feature space, and

    d^2 = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)).

With S = R^T R the eigenvalues of S1 S2 are the squared singular values of R1 R2^T, so the last trace is the sum of
those: exact in float64 also for the rank-deficient covariances of few clips, where a matrix square root is not.

The common extractor is the I3D network trained on Kinetics, as a TorchScript file; :class:`I3DTorchScript` runs it. FVD
depends on the number of clips and on their length: with fewer clips than features (400) it is biased upwards. Compare only
runs with equal n.

Shape letters: N clips, F frames, H W image, D features, n_i clips of episode i.
Sources: Unterthiner et al. 2018 (arXiv 1812.01717); Dowson and Landau 1982; for the extractor's call StyleGAN-V, Skorokhodov
et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rawdream_env.errors import CheckpointError
from rawdream_env.evaluation.world_model.replay import SOURCES, baselines
from rawdream_env.statistics import Estimate
from rawdream_env.types import UInt8Array

Float64Array = NDArray[np.float64]

CLIP_FRAMES = 16
"""Length of a clip, as in the original FVD; a horizon bucket shorter than that is one shorter clip."""

HOW_TO_GET = (
    "FVD is not measured: download i3d_torchscript.pt (I3D trained on Kinetics-400, published with "
    "universome/fvd-comparison on GitHub, about 50 MB) and pass it with --fvd FILE. A TorchScript file contains code; "
    "use one you trust."
)

_JACKKNIFE_GROUPS = 20


class VideoFeatures(Protocol):
    """Features of clips: uint8 (N, F, H, W, 3) -> float (N, D), the same D for every F."""

    def __call__(self, clips: UInt8Array) -> Float64Array:
        """One row of features per clip."""
        ...


def frechet_distance(a: Float64Array, b: Float64Array) -> float:
    """Squared Fréchet distance of the Gaussians fitted to rows (N_a, D) and (N_b, D); sample covariances (N - 1).

    NaN when a side has fewer than two rows.
    """
    if len(a) < 2 or len(b) < 2:
        return math.nan
    root_a, root_b = _root(a), _root(b)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    squares = ((a.mean(0) - b.mean(0)) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum()
    return max(0.0, float(squares - 2.0 * cross))  # rounding may leave -1e-12 for equal sets


def _root(rows: Float64Array) -> Float64Array:
    """R (min(N, D), D) with R^T R the sample covariance of ``rows`` (N, D)."""
    centred = (rows - rows.mean(0)) / math.sqrt(len(rows) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"), dtype=np.float64)


def frechet_video_distance(real: Sequence[Float64Array], fake: Sequence[Float64Array]) -> dict[str, Any]:
    """FVD between episodes' clips, two lists of (n_i, D), with a 95 % interval over episodes.

    The interval is a jackknife's (value +- 1.96 standard errors, not below 0; at most 20 groups of episodes are left out
    in turn): a bootstrap repeats episodes, which narrows the covariances and moves a Fréchet distance off its estimate.

    Returns:
        An estimate's JSON form with ``clips`` and ``features``; ``n`` is the number of episodes that have clips.
    """
    pairs = [(r, f) for r, f in zip(real, fake, strict=True) if len(r)]
    n, clips = len(pairs), sum(len(r) for r, _ in pairs)
    size = pairs[0][0].shape[1] if pairs else 0

    def over(chosen: Sequence[tuple[Float64Array, Float64Array]]) -> float:
        if not chosen:
            return math.nan
        return frechet_distance(np.concatenate([r for r, _ in chosen]), np.concatenate([f for _, f in chosen]))

    value = over(pairs)
    groups = min(n, _JACKKNIFE_GROUPS)
    left_out = np.array([over([p for i, p in enumerate(pairs) if i % groups != g]) for g in range(groups)])
    half = math.nan  # equal groups have no interval: one of zero width would claim certainty
    if groups > 2 and np.isfinite(left_out).all() and np.ptp(left_out) > 0:
        half = 1.96 * math.sqrt((groups - 1) / groups * float(((left_out - left_out.mean()) ** 2).sum()))
    low = float(np.maximum(0.0, value - half))  # keeps NaN
    return {**Estimate(value, low, value + half, n).as_dict(), "clips": clips, "features": size}


def windows(low: int, high: int, available: int, length: int = CLIP_FRAMES) -> list[tuple[int, int]]:
    """Consecutive clips [first, last) of ``length`` frames in [low, high), or one of all of it when it is shorter; only
    clips that an episode of ``available`` frames has whole.
    """
    length = min(length, high - low)
    return [(i, i + length) for i in range(low, min(high, available) - length + 1, length)] if length > 0 else []


def caution(value: Mapping[str, Any]) -> str:
    """One sentence when there are too few clips for the covariance, from the JSON form of an FVD; else empty."""
    if value["value"] is None:
        return f"FVD is not measured: {value['clips']} whole clips of {CLIP_FRAMES} frames are too few."
    if value["clips"] > value["features"]:
        return ""
    return (
        f"FVD uses {value['clips']} clips of {value['features']} features. With fewer clips than features the covariances "
        "do not have full rank and FVD is biased; compare it only with runs on the same clips."
    )


class FrechetVideoDistances:
    """FVD of every horizon span. Episodes are added one at a time; only their features are kept.

    Args:
        spans: frames [lo, hi) after the start.
        chunk_len: actions in a chunk, for the baseline that receives the last true frame before each.
        features: the extractor.
    """

    def __init__(self, spans: Sequence[tuple[int, int]], chunk_len: int, features: VideoFeatures) -> None:
        self.spans, self.chunk_len, self.features = spans, chunk_len, features
        self._lengths: list[int] = []
        self._seen: list[dict[tuple[str, int, int], Float64Array]] = []  # per episode: (source, first, last) -> (1, D)

    def add(self, dream: UInt8Array, truth: UInt8Array) -> None:
        """Extract the features of an episode: ``dream`` (F, H, W, 3), ``truth`` (F+1 or more, start first)."""
        n = len(dream)
        clips = {"truth": truth[1 : n + 1], "dream": dream, **baselines(truth, n, self.chunk_len)}
        wanted = sorted({window for lo, hi in self.spans for window in windows(lo, hi, n)})
        keys = [(source, first, last) for source in clips for first, last in wanted]
        found: dict[tuple[str, int, int], Float64Array] = {}
        for length in {last - first for first, last in wanted}:
            group = [key for key in keys if key[2] - key[1] == length]
            values = self.features(np.stack([clips[source][first:last] for source, first, last in group]))
            found.update({key: value[None] for key, value in zip(group, values, strict=True)})
        self._lengths.append(n)
        self._seen.append(found)

    def over(self, lo: int, hi: int) -> dict[str, dict[str, Any]]:
        """Source -> its FVD over frames [lo, hi)."""
        sides: dict[str, list[Float64Array]] = {}
        for source in ("truth", *SOURCES):
            sides[source] = [
                np.concatenate([found[source, *w] for w in windows(lo, hi, n)] or [np.empty((0, 0))])
                for found, n in zip(self._seen, self._lengths, strict=True)
            ]
        return {source: frechet_video_distance(sides["truth"], sides[source]) for source in SOURCES}


class I3DTorchScript:
    """The I3D network as a TorchScript file, a :class:`VideoFeatures`: D = 400 scores before the softmax.

    The file scales and resizes the frames itself (``rescale=True, resize=True, return_features=True``). It needs at
    least 10 frames: a shorter clip holds its last frame.

    Args:
        path: the file. TorchScript is code that runs when it is loaded and called; use a file you trust.
        device: torch device.
        batch_size: clips at once.

    Raises:
        CheckpointError: the file is missing, is no TorchScript, or does not answer as I3D does.
    """

    min_frames = 10

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", batch_size: int = 8) -> None:
        self.path, self.device, self.batch_size = Path(path), torch.device(device), batch_size
        if not self.path.is_file():
            raise CheckpointError(f"there is no file {path}. {HOW_TO_GET}")
        try:
            self._network = torch.jit.load(str(path), map_location=self.device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{path} is damaged or no TorchScript file ({reason}). {HOW_TO_GET}") from error

    @torch.inference_mode()
    def __call__(self, clips: UInt8Array) -> Float64Array:
        """uint8 (N, F, H, W, 3) -> float64 (N, D)."""
        missing = self.min_frames - clips.shape[1]
        if missing > 0:
            clips = np.concatenate([clips, clips[:, -1:].repeat(missing, axis=1)], axis=1)
        rows = []
        for first in range(0, len(clips), self.batch_size):
            part = np.ascontiguousarray(clips[first : first + self.batch_size].transpose(0, 4, 1, 2, 3))
            x = torch.from_numpy(part).to(self.device).float()
            try:
                out = self._network(x, rescale=True, resize=True, return_features=True)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise CheckpointError(
                    f"{self.path} cannot be called as I3D on clips of shape {tuple(x.shape)} ({reason}). {HOW_TO_GET}"
                ) from error
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != len(part):
                raise CheckpointError(
                    f"{self.path} returned {got} for {len(part)} clips, expected (N, D). {HOW_TO_GET}"
                )
            if not bool(out.isfinite().all()):
                raise CheckpointError(f"{self.path} returned non-finite features for finite clips; download it again.")
            rows.append(out.double().cpu().numpy())
        return np.concatenate(rows)
