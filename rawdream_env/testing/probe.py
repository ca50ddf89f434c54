"""Running the environment under test: scripted actions, recorded rollouts, failures with advice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array

from rawdream_env.envs.infos import row_info
from rawdream_env.testing.trees import observation_rows, to_numpy

MakeEnv = Callable[..., VectorEnv[Any, Any, Any]]


class FailedCheckError(AssertionError):
    """A check failed: what was seen, and what to do about it."""

    def __init__(self, message: str, advice: str) -> None:
        """Keep both parts."""
        super().__init__(message)
        self.message = message
        self.advice = advice


class SkippedCheckError(Exception):
    """A check does not apply here, and why."""


@dataclass(frozen=True)
class Call:
    """One call of ``reset`` or ``step``: ``raw`` as returned, the rest copied; a reset has no rewards or flags."""

    name: str
    raw: tuple[Any, ...]
    observations: list[Any]
    rewards: Any
    terminations: Any
    truncations: Any
    infos: dict[str, Any]

    @property
    def done(self) -> Any:
        """Boolean (num_envs,): episodes that ended with this call."""
        if self.terminations is None:
            return np.zeros(len(self.observations), dtype=np.bool_)
        return np.logical_or(self.terminations, self.truncations)

    def row(self, row: int) -> dict[str, Any]:
        """The results of this call for one row."""
        flags = (
            {}
            if self.rewards is None
            else {"reward": self.rewards[row], "terminated": self.terminations[row], "truncated": self.truncations[row]}
        )
        return {"observation": self.observations[row], **flags, "info": row_info(self.infos, row, to_numpy)}


@dataclass
class ActionScript:
    """Action t of row i, independent of the batch size."""

    space: Any
    seed: int
    _rows: dict[int, tuple[Any, list[Any]]] = field(default_factory=dict)

    def row(self, row: int, step: int) -> Any:
        """The single action of ``row`` at ``step``."""
        if row not in self._rows:
            space = copy.deepcopy(self.space)
            space.seed(self.seed * 100_003 + row)
            self._rows[row] = (space, [])
        space, drawn = self._rows[row]
        while len(drawn) <= step:
            drawn.append(space.sample())
        return drawn[step]

    def batch(self, rows: Sequence[int], step: int) -> Any:
        """A fresh batch in which position j acts as row ``rows[j]`` of the script does."""
        return stack_actions(self.space, [self.row(row, step) for row in rows])


def stack_actions(space: Any, actions: Sequence[Any]) -> Any:
    """Single actions as one batch that shares no memory with them."""
    out: Any = create_empty_array(space, n=len(actions), fn=np.zeros)
    return copy.deepcopy(concatenate(space, actions, out))


@dataclass
class Probe:
    """The input of every check: how to create the environment and how long to run it."""

    make: MakeEnv
    mode: str | None
    num_envs: int
    sizes: tuple[int, ...]
    chunks: int
    seed: int
    strict: bool

    @contextmanager
    def env(self, num_envs: int | None = None) -> Iterator[VectorEnv[Any, Any, Any]]:
        """A fresh environment, closed afterwards."""
        kwargs: dict[str, Any] = {} if self.mode is None else {"autoreset_mode": self.mode}
        env = self.make(num_envs=self.num_envs if num_envs is None else num_envs, **kwargs)
        try:
            yield env
        finally:
            env.close()

    def script(self, env: VectorEnv[Any, Any, Any], salt: int = 0) -> ActionScript:
        """Scripted actions; another ``salt``, other actions."""
        return ActionScript(env.single_action_space, self.seed + 7919 * salt)

    def rollout(
        self,
        env: VectorEnv[Any, Any, Any],
        *,
        seed: Any = None,
        rows: Sequence[int] | None = None,
        steps: int | None = None,
        script: ActionScript | None = None,
        each: Callable[[Call], None] | None = None,
    ) -> list[Call]:
        """Reset and step; with autoreset disabled, reset rows as they end. ``each`` is called after every call."""
        acting = script or self.script(env)
        order = list(range(env.num_envs)) if rows is None else list(rows)
        calls = [reset(env, seed=self.seed if seed is None else seed)]
        if each:
            each(calls[-1])
        for t in range(self.chunks if steps is None else steps):
            calls.append(step(env, acting.batch(order, t)))
            if each:
                each(calls[-1])
            done = calls[-1].done
            if mode_of(env) == AutoresetMode.DISABLED and done.any():
                calls.append(reset(env, options={"reset_mask": done.copy()}))
                if each:
                    each(calls[-1])
        return calls


def mode_of(env: VectorEnv[Any, Any, Any]) -> AutoresetMode | None:
    """The declared autoreset mode, None when there is none."""
    mode = env.metadata.get("autoreset_mode")
    return mode if isinstance(mode, AutoresetMode) else None


def reset(env: VectorEnv[Any, Any, Any], **kwargs: Any) -> Call:
    """Call ``reset`` and record it."""
    raw = env.reset(**kwargs)
    if not isinstance(raw, tuple) or len(raw) != 2:
        raise FailedCheckError(f"reset() returned {describe(raw)}.", "Return (observations, infos).")
    rows = observation_rows(env.observation_space, raw[0])
    return Call("reset()", raw, rows, None, None, None, to_numpy(raw[1]))


def step(env: VectorEnv[Any, Any, Any], actions: Any) -> Call:
    """Call ``step`` and record it."""
    raw = env.step(actions)
    if not isinstance(raw, tuple) or len(raw) != 5:
        raise FailedCheckError(
            f"step() returned {describe(raw)}.", "Return (observations, rewards, terminations, truncations, infos)."
        )
    rows = observation_rows(env.observation_space, raw[0])
    rewards, terminations, truncations, infos = (to_numpy(part) for part in raw[1:])
    return Call("step()", raw, rows, rewards, terminations, truncations, infos)


def describe(value: Any) -> str:
    """A few words about an unexpected value."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (
        f" of {getattr(value, 'dtype', '?')}{tuple(shape)}" if shape is not None else ""
    )
