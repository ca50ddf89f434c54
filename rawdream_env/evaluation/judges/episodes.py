"""Episodes with a known outcome, to evaluate a judge: new ones from a simulator, or a recorded data set.

The label is whether the task is done at the end of the video, because a judge of the whole video sees that. Episode i
depends only on the seed and i, not on the number of processes. Tasks alternate, and so do three drivers, because near misses
are the hard cases: the scripted expert (nearly all successes), the expert with large action noise (it often holds the object
at its goal without releasing it, which is a failure), and the bundled policy at temperature 1 (the mistakes that RL starts
from). Rates over all episodes depend on this mixture; compare the drivers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from rawdream_env.data.collect import CollectConfig, CollectSource
from rawdream_env.data.reader import LeRobotReader
from rawdream_env.envs.episodes import EpisodeRequest, make_env, run_episodes
from rawdream_env.errors import DatasetError, InvalidOptionError, SimulatorError
from rawdream_env.evaluation.judges.report import JudgeClip
from rawdream_env.policies import load_policy
from rawdream_env.processes import WorkerPool
from rawdream_env.robots import find_goals, find_robot
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.types import Policy, Start, Video

_BLANK = np.zeros((1, 1, 3), np.uint8)  # the simulator makes the scene from the seed
_STREAM = 0x1DD6E
DRIVERS = {"expert": 0.1, "shaky expert": 0.7, "policy": 0.0}
"""Drivers, with the standard deviation of the noise on their motion (1 is full speed)."""


@dataclass(frozen=True)
class FreshEpisodes:
    """Which episodes to run in a robot's simulator: ``steps`` control steps each, frames of ``image_size`` pixels."""

    seed: int = 0
    layout: str = "narrow"
    policy: str = "embedded"
    steps: int = 64
    image_size: int = 64
    drivers: tuple[str, ...] = tuple(DRIVERS)
    robot: str = ""

    def __post_init__(self) -> None:
        """Check drivers and steps."""
        unknown = [name for name in self.drivers if name not in DRIVERS]
        if unknown or not self.drivers or self.steps < 1:
            raise InvalidOptionError(
                f"drivers {self.drivers} must be among {', '.join(DRIVERS)}, and steps {self.steps} at least 1."
            )


class Player:
    """Runs new episodes, one at a time. Close it afterwards.

    Experts act step by step in the robot's episode source, as in ``rawdream data collect``; the policy acts in the simulator
    environment.
    """

    def __init__(self, spec: FreshEpisodes) -> None:
        self.spec, self.robot = spec, find_robot(spec.robot)
        self.tasks = self.robot.load("goals").tasks
        self._experts: dict[str, CollectSource] = {}
        self._simulator: Any = None
        self._policy: Policy | None = None

    def __call__(self, index: int) -> JudgeClip:
        """Episode ``index``."""
        task_id = index % len(self.tasks)
        task, instruction, _ = self.tasks[task_id]
        name = self.spec.drivers[index // len(self.tasks) % len(self.spec.drivers)]
        seed = mix(self.spec.seed, _STREAM, index)
        if name == "policy":
            video, success = self._policy_episode(Start(_BLANK, instruction, task_id, seed=seed))
        else:
            video, success = self._expert_episode(name, index, seed)
        return JudgeClip(video, instruction, success, source=name, task=task)

    def _expert_episode(self, name: str, index: int, seed: int) -> tuple[Video, bool]:
        if name not in self._experts:
            spec = self.spec
            config = CollectConfig(
                out="",
                robot=self.robot.name,
                kind="expert",
                steps_per_episode=spec.steps,
                layout=cast(Any, spec.layout),
                action_noise=DRIVERS[name],
                image_size=spec.image_size,
            )
            self._experts[name] = self.robot.load("episode_source")(config)
        source = self._experts[name]
        episode, success = source.attempt(index, seed)
        return Video(episode.frames, source.fps), success

    def _policy_episode(self, start: Start) -> tuple[Video, bool]:
        spec = self.spec
        if self._policy is None:
            self._policy = load_policy(spec.policy)
            options: dict[str, Any] = {"layout": spec.layout, "image_size": spec.image_size}
            self._simulator = make_env(
                self.robot.sim_env, 1, judge_every="episode", end_on_success=False, return_frames=True, **options
            )
            chunk_len = self._simulator.single_action_space.shape[0]
            if spec.steps % chunk_len:
                raise InvalidOptionError(f"steps={spec.steps} must be a multiple of {chunk_len}, the policy's chunk.")
            self._simulator.set_attr("max_episode_steps", spec.steps // chunk_len)
        seed = start.seed or 0
        request = EpisodeRequest(start, seed, NoiseKey(mix(seed, 2)))
        (rollout,) = run_episodes(self._simulator, [request], self._policy, temperature=1.0)
        assert rollout.frames is not None
        return Video(rollout.frames, self._simulator.unwrapped.fps), rollout.success_end

    def close(self) -> None:
        """Close the simulators."""
        for part in (*self._experts.values(), self._simulator):
            if part is not None:
                part.close()


# The player of a worker process. Its first episode creates it, so that a RendererError reaches the user unchanged.
_PLAYERS: dict[FreshEpisodes, Player] = {}


def _play(spec: FreshEpisodes, index: int) -> JudgeClip:
    if spec not in _PLAYERS:
        _PLAYERS[spec] = Player(spec)
    return _PLAYERS[spec](index)


def fresh_clips(spec: FreshEpisodes, episodes: int, *, workers: int = 0) -> Iterator[JudgeClip]:
    """Run ``episodes`` episodes and yield them in order; ``workers`` processes, 0: in this process.

    Raises:
        SimulatorError: a worker process died. WorkerStoppedError: one is stopped or stuck. RendererError: no OpenGL.
    """
    if workers == 0:
        player = Player(spec)
        try:
            yield from map(player, range(episodes))
        finally:
            player.close()
        return
    pool = WorkerPool(workers)
    running: deque[Future[JudgeClip]] = deque()
    try:
        for index in range(episodes):
            running.append(pool.submit(_play, spec, index))
            if len(running) > 4 * workers:  # bounds the memory of episodes that wait for a slow judge
                yield pool.result(running.popleft())
        while running:
            yield pool.result(running.popleft())
    except BrokenProcessPool as error:
        raise SimulatorError(
            "a simulator process died (out of memory?); rerun the command with fewer --workers."
        ) from error
    finally:
        pool.close()


def recorded_clips(folders: Sequence[str], *, success_key: str = "", limit: int | None = None) -> Iterator[JudgeClip]:
    """Whole episodes of LeRobotDataset v3.0 folders, at most ``limit`` of each; the instruction is the episode's task.

    The label comes from the first of these that the folder has: the column ``success_key``, if given; the last row of
    ``privileged.success`` or ``next.success`` (1: success); ``privileged.relations``, if the instruction is one of the
    robot's tasks.

    Raises:
        DatasetError: a folder is damaged or has no success labels.
    """
    for folder in folders:
        yield from _recorded(folder, success_key, limit)


def _recorded(folder: str, success_key: str, limit: int | None) -> Iterator[JudgeClip]:
    reader = LeRobotReader(folder, raw_actions=True)
    key = success_key or next((name for name in ("privileged.success", "next.success") if name in reader.features), "")
    if success_key and success_key not in reader.features:
        raise DatasetError(f"{folder} has no column {success_key!r}; it has {', '.join(sorted(reader.features))}.")
    if key:
        reader = LeRobotReader(folder, state_key=key, raw_actions=True)  # reads any numeric column as the state
    grammar = find_goals(reader.robot_type)
    tasks = {text: (name, grammar.relations.index(goal)) for name, text, goal in grammar.tasks} if grammar else {}
    for index in range(len(reader) if limit is None else min(limit, len(reader))):
        episode = reader.episode(index)
        name, column = tasks.get(episode.task, (episode.task, None))
        if key:
            success = float(episode.state[-1].max(initial=0.0)) > 0.5
        elif column is not None and "relations" in episode.privileged:
            success = float(episode.privileged["relations"][-1][column]) > 0.5
        else:
            raise DatasetError(
                f"{folder} has no success label for episode {index} ({episode.task!r}). Name the column of labels with "
                f"--success-key; the columns are {', '.join(sorted(reader.features))}."
            )
        yield JudgeClip(Video(episode.frames, episode.fps), episode.task, success, source="recorded", task=name)
