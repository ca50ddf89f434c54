"""The report of a side-by-side evaluation: one self-contained HTML page with tables, charts and films.

``write_report`` writes three files: ``report.html`` (style, SVG and MP4 films inside), ``report.json`` (every number of
the page) and ``episodes.jsonl`` (one line per start and policy, from which the numbers can be recomputed).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rawdream_env.evaluation.reporting import html, pictures
from rawdream_env.evaluation.reporting.charts import Point, Series, line_chart, point
from rawdream_env.evaluation.reporting.numbers import Json, estimate_text, percent
from rawdream_env.evaluation.reporting.output import writing_results
from rawdream_env.evaluation.side_by_side.ranking import RANKINGS
from rawdream_env.evaluation.side_by_side.records import Clip, SideBySide
from rawdream_env.evaluation.side_by_side.table import trust_table
from rawdream_env.files import atomic_write_json, atomic_write_text
from rawdream_env.media import encode_video
from rawdream_env.types import UInt8Array
from rawdream_env.wrappers.drawing import COLOURS

TITLE = "Dream and simulator, side by side"

_MATRICES = (
    ("closed_loop", "Dream against simulator", "Same start, the policy acts in each.", "dream"),
    (
        "dreamed_actions",
        "Dreamed actions executed",
        "Same start and actions: the verdict in the dream, the outcome in the simulator.",
        "dream",
    ),
    ("simulator_actions", "Simulator's actions dreamed", "Same start and actions, judged on the dream.", "dream"),
    ("judge_on_simulator", "Judge alone", "The judge on the simulator's videos.", "judge"),
    ("judge_against_state", "Judge and state", "The judge on the dream; true: the dream's own state.", "judge"),
)
"""Confusion tables: key in the report, title, note, and whose verdicts are the rows."""
_LINES = (("dream", "s-dream"), ("copy of the first frame", "s-first"), ("copy of the last true frame", "s-last"))
_TRAINING_LINES = (("dream, while training", "s-dream"), ("simulator, before and after", "s-truth"))
_SOURCES = {"simulator_actions": "simulator's actions", "dreamed_actions": "dreamed actions"}
_OUTCOMES = {1: "success", 0: "failure", -1: "invalid"}
_LEGEND = {
    "success": "success",
    "failure": "failure",
    "flagged": "flagged: a dreamed success that did not repeat",
    "invalid": "no verdict",
}


def write_report(result: SideBySide, folder: str | Path, fps: float) -> Path:
    """Write the three files into ``folder``, which is created if missing; returns the path of the page."""
    lines = [json.dumps({**asdict(record), "flagged": record.flagged}) for record in result.records]
    page = render(result.report, result.clips, fps)
    with writing_results(folder) as path:
        atomic_write_text(path / "episodes.jsonl", "".join(line + "\n" for line in lines))
        atomic_write_json(path / "report.json", result.report)
        atomic_write_text(path / "report.html", page)
    return path / "report.html"


def render(report: Json, clips: Sequence[Clip], fps: float) -> str:
    """The page as one string."""
    policies = [entry["name"] for entry in report["policies"]]
    kinds = list(dict.fromkeys(clip.kind for clip in clips))
    ordered = sorted(clips, key=lambda clip: (policies.index(clip.record.policy), kinds.index(clip.kind)))
    return html.page(
        "side_by_side.html",
        TITLE,
        report,
        report["config"],
        cards=[_cards(entry["all"]) for entry in report["policies"]],
        curve=training_chart(report) if "training" in report else None,
        charts=[_charts(entry["horizon"]) for entry in report["policies"]],
        films=[_film(clip, fps) for clip in ordered],
        matrices=_MATRICES,
        trust=[_trust(entry) for entry in report["policies"]],
        rankings=RANKINGS,
        lines=_LINES,
        training_lines=_TRAINING_LINES,
        sources=_SOURCES,
        legend=[(str(COLOURS[word]).replace(" ", ""), name) for word, name in _LEGEND.items()],
    )


def _cards(overall: Json) -> list[tuple[str, Json, str]]:
    """One to five key numbers: title, rate, note."""
    closed = overall["closed_loop"]
    cards = [("Same outcome at the same start", closed["agreement"], f"kappa {estimate_text(closed['kappa'])}")]
    if "dreamed_actions" in overall:
        judge, precision = overall["judge_on_simulator"], overall["dreamed_actions"]["precision"]
        rates = f"precision {percent(judge['precision'])}, recall {percent(judge['recall'])}"
        cards.append(("Dreamed successes that are true", precision, "the dream's actions, executed in the simulator"))
        cards.append(("Judge correct on simulator videos", judge["agreement"], rates))
    if "lifts_on_misses" in overall:
        cards.append(
            ("Missed grasps that the dream lifts", overall["lifts_on_misses"], "the simulator's actions, imagined")
        )
    if "verification" in overall:
        flagged, wrong = overall["verification"]["flagged"], overall["verification"]["flagged_wrong"]
        cards.append(("Dreamed successes flagged", flagged, f"of these are false: {percent(wrong)}"))
    return cards


def _trust(entry: Json) -> list[list[str]]:
    """The table of how far the dream can be trusted, longer than wide: many tasks are rows, few are columns."""
    titles, *tasks, overall = trust_table(entry)
    rows = [
        ["", *map(str.capitalize, titles[1:])],
        *([row[0].replace("_", " "), *row[1:]] for row in [overall, *tasks]),
    ]
    return rows if len(rows) >= len(rows[0]) else [list(column) for column in zip(*rows, strict=True)]


def _charts(horizon: Json) -> list[Markup]:
    """PSNR over the horizon, whole image and moving region, for the actions of each world."""
    charts = []
    for source, rows in horizon.items():
        labels = [f"{row['frames'][0]}-{row['frames'][1]}" for row in rows]
        for metric, region in (("psnr", "whole picture"), ("psnr_moving", "moving region")):
            series = [
                Series(label, css, [point(row[key][metric]) for row in rows])
                for key, (label, css) in zip(("dream", "copy_first", "copy_last"), _LINES, strict=True)
            ]
            charts.append(line_chart(f"PSNR, {region}, {_SOURCES[source]}", "dB", labels, series))
    return charts


def training_chart(report: Json) -> Markup:
    """Success in the dream over training, between the simulator's before and after it (the first and the last policy).

    ``report["training"]``: ``temperature``, and ``windows``, each with its ``updates`` (first, last) and the rate ``all``.
    """
    windows, ends = report["training"]["windows"], (report["policies"][0], report["policies"][-1])
    between: list[Point | None] = [None] * len(windows)
    labels = ["before", *(str(window["updates"][1]) for window in windows), "after"]
    before, after = (_percent(entry["all"]["simulator"]) for entry in ends)
    dreamed = [None, *(_percent(window["all"]) for window in windows), None]
    series = [Series("dream", "s-dream", dreamed), Series("simulator", "s-truth", [before, *between, after])]
    return line_chart("Success over training", "%", labels, series, width=620, axis="updates")


def _percent(rate: Json) -> Point | None:
    scaled = {key: None if rate[key] is None else 100 * rate[key] for key in ("value", "low", "high")}
    return point(scaled)


def clip_frames(clip: Clip, min_side: int = 192) -> UInt8Array:
    """The film of a clip: simulator left, dream right; the border colour shows the outcome."""
    dream = "flagged" if clip.record.flagged else _OUTCOMES[clip.record.dream]
    scale = -(-min_side // clip.left.shape[1])
    left, right = (
        pictures.border(pictures.upscale(frames, scale), COLOURS[outcome], 6)
        for frames, outcome in ((clip.left, _OUTCOMES[int(clip.happened)]), (clip.right, dream))
    )
    return pictures.beside(left, right, gap=4, gap_level=128)


def _film(clip: Clip, fps: float) -> dict[str, Any]:
    record = clip.record
    actions = "the dream's actions in both" if clip.same_actions else "the policy acts in each"
    flagged = " Flagged by dual-noise verification." if record.flagged else ""
    return {
        "data": html.base64_text(encode_video([clip_frames(clip)], fps)),
        "kind": clip.kind,
        "instruction": clip.instruction,
        "note": f"{record.policy}, start {record.index}, {actions}.{flagged}",
    }
