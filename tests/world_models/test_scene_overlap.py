"""Overlapping objects of the scene world model are pushed apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rawdream_env.piper.relations import OBJECTS, SHAPES
from rawdream_env.piper.scene import SCENE
from rawdream_env.world_models.scene.overlap import Separation
from rawdream_env.world_models.scene.rotations import rotate

ALLOWED = 0.001
FIXED = torch.tensor([name in SCENE.fixed for name in OBJECTS])


@pytest.fixture(scope="module")
def separation() -> Separation:
    return Separation(SCENE.shapes, FIXED)


def separate(
    separation: Separation,
    names: list[str],
    places: list[tuple[float, ...]],
    held: list[bool],
    turns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """32 equal rows; returns the positions (N, 3) and rotations (N, 3, 3) of one after some frames."""
    which = torch.tensor([[OBJECTS.index(name) for name in names]]).expand(32, -1)
    position = torch.tensor(places).expand(32, -1, -1)
    rotation = rotate(torch.zeros(len(names), 3) if turns is None else turns).expand(32, -1, -1, -1)
    in_hand = torch.tensor([held]).expand(32, -1)
    for _ in range(12):
        position, rotation = separation(which, position, rotation, in_hand, ALLOWED)
    assert torch.equal(position, position[:1].expand_as(position)), "rows differ"
    return position[0], rotation[0]


def test_a_spoon_in_the_wall_of_a_bowl_comes_back_into_it(separation: Separation) -> None:
    bowl, spoon = SHAPES["bowl"], SHAPES["spoon"]
    floor = bowl.half[2] + bowl.floor_z
    lying = [(0.0, 0.0, bowl.half[2]), (0.012, 0.0, floor + spoon.half[2])]  # its end is beyond the wall
    assert lying[1][0] + spoon.half[0] > bowl.half[0] + 0.005
    position, _ = separate(separation, ["bowl", "spoon"], lying, [False, False])
    end = float(position[1, 0] - position[0, 0]) + spoon.half[0]
    assert end < bowl.inner_radius + 2 * ALLOWED
    assert abs(float(position[0, 0])) < 0.2 * 0.012, "the heavier bowl moves less"


def test_what_went_through_a_thin_floor_comes_back_above_it(separation: Separation) -> None:
    bowl, block = SHAPES["bowl"], SHAPES["blue_block"]
    floor = bowl.half[2] + bowl.floor_z
    sunk = floor + block.half[2] - 0.005  # deeper than half the floor
    places = [(0.0, 0.0, bowl.half[2]), (0.0, 0.0, sunk)]
    position, _ = separate(separation, ["bowl", "blue_block"], places, [True, False])
    assert float(position[1, 2]) == pytest.approx(floor + block.half[2] - ALLOWED, abs=5e-4)


def test_a_corner_in_another_object_turns_as_well_as_moves(separation: Separation) -> None:
    block, stove = SHAPES["red_block"], SHAPES["stove"]
    tilted = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.3, 0.0]])
    height = 2 * stove.half[2] + block.half[2] - 0.002
    places = [(0.0, 0.0, stove.half[2]), (0.0, 0.0, height)]
    position, rotation = separate(separation, ["stove", "red_block"], places, [False, False], tilted)
    assert torch.equal(position[0], torch.tensor(places[0])), "a fixed object moved"
    assert float(position[1, 2]) > height
    angle = math.acos(float(rotation[1, 2, 2]))
    assert angle < 0.3 - 0.005, "the corner is pushed up"


def test_what_the_hand_holds_and_what_does_not_overlap_stays(separation: Separation) -> None:
    side = SHAPES["blue_block"].half[0] + SHAPES["red_block"].half[0]
    near = [(0.0, 0.0, 0.015), (side - 0.0005, 0.0, 0.018)]
    position, rotation = separate(separation, ["blue_block", "red_block"], near, [False, False])
    assert torch.equal(position, torch.tensor(near)) and torch.equal(rotation, torch.eye(3).expand(2, 3, 3))
    deep = [(0.0, 0.0, 0.015), (side - 0.006, 0.0, 0.018)]
    position, _ = separate(separation, ["blue_block", "red_block"], deep, [True, False])
    assert torch.equal(position[0], torch.tensor(deep[0]))
    assert float(position[1, 0]) == pytest.approx(side - ALLOWED, abs=5e-4)
