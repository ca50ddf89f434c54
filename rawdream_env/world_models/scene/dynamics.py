"""Dynamics of a scene: what the objects and the gripper do in the next frame (0.1 s at 10 Hz).

One frame at a time, because contact is a matter of the present state: from exact states the lift or the miss of a grasp is
a simple function of where the fingers are relative to the object, to a millimetre. A chunk is K such steps.

``SceneDynamics`` sees the scene from the gripper: positions and rotations relative to the measured tool, and the fingertips
in every object's own frame, in several length scales. Objects that look the same after a turn about their own axes are
turned to one representative first. Objects see each other through the points at which they touch (``contact.py``). It
predicts motion relative to rigid carrying by the tool.

What cannot be known is sampled: every frame takes a vector of normal noise, and training minimises the energy score of two
samples (Gneiting and Raftery 2007, "Strictly proper scoring rules", section 4.3), which is smallest when samples are
distributed as outcomes are. Where the outcome is certain both samples agree; where it is not (a grasp at the edge of a
handle), a sample is one outcome, never the mean of two. One evaluation per frame; a diffusion sampler over the same states
needs several, and its error per frame would have to be below a tenth of a millimetre to stay useful over 64 frames.

Shape letters: B rows, N objects of a row (all present), O objects of the robot's scene, A action dims, P command dims,
Z noise dims, D width, E = N (N - 1) ordered pairs, G rotations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.errors import InvalidOptionError
from rawdream_env.world_models.scene.contact import ContactNetwork, Shape
from rawdream_env.world_models.scene.overlap import Separation
from rawdream_env.world_models.scene.rotations import apply, compose, rotate

_LENGTHS = (0.10, 0.04, 0.016)
"""Periods (m) of the sines and cosines that make millimetres visible."""
_PER_LENGTH = 1 + 2 * len(_LENGTHS)
_GRIPPER = 37
"""Features of arm and command."""
ARM_DIM = 8
"""Measured tool xyz (m), roll pitch yaw (rad), positions of the left and the right finger (m)."""


@dataclass(frozen=True)
class DynamicsConfig:
    """Size of the network."""

    num_objects: int
    """Objects of the robot's scene, O."""
    width: int = 160
    """D."""
    layers: int = 2
    """Residual blocks before and after the exchange between objects, each."""
    noise_dim: int = 8
    """Z."""
    still_distance: float = 1.5e-4
    """An object whose predicted motion in a frame is below this (m) and ``still_angle`` (rad) stays exactly where it is."""
    still_angle: float = 3e-3
    """See ``still_distance``."""
    slender_spacing: float = 0.015
    """Distance (m) of the contact points along slender boxes: a wall that is thinner passes between two points unseen. 0.015 is
    the distance along all other edges."""

    def check(self) -> None:
        """Raise ``InvalidOptionError`` for sizes that no layer can have."""
        if not 0.001 <= self.slender_spacing <= 1:
            raise InvalidOptionError(f"slender_spacing {self.slender_spacing} must be between 0.001 and 1 m.")
        sizes = (self.num_objects, self.width, self.layers, self.noise_dim)
        if not all(1 <= size <= 4096 for size in sizes) or min(self.still_distance, self.still_angle) < 0:
            raise InvalidOptionError(
                f"num_objects, width, layers and noise_dim {sizes} must be from 1 to 4096, still_distance "
                f"{self.still_distance} and still_angle {self.still_angle} not negative."
            )


class SceneFrame(NamedTuple):
    """A scene of N objects at one frame, in the world frame: metres, radians, seconds."""

    position: Tensor
    """(B, N, 3)."""
    rotation: Tensor
    """(B, N, 3, 3)."""
    velocity: Tensor
    """(B, N, 6): linear, then angular."""
    arm: Tensor
    """(B, 8): see ``ARM_DIM``."""
    arm_before: Tensor
    """(B, 8): the arm one frame earlier."""
    command: Tensor
    """(B, 7): commanded tool xyz, roll pitch yaw, gripper in [-1, 1]."""


@dataclass(frozen=True)
class Symmetry:
    """Rotations about its own axes after which an object behaves as before.

    ``rotations`` (O, G, 3, 3), repeated where an object has fewer; ``axial`` bool (O,): also any turn about its z axis.
    """

    rotations: Tensor
    axial: Tensor


class _Block(nn.Module):
    """Pre-norm residual block of two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = x + self.down(F.silu(self.up(self.norm(x))))
        return y


class SceneDynamics(nn.Module):
    """The state of the next frame from this one, the next command and noise.

    Args:
        config: size of the network.
        shapes: of the robot's objects.
        symmetry: of the robot's objects.
        fixed: bool (O,): objects that never move.
    """

    rotations: Tensor
    axial: Tensor
    fixed: Tensor
    velocity_scale: Tensor
    lengths: Tensor

    def __init__(self, config: DynamicsConfig, shapes: Sequence[Shape], symmetry: Symmetry, fixed: Tensor) -> None:
        super().__init__()
        config.check()
        self.config = config
        d, z, names = config.width, config.noise_dim, 24
        self.register_buffer("rotations", symmetry.rotations.float(), persistent=False)
        self.register_buffer("axial", symmetry.axial, persistent=False)
        self.register_buffer("fixed", fixed, persistent=False)
        self.register_buffer("velocity_scale", torch.tensor([3.0] * 3 + [0.2] * 3), persistent=False)
        self.register_buffer("lengths", 2 * math.pi / torch.tensor(_LENGTHS), persistent=False)
        self.name = nn.Embedding(config.num_objects, names)
        self.object_in = nn.Linear(names + 12 * _PER_LENGTH + 9 + 6 + _GRIPPER, d)
        self.object_noise, self.object_gate = nn.Linear(z, d, bias=False), nn.Linear(z, d, bias=False)
        self.object_mix = nn.Linear(d, d)
        self.contact = ContactNetwork(shapes, fixed, d, slender_spacing=config.slender_spacing)
        self.separation = Separation(shapes, fixed)
        self.before = nn.ModuleList(_Block(d, 2 * d) for _ in range(config.layers))
        self.exchange_norm = nn.LayerNorm(d)
        # Few numbers, and nothing of the object that feels: pairs that never touched in the data must not look new.
        self.intent = nn.Linear(d, 16)
        self.exchange = nn.Sequential(nn.Linear(d + 16, d), nn.SiLU(), nn.Linear(d, d))
        self.after = nn.ModuleList(_Block(d, 2 * d) for _ in range(config.layers))
        self.arm_in, self.arm_noise, self.to_arm = nn.Linear(_GRIPPER, d), nn.Linear(z, d, bias=False), nn.Linear(d, d)
        self.arm_blocks = nn.ModuleList(_Block(d, d) for _ in range(2))
        self.object_out = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 13))
        self.arm_out = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, ARM_DIM))
        for noise in (self.object_noise, self.object_gate, self.arm_noise):
            nn.init.normal_(noise.weight, std=0.02)
        for head in (self.object_out[1], self.arm_out[1]):
            assert isinstance(head, nn.Linear)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(
        self,
        which: Tensor,
        frame: SceneFrame,
        command: Tensor,
        noise: Tensor,
        allowed_overlap: float | None = None,
    ) -> SceneFrame:
        """One frame on.

        Args:
            which: int64 (B, N), the objects; one number of objects for all rows.
            frame: the scene now.
            command: (B, 7) the commanded pose that the arm follows in this frame.
            noise: (B, Z) standard normal.
            allowed_overlap: objects that overlap by more than this (m) are pushed apart; None: they are not.
        """
        arm, n = frame.arm, which.shape[1]
        yaw = arm[:, 5]
        to_tool = _turn(-yaw)  # (B, 3, 3): world directions to the frame of the tool, z up
        place = apply(to_tool[:, None], frame.position - arm[:, None, :3])
        turned = compose(to_tool[:, None], frame.rotation)
        rotation = self._representative(which, turned, place)
        motion = torch.cat([apply(to_tool[:, None], v) for v in frame.velocity.split(3, -1)], -1)
        gripper = self._gripper(frame, command, to_tool)
        objects = self._objects(which, frame, place, rotation, motion, gripper)
        second = [j for i in range(n) for j in range(n) if i != j]

        with torch.autocast("cpu", torch.bfloat16, enabled=self.training and arm.device.type == "cpu"):
            x = self.object_in(objects)
            if n > 1:
                pairs = self.contact(which, place, turned, motion)
                x = x + pairs.unflatten(1, (n, -1)).sum(2)
            x = x + self.object_noise(noise)[:, None]
            x = x + self.object_mix(F.silu(x)) * self.object_gate(noise)[:, None]
            for block in self.before:
                x = block(x)
            hand = self.arm_in(gripper) + self.to_arm(F.silu(x)).sum(1) + self.arm_noise(noise)
            if n > 1:
                intent = self.intent(self.exchange_norm(x))
                message = self.exchange(torch.cat([intent[:, second], pairs], -1))
                x = x + message.unflatten(1, (n, -1)).sum(2)
            for block in self.arm_blocks:
                hand = block(hand)
            x = x + hand[:, None]
            for block in self.after:
                x = block(x)
        objects, hand = self.object_out(x.float()), self.arm_out(hand.float())
        return self._move(which, frame, command, place, to_tool, objects, hand, allowed_overlap)

    # -- what the network sees -------------------------------------------------------------------------------------------

    def _scales(self, x: Tensor) -> Tensor:
        """Lengths in metres (..., n) -> features (..., 7 n)."""
        angle = x[..., None] * self.lengths
        return torch.cat([x[..., None] * 15, angle.sin(), angle.cos()], -1).flatten(-2)

    def _representative(self, which: Tensor, rotation: Tensor, place: Tensor) -> Tensor:
        """The rotation (B, N, 3, 3) nearest to the tool's among those that look the same; the x axis of an axial object
        points to the tool.
        """
        turned = compose(rotation[:, :, None], self.rotations[which])  # (B, N, G, 3, 3)
        trace = turned.diagonal(dim1=-2, dim2=-1)
        score = torch.where(self.axial[which][..., None], trace[..., 2], trace.sum(-1))
        best = score.argmax(-1)[..., None, None, None].expand(-1, -1, 1, 3, 3)
        nearest = turned.gather(2, best)[:, :, 0]
        z = nearest[..., 2]
        tool = -place - (-place * z).sum(-1, keepdim=True) * z
        ahead = torch.zeros_like(z)
        ahead[..., 0] = 1
        ahead = ahead - (ahead * z).sum(-1, keepdim=True) * z
        x = F.normalize(torch.where(tool.norm(dim=-1, keepdim=True) > 0.004, tool, ahead), dim=-1)
        axial = torch.stack([x, torch.linalg.cross(z, x), z], -1)
        return torch.where(self.axial[which][..., None, None], axial, nearest)

    def _gripper(self, frame: SceneFrame, command: Tensor, to_tool: Tensor) -> Tensor:
        """Arm and commands in the frame of the tool, (B, 37)."""
        arm, before, now = frame.arm, frame.arm_before, frame.command
        gaps = torch.stack([command[:, :3] - arm[:, :3], now[:, :3] - arm[:, :3], arm[:, :3] - before[:, :3]], 1)
        turns = [command[:, 3:6] - arm[:, 3:6], now[:, 3:6] - arm[:, 3:6], arm[:, 3:6] - before[:, 3:6], arm[:, 3:5]]
        fingers = arm[:, 6:]
        parts = [
            apply(to_tool[:, None], gaps).flatten(1) * 50,
            torch.cat(turns, -1) * 5,
            fingers * 50,
            (fingers - before[:, 6:]) * 100,
            command[:, 6:],
            now[:, 6:],
            (fingers * 100).sin(),
            (fingers * 300).sin(),
            (fingers * 300).cos(),
            arm[:, 2:3] * 10,
            (arm[:, 2:3] * 60).tanh(),
            arm[:, :2] * 3,
            arm[:, 5:6].sin(),
        ]
        return torch.cat(parts, -1)

    def _objects(
        self, which: Tensor, frame: SceneFrame, place: Tensor, rotation: Tensor, motion: Tensor, gripper: Tensor
    ) -> Tensor:
        """Features of every object, (B, N, ...)."""
        roll, pitch, fingers = frame.arm[:, 3], frame.arm[:, 4], frame.arm[:, None, 6:]
        side = torch.stack([pitch.sin() * roll.sin(), roll.cos(), pitch.cos() * roll.sin()], -1)[:, None]
        inverse = rotation.transpose(-1, -2)
        left = apply(inverse, side * fingers[..., :1] - place)
        right = apply(inverse, -side * fingers[..., 1:] - place)
        gaps = torch.cat([place[..., 1:2] - fingers[..., :1], place[..., 1:2] + fingers[..., 1:]], -1)
        lengths = torch.cat([place, left, right, gaps, frame.position[..., 2:]], -1)
        shared = gripper[:, None].expand(-1, place.shape[1], -1)
        name, motion = self.name(which), motion * self.velocity_scale
        return torch.cat([name, self._scales(lengths), rotation.flatten(-2), motion, shared], -1)

    # -- what it predicts ------------------------------------------------------------------------------------------------

    def _move(
        self,
        which: Tensor,
        frame: SceneFrame,
        command: Tensor,
        place: Tensor,
        to_tool: Tensor,
        objects: Tensor,
        hand: Tensor,
        allowed_overlap: float | None,
    ) -> SceneFrame:
        """Predictions (B, N, 13) and (B, 8) -> the next frame."""
        arm, to_world = frame.arm, to_tool.transpose(-1, -2)
        follow = 0.6 * (command[:, :6] - arm[:, :6])
        push = torch.cat([apply(to_world, hand[:, :3]) * 0.01, hand[:, 3:6] * 0.1], -1)
        moved = torch.cat([arm[:, :6] + follow + push, arm[:, 6:] + hand[:, 6:] * 0.01], -1)
        turn = moved[:, 5] - arm[:, 5]
        held = (objects[..., 12:] - 2).sigmoid()  # 1: moves with the tool
        carried = apply(to_tool, moved[:, :3] - arm[:, :3])[:, None] + apply(_turn(turn)[:, None], place) - place
        free = (~self.fixed[which])[..., None].to(place.dtype)
        shift = apply(to_world[:, None], held * carried + objects[..., :3] * 0.01) * free
        spin = apply(to_world[:, None], objects[..., 3:6] * 0.2)
        spin = torch.cat([spin[..., :2], spin[..., 2:] + held * turn[:, None, None]], -1) * free
        if not self.training:  # nothing creeps
            quiet = (shift.norm(dim=-1) < self.config.still_distance) & (spin.norm(dim=-1) < self.config.still_angle)
            shift, spin = shift.masked_fill(quiet[..., None], 0.0), spin.masked_fill(quiet[..., None], 0.0)
        linear = apply(to_world[:, None], objects[..., 6:9] * 0.1)
        angular = apply(to_world[:, None], objects[..., 9:12])
        position, rotation = frame.position + shift, compose(rotate(spin), frame.rotation)
        if allowed_overlap is not None:
            position, rotation = self.separation(which, position, rotation, held[..., 0] > 0.5, allowed_overlap)
        return SceneFrame(
            position=position,
            rotation=rotation,
            velocity=torch.cat([linear, angular], -1) * free,
            arm=moved,
            arm_before=arm,
            command=command,
        )


def _turn(angle: Tensor) -> Tensor:
    """Rotation (B, 3, 3) about z."""
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rotation: Tensor = torch.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1], -1).unflatten(-1, (3, 3))
    return rotation
