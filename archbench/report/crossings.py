"""Where one curve overtakes another: the context from which an architecture becomes the cheaper one.

Between two neighbouring points both curves are taken as straight in log-log coordinates, in which a power law is
straight. The crossing of y_a and y_b between x_1 and x_2 lies at

    log x = log x_1 + t (log x_2 - log x_1),    t = r_1 / (r_1 - r_2),    r_i = log(y_a(x_i) / y_b(x_i))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise

from archbench.report.evidence import Finding, known, separated


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """`cheaper_after` lies below `cheaper_before` from `x` on.

    `resolved` is false where noise could have made the crossing: the intervals are apart with one order nowhere before
    it, or with the other order nowhere after it.
    """

    cheaper_before: str
    cheaper_after: str
    x: float
    y: float
    resolved: bool


Curve = Mapping[float, Finding]


def crossings(curves: Mapping[str, Curve], noisy: bool) -> list[Crossing]:
    """All crossings of all pairs of curves (name -> x -> finding), by x.

    Only points that both curves have count. Crossings of curves that are not `noisy` (state bytes) are all resolved.
    """
    found = [crossing for a, b in combinations(curves, 2) for crossing in _pair(a, curves[a], b, curves[b], noisy)]
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


def _pair(a: str, ya: Curve, b: str, yb: Curve, noisy: bool) -> list[Crossing]:
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
        found.append(
            Crossing(
                cheaper_before=before,
                cheaper_after=after,
                x=math.exp(math.log(left) + t * (math.log(right) - math.log(left))),
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
