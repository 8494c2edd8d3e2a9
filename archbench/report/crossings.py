"""Where one curve overtakes another: the context from which an architecture becomes the cheaper one.

Between two neighbouring points both curves are taken as straight in log-log coordinates, in which a power law is
straight. The crossing of y_a and y_b between x_1 and x_2 lies at

    log x = log x_1 + t (log x_2 - log x_1),    t = r_1 / (r_1 - r_2),    r_i = log(y_a(x_i) / y_b(x_i))

Its interval is a bootstrap: all medians are taken again from samples drawn with replacement, the same draws for both
curves, since sample r of one and sample r of the other were taken one after the other; every such pair of curves has
its own crossing, or shows none within the contexts measured. Where a value has an interval but no samples of its own (a
mean over seeds), it is drawn from a normal law with that interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64

from archbench.report.evidence import Finding, known, separated

RESAMPLES = 1000
CONFIDENCE = 0.95
_FEWEST = 6
"""Fewer samples have no interval of their median either."""


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """`cheaper_after` lies below `cheaper_before` from `x` on.

    `resolved` is false where noise could have made the crossing: the intervals are apart with one order nowhere before
    it, or with the other order nowhere after it. `low` and `high` bound x with 95 %: 0 is before the contexts measured,
    infinity beyond them, and both are None where a value has no interval.
    """

    cheaper_before: str
    cheaper_after: str
    x: float
    y: float
    resolved: bool
    low: float | None = None
    high: float | None = None


Curve = Mapping[float, Finding]


def crossings(curves: Mapping[str, Curve], noisy: bool) -> list[Crossing]:
    """All crossings of all pairs of curves (name -> x -> finding), by x.

    Only points that both curves have count. Crossings of curves that are not `noisy` (state bytes) are all resolved.
    """
    drawn = {name: _redrawn(curve, seed) if noisy else {} for seed, (name, curve) in enumerate(curves.items())}
    found = [
        crossing
        for a, b in combinations(curves, 2)
        for crossing in _pair(a, curves[a], b, curves[b], noisy, drawn[a], drawn[b])
    ]
    return sorted(found, key=lambda crossing: crossing.x)


def on_floor(crossing: Crossing, curves: Mapping[str, Curve]) -> bool:
    """Whether no other curve lies below the crossing: there the cheapest of all changes."""
    others = [curve for name, curve in curves.items() if name not in (crossing.cheaper_before, crossing.cheaper_after)]
    heights = [_height(curve, crossing.x) for curve in others]
    return all(height is None or height >= crossing.y for height in heights)


def _height(curve: Curve, x: float) -> float | None:
    """The curve at x, straight between its points in log-log coordinates; None outside them."""
    for left, right in pairwise(sorted(curve)):
        if left <= x <= right:
            t = math.log(x / left) / math.log(right / left)
            return known(curve[left]) ** (1 - t) * known(curve[right]) ** t
    return None


_Redrawn = Mapping[float, Float64[np.ndarray, " r"]]


def _pair(a: str, ya: Curve, b: str, yb: Curve, noisy: bool, drawn_a: _Redrawn, drawn_b: _Redrawn) -> list[Crossing]:
    shared = sorted(x for x in ya if x in yb and x > 0 and known(ya[x]) > 0 and known(yb[x]) > 0)
    log_ratio = {x: math.log(known(ya[x]) / known(yb[x])) for x in shared}
    decided = [x for x in shared if log_ratio[x] != 0]
    found = []
    for left, right in pairwise(decided):
        if log_ratio[left] * log_ratio[right] > 0:
            continue
        t = log_ratio[left] / (log_ratio[left] - log_ratio[right])
        before, after = (a, b) if log_ratio[left] < 0 else (b, a)
        y_left, y_right = math.log(known(ya[left])), math.log(known(ya[right]))
        x = math.exp(math.log(left) + t * (math.log(right) - math.log(left)))
        low, high = _interval(x, shared, drawn_a, drawn_b, math.copysign(1, log_ratio[left]))
        found.append(
            Crossing(
                cheaper_before=before,
                cheaper_after=after,
                x=x,
                low=low,
                high=high,
                y=math.exp(y_left + t * (y_right - y_left)),
                resolved=not noisy
                or (
                    _apart(ya, yb, [x for x in decided if x <= left], log_ratio[left])
                    and _apart(ya, yb, [x for x in decided if x >= right], log_ratio[right])
                ),
            )
        )
    return found


def _apart(ya: Curve, yb: Curve, points: list[float], sign: float) -> bool:
    """Whether, at one of the points, the two differ beyond their intervals in the direction of `sign`."""
    return any((known(ya[x]) - known(yb[x])) * sign > 0 and separated(ya[x], yb[x]) for x in points)


def _redrawn(curve: Curve, seed: int) -> dict[float, Float64[np.ndarray, " r"]]:
    """The value at each x, drawn again r times; x without an interval are left out."""
    found = {}
    for index, (x, finding) in enumerate(sorted(curve.items())):
        n = len(finding.samples)
        if finding.over == "samples" and n >= _FEWEST:
            draws = np.random.default_rng([index, n]).integers(n, size=(RESAMPLES, n))  # the same for every curve
            found[x] = np.median(np.asarray(finding.samples)[draws], axis=1)
        elif finding.low is not None and finding.high is not None:
            width = 2 * NormalDist().inv_cdf(0.5 + (finding.confidence or CONFIDENCE) / 2)
            own = np.random.default_rng([index, seed])
            found[x] = own.normal(known(finding), (finding.high - finding.low) / width, size=RESAMPLES)
    return {x: values.clip(min=1e-3 * known(curve[x])) for x, values in found.items()}


def _interval(
    x: float, shared: Sequence[float], drawn_a: _Redrawn, drawn_b: _Redrawn, sign: float
) -> tuple[float | None, float | None]:
    """Interval of the crossing near x at which the log ratio leaves `sign`."""
    if any(place not in drawn_a or place not in drawn_b for place in shared):
        return None, None
    # Above 0 as long as the curve that is cheaper before the crossing still is.
    lead = sign * np.stack([np.log(drawn_a[place] / drawn_b[place]) for place in shared], axis=1)
    left, right, logs = lead[:, :-1], lead[:, 1:], np.log(shared)
    turns = (left > 0) & (right <= 0)
    places = logs[:-1] + np.where(turns, left, 0) / np.where(turns, left - right, 1) * np.diff(logs)
    nearest = np.where(turns, np.abs(places - math.log(x)), math.inf).argmin(axis=1)
    beyond = np.where(lead[:, -1] > 0, math.inf, 0.0)
    found = np.where(turns.any(axis=1), np.exp(places[np.arange(len(places)), nearest]), beyond)
    found.sort()
    tail = (1 - CONFIDENCE) / 2
    return float(found[math.floor(tail * (len(found) - 1))]), float(found[math.ceil((1 - tail) * (len(found) - 1))])
