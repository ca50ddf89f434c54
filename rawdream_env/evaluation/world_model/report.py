"""A world model's fidelity as a table of text and as one self-contained HTML page; see ``fidelity.json`` for the input."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from rawdream_env.evaluation.reporting.charts import Series, line_chart, point
from rawdream_env.evaluation.reporting.html import cells, element, estimate_text, page, table, text, what_was_run, when

Json = Mapping[str, Any]
_Line = tuple[str, str, list[Json]]
"""A source's name, its class in the style sheet, and an estimate per column."""

TITLE = "World model against the recording"

METRICS = (
    ("psnr", "PSNR, whole picture", "dB, higher is better", 1),
    ("psnr_moving", "PSNR, moving region", "dB, higher is better", 1),
    ("ssim", "SSIM, whole picture", "higher is better", 3),
    ("ssim_moving", "SSIM, moving region", "higher is better", 3),
    ("lpips", "LPIPS, whole picture", "lower is better", 3),
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
    """The lines of one metric; nothing measured where the report has none."""
    return [(name, css, [row[key].get(metric, _NOTHING) for _, row in columns]) for key, name, css in _SOURCES]


def _ghost_lines(columns: Sequence[tuple[str, Json]]) -> list[_Line]:
    return [(name, css, [row["ghosting"][key] for _, row in columns]) for key, name, css in _GHOSTS]


def _short(estimate: Json, digits: int, scale: float = 1.0) -> str:
    """An estimate as "31.9 [30.1, 33.5]" with n where there is none in the head of the table."""
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
        known = any(e["value"] is not None for _, _, estimates in _lines(key, columns) for e in estimates)
        if known:
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
        times = (
            "fresh noise changes nothing" if ratio is None else f"{estimate_text(ratio)} times what fresh noise does"
        )
        change = estimate_text(s[key]["interval"])
        lines.append(f"With {name} the frames change by {change} of 255 levels, {times}.")
    return lines


def render(report: Json, film: bytes | None) -> str:
    """The page as one string; ``film`` is the grid as MP4, or None."""
    return page(TITLE, [_header(report), _cards(report), _film(film), *_charts(report), what_was_run(report, _READING)])


def _header(report: Json) -> str:
    n, config = report["episodes"], report["config"]
    lead = (
        f"{n} recorded {'episode' if n == 1 else 'episodes'} from {', '.join(config['data'])}, imagined by the world "
        f"model {config['world_model']!r} from the first frame and the recorded actions alone."
    )
    note = f"{when(report)}. Brackets are 95 % intervals over episodes: bootstrap, for FVD a jackknife."
    warnings = [element("p", text(sentence)) for sentence in report["notes"]]
    parts = [element("h1", TITLE), element("p", text(lead), css="lead"), element("p", text(note), css="muted")]
    return "".join([*parts, *warnings])


def _cards(report: Json) -> str:
    """The few numbers to look at first."""
    overall, s = report["overall"], report["action_sensitivity"]
    shown = []
    for metric, name in (("psnr", "PSNR, whole picture"), ("psnr_moving", "PSNR, moving region")):
        copy = estimate_text(overall["copy_first"][metric], 1)
        shown.append((name, overall["dream"][metric], 1, 1.0, " dB", f"copy of the first frame: {copy}"))
    ghosts = overall["ghosting"]
    alike, back = (_short(ghosts[key], 1, 100.0) for key in ("alike", "reappeared"))
    back = f"alike the start: {alike}; gone and back: {back}; a copy of the first frame: 100"
    shown.append(("Ghosts at vacated places", ghosts["dream"], 1, 100.0, " %", back))
    if s is not None:
        ratio = s["swapped"]["ratio"]
        value, unit = (s["swapped"]["interval"], " levels") if ratio is None else (ratio, " x")
        shown.append(("Change with other actions", value, 1, 1.0, unit, "relative to fresh noise, where that does any"))
    parts = []
    for title, estimate, digits, scale, unit, below in shown:
        big = "not measured" if estimate["value"] is None else f"{scale * estimate['value']:.{digits}f}{unit}"
        interval = f"{_short(estimate, digits, scale)}, n={estimate['n']}"
        card = [element("span", text(title)), element("b", text(big)), element("span", text(interval))]
        parts.append(element("div", *card, element("span", text(below)), css="card"))
    return element("div", *parts, css="cards")


def _key(names: Sequence[tuple[str, str, str]]) -> str:
    return element("p", *[element("span", element("i", css=css), text(name)) for _, name, css in names], css="key")


def _charts(report: Json) -> list[str]:
    columns = _columns(report)
    buckets = columns[:-1]
    labels = [label for label, _ in buckets]
    charts, rows = [], []
    for key, title, unit, digits in METRICS:
        series = [Series(name, css, [point(e) for e in estimates]) for name, css, estimates in _lines(key, buckets)]
        charts.append(line_chart(title, unit, labels, series))
        if any(e["value"] is not None for _, _, estimates in _lines(key, columns) for e in estimates):
            rows += _rows(title, _lines(key, columns), digits)
        else:
            rows.append([element("th", text(title)), *cells("not measured", *[""] * len(columns))])
    ghosts = [Series(name, css, [point(e) for e in estimates]) for name, css, estimates in _ghost_lines(buckets)]
    rows += _rows("Ghosts, % of vacated pixels", _ghost_lines(columns), 1, 100.0)
    counts = [str(row["ghosting"]["pixels"]) for _, row in columns]
    rows.append([element("th", "Vacated pixels"), *cells("truth, summed over frames", *counts)])
    pixels = report["overall"]["ghosting"]["pixels"]
    return [
        element("h2", "By horizon") + element("p", text(_HORIZON), css="muted") + _key(_SOURCES),
        element("div", *charts, css="charts"),
        element("h2", "Ghosts of the first frame")
        + element("p", text(_GHOSTING.format(pixels=pixels)))
        + _key(_GHOSTS),
        element("div", line_chart("Ghosts", "share of vacated pixels", labels, ghosts), style="max-width:510px"),
        element("h2", "Do actions matter?"),
        *[element("p", text(line)) for line in _sensitivity_text(report)],
        element("h2", "Numbers") + table(["", "", *[label for label, _ in columns]], rows),
    ]


def _rows(title: str, lines: Sequence[_Line], digits: int, scale: float = 1.0) -> list[list[str]]:
    """Rows of the table of numbers: a line of cells per source, its interval and n under each value."""
    rows = []
    for i, (name, _, estimates) in enumerate(lines):
        head = [element("th", text(title), rowspan=len(lines))] if i == 0 else []
        rows.append([*head, *cells(name), *[_cell(e, digits, scale) for e in estimates]])
    return rows


def _cell(estimate: Json, digits: int, scale: float) -> str:
    if estimate["value"] is None:
        return element("td", "not measured", css="muted")
    value, interval = _short(estimate, digits, scale).split(" ", 1)
    return element("td", f"<b>{value}</b>", element("span", f"{interval}, n={estimate['n']}", css="ci"), css="rate")


def _film(film: bytes | None) -> str:
    if film is None:
        return ""
    data = base64.b64encode(film).decode("ascii")
    video = f'<video autoplay loop muted playsinline controls src="data:video/mp4;base64,{data}"></video>'
    note = "The first episodes, not the best. Left what the camera recorded, in the middle what was imagined, right how far they differ, three times as strong."
    return element("h2", "Episodes") + element("p", text(note)) + element("figure", video, style="max-width:560px")


_HORIZON = (
    "The model sees the first frame and proprioception, then only actions. The copy of the last true frame is told the "
    "truth before every chunk, which the model never is. The moving region is every pixel that differs from the start "
    "frame in the recording."
)
_GHOSTING = (
    "Where an object lay still at the start and has since been taken away, is it gone in the imagination too? A pixel "
    "is a ghost when it is closer to the first frame than to the truth, which is background there; {pixels} such pixels, "
    "summed over frames. Alike the start: nearer to it than half the way to the truth; the other ghosts may be some other "
    "thing in that place. Gone and back: it had been imagined empty before; the other ghosts never left, as when the "
    "imagined arm misses an object. n counts episodes with a vacated pixel."
)
_READING = (
    "PSNR and SSIM are scikit-image's, averaged over the frames of an episode (PSNR cut at 60 dB), then over episodes. "
    "LPIPS uses AlexNet and its v0.1 weights when the usual files were given; in the moving region its features still "
    "see the surroundings. FVD compares consecutive clips of 16 frames (in shorter buckets one clip of all of it) by I3D "
    "features; it depends on the number of clips. Every number is in fidelity.json."
)
