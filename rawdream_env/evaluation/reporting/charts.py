"""Inline SVG for reports: a line chart with intervals. No script, no network; colours come from the page's CSS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Scale = Callable[[float], float]
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Series:
    """One line: ``css`` is its class in the page's style sheet; a point is (value, low, high) or None for a gap."""

    label: str
    css: str
    points: Sequence[Point | None]


def point(estimate: Mapping[str, Any]) -> Point | None:
    """A point of a line from an estimate's JSON form; None where it was not measured."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return None
    return value, value if low is None else low, value if high is None else high


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers covering [low, high], about ``count`` of them."""
    span = max(high - low, 1e-9)
    power = 1e-6
    while power * 10 <= span / count:
        power *= 10
    step = next(power * m for m in (1, 2, 5, 10, 20) if span / (power * m) <= count)
    first = int(low // step)
    ticks = [round(step * (first + i), 9) for i in range(int(span / step) + 3)]
    start = max(i for i, tick in enumerate(ticks) if tick <= low + 1e-9)
    stop = next((i for i, tick in enumerate(ticks) if tick >= high - 1e-9), len(ticks) - 1)
    return ticks[start : stop + 1]


def line_chart(
    title: str,
    unit: str,
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    width: int = 460,
    axis: str = "frames after the start",
) -> str:
    """Chart of ``series`` over the categories ``labels`` (of ``axis``) with interval bars, as an SVG element."""
    height, left, right, top, bottom = 260, 46, 12, 34, 44
    known = [p for s in series for p in s.points if p is not None]
    if not known:
        return f'<p class="muted">{escape(title)}: not measured.</p>'
    ticks = nice_ticks(min(p[1] for p in known), max(p[2] for p in known))
    lo, hi = ticks[0], ticks[-1]

    def x(i: float) -> float:
        return left + (width - left - right) * (i + 0.5) / len(labels)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (hi - value) / max(hi - lo, 1e-9)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{left}" y="16">{escape(title)} <tspan class="unit">{escape(unit)}</tspan></text>',
    ]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for i, label in enumerate(labels):
        parts.append(
            f'<text class="tick" x="{x(i):.1f}" y="{height - bottom + 18}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">'
        f"{escape(axis)}</text>"
    )
    for s, line in enumerate(series):
        parts += _one_line(line, x, y, offset=(s - (len(series) - 1) / 2) * 0.07)
    return "".join([*parts, "</svg>"])


def _one_line(line: Series, x: Scale, y: Scale, offset: float) -> list[str]:
    at = [(x(i + offset), p) for i, p in enumerate(line.points) if p is not None]
    path = " ".join(f"{px:.1f},{y(p[0]):.1f}" for px, p in at)
    parts = [f'<g class="{escape(line.css)}"><title>{escape(line.label)}</title><polyline points="{path}"/>']
    for px, (value, low, high) in at:
        parts.append(f'<line class="bar" x1="{px:.1f}" x2="{px:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>')
        tip = f"{escape(line.label)}: {value:.2f} [{low:.2f}, {high:.2f}]"
        parts.append(f'<circle cx="{px:.1f}" cy="{y(value):.1f}" r="3.5"><title>{tip}</title></circle>')
    return [*parts, "</g>"]
