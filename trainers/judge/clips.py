"""Clips and questions for training a judge: windows of recorded episodes with hindsight labels, and imagined clips.

Shape letters: R rows (frames) in memory, N windows, G goals, F frames the judge uses, B clips, Q questions per clip.

Every window of an episode is a clip with many possible questions: each goal of the robot's grammar (``GoalGrammar``)
either came true in it or did not. No question is tied to a task. Windows are whole chunks long, as in environments, and
are concentrated around the moments at which a relation begins to hold: shortly after (success) and shortly before (the
object is still in the gripper: a near miss).

**Imagined clips** adapt the judge to imagined videos. They are ``*.safetensors`` files with

- ``frames`` uint8 (n, F, H, W, 3), the start frame first;
- ``labels`` uint8 (n,), 1 when the same actions succeeded in the simulator;
- metadata ``instructions``: JSON list of n texts, ``robot`` (none: the default robot), and ``sha256`` if it was written by
  ``files.save_sealed``: then a damaged file is refused;
- ``object_poses`` float32 (n, 2, O, 7), absent objects all zeros (the files contain no NaN), and ``relations`` uint8
  (n, 2, R), both or neither: the simulator's state at the first and the last frame. With them every goal can be asked
  about the clip, not only its own instruction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rawdream_env.data.reader import EpisodeArrays, LeRobotReader
from rawdream_env.errors import CheckpointError, DatasetError
from rawdream_env.evaluation.judges.report import JudgeClip
from rawdream_env.files import load_sealed
from rawdream_env.judges.embedded_network import NUM_FRAMES, frame_indices
from rawdream_env.robots import ClipLabels, GoalGrammar, find_robot
from rawdream_env.seeding import mix
from rawdream_env.types import Float32Array, UInt8Array, Video

CHUNK = 8
"""Steps in an action chunk."""
MAX_CHUNKS = 8
"""Chunks in an episode."""
TEXT = "text:"
"""Prefix of a goal that is a verbatim instruction of an imagined clip."""
UNKNOWN = -1
"""Label of a goal that cannot be asked about a window: an object is absent, the goal held at the start, or
the grammar gives it no meaning there."""

Int64Array = NDArray[np.int64]
Int8Array = NDArray[np.int8]


@dataclass(frozen=True)
class ClipSet:
    """Windows over frames in memory, with their labels.

    ``frames`` uint8 (R, H, W, 3); ``spans`` (N, 2) first and last row; ``labels`` (N, G): 1, 0 or UNKNOWN; ``goals``
    the G names; ``positions`` (R, O, 3) metres, NaN for what is absent or unknown; ``episodes`` (N,) unique over all
    folders; ``robot``: the robot of the goals.
    """

    frames: UInt8Array
    spans: Int64Array
    labels: Int8Array
    goals: tuple[str, ...]
    positions: Float32Array
    episodes: Int64Array
    fps: float
    source: str
    robot: str

    @property
    def grammar(self) -> GoalGrammar:
        """The robot's goals."""
        return grammar_of(self.robot)

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.spans)

    def only(self, windows: NDArray[np.bool_]) -> ClipSet:
        """The windows of a mask, over the same frames."""
        return replace(self, spans=self.spans[windows], labels=self.labels[windows], episodes=self.episodes[windows])

    def rows(self, windows: Int64Array) -> Int64Array:
        """The rows (B, F) of the frames the judge uses."""
        first, last = self.spans[windows].T
        table = np.array([frame_indices(int(n)) for n in last - first + 1], dtype=np.int64).reshape(-1, NUM_FRAMES)
        return np.asarray(first[:, None] + table)

    def video(self, window: int) -> Video:
        """A window's frames, without copying them."""
        first, last = self.spans[window]
        return Video(self.frames[first : last + 1], self.fps)


def grammar_of(robot: str) -> GoalGrammar:
    """The goals of a robot; of the default robot when ``robot`` is empty."""
    grammar: GoalGrammar = find_robot(robot).load("goals")
    return grammar


def goal_objects(goal: str, grammar: GoalGrammar) -> tuple[str, ...]:
    """The objects of a goal, in order; empty for a verbatim text."""
    return () if goal.startswith(TEXT) else grammar.goal_objects(goal)


def is_held_out(goal: str, grammar: GoalGrammar) -> bool:
    """Whether a goal is about an object pair that is excluded from training."""
    return goal_objects(goal, grammar) in {tuple(pair) for pair in grammar.held_out_pairs}


def instruction_for(goal: str, grammar: GoalGrammar, rng: np.random.Generator) -> str:
    """An instruction for a goal."""
    return goal.removeprefix(TEXT) if goal.startswith(TEXT) else grammar.paraphrase(goal, rng)


def recorded_clips(folders: Sequence[str], *, seed: int, stride: int = 4, progress: bool = False) -> ClipSet:
    """Clips from LeRobotDataset folders with privileged poses and relations.

    Raises:
        DatasetError: a folder is damaged or has no privileged columns.
    """
    parts = []
    for number, folder in enumerate(folders):
        arrays = LeRobotReader(folder).load_all(workers=2, progress=progress)
        parts.append(_label_windows(arrays, np.random.default_rng(mix(seed, number, 1)), stride))
    return merge(parts)


def _label_windows(arrays: EpisodeArrays, rng: np.random.Generator, stride: int) -> ClipSet:
    spans, episodes = [], []
    grammar = grammar_of(arrays.robot_type)
    truth = arrays.privileged.get("relations", np.zeros((len(arrays.frames), len(grammar.relations)))) > 0.5
    for episode, (begin, end) in enumerate(zip(arrays.offsets[:-1], arrays.offsets[1:], strict=True)):
        found = begin + episode_windows(truth[begin:end, : len(grammar.place_relations)], rng, stride)
        spans.append(found)
        episodes.append(np.full(len(found), episode))
    pairs = np.concatenate(spans)
    labels = _three_valued(grammar.label_windows(arrays, pairs[:, 0], pairs[:, 1]))
    poses = arrays.privileged["object_poses"].reshape(-1, len(grammar.objects), 7)
    positions = np.ascontiguousarray(poses[..., :3], dtype=np.float32)
    numbers = np.concatenate(episodes).astype(np.int64)
    robot = find_robot(arrays.robot_type).name
    return ClipSet(arrays.frames, pairs, labels, grammar.goals, positions, numbers, arrays.fps, "simulator", robot)


def _three_valued(labels: ClipLabels) -> Int8Array:
    return np.where(labels.askable, labels.reached, UNKNOWN).astype(np.int8)


def episode_windows(placed: NDArray[np.bool_], rng: np.random.Generator, stride: int) -> Int64Array:
    """Windows (n, 2) of one episode, first and last row, whole chunks long.

    Three kinds: from the episode's start, as in environments; anywhere, every ``stride`` rows; and around each moment at
    which a placing relation begins to hold, ending up to 12 rows before it (near misses) or 24 after it.
    ``placed`` bool (rows, relations).
    """
    last = len(placed) - 1
    windows = {(0, CHUNK * k) for k in range(1, min(MAX_CHUNKS, last // CHUNK) + 1)}
    onsets = np.flatnonzero((placed[1:] & ~placed[:-1]).any(1)) + 1
    near = [onset + shift for onset in onsets for shift in (*rng.integers(-12, 0, 3), *rng.integers(0, 25, 4))]
    anywhere = np.arange(CHUNK + int(rng.integers(stride)), last + 1, stride)
    for end in (*near, *anywhere):
        longest = min(MAX_CHUNKS, int(end) // CHUNK)
        if longest >= 1 and end <= last:
            windows.add((int(end) - CHUNK * int(rng.integers(1, longest + 1)), int(end)))
    return np.array(sorted(windows), dtype=np.int64).reshape(-1, 2)


def imagined_clips(folder: str | Path) -> ClipSet:
    """Clips from a folder of imagined videos; the module's docstring has the format.

    Raises:
        DatasetError: no files, or one that does not follow the format.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise DatasetError(f"{folder} contains no *.safetensors files of imagined clips")
    return merge([_imagined_file(path) for path in paths])


def _imagined_file(path: Path) -> ClipSet:
    try:
        tensors, metadata = load_sealed(path)
        texts = json.loads(metadata.get("instructions", "null"))
    except (CheckpointError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as imagined clips: {error}") from error
    frames, given = tensors.get("frames"), tensors.get("labels")
    if frames is None or given is None or frames.ndim != 5 or str(frames.dtype) != "torch.uint8":
        raise DatasetError(f"{path} needs 'frames' uint8 (n, F, H, W, 3) and 'labels' (n,); found {sorted(tensors)}")
    n, length = frames.shape[:2]
    if not isinstance(texts, list) or len(texts) != n or tuple(given.shape) != (n,) or length < 2:
        raise DatasetError(f"{path}: {n} clips of {length} frames need {n} labels and {n} instructions in the metadata")
    robot = find_robot(metadata.get("robot", "")).name
    grammar = grammar_of(robot)
    goals = tuple(TEXT + text for text in sorted(set(texts)))
    labels = np.full((n, len(goals)), UNKNOWN, dtype=np.int8)
    labels[np.arange(n), [goals.index(TEXT + text) for text in texts]] = given.numpy() > 0
    if "object_poses" in tensors and "relations" in tensors:
        poses, truth = tensors["object_poses"].float().numpy(), tensors["relations"].numpy() > 0
        if poses.shape != (n, 2, len(grammar.objects), 7) or truth.shape != (n, 2, len(grammar.relations)):
            raise DatasetError(f"{path}: object_poses {poses.shape} or relations {truth.shape} do not fit {n} clips")
        poses = np.where((poses == 0).all(-1, keepdims=True), np.nan, poses)
        known = grammar.label_clips(poses[:, 0], poses[:, 1], truth[:, 0], truth[:, 1])
        goals, labels = grammar.goals + goals, np.concatenate([_three_valued(known), labels], axis=1)
    first = np.arange(n) * length
    rows = frames.numpy().reshape(n * length, *frames.shape[2:])
    nowhere = np.full((n * length, len(grammar.objects), 3), np.nan, dtype=np.float32)
    spans = np.stack([first, first + length - 1], axis=1)
    return ClipSet(rows, spans, labels, goals, nowhere, np.arange(n), 10.0, "dream", robot)


def merge(parts: Sequence[ClipSet]) -> ClipSet:
    """Several sets as one; goals are united, episodes stay distinct.

    Raises:
        DatasetError: they are of different robots, or their frames differ in size.
    """
    if len(parts) == 1:
        return parts[0]
    if len(robots := sorted({part.robot for part in parts})) > 1:
        raise DatasetError(f"the clips are of different robots, {', '.join(robots)}; train one judge for each.")
    if len(sizes := sorted({part.frames.shape[1:3] for part in parts})) > 1:
        raise DatasetError(f"The clips have frames of different sizes, {sizes}; record or imagine them at one size.")
    goals = tuple(sorted({goal for part in parts for goal in part.goals}))
    spans, labels, episodes, rows, seen = [], [], [], 0, 0
    for part in parts:
        table = np.full((len(part), len(goals)), UNKNOWN, dtype=np.int8)
        table[:, [goals.index(goal) for goal in part.goals]] = part.labels
        labels.append(table)
        spans.append(part.spans + rows)
        episodes.append(part.episodes + seen)
        rows += len(part.frames)
        seen += int(part.episodes.max(initial=-1)) + 1
    return ClipSet(
        frames=np.concatenate([part.frames for part in parts]),
        spans=np.concatenate(spans),
        labels=np.concatenate(labels),
        goals=goals,
        positions=np.concatenate([part.positions for part in parts]),
        episodes=np.concatenate(episodes),
        fps=parts[0].fps,
        source=parts[0].source,
        robot=parts[0].robot,
    )


def split(clips: ClipSet, share: float, *, seed: int, salt: int) -> tuple[ClipSet, ClipSet]:
    """(the rest, ``share`` of the episodes): whole episodes, chosen by a hash, so that no frame is in both parts."""
    numbers = np.unique(clips.episodes)
    chosen = np.array([mix(seed, salt, int(number)) % 10_000 < share * 10_000 for number in numbers], dtype=bool)
    inside = np.isin(clips.episodes, numbers[chosen])
    return clips.only(~inside), clips.only(inside)


@dataclass(frozen=True)
class Questions:
    """A batch: ``windows`` (B,), ``goals`` (B, Q) columns, ``labels`` float32 (B, Q)."""

    windows: Int64Array
    goals: Int64Array
    labels: Float32Array


class QuestionSampler:
    """Draws balanced clips and questions.

    A clip is drawn by one of its goals: kinds of goals by ``kind_weights``, the goals of a kind by the square root of
    how often they came true, success and failure equally. Two thirds of the failures are hard: another goal of the same
    objects came true (the wrong relation, swapped roles, another target). The other questions about the clip are its
    successes and further failures, hard ones first. ``weights`` then balances success and failure for every goal, so
    that the text alone does not predict the answer.
    """

    kind_weights: ClassVar[dict[str, float]] = {"on": 3.0, "in": 3.0, "text": 4.0}
    hard_share = 2 / 3

    def __init__(self, clips: ClipSet, questions: int, *, include_held_out: bool = False) -> None:
        self.clips = clips
        self.questions = questions
        grammar = clips.grammar
        asked = np.array([include_held_out or not is_held_out(goal, grammar) for goal in clips.goals], dtype=bool)
        self.true = (clips.labels == 1) & asked
        self.false = (clips.labels == 0) & asked
        named = [set(goal_objects(goal, grammar)) for goal in clips.goals]
        sharing = np.array([[bool(a & b) for b in named] for a in named])
        self.hard = self.false & ((self.true.astype(np.float32) @ sharing.astype(np.float32)) > 0)
        self.pools = {
            name: [np.flatnonzero(table[:, g]) for g in range(len(clips.goals))]
            for name, table in (("true", self.true), ("false", self.false), ("hard", self.hard))
        }
        self.chances = self._chances()
        self.weights = np.ones((2, len(clips.goals)), dtype=np.float32)

    def _chances(self) -> NDArray[np.float64]:
        counts = np.sqrt([min(len(t), len(f)) for t, f in zip(self.pools["true"], self.pools["false"], strict=True)])
        kinds = np.array([goal.split(":", 1)[0] for goal in self.clips.goals])
        for kind in np.unique(kinds):
            member = kinds == kind
            counts[member] *= self.kind_weights.get(str(kind), 1.0) / max(counts[member].sum(), 1e-9)
        if counts.sum() <= 0:
            raise DatasetError(
                f"{len(self.clips)} clips contain no goal with both successes and failures; collect more data"
            )
        return np.asarray(counts / counts.sum(), dtype=np.float64)

    def balance(self, seed: int, draws: int = 4000) -> None:
        """Set ``weights`` (2, G) from ``draws`` trial draws: half of each goal's weight on success, half on failure."""
        batch = self.draw(np.random.default_rng(seed), draws)
        answers = batch.labels.astype(np.int64)
        counts = np.ones((2, len(self.clips.goals)))
        np.add.at(counts, (answers, batch.goals), 1)
        self.weights = np.clip(0.5 * counts.sum(0) / counts, 0.2, 5.0).astype(np.float32)

    def draw(self, rng: np.random.Generator, batch: int) -> Questions:
        """``batch`` clips with their questions."""
        leading = rng.choice(len(self.chances), size=batch, p=self.chances)
        windows = np.array([self._window(rng, int(goal)) for goal in leading], dtype=np.int64)
        goals = np.array([self._ask(rng, int(w), int(g)) for w, g in zip(windows, leading, strict=True)])
        labels = self.clips.labels[windows[:, None], goals] == 1
        return Questions(windows, goals, labels.astype(np.float32))

    def _window(self, rng: np.random.Generator, goal: int) -> int:
        pool = self.pools["true"][goal]
        if rng.random() < 0.5:
            hard = self.pools["hard"][goal]
            pool = hard if len(hard) and rng.random() < self.hard_share else self.pools["false"][goal]
        return int(rng.choice(pool))

    def _ask(self, rng: np.random.Generator, window: int, goal: int) -> list[int]:
        asked = [goal]
        for table in (self.true, self.hard, self.false):
            columns = rng.permutation(np.flatnonzero(table[window]))
            room = self.questions - len(asked)
            # Leave room for the next kind: at most half of what remains, except for the last.
            limit = room if table is self.false else (room + 1) // 2
            asked += [int(column) for column in columns if column not in asked][:limit]
        return (asked * self.questions)[: self.questions]


def examination(clips: ClipSet, per_goal: int, *, seed: int) -> list[JudgeClip]:
    """Questions for a report: up to ``per_goal`` successes of every goal and as many failures, half of those hard.

    A goal with few successes still has ``per_goal / 4`` failures.
    """
    sampler, grammar = QuestionSampler(clips, 1, include_held_out=True), clips.grammar
    rng = np.random.default_rng(mix(seed, 2))
    chosen: list[JudgeClip] = []
    for column, goal in enumerate(clips.goals):
        true, hard, false = (sampler.pools[name][column] for name in ("true", "hard", "false"))
        yes = _some(rng, true, per_goal)
        failures = max(len(yes), per_goal // 4)
        difficult = _some(rng, hard, (failures + 1) // 2)
        no = np.concatenate([difficult, _some(rng, np.setdiff1d(false, difficult), failures - len(difficult))])
        for window in np.concatenate([yes, no]).astype(np.int64):
            label = bool(clips.labels[window, column] == 1)
            video, text = clips.video(int(window)), instruction_for(goal, grammar, rng)
            name = "text:imagined" if goal.startswith(TEXT) else goal
            chosen.append(JudgeClip(video, text, label, name, clips.source, is_held_out(goal, grammar)))
    return chosen


def _some(rng: np.random.Generator, pool: Int64Array, count: int) -> Int64Array:
    return rng.permutation(pool)[:count]


def positions_of(clips: ClipSet, rows: Int64Array, goals: Int64Array) -> Float32Array:
    """Positions of the first two objects of every question's goal: (B, Q, F, 2, 3) metres, NaN if absent."""
    grammar = clips.grammar
    places = [[grammar.objects.index(name) for name in goal_objects(goal, grammar)][:2] for goal in clips.goals]
    table = [[places[g] for g in row] for row in goals]
    found = np.full((len(table), len(table[0]), rows.shape[1], 2, 3), np.nan, dtype=np.float32)
    for b, row in enumerate(table):
        here = clips.positions[rows[b]]
        for q, objects in enumerate(row):
            for slot, index in enumerate(objects):
                found[b, q, :, slot] = here[:, index]
    return found
