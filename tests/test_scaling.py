"""Scaling laws: laws that are known come back, with honest limits."""

import numpy as np
import pytest

from archbench.errors import UnsupportedError
from archbench.scaling import Run, crossing, fit

SIZES = (1e5, 4e5, 1.6e6, 6.4e6)


def runs(law, sizes=SIZES, data=(2e6,), seeds=3, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Run(parameters=n, bytes=d, loss=law(n, d) + rng.normal(0, noise) if noise else law(n, d), seed=s)
        for n in sizes
        for d in data
        for s in range(seeds)
    ]


def test_a_law_in_size_comes_back():
    found = fit(runs(lambda n, d: 1.2 + 30 * n**-0.3), resamples=5).law
    assert (found.E, found.A, found.a) == pytest.approx((1.2, 30, 0.3), rel=2e-2)
    assert found.B == 0
    assert found.loss(2.5e7, 2e6) == pytest.approx(1.2 + 30 * 2.5e7**-0.3, rel=1e-3)


def test_a_law_in_size_and_data_comes_back():
    def law(n, d):
        return 0.9 + 25 * n**-0.32 + 400 * d**-0.45

    found = fit(runs(law, data=(5e5, 2e6, 8e6), seeds=1)).law
    assert (found.E, found.a, found.b) == pytest.approx((0.9, 0.32, 0.45), rel=2e-2)


def test_two_sizes_make_a_pure_power_law():
    scaling = fit(runs(lambda n, d: 12 * n**-0.15, sizes=SIZES[:2], seeds=1))
    assert (scaling.law.E, scaling.law.a) == pytest.approx((0, 0.15), abs=1e-4)
    assert scaling.held_out is None and scaling.draws == ()


def test_two_sizes_and_two_budgets_hold_no_floor():
    def law(n, d):
        return 30 * n**-0.3 + 400 * d**-0.45

    found = fit(runs(law, sizes=SIZES[:2], data=(5e5, 2e6, 8e6), seeds=1)).law
    assert (found.E, found.a, found.b) == pytest.approx((0, 0.3, 0.45), abs=2e-3)
    found = fit(runs(law, sizes=SIZES[:2], data=(5e5, 2e6), seeds=1)).law
    assert (found.E, found.B) == (0, 0) and found.loss(SIZES[1], 2e6) == pytest.approx(law(SIZES[1], 2e6))
    sparse = [run for run in runs(law, sizes=SIZES[:2], data=(5e5, 2e6), seeds=1) if run.place != (SIZES[0], 2e6)]
    found = fit(sparse).law
    assert found.B == 0 and found.loss(SIZES[0], 5e5) == pytest.approx(law(SIZES[0], 5e5))
    three = fit(runs(lambda n, d: 1 + 30 * n**-0.3 + 400 * d**-0.45, data=(5e5, 2e6), seeds=1))
    assert three.law.E == 0, "two budgets hold no floor either"


def test_the_largest_size_is_predicted_at_each_of_its_budgets():
    scaling = fit(runs(lambda n, d: 0.9 + 25 * n**-0.32 + 4e4 * d**-0.9, data=(1e5, 2e6, 8e7), seeds=1))
    assert scaling.predicted == pytest.approx(scaling.held_out, rel=5e-3)


def test_three_sizes_at_two_budgets_are_checked_at_the_larger_one():
    def law(n, d):
        return 30 * n**-0.3 + 400 * d**-0.45

    scaling = fit(runs(law, sizes=SIZES[:3], data=(5e5, 2e6), seeds=1))
    assert scaling.held_out == pytest.approx(law(SIZES[2], 2e6))
    pure = fit(runs(law, sizes=SIZES[:2], data=(2e6,), seeds=1)).law
    assert scaling.predicted == pytest.approx(pure.loss(SIZES[2], 2e6))


def test_one_size_is_no_law():
    with pytest.raises(UnsupportedError, match=r"1 size\(s\) measured"):
        fit(runs(lambda n, d: 2.0, sizes=(1e5,)))


def test_no_reading_beyond_ten_times_the_largest():
    law = fit(runs(lambda n, d: 1.2 + 30 * n**-0.3, seeds=1)).law
    law.loss(6.4e7, 2e6)
    with pytest.raises(UnsupportedError, match="more than 10 times the largest size measured"):
        law.loss(6.5e7, 2e6)


def test_the_interval_covers_the_exponent():
    covered = 0
    for seed in range(20):
        scaling = fit(runs(lambda n, d: 30 * n**-0.2, sizes=SIZES[:2], seeds=6, noise=0.03, seed=seed), resamples=60)
        covered += scaling.exponent().holds(0.2)
    assert covered >= 16


def test_the_largest_size_is_predicted_from_the_others():
    good = fit(runs(lambda n, d: 1.2 + 30 * n**-0.3, noise=0.005), resamples=40)
    assert good.predicted == pytest.approx(good.held_out, abs=0.05)
    bent = fit(runs(lambda n, d: 12 * n**-0.15 + (0.5 if n > 6e6 else 0), noise=0.005), resamples=40)
    assert bent.held_out - bent.predicted > 0.3 and not bent.predicted_interval.holds(bent.held_out)


def test_laws_cross_where_they_are_equal():
    def early(n, d):
        return 12 * n**-0.12

    def late(n, d):
        return 12 * (1e6) ** -0.12 * (n / 1e6) ** -0.2  # equal at a million parameters

    first, second = (fit(runs(law, noise=0.002, seed=seed), resamples=50) for seed, law in enumerate((early, late)))
    found = crossing("early", first, "late", second, 2e6)
    assert (found.better_before, found.better_after) == ("early", "late")
    assert found.parameters == pytest.approx(1e6, rel=0.15)
    assert found.interval.low < 1e6 * 1.1 and found.interval.high > 1e6 / 1.1 and found.share > 0.9
    assert crossing("a", first, "b", first, 2e6) is None


def test_a_law_says_when_it_does_not_hold():
    """One misses the largest size; the other's losses fall quicker than any power that is searched."""
    sound = fit(runs(lambda n, d: 1.2 + 30 * n**-0.3, noise=0.01), resamples=50)
    assert not sound.refuted and not sound.at_bound
    broken = fit(runs(lambda n, d: 1.2 + 30 * n**-0.3 + (n > 2e6), noise=0.01), resamples=50)
    assert broken.refuted
    steep = fit(runs(lambda n, d: 2.0 + (n < 2e5)), resamples=5)
    assert steep.at_bound
