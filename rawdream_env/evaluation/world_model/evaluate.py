"""``rawdream world-model evaluate``: compare imagined frames with recorded ones.

The world model imagines recorded episodes from their first frame and their actions only. Every frame is compared with the
recorded one: PSNR, SSIM, LPIPS and FVD by horizon, over the whole image and the moving region, with two baselines. The
report also tells whether actions have an effect and whether objects that were moved away reappear.
:mod:`rawdream_env.evaluation.world_model.fidelity` defines the numbers.

Writes these files atomically, the page last:

- ``fidelity.json``: every number, with the configuration, versions and hardware;
- ``grid.mp4``, ``grid.gif``: episodes as rows, real | imagined | difference;
- ``report.html``: table, charts and the film in one file.

Paper: RAW-Dream (arXiv 2605.12334), table of world-model fidelity.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env.config import parse_positive_int
from rawdream_env.data.recorded import Recording, episodes_from_dataset
from rawdream_env.errors import InvalidOptionError
from rawdream_env.evaluation.reporting.provenance import provenance
from rawdream_env.evaluation.world_model.fidelity import (
    Fidelity,
    evaluate_fidelity,
)
from rawdream_env.media import encode_gif, encode_video

if TYPE_CHECKING:
    from rawdream_env.evaluation.world_model.fvd import VideoFeatures
    from rawdream_env.evaluation.world_model.lpips import FrameFeatures
    from rawdream_env.types import WorldModel

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateWorldModelConfig:
    """Options of ``rawdream world-model evaluate``."""

    data: tuple[str, ...]
    """LeRobotDataset v3.0 folders of recorded episodes that are not training data of the world model."""
    world_model: str = "embedded"
    """World model: "embedded", a folder, hub id or module:factory."""
    out: str = "runs/evaluate_world_model"
    """Folder for fidelity.json, report.html, grid.mp4 and grid.gif."""
    episodes: int = 100
    """Use at most N episodes of each folder; 0: all."""
    horizon: int = 0
    """Use at most N frames of each episode; 0: all."""
    batch_size: int = 16
    """Number of episodes imagined in parallel."""
    sensitivity_episodes: int = 16
    """Number of episodes for the action-sensitivity test (3 more replays of each); 0: skip the test."""
    videos: int = 6
    """Number of episodes in the film."""
    device: str = "cpu"
    """Torch device of the models."""
    dtype: str | None = None
    """Precision of the world model: "float32" (the default, bit-reproducible) or "bfloat16" (faster)."""
    num_inference_steps: int | None = None
    """Denoising steps per chunk; default: the checkpoint's."""
    approximations: tuple[str, ...] = ()
    """Faster, less accurate variants of the world model: rolling_cache, tiny_decoder, fp8."""
    seed: int = 0
    """Seed of the world model's noise."""
    lpips: str = ""
    """Folder with alexnet-owt-7be5be79.pth and alex.pth; without it LPIPS is not measured."""
    fvd: str = ""
    """The file i3d_torchscript.pt; without it FVD is not measured. The file contains code: use one you trust."""


@dataclass(frozen=True)
class WorldModelEvaluation:
    """What :func:`evaluate_world_model` returns: ``report`` (the content of ``fidelity.json``) and where it is."""

    report: dict[str, Any]
    folder: Path

    def table(self) -> str:
        """The numbers as text."""
        from rawdream_env.evaluation.world_model.report import text_table

        return text_table(self.report)


def evaluate_world_model(
    config: EvaluateWorldModelConfig,
    *,
    world_model: WorldModel | None = None,
    frame_features: FrameFeatures | None = None,
    video_features: VideoFeatures | None = None,
    progress: bool = True,
) -> WorldModelEvaluation:
    """Evaluate a world model on recorded episodes and write the report; existing files are replaced.

    Args:
        config: options.
        world_model: instead of ``config.world_model``.
        frame_features: extractor for LPIPS, instead of ``config.lpips``.
        video_features: extractor for FVD, instead of ``config.fvd``.
        progress: show progress bars.

    Raises:
        InvalidOptionError: an option is out of range.
        CheckpointError: the world model or the file of an extractor is missing or does not fit.
        DatasetError: a data folder is damaged, or has no episode of at least one chunk.
    """
    from rawdream_env.evaluation.reporting.output import writing_results
    from rawdream_env.evaluation.world_model.report import render
    from rawdream_env.files import atomic_write_bytes, atomic_write_json, atomic_write_text, check_output

    _check(config)
    folder = Path(config.out)
    check_output(folder)
    if frame_features is None and config.lpips:
        from rawdream_env.evaluation.world_model.lpips import LpipsAlex

        frame_features = LpipsAlex(config.lpips, config.device)
    if video_features is None and config.fvd:
        from rawdream_env.evaluation.world_model.fvd import I3DTorchScript

        video_features = I3DTorchScript(config.fvd, config.device)
    if world_model is None:
        from rawdream_env.world_models import load_world_model

        world_model = load_world_model(
            config.world_model,
            device=config.device,
            dtype=config.dtype,
            num_inference_steps=config.num_inference_steps,
            approximations=config.approximations,
        )
    episodes, notes = _read(config, world_model)
    fidelity = evaluate_fidelity(
        world_model,
        episodes,
        seed=config.seed,
        batch_size=config.batch_size,
        sensitivity_episodes=config.sensitivity_episodes,
        samples=config.videos,
        frame_features=frame_features,
        video_features=video_features,
        progress=progress,
    )
    fidelity = replace(fidelity, notes=(*notes, *fidelity.notes))
    report = {
        **fidelity.as_dict(),
        "config": {**asdict(config), "data": list(config.data)},
        "run": provenance(seed=config.seed),
    }
    film = _film(fidelity)
    page = render(report, film.get("grid.mp4"))
    with writing_results(folder):
        for name, content in film.items():
            atomic_write_bytes(folder / name, content)
        atomic_write_json(folder / "fidelity.json", report)
        atomic_write_text(folder / "report.html", page)
    return WorldModelEvaluation(report, folder)


def _check(config: EvaluateWorldModelConfig) -> None:
    """Check the options before anything is loaded."""
    if not config.data:
        raise InvalidOptionError("no data given; pass folders of recorded episodes with --data FOLDER [FOLDER ...].")
    for name in ("episodes", "horizon", "sensitivity_episodes", "videos", "seed"):
        parse_positive_int(name, getattr(config, name), minimum=0)
    parse_positive_int("batch_size", config.batch_size)


def _read(config: EvaluateWorldModelConfig, model: WorldModel) -> tuple[list[Recording], list[str]]:
    """Episodes of all folders cut to the horizon, and warnings about them."""
    from rawdream_env.data.reader import LeRobotReader

    if 0 < config.horizon < model.chunk_len:
        raise InvalidOptionError(
            f"horizon={config.horizon} is less than one chunk; use at least {model.chunk_len} frames, or 0 for all."
        )
    found: list[Recording] = []
    notes: list[str] = []
    for folder in config.data:
        recorded = LeRobotReader(folder).frame_shape
        reader = LeRobotReader(folder, image_size=(model.frame_shape[0], model.frame_shape[1]))
        if recorded != tuple(model.frame_shape):
            notes.append(f"{folder} has frames of shape {recorded}; they are resized to {tuple(model.frame_shape)}.")
        if abs(reader.fps - model.fps) > 1e-3:
            notes.append(
                f"{folder} was recorded at {reader.fps:g} frames per second, but the world model was trained at "
                f"{model.fps:g}: the same action is a different motion."
            )
        found += episodes_from_dataset(reader, limit=config.episodes or None, horizon=config.horizon or None)
    for note in notes:
        _LOGGER.warning(note)
    return found, notes


def _film(fidelity: Fidelity) -> dict[str, bytes]:
    """File name -> content of the grid of episodes; empty without episodes to show."""
    if not fidelity.samples:
        return {}
    side = fidelity.samples[0][0].shape[1]
    scale = -(-128 // side)  # small images are enlarged in the film; the GIF would become too large
    return {
        "grid.mp4": encode_video([fidelity.comparison(scale)], fidelity.fps),
        "grid.gif": encode_gif(fidelity.comparison(), fidelity.fps),
    }
