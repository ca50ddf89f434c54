"""Validation of the options that all environments share.

Environment keyword arguments are JSON (so that ``env.spec.to_json()`` works); the functions here convert and check such
plain values and raise :class:`InvalidOptionError` with the given value and the allowed ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError
from rawdream_env.types import Start

DTYPES = ("float32", "bfloat16", "float16")

SeedLike = int | Sequence[int | None] | None
"""None: continue; an integer s: row i gets s + i; a sequence: one entry per row, None meaning "continue"."""

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


def parse_device(device: Any) -> str:
    """The name of a torch device that this machine has: "cpu", "cuda", "cuda:1", "mps"."""
    name = str(device)
    if name == "cpu":
        return name
    import torch

    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise InvalidOptionError(f"device={name!r} is not known; choose 'cpu', 'cuda' or 'cuda:N'.") from None
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InvalidOptionError(
                f"device={name!r} needs a GPU and a CUDA build of torch, and this machine has none; use 'cpu'."
            )
        if (wanted.index or 0) >= count:
            raise InvalidOptionError(f"device={name!r} does not exist: there are {count} GPUs, counted from 0.")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise InvalidOptionError(f"device={name!r} needs an Apple GPU, and this machine has none; use 'cpu'.")
    return name


def parse_dtype(dtype: Any) -> str | None:
    """The name of a precision, also from a ``torch.dtype``; None: the precision of the checkpoint."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    return name if name is None else str(parse_choice("dtype", name, DTYPES))


def parse_workers(workers: Any) -> int:
    """A number of worker processes: 0 is none besides this one, -1 one for each usable core."""
    count = parse_positive_int("workers", workers, minimum=-1)
    if count >= 0:
        return count
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """One seed (or None) per row from a :data:`SeedLike`."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, int | np.integer):
        first = parse_positive_int("seed", seed, minimum=0)
        return [first + row for row in range(num_envs)]
    unsized = not hasattr(seed, "__len__") or getattr(seed, "shape", None) == ()  # an array or tensor of no dimension
    if unsized or isinstance(seed, str | bytes | Mapping):
        raise InvalidOptionError(f"seed={seed!r} must be None, an integer, or a sequence of {num_envs} of them.")
    if len(seed) != num_envs:
        raise InvalidOptionError(
            f"seed has {len(seed)} entries, but there are {num_envs} environments; pass one per environment."
        )
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
        raise InvalidOptionError("options['reset_mask'] is False for every row; set at least one to True.")
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
                f"options['starts'][{row}] has type {type(start).__name__}, expected a Start or None."
            )
    return list(starts)


def check_reset_options(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """``options`` itself (or an empty mapping) ; unknown keys are refused."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise InvalidOptionError(f"options must be a dict or None, not {type(options).__name__}.")
    unknown = [key for key in options if key not in RESET_OPTIONS]
    if unknown:
        raise InvalidOptionError(f"options has unknown keys {unknown}; known: {', '.join(RESET_OPTIONS)}.")
    return options
