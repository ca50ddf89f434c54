"""Episodes of the Piper twin for ``rawdream collect``: play, the scripted expert, or a policy with noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rawdream_env.data import schema
from rawdream_env.data.collect import CollectConfig
from rawdream_env.data.lerobot import EpisodeData
from rawdream_env.errors import SimulatorError
from rawdream_env.piper.relations import OBJECTS, RELATION_NAMES, TASKS, Task, find_task
from rawdream_env.policies import load_policy
from rawdream_env.policies.stepwise import StepwisePolicy
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.types import ACTION_DIM, Float32Array, Policy, UInt8Array

if TYPE_CHECKING:
    from rawdream_env.piper.twin import PiperTwin

FPS = 10.0
PLAY_TASK = "play with the objects on the table"
"""What a play episode, which serves no instruction, is called in the task table."""
MAX_ATTEMPTS = 20
_KINDS = ("play", "expert", "policy")

Actor = Callable[[UInt8Array], Float32Array]
"""Chooses an action, float32 (7,) in [-1, 1], from the current frame."""


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


class PiperSource:
    """Makes episodes in a ``PiperTwin``, which is opened for the first one.

    Raises:
        InvalidOptionError: no such task.
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
        self._policy: Policy | None = None

    def steps(self, index: int) -> int:
        """Control steps of an episode, all equally long."""
        return self.config.steps

    def __call__(self, index: int) -> EpisodeData:
        """Episode ``index``, whatever was made before it.

        Raises:
            SimulatorError: with ``successes_only``, every attempt failed. RendererError: no OpenGL.
        """
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
        if self._twin is not None:
            self._twin.close()
            self._twin = None

    @property
    def twin(self) -> PiperTwin:
        """The simulator of this process."""
        if self._twin is None:
            from rawdream_env.piper.twin import PiperTwin

            self._twin = PiperTwin(image_size=self.config.image_size)
        return self._twin

    @property
    def policy(self) -> Policy:
        """The policy of kind policy."""
        if self._policy is None:
            self._policy = load_policy(self.config.policy, "cpu")
        return self._policy

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

    def _actor(self, task: Task | None, instruction: str, seed: int) -> Actor:
        from rawdream_env.piper.skills import PlayPolicy, ScriptedExpert

        config, rng = self.config, np.random.default_rng(mix(seed, 1))
        if task is not None and config.kind == "expert":
            expert = ScriptedExpert(self.twin, task.name, rng, noise=config.action_noise)
            return lambda _: expert.act()
        if config.kind == "play":
            play = PlayPolicy(self.twin, rng)
            return self._noisy(lambda _: play.act(), seed)
        return self._noisy(StepwisePolicy(self.policy, instruction, NoiseKey(seed), config.temperature), seed)

    def _noisy(self, choose: Actor, seed: int) -> Actor:
        noise, scale = np.random.default_rng(mix(seed, 2)), self.config.action_noise

        def act(frame: UInt8Array) -> Float32Array:
            action = np.array(choose(frame), dtype=np.float32)
            if scale > 0:
                action[:6] += noise.normal(0.0, scale, 6)
            return np.clip(action, -1.0, 1.0)

        return act
