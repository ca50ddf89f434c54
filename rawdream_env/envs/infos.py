"""Gymnasium's vector infos: a dict of arrays, each with a ``_key`` mask saying which rows have a value."""

from __future__ import annotations

from collections.abc import Callable
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


def plain(item: Any) -> Any:
    """A fresh array, or a plain Python value."""
    return item.copy() if isinstance(item, np.ndarray) else item.item() if hasattr(item, "item") else item


def row_info(infos: Infos, row: int, convert: Callable[[Any], Any] = plain) -> dict[str, Any]:
    """The infos of one row, each value through ``convert``; keys whose mask is False there are left out."""
    info: dict[str, Any] = {}
    for key, value in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        mask = infos.get("_" + key)
        if mask is not None and not mask[row]:
            continue
        info[key] = row_info(value, row, convert) if isinstance(value, dict) else convert(value[row])
    return info
