"""Parsing of the options every environment shares: strings and numbers in, checked values out.

Environment keyword arguments are JSON (so that ``env.spec.to_json()`` works); everything here turns such a plain value
into what the code wants and raises :class:`InvalidOptionError` with the value seen and the values allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError
from rawdream_env.types import Start

SeedLike = int | Sequence[int | None] | None
"""None: go on; an integer s: row i gets s + i; a sequence: one entry per row, None meaning "go on"."""

RESET_OPTIONS = ("reset_mask", "starts", "seed", "judge")


def parse_autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    """An ``AutoresetMode`` from itself or from its name: "NextStep", "SAME_STEP", "disabled", ..."""
    if isinstance(mode, AutoresetMode):
        return mode
    wanted = str(mode).replace("_", "").replace("-", "").lower()
    for candidate in AutoresetMode:
        if candidate.value.lower() == wanted:
            return candidate
    known = ", ".join(repr(candidate.value) for candidate in AutoresetMode)
    raise InvalidOptionError(f"autoreset_mode={mode!r} is not known; choose one of {known}.")


def parse_choice(name: str, value: object, choices: Sequence[str | None]) -> Any:
    """``value`` when it is one of ``choices``."""
    if value in choices:
        return value
    raise InvalidOptionError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def parse_positive_int(name: str, value: object, *, minimum: int = 1) -> int:
    """``value`` as a Python int, at least ``minimum``; bools and fractions are refused."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or int(value) < minimum:
        raise InvalidOptionError(f"{name}={value!r} must be an integer of at least {minimum}.")
    return int(value)


def parse_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """One seed (or None) per row from a :data:`SeedLike`."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, int | np.integer):
        first = parse_positive_int("seed", seed, minimum=0)
        return [first + row for row in range(num_envs)]
    if isinstance(seed, str | bytes | Mapping) or not hasattr(seed, "__len__"):
        raise InvalidOptionError(f"seed={seed!r} must be None, an integer, or a sequence of {num_envs} of them.")
    if len(seed) != num_envs:
        raise InvalidOptionError(f"seed has {len(seed)} entries, but there are {num_envs} environments; give one each.")
    return [None if s is None else parse_positive_int(f"seed[{i}]", s, minimum=0) for i, s in enumerate(seed)]


def parse_reset_mask(mask: Any, num_envs: int) -> NDArray[np.bool_]:
    """A boolean (num_envs,) array with at least one True; None means every row."""
    if mask is None:
        return np.ones(num_envs, dtype=np.bool_)
    try:
        array = np.array(mask.detach().cpu().numpy() if hasattr(mask, "detach") else mask)
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(f"options['reset_mask'] cannot be read as an array: {error}") from error
    if array.dtype != np.bool_ or array.shape != (num_envs,):
        raise InvalidOptionError(
            f"options['reset_mask'] has shape {array.shape} and dtype {array.dtype}; "
            f"it must be a boolean array of shape ({num_envs},)."
        )
    if not array.any():
        raise InvalidOptionError("options['reset_mask'] is False everywhere; name at least one row to reset.")
    return array


def parse_starts_option(starts: Any, num_envs: int) -> list[Start | None]:
    """One :class:`Start` or None (let the environment choose) per row; entries of rows not reset are ignored."""
    if starts is None:
        return [None] * num_envs
    if not isinstance(starts, Sequence) or len(starts) != num_envs:
        size = len(starts) if isinstance(starts, Sequence) else type(starts).__name__
        raise InvalidOptionError(
            f"options['starts'] ({size}) must be a list with {num_envs} entries: a Start or None per row."
        )
    for row, start in enumerate(starts):
        if start is not None and not isinstance(start, Start):
            raise InvalidOptionError(
                f"options['starts'][{row}] is a {type(start).__name__}; a Start or None is needed."
            )
    return list(starts)


def check_reset_options(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """``options`` itself (or an empty mapping) after refusing keys that nobody reads."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise InvalidOptionError(f"options must be a dict or None, not {type(options).__name__}.")
    unknown = [key for key in options if key not in RESET_OPTIONS]
    if unknown:
        raise InvalidOptionError(f"options has unknown keys {unknown}; known: {', '.join(RESET_OPTIONS)}.")
    return options
