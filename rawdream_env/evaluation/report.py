"""One self-contained HTML page from a side-by-side evaluation: tables, charts and films, nothing loaded from anywhere.

``write_report`` writes three files: ``report.html`` (style, SVG and MP4 films inside), ``report.json`` (every number of
the page) and ``episodes.jsonl`` (one line per start and policy, from which the numbers can be computed again).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env.evaluation import pictures
from rawdream_env.evaluation.charts import Series, line_chart
from rawdream_env.evaluation.style import CSS
from rawdream_env.types import UInt8Array

if TYPE_CHECKING:
    from rawdream_env.evaluation.side_by_side import Clip, SideBySide

Json = Mapping[str, Any]


def write_report(result: SideBySide, folder: str | Path, fps: float) -> Path:
    """Write the three files into ``folder`` (made if missing); returns the path of the page."""
    from rawdream_env.files import atomic_write_json, atomic_write_text

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**asdict(record), "flagged": record.flagged}) for record in result.records]
    atomic_write_text(folder / "episodes.jsonl", "".join(line + "\n" for line in lines))
    atomic_write_json(folder / "report.json", result.report)
    page = folder / "report.html"
    atomic_write_text(page, render(result.report, result.clips, fps))
    return page


def render(report: Json, clips: Sequence[Clip], fps: float) -> str:
    """The page as one string."""
    sections = [_header(report), _headline(report), _tasks(report)]
    sections += [_policy(entry, report) for entry in report["policies"]]
    sections += [_ranking(report), _films(clips, fps), _run(report)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Dream and simulator, side by side</title><style>{CSS}</style></head><body><main>"
        + "".join(sections)
        + "</main></body></html>\n"
    )


# ---- cells ----------------------------------------------------------------------------------------------------------


def rate_text(rate: Json) -> str:
    """ "54.0 % [47.1, 60.8], n=200" from a rate's JSON form."""
    if rate["value"] is None:
        return f"not measured, n={rate['n']}"
    return f"{100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}], n={rate['n']}"


def estimate_text(estimate: Json, scale: float = 1.0, digits: int = 2) -> str:
    """ "0.40 [0.15, 0.65], n=50" from an estimate's JSON form."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return f"not defined, n={estimate['n']}"
    ends = "no interval" if low is None else f"{scale * low:.{digits}f}, {scale * high:.{digits}f}"
    return f"{scale * value:.{digits}f} [{ends}], n={estimate['n']}"


def _rate_cell(rate: Json | None, css: str) -> str:
    if rate is None or rate["value"] is None:
        return '<td class="rate"><span class="muted">not measured</span></td>'
    value, low, high = (100 * rate[k] for k in ("value", "low", "high"))
    return (
        f'<td class="rate {css}"><b>{value:.1f} %</b><div class="meter"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
        f'<u style="left:calc({value:.1f}% - 1px)"></u></div><span class="ci">[{low:.1f}, {high:.1f}], n={rate["n"]}</span></td>'
    )


def _gain_cell(entry: Json, world: str) -> str:
    if "gain" not in entry:
        return '<td class="muted">reference</td>'
    gain = entry["gain"][world]
    if gain["value"] is None:
        return '<td class="muted">not measured</td>'
    value, low, high = (100 * (gain[k] if gain[k] is not None else float("nan")) for k in ("value", "low", "high"))
    return f'<td class="rate"><b>{value:+.1f}</b> points<span class="ci">[{low:+.1f}, {high:+.1f}], n={gain["n"]} starts</span></td>'


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{h}</th>" for h in head)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


# ---- sections -------------------------------------------------------------------------------------------------------


def _header(report: Json) -> str:
    policies = report["policies"]
    n = policies[0]["all"]["simulator"]["n"] if policies else 0
    tasks = len(policies[0]["tasks"]) if policies else 0
    names = ", ".join(escape(p["name"]) for p in policies)
    return (
        "<h1>Dream and simulator, side by side</h1>"
        f'<p class="lead">{len(policies)} {"policy" if len(policies) == 1 else "policies"} ({names}), {tasks} tasks, '
        f"{n} starts each. The same policy begins at the same starts in the world model, where a judge decides, and in "
        "the simulator, where the truth is known.</p>"
        f'<p class="muted">{escape(report["run"]["time"])}. Brackets are 95 % intervals: Wilson for rates, bootstrap for '
        "differences and correlations.</p>"
    )


def _headline(report: Json) -> str:
    rows = []
    for entry in report["policies"]:
        overall = entry["all"]
        verified = overall.get("verification", {}).get("dream_verified")
        rows.append(
            f"<tr><th>{escape(entry['name'])}</th>{_rate_cell(overall['simulator'], 'sim')}{_rate_cell(overall['dream'], 'dream')}"
            f"{_rate_cell(verified, 'ok')}{_gain_cell(entry, 'simulator')}{_gain_cell(entry, 'dream')}</tr>"
        )
    head = ["Policy", "Simulator", "Dream", "Dream, verified twice", "Gain in simulator", "Gain in dream"]
    invalid = sum(entry["all"]["dream_invalid"] for entry in report["policies"])
    ends = "; ".join(f"{escape(e['name'])} {rate_text(e['all']['simulator_end'])}" for e in report["policies"])
    return (
        "<h2>Success rates</h2>"
        + _table(head, rows)
        + '<p class="muted">Simulator: success after any chunk, as the simulator environment rewards it; still true at the end of '
        f"the video: {ends}. Verdicts are compared with {escape(report['truth'])}. "
        f"Unreadable (INVALID) dream verdicts, left out: {invalid}.</p>"
    )


def _tasks(report: Json) -> str:
    policies = report["policies"]
    if not policies or len(policies[0]["tasks"]) < 2:
        return ""
    rows = []
    for task in policies[0]["tasks"]:
        for i, entry in enumerate(policies):
            part = entry["tasks"][task]
            name = f'<th rowspan="{len(policies)}">{escape(task.replace("_", " "))}</th>' if i == 0 else ""
            agreement = f"<td>{rate_text(part['closed_loop']['agreement'])}</td>"
            cells = _rate_cell(part["simulator"], "sim") + _rate_cell(part["dream"], "dream") + agreement
            rows.append(f"<tr>{name}<td>{escape(entry['name'])}</td>{cells}</tr>")
    head = ["Task", "Policy", "Simulator", "Dream", "Same outcome at the same start"]
    return "<h2>By task</h2>" + _table(head, rows)


def _policy(entry: Json, report: Json) -> str:
    overall = entry["all"]
    parts = [
        f"<h2>How far can the dream be trusted? Policy {escape(entry['name'])}</h2>",
        _cards(overall),
        '<div class="matrices">',
    ]
    parts.append(
        _matrix(
            "Dream against simulator",
            "Closed loop: same start, the policy acts in each.",
            "dream",
            overall["closed_loop"],
        )
    )
    if "dreamed_actions" in overall:
        parts.append(
            _matrix(
                "Dreamed actions executed",
                "Same start, same actions: what the dream claimed, what happened.",
                "dream",
                overall["dreamed_actions"],
            )
        )
        parts.append(
            _matrix(
                "Simulator's actions dreamed",
                "Same start, same actions, judged on the dream's video.",
                "dream",
                overall["simulator_actions"],
            )
        )
        parts.append(
            _matrix("Judge alone", "The judge on the simulator's own videos.", "judge", overall["judge_on_simulator"])
        )
    parts.append("</div>")
    if "verification" in overall:
        parts.append(_verification(overall["verification"]))
    parts.append(_horizon(entry["horizon"]))
    return "".join(parts)


def _cards(overall: Json) -> str:
    cards = [
        (
            "Same outcome at the same start",
            overall["closed_loop"]["agreement"],
            f"kappa {estimate_text(overall['closed_loop']['kappa'])}",
        )
    ]
    if "dreamed_actions" in overall:
        acted, judge = overall["dreamed_actions"], overall["judge_on_simulator"]
        cards.append(
            (
                "Dreamed successes that really happen",
                acted["precision"],
                "precision, dream's own actions in the simulator",
            )
        )
        cards.append(
            (
                "Judge right on simulator videos",
                judge["agreement"],
                f"precision {_percent(judge['precision'])}, recall {_percent(judge['recall'])}",
            )
        )
    if "verification" in overall:
        v = overall["verification"]
        cards.append(
            ("Dreamed successes flagged", v["flagged"], f"of those really false: {_percent(v['flagged_wrong'])}")
        )
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span>{escape(title)}</span><b>{_percent(rate)}</b><span>{escape(rate_text(rate))}</span><span>{escape(note)}</span></div>'
            for title, rate, note in cards
        )
        + "</div>"
    )


def _percent(rate: Json) -> str:
    return "not measured" if rate["value"] is None else f"{100 * rate['value']:.0f} % (n={rate['n']})"


def _matrix(title: str, note: str, rater: str, c: Json) -> str:
    f1 = "not defined" if c["f1"] is None else f"{c['f1']:.2f}"
    return (
        f'<div class="matrix"><h3>{escape(title)}</h3><p class="muted">{escape(note)}</p><table><thead><tr><th></th><th>really succeeds</th><th>really fails</th></tr></thead>'
        f'<tbody><tr><th>{rater}: success</th><td class="yes">{c["true_positive"]}</td><td class="no">{c["false_positive"]}</td></tr>'
        f'<tr><th>{rater}: failure</th><td class="no">{c["false_negative"]}</td><td class="yes">{c["true_negative"]}</td></tr></tbody></table>'
        f"<p>agreement {rate_text(c['agreement'])}<br>kappa {estimate_text(c['kappa'])}<br>precision {rate_text(c['precision'])}<br>"
        f"recall {rate_text(c['recall'])}<br>F1 {f1}</p></div>"
    )


def _verification(v: Json) -> str:
    rows = []
    for name, c in (("before", v["before"]), ("after, flagged left out", v["after"])):
        cells = "".join(f"<td>{rate_text(c[key])}</td>" for key in ("agreement", "precision", "recall"))
        rows.append(f"<tr><th>{name}</th>{cells}<td>{estimate_text(c['kappa'])}</td></tr>")
    return (
        "<h3>Dual-noise verification</h3>"
        f"<p>Each dreamed success is dreamt again with fresh noise. Flagged (it did not repeat): {rate_text(v['flagged'])}. "
        f"Flagged and really false: {rate_text(v['flagged_wrong'])}. Unreadable second verdicts: {v['invalid']}. "
        f"Truth: {escape(v['against'])}.</p>" + _table(["", "Agreement", "Precision", "Recall", "Kappa"], rows)
    )


_LINES = (
    ("dream", "dream", "s-dream"),
    ("copy_first", "copy of the first frame", "s-first"),
    ("copy_last", "copy of the last true frame", "s-last"),
)


def _horizon(horizon: Json) -> str:
    """PSNR curves over the horizon, whole picture and moving region; a table below for the rest."""
    if not horizon:
        return ""
    titles = {"simulator_actions": "simulator's actions", "dreamed_actions": "dreamed actions"}
    charts, tables = [], []
    for source, table in horizon.items():
        labels = [f"{row['frames'][0]}-{row['frames'][1]}" for row in table]
        for metric, region in (("psnr", "whole picture"), ("psnr_moving", "moving region")):
            series = [Series(label, css, [_point(row[key][metric]) for row in table]) for key, label, css in _LINES]
            charts.append(line_chart(f"PSNR, {region}, {titles[source]}", "dB", labels, series))
        tables.append(_horizon_table(titles[source], labels, table))
    key = "".join(f'<span><i class="{css}"></i>{escape(label)}</span>' for _, label, css in _LINES)
    return (
        "<h3>The picture itself, by horizon</h3><p>Same start and same actions in both worlds, frame by frame. The moving region is "
        "every pixel that differs from the start frame in the simulator. The copy of the last true frame is told the truth "
        f'at every chunk, which the dream never is.</p><p class="key">{key}</p><div class="charts">{"".join(charts)}</div>'
        f"<details><summary>Numbers, with SSIM</summary>{''.join(tables)}</details>"
    )


def _point(estimate: Json) -> tuple[float, float, float] | None:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return None
    return value, value if low is None else low, value if high is None else high


def _horizon_table(title: str, labels: Sequence[str], table: Sequence[Json]) -> str:
    metrics = (("psnr", "PSNR"), ("psnr_moving", "PSNR moving"), ("ssim", "SSIM"), ("ssim_moving", "SSIM moving"))
    rows = []
    for label, row in zip(labels, table, strict=True):
        for key, name, _ in _LINES:
            cells = "".join(
                f"<td>{estimate_text(row[key][m], digits=1 if 'psnr' in m else 3)}</td>" for m, _ in metrics
            )
            rows.append(f"<tr><td>{label}</td><td>{escape(name)}</td>{cells}</tr>")
    return f"<h3>{escape(title)}</h3>" + _table(["Frames", "", *[name for _, name in metrics]], rows)


def _ranking(report: Json) -> str:
    ranking = report.get("ranking")
    if ranking is None:
        return ""
    cells = ranking["spearman_cells"]
    swapped = ", ".join(f"{escape(a)} and {escape(b)}" for a, b in ranking["swapped_pairs"]) or "none"
    many = "" if cells is None else f" Over policy and task cells: Spearman {estimate_text(cells)}."
    return (
        "<h2>Does the dream rank policies as the simulator does?</h2>"
        f"<p>{ranking['n_policies']} policies on {ranking['n_starts']} starts. Spearman {estimate_text(ranking['spearman'])}, "
        f"Kendall {estimate_text(ranking['kendall'])}.{many} Pairs in the wrong order: {swapped}.</p>"
        '<p class="muted">Intervals resample starts: they speak of these policies, of which there are '
        f"{ranking['n_policies']}, not of policies in general.</p>"
    )


_COLOUR = {1: pictures.GREEN, 0: pictures.RED, -1: pictures.GREY}


def clip_frames(clip: Clip, min_side: int = 192) -> UInt8Array:
    """The film of a clip: simulator left, dream right, borders by outcome (green, red, grey; amber: flagged)."""
    record = clip.record
    colours = (_COLOUR[int(clip.happened)], pictures.AMBER if record.flagged else _COLOUR[record.dream])
    scale = -(-min_side // clip.left.shape[1])
    left, right = (
        pictures.border(pictures.upscale(frames, scale), colour, 6)
        for frames, colour in zip((clip.left, clip.right), colours, strict=True)
    )
    return pictures.beside(left, right, gap=4, gap_level=128)


def _films(clips: Sequence[Clip], fps: float) -> str:
    if not clips:
        return ""
    figures = []
    for clip in clips:
        data = base64.b64encode(pictures.mp4_bytes(clip_frames(clip), fps)).decode("ascii")
        record = clip.record
        flagged = " Flagged by the second dream." if record.flagged else ""
        actions = "same actions" if clip.same_actions else "the policy acts in each"
        figures.append(
            f'<figure><div class="names"><span>simulator</span><span>dream</span></div>'
            f'<video autoplay loop muted playsinline controls preload="auto" src="data:video/mp4;base64,{data}"></video>'
            f"<figcaption><b>{escape(clip.kind)}</b>{escape(clip.instruction)}<br>"
            f'<span class="muted">{escape(record.policy)}, start {record.index}, {actions}.{flagged}</span></figcaption></figure>'
        )
    return (
        "<h2>Episodes</h2><p>The first of each kind, not the best. Border: "
        '<span class="dot" style="background:rgb(46,160,67)"></span>success '
        '<span class="dot" style="background:rgb(218,54,51)"></span>failure '
        '<span class="dot" style="background:rgb(210,153,34)"></span>dreamed success that did not repeat '
        '<span class="dot" style="background:rgb(139,148,158)"></span>no verdict. '
        "Left by the simulator's predicate, right by the judge.</p>"
        f'<div class="videos">{"".join(figures)}</div>'
    )


def _run(report: Json) -> str:
    run = report["run"]
    hardware = ", ".join(
        f"{key.replace('_', ' ')}: {value}" for key, value in run["hardware"].items() if value is not None
    )
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in report["config"].items())
    return (
        f"<h2>What was run</h2><pre>{escape(run['command'])}</pre><p>{escape(hardware)}</p><p class='muted'>{escape(versions)}</p>"
        f"<details><summary>All settings</summary><pre>{escape(settings)}</pre></details>"
        "<details><summary>How to read this page</summary><p>The policy samples with the same noise in both worlds, so while both show the "
        "same picture it does the same thing. A rate compares populations, agreement compares single episodes: both are "
        "needed, since equal rates can hide that different starts succeed. Kappa is agreement beyond chance. "
        "PSNR is averaged over frames (cut at 60 dB), then episodes. Every number is in report.json, every episode in "
        "episodes.jsonl.</p></details>"
    )
