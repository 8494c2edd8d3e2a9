"""What pairs of steps say about two versions' speed: median log-ratios, resampled by restart and pair.

The statistic is the mean over restarts of each restart's median log-ratio. Pairs of one restart are no independent
samples of how fast a version is: what memory layout does to it is common to them. So restarts are drawn first and pairs
within them, and since there are few restarts, the spread about the statistic is widened by sqrt(r / (r - 1)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from archbench.gate.significance import ALPHA

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Speed:
    """ln(current / baseline): the estimate, and what it could have been, resampled."""

    value: float
    resampled: Float64[np.ndarray, " r"]

    def p_above(self, bound: float) -> float:
        """Of an estimate this high if the true log-ratio were `bound` or less."""
        return float((np.sum(self.resampled <= bound) + 1) / (len(self.resampled) + 1))

    def p_below(self, bound: float) -> float:
        return float((np.sum(self.resampled >= bound) + 1) / (len(self.resampled) + 1))

    @property
    def interval(self) -> tuple[float, float]:
        low, high = np.quantile(self.resampled, [ALPHA, 1 - ALPHA])
        return float(low), float(high)

    @property
    def error(self) -> float:
        return float(self.resampled.std())


def speed(restarts: Sequence[Sequence[float]], seed: int = 0) -> Speed:
    """The log-ratio over restarts of at least one pair each; with a single restart only its pairs are resampled."""
    rng = np.random.default_rng(seed)
    n = len(restarts)
    value = math.fsum(float(np.median(pairs)) for pairs in restarts) / n
    drawn = np.zeros((RESAMPLES, n))
    chosen = rng.integers(n, size=(RESAMPLES, n))
    for number, pairs in enumerate(restarts):
        rows, slots = np.nonzero(chosen == number)
        values = np.asarray(pairs, dtype=np.float64)
        again = values[rng.integers(len(values), size=(len(rows), len(values)))]
        drawn[rows, slots] = np.median(again, axis=1)
    means = drawn.mean(axis=1)
    if n > 1:
        means = means.mean() + (means - means.mean()) * math.sqrt(n / (n - 1))
    return Speed(value=value, resampled=means)
