"""Train the dynamics of a scene world model on states of a simulator.

First on single frames, most of them near contact, with absolute errors in millimetres (a grasp depends on less than one).
Then on windows of several frames in which the model continues from its own predictions, twice with different noise, by the
energy score: the distance of the samples to the truth, minus half their distance to each other.

Shape letters: B rows, N objects, U frames of a window.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rawdream_env.seeding import mix
from rawdream_env.trainers.common.schedule import Schedule
from rawdream_env.trainers.common.training_loop import TrainingLoop
from rawdream_env.trainers.scene.states import SceneStates, Window, disturb
from rawdream_env.world_models.scene.dynamics import DynamicsConfig, SceneDynamics, SceneFrame
from rawdream_env.world_models.scene.loading import new_dynamics, read_dynamics

_ROTATION_MM = 20.0
"""Millimetres that count as much as an entry of the rotation matrix: about the objects' radius."""
_LINEAR_MM, _ANGULAR_MM = 30.0, 1.0
"""The same for velocities (per m/s and rad/s)."""
_ARM_MM = (1000.0,) * 3 + (100.0,) * 3 + (1000.0,) * 2
_VELOCITY_WEIGHT, _ARM_WEIGHT = 0.05, 0.7
_SOFT_MM = 0.15
"""Distances below this count less (m m), so that gradients stay finite."""


@dataclass(frozen=True)
class DynamicsTrainConfig:
    """Everything a dynamics run depends on."""

    data: tuple[str, ...]
    """Folders with ``states-*.safetensors``."""
    run_dir: str
    """Run folder. Rerun the same command to resume an interrupted run."""
    robot: str = ""
    """Name of the robot, whose scene the states are of; empty: the default robot."""
    model: DynamicsConfig = field(default_factory=lambda: DynamicsConfig(0, slender_spacing=0.006))
    """Architecture; the number of objects is the robot's."""
    init: str = ""
    """World-model or run folder with trained ``dynamics/`` to start from; empty: from scratch."""
    steps: int = 60_000
    """Number of optimizer steps; with ``minutes`` the maximum."""
    minutes: float = 0.0
    """Budget of training time in minutes; 0: no limit."""
    single_frames: float = 0.7
    """Share of the training on single frames."""
    unroll: int = 4
    """Frames of a window in the rest of the training."""
    batch_size: int = 768
    """Single frames per step."""
    unrolled_batch_size: int = 160
    """Windows per step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine to 1 %."""
    warmup: int = 300
    """Steps of linear warm-up."""
    weight_decay: float = 1e-3
    """AdamW weight decay."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the saved ones."""
    disturbance: float = 1.0
    """Size of the errors added to inputs; 1: up to 0.5 mm and 10 mrad."""
    seed: int = 0
    """Seed of initialization, batches and noise."""
    log_every: int = 200
    """Steps between lines of metrics."""
    save_every: int = 2000
    """Steps between checkpoints."""


def train_dynamics(config: DynamicsTrainConfig, *, progress: bool = True) -> SceneDynamics:
    """Train or resume the run described by ``config``; returns the averaged network.

    Raises:
        DatasetError: the data cannot be used. RunDirError: ``run_dir`` holds another run.
    """
    states = SceneStates(config.data, config.unroll)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, 1))
        model = new_dynamics(config.model, config.robot)
    if config.init:
        model = read_dynamics(Path(config.init), config.robot).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    schedule = Schedule(config.lr, config.steps, config.warmup, config.minutes, floor=0.01)
    with TrainingLoop(
        config.run_dir,
        asdict(config),
        model,
        optimizer,
        schedule,
        ema=config.ema,
        save_every=config.save_every,
        may_change=("minutes", "log_every", "save_every"),
        timed=True,
        name="dynamics",
        progress=progress,
    ) as loop:
        for step in loop:
            rng = np.random.default_rng(mix(config.seed, 2, step))
            generator = torch.Generator().manual_seed(mix(config.seed, 3, step))
            single = schedule.done(step, loop.seconds) < config.single_frames
            window = states.draw(
                rng,
                config.batch_size if single else config.unrolled_batch_size,
                1 if single else config.unroll,
            )
            first = disturb(window.first, config.disturbance, generator)
            loss, metrics = (one_frame_loss if single else energy_loss)(model, window, first, generator)
            loss.backward()
            norm = loop.update()
            if loop.every(config.log_every):
                loop.log(lr=loop.rate, loss=loss, grad_norm=norm, unroll=1 if single else config.unroll, **metrics)
        model.load_state_dict(loop.averaged())
    return model.eval()


Metrics = dict[str, Tensor]


def one_frame_loss(
    model: SceneDynamics, window: Window, first: SceneFrame, generator: torch.Generator
) -> tuple[Tensor, Metrics]:
    """Mean absolute error of the first frame of the windows, in millimetres (see the constants)."""
    truth = window.after(0)
    noise = torch.randn(len(window.which), model.config.noise_dim, generator=generator)
    frame = model(window.which, first, truth.command, noise)

    def miss(a: Tensor, b: Tensor) -> Tensor:
        return F.smooth_l1_loss(a, b, reduction="none", beta=0.2)

    position = miss(frame.position * 1000, truth.position * 1000).sum(-1).mean()
    rotation = miss(frame.rotation * _ROTATION_MM, truth.rotation * _ROTATION_MM).sum((-1, -2)).mean()
    scale = torch.tensor([_LINEAR_MM] * 3 + [_ANGULAR_MM] * 3)
    velocity = miss(frame.velocity * scale, truth.velocity * scale).sum(-1).mean()
    arm_scale = torch.tensor(_ARM_MM)
    arm = miss(frame.arm * arm_scale, truth.arm * arm_scale).sum(-1).mean()
    loss = position + 0.5 * rotation + _VELOCITY_WEIGHT * velocity + _ARM_WEIGHT * arm
    return loss, {"position_mm": position, "rotation": rotation, "velocity": velocity, "arm": arm}


def energy_loss(
    model: SceneDynamics, window: Window, first: SceneFrame, generator: torch.Generator
) -> tuple[Tensor, Metrics]:
    """Energy score of two samples, mean over frames and objects, plus that of the arm; distances in millimetres."""
    one = two = first
    objects: list[Tensor] = []
    arms: list[Tensor] = []
    spread: list[Tensor] = []
    arm_scale = torch.tensor(_ARM_MM)
    for u in range(window.rest.arm.shape[1]):
        truth = window.after(u)
        noise = torch.randn(2, len(window.which), model.config.noise_dim, generator=generator)
        one = model(window.which, one, truth.command, noise[0])
        two = model(window.which, two, truth.command, noise[1])
        objects.append(energy_score(_objects(one), _objects(two), _objects(truth)))
        arms.append(energy_score(one.arm * arm_scale, two.arm * arm_scale, truth.arm * arm_scale))
        spread.append((one.position - two.position).detach().norm(dim=-1).mean() * 1000)
    object_score, arm_score = torch.stack(objects).mean(), torch.stack(arms).mean()
    metrics: dict[str, Any] = {
        "object_score": object_score,
        "arm_score": arm_score,
        "spread_mm": torch.stack(spread).mean(),
    }
    return object_score + 0.5 * arm_score, metrics


def _objects(frame: SceneFrame) -> Tensor:
    """State of every object as a vector whose length is in millimetres, (B, N, 18)."""
    scale = torch.tensor([_LINEAR_MM] * 3 + [_ANGULAR_MM] * 3) * 0.15
    return torch.cat([frame.position * 1000, frame.rotation.flatten(-2) * 14, frame.velocity * scale], -1)


def energy_score(one: Tensor, two: Tensor, truth: Tensor) -> Tensor:
    """Energy score of two samples, each a vector (..., D) in millimetres: their mean distance to ``truth`` minus half the
    distance between them, averaged. Distances are softened below ``_SOFT_MM``.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b).square().sum(-1) + _SOFT_MM**2).sqrt() - _SOFT_MM

    return (0.5 * (distance(one, truth) + distance(two, truth)) - 0.5 * distance(one, two)).mean()
