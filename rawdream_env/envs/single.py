"""Single environments: a vector environment of one row, seen through ``gymnasium.Env``.

The environment has its own horizon. ``gym.make`` does not pass ``max_episode_steps`` on: it adds a ``TimeLimit``, which would
truncate the episode before it is judged. With ``gym.make``, set the horizon with ``horizon=`` (in chunks).
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from rawdream_env.config import check_reset_options
from rawdream_env.envs.base import ChunkVectorEnv
from rawdream_env.envs.infos import row_info
from rawdream_env.errors import InvalidActionError, InvalidOptionError
from rawdream_env.types import Start


class SingleEnv(gym.Env[dict[str, Any], Any]):
    """One row of a :class:`ChunkVectorEnv`; spaces, rewards and infos are those of a row, infos as plain values.

    ``options`` of ``reset`` may have ``start``: a ``Start`` to begin from. ``vector_env`` is the environment underneath
    (for ``replay``, ``trajectories``, ...).
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, *, horizon: int | None = None, render_mode: str | None = None, **kwargs: Any) -> None:
        """Make the vector environment with ``kwargs``.

        Args:
            horizon: chunks per episode; None: ``max_episode_steps`` of ``kwargs``, or 8.
            render_mode: None or "rgb_array".
            **kwargs: options of the vector environment, except ``num_envs`` and ``autoreset_mode``.

        Raises:
            InvalidOptionError: an option that one environment cannot have, or those of the vector environment.
        """
        for name in ("num_envs", "autoreset_mode"):
            if name in kwargs:
                raise InvalidOptionError(f"{name} is an option of gym.make_vec; a single environment has none.")
        if horizon is not None:
            kwargs["max_episode_steps"] = horizon
        if render_mode not in (None, "rgb_array"):
            raise InvalidOptionError(f"render_mode={render_mode!r} is not known; choose None or 'rgb_array'.")
        self.vector_env = self._make(num_envs=1, autoreset_mode="Disabled", render_mode=render_mode, **kwargs)
        self.render_mode = render_mode
        self.metadata = {**type(self).metadata, "render_fps": self.vector_env.metadata["render_fps"]}
        self.observation_space = self.vector_env.single_observation_space
        self.action_space = self.vector_env.single_action_space

    def _make(self, **kwargs: Any) -> ChunkVectorEnv:
        raise NotImplementedError

    @property
    def task_description(self) -> str:
        """The running episode's instruction."""
        return self.vector_env.task_description[0]

    def start_of(self) -> Start:
        """The running episode's start."""
        return self.vector_env.start_of(0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode; errors as in :meth:`ChunkVectorEnv.reset`."""
        super().reset(seed=seed)
        chosen = dict(options or {})
        if "start" in chosen:
            chosen["starts"] = [chosen.pop("start")]
        observation, infos = self.vector_env.reset(seed=seed, options=dict(check_reset_options(chosen)))
        return {"image": observation["image"][0]}, row_info(infos, 0)

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Carry out one chunk: ``action`` (chunk_len, 7) in [-1, 1]; errors as in :meth:`ChunkVectorEnv.step`."""
        if not hasattr(action, "shape"):
            try:
                action = np.asarray(action)
            except (TypeError, ValueError) as error:
                raise InvalidActionError(f"the action cannot be read as an array: {error}") from error
        if tuple(action.shape) != self.action_space.shape:
            raise InvalidActionError(
                f"the action has shape {tuple(action.shape)}, expected (chunk_len, action_dim) = "
                f"{self.action_space.shape}: one step is a whole chunk."
            )
        observation, rewards, terminations, truncations, infos = self.vector_env.step(action[None])
        image = {"image": observation["image"][0]}
        return image, float(rewards[0]), bool(terminations[0]), bool(truncations[0]), row_info(infos, 0)

    def render(self) -> Any:
        """The last frame, uint8 (H, W, 3); None without ``render_mode``."""
        frames = self.vector_env.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Close; a second time does nothing."""
        self.vector_env.close()


class DreamEnv(SingleEnv):
    """One imagined episode at a time; options of :class:`rawdream_env.envs.dream.DreamVectorEnv`."""

    def _make(self, **kwargs: Any) -> ChunkVectorEnv:
        from rawdream_env.envs.dream import DreamVectorEnv

        return DreamVectorEnv(**kwargs)
