"""Small-sample statistics for success rates and gains, so that every number is reported with its interval.

Only numpy and the standard library. What is here, and when to use it:

- one success rate: :class:`Rate` (Wilson score interval);
- before and after on the *same* episodes, seeds or tasks: :func:`paired_bootstrap`;
- a mean over training runs with different seeds: :func:`mean_of_runs`;
- agreement of two evaluations on the order of policies: :func:`spearman`, :func:`kendall_tau`;
- two binary raters of the same episodes: :class:`Confusion` (agreement, Cohen's kappa, precision, recall).

No interval claims certainty. Where every unit is equal, resampling returns the same value each time: rates and paired
differences of outcomes then use a closed form, and other statistics have no interval.

References: Wilson 1927; Agresti and Min 2005 (paired differences); Kendall 1945 (tau-b); Cohen 1960; Li et al. 2024 (MMRV).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64Array = NDArray[np.float64]


def _z(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}; use for example 0.95")
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)


def _check_counts(successes: int, n: int) -> None:
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n, got successes={successes}, n={n}")


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, both ends in [0, 1]; (0, 1) when ``n`` is 0."""
    _check_counts(successes, n)
    z = _z(confidence)
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The ends are exactly 0 and 1 at 0 and n successes; rounding must not move them.
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if successes == n else min(1.0, (centre + half) / scale)
    return low, high


def paired_interval(gained: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two success rates over the same ``n`` units (Agresti and Min 2005).

    ``gained`` and ``lost`` count the discordant pairs: only the second outcome is a success, or only the first. The Wald
    interval with half a count added to each of the four cells has a width even without discordant pairs. (-1, 1) when
    ``n`` is 0.
    """
    if gained < 0 or lost < 0 or gained + lost > n:
        raise ValueError(f"need gained + lost <= n, got gained={gained}, lost={lost}, n={n}")
    z = _z(confidence)
    if n == 0:
        return -1.0, 1.0
    b, c, total = gained + 0.5, lost + 0.5, n + 2
    centre = (b - c) / total
    half = z * math.sqrt(max(0.0, (b + c) / total - centre**2) / total)
    return max(-1.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Rate:
    """A success rate with its Wilson interval. Build it with :meth:`of` or :meth:`over`.

    >>> print(Rate.of(108, 200))
    54.0 % [47.1, 60.8], n=200
    """

    successes: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, successes: int, n: int, confidence: float = 0.95) -> Rate:
        """Rate from counts."""
        low, high = wilson_interval(int(successes), int(n), confidence)
        return cls(int(successes), int(n), low, high)

    @classmethod
    def over(cls, outcomes: Iterable[bool], confidence: float = 0.95) -> Rate:
        """Rate from individual outcomes."""
        values = [bool(x) for x in outcomes]
        return cls.of(sum(values), len(values), confidence)

    @property
    def value(self) -> float:
        """Successes / n; NaN when n is 0."""
        return self.successes / self.n if self.n else math.nan

    def __str__(self) -> str:
        if self.n == 0:
            return "not measured, n=0"
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}], n={self.n}"

    def as_dict(self) -> dict[str, Any]:
        """JSON form; ``value`` is None when n is 0."""
        value = self.value if self.n else None
        return {"successes": self.successes, "n": self.n, "value": value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; NaN anywhere means that part could not be computed. ``n`` is what was resampled."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"not measured, n={self.n}"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{self.value:.3f} [no interval], n={self.n}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n={self.n}"

    def as_dict(self) -> dict[str, Any]:
        """JSON form with None for NaN."""
        ends = {"value": self.value, "low": self.low, "high": self.high}
        return {**{k: v if math.isfinite(v) else None for k, v in ends.items()}, "n": self.n}


def _percentile(value: float, draws: Float64Array, n: int, confidence: float) -> Estimate:
    """Interval from resampled values; those that are NaN (say, a correlation of constants) are left out.

    Equal values give no interval: one of zero width would claim certainty.
    """
    usable = draws[np.isfinite(draws)]
    if len(usable) < 10 or np.allclose(usable, usable[0], rtol=1e-12, atol=0.0):
        return Estimate(value, math.nan, math.nan, n)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(usable, [tail, 100.0 - tail])
    return Estimate(value, float(low), float(high), n)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    n: int,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap of ``statistic(rows)`` over ``n`` units; ``rows`` are indices drawn with replacement.

    Resamples on which the statistic is NaN are left out of the interval. Fewer than ten usable resamples, or resamples
    that all give the same value, give NaN ends.
    """
    _z(confidence)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(rng.integers(0, n, n)) for _ in range(resamples)], dtype=np.float64)
    return _percentile(statistic(np.arange(n)), draws, n, confidence)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Ratio of sums with a percentile bootstrap over paired units; without ``denominator`` a mean."""
    _z(confidence)
    top = np.asarray(numerator, dtype=np.float64).ravel()
    bottom = np.ones(len(top)) if denominator is None else np.asarray(denominator, dtype=np.float64).ravel()
    if top.shape != bottom.shape:
        raise ValueError(f"a ratio needs pairs, got {top.size} numerators and {bottom.size} denominators")
    n = len(top)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(seed)
    block = max(1, 1_000_000 // n)  # bounds the memory of one block of resamples
    tops, bottoms = np.empty(resamples), np.empty(resamples)
    for first in range(0, resamples, block):
        rows = rng.integers(0, n, (min(block, resamples - first), n))
        tops[first : first + block], bottoms[first : first + block] = top[rows].sum(1), bottom[rows].sum(1)
    draws = np.where(bottoms != 0, tops / np.where(bottoms != 0, bottoms, 1.0), np.nan)
    value = float(top.sum() / bottom.sum()) if bottom.sum() else math.nan
    return _percentile(value, draws, n, confidence)


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean of ``after - before`` over paired units (episodes of one start, training seeds, tasks) with its interval.

    Where every pair differs by the same amount, outcomes (0 or 1) get the :func:`paired_interval` and other values no
    interval.
    """
    a, b = np.asarray(before, dtype=np.float64).ravel(), np.asarray(after, dtype=np.float64).ravel()
    if a.shape != b.shape:
        raise ValueError(f"paired values must match: before has {a.size}, after has {b.size}")
    difference, n = b - a, len(a)
    outcomes = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    if n and outcomes and (difference == difference[0]).all():
        gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
        return Estimate(float(difference[0]), *paired_interval(gained, lost, n, confidence), n)
    return bootstrap_ratio(difference, confidence=confidence, resamples=resamples, seed=seed)


_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""0.975 quantiles of Student's t distribution with 1, 2, ... degrees of freedom."""


def mean_of_runs(values: ArrayLike) -> Estimate:
    """Mean over few independent runs (training seeds) with its 95 % t interval; one run has no interval."""
    x = np.asarray(values, dtype=np.float64).ravel()
    n = len(x)
    if n < 2:
        return Estimate(float(x[0]) if n else math.nan, math.nan, math.nan, n)
    quantile = _STUDENT[n - 2] if n - 2 < len(_STUDENT) else _z(0.95)
    mean, half = float(x.mean()), float(quantile * x.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def ranks(values: ArrayLike) -> Float64Array:
    """Ranks from 1, ties share their mean rank."""
    x = np.asarray(values, dtype=np.float64).ravel()
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Float64Array = (last - (counts - 1) / 2.0)[inverse]
    return mean_rank


def _pairs(x: ArrayLike, y: ArrayLike) -> tuple[Float64Array, Float64Array]:
    a, b = np.asarray(x, dtype=np.float64).ravel(), np.asarray(y, dtype=np.float64).ravel()
    if a.shape != b.shape:
        raise ValueError(f"correlation needs equally many values, got {a.size} and {b.size}")
    return a, b


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson correlation; NaN when either side is constant or has fewer than two values."""
    a, b = _pairs(x, y)
    if len(a) < 2:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rho: Pearson correlation of the ranks; NaN when either side is constant."""
    a, b = _pairs(x, y)
    return pearson(ranks(a), ranks(b))


def kendall_tau(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b, which corrects for ties; NaN when either side is constant."""
    a, b = _pairs(x, y)
    upper = np.triu_indices(len(a), 1)
    sign_a = np.sign(a[:, None] - a[None, :])[upper]
    sign_b = np.sign(b[:, None] - b[None, :])[upper]
    scale = math.sqrt(float(sign_a @ sign_a) * float(sign_b @ sign_b))
    return float(sign_a @ sign_b) / scale if scale > 0 else math.nan


def mean_maximum_rank_violation(predicted: ArrayLike, actual: ArrayLike) -> float:
    """MMRV (SIMPLER, Li et al. 2024, arXiv 2405.05941, section III-B, equations 1 and 2): how much performance wrong
    comparisons cost, 0 at best.

    Item i violates the order with item j when ``predicted`` says that i is worse than j and ``actual`` does not, or the other
    way round; that costs the difference of their actual values. Per item the highest cost counts, and then the mean over the
    items. NaN where ``actual`` is constant, because nothing can be wrong (0 in the paper's equations), and for fewer than two
    values. At ties the authors' code asks which is better instead of which is worse, so there its value may differ.
    """
    p, a = _pairs(predicted, actual)
    if len(a) < 2 or (a == a[0]).all():
        return math.nan
    wrong = (p[:, None] < p[None, :]) != (a[:, None] < a[None, :])
    return float((np.abs(a[:, None] - a[None, :]) * wrong).max(axis=1).mean())


@dataclass(frozen=True)
class Confusion:
    """Two binary raters over the same episodes: ``predicted`` (a judge, the dream) against ``actual`` (the truth)."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    @classmethod
    def over(cls, predicted: ArrayLike, actual: ArrayLike) -> Confusion:
        """Count two boolean sequences of one length."""
        p, a = np.asarray(predicted, dtype=bool).ravel(), np.asarray(actual, dtype=bool).ravel()
        if p.shape != a.shape:
            raise ValueError(f"confusion needs equally many labels, got {p.size} predicted and {a.size} actual")
        return cls(int((p & a).sum()), int((p & ~a).sum()), int((~p & a).sum()), int((~p & ~a).sum()))

    @property
    def n(self) -> int:
        """Number of episodes."""
        return self.true_positive + self.false_positive + self.false_negative + self.true_negative

    @property
    def agreement(self) -> Rate:
        """Share of equal answers."""
        return Rate.of(self.true_positive + self.true_negative, self.n)

    @property
    def precision(self) -> Rate:
        """Share of predicted successes that are successes."""
        return Rate.of(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> Rate:
        """Share of successes that were predicted."""
        return Rate.of(self.true_positive, self.true_positive + self.false_negative)

    @property
    def false_positive_rate(self) -> Rate:
        """Share of failures that were predicted to be successes."""
        return Rate.of(self.false_positive, self.false_positive + self.true_negative)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; NaN when there is no positive on either side."""
        total = 2 * self.true_positive + self.false_positive + self.false_negative
        return 2 * self.true_positive / total if total else math.nan

    @property
    def kappa(self) -> Estimate:
        """Cohen's kappa, see :func:`cohen_kappa`."""
        return cohen_kappa(self)

    def as_dict(self) -> dict[str, Any]:
        """JSON form: counts, rates with intervals, F1 and kappa."""
        counts = {
            "true_positive": self.true_positive,
            "false_positive": self.false_positive,
            "false_negative": self.false_negative,
            "true_negative": self.true_negative,
        }
        names = ("agreement", "precision", "recall", "false_positive_rate")
        rates = {name: getattr(self, name).as_dict() for name in names}
        f1 = self.f1
        return {**counts, **rates, "f1": f1 if math.isfinite(f1) else None, "kappa": self.kappa.as_dict(), "n": self.n}


def cohen_kappa(confusion: Confusion, confidence: float = 0.95) -> Estimate:
    """Cohen's kappa; NaN when both raters are constant.

    The interval is kappa at the ends of the Wilson interval of the agreement, with the agreement by chance as it was observed.
    In simulations of 10 to 200 episodes with kappa from 0.3 to 0.95 it holds the true value in 92 to 99 % of cases; the
    large-sample interval of Fleiss, Cohen and Everitt 1969 in 70 to 100 %. When only one rater is constant, kappa is 0
    whatever the other says, and has no interval.

    Kappa is agreement beyond chance: a judge that always answers "failure" on a task that always fails agrees 100 % and
    has no kappa, which is why both are reported.
    """
    n = confusion.n
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p = (
        np.array(
            [
                [confusion.true_positive, confusion.false_positive],
                [confusion.false_negative, confusion.true_negative],
            ],
            dtype=np.float64,
        )
        / n
    )
    row, col = p.sum(1), p.sum(0)
    observed, chance = float(np.trace(p)), float(row @ col)
    if chance >= 1.0:
        return Estimate(math.nan, math.nan, math.nan, n)
    kappa = (observed - chance) / (1 - chance)
    if min(*row, *col) == 0.0:
        return Estimate(kappa, math.nan, math.nan, n)
    agreed = confusion.true_positive + confusion.true_negative
    low, high = ((rate - chance) / (1 - chance) for rate in wilson_interval(agreed, n, confidence))
    return Estimate(kappa, max(-1.0, low), high, n)
