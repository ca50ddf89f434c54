"""Collect episodes in a robot's simulator: task-agnostic play, scripted demonstrations, or a policy with noise.

The world model is trained on play (paper section 4: about four hours of grasping, placing, pushing and tumbling without a
task), the policy is initialized with demonstrations, and rollouts of a noisy policy are the paper's co-training and
in-domain variants. The robot provides the episodes (``Robot.episode_source``); sharding and resuming are in ``recording``.

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
    """What to collect, and into which folder."""

    out: str
    """Folder of the data set. Rerun the same command to resume."""
    robot: str = DEFAULT_ROBOT
    """The robot whose simulator is used."""
    kind: Literal["play", "expert", "policy", "random"] = "play"
    """play: goal-free skills and mistakes. expert: the scripted solution of a task. policy: a policy's rollouts. random:
    actions drawn uniformly. LIBERO has no play, and experts for three tasks of libero_goal."""
    tasks: tuple[str, ...] = ()
    """Tasks (or goals, if the robot has some) for expert and policy, in turn; empty: all tasks."""
    episodes: int = 64
    """Episodes in the finished data set. Rerun with a larger number to extend it."""
    steps_per_episode: int | None = None
    """Control steps per episode; default 128 for play, 64 otherwise, on LIBERO the protocol's horizon in whole chunks."""
    layout: Literal["narrow", "wide"] = "narrow"
    """narrow: objects within 3 cm of their usual place in a task. wide: the whole workspace. Without effect on LIBERO."""
    action_noise: float = 0.0
    """Standard deviation of Gaussian noise on the motion components (1 is full speed)."""
    successes_only: bool = False
    """Redraw episodes until the task is solved at the end, on LIBERO at any step (at most 20 times each). Not play."""
    policy: str = "embedded"
    """For kind policy: the name or folder of a policy."""
    temperature: float = 1.0
    """For kind policy: sampling temperature; 0 is greedy."""
    seed: int = 0
    """The same seed gives the same episodes."""
    workers: int = 0
    """Worker processes; 0 collects in this process. The result does not depend on their number."""
    image_size: int = 64
    """Height and width of the frames in pixels."""
    episodes_per_shard: int = 16
    """Episodes per file. If the process dies, at most one unfinished file per worker is lost."""
    progress: bool = True
    """Show a progress bar."""

    @property
    def steps(self) -> int:
        """Control steps of an episode, the default filled in."""
        return self.steps_per_episode or (128 if self.kind == "play" else 64)


class CollectSource(EpisodeSource, Protocol):
    """What ``Robot.episode_source`` creates from a configuration.

    A source with a policy has ``policy_fingerprint`` (``resolve.fingerprint``), stored as well: weights change behind a name.
    """

    @property
    def config(self) -> CollectConfig:
        """The configuration with its defaults filled in; it is stored in the data set."""
        ...

    def attempt(self, index: int, seed: int) -> tuple[EpisodeData, bool]:
        """Episode ``index`` drawn with ``seed``, and whether its task is solved (for ``judge evaluate``)."""
        ...


def collect(config: CollectConfig, *, source: Callable[[CollectConfig], CollectSource] | None = None) -> Path:
    """Collect a data set and return its folder.

    ``source`` creates the source of the episodes; by default that of the robot.

    Raises:
        DatasetError: the folder holds episodes of another configuration or of another policy of that name.
        InvalidOptionError: there is no such robot or task, or the robot has no episode source.
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
        del settings["robot"]  # folders of earlier versions, with one robot, lack it
    settings["tasks"] = list(episodes.config.tasks)
    if found := getattr(episodes, "policy_fingerprint", ""):
        settings["policy_fingerprint"] = found
    claim_folder(config.out, CONFIG_PATH, settings, "collected", added=("policy_fingerprint",))
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
