"""Episodes with a known outcome to measure a judge on: fresh ones from the Piper twin, or a recorded data set.

The label is the truth when the video ends, which is what a judge of the whole video can know. A fresh episode i depends
on the seed and i alone, not on the number of processes. Tasks take turns, and three drivers do, because a judge is
attacked by what nearly worked: the scripted expert (nearly all successes), the same with shaky hands (it often holds
the object at its goal to the end and does not let go, which is no success), and the shipped policy at temperature 1 (the
mistakes reinforcement learning starts from). Rates over all episodes depend on this mixture: look at each driver's.

Shape letters: F frames, H W picture, A action dimensions.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from rawdream_env.errors import DatasetError, InvalidOptionError, SimulatorError
from rawdream_env.evaluation.judges.report import JudgeClip
from rawdream_env.piper.relations import TASKS, Task
from rawdream_env.robots import find_goals
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.types import Float32Array, UInt8Array, Video

FPS = 10.0
_STREAM = 0x1DD6E
DRIVERS = {"expert": 0.1, "shaky expert": 0.7, "policy": 0.0}
"""Who drives, with the standard deviation of the noise on its motion (1 is full speed)."""

Driver = Callable[[UInt8Array], Float32Array]


@dataclass(frozen=True)
class FreshEpisodes:
    """What to play in the twin: ``steps`` control steps each, frames of ``image_size`` pixels."""

    seed: int = 0
    layout: str = "narrow"
    policy: str = "embedded"
    steps: int = 64
    image_size: int = 64
    drivers: tuple[str, ...] = tuple(DRIVERS)

    def __post_init__(self) -> None:
        """Refuse what cannot be played."""
        unknown = [name for name in self.drivers if name not in DRIVERS]
        if unknown or not self.drivers or self.steps < 1:
            raise InvalidOptionError(
                f"drivers {self.drivers} must be among {', '.join(DRIVERS)}, steps {self.steps} at least 1."
            )


class Player:
    """Plays fresh episodes in one twin; close it afterwards."""

    def __init__(self, spec: FreshEpisodes) -> None:
        from rawdream_env.piper.twin import PiperTwin

        self.spec = spec
        self.twin: Any = PiperTwin(image_size=spec.image_size)
        self._policy: Any = None

    def __call__(self, index: int) -> JudgeClip:
        """Episode ``index``."""
        spec, twin = self.spec, self.twin
        task = TASKS[index % len(TASKS)]
        name = spec.drivers[index // len(TASKS) % len(spec.drivers)]
        seed = mix(spec.seed, _STREAM, index)
        frames = [twin.reset(seed, task=task.name, layout=spec.layout)]
        act = self._driver(name, task, seed)
        for _ in range(spec.steps):
            frames.append(twin.step(act(frames[-1])))
        success = bool(twin.success())
        return JudgeClip(Video(np.stack(frames), FPS), task.instruction, success, source=name, task=task.name)

    def _driver(self, name: str, task: Task, seed: int) -> Driver:
        if name != "policy":
            from rawdream_env.piper.skills import ScriptedExpert

            expert = ScriptedExpert(self.twin, task, np.random.default_rng(mix(seed, 1)), noise=DRIVERS[name])
            return lambda _: expert.act()
        if self._policy is None:
            from rawdream_env.policies import load_policy

            self._policy = load_policy(self.spec.policy, "cpu")
        key, queue, chunks = NoiseKey(mix(seed, 2)), list[Float32Array](), 0

        def act(frame: UInt8Array) -> Float32Array:
            nonlocal chunks
            if not queue:
                keys = [key.at(chunk=chunks)]
                out = self._policy.act(frame[None], [task.instruction], temperature=1.0, keys=keys)
                queue.extend(np.asarray(out.actions.detach().cpu(), np.float32)[0])
                chunks += 1
            return queue.pop(0)

        return act

    def close(self) -> None:
        """Free the twin's OpenGL context."""
        self.twin.close()


# The player of a worker process, set by its first episode: so that "no renderer" reaches the user as it is.
_PLAYERS: dict[FreshEpisodes, Player] = {}


def _start_process() -> None:
    # Before mujoco and torch are imported: several processes already fill the cores.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"), "1"))


def _play(spec: FreshEpisodes, index: int) -> JudgeClip:
    if spec not in _PLAYERS:
        _PLAYERS[spec] = Player(spec)
    return _PLAYERS[spec](index)


def fresh_clips(spec: FreshEpisodes, episodes: int, *, workers: int = 0) -> Iterator[JudgeClip]:
    """Play ``episodes`` episodes and yield them in order; ``workers`` processes, 0: here.

    Raises:
        SimulatorError: a worker process died. RendererError: no OpenGL.
    """
    if workers == 0:
        player = Player(spec)
        try:
            yield from map(player, range(episodes))
        finally:
            player.close()
        return
    context = multiprocessing.get_context("spawn")  # a forked OpenGL context does not work in the child
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process) as pool:
        running: deque[Future[JudgeClip]] = deque()
        try:
            for index in range(episodes):
                running.append(pool.submit(_play, spec, index))
                if len(running) > 4 * workers:  # so that played episodes do not pile up before a slow judge
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise SimulatorError(
                "a simulator process died (out of memory?); run the command again with fewer workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def recorded_clips(folders: Sequence[str], *, success_key: str = "", limit: int | None = None) -> Iterator[JudgeClip]:
    """Whole episodes of LeRobotDataset v3.0 folders, at most ``limit`` of each; the task is the question.

    Where the truth comes from, the first that a folder has: the column ``success_key`` if one is named; the last row of
    ``privileged.success`` or of ``next.success`` (1: reached); ``privileged.relations`` together with the instruction of
    one of the robot's tasks.

    Raises:
        DatasetError: a folder is damaged or says nowhere whether its episodes succeeded.
    """
    for folder in folders:
        yield from _recorded(folder, success_key, limit)


def _recorded(folder: str, success_key: str, limit: int | None) -> Iterator[JudgeClip]:
    from rawdream_env.data.lerobot import LeRobotReader

    reader = LeRobotReader(folder)
    key = success_key or next((name for name in ("privileged.success", "next.success") if name in reader.features), "")
    if success_key and success_key not in reader.features:
        raise DatasetError(f"{folder} has no column {success_key!r}; it has {', '.join(sorted(reader.features))}.")
    if key:
        reader = LeRobotReader(folder, state_key=key)  # any numeric column can be read in the state's place
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
                f"{folder}: nothing says whether episode {index} ({episode.task!r}) succeeded. Name the column that "
                f"does with --success-key; there are {', '.join(sorted(reader.features))}."
            )
        yield JudgeClip(Video(episode.frames, episode.fps), episode.task, success, source="recorded", task=name)
