"""The page, the table and the films of ``rawdream evaluate-world-model``."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from rawdream_env.evaluation import pictures
from rawdream_env.evaluation.charts import Series, line_chart
from rawdream_env.evaluation.fidelity import Fidelity
from rawdream_env.evaluation.html import Json, cells, element, estimate_text, rate_text, table, text
from rawdream_env.evaluation.style import CSS
from rawdream_env.types import UInt8Array

TITLE = "How far the dream follows the recording"
METRICS = {
    "psnr": ("PSNR", "dB", 1), "psnr_moving": ("PSNR, moving region", "dB", 1), "ssim": ("SSIM", "", 3),
    "ssim_moving": ("SSIM, moving region", "", 3), "lpips": ("LPIPS", "lower is better", 3),
    "lpips_moving": ("LPIPS, moving region", "lower is better", 3), "fvd": ("FVD", "lower is better", 0),
}  # fmt: skip
LINES = (("dream", "world model", "s-dream"), ("copy_first", "copy of the first frame", "s-first"),
         ("copy_last", "copy of the last true frame", "s-last"))  # fmt: skip


def write(fidelity: Fidelity, report: Json, folder: Path) -> None:
    """Write ``fidelity.json``, ``fidelity.png``, ``fidelity.gif`` and ``report.html``, each whole or not at all."""
    from rawdream_env.files import atomic_write_bytes, atomic_write_json, atomic_write_text

    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / "fidelity.json", report)
    scale = max(1, 128 // fidelity.samples[0][0].shape[1])
    film, stills = three_rows(fidelity, scale), still_rows(fidelity, scale)
    atomic_write_bytes(folder / "fidelity.gif", pictures.gif_bytes(film, fidelity.fps))
    atomic_write_bytes(folder / "fidelity.png", pictures.png_bytes(stills))
    atomic_write_text(folder / "report.html", page(report, film, stills, fidelity.fps))


def _triple(truth: UInt8Array, dream: UInt8Array) -> tuple[UInt8Array, UInt8Array, UInt8Array]:
    """The recording, the dream, and twice their difference, cut at white."""
    difference = np.abs(truth.astype(np.int16) - dream.astype(np.int16)) * 2
    return truth, dream, difference.clip(0, 255).astype(np.uint8)


def three_rows(fidelity: Fidelity, scale: int) -> UInt8Array:
    """Film (F, H', W', 3): a column per episode; recording, dream, difference."""
    length = max(len(dream) for _, dream in fidelity.samples)
    columns = [
        [pictures.upscale(pictures.pad_time(x, length), scale) for x in _triple(*pair)] for pair in fidelity.samples
    ]
    return pictures.grid([list(row) for row in zip(*columns, strict=True)])


def still_rows(fidelity: Fidelity, scale: int, columns: int = 8) -> UInt8Array:
    """Stills (H', W', 3) of the first episodes: recording, dream, difference, spread over the horizon."""
    rows = []
    for truth, dream in fidelity.samples[:3]:
        at = np.linspace(0, len(dream) - 1, columns).round().astype(int)
        rows += [list(pictures.upscale(x[at], scale)) for x in _triple(truth, dream)]
    return pictures.grid(rows)


def _labels(report: Json) -> list[str]:
    return [f"{row['frames'][0]}-{row['frames'][1]}" for row in report["horizon"]]


def _measured(report: Json) -> list[str]:
    return [metric for metric in METRICS if any(metric in row["dream"] for row in report["horizon"])]


def _number(metric: str, estimate: Json) -> str:
    """A metric's estimate as text."""
    if metric != "fvd":
        return estimate_text(estimate, digits=METRICS[metric][2])
    return f"{estimate['value']:.0f}, n={estimate['n']}" if estimate["value"] is not None else estimate["why"]


def summary(report: Json) -> tuple[str, int]:
    """What the command prints: a line per metric, source and bucket; exit code 0."""
    labels = _labels(report)
    lines: list[tuple[str, ...]] = [("", "", *(f"frames {label}" for label in labels))]
    for metric in _measured(report):
        for key, name, _ in LINES:
            lines.append((METRICS[metric][0], name, *(_number(metric, row[key][metric]) for row in report["horizon"])))
    lines.append(("ghosting", "world model", *(rate_text(row["ghosting"]) for row in report["horizon"])))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    out.insert(1, "-" * max(map(len, out)))
    out += _sensitivity(report)
    out += [*report["warnings"], *report["missing"]]
    return "\n".join([*out, f"{report['episodes']} episodes. The report is {report['config']['out']}/report.html."]), 0


def _sensitivity(report: Json) -> list[str]:
    listens = report["action_sensitivity"]
    if listens is None:
        return ["Action sensitivity: not measured."]
    said = []
    for name in ("swapped", "zeroed"):
        ratio = listens[name]["ratio"]
        times = (
            "the model is deterministic" if ratio is None else f"{estimate_text(ratio, 1)} times what fresh noise does"
        )
        said.append(f"Actions {name}: the picture changes by {listens[name]['change']:.1f} of 255 levels, {times}.")
    return said


def page(report: Json, film: UInt8Array, stills: UInt8Array, fps: float) -> str:
    """The page as one string: tables, plots and the film inside, nothing loaded from anywhere."""
    run = report["run"]
    lead = (
        f"{report['config']['world_model']}: {report['episodes']} recorded episodes replayed open loop from their first "
        "frame. The model gets that frame and the actions, nothing recorded later."
    )
    note = (
        f"{run['time'].replace('T', ' ').replace('+00:00', ' UTC')}. Brackets are 95 % intervals, bootstrapped over "
        "episodes; n is their number. The copy of the last true frame is told the truth at every chunk, which the model "
        "never is."
    )
    sections = [
        element("h1", TITLE),
        element("p", text(lead), css="lead"),
        element("p", text(note), css="muted"),
        *[element("p", element("b", text(said))) for said in report["warnings"]],
        _charts(report),
        _numbers(report),
        element("h2", "Does it listen to its actions?"),
        *[element("p", text(said)) for said in _sensitivity(report)],
        _films(film, stills, fps),
        _not_measured(report),
        _run(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{CSS}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _charts(report: Json) -> str:
    labels, charts = _labels(report), []
    for metric in _measured(report):
        name, unit, _ = METRICS[metric]
        series = [
            Series(label, css, [_point(row[key].get(metric)) for row in report["horizon"]]) for key, label, css in LINES
        ]
        charts.append(line_chart(name, unit, labels, series))
    ghosts = [_point(row["ghosting"]) for row in report["horizon"]]
    charts.append(line_chart("Ghosting", "share of vacated pixels", labels, [Series("world model", "s-dream", ghosts)]))
    key = [element("span", element("i", css=css), text(label)) for _, label, css in LINES]
    return element("h2", "By horizon") + element("p", *key, css="key") + element("div", *charts, css="charts")


def _point(estimate: Json | None) -> tuple[float, float, float] | None:
    if estimate is None or estimate["value"] is None:
        return None
    value = float(estimate["value"])
    low, high = estimate.get("low"), estimate.get("high")
    return value, value if low is None else low, value if high is None else high


def _numbers(report: Json) -> str:
    rows = []
    for metric in _measured(report):
        for key, name, _ in LINES:
            numbers = [_number(metric, row[key][metric]) for row in report["horizon"]]
            rows.append([element("th", text(METRICS[metric][0])), *cells(name, *numbers)])
    ghosts = [rate_text(row["ghosting"]) for row in report["horizon"]]
    rows.append([element("th", "Ghosting"), *cells("world model", *ghosts)])
    head = ["", "", *(f"frames {label}" for label in _labels(report))]
    note = (
        "Moving region: pixels that differ from the start frame in the recording. Ghosting: of the pixels where something "
        "stood at the start and the recording has since shown the background, the share that the dream shows as at the "
        "start; 0 for a perfect model, 100 % for one that repeats its first frame."
    )
    return element("h2", "Numbers") + table(head, rows) + element("p", text(note), css="muted")


def _films(film: UInt8Array, stills: UInt8Array, fps: float) -> str:
    video = base64.b64encode(pictures.mp4_bytes(film, fps)).decode("ascii")
    picture = base64.b64encode(pictures.png_bytes(stills)).decode("ascii")
    note = "From top to bottom: recording, dream, twice their difference. The first episodes, not the best."
    return "".join(
        [
            element("h2", "Films"),
            element("p", text(note)),
            f'<figure><video autoplay loop muted playsinline controls src="data:video/mp4;base64,{video}"></video></figure>',
            element("p", "The same as stills over the horizon, three rows an episode."),
            f'<figure><img alt="stills" style="width:100%" src="data:image/png;base64,{picture}"></figure>',
        ]
    )


def _not_measured(report: Json) -> str:
    return "".join(element("p", text(advice), css="muted") for advice in report["missing"])


def _run(report: Json) -> str:
    run: dict[str, Any] = report["run"]
    hardware = ", ".join(f"{key}: {value}" for key, value in run["hardware"].items() if value is not None)
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in report["config"].items())
    return "".join(
        [
            element("h2", "What was run"),
            element("pre", text(run["command"])),
            element("p", text(hardware)),
            element("p", text(versions), css="muted"),
            element("details", element("summary", "All settings"), element("pre", text(settings))),
        ]
    )
