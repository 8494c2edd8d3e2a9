"""Intervals and the right to print a number: bootstrap, order statistics, Wilson, percentiles, geometric means.

Everything here is deterministic: resampling is seeded, so the same samples give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from archbench.errors import UnsupportedError

CONFIDENCE = 0.95
RESAMPLES = 2000
UNSEEN = 0.01
"""A percentile is printed only if, with at most this probability, every sample lies below it."""


class Interval(NamedTuple):
    """Bounds of a quantity, both included."""

    low: float
    high: float
    confidence: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    confidence: float = CONFIDENCE,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Interval of sum(numerators) / sum(denominators), one entry a cluster (a document); None for a single cluster.

    Whole clusters are drawn, because what lies within one is alike. The percentile bootstrap is too narrow for a
    handful of clusters. Denominators must be above 0.
    Source: Efron & Tibshirani 1993, An introduction to the bootstrap, section 13.3.
    """
    numerators = np.asarray(numerators, dtype=np.float64)
    if len(numerators) < 2:
        return None
    return percentile_interval(resampled_ratios(numerators, denominators, n_resamples, seed), confidence)


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[Hashable], confidence: float = CONFIDENCE, seed: int = 0
) -> Interval | None:
    """Interval of the mean of `values`, whose entries with equal `clusters` are drawn together; None for one cluster.

    The mean is a ratio, sum over count: clusters differ in size, so the count varies from draw to draw as well.
    """
    names = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    index = [names[cluster] for cluster in clusters]
    sums = np.bincount(index, weights=values, minlength=len(names))
    return bootstrap_ratio(sums, np.bincount(index, minlength=len(names)), confidence, seed=seed)


def resampled_ratios(
    numerators: ArrayLike, denominators: ArrayLike, n_resamples: int = RESAMPLES, seed: int = 0
) -> Float64[np.ndarray, "r ..."]:
    """The ratio in each of r draws of c clusters with replacement.

    `numerators` [c, ...] may hold several quantities of the same clusters: all see the same draws, so that functions of
    them (a product, a difference) have the right spread. `denominators` [c] are above 0.
    """
    numerators = np.asarray(numerators, dtype=np.float64)
    denominators = np.asarray(denominators, dtype=np.float64)
    assert len(numerators) == len(denominators) > 0, f"{len(numerators)} numerators, {len(denominators)} denominators"
    assert (denominators > 0).all(), "a cluster without weight cannot be drawn"
    n = len(denominators)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.float64)
    weight = (draws @ denominators).reshape(-1, *[1] * (numerators.ndim - 1))
    return np.tensordot(draws, numerators, axes=1) / weight


def percentile_interval(resampled: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The central `confidence` share of resampled values."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(resampled, dtype=np.float64), [tail, 1 - tail])
    return Interval(float(low), float(high), confidence)


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Interval of the median between two order statistics, whatever the distribution; None where n is too small.

    The k-th sample from either end bounds the median with probability 1 - 2 P(Binomial(n, 1/2) < k); the largest such
    k is taken, so the true coverage is at least `confidence`. 95 % needs 6 samples.
    Source: David & Nagaraja 2003, Order statistics, section 7.1.
    """
    n = len(samples)
    k, below = 0, 0.0
    while k < n:
        log_term = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        below += math.exp(log_term)  # P(Binomial(n, 1/2) <= k)
        if 2 * below > 1 - confidence:
            break
        k += 1
    if k == 0:
        return None
    ordered = sorted(samples)
    return Interval(ordered[k - 1], ordered[n - k], confidence)


def wilson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval of a proportion; good at 0 and 1 too. For n = 0 it is [0, 1].

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    assert 0 <= successes <= n, f"{successes} successes of {n}"
    if n == 0:
        return Interval(0.0, 1.0, confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the bound is exact; rounding would put the estimate itself outside.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return Interval(low, high, confidence)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that k of n samples, drawn without putting back, hold a correct one: 1 - C(n - c, k) / C(n, k).

    Written as a product, because the binomials overflow. Unbiased for the chance that one of k fresh samples passes;
    1 - (1 - c/n)^k is not. Needs 1 <= k <= n.
    Source: Chen et al. 2021, Evaluating large language models trained on code (2107.03374), section 2.1.
    """
    assert 0 <= correct <= n, f"{correct} correct of {n}"
    assert 1 <= k <= n, f"k = {k} of {n} samples"
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def samples_for_percentile(q: float) -> int:
    """The fewest samples from which percentile q (a fraction, 0 < q < 1) may be printed: n >= ln(0.01) / ln(q).

    With fewer, all samples lie below the true percentile with more than 1 % probability, and the largest sample would
    be passed off as it. 0.5 needs 7, 0.9 needs 44, 0.99 needs 459.
    """
    assert 0 < q < 1, f"percentile {q} is not a fraction"
    return math.ceil(math.log(UNSEEN) / math.log(q))


def largest_percentile(n: int) -> float:
    """The largest percentile (a fraction) that n samples may be asked for; 0 for no samples."""
    return UNSEEN ** (1 / n) if n else 0.0


def geometric_mean(factors: Sequence[float], intervals: Sequence[Interval | None], names: Sequence[str]) -> float:
    """(product of factors)^(1/n), factors below 0 counted as 0.

    Raises:
        UnsupportedError: a factor has no interval, or one that holds 0: then the sign of the factor is not known, and
            the mean is noise (two negative factors would even make a positive product). Names all such factors.
    """
    refused = [
        f"{name} = {factor:.4g} has no interval" if interval is None
        else f"{name} = {factor:.4g} lies in [{interval.low:.4g}, {interval.high:.4g}], which holds 0"
        for name, factor, interval in zip(names, factors, intervals, strict=True)
        if interval is None or interval.holds(0.0)
    ]  # fmt: skip
    if refused:
        raise UnsupportedError(f"no geometric mean: {'; '.join(refused)}; measure on more text or train longer")
    return float(np.prod(np.clip(factors, 0.0, None))) ** (1 / len(factors))
