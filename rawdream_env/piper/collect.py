"""Episodes of the Piper twin for ``rawdream data collect``: play, the scripted expert, or a policy with noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rawdream_env.data import schema
from rawdream_env.data.collect import CollectConfig
from rawdream_env.data.lerobot import EpisodeData
from rawdream_env.envs.base import ChunkResult, ChunkVectorEnv, Rows
from rawdream_env.envs.collecting import RolloutSource
from rawdream_env.envs.episodes import run_episodes
from rawdream_env.piper import geometry
from rawdream_env.piper.envs import CHUNK_LEN, FPS
from rawdream_env.piper.relations import OBJECTS, RELATION_NAMES, TASKS, Task, find_task
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.types import ACTION_DIM, Float32Array, Start, UInt8Array

if TYPE_CHECKING:
    from rawdream_env.piper.simulator.twin import PiperTwin

PLAY_TASK = "play with the objects on the table"
"""The task-table entry of play episodes, which have no instruction."""


def _features() -> schema.Features:
    axes = ("x", "y", "z", "qw", "qx", "qy", "qz")
    poses = [f"{name}.{axis}" for name in OBJECTS for axis in axes]
    return {
        schema.STATE_KEY: schema.numeric_feature(7, ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]),
        schema.ACTION_KEY: schema.numeric_feature(ACTION_DIM, ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]),
        "privileged.object_poses": schema.numeric_feature(len(poses), poses),
        "privileged.relations": schema.numeric_feature(len(RELATION_NAMES), RELATION_NAMES),
        "privileged.gripper": schema.numeric_feature(1, ["opening"]),
    }


class PiperSource(RolloutSource):
    """Generates episodes in a ``PiperTwin``, which is created for the first one.

    Raises:
        InvalidOptionError: no such task, or an impossible image size. CheckpointError: no such policy.
    """

    fps = FPS
    robot_type = "piper"
    features: ClassVar[schema.Features] = _features()

    def __init__(self, config: CollectConfig) -> None:
        chosen = tuple(find_task(name) for name in dict.fromkeys(config.tasks)) or TASKS
        self.tasks = () if config.kind == "play" else chosen
        names = tuple(task.name for task in self.tasks)
        self.config = replace(config, tasks=names, steps_per_episode=config.steps)
        self.image_shape = (config.image_size, config.image_size, 3)
        # Known before the first episode, so that shards need no common state.
        self.instructions = tuple(dict.fromkeys(task.instruction for task in self.tasks)) or (PLAY_TASK,)
        self._twin: PiperTwin | None = None
        geometry.check_image_size(config.image_size)
        super().__init__()

    def close(self) -> None:
        """Free the twin's OpenGL context."""
        if self._twin is not None:
            self._twin.close()
            self._twin = None

    @property
    def twin(self) -> PiperTwin:
        """The simulator of this process."""
        if self._twin is None:
            from rawdream_env.piper.simulator.twin import PiperTwin

            self._twin = PiperTwin(image_size=self.config.image_size)
        return self._twin

    def attempt(self, index: int, seed: int) -> tuple[EpisodeData, bool]:
        """Episode ``index`` drawn from ``seed``, and whether its task is done at the end."""
        config, twin = self.config, self.twin
        task = None if config.kind == "play" else self.tasks[index % len(self.tasks)]
        frame = twin.reset(seed, task=None if task is None else task.name, layout=config.layout)
        recording = Recording(twin, frame)
        if config.kind in ("policy", "random"):
            assert task is not None
            env = _RecordedTwin(recording, config.steps)
            start = Start(frame, task.instruction, seed=seed)
            list(run_episodes(env, [start], self.driver(seed), temperature=self.temperature))
        else:
            act = self._script(task, seed)
            for _ in range(config.steps):
                recording.step(act())
        episode = recording.episode(PLAY_TASK if task is None else task.instruction)
        if task is None:
            return episode, True
        success = bool(twin.success(task.name))
        return replace(episode, success=success), success

    def _script(self, task: Task | None, seed: int) -> Callable[[], Float32Array]:
        """The scripted driver: the expert of a task, or play without a task."""
        from rawdream_env.piper.simulator.skills import PlayPolicy, ScriptedExpert

        rng = np.random.default_rng(mix(seed, 1))
        if task is not None:
            return ScriptedExpert(self.twin, task.name, rng, noise=self.config.action_noise).act
        play, noise = PlayPolicy(self.twin, rng), self.noise(seed)
        return lambda: noise(play.act())


class Recording:
    """A running episode in a twin, or on what has its ``step`` and ``proprio``; keeps what a data set stores of every control
    step. The truth about objects is stored where it is known (:func:`knows_objects`).
    """

    def __init__(self, twin: Any, frame: UInt8Array) -> None:
        self.twin = twin
        self.frames, self.actions = [frame], list[Float32Array]()
        self.states, self.truth = [twin.proprio()], [self._privileged()]

    def step(self, action: Float32Array) -> None:
        """Carry out one action (7,)."""
        frame = self.twin.step(action)
        assert frame is not None  # it is None only in a twin without a renderer
        self.actions.append(getattr(self.twin, "sent_action", action))  # a real arm's guard may have changed it
        self.frames.append(frame)
        self.states.append(self.twin.proprio())
        self.truth.append(self._privileged())

    def episode(self, instruction: str) -> EpisodeData:
        """The episode so far."""
        return EpisodeData(
            frames=np.stack(self.frames),
            actions=np.stack(self.actions).astype(np.float32),
            state=np.stack(self.states).astype(np.float32),
            task=instruction,
            privileged={name: np.stack([row[name] for row in self.truth]) for name in self.truth[0]},
        )

    def _privileged(self) -> dict[str, Float32Array]:
        if not knows_objects(self.twin):
            return {}
        return {
            "object_poses": np.asarray(self.twin.object_poses(), np.float32).ravel(),
            "relations": np.asarray(self.twin.relations(), np.float32).ravel(),
            "gripper": np.array([self.twin.gripper_opening()], np.float32),
        }


def knows_objects(twin: Any) -> bool:
    """Whether a recording in ``twin`` has the privileged columns."""
    return hasattr(twin, "object_poses")


class _RecordedTwin(ChunkVectorEnv):
    """A recording as an environment of one row, for policies. After ``steps`` control steps the rest of a chunk is left
    out.
    """

    def __init__(self, recording: Recording, steps: int) -> None:
        super().__init__(
            1,
            frame_shape=recording.frames[0].shape,
            chunk_len=CHUNK_LEN,
            fps=FPS,
            max_episode_steps=-(-steps // CHUNK_LEN),
            autoreset_mode="Disabled",
        )
        self.recording, self.steps = recording, steps

    def _begin(self, rows: Rows, keys: Sequence[NoiseKey], given: Sequence[Start | None]) -> list[Start]:
        return [start for start in given if start is not None]

    def _advance(self, rows: Rows, actions: Float32Array, last: NDArray[np.bool_]) -> ChunkResult:
        for action in actions[0][: self.steps - len(self.recording.actions)]:
            self.recording.step(action)
        nothing = np.zeros(1, bool)
        return ChunkResult(self.recording.frames[-1][None, None], np.full(1, -1, np.int8), ~nothing, nothing)
