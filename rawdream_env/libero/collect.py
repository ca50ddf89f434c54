"""Episodes of a LIBERO suite for ``rawdream data collect``: a scripted expert, a policy or random actions, with noise."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from rawdream_env.config import parse_positive_int
from rawdream_env.data import schema
from rawdream_env.data.collect import CollectConfig
from rawdream_env.data.lerobot import EpisodeData
from rawdream_env.envs.collecting import RolloutSource
from rawdream_env.envs.episodes import EpisodeRequest, run_episodes
from rawdream_env.errors import InvalidOptionError
from rawdream_env.libero.envs import FPS, LiberoSimVectorEnv
from rawdream_env.libero.experts import SCRIPTS, LiberoExpert
from rawdream_env.libero.protocols import Split, find_protocol
from rawdream_env.libero.starts import DEFAULT_PROTOCOL, parse_task, task_list
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import ACTION_DIM, Policy

_STATES: Split = "train"


class LiberoSource(RolloutSource):
    """Generates episodes in a ``LiberoSimVectorEnv`` of one row, which is created for the first one.

    Episodes begin from the initial states for training and are all equally long: they go on after a success, and an episode's
    success flag says whether the goal held after any control step.

    Raises:
        InvalidOptionError: no such task, no expert for it, or kind play. CheckpointError: no such policy.
    """

    fps = FPS
    features: ClassVar[schema.Features] = {
        schema.STATE_KEY: schema.numeric_feature(8, ["x", "y", "z", "rx", "ry", "rz", "left_finger", "right_finger"]),
        schema.ACTION_KEY: schema.numeric_feature(ACTION_DIM, ["dx", "dy", "dz", "drx", "dry", "drz", "gripper"]),
    }

    def __init__(self, config: CollectConfig) -> None:
        if config.kind == "play":
            raise InvalidOptionError("LIBERO has no play: choose kind expert, policy or random.")
        parse_positive_int("image_size", config.image_size)
        self.robot_type = config.robot
        self._protocol = find_protocol(DEFAULT_PROTOCOL, config.robot)
        known = task_list(config.robot)
        named = config.tasks or [name for name, _ in known if config.kind != "expert" or name in SCRIPTS]
        self._task_ids = [task for task in (parse_task(name, known) for name in named) if task is not None]
        self._tasks = known
        names = tuple(known[task][0] for task in self._task_ids)
        if config.kind == "expert" and (not names or set(names) - set(SCRIPTS)):
            raise InvalidOptionError(
                f"the scripted experts solve {', '.join(SCRIPTS)} of libero_goal; asked for {', '.join(names) or config.robot}."
            )
        steps = config.steps_per_episode or self._protocol.horizon
        steps = -(-steps // self.chunk_len) * self.chunk_len
        self.config = replace(config, tasks=names, steps_per_episode=steps)
        self.image_shape = (config.image_size, config.image_size, 3)
        self.instructions = tuple(dict.fromkeys(known[task][1] for task in self._task_ids))
        self._env: LiberoSimVectorEnv | None = None
        super().__init__()

    def attempt(self, index: int, seed: int) -> tuple[EpisodeData, bool]:
        """Episode ``index`` drawn from ``seed``, and whether the goal held after any of its steps."""
        env, task = self.env, self._task_ids[index % len(self._task_ids)]
        start = env.start_at(task, self._protocol.scene(seed, _STATES))
        request = EpisodeRequest(start, seed, NoiseKey(seed))
        (rollout,) = run_episodes(env, [request], self.driver(seed), temperature=self.temperature)
        assert rollout.frames is not None and rollout.proprio is not None
        actions = rollout.actions.reshape(-1, ACTION_DIM)
        success = rollout.success_any
        return EpisodeData(rollout.frames, actions, rollout.proprio, start.instruction, success=success), success

    @property
    def env(self) -> LiberoSimVectorEnv:
        """The simulator of this process."""
        if self._env is None:
            self._env = LiberoSimVectorEnv(
                suite=self.config.robot,
                init_states=_STATES,
                max_episode_steps=self.config.steps // self.chunk_len,
                chunk_len=self.chunk_len,
                image_size=self.config.image_size,
                autoreset_mode="Disabled",
                return_frames=True,
                end_on_success=False,
            )
        return self._env

    def make_policy(self) -> Policy:
        """The policy, or the scripted expert."""
        return LiberoExpert(self.chunk_len) if self.config.kind == "expert" else super().make_policy()

    def close(self) -> None:
        """Free the simulator."""
        if self._env is not None:
            self._env.close()
            self._env = None
