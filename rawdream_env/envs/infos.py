"""Gymnasium's vector infos: a dict of arrays, each with a ``_key`` mask saying which rows have a value."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Infos = dict[str, Any]


def put(infos: Infos, num_envs: int, key: str, rows: NDArray[np.intp], values: ArrayLike) -> None:
    """Write ``values`` (len(rows), ...) of ``key`` into ``infos`` for ``rows``, creating array and mask as needed."""
    array = np.asarray(values)
    if key not in infos:
        filler: Any = None if array.dtype == object else 0
        infos[key] = np.full((num_envs, *array.shape[1:]), filler, dtype=array.dtype)
        infos["_" + key] = np.zeros(num_envs, dtype=np.bool_)
    infos[key][rows] = array
    infos["_" + key][rows] = True


def put_nested(infos: Infos, num_envs: int, key: str, rows: NDArray[np.intp], values: Infos) -> None:
    """Write a dict of infos (itself arrays with masks) under ``key``, marked for ``rows``."""
    mask = np.zeros(num_envs, dtype=np.bool_)
    mask[rows] = True
    infos[key] = values
    infos["_" + key] = mask


def objects(values: list[Any]) -> NDArray[np.object_]:
    """A one-dimensional object array, whatever the values are."""
    array = np.full(len(values), None, dtype=object)
    for index, value in enumerate(values):
        array[index] = value
    return array


def row_info(infos: Infos, row: int) -> dict[str, Any]:
    """The infos of one row as plain Python values and fresh arrays: what a single environment returns."""
    info: dict[str, Any] = {}
    for key, value in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        mask = infos.get("_" + key)
        if mask is not None and not mask[row]:
            continue
        if isinstance(value, dict):
            info[key] = row_info(value, row)
        else:
            item = value[row]
            info[key] = item.copy() if isinstance(item, np.ndarray) else item.item() if hasattr(item, "item") else item
    return info
