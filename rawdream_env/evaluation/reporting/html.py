"""The pieces a report is put together from: elements, rates with a bar for their interval, confusion tables, the page.

Text is escaped where it enters (``text``, attribute values); ``element`` takes parts that are HTML already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rawdream_env.evaluation.reporting.style import CSS

Json = Mapping[str, Any]


def text(value: object) -> str:
    """Any value as escaped text."""
    return escape(str(value))


def element(tag: str, *parts: str, css: str = "", **attributes: object) -> str:
    """One element around ``parts`` (HTML); ``css`` is its class."""
    named = {"class": css, **attributes} if css else attributes
    inner = "".join(f' {name}="{escape(str(value))}"' for name, value in named.items())
    return f"<{tag}{inner}>{''.join(parts)}</{tag}>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells (HTML, with their own td or th) under ``head`` (text)."""
    top = element("tr", *[element("th", text(name)) for name in head])
    body = "".join(element("tr", *cells) for cells in rows)
    return element("div", element("table", element("thead", top), element("tbody", body)), css="scroll")


def cells(*values: str) -> list[str]:
    """Plain cells of escaped text."""
    return [element("td", text(value)) for value in values]


def rate_text(rate: Json) -> str:
    """A rate's JSON form as "54.0 % [47.1, 60.8], n=200"."""
    if rate["value"] is None:
        return f"not measured, n={rate['n']}"
    return f"{100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}], n={rate['n']}"


def percent(rate: Json) -> str:
    """A rate's JSON form as "54 % (n=200)", for places whose interval stands elsewhere."""
    return "not measured" if rate["value"] is None else f"{100 * rate['value']:.0f} % (n={rate['n']})"


def _fixed(value: float, digits: int) -> str:
    """``value`` with so many digits; a rounded minus zero is zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def estimate_text(estimate: Json, digits: int = 2) -> str:
    """An estimate's JSON form as "0.40 [0.15, 0.65], n=50"."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return f"not defined, n={estimate['n']}"
    ends = "no interval" if low is None or high is None else f"{_fixed(low, digits)}, {_fixed(high, digits)}"
    return f"{_fixed(value, digits)} [{ends}], n={estimate['n']}"


def rate_cell(rate: Json | None, css: str) -> str:
    """A table cell with the rate, a bar for its interval, and n."""
    if rate is None or rate["value"] is None:
        return element("td", "not measured", css="muted")
    value, low, high = (100 * rate[key] for key in ("value", "low", "high"))
    bar = element("i", style=f"left:{low:.1f}%;width:{high - low:.1f}%")
    mark = element("u", style=f"left:calc({value:.1f}% - 1px)")
    interval = element("span", f"[{low:.1f}, {high:.1f}], n={rate['n']}", css="ci")
    return element("td", f"<b>{value:.1f} %</b>", element("div", bar, mark, css="meter"), interval, css=f"rate {css}")


def gain_cell(gain: Json | None) -> str:
    """A table cell with a difference in points; None: this row is what the others are compared with."""
    if gain is None:
        return element("td", "reference", css="muted")
    if gain["value"] is None:
        return element("td", "not measured", css="muted")
    ends = "no interval"
    if gain["low"] is not None and gain["high"] is not None:
        ends = f"[{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
    interval = element("span", f"{ends}, n={gain['n']} starts", css="ci")
    return element("td", f"<b>{100 * gain['value']:+.1f}</b> points", interval, css="rate")


def matrix(title: str, note: str, rater: str, confusion: Json) -> str:
    """A confusion table with what follows from it."""
    rows = []
    names = (("success", "true_positive", "false_positive"), ("failure", "false_negative", "true_negative"))
    for answer, left, right in names:
        counts = [(confusion[key], "yes" if key.startswith("true") else "no") for key in (left, right)]
        head = element("th", answer)
        rows.append([head, *[element("td", text(count), css=css) for count, css in counts]])
    f1 = "not defined" if confusion["f1"] is None else f"{confusion['f1']:.2f}"
    lines = [f"{name} {rate_text(confusion[name])}" for name in ("agreement", "precision", "recall")]
    lines += [f"kappa {estimate_text(confusion['kappa'])}", f"F1 {f1}"]
    return element(
        "div",
        element("h3", text(title)),
        element("p", text(note), css="muted"),
        table([f"{rater} says", "true success", "true failure"], rows),
        element("p", "<br>".join(text(line) for line in lines)),
        css="matrix",
    )


def page(title: str, sections: Sequence[str]) -> str:
    """The whole document around ``sections`` (HTML), with its style."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{CSS}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def when(report: Json) -> str:
    """The time in a report's provenance, for people."""
    return str(report["run"]["time"]).replace("T", " ").replace("+00:00", " UTC")


def what_was_run(report: Json, reading: str) -> str:
    """The last section: command, hardware, versions, settings, and ``reading``: how to read the page (text)."""
    run = report["run"]
    known = {key.replace("_", " "): value for key, value in run["hardware"].items() if value is not None}
    hardware = ", ".join(f"{key}: {value}" for key, value in known.items())
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in report["config"].items())
    return "".join(
        [
            element("h2", "What was run"),
            element("pre", text(run["command"])),
            element("p", text(hardware)),
            element("p", text(versions), css="muted"),
            element("details", element("summary", "All settings"), element("pre", text(settings))),
            element("details", element("summary", "How to read this page"), element("p", text(reading))),
        ]
    )
