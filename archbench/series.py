"""Series: the numbers of a run under names that stay the same from run to run, for tools that follow them over time.

    quick/transformer/micro/latency.time_per_token[batch=1,clock=wall,context=2048]
    suite/cell        /size /metric .quantity      [every coordinate, by name]

A series is one quantity of one cell at one point, its seeds taken together as in the report: the mean over seeds with
Student's t interval, or the one seed's own value and interval. A cell is called by its label; its codec, its corpus or
the settings of a grid are added where the run has several of that label and size. Names hold the metric, because
several metrics may measure a quantity of one name, and to add one of them to a suite must not rename the others.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from scipy.special import stdtrit

from archbench.record import Better, Record
from archbench.report.evidence import Evidence, Finding, freeze, known
from archbench.report.rows import Row


@dataclass(frozen=True, kw_only=True)
class Series:
    """One number with its interval (both bounds or neither) and the samples of all its seeds.

    `over_seeds` says that the interval covers seeds, `n` of them; else it covers the `n` samples of one.
    """

    suite: str
    cell: str
    size: str
    metric: str
    metric_version: int
    quantity: str
    unit: str
    better: Better
    at: Mapping[str, Any]
    value: float
    low: float | None
    high: float | None
    confidence: float | None
    over_seeds: bool
    n: int
    seeds: tuple[int, ...]
    samples: tuple[float, ...]

    @property
    def place(self) -> str:
        """`quick/transformer/micro`: whose number it is."""
        return "/".join(part for part in (self.suite, self.cell, self.size) if part)

    @property
    def measure(self) -> str:
        """`latency.time_per_token`."""
        return f"{self.metric}.{self.quantity}"

    @property
    def name(self) -> str:
        return f"{self.place}/{self.measure}{brackets(self.at)}"

    @property
    def is_time(self) -> bool:
        """Whether its samples are repeated timings, in seconds or seconds per something."""
        return self.unit == "s" or self.unit.startswith("s/")

    def bounds(self, confidence: float) -> tuple[float, float] | None:
        """Its interval at another confidence; None where it has none.

        Both arms are stretched as the law of the interval says: Student's t over seeds, else the normal law, which for
        a bootstrap or order-statistic interval is an approximation.
        """
        if self.low is None or self.high is None or self.confidence is None:
            return None
        ratio = self._arm(confidence) / self._arm(self.confidence)
        return self.value - ratio * (self.value - self.low), self.value + ratio * (self.high - self.value)

    def _arm(self, confidence: float) -> float:
        tail = 0.5 + confidence / 2
        return float(stdtrit(self.n - 1, tail)) if self.over_seeds else NormalDist().inv_cdf(tail)


def series_of(records: Sequence[Record]) -> list[Series]:
    """Every series that the records hold a number of, cell by cell."""
    found: list[Series] = []
    for size in dict.fromkeys(record.size for record in records):
        evidence = Evidence([record for record in records if record.size == size])
        found += [series for row in evidence.rows for series in _of_row(evidence, row)]
    return found


def cell_names(records: Sequence[Record]) -> dict[tuple[str, str, str], str]:
    """What series call a cell, by the record's cell, label and size: `transformer/micro`, without the suite."""
    names = {}
    for size in dict.fromkeys(record.size for record in records):
        evidence = Evidence([record for record in records if record.size == size])
        for record in evidence.records:
            name = "/".join(part for part in (evidence.row_of(record).name, size) if part)
            names[record.cell, record.label, record.size] = name
    return names


def _of_row(evidence: Evidence, row: Row) -> Iterator[Series]:
    own = [record for record in evidence.records if record.status == "ok" and evidence.row_of(record) == row]
    heads: dict[tuple[str, str], Record] = {}
    seeds: dict[Any, set[int]] = defaultdict(set)
    for record in own:
        heads.setdefault((record.metric, record.quantity), record)
        seeds[record.metric, record.quantity, freeze(record.at)].add(record.seed)
    for (metric, quantity), head in heads.items():
        for finding in evidence.series(row, metric, quantity):
            yield _series(head, row, finding, tuple(sorted(seeds[metric, quantity, finding.at])))


def _series(head: Record, row: Row, finding: Finding, seeds: tuple[int, ...]) -> Series:
    return Series(
        suite=head.suite,
        cell=row.name,
        size=row.size,
        metric=head.metric,
        metric_version=head.metric_version,
        quantity=head.quantity,
        unit=finding.unit,
        better=finding.better,
        at=finding.coordinates,
        value=known(finding),
        low=finding.low if finding.has_interval else None,
        high=finding.high if finding.has_interval else None,
        confidence=finding.confidence if finding.has_interval else None,
        over_seeds=finding.over == "seeds",
        n=finding.n,
        seeds=seeds,
        samples=finding.samples,
    )


def brackets(at: Mapping[str, Any]) -> str:
    """`[batch=1,context=2048]`, by name, so that it does not depend on the order of the coordinates; "" without any."""
    return f"[{','.join(f'{name}={coordinate(at[name])}' for name in sorted(at))}]" if at else ""


def coordinate(value: Any) -> str:
    """A coordinate's value as text: `2048`, `0.5`, `true`, `1x2`."""
    if isinstance(value, (list, tuple)):
        return "x".join(map(coordinate, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_smaller(series: Series) -> Series | None:
    """The same fact as a quantity of which less is better, for tools that know no other direction.

    A fraction becomes what is missing from 1, points what is missing from 100, anything else its inverse: `token/s`
    becomes `s/token`. None for a quantity that is neither better nor worse, and for the inverse of what is not above 0.
    A bound without an inverse takes the interval with it.
    """
    if series.better == "neither":
        return None
    if series.better == "lower":
        return series
    if series.unit in _WHOLES:
        whole, prefix = _WHOLES[series.unit]
        return _mirrored(series, lambda x: whole - x, f"{prefix}_minus_{series.quantity}", series.unit)
    if series.value <= 0:
        return None
    if series.low is not None and series.low <= 0:
        series = dataclasses.replace(series, low=None, high=None, confidence=None)
    if any(sample <= 0 for sample in series.samples):
        series = dataclasses.replace(series, samples=())
    return _mirrored(series, lambda x: 1 / x, f"inverse_{series.quantity}", _inverse(series.unit))


_WHOLES = {"fraction": (1.0, "one"), "points": (100.0, "hundred")}


def _inverse(unit: str) -> str:
    over, slash, under = unit.partition("/")
    if slash:
        return f"{under}/{over}"
    return unit if unit in ("", "ratio") else f"1/{unit}"


def _mirrored(series: Series, of: Callable[[float], float], quantity: str, unit: str) -> Series:
    return dataclasses.replace(
        series,
        quantity=quantity,
        unit=unit,
        better="lower",
        value=of(series.value),
        low=None if series.high is None else of(series.high),
        high=None if series.low is None else of(series.low),
        samples=tuple(of(sample) for sample in series.samples),
    )
