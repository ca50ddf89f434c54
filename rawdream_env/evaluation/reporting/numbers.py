"""Rates and estimates, in their JSON form, as text with n and an interval; rows of text as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def rate_text(rate: Json) -> str:
    """A rate as "54.0 % [47.1, 60.8], n=200"."""
    if rate["value"] is None:
        return f"not measured, n={rate['n']}"
    return f"{100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}], n={rate['n']}"


def percent(rate: Json) -> str:
    """A rate as "54 % (n=200)", where the interval is shown elsewhere."""
    return "not measured" if rate["value"] is None else f"{100 * rate['value']:.0f} % (n={rate['n']})"


def estimate_text(estimate: Json, digits: int = 2) -> str:
    """An estimate as "0.40 [0.15, 0.65], n=50"."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return f"not measured, n={estimate['n']}"
    ends = "no interval" if low is None or high is None else f"{_fixed(low, digits)}, {_fixed(high, digits)}"
    return f"{_fixed(value, digits)} [{ends}], n={estimate['n']}"


def points_text(difference: Json) -> str:
    """A difference of rates as "+3.0 points [-1.2, +7.1], n=200"."""
    value, low, high = difference["value"], difference["low"], difference["high"]
    if value is None:
        return f"not measured, n={difference['n']}"
    ends = "no interval" if low is None or high is None else f"{100 * low:+.1f}, {100 * high:+.1f}"
    return f"{100 * value:+.1f} points [{ends}], n={difference['n']}"


def _fixed(value: float, digits: int) -> str:
    """``value`` with ``digits`` decimals; -0.0 becomes 0.0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"
