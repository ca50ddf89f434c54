"""A world model's fidelity as a text table and as a self-contained HTML page, from the content of ``fidelity.json``."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from rawdream_env.evaluation.reporting import html
from rawdream_env.evaluation.reporting.charts import Series, line_chart, point
from rawdream_env.evaluation.reporting.numbers import Json, estimate_text

_Line = tuple[str, str, list[Json]]
"""A source's name, its CSS class, and an estimate per column."""

TITLE = "World model evaluation"

METRICS = (
    ("psnr", "PSNR, whole image", "dB, higher is better", 1),
    ("psnr_moving", "PSNR, moving region", "dB, higher is better", 1),
    ("ssim", "SSIM, whole image", "higher is better", 3),
    ("ssim_moving", "SSIM, moving region", "higher is better", 3),
    ("lpips", "LPIPS, whole image", "lower is better", 3),
    ("lpips_moving", "LPIPS, moving region", "lower is better", 3),
    ("fvd", "FVD, 16-frame clips", "lower is better", 1),
)
"""Key, title, unit and digits."""
_SOURCES = (
    ("dream", "dream", "s-dream"),
    ("copy_first", "copy of the first frame", "s-first"),
    ("copy_last", "copy of the last true frame", "s-last"),
)
_GHOSTS = (
    ("dream", "dream", "s-dream"),
    ("alike", "dream, alike the start", "s-alike"),
    ("reappeared", "dream, gone and back", "s-last"),
    ("copy_first", "copy of the first frame", "s-first"),
    ("truth", "truth", "s-truth"),
)
_NOTHING = {"value": None, "low": None, "high": None, "n": 0}


def _columns(report: Json) -> list[tuple[str, Json]]:
    """Horizon buckets and all frames: (label, row)."""
    rows = [(f"{row['frames'][0]}-{row['frames'][1]}", row) for row in report["horizon"]]
    return [*rows, ("all", report["overall"])]


def _lines(metric: str, columns: Sequence[tuple[str, Json]]) -> list[_Line]:
    """The lines of one metric; "not measured" where the report has no value."""
    return [(name, css, [row[key].get(metric, _NOTHING) for _, row in columns]) for key, name, css in _SOURCES]


def _ghost_lines(columns: Sequence[tuple[str, Json]]) -> list[_Line]:
    return [(name, css, [row["ghosting"][key] for _, row in columns]) for key, name, css in _GHOSTS]


def _measured(lines: Sequence[_Line]) -> bool:
    return any(e["value"] is not None for _, _, estimates in lines for e in estimates)


def _short(estimate: Json, digits: int, scale: float = 1.0) -> str:
    """An estimate as "31.9 [30.1, 33.5]"; n is in the head of the table."""
    if estimate["value"] is None:
        return "not measured"
    value, low, high = (None if estimate[k] is None else scale * estimate[k] for k in ("value", "low", "high"))
    ends = "no interval" if low is None or high is None else f"{low:.{digits}f}, {high:.{digits}f}"
    return f"{value:.{digits}f} [{ends}]"


def text_table(report: Json) -> str:
    """The printed table: metrics and sources down, horizon across, 95 % intervals in brackets, notes below."""
    columns = _columns(report)
    counts = [row["dream"]["psnr"]["n"] for _, row in columns]
    grid = [["frames after the start", *(f"{label} (n={n})" for (label, _), n in zip(columns, counts, strict=True))]]

    def add(title: str, lines: Sequence[_Line], digits: int, scale: float = 1.0) -> None:
        grid.append([title, *[""] * len(columns)])
        for name, _, estimates in lines:
            shown = [_short(e, digits, scale) for e in estimates]
            few = [e["value"] is not None and e["n"] != n for e, n in zip(estimates, counts, strict=True)]
            shown = [f"{s} n={e['n']}" if f else s for s, e, f in zip(shown, estimates, few, strict=True)]
            grid.append([f"  {name}", *shown])

    for key, title, unit, digits in METRICS:
        if _measured(_lines(key, columns)):
            add(f"{title} ({unit})", _lines(key, columns), digits)
        else:
            grid.append([title, "not measured", *[""] * (len(columns) - 1)])
    add("Ghosts, % of vacated pixels (lower is better)", _ghost_lines(columns), 1, 100.0)
    widths = [max(len(row[i]) for row in grid if i == 0 or row[i]) for i in range(len(grid[0]))]
    widths[0] = max(len(f"  {name}") for _, name, _ in (*_SOURCES, *_GHOSTS))
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in grid]
    return "\n".join([*lines, "", *_sensitivity_text(report), *report["notes"]])


def _sensitivity_text(report: Json) -> list[str]:
    s = report["action_sensitivity"]
    if s is None:
        return []
    lines = []
    for key, name in (("swapped", "another episode's actions"), ("zeroed", "no motion")):
        ratio = s[key]["ratio"]
        noise = "fresh noise changes nothing" if ratio is None else f"relative to fresh noise {estimate_text(ratio)}"
        change = estimate_text(s[key]["interval"])
        lines.append(f"With {name} the frames change by {change} (levels of 255); {noise}.")
    return lines


def render(report: Json, film: bytes | None) -> str:
    """The page as one string; ``film`` is the grid as MP4, or None."""
    columns = _columns(report)
    buckets = columns[:-1]
    labels = [label for label, _ in buckets]

    def chart(title: str, unit: str, lines: Sequence[_Line]) -> Markup:
        return line_chart(title, unit, labels, [Series(name, css, [point(e) for e in es]) for name, css, es in lines])

    numbers = [(title, _numbers(_lines(key, columns), digits)) for key, title, _, digits in METRICS]
    numbers.append(("Ghosts, % of vacated pixels", _numbers(_ghost_lines(columns), 1, 100.0)))
    return html.page(
        "world_model.html",
        TITLE,
        report,
        report["config"],
        cards=_cards(report),
        film=None if film is None else html.base64_text(film),
        source_lines=[line[1:] for line in _SOURCES],
        ghost_lines=[line[1:] for line in _GHOSTS],
        charts=[chart(title, unit, _lines(key, buckets)) for key, title, unit, _ in METRICS],
        ghosts=chart("Ghosts", "share of vacated pixels", _ghost_lines(buckets)),
        sensitivity=_sensitivity_text(report),
        columns=[label for label, _ in columns],
        numbers=numbers,
        pixels=[row["ghosting"]["pixels"] for _, row in columns],
    )


def _cards(report: Json) -> list[tuple[str, str, str, str]]:
    """Key numbers: title, value, interval, note."""
    overall, s = report["overall"], report["action_sensitivity"]
    cards = []

    def card(title: str, estimate: Json, scale: float, unit: str, note: str) -> None:
        value = estimate["value"]
        big = "not measured" if value is None else f"{scale * value:.1f}{unit}"
        cards.append((title, big, f"{_short(estimate, 1, scale)}, n={estimate['n']}", note))

    for metric, name in (("psnr", "PSNR, whole image"), ("psnr_moving", "PSNR, moving region")):
        copy = estimate_text(overall["copy_first"][metric], 1)
        card(name, overall["dream"][metric], 1.0, " dB", f"copy of the first frame: {copy}")
    ghosts = overall["ghosting"]
    alike, back = (_short(ghosts[key], 1, 100.0) for key in ("alike", "reappeared"))
    note = f"alike the start: {alike}; gone and back: {back}; a copy of the first frame: 100"
    card("Ghosts at vacated places", ghosts["dream"], 100.0, " %", note)
    if s is not None:
        ratio = s["swapped"]["ratio"]
        value, unit = (s["swapped"]["interval"], " levels") if ratio is None else (ratio, " x")
        card("Change with other actions", value, 1.0, unit, "relative to fresh noise, if noise has an effect")
    return cards


def _numbers(lines: Sequence[_Line], digits: int, scale: float = 1.0) -> list[tuple[str, list[tuple[str, str]]]]:
    """A row of the table of numbers per source: its name, then value and interval per column."""
    if not _measured(lines):
        return [("not measured", [("", "")] * len(lines[0][2]))]
    return [(name, [_cell(e, digits, scale) for e in estimates]) for name, _, estimates in lines]


def _cell(estimate: Json, digits: int, scale: float) -> tuple[str, str]:
    if estimate["value"] is None:
        return "", ""
    value, interval = _short(estimate, digits, scale).split(" ", 1)
    return value, f"{interval}, n={estimate['n']}"
