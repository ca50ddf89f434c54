"""Train the reader: start pictures of a simulator with the object states they show.

Shape letters: B rows, O objects, h cells of a side.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rawdream_env.robots import find_robot
from rawdream_env.seeding import mix
from rawdream_env.trainers.common.schedule import Schedule
from rawdream_env.trainers.common.training_loop import TrainingLoop
from rawdream_env.trainers.scene.data import STARTS, load_shards
from rawdream_env.world_models.scene.maps import canonical_rotation, project
from rawdream_env.world_models.scene.reader import ReaderConfig, Reading, SceneReader


@dataclass(frozen=True)
class ReaderTrainConfig:
    """Everything a reader run depends on."""

    data: tuple[str, ...]
    """Folders with ``starts-*.safetensors``."""
    run_dir: str
    """Run folder. Rerun the same command to resume an interrupted run."""
    model: ReaderConfig = field(default_factory=ReaderConfig)
    """Architecture; the picture size and the number of objects are those of the data."""
    steps: int = 6000
    """Number of optimizer steps; with ``minutes`` the maximum."""
    minutes: float = 0.0
    """Budget of training time in minutes; 0: no limit."""
    batch_size: int = 64
    """Pictures per step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine to 2 %."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the saved ones."""
    held_out: int = 500
    """Pictures at the end of the data that are kept for validation."""
    bf16: bool = True
    """Train in bfloat16 autocast; the read-outs and the saved weights are float32."""
    seed: int = 0
    """Seed of initialization and batches."""
    log_every: int = 100
    """Steps between lines of metrics."""
    save_every: int = 500
    """Steps between checkpoints and validations."""


def train_reader(config: ReaderTrainConfig, *, progress: bool = True) -> SceneReader:
    """Train or resume the run described by ``config``; returns the averaged reader.

    Raises:
        DatasetError: the data cannot be used. RunDirError: ``run_dir`` holds another run.
    """
    data = load_shards(config.data, "starts", STARTS)
    symmetry = torch.tensor(find_robot(config.model.robot).load("scene").symmetry)
    data["start_rotation"] = canonical_rotation(data["start_rotation"], symmetry)
    train, held = ({name: x[part] for name, x in data.items()} for part in _split(len(data["start"]), config.held_out))
    size, objects = data["start"].shape[1], data["present"].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, 1))
        model = SceneReader(replace(config.model, image_size=size, objects=objects))
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
        name="reader",
        progress=progress,
    ) as loop:
        for step in loop:
            rng = np.random.default_rng(mix(config.seed, 2, step))
            chosen = torch.from_numpy(rng.integers(len(train["start"]), size=config.batch_size))
            batch = {name: x[chosen] for name, x in train.items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                reading = model(batch["start"], batch["present"])
            losses = reader_losses(
                reading, batch["start_position"], batch["start_rotation"], batch["present"], model.camera
            )
            torch.stack(list(losses.values())).sum().backward()
            norm = loop.update()
            if loop.every(config.log_every):
                loop.log(lr=loop.rate, **losses, grad_norm=norm)
            if loop.every(config.save_every):
                averaged.load_state_dict(loop.averaged())
                loop.log(**validate_reader(averaged, held))
        averaged.load_state_dict(loop.averaged())
        loop.log(**validate_reader(averaged, held))
    return averaged


def reader_losses(
    reading: Reading, position: Tensor, rotation: Tensor, present: Tensor, camera: Tensor
) -> dict[str, Tensor]:
    """The terms of the loss; their sum is minimized. Positions (B, O, 3) and rotations (B, O, 3, 3) of present objects count.

    ``present``: cross-entropy. ``position``: millimetres. ``rotation``: radians, times 15. ``heat``: cross-entropy with a small
    Gaussian around the object's centre. ``doubt``: Gaussian negative log likelihood of the errors, which are not changed by it.
    """
    count = present.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(present, x, 0).sum() / count

    miss = reading.position - position
    angle = (reading.rotation - rotation).square().sum((-1, -2)).div(2)  # squared radians
    side = reading.heat.shape[-1]
    grid = torch.arange(side, device=position.device) + 0.5
    centre = project(camera, position).detach() * side
    near_v, near_u = ((grid - centre[..., i, None]).square().div(-2 * 0.7**2) for i in (1, 0))
    target = (near_v[..., :, None] + near_u[..., None, :]).flatten(2).softmax(-1)
    far = miss.detach().clamp(-0.02, 0.02) / reading.position_std
    turned = angle.detach().clamp(max=0.04) / reading.rotation_std.square()
    doubt = (0.5 * far.square() + reading.position_std.log()).sum(-1) + 0.5 * turned + reading.rotation_std.log()
    return {
        "present": F.binary_cross_entropy_with_logits(reading.present, present.float()),
        "position": mean(_length(1000 * miss, 0.3).sum(-1)),
        "rotation": 15 * mean((angle + 0.02**2).sqrt() - 0.02),
        "heat": 0.3 * mean(-(target * reading.heat.flatten(2)).sum(-1)),
        "doubt": 0.1 * mean(doubt),
    }


def _length(x: Tensor, soft: float) -> Tensor:
    """Absolute value, quadratic below ``soft``."""
    return (x.square() + soft**2).sqrt() - soft


@torch.no_grad()
def validate_reader(reader: SceneReader, held: dict[str, Tensor]) -> dict[str, float]:
    """Errors on held-out starts: millimetres and degrees (median and 95 %), share of presence that is right, and the share
    of errors along x and y that are within one predicted standard deviation (0.68 is calibrated).
    """
    parts = [reader(rows) for rows in held["start"].split(100)]
    present = held["present"]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    miss = (joined("position") - held["start_position"])[present]
    angle = (joined("rotation") - held["start_rotation"]).square().sum((-1, -2)).div(2).sqrt()[present]
    millimetres, degrees = 1000 * miss.norm(dim=-1), angle.rad2deg()
    within = (miss.abs() < joined("position_std")[present])[:, :2]
    return {
        "held_out/mm_median": float(millimetres.median()),
        "held_out/mm_95": float(millimetres.quantile(0.95)),
        "held_out/degrees_median": float(degrees.median()),
        "held_out/degrees_95": float(degrees.quantile(0.95)),
        "held_out/present": float(((joined("present") > 0) == present).float().mean()),
        "held_out/within_std": float(within.float().mean()),
    }


def _split(count: int, held_out: int) -> tuple[slice, slice]:
    held = min(held_out, max(1, count // 5))
    return slice(0, count - held), slice(count - held, count)
