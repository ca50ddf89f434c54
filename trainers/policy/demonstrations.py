"""Demonstrations for supervised policy training: (frame, goal, next K actions) samples in memory.

Two sources. Play: segments of task-agnostic play in which an object is picked up and placed, labelled in hindsight with the
relation they establish (the generalist of paper section 4.1, without any of the target tasks). Experts: whole episodes of
a task, a few per task (the paper's few-shot anchor). Both produce the same kind of sample.

Shape letters: R rows of frames, N samples, K actions in a chunk, A action dimensions, H W image size.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rawdream_env.data.lerobot import LeRobotReader
from rawdream_env.data.reader import Episode, EpisodeArrays
from rawdream_env.errors import DatasetError
from rawdream_env.robots import GoalGrammar, find_goals, find_robot
from rawdream_env.seeding import mix
from rawdream_env.types import Float32Array, UInt8Array

POSE_DIM = 7
"""Width of the commanded pose in the policy's read-out."""


@dataclass(frozen=True)
class Demonstrations:
    """Samples of one or more data sets.

    ``frames`` uint8 (R, H, W, 3); sample n has the image ``frames[rows[n]]`` and the target ``actions[n]`` (K, A);
    ``readout`` (N, 13) float32: commanded pose with gripper (7), xyz of the moved object (3) and of its goal (3) in
    metres, NaN where unknown; ``goals[goal[n]]`` is a goal's name (an instruction is then sampled) or a fixed
    instruction; ``episode`` (N,): the episode of each sample; ``grammar``: the goal grammar, None without one.
    """

    frames: UInt8Array
    rows: NDArray[np.int64]
    actions: Float32Array
    readout: Float32Array
    goal: NDArray[np.int64]
    goals: tuple[str, ...]
    episode: NDArray[np.int64]
    grammar: GoalGrammar | None

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.rows)

    def instruction(self, sample: int, rng: np.random.Generator) -> str:
        """The instruction of a sample; for a named goal, ``rng`` draws a paraphrase."""
        goal = self.goals[self.goal[sample]]
        return self.grammar.paraphrase(goal, rng) if self.grammar and goal in self.grammar.goals else goal

    def select(self, samples: NDArray[np.int64] | NDArray[np.bool_]) -> Demonstrations:
        """A subset of the samples; frames are shared, not copied."""
        return replace(
            self,
            rows=self.rows[samples],
            actions=self.actions[samples],
            readout=self.readout[samples],
            goal=self.goal[samples],
            episode=self.episode[samples],
        )

    def split(self, held_out: float, seed: int) -> tuple[Demonstrations, Demonstrations]:
        """Training and held-out samples, divided by whole episodes; a share above 0 holds out at least one episode."""
        episodes = np.unique(self.episode)
        count = min(len(episodes) - 1, max(1, round(held_out * len(episodes)))) if held_out > 0 else 0
        out = np.random.default_rng(seed).permutation(episodes)[:count]
        mask = np.isin(self.episode, out)
        return self.select(~mask), self.select(mask)


def chunk_targets(actions: Float32Array, start: int, end: int, chunk_len: int) -> Float32Array:
    """The next K actions at every step of ``[start, end)``: ``actions`` (T, A) -> (end - start, K, A).

    Beyond ``end`` the target is zero motion, with the last gripper command.
    """
    steps = np.arange(start, end)[:, None] + np.arange(chunk_len)
    targets: Float32Array = actions[np.minimum(steps, end - 1)].astype(np.float32)
    targets[steps >= end, :-1] = 0.0
    return targets


def readout_targets(episode: Episode, goal: str, start: int, end: int, grammar: GoalGrammar | None) -> Float32Array:
    """Targets of the auxiliary head, (end - start, 13), NaN where unknown."""
    out = np.full((end - start, 13), np.nan, dtype=np.float32)
    if episode.state.shape[1] == POSE_DIM:
        out[:, :POSE_DIM] = episode.state[start:end]
    poses = episode.privileged.get("object_poses")
    if poses is not None and grammar is not None and goal in grammar.goals:
        for column, name in zip((7, 10), grammar.goal_objects(goal), strict=False):
            place = 7 * grammar.objects.index(name)
            out[:, column : column + 3] = poses.reshape(len(poses), -1)[start:end, place : place + 3]
    return out


def play_demonstrations(
    arrays: EpisodeArrays, chunk_len: int, *, exclude_pairs: Collection[tuple[str, str]] | None = None
) -> Demonstrations:
    """Pick-and-place segments of play, labelled in hindsight, without the pairs (moved object, goal object) of
    ``exclude_pairs``.

    By default these are the tasks' pairs: a policy must not be pre-trained on its target tasks. Raises ``DatasetError``
    when no segment is left.
    """
    grammar: GoalGrammar = find_robot(arrays.robot_type).load("goals")
    exclude_pairs = grammar.task_pairs if exclude_pairs is None else exclude_pairs
    parts: list[tuple[int, Episode, int, int, int]] = []
    for position in range(len(arrays)):
        episode = arrays.episode(position)
        parts.extend(
            (position, episode, segment.start, segment.end, grammar.goals.index(segment.goal))
            for segment in grammar.pick_place_segments(episode, exclude_pairs=exclude_pairs)
        )
    if not parts:
        raise DatasetError(f"none of the {len(arrays)} play episodes holds a pick-and-place; collect more play.")
    return _assemble(arrays, parts, grammar.goals, [grammar.goals[p[4]] for p in parts], chunk_len, grammar)


def expert_demonstrations(arrays: EpisodeArrays, chunk_len: int) -> Demonstrations:
    """Every episode as a demonstration of its instruction, without its idle tail."""
    wanted = tuple(dict.fromkeys(arrays.tasks))
    parts = []
    for position, task in enumerate(arrays.tasks):
        episode = arrays.episode(position)
        parts.append((position, episode, 0, _end_of_motion(episode.actions, chunk_len), wanted.index(task)))
    grammar = find_goals(arrays.robot_type)
    task_goals = {instruction: goal for _, instruction, goal in grammar.tasks} if grammar else {}
    named = [task_goals.get(wanted[p[4]], "") for p in parts]
    return _assemble(arrays, parts, wanted, named, chunk_len, grammar)


def _end_of_motion(actions: Float32Array, slack: int) -> int:
    """Where an episode's idle tail begins, plus ``slack`` steps of it: hovering needs no more examples than that."""
    moving = np.flatnonzero(
        (np.abs(actions[:, :-1]) > 0.05).any(1) | (np.abs(np.diff(actions[:, -1], prepend=0)) > 0.5)
    )
    return min(len(actions), (int(moving[-1]) + 1 if len(moving) else 0) + slack)


def _assemble(
    arrays: EpisodeArrays,
    parts: Sequence[tuple[int, Episode, int, int, int]],
    goals: tuple[str, ...],
    named: Sequence[str],
    chunk_len: int,
    grammar: GoalGrammar | None,
) -> Demonstrations:
    lengths = [end - start for _, _, start, end, _ in parts]
    return Demonstrations(
        frames=arrays.frames,
        rows=np.concatenate([arrays.offsets[p] + np.arange(start, end) for p, _, start, end, _ in parts]),
        actions=np.concatenate([chunk_targets(e.actions, start, end, chunk_len) for _, e, start, end, _ in parts]),
        readout=np.concatenate(
            [readout_targets(e, r, start, end, grammar) for (_, e, start, end, _), r in zip(parts, named, strict=True)]
        ),
        goal=np.repeat([p[4] for p in parts], lengths).astype(np.int64),
        goals=goals,
        episode=np.repeat([p[0] for p in parts], lengths).astype(np.int64),
        grammar=grammar,
    )


def load_play(folders: Sequence[str], chunk_len: int) -> list[Demonstrations]:
    """``play_demonstrations`` of LeRobotDataset v3 folders; only the frames that are used stay in memory."""
    return [_load_compactly(LeRobotReader(folder), chunk_len) for folder in folders]


def _load_compactly(reader: LeRobotReader, chunk_len: int, block: int = 128) -> Demonstrations:
    """Find the segments without decoding frames, then decode ``block`` episodes at a time and keep the frames used."""
    whole = play_demonstrations(reader.load_all(frames=False), chunk_len)
    used = np.unique(whole.rows)
    frames = np.empty((len(used), *reader.frame_shape), np.uint8)
    ends = np.concatenate([[0], np.cumsum(reader.lengths + 1)])
    for first in range(0, len(reader), block):
        last = min(first + block, len(reader))
        mine = slice(*np.searchsorted(used, [ends[first], ends[last]]))
        frames[mine] = reader.load_all(range(first, last), workers=2).frames[used[mine] - ends[first]]
    return replace(whole, frames=frames, rows=np.searchsorted(used, whole.rows))


def load_experts(
    folders: Sequence[str], chunk_len: int, *, demos_per_task: int, skip: int = 0, seed: int | None = None
) -> list[Demonstrations]:
    """``expert_demonstrations`` of LeRobotDataset v3 folders, each with the same number of episodes of every task.

    Args:
        folders: the data sets; only the episodes used are decoded.
        chunk_len: actions per sample (K).
        demos_per_task: episodes of every task.
        skip: episodes of every task that come before these, for another use.
        seed: order of a task's episodes; None: as they were recorded.

    Raises:
        DatasetError: a task has fewer than ``skip + demos_per_task`` episodes.
    """
    out = []
    for folder in folders:
        reader = LeRobotReader(folder)
        used = [i for task in reader.tasks for i in _choose(reader, task, skip + demos_per_task, seed)[skip:]]
        out.append(expert_demonstrations(reader.load_all(used), chunk_len))
    return out


def _choose(reader: LeRobotReader, task: str, count: int, seed: int | None) -> list[int]:
    """``count`` episodes of a task, [] of a task without episodes; a larger ``count`` continues the list."""
    episodes = [i for i in range(len(reader)) if reader.task(i) == task]
    if episodes and len(episodes) < count:
        raise DatasetError(
            f"{len(episodes)} demonstrations of {task!r}, expected {count}. Lower demos_per_task or val_demos_per_task."
        )
    if seed is not None:
        episodes = np.random.default_rng(mix(seed, zlib.crc32(task.encode()))).permutation(episodes).tolist()
    return episodes[:count]
