"""Validation of action chunks before a step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidActionError
from rawdream_env.types import Float32Array

RANGE_TOLERANCE = 1e-3
"""Tolerated excess over [-1, 1] from rounding (bfloat16 policies, denormalization); such values are clipped."""


def check_actions(actions: Any, shape: tuple[int, int, int], rows: NDArray[np.intp]) -> Float32Array:
    """Actions of ``rows`` as a fresh float32 (len(rows), K, A) array in [-1, 1].

    Args:
        actions: array-like or torch tensor of ``shape`` (num_envs, K, A), of any real dtype.
        shape: the expected shape.
        rows: the rows that act; the values of other rows are not checked.

    Raises:
        InvalidActionError: wrong shape or dtype, a value that is not finite, or one outside [-1, 1]; the message names
            the environment, the action in the chunk, the dimension and the value.
    """
    if hasattr(actions, "detach"):  # a torch tensor; numpy has no bfloat16
        actions = actions.detach().to(device="cpu").double().numpy()
    try:
        array = np.asarray(actions)
    except (TypeError, ValueError) as error:
        raise InvalidActionError(f"actions cannot be read as an array of shape {shape}: {error}") from error
    if array.shape != shape:
        hint = " Add the batch dimension, actions[None]." if (1, *array.shape) == shape else ""
        raise InvalidActionError(
            f"actions have shape {array.shape}, expected (num_envs, chunk_len, action_dim) = {shape}.{hint}"
        )
    if array.dtype.kind not in "fiu":
        raise InvalidActionError(f"actions have dtype {array.dtype}; use float32.")
    chosen = array[rows]
    bad = ~(np.abs(chosen) <= 1 + RANGE_TOLERANCE)  # the comparison is False for NaN as well
    if bad.any():
        index, k, dim = (int(i) for i in np.argwhere(bad)[0])
        value = float(chosen[index, k, dim])
        wrong = f"{value:.6g}, outside [-1, 1]" if np.isfinite(value) else f"{value}, not a finite number"
        raise InvalidActionError(
            f"actions[env {int(rows[index])}, action {k}, dimension {dim}] is {wrong} "
            f"({int(bad.sum())} such values in all). Clip or rescale the policy's output."
        )
    clipped: Float32Array = np.clip(chosen, -1.0, 1.0).astype(np.float32, copy=False)
    return clipped
