"""``rawdream judge evaluate``: how far a judge can be trusted, against the truth of simulator episodes.

    rawdream judge evaluate --judge embedded --episodes 500
    rawdream judge evaluate --judge runs/reward/judge --data my_rollouts --out runs/judge

Writes ``judge_report.json`` (every rate with n and its 95 % Wilson interval, per task and per driver, and the sweeps of
the probability threshold and of the number of votes), ``mistakes.png`` (a contact sheet of the most confident wrong
verdicts) and ``judge_report.html`` (table, plot and contact sheet on one page). INVALID verdicts are counted apart:
they are neither right nor wrong, because they never become a reward.
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
from rawdream_env.evaluation.reporting.provenance import provenance, usable_cores
from rawdream_env.files import atomic_write_json, atomic_write_text, check_output
from rawdream_env.judges import load_judge
from rawdream_env.types import Judge

_RATES = {
    "precision": ("precision", "s-dream"),
    "recall": ("recall", "s-last"),
    "false_positive_rate": ("false positives", "s-first"),
}
"""What is plotted over the thresholds: its name and the style of its line."""


@dataclass(frozen=True)
class EvaluateJudgeConfig:
    """Options of ``rawdream judge evaluate``."""

    judge: str = "embedded"
    """"embedded", or the folder or address of a judge, as for the environments."""
    episodes: int = 200
    """Number of fresh episodes; of a data set, at most N episodes of each folder."""
    robot: str = ""
    """Robot whose simulator plays the fresh episodes; the default robot when not given."""
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
    check_output(config.out)
    asked = load_judge(config.judge, device=config.device) if judge is None else judge
    begun = perf_counter()
    total = None if config.data else config.episodes
    try:
        bar = tqdm(_source(config), total=total, desc="judge", unit="ep", disable=not config.progress)
        report = evaluate(asked, bar, batch_size=config.batch_size, worst=config.mistakes)
    finally:
        if judge is None and callable(close := getattr(asked, "close", None)):
            close()
    folder = report.write(config.out)
    timing = {"judge_s_per_video": report.judge_seconds / report.n, "seconds": perf_counter() - begun}
    content = {**report.as_dict(), "run": provenance(config=asdict(config), timing=timing)}
    atomic_write_json(folder / "judge_report.json", content)
    sheet = (folder / "mistakes.png").read_bytes() if report.mistakes() else None
    settings = {name: _setting(asked, name) for name in ("threshold", "need")}
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
        _chart("Other thresholds", "probability threshold", content["threshold_sweep"], "threshold", threshold),
        _chart("Other numbers of votes", "votes a success needs", content["vote_sweep"], "need", need),
    ]
    return html.page(
        "judge.html",
        f"How far to trust the judge {config['judge']}",
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
