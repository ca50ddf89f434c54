"""Inline SVG for reports: a line chart with intervals. No script, no network; colours come from the page's CSS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rawdream_env.evaluation.reporting.html import render

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
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Chart of ``series`` over the categories ``labels`` (of ``axis``) with interval bars, as an SVG element.

    ``mark``: a vertical line with its label, at a position counted in categories (0.5: between the first two).
    """
    height, left, top, right, bottom = 260, 46, 34, width - 12, 216
    known = [p for s in series for p in s.points if p is not None]
    if not known:
        return Markup('<p class="muted">{}: not measured.</p>').format(title)
    ticks = nice_ticks(min(p[1] for p in known), max(p[2] for p in known))
    lo, hi = ticks[0], ticks[-1]

    def x(i: float) -> float:
        return round(left + (right - left) * (i + 0.5) / len(labels), 1)

    def y(value: float) -> float:
        return round(top + (bottom - top) * (hi - value) / max(hi - lo, 1e-9), 1)

    lines = []
    for s, line in enumerate(series):
        offset = (s - (len(series) - 1) / 2) * 0.07  # bars of one category are side by side
        points = [
            (x(i + offset), y(p[0]), y(p[1]), y(p[2]), f"{line.label}: {p[0]:.2f} [{p[1]:.2f}, {p[2]:.2f}]")
            for i, p in enumerate(line.points)
            if p is not None
        ]
        path = " ".join(f"{point[0]},{point[1]}" for point in points)
        lines.append({"css": line.css, "label": line.label, "path": path, "points": points})
    marked = None
    if mark is not None:
        side = 1 if mark[0] < len(labels) / 2 else -1  # the label goes to the side with more room
        marked = {"x": x(mark[0]), "label": mark[1], "side": side}
    frame = {"width": width, "height": height, "left": left, "top": top, "right": right, "bottom": bottom}
    return Markup(
        render(
            "chart.svg",
            title=title,
            unit=unit,
            axis=axis,
            ticks=[(tick, y(tick)) for tick in ticks],
            labels=[(label, x(i)) for i, label in enumerate(labels)],
            lines=lines,
            mark=marked,
            **frame,
        )
    )
