"""A side-by-side report as text, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rawdream_env.evaluation.reporting.numbers import rate_text
from rawdream_env.evaluation.side_by_side.compare import protocol_lines


def table(report: Mapping[str, Any]) -> str:
    """Success rates per policy and task in the dream (of trusted episodes) and the simulator, with the dream's INVALID and
    flagged episodes, then the gains and the conclusions.
    """
    lines: list[tuple[str, ...]] = [("policy", "task", "dream", "INVALID", "flagged", "simulator")]
    for entry in report["policies"]:
        parts = {"all tasks": entry["all"], **entry["tasks"]}
        for number, (task, part) in enumerate(parts.items()):
            name = "" if number else entry["name"]
            apart = (str(part["verdicts"][kind]) for kind in ("invalid", "flagged"))
            lines.append((name, task, rate_text(part["dream_trusted"]), *apart, rate_text(part["simulator"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, *protocol_lines(report), *_gains(report), *report["conclusions"]])


def _gains(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for entry in report["policies"]:
        for world, gain in entry.get("gain", {}).items():
            if gain["value"] is None:
                number = f"not measured, n={gain['n']}"
            else:
                known = gain["low"] is not None and gain["high"] is not None
                ends = f"{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}" if known else "no interval"
                number = f"{100 * gain['value']:+.1f} points [{ends}], n={gain['n']} starts"
            lines.append(f"gain of {entry['name']!r} over {report['reference']!r}, {world}: {number}")
    return lines
