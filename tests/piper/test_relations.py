"""Relations: geometry worked out by hand, batching, absent objects, names."""

from __future__ import annotations

import numpy as np
import pytest

from rawdream_env.errors import InvalidOptionError
from rawdream_env.piper import relations as rel

FAR = np.array([0.2, -0.19, 0.2])
OPEN = 0.072
UPRIGHT = (1.0, 0.0, 0.0, 0.0)


def turned(axis: str, degrees: float) -> tuple[float, float, float, float]:
    half = np.deg2rad(degrees) / 2
    x, y, z = (np.sin(half) if axis == name else 0.0 for name in "xyz")
    return (float(np.cos(half)), float(x), float(y), float(z))


def scene(**objects: tuple[float, ...]) -> np.ndarray:
    """Object poses from name=(x, y, z) or name=(x, y, z, w, qx, qy, qz)."""
    poses = np.full((7, 7), np.nan)
    for name, pose in objects.items():
        poses[rel.object_index(name)] = (*pose, *UPRIGHT)[:7]
    return poses


def holds(name: str, poses: np.ndarray, opening: float = OPEN, tool: np.ndarray = FAR) -> bool:
    return rel.as_dict(rel.relations(poses, opening, tool))[name]


RED = (0.3, 0.0, 0.018)


@pytest.mark.parametrize(
    ("blue", "expected"),
    [
        ((0.3, 0.0, 0.051), True),
        ((0.315, 0.0, 0.051), True),  # 15 mm aside: the centre is still over the 18 mm half width
        ((0.321, 0.0, 0.051), False),
        ((0.3, 0.0, 0.056), True),  # 5 mm of contact slack
        ((0.3, 0.0, 0.060), False),  # hovering
        ((0.3, 0.0, 0.051, *turned("x", 90)), True),  # a block may lie on any face
        ((0.3, 0.0, 0.051, *turned("x", 30)), False),  # but not on an edge
        ((0.3, 0.05, 0.015), False),
    ],
)
def test_on_needs_height_support_and_a_flat_face(blue: tuple[float, ...], expected: bool) -> None:
    assert holds("on:blue_block:red_block", scene(blue_block=blue, red_block=RED)) is expected
    assert not holds("on:red_block:blue_block", scene(blue_block=blue, red_block=RED))


def test_support_is_measured_along_the_faces_of_the_lower_block() -> None:
    corner = scene(blue_block=(0.316, 0.016, 0.051), red_block=RED)
    assert holds("on:blue_block:red_block", corner)  # over the corner of a straight block
    corner[rel.object_index("red_block"), 3:] = turned("z", 45)
    assert not holds("on:blue_block:red_block", corner)  # beyond the side of a turned one


def test_on_and_in_need_a_released_object() -> None:
    stacked = scene(blue_block=(0.3, 0.0, 0.051), red_block=RED)
    at_block = np.array([0.3, 0.0, 0.052])
    assert not holds("on:blue_block:red_block", stacked, 0.030, at_block)
    assert holds("holding:blue_block", stacked, 0.030, at_block)
    assert holds("lifted:blue_block", stacked, 0.030, at_block)
    assert holds("on:blue_block:red_block", stacked, 0.060, at_block)  # fingers open around it
    assert holds("on:blue_block:red_block", stacked, 0.0, FAR)  # gripper closed elsewhere
    inside = scene(cup=(0.3, 0.0, 0.026), pot=(0.3, 0.0, 0.018))
    assert holds("in:cup:pot", inside)
    assert not holds("in:cup:pot", inside, 0.034, np.array([0.3, 0.0, 0.030]))


@pytest.mark.parametrize(
    ("cup", "expected"),
    [
        ((0.3, 0.0, 0.026), True),
        ((0.316, 0.0, 0.026), True),
        ((0.345, 0.0, 0.026), False),  # beyond the wall
        ((0.3, 0.0, 0.052), False),  # bottom at 32 mm: not yet clearly below the rim at 36 mm
        ((0.3, 0.0, 0.048), True),
        ((0.3, 0.0, 0.1), False),
        ((0.31, 0.0, 0.032, *turned("y", 35)), True),  # leaning inside
    ],
)
def test_in_needs_the_lowest_point_below_the_rim(cup: tuple[float, ...], expected: bool) -> None:
    assert holds("in:cup:pot", scene(cup=cup, pot=(0.3, 0.0, 0.018))) is expected


def test_spoon_across_the_rim_is_not_in_the_bowl() -> None:
    bowl = (0.3, 0.0, 0.013)
    assert not holds("in:spoon:bowl", scene(spoon=(0.3, 0.0, 0.032), bowl=bowl))
    assert holds("in:spoon:bowl", scene(spoon=(0.31, 0.0, 0.026, *turned("y", -15)), bowl=bowl))
    assert not holds("in:spoon:bowl", scene(spoon=(0.36, 0.0, 0.02, *turned("y", -15)), bowl=bowl))


def test_a_tipped_container_holds_nothing() -> None:
    assert not holds("in:cup:pot", scene(cup=(0.3, 0.0, 0.026), pot=(0.3, 0.0, 0.018, *turned("x", 60))))


def test_pot_on_stove_by_its_centre() -> None:
    stove = (0.3, 0.0, 0.006)
    assert holds("on:pot:stove", scene(pot=(0.34, 0.0, 0.030), stove=stove))
    assert not holds("on:pot:stove", scene(pot=(0.352, 0.0, 0.030), stove=stove))
    assert not holds("on:pot:stove", scene(pot=(0.3, 0.0, 0.018), stove=stove))


def test_holding_by_handle_rim_and_nearest_object() -> None:
    pot = scene(pot=(0.3, 0.0, 0.018))
    assert holds("holding:pot", pot, 0.014, np.array([0.358, 0.0, 0.03]))
    assert not holds("holding:pot", pot, 0.0, np.array([0.358, 0.0, 0.03]))  # closed beside it
    assert not holds("holding:pot", pot, 0.014, np.array([0.3, 0.0, 0.03]))  # in the middle there is nothing to grip
    assert holds("holding:bowl", scene(bowl=(0.3, 0.0, 0.013)), 0.005, np.array([0.3495, 0.0, 0.02]))
    crowded = scene(cup=(0.3, 0.0, 0.02), red_block=(0.336, 0.0, 0.018))
    at_cup = np.array([0.3, 0.0, 0.026])
    assert holds("holding:cup", crowded, 0.034, at_cup)
    assert not holds("holding:red_block", crowded, 0.034, at_cup)
    assert not holds("lifted:cup", crowded, 0.034, at_cup)


def test_batches_equal_single_scenes_and_absent_objects_are_false() -> None:
    rng = np.random.default_rng(0)
    quats = rng.normal(size=(5, 4, 7, 4))
    quats /= np.linalg.norm(quats, axis=-1, keepdims=True)
    poses = np.concatenate([rng.uniform(0, 0.05, (5, 4, 7, 3)), quats], axis=-1)
    poses[rng.random((5, 4, 7)) < 0.3] = np.nan
    opening, tool = rng.uniform(0, 0.07, (5, 4)), rng.uniform(0, 0.05, (5, 4, 3))
    with np.errstate(all="raise"):
        batch = rel.relations(poses, opening, tool)
    assert batch.shape == (5, 4, len(rel.RELATION_NAMES))
    assert batch.any()
    for i in np.ndindex(5, 4):
        np.testing.assert_array_equal(batch[i], rel.relations(poses[i], opening[i], tool[i]))
    assert not rel.relations(scene(), OPEN, FAR).any()


def test_names_and_tasks() -> None:
    assert len(set(rel.RELATION_NAMES)) == len(rel.RELATION_NAMES)
    assert rel.TASK_NAMES == ("stack_block", "place_pot", "put_spoon", "place_cup")
    for task in rel.TASKS:
        assert task.relation in rel.PLACE_RELATIONS
        assert rel.find_task(task.name) is task
        for name in (task.object_a, task.object_b):
            assert rel.words(name) in task.instruction
    assert rel.find_task("in:spoon:pot").instruction == "put the spoon into the pot"
    with pytest.raises(InvalidOptionError, match=r"'fly' does not exist; choose one of stack_block"):
        rel.find_task("fly")
    with pytest.raises(InvalidOptionError, match="on:pot:cup"):
        rel.relation_index("on:pot:cup")
    with pytest.raises(InvalidOptionError, match="fork"):
        rel.object_index("fork")
