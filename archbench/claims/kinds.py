"""Checks carried out: from readings of a run to findings, each a number and whether it lies where the claim puts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from archbench.claims.check import (
    Bounds,
    Cells,
    Check,
    Correlation,
    FigureCheck,
    Ordering,
    Place,
    Reading,
    Slope,
    Threshold,
)
from archbench.claims.estimate import SEEDS, Estimate, Point, alone, compared, correlation, over_seeds, slope
from archbench.claims.reading import Taken, along, rows_for, taken
from archbench.claims.run import Line, Row, Run, setting
from archbench.errors import UnsupportedError
from archbench.papers import Figure, Match, Measured, Papers

FEWEST = 5
"""Cells that a correlation needs."""
METRIC = "design_cost"
"""What counts configurations of the papers' sizes."""

Side = Literal["inside", "outside", "both", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A number and the bounds that the claim puts it in. `luck` is what was added for the luck of training."""

    what: str
    estimate: Estimate
    bounds: Bounds
    unit: str
    lines: tuple[Line, ...]
    luck: float = 0.0

    @property
    def side(self) -> Side:
        """Where the whole interval lies; "unknown" without one."""
        low, high = self.estimate.low, self.estimate.high
        if low is None or high is None or math.isnan(self.estimate.value):
            return "unknown"
        least, most = self.bounds.least, self.bounds.most
        if (least is not None and high < least) or (most is not None and low > most):
            return "outside"
        inside = (least is None or low >= least) and (most is None or high <= most)
        return "inside" if inside else "both"


def findings(check: Check, run: Run, papers: Papers) -> list[Finding]:
    """All that a check looks at.

    Raises:
        UnsupportedError: the run lacks a record for it; the message says which.
    """
    match check:
        case Threshold():
            return [_threshold(check, run)]
        case Ordering():
            return _ordering(check, run)
        case Slope():
            return [_slope(check, run)]
        case Correlation():
            return [_correlation(check, run)]
        case FigureCheck():
            return [_figure(check, run, papers)]


def _threshold(check: Threshold, run: Run) -> Finding:
    found = _take(run, [check.of, *([check.over] if check.over else [])])
    if check.over is None:
        estimate, what, unit = (
            alone(list(found[0].points.values()), check.luck),
            _named(found[0], check.of),
            found[0].unit,
        )
    else:
        estimate = _ratio(found[0], found[1], check.luck)
        what, unit = f"{_named(found[0], check.of)} over {_beside(found[1], check.of, check.over)}", "ratio"
    return _finding(what, estimate, check, unit, found)


def _ordering(check: Ordering, run: Run) -> list[Finding]:
    first, *rivals = _take(run, [check.of, *check.rivals])
    if first.better == "neither":
        raise UnsupportedError(f"{check.of.quantity}: neither direction is better, so nothing can be ordered by it")
    made = []
    for reading, rival in zip(check.rivals, rivals, strict=True):
        pairs = _pairs(first, rival)
        ordered = pairs if first.better == "higher" else [(b, a) for a, b in pairs]
        gain = compared(ordered, ratio=False, luck=check.luck)
        what = f"gain of {_named(first, check.of)} over {_beside(rival, check.of, reading)}"
        made.append(_finding(what, gain, check, first.unit, [first, rival]))
    return made


def _slope(check: Slope, run: Run) -> Finding:
    places = check.places or _places(check, run)
    size_free = [reading for place in places for reading in (place.of, place.over) if reading is not None]
    if check.places and all(reading.cells.size is None for reading in size_free):
        rows = dict(zip(map(id, size_free), rows_for(run, size_free), strict=True))
    else:
        rows = {id(reading): rows_for(run, [reading])[0] for reading in size_free}
    above = [taken(run, rows[id(place.of)], place.of) for place in places]
    below = [None if place.over is None else taken(run, rows[id(place.over)], place.over) for place in places]
    all_taken = [*above, *(part for part in below if part is not None)]
    seeds = sorted(set.intersection(*(set(part.points) for part in all_taken)))
    if not seeds:
        raise UnsupportedError(f"{run.name}: the points of the slope share no seed")
    xs, per_seed = [place.x for place in places], []
    for seed in seeds:
        ys = [_y(a.points[seed], None if b is None else b.points[seed]) for a, b in zip(above, below, strict=True)]
        per_seed.append(slope(*(_rises(xs, ys) if check.rise else (xs, ys))))
    estimate = over_seeds(per_seed)
    what = f"exponent of {_named(above[0], places[0].of, where=False)}"
    if below[0] is not None and places[0].over is not None:
        what += f" over {_beside(below[0], places[0].of, places[0].over)}"
    points = ", ".join(f"{x:g}" for x in xs)
    return _finding(f"{what} along {check.along.partition('.')[2] or 'x'} {points}", estimate, check, "", all_taken)


def _places(check: Slope, run: Run) -> list[Place]:
    """The points along a coordinate of one row, or over the rows that differ in a key of their config."""
    assert check.of is not None, "a slope without places has a reading"
    kind, _, name = check.along.partition(".")
    if kind == "at":
        (row, *others) = rows_for(run, [check.of, *([check.over] if check.over else [])])
        here = along(run, row, _pinned(check.of, row), name)
        if check.over is None:
            return [Place(x=x, of=of) for x, of in here.items()]
        there = along(run, others[0], _pinned(check.over, others[0]), name)
        both = sorted(here.keys() & there.keys())
        if len(both) < 2:
            raise UnsupportedError(f"{run.name}: {len(both)} values of {name} in common; a slope needs two")
        return [Place(x=x, of=here[x], over=there[x]) for x in both]
    values = {setting(row.config, name) for row in run.rows if row.matches(check.of.cells)} - {None}
    if len(values) < 2:
        raise UnsupportedError(f"{run.name} has {len(values)} values of {name}; a slope needs two")

    def at(reading: Reading, value: float) -> Reading:
        return replace(reading, cells=replace(reading.cells, config={**reading.cells.config, name: value}))

    return [
        Place(x=float(value), of=at(check.of, value), over=None if check.over is None else at(check.over, value))
        for value in sorted(values)
    ]


def _pinned(reading: Reading, row: Row) -> Reading:
    """The reading with the size of the row that was chosen for it."""
    return replace(reading, cells=replace(reading.cells, size=row.size))


def _y(above: Point, below: Point | None) -> Estimate:
    found = alone([above]) if below is None else compared([(above, below)], ratio=True)
    if found.value <= 0:
        raise UnsupportedError(f"a value of {found.value:g} has no logarithm")
    return found


def _rises(xs: Sequence[float], ys: Sequence[Estimate]) -> tuple[list[float], list[Estimate]]:
    """What is above the first point; of counts only, since the first point's error would be in all of them."""
    if any(y.seeds for y in ys) or len(xs) < 3 or any(y.value <= ys[0].value for y in ys[1:]):
        raise UnsupportedError("a rise needs three counted numbers that grow")
    rises = [y.value - ys[0].value for y in ys[1:]]
    return [x - xs[0] for x in xs[1:]], [Estimate(rise, rise, rise, 0) for rise in rises]


def _correlation(check: Correlation, run: Run) -> Finding:
    xs, ys, lines, n_left = [], [], [], 0
    for row in run.rows:
        if not row.matches(check.x.cells) or not row.matches(check.y.cells):
            continue
        try:
            x, y = (taken(run, row, reading) for reading in (check.x, check.y))
        except UnsupportedError:
            n_left += 1
            continue
        for seed in sorted(x.points.keys() & y.points.keys()):
            xs.append(x.points[seed].value)
            ys.append(y.points[seed].value)
        lines += [*x.lines, *y.lines]
    if len(xs) < FEWEST:
        raise UnsupportedError(f"{run.name} has {len(xs)} cells with both numbers; a correlation needs {FEWEST}")
    left = f", {n_left} without both left out" if n_left else ""
    what = f"{check.coefficient} of {check.y.quantity} and {check.x.quantity} over {len(xs)} cells{left}"
    estimate = correlation(xs, ys, check.coefficient)
    return Finding(what=what, estimate=estimate, bounds=check, unit="", lines=tuple(lines))


def _figure(check: FigureCheck, run: Run, papers: Papers) -> Finding:
    figure = papers.figure(check.figure)
    lines: list[Line] = []

    def counted(part: Figure) -> float:
        if part.match is None:
            if part.exact is None:
                raise UnsupportedError(f"{part.id} is not counted here")
            return part.exact
        found = [_of_size(run, one, part.match) for one in part.match.of]
        below = None if part.match.over is None else _of_size(run, part.match.over, part.match)
        lines.extend(line for one in (*found, *([below] if below else [])) for line in one.lines)
        return sum(_only(one) for one in found) / (_only(below) if below else 1.0)

    if figure.ratio is None:
        value = counted(figure)
    else:
        value = counted(papers.figure(figure.ratio[0])) / counted(papers.figure(figure.ratio[1]))
    margin = max(check.tolerance * abs(figure.value), figure.step or 0.0)
    bounds = Bounds(least=figure.value - margin, most=figure.value + margin)
    estimate = Estimate(value, value, value, 0)
    return Finding(what=figure.of, estimate=estimate, bounds=bounds, unit=figure.unit, lines=tuple(lines))


def _of_size(run: Run, part: Measured, match: Match) -> Taken:
    """The row of a published size; of several, the one that goes by its architecture's name."""
    cells = Cells(architecture=part.architecture, size=part.size)
    if sum(row.matches(cells) for row in run.rows) > 1:
        cells = replace(cells, label=part.architecture)
    reading = Reading(metric=METRIC, quantity=match.quantity, cells=cells, at=match.at)
    return taken(run, rows_for(run, [reading])[0], reading)


def _only(found: Taken) -> float:
    return next(iter(found.points.values())).value


def _take(run: Run, readings: Sequence[Reading]) -> list[Taken]:
    rows = rows_for(run, readings)
    return [taken(run, row, reading) for row, reading in zip(rows, readings, strict=True)]


def _pairs(a: Taken, b: Taken) -> list[tuple[Point, Point]]:
    seeds = sorted(a.points.keys() & b.points.keys())
    if not seeds:
        raise UnsupportedError(f"{a.row.name} and {b.row.name} share no seed")
    return [(a.points[seed], b.points[seed]) for seed in seeds]


def _ratio(a: Taken, b: Taken, luck: float) -> Estimate:
    pairs = _pairs(a, b)
    if all(above.value > 0 and below.value > 0 for above, below in pairs):
        return compared(pairs, ratio=True, luck=luck)
    raise UnsupportedError(f"{a.row.name} over {b.row.name}: a value is not positive, so there is no ratio")


def _finding(what: str, estimate: Estimate, check: Bounds, unit: str, found: Sequence[Taken]) -> Finding:
    lines = {line.number: line for part in found for line in part.lines}
    luck = check.luck if 0 < estimate.seeds < SEEDS else 0.0
    return Finding(what=what, estimate=estimate, bounds=check, unit=unit, lines=tuple(lines.values()), luck=luck)


def _named(found: Taken, reading: Reading, where: bool = True) -> str:
    at = ", ".join(f"{name} {value}" for name, value in reading.at.items())
    return f"{reading.quantity}{f' ({at})' if at and where else ''} of {_who(found.row)}"


def _beside(found: Taken, first: Reading, reading: Reading) -> str:
    """No more than differs from the first reading."""
    if (reading.metric, reading.quantity, reading.at) == (first.metric, first.quantity, first.at):
        return f"that of {_who(found.row)}"
    return _named(found, reading)


def _who(row: Row) -> str:
    return row.label if row.size == "custom" else f"{row.label} {row.size}"
