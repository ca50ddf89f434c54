"""A side-by-side report as text, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rawdream_env.evaluation.reporting.numbers import rate_text


def table(report: Mapping[str, Any]) -> str:
    """Success rates per policy and task in the dream and the simulator, then the gains and the conclusions."""
    lines = [("policy", "task", "dream", "simulator")]
    for entry in report["policies"]:
        parts = {"all tasks": entry["all"], **entry["tasks"]}
        for number, (task, part) in enumerate(parts.items()):
            name = "" if number else entry["name"]
            lines.append((name, task, rate_text(part["dream"]), rate_text(part["simulator"])))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, *_gains(report), *report["conclusions"]])


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
