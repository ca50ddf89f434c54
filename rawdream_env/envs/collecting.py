"""What the episode sources of all simulators share: which policy drives an episode, its noise, and repeated attempts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from rawdream_env.data.collect import CollectConfig
from rawdream_env.data.lerobot import EpisodeData
from rawdream_env.errors import SimulatorError
from rawdream_env.policies import load_policy
from rawdream_env.resolve import fingerprint
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.types import Float32Array, Policy, PolicyOutput, SupportsLook

MAX_ATTEMPTS = 20
_KINDS = ("play", "expert", "policy", "random")
Noise = Callable[[Float32Array], Float32Array]


class RolloutSource:
    """Base of the sources of ``rawdream data collect``. A subclass sets ``config`` before it calls ``__init__``, and defines
    ``attempt``, ``close`` and what :class:`EpisodeSource` asks for.

    Raises:
        CheckpointError: no such policy.
    """

    config: CollectConfig
    chunk_len: ClassVar[int] = 8

    def __init__(self) -> None:
        self._policy: Policy | None = None
        # A policy that cannot be loaded is known before a folder is made.
        self.policy_fingerprint = fingerprint(load_policy(self.config.policy)) if self.config.kind == "policy" else ""

    def steps(self, index: int) -> int:
        """Control steps of an episode, all equally long."""
        return self.config.steps

    def __call__(self, index: int) -> EpisodeData:
        """Episode ``index``; it does not depend on earlier ones.

        Raises:
            SimulatorError: with ``successes_only``, every attempt failed. RendererError: no OpenGL.
        """
        for attempt in range(MAX_ATTEMPTS):
            seed = mix(self.config.seed, _KINDS.index(self.config.kind), index, attempt)
            episode, success = self.attempt(index, seed)
            if success or not self.config.successes_only or self.config.kind == "play":
                return episode
        raise SimulatorError(
            f"episode {index}: {MAX_ATTEMPTS} attempts at {episode.task!r} failed. "
            "Lower action_noise, or collect with successes_only=False."
        )

    @abstractmethod
    def attempt(self, index: int, seed: int) -> tuple[EpisodeData, bool]:
        """Episode ``index`` drawn from ``seed``, and whether its task is done."""

    @property
    def temperature(self) -> float:
        """Of the policy's sampling."""
        return self.config.temperature if self.config.kind == "policy" else 1.0

    def driver(self, seed: int) -> Policy:
        """The policy with the noise of one episode."""
        if self._policy is None:
            self._policy = self.make_policy()
        return NoisyPolicy(self._policy, self.noise(seed))

    def make_policy(self) -> Policy:
        """The policy of kinds policy and random."""
        if self.config.kind == "policy":
            return load_policy(self.config.policy)
        from rawdream_env.policies.random import RandomPolicy

        return RandomPolicy(self.chunk_len)

    def noise(self, seed: int) -> Noise:
        """Adds ``action_noise`` to the motion of the next actions (..., 7) of an episode."""
        rng, scale = np.random.default_rng(mix(seed, 2)), self.config.action_noise

        def noisy(actions: Float32Array) -> Float32Array:
            actions = np.array(actions, dtype=np.float32)
            if scale > 0:
                actions[..., :6] += rng.normal(0.0, scale, actions[..., :6].shape)
            return np.clip(actions, -1.0, 1.0)

        return noisy


class NoisyPolicy:
    """A policy whose actions are changed by ``noise``, chunk after chunk of one episode."""

    def __init__(self, policy: Policy, noise: Noise) -> None:
        self.policy, self.noise = policy, noise

    def look(self, env: Any, rows: Sequence[int]) -> None:
        """See :class:`SupportsLook`."""
        if isinstance(self.policy, SupportsLook):
            self.policy.look(env, rows)

    def act(
        self, images: Any, instructions: Sequence[str], *, temperature: float, keys: Sequence[NoiseKey]
    ) -> PolicyOutput:
        """The policy's choice; ``tokens`` and ``logprobs`` are those of the actions without noise."""
        import torch

        output = self.policy.act(images, instructions, temperature=temperature, keys=keys)
        return replace(output, actions=torch.from_numpy(self.noise(output.actions.detach().float().cpu().numpy())))

    def logprobs(self, images: Any, instructions: Sequence[str], tokens: Any, *, temperature: float) -> Any:
        """The policy's."""
        return self.policy.logprobs(images, instructions, tokens, temperature=temperature)
