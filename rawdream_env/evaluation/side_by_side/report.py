"""One self-contained HTML page from a side-by-side evaluation: tables, charts and films, nothing loaded from anywhere.

``write_report`` writes three files: ``report.html`` (style, SVG and MP4 films inside), ``report.json`` (every number of
the page) and ``episodes.jsonl`` (one line per start and policy, from which the numbers can be computed again).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rawdream_env.evaluation.reporting import pictures
from rawdream_env.evaluation.reporting.charts import Series, line_chart, point
from rawdream_env.evaluation.reporting.html import (
    Json,
    cells,
    element,
    estimate_text,
    gain_cell,
    matrix,
    page,
    percent,
    rate_cell,
    rate_text,
    table,
    text,
    what_was_run,
    when,
)
from rawdream_env.types import UInt8Array

if TYPE_CHECKING:
    from rawdream_env.evaluation.side_by_side.evaluate import Clip, SideBySide

__all__ = ["clip_frames", "rate_text", "render", "write_report"]

TITLE = "Dream and simulator, side by side"


def write_report(result: SideBySide, folder: str | Path, fps: float) -> Path:
    """Write the three files into ``folder`` (made if missing); returns the path of the page."""
    from rawdream_env.files import atomic_write_json, atomic_write_text

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**asdict(record), "flagged": record.flagged}) for record in result.records]
    atomic_write_text(folder / "episodes.jsonl", "".join(line + "\n" for line in lines))
    atomic_write_json(folder / "report.json", result.report)
    path = folder / "report.html"
    atomic_write_text(path, render(result.report, result.clips, fps))
    return path


def render(report: Json, clips: Sequence[Clip], fps: float) -> str:
    """The page as one string."""
    sections = [_header(report), _headline(report), _tasks(report)]
    sections += [_policy(entry) for entry in report["policies"]]
    return page(TITLE, [*sections, _ranking(report), _films(clips, fps), what_was_run(report, _READING)])


def _header(report: Json) -> str:
    policies = report["policies"]
    n, tasks = (policies[0]["all"]["simulator"]["n"], len(policies[0]["tasks"])) if policies else (0, 0)
    names = ", ".join(p["name"] for p in policies)
    lead = (
        f"{len(policies)} {'policy' if len(policies) == 1 else 'policies'} ({names}), {tasks} "
        f"{'task' if tasks == 1 else 'tasks'}, {n} starts each. The same policy begins at the same starts in the world "
        "model, where a judge decides, and in the simulator, where the truth is known."
    )
    note = (
        f"{when(report)}. Brackets are 95 % intervals: Wilson for rates, bootstrap over starts or episodes "
        "for differences, correlations and PSNR."
    )
    return element("h1", TITLE) + element("p", text(lead), css="lead") + element("p", text(note), css="muted")


def _headline(report: Json) -> str:
    rows = []
    for entry in report["policies"]:
        overall, gain = entry["all"], entry.get("gain", {})
        row = [
            element("th", text(entry["name"])),
            rate_cell(overall["simulator"], "sim"),
            rate_cell(overall["dream"], "dream"),
            rate_cell(overall.get("verification", {}).get("dream_verified"), "ok"),
            gain_cell(gain.get("simulator")),
            gain_cell(gain.get("dream")),
        ]
        rows.append(row)
    head = ["Policy", "Simulator", "Dream", "Dream, seen twice", "Gain in simulator", "Gain in dream"]
    ends = "; ".join(f"{e['name']} {rate_text(e['all']['simulator_end'])}" for e in report["policies"])
    invalid = sum(entry["all"]["dream_invalid"] for entry in report["policies"])
    note = (
        "Simulator: success after any chunk, as the simulator environment rewards it; still true at the end of the "
        f"video: {ends}. Verdicts are compared with {report['truth']}. Seen twice: successes that dual-noise "
        f"verification confirmed. Unreadable (INVALID) dream verdicts, left out: {invalid}."
    )
    return element("h2", "Success rates") + table(head, rows) + element("p", text(note), css="muted")


def _tasks(report: Json) -> str:
    policies = report["policies"]
    if not policies or len(policies[0]["tasks"]) < 2:
        return ""
    rows = []
    for task in policies[0]["tasks"]:
        for i, entry in enumerate(policies):
            part = entry["tasks"][task]
            name = [element("th", text(task.replace("_", " ")), rowspan=len(policies))] if i == 0 else []
            rates = [rate_cell(part["simulator"], "sim"), rate_cell(part["dream"], "dream")]
            rows.append([*name, *cells(entry["name"]), *rates, rate_cell(part["closed_loop"]["agreement"], "ok")])
    head = ["Task", "Policy", "Simulator", "Dream", "Same outcome at the same start"]
    return element("h2", "By task") + table(head, rows)


_MATRICES = (
    ("closed_loop", "Dream against simulator", "Same start, the policy acts in each.", "dream"),
    ("dreamed_actions", "Dreamed actions executed", "Same start and actions: claimed, and what happened.", "dream"),
    ("simulator_actions", "Simulator's actions dreamed", "Same start and actions, judged on the dream.", "dream"),
    ("judge_on_simulator", "Judge alone", "The judge on the simulator's own videos.", "judge"),
)


def _policy(entry: Json) -> str:
    overall = entry["all"]
    tables = [matrix(title, note, who, overall[key]) for key, title, note, who in _MATRICES if key in overall]
    return "".join(
        [
            element("h2", "How far can the dream be trusted? Policy: ", text(entry["name"])),
            _cards(overall),
            element("div", *tables, css="matrices"),
            _verification(overall["verification"]) if "verification" in overall else "",
            _horizon(entry["horizon"]),
        ]
    )


def _cards(overall: Json) -> str:
    """The three or four numbers to look at first."""
    closed = overall["closed_loop"]
    shown = [("Same outcome at the same start", closed["agreement"], f"kappa {estimate_text(closed['kappa'])}")]
    if "dreamed_actions" in overall:
        judge = overall["judge_on_simulator"]
        rates = f"precision {percent(judge['precision'])}, recall {percent(judge['recall'])}"
        precision = overall["dreamed_actions"]["precision"]
        shown.append(("Dreamed successes that really happen", precision, "the dream's own actions in the simulator"))
        shown.append(("Judge right on simulator videos", judge["agreement"], rates))
    if "verification" in overall:
        v = overall["verification"]
        shown.append(
            ("Dreamed successes flagged", v["flagged"], f"of those really false: {percent(v['flagged_wrong'])}")
        )
    parts = []
    for title, rate, note in shown:
        value = "not measured" if rate["value"] is None else f"{100 * rate['value']:.0f} %"
        interval = element("span", text(rate_text(rate)))
        card = [element("span", text(title)), element("b", value), interval, element("span", text(note))]
        parts.append(element("div", *card, css="card"))
    return element("div", *parts, css="cards")


def _verification(v: Json) -> str:
    rows = []
    for name, confusion in (("before", v["before"]), ("after, flagged left out", v["after"])):
        rates = [rate_text(confusion[key]) for key in ("agreement", "precision", "recall")]
        rows.append([element("th", name), *cells(*rates, estimate_text(confusion["kappa"]))])
    note = (
        "Each dreamed success is dreamt again with fresh noise. "
        f"Flagged (it did not repeat): {rate_text(v['flagged'])}. "
        f"Flagged and really false: {rate_text(v['flagged_wrong'])}. Unreadable second verdicts: {v['invalid']}. "
        f"Truth: {v['against']}."
    )
    head = ["", "Agreement", "Precision", "Recall", "Kappa"]
    return element("h3", "Dual-noise verification") + element("p", text(note)) + table(head, rows)


_LINES = (
    ("dream", "dream", "s-dream"),
    ("copy_first", "copy of the first frame", "s-first"),
    ("copy_last", "copy of the last true frame", "s-last"),
)
_SOURCES = {"simulator_actions": "simulator's actions", "dreamed_actions": "dreamed actions"}


def _horizon(horizon: Json) -> str:
    """PSNR curves over the horizon, whole picture and moving region; a table below for the rest."""
    if not horizon:
        return ""
    charts, tables = [], []
    for source, rows in horizon.items():
        labels = [f"{row['frames'][0]}-{row['frames'][1]}" for row in rows]
        for metric, region in (("psnr", "whole picture"), ("psnr_moving", "moving region")):
            series = [Series(label, css, [point(row[key][metric]) for row in rows]) for key, label, css in _LINES]
            charts.append(line_chart(f"PSNR, {region}, {_SOURCES[source]}", "dB", labels, series))
        tables.append(_horizon_table(_SOURCES[source], labels, rows))
    note = (
        "Same start and same actions in both worlds, frame by frame. The moving region is every pixel that differs "
        "from the start frame in the simulator. The copy of the last true frame is told the truth at every chunk, "
        "which the dream never is."
    )
    return "".join(
        [
            element("h3", "The picture itself, by horizon") + element("p", text(note)),
            element("p", *[element("span", element("i", css=css), text(label)) for _, label, css in _LINES], css="key"),
            element("div", *charts, css="charts"),
            element("details", element("summary", "Numbers, with SSIM"), *tables),
        ]
    )


def _horizon_table(title: str, labels: Sequence[str], rows: Sequence[Json]) -> str:
    metrics = {"psnr": "PSNR", "psnr_moving": "PSNR moving", "ssim": "SSIM", "ssim_moving": "SSIM moving"}
    lines = []
    for label, row in zip(labels, rows, strict=True):
        for key, name, _ in _LINES:
            numbers = [estimate_text(row[key][metric], digits=1 if "psnr" in metric else 3) for metric in metrics]
            lines.append(cells(label, name, *numbers))
    return element("h3", text(title)) + table(["Frames", "", *metrics.values()], lines)


def _ranking(report: Json) -> str:
    ranking = report.get("ranking")
    if ranking is None:
        return ""
    cell_rank = ranking["spearman_cells"]
    swapped = ", ".join(f"{a} and {b}" for a, b in ranking["swapped_pairs"]) or "none"
    many = "" if cell_rank is None else f" Over (policy, task) cells: Spearman {estimate_text(cell_rank)}."
    line = (
        f"{ranking['n_policies']} policies on {ranking['n_starts']} starts. "
        f"Spearman {estimate_text(ranking['spearman'])}, Kendall {estimate_text(ranking['kendall'])}.{many} "
        f"Pairs in the wrong order: {swapped}."
    )
    few = ranking["n_policies"] == 2
    note = (
        f"Intervals resample starts: they speak of these {ranking['n_policies']} policies, not of policies in general, "
        "for which so few are no sample." + (" Of two policies a rank correlation can only be 1 or -1." if few else "")
    )
    title = element("h2", "Does the dream rank policies as the simulator does?")
    return title + element("p", text(line)) + element("p", text(note), css="muted")


_COLOUR = {1: pictures.GREEN, 0: pictures.RED, -1: pictures.GREY}


def clip_frames(clip: Clip, min_side: int = 192) -> UInt8Array:
    """The film of a clip: simulator left, dream right, borders by outcome (green, red, grey; amber: flagged)."""
    dream = pictures.AMBER if clip.record.flagged else _COLOUR[clip.record.dream]
    colours = (_COLOUR[int(clip.happened)], dream)
    scale = -(-min_side // clip.left.shape[1])
    left, right = (
        pictures.border(pictures.upscale(frames, scale), colour, 6)
        for frames, colour in zip((clip.left, clip.right), colours, strict=True)
    )
    return pictures.beside(left, right, gap=4, gap_level=128)


_LEGEND = (
    (pictures.GREEN, "success"),
    (pictures.RED, "failure"),
    (pictures.AMBER, "dreamed success that did not repeat"),
    (pictures.GREY, "no verdict"),
)


def _films(clips: Sequence[Clip], fps: float) -> str:
    if not clips:
        return ""
    dots = [
        element("span", css="dot", style=f"background:rgb{colour}".replace(" ", "")) + text(name) + " "
        for colour, name in _LEGEND
    ]
    legend = "The first of each kind, not the best. Left by the simulator's predicate, right by the judge. Border: "
    names = list(dict.fromkeys(clip.record.policy for clip in clips))
    kinds = list(dict.fromkeys(clip.kind for clip in clips))
    ordered = sorted(clips, key=lambda clip: (names.index(clip.record.policy), kinds.index(clip.kind)))
    figures = [_figure(clip, fps) for clip in ordered]
    return element("h2", "Episodes") + element("p", text(legend), *dots) + element("div", *figures, css="videos")


def _figure(clip: Clip, fps: float) -> str:
    record = clip.record
    data = base64.b64encode(pictures.mp4_bytes(clip_frames(clip), fps)).decode("ascii")
    actions = "the dream's actions in both" if clip.same_actions else "the policy acts in each"
    flagged = ". Flagged by the second dream" if record.flagged else ""
    note = f"{record.policy}, start {record.index}, {actions}{flagged}."
    film = f'<video autoplay loop muted playsinline controls src="data:video/mp4;base64,{data}"></video>'
    caption = [element("b", text(clip.kind)), text(clip.instruction), "<br>", element("span", text(note), css="muted")]
    names = element("div", element("span", "simulator"), element("span", "dream"), css="names")
    return element("figure", names, film, element("figcaption", *caption))


_READING = (
    "The policy samples with the same noise in both worlds, so while both show the same picture it does the same. "
    "A rate compares populations, agreement compares single episodes: both are needed, since equal rates can hide that "
    "different starts succeed. Kappa is agreement beyond chance. PSNR is averaged over frames (cut at 60 dB), then "
    "over episodes. Every number is in report.json, every episode in episodes.jsonl."
)
