"""Walking over what environments return: nested dicts, tuples, numpy arrays, torch tensors and plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium.vector.utils import iterate


def to_numpy(tree: Any) -> Any:
    """The same structure with every torch tensor as a numpy array and every array copied."""
    if isinstance(tree, dict):
        return {key: to_numpy(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(to_numpy(value) for value in tree)
    if hasattr(tree, "detach"):
        return np.array(tree.detach().cpu().numpy())
    if isinstance(tree, np.ndarray) and tree.dtype == object:
        copied = np.full(tree.shape, None, dtype=object)
        for index in np.ndindex(tree.shape):
            copied[index] = to_numpy(tree[index])
        return copied
    return tree.copy() if isinstance(tree, np.ndarray) else tree


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where and how two trees differ, bit for bit (NaN equals NaN), or None."""
    place = where or "the value"
    if type(a) is not type(b):
        return f"{place} is a {type(a).__name__} here and a {type(b).__name__} there"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{place} has the keys {sorted(a)} here and {sorted(b)} there"
        return next((d for key in a if (d := difference(a[key], b[key], f"{where}[{key!r}]"))), None)
    if isinstance(a, tuple | list):
        if len(a) != len(b):
            return f"{place} has {len(a)} entries here and {len(b)} there"
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := difference(x, y, f"{where}[{i}]"))), None)
    if isinstance(a, np.ndarray):
        return _array_difference(a, b, where, place)
    same = a == b or (isinstance(a, float | np.floating) and np.isnan(a) and np.isnan(b))
    return None if same else f"{place} is {a!r} here and {b!r} there"


def _array_difference(a: Any, b: Any, where: str, place: str) -> str | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{place} is {a.dtype}{a.shape} here and {b.dtype}{b.shape} there"
    if a.dtype == object:
        return difference(list(a.flat), list(b.flat), where)
    unequal = a != b
    if a.dtype.kind in "fc":
        unequal &= ~(np.isnan(a) & np.isnan(b))
    count = int(np.count_nonzero(unequal))
    if not count:
        return None
    first = tuple(int(i) for i in np.argwhere(unequal)[0]) if a.ndim else ()
    return f"{place} differs in {count} of {a.size} values (first at {first}: {a[first]!r} here, {b[first]!r} there)"


def arrays(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every numeric array or tensor of a tree with its place."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from arrays(value, f"{where}[{key!r}]")
    elif isinstance(tree, tuple | list):
        for index, value in enumerate(tree):
            yield from arrays(value, f"{where}[{index}]")
    elif isinstance(tree, np.ndarray) and tree.dtype == object:
        yield from arrays(list(tree.flat), where)
    elif isinstance(tree, np.ndarray):
        yield where, tree
    elif hasattr(tree, "detach"):
        yield where, tree.detach().cpu().numpy() if str(tree.device) == "cpu" else tree.detach().cpu().numpy().copy()


def observation_rows(space: Any, observations: Any) -> list[Any]:
    """A batched observation as one observation per row (numpy)."""
    return [to_numpy(row) for row in iterate(space, to_numpy(observations))]
