"""Wrappers that change a space: actions as tokens or as a vector, observations as the image alone.

Each takes a vector environment of this package, or a single one (``gym.make``); for a single environment the result is
Gymnasium's own ``TransformAction`` or ``TransformObservation``.

Shape letters: B envs, K actions in a chunk, A action dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import TransformAction, TransformObservation
from numpy.typing import NDArray

from rawdream_env.errors import InvalidActionError, InvalidOptionError
from rawdream_env.wrappers.base import AnyVectorEnv, ForwardingVectorWrapper, as_numpy


class FlatAction(ForwardingVectorWrapper):
    """The chunk ``Box (K, A)`` as a vector ``Box (K*A,)``, for libraries that take only vectors.

    Args:
        env: a vector environment or a single one, whose actions are a ``Box``.

    Raises:
        InvalidOptionError: other actions. In ``step``, InvalidActionError: actions of another shape.
    """

    def __new__(cls, env: Any) -> Any:
        """Wrap a single environment in Gymnasium's ``TransformAction``."""
        if not isinstance(env, gym.Env):
            return super().__new__(cls)
        box = _box(env.action_space, cls.__name__)
        flat = spaces.Box(box.low.reshape(-1), box.high.reshape(-1), dtype=box.dtype.type)
        return TransformAction(env, lambda action: _reshaped(action, flat.shape, box.shape), flat)

    def __init__(self, env: AnyVectorEnv) -> None:
        super().__init__(env)
        box = _box(env.single_action_space, type(self).__name__)
        self._shape = (self.num_envs, *box.shape)
        self.single_action_space = spaces.Box(box.low.reshape(-1), box.high.reshape(-1), dtype=box.dtype.type)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step with ``actions`` (B, K*A)."""
        return self.env.step(_reshaped(actions, self.action_space.shape, self._shape))


class TokenActions(ForwardingVectorWrapper):
    """The chunk as K*A action tokens, ``MultiDiscrete([256] * K*A)``, decoded as a policy decodes its own.

    Token t of an action dimension is the centre of a bin of [-1, 1]; see ``rawdream_env.policies.action_tokens``. With it a
    library samples what the bundled policy samples (`SB3TokenPolicy`).

    Args:
        env: a vector environment or a single one, whose actions are a ``Box`` from -1 to 1.

    Raises:
        InvalidOptionError: other actions. In ``step``, InvalidActionError: tokens of another shape, not integers or not
            in [0, 256).
    """

    def __new__(cls, env: Any) -> Any:
        """Wrap a single environment in Gymnasium's ``TransformAction``."""
        if not isinstance(env, gym.Env):
            return super().__new__(cls)
        box = _box(env.action_space, cls.__name__)
        tokens = _token_space(box)
        return TransformAction(env, lambda action: _decoded(action, tokens.shape, box.shape), tokens)

    def __init__(self, env: AnyVectorEnv) -> None:
        super().__init__(env)
        box = _box(env.single_action_space, type(self).__name__)
        self._shape = (self.num_envs, *box.shape)
        self.single_action_space = _token_space(box)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step with integer ``actions`` (B, K*A)."""
        return self.env.step(_decoded(actions, self.action_space.shape, self._shape))


class ImageOnly(ForwardingVectorWrapper):
    """The observation's ``"image"`` alone, a ``Box (H, W, 3)``, for libraries that take no ``Dict``.

    Args:
        env: a vector environment or a single one, whose observation is a ``Dict`` with ``"image"``.

    Raises:
        InvalidOptionError: there is no ``"image"``.
    """

    def __new__(cls, env: Any) -> Any:
        """Wrap a single environment in Gymnasium's ``TransformObservation``."""
        if not isinstance(env, gym.Env):
            return super().__new__(cls)
        return TransformObservation(env, lambda observation: observation["image"], _image(env.observation_space))

    def __init__(self, env: AnyVectorEnv) -> None:
        super().__init__(env)
        self.single_observation_space = _image(env.single_observation_space)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; the observation is the images (B, H, W, 3)."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return observations["image"], infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step; ``final_obs`` has images, too."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        if "final_obs" in infos:
            finals = np.empty(self.num_envs, dtype=object)
            for row, final in enumerate(infos["final_obs"]):
                finals[row] = None if final is None else final["image"]
            infos = {**infos, "final_obs": finals}
        return observations["image"], rewards, terminations, truncations, infos


def _box(space: Any, wrapper: str) -> spaces.Box:
    if not isinstance(space, spaces.Box):
        raise InvalidOptionError(f"{wrapper} wraps Box actions, not {type(space).__name__}.")
    return space


def _image(space: Any) -> Any:
    if not isinstance(space, spaces.Dict) or "image" not in space.spaces:
        raise InvalidOptionError(f"ImageOnly needs a Dict observation with 'image', not {space}.")
    return space["image"]


def _token_space(box: spaces.Box) -> spaces.MultiDiscrete:
    from rawdream_env.policies.action_tokens import NUM_TOKENS

    if not (np.all(box.low == -1) and np.all(box.high == 1)):
        raise InvalidOptionError(f"TokenActions needs actions from -1 to 1, not {box}; rescale them first.")
    return spaces.MultiDiscrete([NUM_TOKENS] * math.prod(box.shape))


def _reshaped(actions: Any, shape: Any, wanted: tuple[int, ...]) -> NDArray[Any]:
    """``actions`` of ``shape`` as an array of the shape ``wanted``."""
    array = as_numpy(actions)
    if array.shape != tuple(shape):
        raise InvalidActionError(f"the actions have shape {array.shape}, expected {tuple(shape)}.")
    return array.reshape(wanted)


def _decoded(tokens: Any, shape: Any, wanted: tuple[int, ...]) -> NDArray[np.float32]:
    """Tokens of ``shape`` as actions of the shape ``wanted``."""
    from rawdream_env.policies.action_tokens import NUM_TOKENS, decode

    array = _reshaped(tokens, shape, wanted)
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= NUM_TOKENS:
        raise InvalidActionError(
            f"the action tokens are {array.dtype} from {array.min()} to {array.max()}, expected integers from 0 to "
            f"{NUM_TOKENS - 1}."
        )
    return decode(array)
