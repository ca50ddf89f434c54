"""The scene world model as one object: reader -> dynamics -> painter behind the ``WorldModel`` protocol.

``start`` reads the objects' states from the start picture. ``imagine`` integrates the actions into commanded poses, moves
the scene frame by frame under keyed noise, and paints every frame from the start picture and the state, each by itself: an
object cannot fade, and what a frame shows does not depend on earlier painted frames. At run time the model sees the start
picture, the commanded start pose and the actions, nothing else.

Noise is drawn afresh for every chunk and keyed as in the video model: draw 1 is the second dream of dual-noise verification
(paper, section 3.2). It decides what the dynamics cannot know, such as whether a grasp at the edge holds.

Shape letters: B rows, K frames of a chunk, A action dims, O objects, N objects of a row, H W picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rawdream_env.errors import InvalidOptionError
from rawdream_env.robots import (
    LIFT_RISE,
    ArmMapConfig,
    BoolArray,
    FloatArray,
    Kinematics,
    Scene,
    find_goals,
    find_robot,
)
from rawdream_env.seeding import NoiseKey, keyed_normal
from rawdream_env.world_models.row_state import check_start, checked_actions
from rawdream_env.world_models.scene.dynamics import SceneDynamics, SceneFrame
from rawdream_env.world_models.scene.maps import SceneMaps
from rawdream_env.world_models.scene.painter import ScenePainter
from rawdream_env.world_models.scene.reader import Reading, SceneReader
from rawdream_env.world_models.scene.state import SceneState

DYNAMICS_STREAM, START_STREAM = 0, 1
_BLOCK = 32
"""Rows that the dynamics compute at once on a CPU, fillers included. Always the same number, so that matrix products round a
row alike; a multiple of 32, so that elementwise kernels leave no rest, which they would compute in another way."""
_PAINTED_AT_ONCE, _PAINTED_AT_ONCE_ON_CPU = 128, 32
"""Frames; a CPU's caches do not hold the features of more."""


@dataclass(frozen=True)
class SceneRolloutConfig:
    """How the world model is rolled out; saved with the checkpoint."""

    fps: float = 10.0
    """Frames per second of the imagined video, and steps of the dynamics."""
    chunk_len: int = 8
    """Frames of a chunk, K."""
    action_dim: int = 7
    """Action dims, A."""
    noise_scale: float = 1.0
    """Factor of the dynamics' noise: 1 as trained, less for outcomes nearer to the most likely one, 0 for none."""
    start_noise: float = 0.0
    """The reader's expected errors, times this, are added to the start state as keyed noise."""
    allowed_overlap: float | None = None
    """Objects that overlap by more than this (m) are pushed apart after every frame; None: they are not."""

    def check(self) -> None:
        """Raise ``InvalidOptionError`` for settings that no rollout can have."""
        if not (0 < self.fps <= 1000 and 1 <= self.chunk_len <= 1000 and 1 <= self.action_dim <= 1000):
            raise InvalidOptionError(
                f"fps {self.fps}, chunk_len {self.chunk_len} and action_dim {self.action_dim} must be above 0 and at most 1000."
            )
        if not (0 <= self.start_noise <= 100 and 0 <= self.noise_scale <= 100):
            raise InvalidOptionError(
                f"noise_scale {self.noise_scale} and start_noise {self.start_noise} must be between 0 and 100."
            )
        if self.allowed_overlap is not None and not 0 <= self.allowed_overlap <= 1:
            raise InvalidOptionError(f"allowed_overlap {self.allowed_overlap} must be between 0 and 1 m, or null.")


class _Task(NamedTuple):
    """A task's relation, as a column of the relations, and the object that it moves, as a row of the objects."""

    relation: int
    moved: int


class SceneWorldModel:
    """Batched, keyed imagination of object states, painted into pictures.

    On a CPU a row's states are bit-identical whatever the other rows are, and with fp32 weights so are its pictures; bf16
    gives up the latter for speed. The dynamics always compute in fp32.

    Args:
        reader: start picture to object states.
        dynamics: states to states.
        painter: states to pictures.
        config: rollout settings.
        robot: name of the robot whose scene it is; empty: the default robot.
        micro_batch_size: frames painted at once, to bound memory; 0: 32 on a CPU, 128 on a GPU.
    """

    def __init__(
        self,
        reader: SceneReader,
        dynamics: SceneDynamics,
        painter: ScenePainter,
        config: SceneRolloutConfig = SceneRolloutConfig(),
        *,
        robot: str = "",
        micro_batch_size: int = 0,
    ) -> None:
        config.check()
        self.reader, self.dynamics, self.painter = reader, dynamics, painter
        for part in (reader, dynamics, painter):
            part.eval().requires_grad_(False)
        self.config, self.robot = config, robot
        self.micro_batch_size = micro_batch_size
        size = painter.config.image_size
        self.chunk_len, self.fps, self.frame_shape = config.chunk_len, config.fps, (size, size, 3)
        self.maps = SceneMaps(robot, size)
        self.scene: Scene = self.maps.scene
        self._kinematics: Kinematics = find_robot(robot).load("kinematics")(ArmMapConfig())

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.painter.place.device

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> SceneWorldModel:
        """Move to a device (in place); ``dtype`` is the precision of the painter."""
        self.reader.to(device)
        self.dynamics.to(device)
        self.painter.to(device, dtype)
        return self

    @torch.no_grad()
    def start(self, frames: Tensor, keys: Sequence[NoiseKey], proprio: Tensor | None = None) -> SceneState:
        """Start B episodes. ``frames`` uint8 (B, H, W, 3); ``proprio`` (B, P) the commanded pose, required."""
        frames = torch.as_tensor(frames)
        check_start(frames, keys, self.frame_shape)
        wanted = (len(frames), self._kinematics.state_dim)
        if proprio is None or tuple(proprio.shape) != wanted:
            got = None if proprio is None else tuple(proprio.shape)
            raise ValueError(f"this world model moves the arm from its pose: give proprio {wanted}, got {got}")
        command = torch.as_tensor(proprio, dtype=torch.float32).cpu()
        distinct, which = torch.unique(
            frames.cpu().flatten(1), dim=0, return_inverse=True
        )  # a group's members start alike
        read = self.reader(distinct.unflatten(1, frames.shape[1:]).to(self.device))
        reading = Reading(*(getattr(read, field.name)[which.to(self.device)] for field in fields(Reading)))
        arm = self.scene.arm_at_rest(command)
        position = reading.position.float().cpu()
        if self.config.start_noise:
            noise = keyed_normal(keys, tuple(position.shape[1:]), START_STREAM)
            position = position + self.config.start_noise * reading.position_std.float().cpu() * noise
        present = reading.present.cpu() > 0
        rotation = reading.rotation.float().cpu()
        start_maps = self._maps(position, rotation, present, arm)
        return SceneState(
            position=position,
            rotation=rotation,
            velocity=torch.zeros(*present.shape, 6),
            present=present,
            arm=arm,
            arm_before=arm,
            command=command,
            heights=position[..., 2:].repeat(1, 1, 2),
            canvas=self.painter.start(frames.to(self.device), start_maps),
            keys=tuple(keys),
            chunks=(0,) * len(frames),
        )

    @torch.no_grad()
    def imagine(self, state: SceneState, actions: Tensor) -> tuple[SceneState, Tensor]:
        """One chunk for every row: ``actions`` (B, K, A) in [-1, 1] -> next state, frames uint8 (B, K, H, W, 3)."""
        states = self.trace(state, actions)
        pictures = self._paint(state, states, torch.ones(len(state), self.chunk_len, dtype=torch.bool))
        return states[-1], pictures.unflatten(0, (len(state), self.chunk_len))

    @torch.no_grad()
    def imagine_shown(self, state: SceneState, actions: Tensor, shown: Tensor) -> tuple[SceneState, Tensor]:
        """As :meth:`imagine`, but only the frames where ``shown``, bool (B, K), is True are painted: uint8 (M, H, W, 3), row
        by row and in the order of time.
        """
        if shown.dtype != torch.bool or tuple(shown.shape) != (len(state), self.chunk_len):
            raise ValueError(
                f"shown must be bool ({len(state)}, {self.chunk_len}), got {shown.dtype} {tuple(shown.shape)}"
            )
        states = self.trace(state, actions)
        return states[-1], self._paint(state, states, shown)

    @torch.no_grad()
    def trace(self, state: SceneState, actions: Tensor) -> list[SceneState]:
        """The states of a chunk's K frames, without pictures: ``actions`` (B, K, A); the last is that of :meth:`imagine`."""
        actions = checked_actions(actions, (len(state), self.chunk_len, self.config.action_dim))
        commands = self._kinematics.integrate(state.command, actions)
        keys = [key.at(chunk=chunk) for key, chunk in zip(state.keys, state.chunks, strict=True)]
        noise = keyed_normal(keys, (self.chunk_len, self.dynamics.config.noise_dim), DYNAMICS_STREAM)
        chunks = tuple(chunk + 1 for chunk in state.chunks)
        frames = self.unroll(state, commands, self.config.noise_scale * noise)
        states, highest = list[SceneState](), state.heights[..., 1]
        for frame in frames:
            highest = torch.maximum(highest, frame.position[..., 2])
            heights = torch.stack([state.heights[..., 0], highest], -1)
            states.append(replace(state, **frame._asdict(), heights=heights, chunks=chunks))
        return states

    def unroll(self, state: SceneState, commands: Tensor, noise: Tensor) -> list[SceneFrame]:
        """The K frames after ``state``, without pictures: commanded poses (B, K, P), noise (B, K, Z) -> each (B, O, ...)."""
        first = SceneFrame(*(getattr(state, name) for name in SceneFrame._fields))
        frames = [SceneFrame(*(x.clone() for x in first)) for _ in range(commands.shape[1])]
        counts = state.present.sum(1)
        for n in counts.unique().tolist():
            rows = (counts == n).nonzero()[:, 0]
            size = _BLOCK if self.device.type == "cpu" else len(rows)
            for block in rows.split(size):
                self._unroll_block(state, block, n, size, commands, noise, frames)
        return frames

    @torch.inference_mode()
    def _unroll_block(
        self,
        state: SceneState,
        rows: Tensor,
        n: int,
        size: int,
        commands: Tensor,
        noise: Tensor,
        frames: list[SceneFrame],
    ) -> None:
        """Fill ``rows`` of ``frames``, which have ``n`` objects each, from a batch of ``size`` rows."""
        padded = torch.cat([rows, rows[-1:].expand(size - len(rows))])
        which = state.present[padded].nonzero()[:, 1].view(len(padded), n)
        device = self.device

        def here(x: Tensor) -> Tensor:
            return x[padded].to(device)

        def objects(x: Tensor) -> Tensor:
            return x[padded[:, None], which].to(device)

        frame = SceneFrame(
            objects(state.position),
            objects(state.rotation),
            objects(state.velocity),
            here(state.arm),
            here(state.arm_before),
            here(state.command),
        )
        on_device, real, allowed = which.to(device), len(rows), self.config.allowed_overlap
        for k, target in enumerate(frames):
            frame = self.dynamics(on_device, frame, here(commands[:, k]), here(noise[:, k]), allowed)
            for whole, value in zip(target[:3], frame[:3], strict=True):
                whole[rows[:, None], which[:real]] = value[:real].cpu()
            for whole, value in zip(target[3:], frame[3:], strict=True):
                whole[rows] = value[:real].cpu()

    def _paint(self, state: SceneState, frames: list[SceneState], shown: Tensor) -> Tensor:
        """The ``shown`` (B, K) of the frames, uint8 (M, H, W, 3)."""
        position, rotation, arm = (
            torch.nan_to_num(torch.stack([getattr(frame, name) for frame in frames], 1)[shown])
            for name in ("position", "rotation", "arm")
        )
        row = shown.nonzero()[:, 0]
        out = torch.empty(len(row), *self.frame_shape, dtype=torch.uint8)
        most = _PAINTED_AT_ONCE_ON_CPU if self.device.type == "cpu" else _PAINTED_AT_ONCE
        for some in torch.arange(len(row)).split(self.micro_batch_size or most):
            with torch.inference_mode():
                maps = self._maps(position[some], rotation[some], state.present[row[some]], arm[some])
                out[some] = self.painter.paint(state.canvas[row[some].to(self.device)], maps).cpu()
        return out

    def _maps(self, position: Tensor, rotation: Tensor, present: Tensor, arm: Tensor) -> Tensor:
        opening = arm[:, 6:].sum(-1, keepdim=True)
        maps = self.maps.draw(position, rotation, present, torch.cat([arm[:, :6], opening], -1))
        return maps.to(self.device)

    def belief(self, state: SceneState) -> tuple[FloatArray, BoolArray]:
        """Object poses (B, O, 7), NaN for absent ones, and relations (B, R), as a simulator records them."""
        return self.scene.truth(state.position, state.rotation, state.present, state.arm)

    def success(self, state: SceneState, instructions: Sequence[str]) -> NDArray[np.int8]:
        """Whether the task of each row's instruction is done in the model's own state: 1, 0, or -1 where it cannot tell (int8
        (B,)). The truth within the dream, which the judge "state" reports.
        """
        asked = [self._tasks.get(words) for words in instructions]
        out = np.full(len(state), -1, np.int8)
        if all(task is None for task in asked):
            return out
        _, holds = self.belief(state)
        finite = state.finite.numpy()
        for row, task in enumerate(asked):
            if task is not None and finite[row]:
                out[row] = holds[row, task.relation]
        return out

    def lifted(self, state: SceneState, instructions: Sequence[str]) -> NDArray[np.int8]:
        """Whether the object that each row's task moves has been picked up so far, by ``robots.LIFT_RISE``: int8 (B,), 1, 0, or
        -1 where it cannot tell.
        """
        out = np.full(len(state), -1, np.int8)
        rises = (state.heights[..., 1] - state.heights[..., 0]).numpy() >= LIFT_RISE
        finite = state.finite.numpy()
        for row, words in enumerate(instructions):
            task = self._tasks.get(words)
            if task is not None and finite[row]:
                out[row] = rises[row, task.moved]
        return out

    @cached_property
    def _tasks(self) -> dict[str, _Task]:
        """What each task's instruction asks for."""
        goals = find_goals(self.robot)
        if goals is None:
            return {}
        relations, objects = list(goals.relations), list(self.scene.objects)
        return {
            words: _Task(relations.index(goal), objects.index(goals.goal_objects(goal)[0]))
            for _, words, goal in goals.tasks
            if goal in relations
        }
