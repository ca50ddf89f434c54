"""``rawdream judge evaluate``: how far a judge can be trusted, against the truth of simulator episodes.

    rawdream judge evaluate --judge embedded --episodes 500
    rawdream judge evaluate --judge runs/reward/judge --data my_rollouts --out runs/judge

Writes ``judge_report.json`` (every rate with n and its 95 % Wilson interval, per task and per driver, and the sweeps of
the probability threshold and of the number of votes), ``mistakes.png`` (a contact sheet of the most confident wrong
verdicts) and ``judge_report.html`` (table, plot and contact sheet on one page). INVALID verdicts are counted apart:
they are neither right nor wrong, because they never become a reward.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from tqdm import tqdm

from rawdream_env.errors import InvalidOptionError
from rawdream_env.evaluation.judges.episodes import FreshEpisodes, fresh_clips, recorded_clips
from rawdream_env.evaluation.judges.report import JudgeClip, JudgeReport, report_on
from rawdream_env.evaluation.reporting.charts import Series, line_chart
from rawdream_env.evaluation.reporting.html import cells, element, rate_text, table, text
from rawdream_env.evaluation.reporting.provenance import provenance, usable_cores
from rawdream_env.evaluation.reporting.style import CSS
from rawdream_env.files import atomic_write_json, atomic_write_text
from rawdream_env.judges import load_judge
from rawdream_env.types import Judge, Verdict

RATES = {"precision": "s-dream", "recall": "s-last", "false_positive_rate": "s-first"}
"""What is plotted over the thresholds, and the style of its line."""


@dataclass(frozen=True)
class EvaluateJudgeConfig:
    """Options of ``rawdream judge evaluate``."""

    judge: str = "embedded"
    """"embedded", or the folder or address of a judge, as for the environments."""
    episodes: int = 200
    """Fresh Piper episodes; of a data set the first so many of each folder, at most."""
    data: tuple[str, ...] = ()
    """LeRobotDataset v3.0 folders with success labels, instead of fresh episodes."""
    success_key: str = ""
    """Column of ``data`` that says whether an episode succeeded (its last row counts); default: looked for."""
    drivers: tuple[str, ...] = ("expert", "shaky expert", "policy")
    """Who drives the fresh episodes, in turn."""
    policy: str = "embedded"
    """The policy that drives, by name or folder."""
    layout: Literal["narrow", "wide"] = "narrow"
    """How far the objects of fresh episodes are scattered."""
    workers: int = -1
    """Simulator processes; -1: one per core, 0: none besides this one. The result does not depend on it."""
    batch_size: int = 16
    """Videos per call of the judge."""
    mistakes: int = 12
    """Wrong verdicts on the contact sheet."""
    seed: int = 0
    """Names the fresh episodes."""
    device: str = "cpu"
    """Where a judge that computes runs."""
    out: str = "runs/judge_evaluation"
    """Folder of the report."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        lowest = {"episodes": 1, "batch_size": 1, "mistakes": 1, "workers": -1}
        for name, minimum in lowest.items():
            if getattr(self, name) < minimum:
                raise InvalidOptionError(f"{name}={getattr(self, name)} must be at least {minimum}.")


@dataclass(frozen=True)
class JudgeEvaluation:
    """The report, and the folder it was written to."""

    report: JudgeReport
    folder: Path

    def __str__(self) -> str:
        lines = [self.report.table()]
        if self.report.sweep:
            best = max(self.report.sweep, key=lambda point: point["f1"] or 0.0)
            lines.append(f"Best F1 {best['f1']:.3f} of the sweep at threshold {best['threshold']}.")
        if self.report.vote_sweep:
            best = max(self.report.vote_sweep, key=lambda point: point["f1"] or 0.0)
            lines.append(f"Best F1 {best['f1']:.3f} of the sweep when a success needs {best['need']} votes.")
        return "\n".join([*lines, f"The report is {self.folder}/judge_report.html."])


def evaluate_judge(config: EvaluateJudgeConfig, *, judge: Judge | None = None) -> JudgeEvaluation:
    """Collect, ask, count and write; see the module's text.

    ``judge``: measure this object instead of loading ``config.judge``.

    Raises:
        InvalidOptionError, CheckpointError: no such judge or driver, or damaged. DatasetError: the data cannot be read or
        hold no labels. RendererError, SimulatorError: fresh episodes cannot be played.
    """
    asked = load_judge(config.judge, device=config.device) if judge is None else judge
    clips: list[JudgeClip] = []
    verdicts: list[Verdict] = []
    begun, judging = perf_counter(), 0.0
    total = None if config.data else config.episodes
    try:
        bar = tqdm(_source(config), total=total, desc="judge", unit="ep", disable=not config.progress)
        for part in _batches(bar, config.batch_size):
            asked_at = perf_counter()
            answers = asked([clip.video for clip in part], [clip.instruction for clip in part])
            judging += perf_counter() - asked_at
            if len(answers) != len(part):
                raise InvalidOptionError(
                    f"{type(asked).__name__} gave {len(answers)} verdicts for {len(part)} videos; it owes one each."
                )
            clips += part
            verdicts += answers
    finally:
        if judge is None and callable(close := getattr(asked, "close", None)):
            close()
    report = report_on(clips, verdicts)
    folder = report.write(config.out, limit=config.mistakes)
    timing = {"judge_s_per_video": judging / len(clips), "seconds": perf_counter() - begun}
    run = provenance(config=asdict(config), timing=timing)
    content = {**report.as_dict(), "run": run}
    atomic_write_json(folder / "judge_report.json", content)
    atomic_write_text(folder / "judge_report.html", page(content, folder / "mistakes.png"))
    return JudgeEvaluation(report, folder)


def _source(config: EvaluateJudgeConfig) -> Iterator[JudgeClip]:
    if config.data:
        return recorded_clips(config.data, success_key=config.success_key, limit=config.episodes)
    spec = FreshEpisodes(config.seed, config.layout, config.policy, drivers=config.drivers)
    workers = usable_cores() if config.workers < 0 else config.workers
    return fresh_clips(spec, config.episodes, workers=min(workers, config.episodes))


def _batches(clips: Iterable[JudgeClip], size: int) -> Iterator[list[JudgeClip]]:
    iterator = iter(clips)
    while part := list(islice(iterator, size)):
        yield part


def page(content: Mapping[str, Any], sheet: Path) -> str:
    """The report as one HTML page that loads nothing from anywhere."""
    config = content["run"]["config"]
    rows = []
    for name, row in content["groups"].items():
        f1 = "not defined" if row["f1"] is None else f"{row['f1']:.3f}"
        rates = [rate_text(row[key]) for key in (*RATES, "invalid")]
        rows.append([element("th", text(name)), *cells(str(row["invalid"]["n"]), *rates, f1)])
    head = ["", "episodes", "precision", "recall", "false positives", "INVALID", "F1"]
    named = {"s-dream": "precision", "s-last": "recall", "s-first": "false positives"}
    key = [element("span", element("i", css=css), text(label)) for css, label in named.items()]
    charts = [
        _chart("Other thresholds", "probability threshold", content["threshold_sweep"], "threshold"),
        _chart("Other numbers of votes", "votes a success needs", content["vote_sweep"], "need"),
    ]
    picture = element("p", "There were no mistakes.")
    if sheet.is_file():
        encoded = base64.b64encode(sheet.read_bytes()).decode("ascii")
        picture = (
            f'<figure><img alt="the worst mistakes" style="width:100%" src="data:image/png;base64,{encoded}"></figure>'
        )
    title = f"How far to trust the judge {config['judge']}"
    note = (
        "Brackets are 95 % Wilson intervals. A label is the truth when the video ends. INVALID verdicts count in no rate but "
        "their own. The contact sheet has the most confident wrong verdicts, start frame left, last frame right."
    )
    main = "".join([
        element("h1", text(title)), element("p", text(note), css="muted"), table(head, rows),
        element("h2", "Thresholds"), element("p", *key, css="key"), element("div", *charts, css="charts"),
        element("h2", "Worst mistakes"), picture,
        element("h2", "What was run"), element("pre", text(content["run"]["command"])),
        element("details", element("summary", "All settings"), element("pre", text(json.dumps(content["run"], indent=1)))),
    ])  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f"<style>{CSS}</style></head><body><main>{main}</main></body></html>\n"
    )


def _chart(title: str, axis: str, sweep: list[dict[str, Any]], key: str) -> str:
    """Precision, recall and false-positive rate over a sweep; nothing for judges without one."""
    if not sweep:
        return ""
    shown = sweep if len(sweep) <= 12 else sweep[1::2]
    point: Callable[[Any], tuple[float, float, float] | None] = lambda rate: (  # noqa: E731
        None if rate["value"] is None else (100 * rate["value"], 100 * rate["low"], 100 * rate["high"])
    )
    series = [Series(name, css, [point(entry[name]) for entry in shown]) for name, css in RATES.items()]
    return line_chart(title, "%", [f"{entry[key]:g}" for entry in shown], series, width=560, axis=axis)
