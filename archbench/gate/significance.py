"""The tests behind verdicts: equivalence of paired means, exact McNemar, Holm's correction.

All probabilities are one-sided. Differences are given so that positive is worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

from archbench.stats import resampled_ratios

ALPHA = 0.05
POWER = 0.8
"""A detectable difference is found with this probability."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference with its standard error and degrees of freedom. With an error of 0 it is taken as it is."""

    mean: float
    error: float
    freedom: float

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Holds the difference with probability 1 - 2 alpha: within the margin if and only if both tests say so."""
        half = float(stdtrit(self.freedom, 1 - alpha)) * self.error if self.error else 0.0
        return self.mean - half, self.mean + half

    def p_above(self, bound: float) -> float:
        """Of a difference as large as this one, if the true one is `bound`."""
        if not self.error:
            return 0.0 if self.mean > bound else 1.0
        return float(stdtr(self.freedom, (bound - self.mean) / self.error))

    def p_below(self, bound: float) -> float:
        if not self.error:
            return 0.0 if self.mean < bound else 1.0
        return float(stdtr(self.freedom, (self.mean - bound) / self.error))

    def p_equivalent(self, margin: float) -> float:
        """Two one-sided tests: the larger probability of a difference this small from one at either margin.

        Source: Schuirmann 1987, A comparison of the two one-sided tests procedure.
        """
        return max(self.p_below(margin), self.p_above(-margin))

    def detectable(self, margin: float) -> float:
        """The true difference that would be found to exceed the margin with probability POWER."""
        return margin + _detectable_errors(self.freedom) * self.error


def _detectable_errors(freedom: float) -> float:
    return float(stdtrit(freedom, 1 - ALPHA) + stdtrit(freedom, POWER))


def detectable(error: float) -> float:
    """The difference from nothing that is found with probability POWER, of an estimate with this standard error."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - ALPHA) + normal.inv_cdf(POWER)) * error


def paired(baseline: ArrayLike, current: ArrayLike, weights: ArrayLike, sign: float) -> Difference:
    """The weighted mean of current - baseline over n documents, by bootstrap over documents. `sign` is -1 where more is
    better.

    Needs two documents at least.
    """
    extra = sign * (np.asarray(current, dtype=np.float64) - np.asarray(baseline, dtype=np.float64))
    weights = np.asarray(weights, dtype=np.float64)
    n = len(extra)
    assert n == len(weights) > 1, f"{n} differences, {len(weights)} weights"
    drawn = resampled_ratios(extra * weights, weights)
    # The bootstrap's variance is that of n draws from n values: n / (n - 1) too small.
    error = float(drawn.std()) * math.sqrt(n / (n - 1))
    return Difference(mean=float((extra * weights).sum() / weights.sum()), error=error, freedom=n - 1)


def over_seeds(differences: Sequence[float]) -> Difference:
    """The mean of one difference a seed, of at least two seeds."""
    n = len(differences)
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    return Difference(mean=math.fsum(differences) / n, error=error, freedom=n - 1)


def mcnemar(n_lost: int, n_won: int) -> float:
    """The probability of losing at least `n_lost` of the n_lost + n_won items on which two versions differ, if either
    is as likely to be right on such an item.

    Source: McNemar 1947; exact, by the binomial distribution.
    """
    n = n_lost + n_won
    return math.fsum(math.comb(n, k) for k in range(n_lost, n + 1)) / 2**n


def fewest_lost(alpha: float = ALPHA) -> int:
    """How many items must be lost, and none won, to be noticed."""
    return math.ceil(-math.log2(alpha))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Each probability adjusted so that all questions together have the error of one.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = sorted(range(len(probabilities)), key=lambda index: probabilities[index])
    adjusted, largest = [0.0] * len(probabilities), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * probabilities[index]))
        adjusted[index] = largest
    return adjusted
