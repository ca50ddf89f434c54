"""Instructions for play after the fact: which goals a clip of play reaches, and where it picks and places.

Play follows no instruction, but the data set's privileged columns say what happened. ``label_windows`` labels clips
for the judge: every goal is *reached*, *not reached*, or *not askable* (an object is absent, the goal was already true
at the clip's start, or the outcome is a matter of taste). ``pick_place_segments`` cuts out demonstrations.

Shape letters: M clips, R rows (frames), G goals as ``goals.GOAL_NAMES``, 7 objects as ``relations.OBJECTS``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rawdream_env import robots
from rawdream_env.data.reader import Episode, EpisodeArrays
from rawdream_env.errors import DatasetError
from rawdream_env.piper.goals import (
    DIRECTIONS,
    GOAL_NAMES,
    GOALS,
    HELD_OUT_JUDGE_PAIRS,
    TASK_PAIRS,
    find_goal,
    goal_mask,
    paraphrase,
)
from rawdream_env.piper.relations import (
    MOVABLE,
    OBJECTS,
    PLACE_RELATIONS,
    RELATION_NAMES,
    SHAPES,
    TASKS,
    relation_index,
)
from rawdream_env.robots import BoolArray, ClipLabels, FloatArray, GoalGrammar

MOVE_DISTANCE: Final = 0.04
"""An object pushed this far (m) has been moved ..."""
STILL_DISTANCE: Final = 0.015
"""... and one pushed less than this has not; between the two the question is not asked."""
NEAR_GAP: Final = 0.025
FAR_GAP: Final = 0.05
ON_TABLE_TOLERANCE: Final = 0.005

_REST_HEIGHT = np.array([SHAPES[name].half[2] for name in OBJECTS])
_RADIUS = np.array([(SHAPES[name].half[0] + SHAPES[name].half[1]) / 2 for name in OBJECTS])
# (relations, objects): relation r is a place relation / the holding of object o.
_PLACES = np.array([[n in PLACE_RELATIONS and n.split(":")[1] == o for o in OBJECTS] for n in RELATION_NAMES])
_HOLDS = np.array([[n == f"holding:{o}" for o in OBJECTS] for n in RELATION_NAMES])
_LIFTS = np.array([[n == f"lifted:{o}" for o in OBJECTS] for n in RELATION_NAMES])


def _columns(kind: str) -> NDArray[np.int64]:
    return np.array([i for i, goal in enumerate(GOALS) if goal.kind == kind])


def _objects(columns: NDArray[np.int64], which: str) -> NDArray[np.int64]:
    return np.array([OBJECTS.index(getattr(GOALS[i], which)) for i in columns])


def _on_table(poses: FloatArray, relations: BoolArray) -> BoolArray:
    """(M, 7): stands on the table itself and is not held."""
    low = np.abs(poses[..., 2] - _REST_HEIGHT) <= ON_TABLE_TOLERANCE
    standing: BoolArray = low & ~(relations @ _PLACES) & ~(relations @ _HOLDS)
    return standing


def label_clips(
    poses_start: FloatArray, poses_end: FloatArray, relations_start: BoolArray, relations_end: BoolArray
) -> ClipLabels:
    """Label M clips from what was true at their first and last frame.

    Args:
        poses_start, poses_end: (M, 7, 7), xyz (m) and quaternion; NaN rows are absent objects.
        relations_start, relations_end: (M, R) in the order of ``RELATION_NAMES``.
    """
    start, end = np.asarray(relations_start, bool), np.asarray(relations_end, bool)
    present = ~np.isnan(poses_start[..., 0])
    table_start, table_end = _on_table(poses_start, start), _on_table(poses_end, end)
    shift = poses_end[..., :2] - poses_start[..., :2]
    moved = np.nan_to_num(np.linalg.norm(poses_end[..., :3] - poses_start[..., :3], axis=-1))
    reached = np.zeros((len(start), len(GOALS)), dtype=bool)
    askable = np.zeros_like(reached)

    for kind in ("on", "in", "lifted"):
        at = _columns(kind)
        relation = np.array([relation_index(GOALS[i].name) for i in at])
        reached[:, at] = end[:, relation]
        askable[:, at] = ~start[:, relation]

    at = _columns("move")
    a = _objects(at, "a")
    unit = np.array([DIRECTIONS[GOALS[i].direction] for i in at])
    along = np.einsum("mgk,gk->mg", shift[:, a], unit)
    aside = np.abs(np.einsum("mgk,gk->mg", shift[:, a], unit[:, ::-1]))
    reached[:, at] = (along >= MOVE_DISTANCE) & (aside <= along / 2) & table_end[:, a]
    askable[:, at] = table_start[:, a] & (reached[:, at] | (along <= STILL_DISTANCE))

    at = _columns("near")
    a, b = _objects(at, "a"), _objects(at, "b")
    gap_start, gap_end = _gap(poses_start, a, b), _gap(poses_end, a, b)
    close = (gap_end <= NEAR_GAP) & table_end[:, a]
    reached[:, at] = close & (moved[:, a] >= 0.02)  # if b moved to a instead, the goal is ambiguous
    away = (gap_end >= FAR_GAP) | ~table_end[:, a]
    askable[:, at] = (gap_start >= FAR_GAP) & (reached[:, at] | away)

    at = _columns("table")
    a = _objects(at, "a")
    reached[:, at] = table_end[:, a]
    askable[:, at] = (start @ (_PLACES | _LIFTS))[:, a]

    for i, goal in enumerate(GOALS):
        askable[:, i] &= present[:, OBJECTS.index(goal.a)]
        if goal.b:
            askable[:, i] &= present[:, OBJECTS.index(goal.b)]
    return ClipLabels(reached & askable, askable, moved)


def _gap(poses: FloatArray, a: NDArray[np.int64], b: NDArray[np.int64]) -> FloatArray:
    """Free table between two objects (m), taking both as round; NaN when one is absent."""
    distance: FloatArray = np.linalg.norm(poses[:, a, :2] - poses[:, b, :2], axis=-1) - _RADIUS[a] - _RADIUS[b]
    return distance


def clip_labels(
    poses_start: FloatArray, poses_end: FloatArray, relations_start: BoolArray, relations_end: BoolArray
) -> dict[str, bool]:
    """One clip's askable goals by name -> whether it was reached. Arguments as ``label_clips`` without the M axis."""
    labels = label_clips(poses_start[None], poses_end[None], relations_start[None], relations_end[None])
    return {GOAL_NAMES[i]: bool(labels.reached[0, i]) for i in np.flatnonzero(labels.askable[0])}


def label_windows(data: EpisodeArrays | Episode, first: NDArray[np.int64], last: NDArray[np.int64]) -> ClipLabels:
    """Label the clips from row ``first[m]`` to row ``last[m]`` (inclusive), both in one episode.

    >>> first = data.windows(length=65)  # 64 steps; doctest: +SKIP
    >>> labels = label_windows(data, first, first + 64)  # doctest: +SKIP
    """
    poses, relations = _truth(data)
    return label_clips(poses[first], poses[last], relations[first], relations[last])


def _truth(data: EpisodeArrays | Episode) -> tuple[FloatArray, BoolArray]:
    """Object poses (R, 7, 7) and relations (R, len(RELATION_NAMES)) of the privileged columns."""
    missing = {"object_poses", "relations"} - set(data.privileged)
    if missing:
        raise DatasetError(
            f"hindsight needs the columns {sorted('privileged.' + name for name in missing)}, which this data set "
            "lacks: only data collected in the simulator have them."
        )
    relations = data.privileged["relations"]
    if relations.shape[1] != len(RELATION_NAMES):
        raise DatasetError(
            f"privileged.relations has {relations.shape[1]} columns, this version knows {len(RELATION_NAMES)} "
            "relations. Collect the data again."
        )
    return data.privileged["object_poses"].reshape(len(relations), len(OBJECTS), 7), relations > 0.5


def sample_goals(
    labels: ClipLabels,
    rng: np.random.Generator,
    *,
    positive_fraction: float = 0.5,
    allowed: BoolArray | None = None,
    moved_weight: float = 8.0,
) -> NDArray[np.int64]:
    """Draw one askable goal for each clip: int64 (M,), -1 where there is none.

    With probability ``positive_fraction`` a reached goal where there is one, else one that was not reached. Goals about
    an object that moved more than 2 cm are ``moved_weight`` times as likely: "the cup was not put in the pot" teaches
    more when the cup was moved. ``allowed`` bool (G,) leaves goals out (``goals.goal_mask``).
    """
    askable = labels.askable if allowed is None else labels.askable & allowed
    positive, negative = askable & labels.reached, askable & ~labels.reached
    want = rng.random(len(askable)) < positive_fraction
    take_positive = positive.any(1) & (want | ~negative.any(1))
    pool = np.where(take_positive[:, None], positive, negative)
    touched = labels.moved > 0.02
    about_moved = np.stack(
        [touched[:, OBJECTS.index(g.a)] | (touched[:, OBJECTS.index(g.b)] if g.b else False) for g in GOALS], axis=1
    )
    score = np.where(about_moved, np.log(moved_weight), 0.0) + rng.gumbel(size=pool.shape)  # Gumbel-max sampling
    chosen = np.where(pool, score, -np.inf).argmax(1)
    return np.where(pool.any(1), chosen, -1).astype(np.int64)


@dataclass(frozen=True)
class Segment(robots.Segment):
    """A pick-and-place inside an episode: frames ``start`` .. ``end`` (inclusive), actions ``start`` .. ``end - 1``.

    ``grasp`` is the first frame in which the object is held, ``release`` the first after it was let go, ``established``
    the first in which ``goal`` (a name of ``goals.GOAL_NAMES``) is true.
    """

    grasp: int
    release: int
    established: int

    @property
    def object_a(self) -> str:
        """What was moved."""
        return find_goal(self.goal).a

    @property
    def object_b(self) -> str:
        """Where it was put ("" for goals of one object)."""
        return find_goal(self.goal).b

    def __len__(self) -> int:
        """The number of actions."""
        return self.end - self.start


def pick_place_segments(
    episode: Episode,
    *,
    exclude_pairs: Collection[tuple[str, str]] = (),
    kinds: Sequence[str] = ("on", "in", "near", "move", "table"),
    max_approach: int = 28,
    max_hold: int = 48,
    tail: int = 6,
) -> list[Segment]:
    """Find the segments in which an object is approached, picked up, carried and released, and reaches a goal.

    A segment starts where the open, empty gripper begins to approach (at most ``max_approach`` steps before it closes)
    and ends ``tail`` steps after the goal is established, or when the next object is grasped. Slips, drags without
    lifting and carries of more than ``max_hold`` steps are left out. When several goals fit, the first of ``kinds`` is
    taken; ``near``, ``move`` and ``table`` never describe an object that came to rest on or in another.
    """
    poses, relations = _truth(episode)
    holding = relations @ _HOLDS
    closed = episode.state[:, 6] > 0
    allowed = goal_mask(exclude_pairs=exclude_pairs)
    ranked = [i for kind in kinds for i, goal in enumerate(GOALS) if goal.kind == kind and allowed[i]]
    candidates = [[i for i in ranked if GOALS[i].a == name] for name in OBJECTS]
    segments = []
    for a in (OBJECTS.index(name) for name in MOVABLE):
        tool_distance = np.linalg.norm(episode.state[:, :3] - poses[:, a, :3], axis=-1)
        for grasp, release in _intervals(holding[:, a], hole=2):
            lifted = (relations[grasp:release] @ _LIFTS)[:, a].any()
            let_go = not closed[release : release + 3].all() and release < len(closed) - 2
            if not lifted or not let_go or not 3 <= release - grasp <= max_hold:
                continue
            start = _approach_start(grasp, closed, holding.any(1), tool_distance, max_approach)
            if start is None:
                continue
            found = _outcome(candidates[a], start, release, poses, relations)
            if found is None:
                continue
            goal, established = found
            next_grasp = np.flatnonzero(holding[established:].any(1))
            stop = established + (int(next_grasp[0]) if len(next_grasp) else len(closed))
            end = min(established + tail, len(closed) - 1, stop)
            segments.append(Segment(start, end, goal, grasp, release, established))
    return sorted(segments, key=lambda segment: segment.start)


def _intervals(mask: BoolArray, hole: int) -> list[tuple[int, int]]:
    """Maximal runs [start, stop) of True, joined over gaps of at most ``hole``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    runs: list[tuple[int, int]] = []
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if runs and start - runs[-1][1] <= hole:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def _approach_start(
    grasp: int, closed: BoolArray, busy: BoolArray, tool_distance: FloatArray, max_approach: int
) -> int | None:
    """The row from which the open and empty gripper came steadily nearer; None when the object drifted into it."""
    row = grasp
    while row > 0 and closed[row]:
        row -= 1
    if closed[row] or grasp - row > 10:
        return None
    start, far = row, tool_distance[row]
    while start > 0 and row - start < max_approach and not closed[start - 1] and not busy[start - 1]:
        if tool_distance[start - 1] < far - 0.01:
            break
        start -= 1
        far = max(far, tool_distance[start])
    return start


def _outcome(
    candidates: Sequence[int], start: int, release: int, poses: FloatArray, relations: BoolArray
) -> tuple[str, int] | None:
    """The first candidate that holds soon after the release and for at least three frames, and since when."""
    rows = np.arange(release, min(release + 10, len(poses)))
    at_start = np.full(len(rows), start)
    reached = label_clips(poses[at_start], poses[rows], relations[at_start], relations[rows]).reached
    placed = relations[rows[-1]] @ _PLACES
    for i in candidates:
        goal = GOALS[i]
        # What rests on or in something, even of a pair that is left out, was not "moved" there.
        if not reached[-3:, i].all() or (goal.kind not in ("on", "in") and placed[OBJECTS.index(goal.a)]):
            continue
        before = np.flatnonzero(~reached[:, i])
        return goal.name, int(rows[before[-1] + 1 if len(before) else 0])
    return None


class PiperGrammar:
    """The goals of the tabletop as the generic trainers ask for them; see ``robots.GoalGrammar``."""

    objects = OBJECTS
    relations = RELATION_NAMES
    place_relations = PLACE_RELATIONS
    goals = GOAL_NAMES
    tasks = tuple((task.name, task.instruction, task.relation) for task in TASKS)
    task_pairs = TASK_PAIRS
    held_out_pairs = HELD_OUT_JUDGE_PAIRS

    paraphrase = staticmethod(paraphrase)
    goal_mask = staticmethod(goal_mask)
    label_clips = staticmethod(label_clips)
    label_windows = staticmethod(label_windows)
    sample_goals = staticmethod(sample_goals)
    pick_place_segments = staticmethod(pick_place_segments)

    def goal_objects(self, goal: str) -> tuple[str, ...]:
        """The objects of a goal, what is moved first."""
        return tuple(part for part in goal.split(":")[1:] if part in OBJECTS)


GRAMMAR: GoalGrammar = PiperGrammar()
