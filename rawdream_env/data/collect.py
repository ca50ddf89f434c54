"""Collect episodes in a robot's simulator: task-agnostic play, scripted demonstrations, or a policy with noise.

The world model learns from play (paper section 4: about four hours of grasping, placing, pushing and tumbling that
serve no task); demonstrations warm the policy up; noisy policy rollouts are the paper's co-training and in-domain
variants. The robot brings the episodes (``Robot.episode_source``); sharding and resuming are in ``recording``.

>>> collect(CollectConfig(out="runs/play", kind="play", episodes=1600, workers=2))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from rawdream_env.data.lerobot import EpisodeData
from rawdream_env.data.recording import EpisodeSource, claim_folder, record
from rawdream_env.errors import DatasetError, SimulatorError
from rawdream_env.robots import DEFAULT_ROBOT, find_robot

CONFIG_PATH = "meta/collect.json"


@dataclass(frozen=True)
class CollectConfig:
    """What to collect, and where."""

    out: str
    """Folder of the data set. A folder of the same configuration is resumed."""
    robot: str = DEFAULT_ROBOT
    """The robot whose simulator is used."""
    kind: Literal["play", "expert", "policy"] = "play"
    """play: goal-free skills and mistakes. expert: the scripted solution of a task. policy: a policy's rollouts."""
    tasks: tuple[str, ...] = ()
    """Tasks (or goals, where the robot knows some) for expert and policy, in turn; empty: all tasks."""
    episodes: int = 64
    """Episodes in the finished data set. A larger number later extends it."""
    steps_per_episode: int | None = None
    """Control steps of an episode; default 128 for play, 64 otherwise."""
    layout: Literal["narrow", "wide"] = "narrow"
    """narrow: objects within 3 cm of a task's usual place. wide: the whole workspace."""
    action_noise: float = 0.0
    """Standard deviation of Gaussian noise on the motion components (1 is full speed)."""
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


class CollectSource(EpisodeSource, Protocol):
    """What ``Robot.episode_source`` makes of a configuration."""

    @property
    def config(self) -> CollectConfig:
        """The configuration with its defaults filled in, which the data set keeps."""
        ...

    def attempt(self, index: int, seed: int) -> tuple[EpisodeData, bool]:
        """Episode ``index`` as ``seed`` draws it, and whether its task is done at the end (for ``judge evaluate``)."""
        ...


def collect(config: CollectConfig, *, source: Callable[[CollectConfig], CollectSource] | None = None) -> Path:
    """Collect a data set and return its folder.

    ``source`` makes the episodes; by default that of the robot.

    Raises:
        DatasetError: the folder holds episodes of another configuration.
        InvalidOptionError: no such robot or task, or the robot has no episode source.
        SimulatorError: a worker process died. Finished shards are kept; rerun the same command to resume.
        KeyboardInterrupt: after Ctrl-C, once the finished shards are readable.
    """
    if config.episodes < 1 or config.workers < 0 or config.episodes_per_shard < 1 or config.steps < 1:
        raise DatasetError(
            f"episodes {config.episodes}, steps {config.steps}, episodes_per_shard {config.episodes_per_shard} need to "
            f"be at least 1 and workers {config.workers} at least 0."
        )
    make = source or find_robot(config.robot).load("episode_source")
    episodes: CollectSource = make(config)
    free = ("out", "episodes", "workers", "progress")
    settings = {name: value for name, value in asdict(episodes.config).items() if name not in free}
    if config.robot == DEFAULT_ROBOT:
        del settings["robot"]  # as in the folders of versions that knew no other
    claim_folder(config.out, CONFIG_PATH, settings | {"tasks": list(episodes.config.tasks)}, "collected")
    return record(
        episodes,
        config.out,
        episodes=config.episodes,
        episodes_per_shard=config.episodes_per_shard,
        workers=config.workers,
        desc=config.kind,
        progress=config.progress,
        worker_died=lambda text: SimulatorError(f"a collection {text}"),
    )
