"""The instruction as part of the observation."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from rawdream_env import text
from rawdream_env.errors import InvalidOptionError
from rawdream_env.wrappers.base import AnyVectorEnv, ForwardingVectorWrapper

MAX_LENGTH = 200
"""Longest instruction in characters, the limit for every instruction of this package."""

# ASCII, then the accented letters of European languages.
CHARSET = string.ascii_letters + string.digits + string.punctuation + " " + "".join(map(chr, range(0xC0, 0x250)))


class InstructionObservation(ForwardingVectorWrapper):
    """Adds ``"instruction"`` to the ``Dict`` observation, as text or as the bundled policy's word ids.

    *Text* (default), a `gymnasium.spaces.Text`: for your own loops and trainers that pass whole observations to a
    vision-language-action policy. Batched, it is a tuple of num_envs strings, as Gymnasium batches ``Text``.
    stable-baselines3, skrl and TorchRL do **not** take text observations.

    *Words* (``words=True``), ``Box(0, 1023, (16,), int64)``: the row of ``rawdream_env.text.tokenize``, which the bundled
    policy reads. Any library passes it on.

    With SAME_STEP autoreset the entries of ``final_obs`` get the instruction of the episode that ended.

    Args:
        env: a vector environment whose observation space is a ``Dict`` and whose infos carry ``instruction``.
        charset: the characters an instruction may have. Sampling the space draws from it.
        max_length: longest instruction in characters.
        words: word ids instead of text.

    Raises:
        InvalidOptionError: the observation space is no ``Dict`` or already has an ``instruction``; an instruction has a
            character outside ``charset``, or is too long or empty.
    """

    _CHANGES = ("_current",)

    def __init__(
        self, env: AnyVectorEnv, charset: str = CHARSET, max_length: int = MAX_LENGTH, *, words: bool = False
    ) -> None:
        super().__init__(env)
        single = env.single_observation_space
        if not isinstance(single, spaces.Dict):
            raise InvalidOptionError(
                f"InstructionObservation needs a Dict observation space to add to, not {type(single).__name__}."
            )
        if "instruction" in single.spaces:
            raise InvalidOptionError("The observation already has an 'instruction'; use the wrapper once.")
        self._text = spaces.Text(max_length, charset=charset)
        self.words = words
        space = spaces.Box(0, text.VOCAB_SIZE - 1, text.tokenize("").shape, np.int64) if words else self._text
        self.single_observation_space = spaces.Dict({**single.spaces, "instruction": space})
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self._current: list[str] = [""] * self.num_envs

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reset; the observation has each row's new instruction."""
        with self.all_or_nothing():
            observations, infos = self.env.reset(seed=seed, options=options)
            return self._with_text(observations, infos), infos

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Step; the observation has each row's instruction, ``final_obs`` the one of the episode that ended."""
        before = tuple(self._current)
        with self.all_or_nothing():
            observations, rewards, terminations, truncations, infos = self.env.step(actions)
            observations = self._with_text(observations, infos)
        if "final_obs" in infos:
            finals = np.empty(self.num_envs, dtype=object)
            for row, final in enumerate(infos["final_obs"]):
                finals[row] = None if final is None else {**final, "instruction": self._row(before[row])}
            infos = {**infos, "final_obs": finals}
        return observations, rewards, terminations, truncations, infos

    def _with_text(self, observations: dict[str, Any], infos: dict[str, Any]) -> dict[str, Any]:
        mask = infos.get("_instruction", np.zeros(self.num_envs, bool))
        for row in np.flatnonzero(mask):
            self._current[row] = self._checked(str(infos["instruction"][row]))
        rows = tuple(self._row(instruction) for instruction in self._current)
        return {**observations, "instruction": np.stack(rows) if self.words else rows}

    def _row(self, instruction: str) -> Any:
        return text.tokenize(instruction) if self.words else instruction

    def _checked(self, instruction: str) -> str:
        if self._text.contains(instruction):
            return instruction
        unknown = sorted(set(instruction) - self._text.character_set)
        reason = f"has {len(instruction)} characters"
        if unknown:
            reason = f"has characters outside the charset: {''.join(unknown)!r}"
        raise InvalidOptionError(
            f"The instruction {instruction!r} {reason} (allowed: 1 to {self._text.max_length} characters of the charset). "
            "Pass charset= or max_length= to InstructionObservation."
        )
