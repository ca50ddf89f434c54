"""``rawdream policy compare``: success rates of several evaluations side by side, if they follow the same protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from rawdream_env.errors import DatasetError, InvalidOptionError, ProtocolMismatchError, shorten
from rawdream_env.evaluation.reporting.numbers import aligned, rate_text
from rawdream_env.evaluation.side_by_side.ranking import rank_policies, ranking_lines
from rawdream_env.evaluation.side_by_side.records import read_records
from rawdream_env.files import read_json


@dataclass(frozen=True)
class CompareConfig:
    """Options of ``rawdream policy compare``."""

    reports: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that ``rawdream policy evaluate`` has written, two or more."""


def compare(config: CompareConfig) -> str:
    """A table of every policy's success rate in the simulator and in the dream, with 95 % intervals. If all reports have the
    same starts, also how well the dream ranks the policies (checkpoints) of all of them together.

    Raises:
        ProtocolMismatchError: the reports follow different protocols. InvalidOptionError: fewer than two reports.
        DatasetError: a report is missing or damaged.
    """
    if len(config.reports) < 2:
        raise InvalidOptionError(f"{len(config.reports)} reports are given; name two or more folders.")
    advice = "name a folder that `rawdream policy evaluate` has written"
    found = {str(folder): read_json(folder / "report.json", advice, DatasetError) for folder in config.reports}
    require_same_protocol({name: report.get("protocol") for name, report in found.items()})
    rows = [("report", "policy", "simulator", "dream")]
    try:
        for name, report in found.items():
            for policy in report["policies"]:
                rates = (rate_text(policy["all"][world]) for world in ("simulator", "dream_trusted"))
                rows.append((name, policy["name"], *rates))
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{name}/report.json lacks {error}; {advice}.") from error
    return "\n".join([*protocol_lines(next(iter(found.values()))), *aligned(rows), *_ranking(config.reports)])


def _ranking(folders: Sequence[Path]) -> list[str]:
    """How well the dream ranks the policies of all reports together; they need the same starts."""
    if not all((folder / "episodes.jsonl").is_file() for folder in folders):
        return []
    reports = {str(folder): read_records(folder / "episodes.jsonl") for folder in folders}
    starts = [{(record.task, record.index, record.seed) for record in records} for records in reports.values()]
    if any(some != starts[0] for some in starts):
        return ["rank correlation: not measured, because the reports have different starts (tasks, episodes or seed)"]
    joined = [replace(r, policy=f"{name}: {r.policy}") for name, records in reports.items() for r in records]
    return ranking_lines(rank_policies(joined))


def require_same_protocol(protocols: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse to compare results of different protocols. ``protocols``: what each result recorded, by its name; None: the
    environment has none.

    Raises:
        ProtocolMismatchError: two of them differ; the message lists what differs.
    """
    (first, reference), *others = protocols.items()
    for name, protocol in others:
        a, b = dict(reference or {}), dict(protocol or {})
        differ = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
        if differ:
            listed = ", ".join(f"{key} {a.get(key, 'none')} and {b.get(key, 'none')}" for key in differ)
            raise ProtocolMismatchError(
                f"{first} and {name} follow different protocols ({shorten(listed, 300)[1:-1]}), so their success rates "
                "cannot be compared; evaluate both with the same protocol."
            )


def protocol_lines(report: Mapping[str, Any]) -> list[str]:
    """The protocol of a report in one line; no line without one."""
    protocol = report.get("protocol")
    if not protocol:
        return []
    values = ", ".join(f"{key} {value}" for key, value in protocol.items() if key != "name")
    return [f"protocol {protocol.get('name')}: {values}"]
