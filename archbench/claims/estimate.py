"""Numbers with intervals, and how they combine: over seeds, and two of them into a difference or a ratio.

    three seeds or more     mean with a t interval over seeds; of two cells, over the differences of equal seeds
    fewer                   each seed's own interval, put together as independent ones, and widened by the luck of
                            training where a claim names it
    two cells, one seed     by pairs where the samples are of the same things: documents, texts, turns of a clock; else
                            from the two intervals

Ratios are treated as differences of logarithms. A number without an interval gives none: nothing is guessed.

Sources: Zou & Donner 2008, Statistics in Medicine 27 (a difference from two intervals); Efron & Tibshirani 1993,
chapter 13 (bootstrap of pairs).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit
from scipy.stats import rankdata

from archbench.stats import CONFIDENCE, Interval, median_interval, percentile_interval, resampled_ratios

SEEDS = 3
"""From so many seeds on the interval is over seeds."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A number of one seed. `samples` are what is behind it, each weighing as much as `weights` says; `statistic` is
    how they make it: "mean", "median", or "" where they do not. `exact` numbers are counts; `taught` ones depend on
    what the model has learned."""

    value: float
    low: float | None = None
    high: float | None = None
    samples: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    statistic: str = ""
    codec: str = ""
    exact: bool = False
    taught: bool = True


class Estimate(NamedTuple):
    """A number with bounds, None where it has none. `seeds` trainings are behind it, 0 for a number that does not
    depend on them."""

    value: float
    low: float | None
    high: float | None
    seeds: int


def alone(points: Sequence[Point], luck: float = 0.0) -> Estimate:
    """One cell's number over its seeds."""
    return _over_seeds([Estimate(p.value, *_bounds(p), _seeds(p)) for p in points], luck)


def compared(pairs: Sequence[tuple[Point, Point]], ratio: bool, luck: float = 0.0) -> Estimate:
    """a - b, or a / b, over pairs of equal seeds. For a ratio `luck` is relative, and both must be above 0."""
    if not ratio:
        return _over_seeds([_difference(a, b) for a, b in pairs], luck)
    assert all(a.value > 0 and b.value > 0 for a, b in pairs), "ratios are of positive numbers"
    return exponential(_over_seeds([_log_ratio(a, b) for a, b in pairs], math.log1p(luck)))


def logarithm(estimate: Estimate) -> Estimate:
    """Of a positive estimate; a bound that is not positive is none."""
    low, high = (math.log(bound) if bound is not None and bound > 0 else None for bound in estimate[1:3])
    return Estimate(math.log(estimate.value), low, high, estimate.seeds)


def exponential(estimate: Estimate) -> Estimate:
    """The inverse of `logarithm`."""
    low, high = (None if bound is None else math.exp(bound) for bound in estimate[1:3])
    return Estimate(math.exp(estimate.value), low, high, estimate.seeds)


def weighted_sum(parts: Iterable[tuple[float, Estimate]]) -> Estimate:
    """Sum of weight times estimate, the estimates being independent; without bounds where one has none."""
    value = below = above = 0.0
    known, seeds = True, 0
    for weight, part in parts:
        value += weight * part.value
        seeds = max(seeds, part.seeds)
        if part.low is None or part.high is None:
            known = False
            continue
        ends = sorted((weight * (part.low - part.value), weight * (part.high - part.value)))
        below, above = below + ends[0] ** 2, above + ends[1] ** 2
    if not known:
        return Estimate(value, None, None, seeds)
    return Estimate(value, value - math.sqrt(below), value + math.sqrt(above), seeds)


def slope(xs: Sequence[float], ys: Sequence[Estimate]) -> Estimate:
    """Of the least-squares line through (ln x, ln y), x and y above 0."""
    x = np.log(xs)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return weighted_sum(zip(weights.tolist(), map(logarithm, ys), strict=True))


def correlation(xs: Sequence[float], ys: Sequence[float], coefficient: str) -> Estimate:
    """Pearson's, or of the ranks Spearman's, with the interval of Fisher's z, which is infinite at 1: there it is taken
    of the next lower one. No number (nan) where x or y does not vary. Needs four pairs.

    Source: Bonett & Wright 2000, Psychometrika 65 (Spearman's)."""
    assert len(xs) == len(ys) > 3, "Fisher's z needs four pairs"
    x, y = (np.asarray(values if coefficient == "pearson" else rankdata(values), dtype=float) for values in (xs, ys))
    if not (x.std() and y.std()):
        return Estimate(math.nan, None, None, len(xs))
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    n = len(xs)
    most = 1 - 12 / (n * (n * n - 1)) if coefficient == "spearman" else 1 - 1e-12  # what lies next to a perfect order
    z = math.atanh(min(max(r, -most), most))
    spread = 1.0 if coefficient == "pearson" else math.sqrt(1 + r * r / 2)
    half = _t(math.inf) * spread / math.sqrt(n - 3)
    return Estimate(r, min(r, math.tanh(z - half)), max(r, math.tanh(z + half)), n)


def over_seeds(parts: Sequence[Estimate]) -> Estimate:
    """The mean of one estimate a seed."""
    return _over_seeds(parts, 0.0)


def _over_seeds(parts: Sequence[Estimate], luck: float) -> Estimate:
    n, mean = len(parts), math.fsum(part.value for part in parts) / len(parts)
    seeds = sum(part.seeds for part in parts)
    if all(part.low == part.high == part.value for part in parts) and not seeds:
        return Estimate(mean, min(part.value for part in parts), max(part.value for part in parts), 0)
    if n >= SEEDS:
        spread = math.sqrt(math.fsum((part.value - mean) ** 2 for part in parts) / (n - 1))
        half = _t(n - 1) * spread / math.sqrt(n)
        return Estimate(mean, mean - half, mean + half, seeds)
    found = weighted_sum((1 / n, part) for part in parts)
    if found.low is None or found.high is None:
        return Estimate(mean, None, None, seeds)
    below, above = math.hypot(mean - found.low, luck), math.hypot(found.high - mean, luck)
    return Estimate(mean, mean - below, mean + above, seeds)


def _t(freedom: float) -> float:
    """How many standard errors the interval reaches to each side; infinite freedom means the normal law."""
    return float(stdtrit(min(freedom, 1e9), 0.5 + CONFIDENCE / 2))


def _seeds(point: Point) -> int:
    return int(point.taught and not point.exact)


def _bounds(point: Point) -> tuple[float | None, float | None]:
    return (point.value, point.value) if point.exact else (point.low, point.high)


def _difference(a: Point, b: Point) -> Estimate:
    seeds = max(_seeds(a), _seeds(b))
    value, interval = a.value - b.value, None
    if _pairs(a, b, "mean"):
        resampled = _resampled(a, b)
        interval = percentile_interval(resampled[:, 0] - resampled[:, 1])
    elif _pairs(a, b, "median"):
        interval = median_interval([x - y for x, y in zip(a.samples, b.samples, strict=True)])
    if interval is None:
        return weighted_sum([(1, Estimate(a.value, *_bounds(a), seeds)), (-1, Estimate(b.value, *_bounds(b), seeds))])
    return _with(value, interval, seeds)


def _log_ratio(a: Point, b: Point) -> Estimate:
    seeds = max(_seeds(a), _seeds(b))
    value, interval = math.log(a.value / b.value), None
    if _pairs(a, b, "mean"):
        resampled = _resampled(a, b)
        if (resampled > 0).all():
            interval = percentile_interval(np.log(resampled[:, 0] / resampled[:, 1]))
    elif _pairs(a, b, "median") and min(*a.samples, *b.samples) > 0:
        interval = median_interval([math.log(x / y) for x, y in zip(a.samples, b.samples, strict=True)])
    if interval is None:
        parts = [logarithm(Estimate(p.value, *_bounds(p), seeds)) for p in (a, b)]
        return weighted_sum([(1, parts[0]), (-1, parts[1])])
    return _with(value, interval, seeds)


def _with(value: float, interval: Interval, seeds: int) -> Estimate:
    """The ratio of medians, say, may lie a little outside the interval of the median ratio."""
    return Estimate(value, min(value, interval.low), max(value, interval.high), seeds)


def _pairs(a: Point, b: Point, statistic: str) -> bool:
    """Whether the samples of two numbers stand side by side, and make them by this statistic. Texts cut by another
    codec are other texts, unless weights show that they are the same documents."""
    same = len(a.samples) == len(b.samples) > 1 and a.statistic == b.statistic == statistic
    return same and a.weights == b.weights and (a.codec == b.codec or bool(a.weights) or statistic == "median")


def _resampled(a: Point, b: Point) -> np.ndarray:
    """Means of both in the same draws of their samples."""
    weights = np.asarray(a.weights or [1.0] * len(a.samples))
    return resampled_ratios(np.stack([a.samples, b.samples], axis=1) * weights[:, None], weights)
