"""Train the painter: random frames of a simulator with the states they show, each painted from its episode's start.

Pixels that differ from the background (arm and objects) count more than the others, objects most.

Shape letters: B rows, O objects, S picture size.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from rawdream_env.seeding import mix
from rawdream_env.trainers.common.schedule import Schedule
from rawdream_env.trainers.common.training_loop import TrainingLoop
from rawdream_env.trainers.scene.data import PICTURES, load_shards
from rawdream_env.world_models.scene.maps import SceneMaps
from rawdream_env.world_models.scene.painter import PainterConfig, ScenePainter, to_signed

FOREGROUND = 0.1
"""A pixel (in [-1, 1]) that differs from the background by more than this is foreground."""


@dataclass(frozen=True)
class PainterTrainConfig:
    """Everything a painter run depends on."""

    data: tuple[str, ...]
    """Folders with ``pictures-*.safetensors``."""
    run_dir: str
    """Run folder. Rerun the same command to resume an interrupted run."""
    robot: str = ""
    """Name of the robot, whose scene the pictures show; empty: the default robot."""
    model: PainterConfig = field(default_factory=PainterConfig)
    """Architecture; the picture size and the number of map channels are those of data and robot."""
    steps: int = 6000
    """Number of optimizer steps; with ``minutes`` the maximum."""
    minutes: float = 0.0
    """Budget of training time in minutes; 0: no limit."""
    batch_size: int = 24
    """Pictures per step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine to 2 %."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 1e-3
    """AdamW weight decay."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the saved ones."""
    foreground_weight: float = 6.0
    """Extra weight of pixels that differ from the background."""
    object_weight: float = 6.0
    """Extra weight of pixels that an object's surface covers."""
    held_out: int = 20
    """Episodes at the end of the data that are kept for validation."""
    bf16: bool = True
    """Train in bfloat16 autocast; the saved weights are float32."""
    seed: int = 0
    """Seed of initialization and batches."""
    log_every: int = 100
    """Steps between lines of metrics."""
    save_every: int = 500
    """Steps between checkpoints and validations."""


def train_painter(config: PainterTrainConfig, *, progress: bool = True) -> ScenePainter:
    """Train or resume the run described by ``config``; returns the averaged painter.

    Raises:
        DatasetError: the data cannot be used. RunDirError: ``run_dir`` holds another run.
    """
    data = load_shards(config.data, "pictures", PICTURES)
    count, frames, size = *data["frame"].shape[:2], data["frame"].shape[2]
    held = min(config.held_out, max(1, count // 5))
    maps = SceneMaps(config.robot, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, 1))
        model = ScenePainter(replace(config.model, image_size=size, map_channels=maps.channels))
    with torch.no_grad():
        model.background.copy_(to_signed(data["start"][:400]).median(0).values)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    with TrainingLoop(
        config.run_dir,
        asdict(config),
        model,
        optimizer,
        Schedule(config.lr, config.steps, config.warmup, config.minutes),
        ema=config.ema,
        save_every=config.save_every,
        may_change=("minutes", "log_every", "save_every"),
        timed=True,
        name="painter",
        progress=progress,
    ) as loop:
        for step in loop:
            rng = np.random.default_rng(mix(config.seed, 2, step))
            episodes = torch.from_numpy(rng.integers(count - held, size=config.batch_size))
            chosen = torch.from_numpy(rng.integers(frames, size=config.batch_size))
            start_maps, now_maps = draw_maps(maps, data, episodes, chosen)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                painted = model(model.start(data["start"][episodes], start_maps), now_maps)
            target = to_signed(data["frame"][episodes, chosen])
            loss = painter_loss(painted, target, pixel_weights(target, model.background, maps.cover(now_maps), config))
            loss.backward()
            norm = loop.update()
            if loop.every(config.log_every):
                loop.log(lr=loop.rate, loss=loss, grad_norm=norm)
            if loop.every(config.save_every):
                averaged.load_state_dict(loop.averaged())
                loop.log(**validate_painter(averaged, maps, data, held))
        averaged.load_state_dict(loop.averaged())
        loop.log(**validate_painter(averaged, maps, data, held))
    return averaged


def draw_maps(maps: SceneMaps, data: dict[str, Tensor], episodes: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of the starts and of the chosen ``frames`` (B,) of ``episodes`` (B,)."""
    present = data["present"][episodes]
    start = [data[f"start_{name}"][episodes] for name in ("position", "rotation", "arm")]
    now = [data[name][episodes, frames] for name in ("position", "rotation", "arm")]
    return maps.draw(start[0], start[1], present, start[2]), maps.draw(now[0], now[1], present, now[2])


def pixel_weights(target: Tensor, background: Tensor, covered: Tensor, config: PainterTrainConfig) -> Tensor:
    """Weights (B, 1, S, S) of the pixels of ``target`` (B, 3, S, S), of which objects cover the shares ``covered``."""
    foreground = ((target - background.detach()).abs().amax(1, keepdim=True) > FOREGROUND).float()
    return 1 + config.foreground_weight * foreground + config.object_weight * covered


def painter_loss(painted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of absolute plus squared errors; pictures (B, 3, S, S), weights (B, 1, S, S)."""
    miss = painted - target
    return (weight * (miss.abs() + miss.square())).mean()


@torch.no_grad()
def validate_painter(painter: ScenePainter, maps: SceneMaps, data: dict[str, Tensor], held: int) -> dict[str, float]:
    """PSNR in decibels of the last ``held`` episodes' frames: all pixels, the foreground, pixels covered by objects."""
    count, frames = data["frame"].shape[:2]
    errors = {"all": torch.zeros(2), "foreground": torch.zeros(2), "objects": torch.zeros(2)}
    for episode in range(count - held, count):
        chosen = torch.arange(frames)
        start_maps, now_maps = draw_maps(maps, data, torch.full((frames,), episode), chosen)
        with torch.autocast("cpu", torch.bfloat16):
            painted = painter(painter.start(data["start"][episode].expand(frames, -1, -1, -1), start_maps), now_maps)
        target = to_signed(data["frame"][episode])
        squared = ((painted.clamp(-1, 1) - target) / 2).square().mean(1, keepdim=True)
        different = (target - painter.background).abs().amax(1, keepdim=True) > FOREGROUND
        masks = {"all": torch.ones_like(squared), "foreground": different}
        masks["objects"] = maps.cover(now_maps) > 0.3
        for name, mask in masks.items():
            errors[name] += torch.stack([(squared * mask).sum(), mask.sum().float()])
    return {f"held_out/psnr_{name}": float(-10 * (x[0] / x[1].clamp(min=1)).log10()) for name, x in errors.items()}
