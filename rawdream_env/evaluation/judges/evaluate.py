"""``rawdream judge evaluate``: measure a judge on episodes with a known outcome.

    rawdream judge evaluate --judge embedded --episodes 500
    rawdream judge evaluate --judge runs/reward/judge --data my_rollouts --out runs/judge

Writes ``judge_report.json`` (every rate with n and its 95 % Wilson interval, per task and per driver, and the sweeps of
the probability threshold and of the number of votes), ``mistakes.png`` (a contact sheet of the most confident wrong
verdicts) and ``judge_report.html`` (table, charts and contact sheet on one page). INVALID verdicts are counted
separately: they never become a reward, so they are neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
from tqdm import tqdm

from rawdream_env.errors import InvalidOptionError
from rawdream_env.evaluation.judges.episodes import FreshEpisodes, fresh_clips, recorded_clips
from rawdream_env.evaluation.judges.report import JudgeClip, JudgeReport, evaluate
from rawdream_env.evaluation.reporting import html
from rawdream_env.evaluation.reporting.charts import Point, Series, line_chart
from rawdream_env.evaluation.reporting.numbers import Json
from rawdream_env.evaluation.reporting.output import writing_results
from rawdream_env.evaluation.reporting.provenance import provenance, usable_cores
from rawdream_env.files import atomic_write_json, atomic_write_text, check_output
from rawdream_env.judges import load_judge
from rawdream_env.types import Judge, SupportsClose

_RATES = {
    "precision": ("precision", "s-dream"),
    "recall": ("recall", "s-last"),
    "false_positive_rate": ("false positives", "s-first"),
}
"""Rates plotted over the thresholds: label and style of the line."""


@dataclass(frozen=True)
class EvaluateJudgeConfig:
    """Options of ``rawdream judge evaluate``."""

    judge: str = "embedded"
    """Judge to evaluate: "embedded", a folder, a server, hub id or module:factory."""
    episodes: int = 200
    """Number of simulator episodes; with ``data``, at most N episodes of each folder."""
    robot: str = ""
    """Robot whose simulator is used; default: the bundled one."""
    data: tuple[str, ...] = ()
    """LeRobotDataset v3.0 folders with success labels, instead of simulator episodes."""
    success_key: str = ""
    """Column of ``data`` with the success labels (the last row of an episode counts); default: detected."""
    drivers: tuple[str, ...] = ("expert", "shaky expert", "policy")
    """Who acts in the simulator episodes, in turn: expert, shaky expert (large action noise), policy."""
    policy: str = "embedded"
    """Policy of the driver "policy": "embedded", a folder, hub id or module:factory."""
    layout: Literal["narrow", "wide"] = "narrow"
    """Start positions of objects: narrow (within 3 cm of the usual place) or wide (the whole workspace)."""
    workers: int = -1
    """Simulator processes; -1: one per core, 0: none besides this one. The result does not depend on it."""
    batch_size: int = 16
    """Videos per call of the judge."""
    mistakes: int = 12
    """Maximum number of wrong verdicts shown."""
    seed: int = 0
    """Seed of the simulator episodes."""
    device: str = "cpu"
    """Torch device of a judge that runs in this process."""
    out: str = "runs/judge_evaluation"
    """Folder for judge_report.html, judge_report.json and mistakes.png."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        minima = {"episodes": 1, "batch_size": 1, "mistakes": 1, "workers": -1}
        for name, minimum in minima.items():
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
            lines.append(f"Best threshold on these episodes: {best['threshold']} (F1 {best['f1']:.3f}).")
        if self.report.vote_sweep:
            best = max(self.report.vote_sweep, key=lambda point: point["f1"] or 0.0)
            lines.append(f"Best number of success votes on these episodes: {best['need']} (F1 {best['f1']:.3f}).")
        return "\n".join([*lines, f"The report is {self.folder}/judge_report.html."])


def evaluate_judge(config: EvaluateJudgeConfig, *, judge: Judge | None = None) -> JudgeEvaluation:
    """Run or read the episodes, query the judge, and write the report.

    ``judge``: evaluate this object instead of loading ``config.judge``.

    Raises:
        InvalidOptionError: no such judge or driver. CheckpointError: the judge or the policy is missing or damaged.
        DatasetError: the data cannot be read or have no labels. RendererError, SimulatorError: the simulator fails.
    """
    check_output(config.out)
    asked = load_judge(config.judge, device=config.device) if judge is None else judge
    begun = perf_counter()
    total = None if config.data else config.episodes
    try:
        bar = tqdm(_source(config), total=total, desc="judge", unit="ep", delay=0.5, disable=not config.progress)
        report = evaluate(asked, bar, batch_size=config.batch_size, worst=config.mistakes)
    finally:
        if judge is None and isinstance(asked, SupportsClose):
            asked.close()
    folder = report.write(config.out)
    timing = {"judge_s_per_video": report.judge_seconds / report.n, "seconds": perf_counter() - begun}
    content = {**report.as_dict(), "run": provenance(config=asdict(config), timing=timing)}
    sheet = (folder / "mistakes.png").read_bytes() if report.mistakes() else None
    settings = {name: _setting(asked, name) for name in ("threshold", "need")}
    with writing_results(folder):
        atomic_write_json(folder / "judge_report.json", content)
        atomic_write_text(folder / "judge_report.html", page(content, sheet, **settings))
    return JudgeEvaluation(report, folder)


def _setting(judge: Judge, name: str) -> float | None:
    """The judge's own threshold or number of votes; None where it has none."""
    value = getattr(judge, name, getattr(getattr(judge, "config", None), name, None))
    return float(value) if isinstance(value, int | float) else None


def _source(config: EvaluateJudgeConfig) -> Iterator[JudgeClip]:
    if config.data:
        return recorded_clips(config.data, success_key=config.success_key, limit=config.episodes)
    spec = FreshEpisodes(config.seed, config.layout, config.policy, drivers=config.drivers, robot=config.robot)
    workers = usable_cores() if config.workers < 0 else config.workers
    return fresh_clips(spec, config.episodes, workers=min(workers, config.episodes))


def page(content: Json, sheet: bytes | None, *, threshold: float | None = None, need: float | None = None) -> str:
    """The report as one HTML page; ``threshold`` and ``need`` are the judge's own, ``sheet`` the contact sheet."""
    config = content["run"]["config"]
    charts = [
        _chart("Rates by threshold", "probability threshold", content["threshold_sweep"], "threshold", threshold),
        _chart("Rates by votes needed", "votes needed for a success", content["vote_sweep"], "need", need),
    ]
    return html.page(
        "judge.html",
        f"Judge evaluation: {config['judge']}",
        content,
        config,
        lines=[(label, css) for label, css in _RATES.values()],
        charts=[chart for chart in charts if chart],
        marked=threshold is not None or need is not None,
        sheet=None if sheet is None else html.base64_text(sheet),
    )


def _chart(title: str, axis: str, sweep: Sequence[Json], key: str, own: float | None) -> str:
    """Precision, recall and false-positive rate over a sweep, the judge's ``own`` setting marked; "" without one."""
    if not sweep:
        return ""
    shown = sweep if len(sweep) <= 12 else sweep[1::2]
    series = [Series(label, css, [_point(entry[name]) for entry in shown]) for name, (label, css) in _RATES.items()]
    settings = [entry[key] for entry in shown]
    mark = None
    if own is not None:
        mark = float(np.interp(own, settings, range(len(settings)))), f"this judge: {own:.3g}"
    return line_chart(title, "%", [f"{value:g}" for value in settings], series, width=560, axis=axis, mark=mark)


def _point(rate: Json) -> Point | None:
    """A rate in percent with its interval."""
    return None if rate["value"] is None else (100 * rate["value"], 100 * rate["low"], 100 * rate["high"])
