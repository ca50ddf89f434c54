"""A side-by-side report as text, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from rawdream_env.evaluation.reporting.numbers import Json, aligned, estimate_text, points_text, rate_text
from rawdream_env.evaluation.side_by_side.compare import protocol_lines
from rawdream_env.evaluation.side_by_side.ranking import ranking_lines

MEASURES = (
    ("closed_loop", "kappa", "same start, own actions"),
    ("dreamed_actions", "kappa", "dreamed actions, judge"),
    ("state_closed_loop", "kappa", "dreamed actions, state"),
    ("simulator_actions", "kappa", "re-imagined, judge"),
    ("state_reimagined", "kappa", "re-imagined, state"),
    ("judge_against_state", "kappa", "judge against state"),
    ("judge_against_state", "false_positive_rate", "its false positives"),
    ("lifts_on_misses", "", "lifts on misses"),
    ("dream_minus_simulator", "", "dream minus simulator"),
)
"""What tells how far the dream can be trusted: key in the report, key of the number in it, title. docs/evaluation.md."""
_COLUMNS_AT_ONCE = 3


def table(report: Mapping[str, Any]) -> str:
    """Success rates per policy and task in the dream (of trusted episodes), the simulator and, with trials, on the arm, with
    the dream's INVALID and flagged episodes; where the dream was diagnosed, how far it can be trusted; then the gains, the rank
    correlation of three policies or more, and the conclusions.
    """
    worlds = ("simulator", "real") if "trials" in report else ("simulator",)
    lines: list[tuple[str, ...]] = [("policy", "task", "dream", "INVALID", "flagged", *worlds)]
    for entry in report["policies"]:
        parts = {"all tasks": entry["all"], **entry["tasks"]}
        for number, (task, part) in enumerate(parts.items()):
            name = "" if number else entry["name"]
            apart = (str(part["verdicts"][kind]) for kind in ("invalid", "flagged"))
            lines.append(
                (name, task, rate_text(part["dream_trusted"]), *apart, *(rate_text(part[world]) for world in worlds))
            )
    diagnoses = [_trust(entry) for entry in report["policies"] if "dreamed_actions" in entry["all"]]
    rest = [*chain.from_iterable(diagnoses), *_gains(report), *_ranking(report), *report["conclusions"]]
    return "\n".join([*_ruled(lines), *protocol_lines(report), *rest])


def measure_text(part: Json, name: str, number: str) -> str:
    """One of ``MEASURES`` of a task or of all tasks."""
    if name not in part:
        return "not measured"
    if name == "dream_minus_simulator":
        return points_text(part[name])
    if number == "kappa":
        return estimate_text(part[name][number])
    return rate_text(part[name][number] if number else part[name])


def trust_table(entry: Json) -> list[list[str]]:
    """``MEASURES`` of a policy: a row of titles, then a row for every task and one for all; what is measured nowhere is left
    out.
    """
    parts = {**entry["tasks"], "all tasks": entry["all"]}
    measures = [measure for measure in MEASURES if any(measure[0] in part for part in parts.values())]
    titles = ["task", *(title for *_, title in measures)]
    return [titles, *([task, *(measure_text(part, *keys) for *keys, _ in measures)] for task, part in parts.items())]


def _trust(entry: Json) -> list[str]:
    """The table of a policy, a few columns at a time."""
    out = ["", f"{entry['name']}: how far the dream can be trusted (kappa, or per cent; docs/evaluation.md)"]
    rows = trust_table(entry)
    for first in range(1, len(rows[0]), _COLUMNS_AT_ONCE):
        out += ["", *_ruled([(row[0], *row[first : first + _COLUMNS_AT_ONCE]) for row in rows])]
    return [*out, ""]


def _ruled(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, a rule below the first line."""
    first, *rest = aligned(rows)
    return [first, "-" * max(map(len, (first, *rest))), *rest]


def _ranking(report: Mapping[str, Any]) -> list[str]:
    ranking = report.get("ranking")
    return [] if ranking is None else ranking_lines(ranking)


def _gains(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for entry in report["policies"]:
        for world, gain in entry.get("gain", {}).items():
            lines.append(f"gain of {entry['name']!r} over {report['reference']!r}, {world}: {points_text(gain)} starts")
    return lines
