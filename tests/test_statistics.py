"""Statistics against published or independently computed numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawdream_env.statistics import (
    Confusion,
    Estimate,
    Rate,
    bootstrap,
    bootstrap_ratio,
    cohen_kappa,
    kendall_tau,
    mean_maximum_rank_violation,
    mean_of_runs,
    paired_bootstrap,
    paired_interval,
    pearson,
    ranks,
    spearman,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:857), Table I, method 3 (score without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_newcombes_published_one(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 300), st.integers(1, 300), st.floats(0.5, 0.999))
def test_wilson_interval_holds_its_rate_and_mirrors(successes: int, n: int, confidence: float) -> None:
    successes = min(successes, n)
    low, high = wilson_interval(successes, n, confidence)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    mirrored = wilson_interval(n - successes, n, confidence)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_wilson_interval_of_nothing_and_of_impossible_counts() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes=5, n=4"):
        wilson_interval(5, 4)
    with pytest.raises(ValueError, match=r"got 95.*0\.95"):
        wilson_interval(1, 2, 95)


def test_intervals_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for successes, n, confidence in ((0, 7, 0.95), (3, 50, 0.9), (11, 11, 0.99)):
        theirs = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
        assert wilson_interval(successes, n, confidence) == pytest.approx(tuple(theirs), abs=1e-12)
    values = np.random.default_rng(0).normal(3.0, 2.0, 12)
    mean = mean_of_runs(values)
    theirs = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert (mean.low, mean.high) == pytest.approx(tuple(theirs), abs=2e-3)  # the table of quantiles has three decimals
    ours = bootstrap_ratio(values, resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.05)  # the mean's standard error is 0.5


def test_rate_reads_well() -> None:
    assert str(Rate.of(108, 200)) == "54.0 % [47.1, 60.8], n=200"
    assert str(Rate.of(0, 0)) == "not measured, n=0"
    assert Rate.over([True, False, True]).value == pytest.approx(2 / 3)
    assert Rate.of(0, 0).as_dict()["value"] is None


def test_paired_bootstrap_covers_the_true_gain_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        before = rng.random(60) < 0.4
        gain = paired_bootstrap(before, before | (rng.random(60) < 0.25), resamples=400, seed=trial)
        hits += gain.low <= 0.6 * 0.25 <= gain.high
    assert 87 <= hits <= 100


def test_equal_pairs_never_claim_certainty() -> None:
    # Agresti and Min with half a count per cell. 0 of 8 discordant: 0 +- 1.96 sqrt(0.1 / 10); 8 of 8 gained:
    # 0.8 +- 1.96 sqrt((0.9 - 0.64) / 10), cut at 1.
    same = paired_bootstrap(np.ones(8), np.ones(8))
    assert (same.value, same.low, same.high, same.n) == pytest.approx((0.0, -0.195996, 0.195996, 8), abs=1e-6)
    gained = paired_bootstrap(np.zeros(8), np.ones(8))
    assert (gained.value, gained.low, gained.high) == pytest.approx((1.0, 0.483965, 1.0), abs=1e-6)
    lost = paired_bootstrap(np.ones(8, bool), np.zeros(8, bool))
    assert (lost.value, lost.low, lost.high) == pytest.approx((-1.0, -1.0, -0.483965), abs=1e-6)
    wide, narrow = paired_bootstrap([0], [0]), paired_bootstrap(np.zeros(800), np.zeros(800))
    assert wide.high > 0.6 and 0 < narrow.high < 0.003
    assert str(paired_bootstrap([20.5, 21.5], [21.0, 22.0])) == "0.500 [no interval], n=2"
    assert str(paired_bootstrap([], [])) == "not measured, n=0"


def test_pairs_that_differ_keep_the_bootstrap() -> None:
    before, after = np.zeros(8), np.array([1, 1, 1, 0, 0, 0, 0, 0])
    assert paired_bootstrap(before, after) == bootstrap_ratio(after - before, resamples=10_000)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_paired_interval_holds_its_difference_and_mirrors(gained: int, lost: int, ties: int) -> None:
    n = gained + lost + ties
    low, high = paired_interval(gained, lost, n)
    assert -1.0 <= low < high <= 1.0
    assert paired_interval(lost, gained, n) == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match=f"gained={gained}, lost={n + 1}"):
        paired_interval(gained, n + 1, n)


def test_resamples_that_are_all_equal_give_no_interval() -> None:
    assert str(bootstrap_ratio(np.full(6, 60.0))) == "60.000 [no interval], n=6"
    assert str(bootstrap_ratio([0.1, 0.2, 0.7], [0.2, 0.4, 1.4])) == "0.500 [no interval], n=3"
    assert str(bootstrap(lambda rows: 1.0, 8)) == "1.000 [no interval], n=8"


def test_paired_values_must_match() -> None:
    with pytest.raises(ValueError, match="before has 90, after has 2"):
        paired_bootstrap(np.zeros(90), [1, 2])


def test_correlations_are_scipys() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    for size in (5, 40):
        x, y = rng.integers(0, 6, size).astype(float), rng.integers(0, 6, size).astype(float)
        assert ranks(x) == pytest.approx(scipy_stats.rankdata(x))
        assert spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
        assert kendall_tau(x, y) == pytest.approx(scipy_stats.kendalltau(x, y).statistic)
        assert pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y).statistic)


def test_correlations_by_hand_and_of_constants() -> None:
    # One swapped neighbour among four: rho = 1 - 6 * 2 / (4 * 15) = 0.8, tau = (5 - 1) / 6.
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3])) and math.isnan(kendall_tau([1], [1]))


def test_mmrv_of_a_worked_example() -> None:
    # Four policies. The dream swaps the first two (0.7 and 0.6) and lifts the last (0.1) above the third (0.4).
    # Highest cost of each: |0.7 - 0.6|, |0.6 - 0.7|, |0.4 - 0.1|, |0.1 - 0.4|.
    truth = [0.7, 0.6, 0.4, 0.1]
    assert mean_maximum_rank_violation([0.5, 0.8, 0.2, 0.3], truth) == pytest.approx((0.1 + 0.1 + 0.3 + 0.3) / 4)
    # Reversed: every policy's highest cost is the distance to the farther end.
    assert mean_maximum_rank_violation([1, 2, 3, 4], truth) == pytest.approx((0.6 + 0.5 + 0.3 + 0.6) / 4)
    assert mean_maximum_rank_violation([9, 6, 3, 1], truth) == 0.0
    assert math.isnan(mean_maximum_rank_violation([1, 2], [1, 1])) and math.isnan(mean_maximum_rank_violation([1], [1]))
    # The dream sees no difference: "worse than" is missed by the worse policy of each pair.
    assert mean_maximum_rank_violation([0.5, 0.5, 0.5], [0.9, 0.8, 0.1]) == pytest.approx((0.0 + 0.1 + 0.8) / 3)


def test_mmrv_is_the_papers_equations() -> None:
    def violation(i: int, j: int) -> float:  # equation 1
        return abs(actual[i] - actual[j]) if (predicted[i] < predicted[j]) != (actual[i] < actual[j]) else 0.0

    rng = np.random.default_rng(0)
    for n in (2, 5, 9):
        predicted, actual = rng.integers(0, 5, n) / 4, np.append(rng.integers(0, 5, n - 1) / 4, 2.0)  # many ties
        mmrv = sum(max(violation(i, j) for j in range(n)) for i in range(n)) / n  # equation 2
        assert mean_maximum_rank_violation(predicted, actual) == pytest.approx(mmrv)


def test_confusions_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    predicted, actual = rng.random(60) < 0.4, rng.random(60) < 0.5
    ours = Confusion.over(predicted, actual)
    assert ours.kappa.value == pytest.approx(metrics.cohen_kappa_score(predicted, actual))
    assert ours.precision.value == pytest.approx(metrics.precision_score(actual, predicted))
    assert ours.recall.value == pytest.approx(metrics.recall_score(actual, predicted))
    assert ours.f1 == pytest.approx(metrics.f1_score(actual, predicted))
    assert ours.agreement.value == pytest.approx(metrics.accuracy_score(actual, predicted))
    table = [[ours.true_negative, ours.false_positive], [ours.false_negative, ours.true_positive]]
    assert metrics.confusion_matrix(actual, predicted).tolist() == table


def test_kappa_of_a_textbook_table() -> None:
    # 20 both yes, 15 both no, 5 and 10 apart: observed 0.7, by chance 0.5, kappa 0.4.
    confusion = Confusion(20, 5, 10, 15)
    assert confusion.kappa.value == pytest.approx(0.4)
    # The Wilson interval of the agreement is [0.5625, 0.8090].
    assert (confusion.kappa.low, confusion.kappa.high) == pytest.approx(
        ((0.5625 - 0.5) / 0.5, (0.8090 - 0.5) / 0.5), abs=2e-4
    )
    # Raters who agree 50 times of 50 by chance 0.52: the ends are those of the agreement's Wilson interval [0.9287, 1].
    perfect = cohen_kappa(Confusion(30, 0, 0, 20))
    assert (perfect.value, perfect.high) == (1.0, 1.0) and perfect.low == pytest.approx(
        (0.92865 - 0.52) / 0.48, abs=1e-4
    )
    opposite = cohen_kappa(Confusion(0, 4, 4, 0))  # agreement 0 of 8, [0, 0.3244], by chance 0.5
    assert (opposite.value, opposite.low) == (-1.0, -1.0) and opposite.high == pytest.approx(-0.3512, abs=1e-3)


@pytest.mark.parametrize(("n", "kappa"), [(10, 0.3), (20, 0.6), (50, 0.85), (200, 0.95)])
def test_the_interval_of_kappa_holds_the_truth_in_small_samples(n: int, kappa: float) -> None:
    cells = np.array([0.25 + kappa / 4, 0.25 - kappa / 4, 0.25 - kappa / 4, 0.25 + kappa / 4])  # both raters: half yes
    found = [Confusion(*map(int, row)).kappa for row in np.random.default_rng(0).multinomial(n, cells, 500)]
    known = [k for k in found if math.isfinite(k.low)]
    assert len(known) > 480 and np.mean([k.low <= kappa <= k.high for k in known]) > 0.9


def test_confusion_counts_and_rates() -> None:
    confusion = Confusion.over([1, 1, 0, 0, 1], [1, 0, 1, 0, 1])
    assert confusion == Confusion(2, 1, 1, 1)
    assert (confusion.precision.value, confusion.recall.value) == pytest.approx((2 / 3, 2 / 3))
    assert confusion.f1 == pytest.approx(2 / 3) and confusion.false_positive_rate.value == 0.5
    assert confusion.as_dict()["agreement"]["successes"] == 3
    with pytest.raises(ValueError, match="2 predicted and 3 actual"):
        Confusion.over([1, 0], [1, 0, 1])


def test_agreement_of_two_constant_raters_has_no_kappa() -> None:
    always_no = Confusion.over([0] * 10, [0] * 10)
    assert always_no.agreement.value == 1.0
    assert always_no.kappa.as_dict() == {"value": None, "low": None, "high": None, "n": 10}


def test_an_estimate_is_printed_with_its_interval() -> None:
    assert str(Estimate(0.5, 0.25, 0.75, 4)) == "0.500 [0.250, 0.750], n=4"


def test_kappa_against_one_constant_rater_has_no_interval() -> None:
    assert str(Confusion.over([1, 1, 0, 1], [1, 1, 1, 1]).kappa) == "0.000 [no interval], n=4"


def test_one_unit_has_a_value_and_no_interval():
    one = bootstrap_ratio([0.4], [0.8])
    assert one.value == pytest.approx(0.5) and math.isnan(one.low) and math.isnan(one.high) and one.n == 1


def test_a_mean_of_runs_has_a_t_interval() -> None:
    three = mean_of_runs([1, 2, 3])  # deviation 1, 4.303 / sqrt(3) = 2.484
    assert (three.value, three.n) == (2.0, 3)
    assert three.low == pytest.approx(2 - 2.484, abs=1e-3) and three.high == pytest.approx(2 + 2.484, abs=1e-3)
    many = mean_of_runs([0.0, 1.0] * 50)  # about 1.96 standard errors
    assert many.high - 0.5 == pytest.approx(1.96 * 0.5025 / 10, abs=1e-3)
    assert (
        mean_of_runs([4.0]).value == 4.0 and math.isnan(mean_of_runs([4.0]).low) and math.isnan(mean_of_runs([]).value)
    )
