"""The base class of the wrappers: it forwards the calls that Gymnasium's ``VectorWrapper`` does not forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError

AnyVectorEnv = VectorEnv[Any, Any, Any]
W = TypeVar("W")
if TYPE_CHECKING:
    _VectorWrapper = VectorWrapper[Any, Any, Any, Any, Any]
else:  # in gymnasium 1.2, which RLlib pins, the class is not generic
    _VectorWrapper = VectorWrapper


class ForwardingVectorWrapper(_VectorWrapper):
    """A ``VectorWrapper`` that also forwards ``call``, ``get_attr``, ``set_attr`` and ``autoreset_mode``.

    skrl and LeRobot call the first three, TorchRL looks for ``autoreset_mode`` as an attribute; Gymnasium's base class
    has none of them.

    A step or a reset happens wholly or not at all, as in the environments of this package: a wrapper that does more than
    forward one does so inside ``all_or_nothing``. An environment of another package is not undone.

    Raises:
        InvalidOptionError: ``env`` is not a vector environment.
    """

    _CHANGES: ClassVar[tuple[str, ...]] = ()
    """Attributes that a step or a reset changes. ``_save`` keeps shallow copies of them."""

    def __init__(self, env: AnyVectorEnv) -> None:
        if not isinstance(env, VectorEnv):
            kind = "a single environment" if isinstance(env, gym.Env) else f"a {type(env).__name__}"
            raise InvalidOptionError(
                f"{type(self).__name__} wraps vector environments, but this is {kind}. "
                "Create it with gym.make_vec(id, num_envs=1) instead of gym.make(id)."
            )
        super().__init__(env)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """The mode of the wrapped environment, an ``AutoresetMode`` member."""
        return autoreset_mode(self.env)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo the step or reset inside, in every layer below too, when anything is raised there, Ctrl-C included."""
        saved = self._save()
        below = next((layer for layer in chain(self.env) if callable(getattr(layer, "all_or_nothing", None))), None)
        try:
            with nullcontext() if below is None else below.all_or_nothing():
                yield
        except BaseException:
            for name, value in saved.items():
                setattr(self, name, value)
            raise

    def _save(self) -> dict[str, Any]:
        return {name: copy(getattr(self, name)) for name in self._CHANGES}

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method, or read an attribute, of every sub-environment: a tuple of num_envs values."""
        return tuple(_method(self.env, "call")(name, *args, **kwargs))

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """The attribute of every sub-environment: a tuple of num_envs values."""
        return tuple(_method(self.env, "get_attr")(name))

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute on the sub-environments: one value for all or a list of num_envs values."""
        _method(self.env, "set_attr")(name, values)


def _method(env: AnyVectorEnv, name: str) -> Callable[..., Any]:
    method = getattr(env, name, None)
    if method is None:
        raise AttributeError(f"{env} has no method {name!r}.")
    return method  # type: ignore[no-any-return]


def autoreset_mode(env: AnyVectorEnv) -> AutoresetMode:
    """The autoreset mode of ``env`` from its attribute, else its metadata, else Gymnasium's default NEXT_STEP."""
    mode = getattr(env, "autoreset_mode", None) or env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
    return AutoresetMode(mode)


def chain(env: Any) -> Iterator[Any]:
    """``env``, what it wraps, what that wraps, down to the base environment."""
    while True:
        yield env
        inner = getattr(env, "env", None)
        if inner is None or not isinstance(env, VectorWrapper):
            return
        env = inner


def find_wrapper(env: Any, kind: type[W]) -> W | None:
    """The outermost wrapper of type ``kind`` in the chain, or None."""
    return next((layer for layer in chain(env) if isinstance(layer, kind)), None)


def as_numpy(value: Any) -> NDArray[Any]:
    """An array from an array, a list, or a torch tensor on any device (torch is not imported for it)."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    # numpy has no bfloat16
    return np.asarray(value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.numpy())


def episode_infos(infos: dict[str, Any], mode: AutoresetMode) -> dict[str, Any]:
    """Where the infos of episodes that have just ended are: ``final_info`` in SAME_STEP, the infos themselves otherwise."""
    if mode is AutoresetMode.SAME_STEP:
        final: dict[str, Any] = infos.get("final_info", {})
        return final
    return infos


def reset_rows(options: dict[str, Any] | None, num_envs: int) -> NDArray[np.bool_]:
    """The rows a ``reset`` with these options restarts; read it first, Gymnasium's environments pop ``reset_mask``."""
    mask = (options or {}).get("reset_mask")
    return np.ones(num_envs, bool) if mask is None else np.array(as_numpy(mask), dtype=bool)
