"""Collect episodes in the Piper twin: task-agnostic play, scripted demonstrations, or a policy with noise.

The world model learns from play (paper section 4: about four hours of grasping, placing, pushing and tumbling that
serve no task); demonstrations warm the policy up; noisy policy rollouts are the paper's co-training and in-domain
variants.

Episode i depends on the seed and i alone: not on the number of workers, nor on when the collection was interrupted.
The work is cut into shards of ``episodes_per_shard`` episodes; each worker process writes whole shards, and the same
command continues after a crash or Ctrl-C with the shards that are missing.

>>> collect(CollectConfig(root="runs/play", kind="play", episodes=1600, workers=2))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from rawdream_env.data import schema
from rawdream_env.data.lerobot import EpisodeData, ShardWriter
from rawdream_env.data.parallel import run_pieces
from rawdream_env.errors import DatasetError, SimulatorError
from rawdream_env.files import atomic_write_json
from rawdream_env.piper.relations import OBJECTS, RELATION_NAMES, TASKS, Task, find_task
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.types import ACTION_DIM, Float32Array, UInt8Array

if TYPE_CHECKING:
    from rawdream_env.piper.twin import PiperTwin

FPS = 10.0
PLAY_TASK = "play with the objects on the table"
"""What a play episode, which serves no instruction, is called in the task table."""
MAX_ATTEMPTS = 20
_CONFIG_PATH = "meta/collect.json"
_KINDS = ("play", "expert", "policy")


@dataclass(frozen=True)
class CollectConfig:
    """What to collect, and where."""

    root: str
    """Folder of the data set. A folder of the same configuration is continued."""
    kind: Literal["play", "expert", "policy"] = "play"
    """play: goal-free skills and mistakes. expert: the scripted solution of a task. policy: a policy's rollouts."""
    tasks: tuple[str, ...] = ()
    """Tasks (or placing relations such as on:cup:stove) for expert and policy, in turn; empty: all four."""
    episodes: int = 64
    """Episodes in the finished data set. A larger number later extends it."""
    steps_per_episode: int | None = None
    """Control steps of an episode; default 128 for play, 64 otherwise."""
    layout: Literal["narrow", "wide"] = "narrow"
    """narrow: objects within 3 cm of a task's usual place. wide: the whole workspace."""
    action_noise: float = 0.0
    """Standard deviation of Gaussian noise on the six motion components (1 is full speed)."""
    successes_only: bool = False
    """Draw expert and policy episodes again until the task is done at the end (at most 20 times each)."""
    policy: str = "embedded"
    """For kind policy: the name or folder of a policy."""
    temperature: float = 1.0
    """For kind policy: sampling temperature; 0 is greedy."""
    seed: int = 0
    """Same seed, same episodes."""
    workers: int = 0
    """Worker processes; 0 collects in this process. The result does not depend on it."""
    image_size: int = 64
    """Height and width of the frames in pixels."""
    episodes_per_shard: int = 16
    """Episodes in one file, the unit of work and of loss when a process dies."""
    progress: bool = True
    """Show a progress bar."""

    @property
    def steps(self) -> int:
        """Control steps of an episode, the default filled in."""
        return self.steps_per_episode or (128 if self.kind == "play" else 64)


EpisodeSource = Callable[[int], EpisodeData]
"""Makes the episode of an index; one lives in each process."""
SourceFactory = Callable[[CollectConfig], EpisodeSource]


def numeric_features(config: CollectConfig) -> dict[str, dict[str, Any]]:
    """The numeric columns of a collected data set."""
    axes = ("x", "y", "z", "qw", "qx", "qy", "qz")
    poses = [f"{name}.{axis}" for name in OBJECTS for axis in axes]
    return {
        schema.STATE_KEY: schema.numeric_feature(7, ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]),
        schema.ACTION_KEY: schema.numeric_feature(ACTION_DIM, ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]),
        "privileged.object_poses": schema.numeric_feature(len(poses), poses),
        "privileged.relations": schema.numeric_feature(len(RELATION_NAMES), RELATION_NAMES),
        "privileged.gripper": schema.numeric_feature(1, ["opening"]),
    }


class PiperSource:
    """Makes episodes in a ``PiperTwin``."""

    def __init__(self, config: CollectConfig) -> None:
        from rawdream_env.piper.twin import PiperTwin

        self.config = config
        self.twin: PiperTwin = PiperTwin(image_size=config.image_size)
        self.tasks = selected_tasks(config)
        self.policy: Any = None
        if config.kind == "policy":
            from rawdream_env.policies import load_policy

            self.policy = load_policy(config.policy)

    def __call__(self, index: int) -> EpisodeData:
        """Episode ``index``, whatever was made before it."""
        for attempt in range(MAX_ATTEMPTS):
            seed = mix(self.config.seed, _KINDS.index(self.config.kind), index, attempt)
            episode, success = self._attempt(index, seed)
            if success or not self.config.successes_only or self.config.kind == "play":
                return episode
        raise SimulatorError(
            f"episode {index}: {MAX_ATTEMPTS} attempts at {episode.task!r} failed. "
            "Lower action_noise, or collect with successes_only=False."
        )

    def close(self) -> None:
        """Free the twin's OpenGL context."""
        self.twin.close()

    def _attempt(self, index: int, seed: int) -> tuple[EpisodeData, bool]:
        config, twin = self.config, self.twin
        task = None if config.kind == "play" else self.tasks[index % len(self.tasks)]
        frame = twin.reset(seed, task=None if task is None else task.name, layout=config.layout)
        instruction = PLAY_TASK if task is None else task.instruction
        actor = self._actor(task, instruction, seed)
        frames, states, actions = [frame], [twin.proprio()], []
        truth = [self._privileged()]
        for _ in range(config.steps):
            action = actor(frames[-1])
            actions.append(action)
            seen = twin.step(action)
            assert seen is not None  # it is None only in a twin without a renderer
            frames.append(seen)
            states.append(twin.proprio())
            truth.append(self._privileged())
        privileged = {name: np.stack([row[name] for row in truth]) for name in truth[0]}
        episode = EpisodeData(
            frames=np.stack(frames),
            actions=np.stack(actions).astype(np.float32),
            state=np.stack(states).astype(np.float32),
            task=instruction,
            privileged=privileged,
        )
        return episode, task is None or bool(twin.success(task.name))

    def _privileged(self) -> dict[str, Float32Array]:
        return {
            "object_poses": np.asarray(self.twin.object_poses(), np.float32).ravel(),
            "relations": np.asarray(self.twin.relations(), np.float32).ravel(),
            "gripper": np.array([self.twin.gripper_opening()], np.float32),
        }

    def _actor(self, task: Task | None, instruction: str, seed: int) -> Callable[[UInt8Array], Float32Array]:
        """What chooses the actions: called with the current frame, returns a float32 (7,) in [-1, 1]."""
        from rawdream_env.piper.skills import PlayPolicy, ScriptedExpert

        config = self.config
        rng = np.random.default_rng(mix(seed, 1))
        if task is not None and config.kind == "expert":
            expert = ScriptedExpert(self.twin, task.name, rng, noise=config.action_noise)
            return lambda _: expert.act()
        play = PlayPolicy(self.twin, rng) if config.kind == "play" else None
        chunks = _PolicyChunks(self.policy, instruction, NoiseKey(seed), config.temperature)
        noise = np.random.default_rng(mix(seed, 2))

        def act(frame: UInt8Array) -> Float32Array:
            action = np.array(chunks(frame) if play is None else play.act(), dtype=np.float32)
            if config.action_noise > 0:
                action[:6] += noise.normal(0.0, config.action_noise, 6)
            return np.clip(action, -1.0, 1.0)

        return act


class _PolicyChunks:
    """A policy, one action at a time: looks at the frame at the first step of every chunk."""

    def __init__(self, policy: Any, instruction: str, key: NoiseKey, temperature: float) -> None:
        self.policy, self.instruction, self.key, self.temperature = policy, instruction, key, temperature
        self.queue: list[Float32Array] = []
        self.chunk = 0

    def __call__(self, frame: UInt8Array) -> Float32Array:
        if not self.queue:
            keys = [self.key.at(chunk=self.chunk)]
            out = self.policy.act(frame[None], [self.instruction], temperature=self.temperature, keys=keys)
            self.queue = list(np.asarray(out.actions.detach().cpu(), np.float32)[0])
            self.chunk += 1
        return self.queue.pop(0)


def selected_tasks(config: CollectConfig) -> tuple[Task, ...]:
    """The tasks of a configuration; an unknown name raises ``InvalidOptionError``."""
    return tuple(find_task(name) for name in dict.fromkeys(config.tasks)) or TASKS


def task_table(config: CollectConfig) -> tuple[str, ...]:
    """The data set's task strings, known before the first episode so that shards need no common state."""
    if config.kind == "play":
        return (PLAY_TASK,)
    return tuple(dict.fromkeys(task.instruction for task in selected_tasks(config)))


def collect(config: CollectConfig, *, source: SourceFactory = PiperSource) -> Path:
    """Collect a data set and return its folder.

    ``source`` makes the episodes (a picklable factory, called once in each process); the default is the MuJoCo twin.

    Raises:
        DatasetError: the folder holds episodes of another configuration.
        SimulatorError: a worker process died. Finished shards are kept; the same command continues.
        KeyboardInterrupt: after Ctrl-C, once the finished shards are readable.
    """
    if config.episodes < 1 or config.workers < 0 or config.episodes_per_shard < 1 or config.steps < 1:
        raise DatasetError(
            f"episodes {config.episodes}, steps {config.steps}, episodes_per_shard {config.episodes_per_shard} need to "
            f"be at least 1 and workers {config.workers} at least 0."
        )
    tasks = task_table(config)
    _claim_folder(config)
    writer = _shard_writer(config)
    present = writer.shard_episodes()
    planned = range(-(-config.episodes // config.episodes_per_shard))
    todo = [shard for shard in planned if present.get(shard, 0) < len(_shard_range(config, shard))]
    kept = config.episodes - sum(len(_shard_range(config, shard)) for shard in todo)
    with tqdm(total=config.episodes, initial=kept, desc=config.kind, unit="ep", disable=not config.progress) as bar:
        try:
            job = partial(_ShardJob, config, source)
            for finished in run_pieces(todo, job, workers=config.workers, count=bar.update):
                # Whoever wants to start on the data early can: everything up to the first gap is a complete data set.
                if finished % 32 == 0:
                    writer.finalize(tasks, robot_type="piper")
        except BrokenProcessPool as error:
            raise SimulatorError(
                f"a collection worker died (out of memory?). Finished episodes are kept in {config.root}; run the same "
                "command again to continue, with fewer workers if it happens again."
            ) from error
        finally:
            writer.finalize(tasks, robot_type="piper")
    return Path(config.root)


def _claim_folder(config: CollectConfig) -> None:
    """Refuse to mix configurations in one folder; remember this one."""
    free = ("root", "episodes", "workers", "progress")
    wanted = {name: value for name, value in asdict(config).items() if name not in free}
    tasks = () if config.kind == "play" else selected_tasks(config)
    wanted |= {"steps_per_episode": config.steps, "tasks": [task.name for task in tasks]}
    path = Path(config.root) / _CONFIG_PATH
    if path.exists():
        found = schema.read_json(path)
        for name, value in wanted.items():
            if found.get(name) != value:
                raise DatasetError(
                    f"{config.root} was collected with {name}={found.get(name)!r}, now it is {value!r}. Collect into "
                    "another folder, or repeat the old setting to continue."
                )
    elif (Path(config.root) / schema.INFO_PATH).exists():
        raise DatasetError(f"{config.root} holds a data set that was not collected here. Give another folder.")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, wanted)


def _shard_writer(config: CollectConfig) -> ShardWriter:
    shape = (config.image_size, config.image_size, 3)
    return ShardWriter(config.root, fps=FPS, image_shape=shape, features=numeric_features(config))


def _shard_range(config: CollectConfig, shard: int) -> range:
    first = shard * config.episodes_per_shard
    return range(first, min(first + config.episodes_per_shard, config.episodes))


class _ShardJob:
    """Makes and writes whole shards; one in every process."""

    def __init__(self, config: CollectConfig, source: SourceFactory) -> None:
        self.config = config
        self.make = source(config)

    def __call__(self, piece: int, tick: Callable[[], None], stopped: Callable[[], bool]) -> None:
        """Write shard ``piece``, or nothing at all when stopped half-way."""
        episodes = []
        indices = _shard_range(self.config, piece)
        for index in indices:
            if stopped():
                return
            episodes.append(self.make(index))
            tick()
        first_row = indices[0] * (self.config.steps + 1)
        tasks = task_table(self.config)
        _shard_writer(self.config).write(piece, episodes, first_episode=indices[0], first_row=first_row, tasks=tasks)

    def close(self) -> None:
        """Close the source if it wants to be closed."""
        if hasattr(self.make, "close"):
            self.make.close()
