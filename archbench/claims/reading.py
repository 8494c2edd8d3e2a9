"""Readings taken: from the rows of a run to a number a seed, and what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from archbench.claims.check import Reading
from archbench.claims.estimate import Point
from archbench.claims.run import COUNTED, UNTAUGHT, Line, Row, Run
from archbench.errors import UnsupportedError
from archbench.stats import Interval, bootstrap_mean, wilson_interval

LARGEST = "max"
_WEIGHTS = {("likelihood", "bits_per_byte"): "heldout_bytes"}
"""Quantities that are means of their samples weighed by another quantity's."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A reading of one row: the number of each seed, and the records behind them."""

    row: Row
    points: Mapping[int, Point]
    lines: tuple[Line, ...]
    better: str
    unit: str


def rows_for(run: Run, readings: Sequence[Reading]) -> list[Row]:
    """One row a reading. Where sizes are left open, the largest that all those readings have.

    Raises:
        UnsupportedError: a reading has no row, or several that differ in more than their size.
    """
    found = [_rows(run, reading) for reading in readings]
    open_ = [i for i, reading in enumerate(readings) if reading.cells.size is None]
    if any(len({row.size for row in found[i]}) > 1 for i in open_):
        size = _largest([found[i] for i in open_])
        for i in open_:
            found[i] = [row for row in found[i] if row.size == size]
    for reading, rows in zip(readings, found, strict=True):
        if len(rows) > 1:
            names = ", ".join(sorted({row.label for row in rows}))
            raise UnsupportedError(f"{run.name} has {len(rows)} cells for {_words(reading)}: {names}")
    return [rows[0] for rows in found]


def _rows(run: Run, reading: Reading) -> list[Row]:
    """Those that match and were asked for the metric."""
    matching = [row for row in run.rows if row.matches(reading.cells)]
    if not matching:
        raise UnsupportedError(f"{run.name} has no cell for {_words(reading)}")
    asked = [row for row in matching if any(line.record.metric == reading.metric for line in row.lines)]
    if not asked:
        raise UnsupportedError(f"{run.name} did not measure {reading.metric} of {_words(reading)}")
    return asked


def _largest(groups: Sequence[Sequence[Row]]) -> str:
    shared = set.intersection(*({row.size for row in rows} for rows in groups))
    if not shared:
        raise UnsupportedError("its cells share no size")
    amounts = {row.size: row.parameters for rows in groups for row in rows if row.size in shared}
    if None in amounts.values() and len(amounts) > 1:
        raise UnsupportedError(f"it has cells of sizes {', '.join(sorted(shared))}, and no count of their parameters")
    return max(amounts, key=lambda size: amounts[size] or 0.0)


def taken(run: Run, row: Row, reading: Reading) -> Taken:
    """The number of each seed of a row.

    Raises:
        UnsupportedError: there is no such number; the record's own reason where it has one.
    """
    asked = [line for line in row.lines if line.record.metric == reading.metric]
    ok = [
        line
        for line in asked
        if line.record.quantity == reading.quantity and line.record.status == "ok" and _at(line, reading.at)
    ]
    for name in (name for name, value in reading.at.items() if value == LARGEST):
        top = max((line.record.at[name] for line in ok), default=None)
        ok = [line for line in ok if line.record.at[name] == top]
    failed = [
        line
        for line in asked
        if line.record.status != "ok" and line.record.quantity in (reading.quantity, "*") and _near(line, reading.at)
    ]
    points: dict[int, Point] = {}
    lines: list[Line] = []
    for seed in sorted({line.record.seed for line in (*ok, *failed)}):
        own = [line for line in ok if line.record.seed == seed]
        lost = [line for line in failed if line.record.seed == seed]
        if not own:
            reason = lost[0].record.reason
            if not (reading.given_up and reason.startswith(reading.given_up)):
                raise UnsupportedError(f"{_place(run, row, reading)}: {reason}")
            points[seed] = Point(value=0.0, low=0.0, high=0.0)
            lines.append(lost[0])
            continue
        points[seed] = _pooled(own, row, reading) if reading.pool else _single(run, own, row, reading)
        lines += own
    if not points:
        raise UnsupportedError(f"{_place(run, row, reading)}: not recorded")
    head = next((line.record for line in ok), lines[0].record)
    return Taken(row=row, points=points, lines=tuple(lines), better=head.better, unit=head.unit)


def along(run: Run, row: Row, reading: Reading, name: str) -> dict[float, Reading]:
    """The reading at every recorded value of the coordinate `name`."""
    values = {
        line.record.at[name]
        for line in row.lines
        if (line.record.metric, line.record.quantity, line.record.status) == (reading.metric, reading.quantity, "ok")
        and _at(line, {**reading.at, name: LARGEST})
    }
    if len(values) < 2:
        raise UnsupportedError(f"{_place(run, row, reading)}: {len(values)} values of {name}; a slope needs two")
    return {float(value): replace(reading, at={**reading.at, name: value}) for value in sorted(values)}


def _single(run: Run, own: Sequence[Line], row: Row, reading: Reading) -> Point:
    if len(own) > 1:
        names = sorted({name for line in own for name in line.record.at if name not in reading.at})
        raise UnsupportedError(f"{_place(run, row, reading)}: {len(own)} points, which differ in {', '.join(names)}")
    record = own[0].record
    assert record.value is not None
    low, high = record.low, record.high
    if low is None and reading.spread is not None:
        low, high = (record.value * (1 + sign * reading.spread) for sign in (-1, 1))
    weights = _weights(own[0], row)
    return Point(
        value=record.value,
        low=low,
        high=high,
        samples=tuple(record.samples),
        weights=weights,
        statistic=_statistic(record.value, record.samples, weights),
        codec=record.codec,
        exact=_exact(reading),
        taught=reading.metric not in UNTAUGHT,
    )


def _pooled(own: Sequence[Line], row: Row, reading: Reading) -> Point:
    """The mean over points. Of samples that are 0 or 1 the interval is Wilson's, which is right for independent ones;
    a text that is asked at several points counts as several."""
    values = [line.record.value for line in own if line.record.value is not None]
    samples = [sample for line in own for sample in line.record.samples]
    value = sum(values) / len(values)
    bounds: Interval | None = None
    if samples and set(samples) <= {0.0, 1.0}:
        bounds = wilson_interval(int(sum(samples)), len(samples))
    elif len(samples) > 1:
        bounds = bootstrap_mean(samples, range(len(samples)))
    return Point(
        value=value,
        low=bounds and bounds.low,
        high=bounds and bounds.high,
        samples=tuple(samples),
        statistic=_statistic(value, samples, ()),
        codec=row.codec,
        exact=_exact(reading),
        taught=reading.metric not in UNTAUGHT,
    )


def _exact(reading: Reading) -> bool:
    return reading.metric in COUNTED or reading.spread == 0


def _weights(line: Line, row: Row) -> tuple[float, ...]:
    record = line.record
    name = _WEIGHTS.get((record.metric, record.quantity))
    for other in row.lines if name else ():
        if (other.record.quantity, other.record.seed, other.record.at) == (name, record.seed, record.at):
            return tuple(other.record.samples)
    return ()


def _statistic(value: float, samples: Sequence[float], weights: Sequence[float]) -> str:
    """How the samples make the value."""
    if len(samples) < 2 or (weights and len(weights) != len(samples)):
        return ""
    if np.isclose(np.average(samples, weights=weights or None), value, rtol=1e-6, atol=1e-12):
        return "mean"
    return "median" if np.isclose(np.median(samples), value, rtol=1e-9) else ""


def _at(line: Line, wanted: Mapping[str, Any]) -> bool:
    at = line.record.at
    return all(name in at and (value == LARGEST or at[name] == value) for name, value in wanted.items())


def _near(line: Line, wanted: Mapping[str, Any]) -> bool:
    """A record without a value may name fewer coordinates."""
    at = line.record.at
    return all(value == LARGEST or at.get(name, value) == value for name, value in wanted.items())


def _place(run: Run, row: Row, reading: Reading) -> str:
    return f"{run.name}, {row.name}: {reading.metric} {reading.quantity}{_coordinates(reading.at)}"


def _coordinates(at: Mapping[str, Any]) -> str:
    return f" at {', '.join(f'{name} {value}' for name, value in at.items())}" if at else ""


def _words(reading: Reading) -> str:
    cells = reading.cells
    parts = [str(part) for part in (cells.architecture, cells.label, cells.size, cells.codec, cells.corpus) if part]
    parts += [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in cells.config.items()]
    return " ".join(parts) or "any cell"
