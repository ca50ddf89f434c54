"""How far a world model's frames follow what really happened: ``rawdream evaluate-world-model``.

Recorded episodes are replayed open loop: the model gets the first frame and the actions, nothing else. Per horizon bucket
(frames 0-8, 8-16, 16-32, ...): PSNR and SSIM over the whole picture and the moving region, LPIPS and FVD when their
networks are given, ghosting, each beside two baselines that know nothing about actions. Over all: how much swapped and
zeroed actions change the dream. The paper's Table of world-model fidelity has PSNR, SSIM, LPIPS and FVD; horizon, moving
region, baselines, ghosting and action sensitivity are ours.

``fidelity.json`` holds every number, ``report.html`` tables, plots and films, ``fidelity.gif`` and ``fidelity.png`` films
and stills alone: per episode the recording, the dream, and their difference.

Shape letters: F frames, H W C picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import DatasetError, InvalidOptionError
from rawdream_env.evaluation import perceptual
from rawdream_env.evaluation.fidelity import (
    Fidelity,
    RecordedEpisode,
    background,
    episodes_from_dataset,
    evaluate_fidelity,
)
from rawdream_env.evaluation.ghosting import ghost_counts
from rawdream_env.evaluation.metrics import moving_region
from rawdream_env.evaluation.perceptual import FrameFeatures, VideoFeatures
from rawdream_env.evaluation.provenance import provenance
from rawdream_env.evaluation.statistics import bootstrap_ratio
from rawdream_env.types import UInt8Array, WorldModel

Float64Array = NDArray[np.float64]
SOURCES = ("dream", "copy_first", "copy_last")


@dataclass(frozen=True)
class EvaluateWorldModelConfig:
    """Options of ``rawdream evaluate-world-model``."""

    data: tuple[str, ...]
    """LeRobotDataset v3 folders of held-out episodes."""
    out: str = "runs/fidelity"
    """Folder for report.html, fidelity.json and the films."""
    world_model: str = "embedded"
    """"embedded" or a folder."""
    episodes: int = 64
    """Episodes, taken from the data sets in turn; intervals are over episodes."""
    batch_size: int = 16
    """Episodes imagined at once."""
    num_inference_steps: int | None = None
    """Evaluations of the sampler per chunk; the checkpoint's own when not given."""
    approximations: tuple[str, ...] = ()
    """Opt-in shortcuts of the world model: rolling_cache, tiny_decoder, fp8."""
    device: str = "cpu"
    """Where the world model and the feature networks run."""
    dtype: str = "float32"
    """Precision of the world model: "float32" or "bfloat16"."""
    sensitivity_episodes: int = 32
    """Episodes for the action sensitivity, which costs four more replays of each; 0: none."""
    lpips: tuple[str, ...] = ()
    """Two files for LPIPS: torchvision's alexnet-owt-7be5be79.pth, and LPIPS's weights/v0.1/alex.pth."""
    fvd: str = ""
    """File for FVD: i3d_torchscript.pt, the I3D network as TorchScript. It is a program: open only what you trust."""
    seed: int = 0
    """Seed of the dream's noise."""


@dataclass
class Watcher:
    """Scores that need the frames themselves, gathered while episodes are imagined.

    ``ghosts``: per episode (F, 2); ``distances``: per episode and source (F, 2), LPIPS of the whole picture and the moving
    region; ``clips``: truth, dream and copies, kept for FVD alone.
    """

    background: UInt8Array
    chunk_len: int
    frame_features: FrameFeatures | None = None
    video_features: VideoFeatures | None = None
    ghosts: list[Float64Array] = field(default_factory=list)
    distances: list[dict[str, Float64Array]] = field(default_factory=list)
    clips: list[dict[str, UInt8Array]] = field(default_factory=list)

    def __call__(self, episode: RecordedEpisode, dream: UInt8Array) -> None:
        """Score one episode."""
        truth, start = episode.frames[1 : len(dream) + 1], episode.frames[0]
        self.ghosts.append(ghost_counts(dream, truth, start, self.background))
        last = episode.frames[(np.arange(len(dream)) // self.chunk_len) * self.chunk_len]
        shown = {"dream": dream, "copy_first": np.broadcast_to(start, truth.shape), "copy_last": last}
        if self.frame_features is not None:
            features, region = self.frame_features, moving_region(truth, start)
            self.distances.append(
                {
                    name: np.stack(
                        [perceptual.lpips(features, clip, truth), perceptual.lpips(features, clip, truth, region)], -1
                    )
                    for name, clip in shown.items()
                }
            )
        if self.video_features is not None:
            self.clips.append({"truth": truth, **shown})

    def add_to(self, table: list[dict[str, Any]]) -> None:
        """Put what was gathered into the rows of a horizon table."""
        for row in table:
            lo, hi = row["frames"]
            counts = np.array([g[lo:hi].sum(0) for g in self.ghosts])
            row["ghosting"] = bootstrap_ratio(counts[:, 0], counts[:, 1]).as_dict() | {
                "pixels": int(counts[:, 1].sum())
            }
            for source in SOURCES:
                for i, metric in enumerate(("lpips", "lpips_moving")):
                    if self.distances:
                        values = _episode_means([d[source][lo:hi, i] for d in self.distances])
                        row[source][metric] = bootstrap_ratio(values, resamples=1000).as_dict()
                if self.video_features is not None:
                    row[source]["fvd"] = self._fvd(source, lo, hi)

    def _fvd(self, source: str, lo: int, hi: int) -> dict[str, Any]:
        """FVD over the frames of one bucket, or why there is none."""
        assert self.video_features is not None
        whole = [c for c in self.clips if len(c["truth"]) >= hi]
        if hi - lo < self.video_features.min_frames:
            return {"value": None, "n": 0, "why": f"needs clips of {self.video_features.min_frames} frames"}
        if len(whole) < 2:
            return {"value": None, "n": len(whole), "why": "needs at least two episodes of this length"}
        parts = ([c[name][lo:hi] for c in whole] for name in (source, "truth"))
        return dict(perceptual.fvd(self.video_features, *parts))


def _episode_means(values: Sequence[Float64Array]) -> Float64Array:
    """Mean of each episode over its finite values; episodes without any are left out."""
    kept = [v[np.isfinite(v)] for v in values]
    return np.array([v.mean() for v in kept if len(v)])


def score_world_model(
    world_model: WorldModel,
    episodes: Sequence[RecordedEpisode],
    *,
    frame_features: FrameFeatures | None = None,
    video_features: VideoFeatures | None = None,
    batch_size: int = 16,
    sensitivity_episodes: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Fidelity, dict[str, Any]]:
    """Replay ``episodes`` and measure everything; the pictures, and the report as JSON (see the module's text)."""
    k = world_model.chunk_len
    usable = [e for e in episodes if len(e.actions) >= k]
    if not usable:
        raise DatasetError(f"no episode is at least one chunk ({k} actions) long; collect longer episodes.")
    watch = Watcher(background(usable), k, frame_features, video_features)
    fidelity = evaluate_fidelity(
        world_model,
        usable,
        seed=seed,
        batch_size=batch_size,
        sensitivity_episodes=sensitivity_episodes,
        progress=progress,
        watch=watch,
    )
    watch.add_to(fidelity.table)
    report = fidelity.as_dict()
    report["missing"] = [
        advice
        for given, advice in ((frame_features, perceptual.LPIPS_ADVICE), (video_features, perceptual.FVD_ADVICE))
        if given is None
    ]
    report["warnings"] = list(_warnings(report))
    return fidelity, report


def _warnings(report: dict[str, Any]) -> list[str]:
    """Sentences about what a reader should not overlook."""
    said = []
    listens = report["action_sensitivity"]
    if listens is not None:
        for name in ("swapped", "zeroed"):
            change, ratio = listens[name]["change"], listens[name]["ratio"]
            deaf = change == 0 if ratio is None else ratio["low"] is None or ratio["low"] <= 1
            if deaf:
                said.append(
                    f"The model does not listen to its actions: {name} actions change the picture by {change:.2f} levels, "
                    f"fresh noise by {listens['noise_change']:.2f}."
                )
    for row in report["horizon"]:
        fvd = row["dream"].get("fvd", {})
        if fvd.get("value") is not None and fvd["n"] <= fvd["dimensions"]:
            said.append(
                f"FVD of frames {row['frames'][0]}-{row['frames'][1]} comes from {fvd['n']} videos, fewer than its "
                f"{fvd['dimensions']} dimensions: biased upwards, comparable only at equal n."
            )
    return said


def read_episodes(data: Sequence[str], limit: int, frame_shape: tuple[int, int, int]) -> list[RecordedEpisode]:
    """At most ``limit`` episodes of the data sets, taken in turn, resized to the model's frames."""
    from rawdream_env.data.reader import LeRobotReader

    if not data:
        raise InvalidOptionError("give at least one data set with --data.")
    streams = [episodes_from_dataset(LeRobotReader(root, image_size=(frame_shape[0], frame_shape[1]))) for root in data]
    episodes: list[RecordedEpisode] = []
    while streams and len(episodes) < limit:
        for stream in list(streams):
            episode = next(stream, None)
            if episode is None:
                streams.remove(stream)
            elif len(episodes) < limit:
                episodes.append(episode)
    return episodes


def evaluate_world_model(config: EvaluateWorldModelConfig) -> dict[str, Any]:
    """Run the command: measure, write the folder, return the report.

    Raises:
        CheckpointError: the world model or a feature network cannot be loaded.
        DatasetError: no usable episode.
    """
    from rawdream_env.evaluation.world_model_report import write
    from rawdream_env.world_models.embedded import load_world_model

    if len(config.lpips) not in (0, 2):
        raise InvalidOptionError(f"--lpips takes two files, AlexNet's and LPIPS's own, got {len(config.lpips)}.")
    frame_features = perceptual.LpipsAlexNet(*config.lpips).to(config.device) if config.lpips else None
    video_features = perceptual.I3DFeatures(config.fvd, config.device) if config.fvd else None
    model = load_world_model(
        config.world_model,
        config.device,
        config.dtype,
        num_inference_steps=config.num_inference_steps,
        approximations=config.approximations,
    )
    fidelity, report = score_world_model(
        model,
        read_episodes(config.data, config.episodes, model.frame_shape),
        frame_features=frame_features,
        video_features=video_features,
        batch_size=config.batch_size,
        sensitivity_episodes=config.sensitivity_episodes,
        seed=config.seed,
        progress=True,
    )
    report |= {"run": provenance(), "config": asdict(config)}
    write(fidelity, report, Path(config.out))
    return report
