"""Intervals cover what they promise, and numbers that cannot be given are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from archbench import stats
from archbench.errors import UnsupportedError


def test_ratio_interval_is_centred_and_deterministic() -> None:
    rng = np.random.default_rng(0)
    weights = rng.uniform(1, 10, size=200)
    totals = weights * rng.normal(3.0, 0.5, size=200)
    interval = stats.bootstrap_ratio(totals, weights)
    assert interval is not None
    assert interval.low < totals.sum() / weights.sum() < interval.high
    error = np.sqrt(((totals - 3 * weights) ** 2).sum()) / weights.sum()  # delta method
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert interval == stats.bootstrap_ratio(totals, weights)


def test_ratio_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        weights = rng.uniform(1, 4, size=60)
        totals = weights * rng.exponential(2.0, size=60)
        interval = stats.bootstrap_ratio(totals, weights, n_resamples=400, seed=seed)
        assert interval is not None
        covered += interval.holds(2.0)
    assert 0.88 <= covered / 200 <= 0.99


def test_one_cluster_has_no_interval() -> None:
    assert stats.bootstrap_ratio([3.0], [2.0]) is None
    assert stats.bootstrap_mean([1.0, 2.0, 3.0], ["a", "a", "a"]) is None


def test_clustering_widens_the_interval_of_a_mean() -> None:
    """Copies of a value within a document are no new evidence."""
    rng = np.random.default_rng(2)
    per_document = rng.normal(size=40)
    values = np.repeat(per_document, 25)
    documents = np.repeat(np.arange(40), 25).tolist()
    clustered = stats.bootstrap_mean(values.tolist(), documents)
    naive = stats.bootstrap_mean(values.tolist(), list(range(len(values))))
    assert clustered is not None and naive is not None
    widths = (clustered.high - clustered.low, naive.high - naive.low)
    assert widths[0] == pytest.approx(5 * widths[1], rel=0.2)
    assert clustered == pytest.approx(stats.bootstrap_ratio(25 * per_document, np.full(40, 25)))


def test_quantities_of_one_cluster_are_resampled_together() -> None:
    values = np.random.default_rng(3).normal(size=(30, 1))
    resampled = stats.resampled_ratios(np.concatenate([values, 2 * values], axis=1), np.ones(30))
    np.testing.assert_allclose(resampled[:, 1], 2 * resampled[:, 0])


@pytest.mark.parametrize(("n", "ranks"), [(6, (1, 6)), (9, (2, 8)), (20, (6, 15)), (100, (40, 61))])
def test_median_interval_uses_the_tabulated_ranks(n: int, ranks: tuple[int, int]) -> None:
    """Ranks as in the tables of distribution-free intervals for the median at 95 %."""
    samples = [float(value) for value in np.random.default_rng(4).permutation(np.arange(1, n + 1))]
    assert stats.median_interval(samples) == (*ranks, 0.95)


def test_median_interval_needs_six_samples() -> None:
    assert stats.median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert stats.median_interval([]) is None
    wide = stats.median_interval([float(value) for value in range(100_000)])
    assert wide is not None and wide.high - wide.low == pytest.approx(1.96 * math.sqrt(100_000), rel=0.01)


def test_wilson_interval() -> None:
    interval = stats.wilson_interval(8, 10)
    assert interval.low == pytest.approx(0.4901625, abs=1e-6)
    assert interval.high == pytest.approx(0.9433178, abs=1e-6)
    none, everything = stats.wilson_interval(0, 20), stats.wilson_interval(20, 20)
    assert none.low == 0 and everything.high == 1
    assert none.high == pytest.approx(1 - everything.low) and 0.1 < none.high < 0.2
    assert stats.wilson_interval(0, 0)[:2] == (0, 1)


@pytest.mark.parametrize(("q", "needed"), [(0.5, 7), (0.9, 44), (0.95, 90), (0.99, 459), (0.999, 4603)])
def test_percentile_rule(q: float, needed: int) -> None:
    assert stats.samples_for_percentile(q) == needed
    assert stats.largest_percentile(needed) >= q > stats.largest_percentile(needed - 1)


def test_largest_percentile_of_nothing() -> None:
    assert stats.largest_percentile(0) == 0


def test_geometric_mean_of_clear_factors() -> None:
    around = [stats.Interval(factor - 0.1, factor + 0.1, 0.95) for factor in (0.5, 2.0)]
    assert stats.geometric_mean([0.5, 2.0], around, ["a", "b"]) == pytest.approx(1.0)


def test_geometric_mean_counts_clearly_negative_factors_as_zero() -> None:
    """Two negative factors must not make a positive mean."""
    assert stats.geometric_mean([-1.0, -1.0], [stats.Interval(-1, -1, 0.95)] * 2, ["a", "b"]) == 0


def test_geometric_mean_names_the_factor_it_refuses() -> None:
    intervals = [stats.Interval(0.1, 0.2, 0.95), stats.Interval(-0.01, 0.02, 0.95), None]
    with pytest.raises(UnsupportedError, match=r"Brier-2 = 0\.005 lies in \[-0\.01, 0\.02\].*Brier-3 .*no interval"):
        stats.geometric_mean([0.15, 0.005, 0.1], intervals, ["Brier-1", "Brier-2", "Brier-3"])
