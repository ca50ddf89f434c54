"""Does the dream order policies and tasks like the simulator? Correlations and MMRV of the success rates of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.evaluation.reporting.numbers import Json, estimate_text
from rawdream_env.evaluation.side_by_side.records import EpisodeRecord
from rawdream_env.statistics import bootstrap, kendall_tau, mean_maximum_rank_violation, pearson, spearman

Float64Array = NDArray[np.float64]

RANKINGS: dict[str, tuple[str, Callable[[Float64Array, Float64Array], float]]] = {
    "pearson": ("Pearson", pearson),
    "spearman": ("Spearman", spearman),
    "kendall": ("Kendall", kendall_tau),
    "mmrv": ("MMRV", mean_maximum_rank_violation),
}
"""Key in the report -> title, function of the rates (in the dream, in the simulator)."""


def rank_policies(records: Sequence[EpisodeRecord], *, resamples: int = 500, seed: int = 0) -> dict[str, Any]:
    """``RANKINGS`` of the policies' success rates in the dream and in the simulator, and the same in ``cells``: of the
    success rates of every policy at every task, which are more points but also reflect the difficulty of the tasks.

    The dream's rates are over trusted episodes. Intervals resample *starts* (the same ones for every policy): they hold for
    these policies and tasks, not for others. Resampled rates scatter more than the rates themselves, which weakens the
    correlations: near 1 their intervals lie too low, and may not reach the estimate. MMRV is never negative, so noise alone
    raises it.
    """
    policies = list(dict.fromkeys(r.policy for r in records))
    tasks = list(dict.fromkeys(r.task for r in records))
    starts = list(dict.fromkeys((r.task, r.index) for r in records))
    where = {start: i for i, start in enumerate(starts)}
    shape = (len(policies), len(starts))
    dream, simulator = np.full(shape, np.nan), np.full(shape, np.nan)
    for r in records:
        at = policies.index(r.policy), where[r.task, r.index]
        simulator[at] = r.simulator
        if r.trusted:
            dream[at] = r.dream
    task_of = np.array([tasks.index(task) for task, _ in starts])
    everything = np.arange(len(starts))

    def rates(table: Float64Array, rows: NDArray[np.int64], by_task: bool) -> Float64Array:
        part, kinds = table[:, rows], task_of[rows]
        groups = [kinds == t for t in range(len(tasks))] if by_task else [np.ones(len(rows), bool)]
        return np.concatenate([_nan_means(part[:, g]) for g in groups])

    def on(measure: Callable[[Float64Array, Float64Array], float], by_task: bool, rows: NDArray[np.int64]) -> float:
        x, y = rates(dream, rows, by_task), rates(simulator, rows, by_task)
        good = np.isfinite(x) & np.isfinite(y)
        return float(measure(x[good], y[good]))

    def ranked(by_task: bool) -> dict[str, Any]:
        return {
            name: bootstrap(partial(on, measure, by_task), len(starts), resamples=resamples, seed=seed).as_dict()
            for name, (_, measure) in RANKINGS.items()
        }

    in_dream, in_simulator = rates(dream, everything, False), rates(simulator, everything, False)
    return {
        "policies": [
            {"name": name, "dream": _number(d), "simulator": _number(s)}
            for name, d, s in zip(policies, in_dream, in_simulator, strict=True)
        ],
        "n_policies": len(policies),
        "n_starts": len(starts),
        **ranked(False),
        "cells": {"n": len(policies) * len(tasks), **ranked(True)} if len(tasks) > 1 else None,
        "swapped_pairs": _swapped(policies, in_dream, in_simulator),
    }


def ranking_lines(ranking: Json) -> list[str]:
    """The rank correlations over three policies or more, and over three success rates of a policy at a task or more."""
    over = [(f"rank correlation of {ranking['n_policies']} policies", ranking["n_policies"], ranking)]
    if cells := ranking["cells"]:
        what = "tasks" if ranking["n_policies"] == 1 else "(policy, task) pairs"
        over.append((f"rank correlation of {cells['n']} {what}", cells["n"], cells))
    return [
        f"{title}, n starts: "
        + ", ".join(f"{word} {estimate_text(part[name])}" for name, (word, _) in RANKINGS.items())
        for title, points, part in over
        if points > 2  # the order of two is in the gain
    ]


def _nan_means(table: Float64Array) -> Float64Array:
    """Row means over the known entries; NaN where a row has none."""
    known = np.isfinite(table)
    count = known.sum(1)
    means: Float64Array = np.where(known, table, 0.0).sum(1) / np.where(count > 0, count, np.nan)
    return means


def _swapped(names: Sequence[str], dream: Float64Array, simulator: Float64Array) -> list[list[str]]:
    """Pairs of policies that dream and simulator rank in opposite order."""
    pairs = itertools.combinations(range(len(names)), 2)
    return [[names[i], names[j]] for i, j in pairs if (dream[i] - dream[j]) * (simulator[i] - simulator[j]) < 0]


def _number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None
