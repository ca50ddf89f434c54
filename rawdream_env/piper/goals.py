"""The goals of the tabletop and their instructions.

A *goal* is a relation of ``rawdream_env.piper.relations`` or a motion, by name:

=====================  =======================================================================================
``on:a:b``, ``in:a:b``  a rests on / in b and has been let go
``lifted:a``            a is held above the table
``move:a:left``         a stands on the table at least 4 cm further left (right, front, back) than before
``near:a:b``            a was brought next to b, on the table
``table:a``             a, which was held or stood on or in something, stands on the table
=====================  =======================================================================================

Directions are those of the picture: left is -y, front (towards the viewer, away from the arm's base) is +x.
Play has no instructions; ``hindsight`` finds the goals that a stretch of play happened to reach, and the phrases here
put them into words. All four tasks are ``on``/``in`` goals, and each task's instruction is one of its goal's phrases.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError
from rawdream_env.piper.relations import MOVABLE, OBJECTS, PLACE_RELATIONS, TASKS, words

DIRECTIONS: Final[dict[str, tuple[float, float]]] = {
    "left": (0.0, -1.0),
    "right": (0.0, 1.0),
    "front": (1.0, 0.0),
    "back": (-1.0, 0.0),
}
"""Unit vectors in the table plane (x, y)."""

TASK_PAIRS: Final = tuple((task.object_a, task.object_b) for task in TASKS)
"""The ordered object pairs of the four tasks."""

OTHER_RELATIONS: Final = tuple(
    name
    for name in PLACE_RELATIONS
    if not {tuple(name.split(":")[1:]), tuple(name.split(":")[:0:-1])} & set(TASK_PAIRS)
)
"""Placing relations between objects that no task brings together, either way round: what a generalist that must not
know the tasks can be asked to do. ``NON_TASK_RELATIONS`` has red onto blue too."""

HELD_OUT_JUDGE_PAIRS: Final = (
    ("red_block", "cup"),
    ("spoon", "stove"),
    ("cup", "bowl"),
    ("blue_block", "pot"),
)
"""Ordered pairs the judge never trains on, two stood on and two put in, four different things moved to four different
places: how it judges them says whether it understands the words or has memorized the pairs. None is a task pair, and
every object occurs in other pairs. Red onto blue is not among them: it is the only way to see a block on a block in which
no task is done."""


@dataclass(frozen=True)
class Goal:
    """``kind`` on, in, lifted, move, near or table; ``b`` the second object ("" without), ``direction`` for move."""

    name: str
    kind: str
    a: str
    b: str = ""
    direction: str = ""

    @property
    def pair(self) -> tuple[str, str]:
        """The ordered objects (a, b)."""
        return self.a, self.b


def _all_goals() -> tuple[Goal, ...]:
    goals = [Goal(name, *name.split(":")) for name in PLACE_RELATIONS]
    goals += [Goal(f"lifted:{a}", "lifted", a) for a in MOVABLE]
    goals += [Goal(f"move:{a}:{d}", "move", a, direction=d) for a in MOVABLE for d in DIRECTIONS]
    goals += [Goal(f"near:{a}:{b}", "near", a, b) for a, b in product(MOVABLE, OBJECTS) if a != b]
    goals += [Goal(f"table:{a}", "table", a) for a in MOVABLE]
    return tuple(goals)


GOALS: Final = _all_goals()
GOAL_NAMES: Final = tuple(goal.name for goal in GOALS)
"""Order of every label array's last axis."""
_INDEX: Final = {name: i for i, name in enumerate(GOAL_NAMES)}


def goal_index(name: str) -> int:
    """Column of a goal in the label arrays."""
    if name not in _INDEX:
        raise InvalidOptionError(f"goal {name!r} does not exist; see goals.GOAL_NAMES for all {len(GOALS)}.")
    return _INDEX[name]


def find_goal(name: str) -> Goal:
    """The goal of that name."""
    return GOALS[goal_index(name)]


def goal_mask(
    *, exclude_pairs: Collection[tuple[str, str]] = (), kinds: Collection[str] | None = None
) -> NDArray[np.bool_]:
    """Mask bool (G,) of the goals that are left when ordered pairs are excluded and only some kinds are wanted."""
    return np.array([(kinds is None or g.kind in kinds) and g.pair not in set(exclude_pairs) for g in GOALS])


_PUT = ("put", "place", "set", "move")
_ON = ("on", "onto", "on top of")
_IN = ("in", "into", "inside")
_STACKABLE = ("blue_block", "red_block", "cup")
_WAYS = {
    "left": ("to the left", "left"),
    "right": ("to the right", "right"),
    "front": ("to the front", "forward", "towards the front"),
    "back": ("to the back", "backward", "towards the back"),
}


@cache
def phrases(name: str) -> tuple[str, ...]:
    """Every instruction for a goal, the plainest first."""
    goal = find_goal(name)
    a, b = words(goal.a), words(goal.b)
    if goal.kind in ("on", "in"):
        where = _ON if goal.kind == "on" else _IN
        out = [f"{verb} the {a} {w} the {b}" for verb, w in product(_PUT, where)]
        out += [f"pick up the {a} and {verb} it {w} the {b}" for verb, w in product(_PUT[:3], where)]
        if goal.kind == "on" and goal.a in _STACKABLE and goal.b in _STACKABLE:
            out += [f"stack the {a} {w} the {b}" for w in _ON]
        if goal.kind == "in":
            out += [f"drop the {a} {w} the {b}" for w in _IN]
    elif goal.kind == "lifted":
        out = [f"{verb} the {a}" for verb in ("lift", "pick up", "raise", "lift up", "grasp and lift")]
        out += [f"{verb} the {a} up" for verb in ("pick", "lift")]
    elif goal.kind == "move":
        out = [f"{verb} the {a} {way}" for verb, way in product(("push", "move", "slide"), _WAYS[goal.direction])]
    elif goal.kind == "near":
        out = [f"{verb} the {a} {w} the {b}" for verb, w in product(_PUT, ("next to", "beside", "near"))]
    else:
        out = [f"{verb} the {a} {w} the table" for verb, w in product(_PUT, ("on", "onto", "down on"))]
    return tuple(out)


def paraphrase(name: str, rng: np.random.Generator) -> str:
    """One of a goal's instructions, drawn with ``rng``. Every relation but ``holding:a`` is a goal."""
    options = phrases(name)
    return options[int(rng.integers(len(options)))]
