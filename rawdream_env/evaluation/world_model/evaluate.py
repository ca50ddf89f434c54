"""How far a world model's imagined frames follow the recorded ones: ``rawdream world-model evaluate``.

Recorded episodes are imagined from their first frame and actions alone, and every frame is held against the recorded
one: PSNR, SSIM, LPIPS and FVD by horizon, whole picture and moving region, beside two baselines; whether actions matter;
whether moved objects come back as ghosts. :mod:`rawdream_env.evaluation.world_model.fidelity` says what the numbers mean.

Writes into the output folder, each file whole or not at all, the page last:

- ``fidelity.json``: every number, with the configuration and what it was run on;
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
    """LeRobotDataset v3 folders of recorded episodes that the world model was not trained on."""
    world_model: str = "embedded"
    """World model: "embedded" or a folder."""
    out: str = "runs/evaluate_world_model"
    """Folder for fidelity.json, report.html, grid.mp4 and grid.gif."""
    episodes: int = 100
    """The first so many episodes of every folder; 0: all. Intervals are over episodes."""
    horizon: int = 0
    """Frames to imagine of each episode; 0: to its end."""
    batch_size: int = 16
    """Episodes imagined at once."""
    sensitivity_episodes: int = 16
    """Episodes imagined three times more, with other actions and with other noise; 0: leave it out."""
    videos: int = 6
    """Episodes in the film."""
    device: str = "cpu"
    """Torch device of the models."""
    dtype: str | None = None
    """Precision of the world model: "float32" (the default, bit-reproducible) or "bfloat16" (faster)."""
    num_inference_steps: int | None = None
    """Evaluations of the world model's sampler per chunk; the checkpoint's own when not given."""
    approximations: tuple[str, ...] = ()
    """Opt-in shortcuts of the world model that cost accuracy: rolling_cache, tiny_decoder, fp8."""
    seed: int = 0
    """Seed of the imagination's noise."""
    lpips: str = ""
    """Folder with alexnet-owt-7be5be79.pth and alex.pth; empty: LPIPS is not measured."""
    fvd: str = ""
    """The file i3d_torchscript.pt; empty: FVD is not measured. It is code: name only a file you trust."""


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
    """Measure a world model on recorded episodes and write the files the module names. Running it again replaces them.

    Args:
        config: what to measure on what.
        world_model: replaces the one ``config`` names.
        frame_features: measures LPIPS instead of what ``config.lpips`` names.
        video_features: measures FVD instead of what ``config.fvd`` names.
        progress: show bars.

    Raises:
        InvalidOptionError: an option is out of range, or nothing is left to measure on.
        CheckpointError: the world model or an extractor's file is missing or does not fit.
        DatasetError: a data folder is damaged, or its frames are not the world model's.
    """
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
    folder.mkdir(parents=True, exist_ok=True)
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
    for name, content in film.items():
        atomic_write_bytes(folder / name, content)
    atomic_write_json(folder / "fidelity.json", report)
    atomic_write_text(folder / "report.html", render(report, film.get("grid.mp4")))
    return WorldModelEvaluation(report, folder)


def _check(config: EvaluateWorldModelConfig) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    if not config.data:
        raise InvalidOptionError("no data given; name recorded episodes with --data FOLDER [FOLDER ...].")
    for name in ("episodes", "horizon", "sensitivity_episodes", "videos", "seed"):
        parse_positive_int(name, getattr(config, name), minimum=0)
    parse_positive_int("batch_size", config.batch_size)


def _read(config: EvaluateWorldModelConfig, model: WorldModel) -> tuple[list[Recording], list[str]]:
    """Episodes of all folders cut to the horizon, and sentences on what about them to beware of."""
    from rawdream_env.data.reader import LeRobotReader

    if 0 < config.horizon < model.chunk_len:
        raise InvalidOptionError(
            f"horizon={config.horizon} is less than one chunk; the world model imagines {model.chunk_len} frames at once."
        )
    found: list[Recording] = []
    notes: list[str] = []
    for folder in config.data:
        recorded = LeRobotReader(folder).frame_shape
        reader = LeRobotReader(folder, image_size=(model.frame_shape[0], model.frame_shape[1]))
        if recorded != tuple(model.frame_shape):
            notes.append(f"{folder} has frames of {recorded}, resized here to {tuple(model.frame_shape)}.")
        if abs(reader.fps - model.fps) > 1e-3:
            notes.append(
                f"{folder} was recorded at {reader.fps:g} frames a second, the world model was trained at {model.fps:g}: "
                "an action means another motion."
            )
        found += episodes_from_dataset(reader, limit=config.episodes or None, horizon=config.horizon or None)
    for note in notes:
        _LOGGER.warning(note)
    return found, notes


def _film(fidelity: Fidelity) -> dict[str, bytes]:
    """File name -> content of the grid; empty when no episode is to be shown."""
    if not fidelity.samples:
        return {}
    side = fidelity.samples[0][0].shape[1]
    scale = -(-128 // side)  # small pictures are enlarged for the film, not for the heavier GIF
    return {
        "grid.mp4": encode_video([fidelity.comparison(scale)], fidelity.fps),
        "grid.gif": encode_gif(fidelity.comparison(), fidelity.fps),
    }
